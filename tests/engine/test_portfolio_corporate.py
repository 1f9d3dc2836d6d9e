"""Splits, dividends and reversals against hand-computed figures: what they move, and above all what they do not."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.booking import Booked, DueStep, Holder, StepPrices, book_step
from engine.corporate_actions import Step
from engine.entries import draft_event, draft_reversal
from engine.ledger import LedgerEntry, LedgerKind, Side
from engine.messages import ReversalEvent, decode_event
from engine.portfolio import ClosedPosition, Portfolio, Present, check_invariants, fold, value_portfolio
from tests.bookkeeping import AT, cash, fill, opening, record
from tests.oracle import MICRO

LATER = AT + timedelta(days=1)


class Kept:
    """One portfolio, its entries, and the price of AAPL."""

    def __init__(self, *events: dict[str, Any], price: str = "100") -> None:
        self.portfolio = Portfolio("p-1", "USD")
        self.entries: list[LedgerEntry] = []
        self.closed: list[ClosedPosition] = []
        self.price = Decimal(price)
        self.send(opening("p-1"), *events)

    @property
    def nav(self) -> int:
        return value_portfolio(self.portfolio, {"AAPL": self.price}).nav

    def send(self, *events: dict[str, Any], scale: Fraction | None = None) -> None:
        for event in events:
            self.enter(draft_event(decode_event(record(event).value), AT, scale))

    def enter(self, draft: LedgerEntry) -> None:
        before = self.nav
        booking = self.portfolio.book(draft, Present(before, self.price, self.price))
        self.entries.append(booking.entry)
        self.closed += [booking.closed] if booking.closed else []
        assert booking.entry.nav_effect == self.nav - before
        self.check()

    def reverse(self, event_id: str, scale: Fraction | None = None) -> None:
        (original,) = (entry for entry in self.entries if entry.event_id == event_id)
        event = ReversalEvent(event_id=f"r-{event_id}", portfolio_id="p-1", reverses=event_id, effective_at=LATER)
        self.enter(draft_reversal(event, original, LATER, scale))

    def step(self, kind: LedgerKind, *, price: str = "", late: bool = False, **of: Any) -> None:
        since, owed = of.pop("since", Decimal(0)), of.pop("owed", 0)
        step = Step("a-1", kind, "AAPL", AT, 1, currency="USD", **of)
        prices = StepPrices(self.price, Decimal(price) if price else self.price)
        holder = Holder(self.portfolio, since, owed=owed)
        booked = Booked()
        book_step(booked, DueStep(step, prices, late, b"c"), [holder], LATER)
        assert not booked.dead_letters
        self.price = prices.after or self.price
        self.entries += booked.entries
        self.closed += [closed for _, closed in booked.closed]
        self.check()

    def check(self) -> None:
        check_invariants(self.portfolio, {"AAPL": self.price})
        assert fold("p-1", "USD", self.entries) == self.portfolio
        effects = sum(entry.nav_effect + entry.fee for entry in self.entries if entry.kind is LedgerKind.FILL)
        assert self.portfolio.trading == effects


def held(kept: Kept) -> tuple[Decimal, int, int]:
    position = kept.portfolio.positions["AAPL"]
    return position.quantity, position.cost // MICRO, position.realized // MICRO


def text(number: Fraction) -> str:
    return format(Decimal(number.numerator) / number.denominator, "f")


# -- splits -----------------------------------------------------------------------------------------------------


def test_golden_vector_4_a_split_doubles_the_shares_and_nothing_else() -> None:
    kept = Kept(cash("p-1", "DEPOSIT", "5000", "d"), fill("p-1", "BUY", "10", "100", "b"), price="120")
    before = kept.nav
    kept.step(LedgerKind.SPLIT, scale=Fraction(2), price="60")
    assert held(kept) == (20, 1_000, 0)
    assert (kept.nav, kept.entries[-1].nav_effect, kept.portfolio.corporate) == (before, 0, 0)
    assert (kept.entries[-1].quantity, kept.entries[-1].scale, kept.entries[-1].amount) == (10, 2, 0)
    kept.price = Decimal(61)
    assert kept.nav - before == 20 * MICRO


def test_a_reverse_split_of_a_short_shrinks_it() -> None:
    kept = Kept(fill("p-1", "SELL", "80", "10", "s"), price="10")
    kept.step(LedgerKind.SPLIT, scale=Fraction(1, 8), price="80")
    assert held(kept) == (-10, -800, 0)


def test_a_third_of_a_share_keeps_twelve_decimals() -> None:
    kept = Kept(fill("p-1", "BUY", "10", "3", "b"), price="3")
    kept.step(LedgerKind.SPLIT, scale=Fraction(1, 3), price="9")
    assert kept.portfolio.positions["AAPL"].quantity == Decimal("3.333333333333")
    assert kept.nav == 0


def test_a_split_that_leaves_nothing_ends_the_cycle_and_realises_its_cost() -> None:
    kept = Kept(fill("p-1", "BUY", "0.000000000001", "4000000", "b"), price="4000000")
    assert kept.portfolio.positions["AAPL"].cost == 4
    kept.step(LedgerKind.SPLIT, scale=Fraction(1, 1_000), price="4000000000")
    assert (kept.portfolio.positions, kept.portfolio.realized) == ({}, -4)
    assert [(one.realized, one.closed_sequence) for one in kept.closed] == [(-4, 3)]


def test_a_late_split_multiplies_only_what_was_held_before_it() -> None:
    """10 held; 8 bought in new shares before anybody heard of the split 4:1; the price is in new shares as well."""
    kept = Kept(fill("p-1", "BUY", "10", "400", "b"), price="400")
    kept.price = Decimal(100)
    kept.send(fill("p-1", "BUY", "8", "100", "after"))
    before = kept.nav
    kept.step(LedgerKind.SPLIT, scale=Fraction(4), late=True, since=Decimal(8))
    assert held(kept) == (48, 4_800, 0)
    entry = kept.entries[-1]
    assert (entry.late, entry.quantity, entry.nav_effect) == (True, 30, 3_000 * MICRO)
    assert (kept.nav - before, kept.portfolio.corporate) == (3_000 * MICRO, 3_000 * MICRO)


def test_a_late_split_of_a_position_sold_meanwhile_makes_up_for_it() -> None:
    """10@400 and the sale of all 40 new shares at 100: nothing was won or lost."""
    kept = Kept(fill("p-1", "BUY", "10", "400", "b"), price="100")
    kept.send(fill("p-1", "SELL", "40", "100", "s"))
    assert (kept.portfolio.realized, held(kept)[0]) == (-3_000 * MICRO, -30)
    kept.step(LedgerKind.SPLIT, scale=Fraction(4), late=True, since=Decimal(-40))
    assert (kept.portfolio.positions, kept.portfolio.realized, kept.nav) == ({}, 0, 0)


def test_a_cost_on_the_wrong_side_after_a_late_split_is_realised() -> None:
    kept = Kept(fill("p-1", "BUY", "10", "400", "b"), price="100")
    kept.send(fill("p-1", "SELL", "20", "100", "s"))
    kept.step(LedgerKind.SPLIT, scale=Fraction(4), late=True, since=Decimal(-20))
    position = kept.portfolio.positions["AAPL"]
    assert (position.quantity, position.cost) == (20, 0)
    assert kept.nav == 0


def test_an_early_fill_that_comes_after_a_split_counts_in_new_shares() -> None:
    kept = Kept(fill("p-1", "BUY", "10", "100", "b"), price="100")
    kept.step(LedgerKind.SPLIT, scale=Fraction(4), price="25")
    kept.send(fill("p-1", "SELL", "4", "100", "early"), scale=Fraction(4))
    assert held(kept) == (24, 600, 0)
    assert (kept.entries[-1].quantity, kept.entries[-1].amount) == (4, 400 * MICRO)
    kept.send(fill("p-1", "SELL", "12", "100", "early-too"), scale=Fraction(4))
    assert held(kept) == (-24, -600, 0)


@given(
    quantity=st.integers(1, 10_000),
    sold=st.integers(1, 10_000),
    ratio=st.sampled_from([Fraction(2), Fraction(3), Fraction(4), Fraction(5), Fraction(3, 2)]),
)
def test_splitting_then_selling_is_selling_then_splitting_the_rest(quantity: int, sold: int, ratio: Fraction) -> None:
    """Also when more is sold than held; prices and quantities that the ratio divides."""
    buy = fill("p-1", "BUY", str(2 * quantity), "300", "b")
    after = Kept(buy, price="300")
    after.send(fill("p-1", "SELL", str(2 * sold), "330", "s"))
    after.step(LedgerKind.SPLIT, scale=ratio, price=text(300 / ratio))
    first = Kept(buy, price="300")
    first.step(LedgerKind.SPLIT, scale=ratio, price=text(300 / ratio))
    first.send(fill("p-1", "SELL", text(2 * sold * ratio), text(330 / ratio), "s"))
    assert (first.portfolio.cash, first.nav) == (after.portfolio.cash, after.nav)
    # The part of the cost that is released is rounded once in each order.
    assert abs(first.portfolio.realized - after.portfolio.realized) <= 1
    assert {s: p.quantity for s, p in first.portfolio.positions.items()} == {
        s: p.quantity for s, p in after.portfolio.positions.items()
    }


# -- dividends --------------------------------------------------------------------------------------------------


def test_golden_vector_5_a_dividend_moves_from_price_to_income_to_cash() -> None:
    kept = Kept(cash("p-1", "DEPOSIT", "1000", "d"), fill("p-1", "BUY", "10", "100", "b"))
    before = kept.nav
    kept.step(LedgerKind.DIVIDEND_ACCRUED, per_share=Decimal(1))
    assert kept.entries[-1].nav_effect == 10 * MICRO
    kept.price = Decimal(99)
    assert (kept.nav, kept.portfolio.income, kept.portfolio.receivables) == (before, 10 * MICRO, 10 * MICRO)
    assert (kept.portfolio.cash, kept.entries[-1].cash_after) == (0, 0)
    kept.step(LedgerKind.DIVIDEND_PAID, owed=10 * MICRO)
    assert (kept.nav, kept.portfolio.cash, kept.portfolio.receivables) == (before, 10 * MICRO, 0)
    assert (kept.portfolio.income, kept.portfolio.flows) == (10 * MICRO, 1_000 * MICRO)


def test_a_short_owes_the_dividend() -> None:
    kept = Kept(fill("p-1", "SELL", "10", "100", "s"))
    kept.step(LedgerKind.DIVIDEND_ACCRUED, per_share=Decimal("0.25"))
    assert (kept.portfolio.receivables, kept.portfolio.income) == (-2_500_000, -2_500_000)


@pytest.mark.parametrize(("since", "owed"), [("4", 6), ("10", 0), ("-5", 15), ("25", -15)])
def test_who_held_before_the_ex_date_is_owed(since: str, owed: int) -> None:
    kept = Kept(fill("p-1", "BUY", "10", "100", "b"))
    kept.step(LedgerKind.DIVIDEND_ACCRUED, per_share=Decimal(1), since=Decimal(since))
    assert kept.portfolio.receivables == owed * MICRO
    assert len(kept.entries) == 2 + bool(owed)


def test_a_dividend_in_another_currency_is_not_for_this_portfolio() -> None:
    kept = Kept(fill("p-1", "BUY", "10", "100", "b"))
    step = Step("a-1", LedgerKind.DIVIDEND_ACCRUED, "AAPL", AT, 1, currency="EUR", per_share=Decimal(1))
    booked = Booked()
    book_step(booked, DueStep(step, StepPrices(None, None), False, b"c"), [Holder(kept.portfolio)], AT)
    assert (booked.entries, kept.portfolio.receivables) == ([], 0)


def test_a_holder_whose_figures_would_leave_the_range_is_passed_over_and_named() -> None:
    kept = Kept(fill("p-1", "BUY", "500000000000000", "0.001", "b"))
    before = replace(kept.portfolio, positions=dict(kept.portfolio.positions))
    step = Step("a-1", LedgerKind.SPLIT, "AAPL", AT, 1, scale=Fraction(3))
    booked = Booked()
    book_step(booked, DueStep(step, StepPrices(None, None), False, b"c"), [Holder(kept.portfolio)], AT)
    assert (booked.entries, kept.portfolio) == ([], before)
    assert [letter.code for letter in booked.dead_letters] == ["TOO_LARGE"]
    assert "p-1" in booked.dead_letters[0].reason


# -- reversals --------------------------------------------------------------------------------------------------


def test_a_reversed_deposit_is_an_external_flow_the_other_way() -> None:
    kept = Kept(cash("p-1", "DEPOSIT", "1000", "d"))
    kept.reverse("d")
    entry = kept.entries[-1]
    assert (entry.kind, entry.amount, entry.reverses) == (LedgerKind.DEPOSIT, -1_000 * MICRO, "d")
    assert (kept.portfolio.flows, kept.portfolio.cash, entry.nav_before) == (0, 0, 1_000 * MICRO)


@pytest.mark.parametrize("kind", ["WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND"])
def test_every_kind_of_cash_can_be_taken_back(kind: str) -> None:
    kept = Kept(cash("p-1", kind, "7", "c"))
    kept.reverse("c")
    of = kept.portfolio
    assert (of.cash, of.fees, of.income, of.flows) == (0, 0, 0, 0)


def test_a_reversed_fill_leaves_nothing_but_its_entries() -> None:
    kept = Kept(fill("p-1", "BUY", "10", "100", "b"), price="103")
    before = replace(kept.portfolio, positions=dict(kept.portfolio.positions))
    kept.send(fill("p-1", "BUY", "5", "109", "wrong", fee="2"))
    kept.reverse("wrong")
    entry = kept.entries[-1]
    assert (entry.side, entry.quantity, entry.amount, entry.fee) == (Side.SELL, 5, 545 * MICRO, -2 * MICRO)
    counters = {"ledger_sequence": 4, "ledger_hash": entry.hash}
    assert kept.portfolio == replace(before, **counters)


def test_a_reversed_sale_brings_the_position_back_at_its_cost() -> None:
    kept = Kept(fill("p-1", "BUY", "10", "100", "b"), fill("p-1", "SELL", "10", "90", "s", fee="1"))
    assert kept.portfolio.realized == -100 * MICRO
    kept.reverse("s")
    assert (kept.portfolio.realized, kept.portfolio.fees) == (0, 0)
    position = kept.portfolio.positions["AAPL"]
    assert (position.quantity, position.cost, position.opened_sequence) == (10, 1_000 * MICRO, 4)


def test_a_reversed_purchase_that_was_sold_meanwhile_leaves_the_short_that_is_true() -> None:
    kept = Kept(fill("p-1", "BUY", "10", "100", "b"), fill("p-1", "SELL", "10", "90", "s"), price="90")
    kept.reverse("b")
    # The sale realised −100 against a purchase that never was: the short's cost is what the purchase cost.
    assert held(kept) == (-10, -1_000, 0)
    assert (kept.nav, kept.portfolio.realized) == (0, -100 * MICRO)


def test_a_reversal_that_leaves_cost_without_quantity_realises_it() -> None:
    buys = fill("p-1", "BUY", "10", "100", "b1"), fill("p-1", "BUY", "10", "200", "b2")
    kept = Kept(*buys, fill("p-1", "SELL", "10", "150", "s"), price="150")
    kept.reverse("b1")
    assert (kept.portfolio.positions, kept.portfolio.realized) == ({}, -500 * MICRO)
    assert kept.nav == -500 * MICRO
    assert [(one.realized, one.is_long, one.closed_sequence) for one in kept.closed] == [(-500 * MICRO, True, 5)]


def test_a_fill_reversed_after_a_split_is_taken_back_in_new_shares() -> None:
    kept = Kept(fill("p-1", "BUY", "10", "100", "b"), fill("p-1", "BUY", "5", "100", "wrong"))
    kept.step(LedgerKind.SPLIT, scale=Fraction(4), price="25")
    kept.reverse("wrong", Fraction(4))
    assert held(kept) == (40, 1_000, 0)


# -- cycles -----------------------------------------------------------------------------------------------------


def test_cycles_are_archived_with_what_they_realised_and_paid() -> None:
    kept = Kept(
        fill("p-1", "BUY", "10", "100", "b", fee="1"),
        fill("p-1", "SELL", "4", "110", "s1", fee="2"),
        fill("p-1", "SELL", "9", "90", "s2", fee="4"),
        fill("p-1", "BUY", "3", "80", "b2", fee="8"),
    )
    first, second = kept.closed
    assert (first.is_long, first.realized, first.fees) == (True, (40 - 60) * MICRO, 7 * MICRO)
    assert (first.opened_sequence, first.closed_sequence) == (2, 4)
    assert (second.is_long, second.realized, second.fees) == (False, 30 * MICRO, 8 * MICRO)
    assert (second.opened_sequence, second.closed_sequence) == (4, 5)
    assert kept.portfolio.realized == first.realized + second.realized
