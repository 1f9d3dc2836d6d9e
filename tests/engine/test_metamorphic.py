"""Two ways that must come to the same end, whatever the figures are."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.marks import Mark
from tests.bookkeeping import AT, Bookkeeping, cash, fill, opening, reversal

HOUR = timedelta(hours=1)
# Executed before any split of these tests, which take effect an hour later.
LATER = AT + HOUR

shares = st.integers(1, 10_000)
cents = st.integers(1, 10**6).map(lambda n: f"{n}e-2")
money = st.integers(1, 10**9).map(lambda n: f"{n}e-2")
sides = st.sampled_from(("BUY", "SELL"))
whole_ratios = st.integers(2, 20)


def text(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def kept_with(*events: dict[str, Any], price: str | None = None) -> Bookkeeping:
    kept = Bookkeeping()
    kept.send(opening("p"), *events)
    if price is not None:
        kept.tick("AAPL", price)
    return kept


def result(kept: Bookkeeping, name: str = "p") -> Mark:
    """The mark without what counts how it came about."""
    kept.check()
    return replace(kept.mark(name), ledger_sequence=0, day_cut_at_ns=0)


# -- splits ---------------------------------------------------------------------------------------------------


@given(side=sides, held=shares, sold=shares, ratio=whole_ratios, cost=cents, price=cents)
@settings(max_examples=60)
def test_a_split_and_then_a_sale_is_a_sale_and_then_a_split_of_the_rest(
    side: str, held: int, sold: int, ratio: int, cost: str, price: str
) -> None:
    """A sale of r × q at p / r after it is one of q at p before it: also of more than is held, and of a short."""
    other = "SELL" if side == "BUY" else "BUY"
    bought = fill("p", side, str(held), cost, "b", fee="1")
    price_before = str(Decimal(price) * ratio)
    first = kept_with(bought)
    first.tick("AAPL", price_before)
    first.split("AAPL", str(ratio), LATER, "s")
    first.send(fill("p", other, str(sold * ratio), price, "x", fee="2", executed_at=text(LATER)))
    second = kept_with(bought)
    second.tick("AAPL", price_before)
    second.send(fill("p", other, str(sold), price_before, "x", fee="2"))
    second.split("AAPL", str(ratio), LATER, "s")
    assert result(first) == result(second)
    assert positions(first) == positions(second)


def positions(kept: Bookkeeping) -> dict[str, tuple[Decimal, int, int, int]]:
    return {s: (at.quantity, at.cost, at.realized, at.fees) for s, at in kept.folded["p"].positions.items()}


@given(side=sides, held=shares, sold=shares, ratio=whole_ratios, cost=cents, price=cents)
@settings(max_examples=60)
def test_a_fill_of_before_a_split_may_come_after_it(
    side: str, held: int, sold: int, ratio: int, cost: str, price: str
) -> None:
    """It is booked in today's shares, at what it cost then."""
    bought = fill("p", side, str(held), cost, "b", fee="1")
    again = fill("p", "SELL", str(sold), price, "x", fee="2")
    in_time, late = kept_with(bought, again), kept_with(bought)
    for kept in (in_time, late):
        kept.tick("AAPL", "7")
        kept.split("AAPL", str(ratio), LATER, "s")
    late.send(again)
    one, two = result(in_time), result(late)
    # A crossing fill in other shares parts its notional at another place: by less than a micro-unit.
    assert (one.nav, one.cash, one.unrealized + one.realized) == (two.nav, two.cash, two.unrealized + two.realized)
    assert abs(one.realized - two.realized) <= 1
    assert {s: at[0] for s, at in positions(in_time).items()} == {s: at[0] for s, at in positions(late).items()}


@given(side=sides, held=shares, ratio=st.sampled_from(("4", "3:2", "1:8", "1.589")), cost=cents, price=money)
@settings(max_examples=60)
def test_a_split_moves_no_figure_by_more_than_rounding(side: str, held: int, ratio: str, cost: str, price: str) -> None:
    kept = kept_with(fill("p", side, str(held), cost, "b"), price=price)
    before = result(kept)
    kept.split("AAPL", ratio, LATER, "s")
    after = result(kept)
    # Price and quantity are rounded to 12 decimals and 15 digits each, the value to a micro-unit.
    room = 2 + abs(before.positions_value) // 10**13
    for name in ("nav", "unrealized", "day_pnl", "positions_value"):
        assert abs(getattr(after, name) - getattr(before, name)) <= room, name
    assert (after.cash, after.realized, after.fees, after.trading) == (
        before.cash,
        before.realized,
        before.fees,
        before.trading,
    )
    assert after.corporate == after.nav - before.nav


def test_a_late_split_multiplies_only_what_was_held_before_its_instant() -> None:
    kept = kept_with(fill("p", "BUY", "10", "100", "b"))
    kept.send(fill("p", "BUY", "8", "25", "n", executed_at=text(LATER)))
    kept.now = LATER + HOUR
    kept.tick("AAPL", "25", LATER)
    kept.split("AAPL", "4", LATER - HOUR / 2, "s")
    kept.check()
    assert kept.folded["p"].positions["AAPL"].quantity == 48
    assert kept.entries["p"][-1].late
    assert result(kept).corporate == 30 * 25 * 10**6, "it counts from its arrival"


def test_a_late_split_passes_over_who_bought_since_and_what_was_taken_back() -> None:
    kept = Bookkeeping()
    kept.send(opening("p"), opening("q"))
    kept.send(fill("p", "BUY", "8", "25", "n", executed_at=text(LATER)))
    kept.send(fill("q", "BUY", "10", "100", "b"), fill("q", "BUY", "5", "25", "x", executed_at=text(LATER)))
    kept.send(reversal("q", "x", "r"))
    kept.tick("AAPL", "100")
    kept.split("AAPL", "4", LATER - HOUR / 2, "s")
    kept.check()
    assert kept.folded["p"].positions["AAPL"].quantity == 8
    assert kept.folded["q"].positions["AAPL"].quantity == 40


def test_what_a_reverse_split_leaves_nothing_of_is_over_and_its_cost_is_lost() -> None:
    kept = kept_with(fill("p", "BUY", "1e-12", "1000000", "b", fee="0.5"))
    kept.split("AAPL", "1:1000", LATER, "s")
    result(kept)
    assert "AAPL" not in kept.folded["p"].positions
    (cycle,) = kept.closed["p"]
    assert (cycle.realized, cycle.fees, cycle.closed_sequence) == (-1, 500_000, 3)


# -- taking back ----------------------------------------------------------------------------------------------


@given(side=sides, held=shares, sold=shares, cost=cents, price=cents, mark=cents, split_between=st.booleans())
@settings(max_examples=80)
def test_a_fill_and_its_reversal_leave_everything_where_it_was(
    side: str, held: int, sold: int, cost: str, price: str, mark: str, split_between: bool
) -> None:
    kept = kept_with(cash("p", "DEPOSIT", "1000", "d"), fill("p", "BUY", str(held), cost, "b", fee="1"), price=mark)
    if split_between:
        kept.split("AAPL", "4", LATER, "s")
    before, held_before = result(kept), positions(kept)
    kept.send(fill("p", side, str(sold), price, "x", fee="3"))
    kept.send(reversal("p", "x", "r"))
    after = result(kept)
    assert after == before
    assert {s: at[:2] for s, at in positions(kept).items()} == {s: at[:2] for s, at in held_before.items()}


@given(held=shares, cost=cents, mark=cents, ratio=whole_ratios)
@settings(max_examples=40)
def test_a_fill_taken_back_after_a_split_is_taken_back_in_new_shares(
    held: int, cost: str, mark: str, ratio: int
) -> None:
    kept = kept_with(fill("p", "BUY", "7", "10", "a"), price=mark)
    alone = kept_with(fill("p", "BUY", "7", "10", "a"), price=mark)
    kept.send(fill("p", "BUY", str(held), cost, "x", fee="3"))
    for one in (kept, alone):
        one.split("AAPL", str(ratio), LATER, "s")
    kept.send(reversal("p", "x", "r"))
    one, two = result(kept), result(alone)
    assert (one.nav, one.cash, one.realized, one.fees, one.unrealized, one.day_pnl) == (
        two.nav,
        two.cash,
        two.realized,
        two.fees,
        two.unrealized,
        two.day_pnl,
    )
    assert positions(kept) == positions(alone)


@pytest.mark.parametrize("kind", ["DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND"])
def test_a_movement_and_its_reversal_leave_everything_where_it_was(kind: str) -> None:
    kept = kept_with(cash("p", "DEPOSIT", "1000", "d"), fill("p", "BUY", "3", "100", "b"), price="110")
    kept.cut()
    before = result(kept)
    kept.send(cash("p", kind, "123.456789", "x"))
    assert result(kept).nav != before.nav
    kept.send(reversal("p", "x", "r"))
    assert result(kept) == before


# -- flows and dividends --------------------------------------------------------------------------------------


@given(kind=st.sampled_from(("DEPOSIT", "REWARD")), amount=money, prices=st.lists(cents, min_size=1, max_size=4))
@settings(max_examples=60)
def test_a_flow_that_nobody_invests_changes_no_profit_and_loss(kind: str, amount: str, prices: list[str]) -> None:
    """Nor the return, when nothing moves after it."""
    start = (cash("p", "DEPOSIT", "1000000", "d"), fill("p", "BUY", "100", "50", "b", fee="1"))
    with_flow, without = kept_with(*start, price="50"), kept_with(*start, price="50")
    for kept in (with_flow, without):
        kept.cut()
        for price in prices:
            kept.tick("AAPL", price)
    before = result(with_flow)
    with_flow.send(cash("p", kind, amount, "x"))
    one, two = result(with_flow), result(without)
    assert one.day_pnl_ratio_e12 is not None and two.day_pnl_ratio_e12 is not None
    assert abs(one.day_pnl_ratio_e12 - two.day_pnl_ratio_e12) <= 4_000, "to the precision of a float"
    for name in ("day_pnl", "unrealized", "realized", "income", "fees", "trading"):
        assert getattr(one, name) == getattr(two, name) == getattr(before, name), name
    assert one.nav - two.nav == one.flows - two.flows > 0


@given(side=sides, held=shares, per_share=st.integers(1, 10**6).map(lambda n: f"{n}e-4"), mark=cents)
@settings(max_examples=60)
def test_a_dividend_moves_nav_on_its_ex_date_and_not_when_it_is_paid(
    side: str, held: int, per_share: str, mark: str
) -> None:
    kept = kept_with(fill("p", side, str(held), "10", "b"), price=mark)
    before = result(kept)
    kept.accrue("AAPL", per_share, LATER, "d")
    accrued = result(kept)
    owed = (1 if side == "BUY" else -1) * held * int(Decimal(per_share) * 10**6)
    assert accrued.nav - before.nav == accrued.income == accrued.receivables == owed
    kept.send(fill("p", side, "5", "10", "more", executed_at=text(LATER)))
    held_now = result(kept)
    kept.pay("AAPL", per_share, "d")
    paid = result(kept)
    assert paid == replace(held_now, cash=held_now.cash + owed, receivables=0)


def test_who_bought_on_the_ex_date_is_owed_nothing_and_who_sold_then_is() -> None:
    kept = Bookkeeping()
    kept.send(opening("p"), opening("q"), fill("p", "BUY", "10", "50", "b"))
    kept.send(fill("p", "SELL", "10", "50", "s", executed_at=text(LATER)))
    kept.send(fill("q", "BUY", "10", "50", "n", executed_at=text(LATER)))
    kept.accrue("AAPL", "1", LATER, "d")
    kept.check()
    assert (kept.mark("p").receivables, kept.mark("q").receivables) == (10 * 10**6, 0)


# -- order ----------------------------------------------------------------------------------------------------


@given(data=st.data(), order=st.permutations(range(8)))
@settings(max_examples=60)
def test_what_has_nothing_to_do_with_each_other_may_come_in_any_order(data: st.DataObject, order: list[int]) -> None:
    """Of different portfolios and of different symbols: the end is the same, only the numbers of the entries differ."""
    chains = [
        [fill(name, data.draw(sides), str(data.draw(shares)), data.draw(cents), f"{name}-{symbol}-{n}", symbol)]
        for n, (name, symbol) in enumerate([(n, s) for n in ("p", "q") for s in ("AAPL", "BTC", "XOM", "DUST")])
    ]
    assume(len(chains) == 8)
    ends = []
    for arrangement in (range(8), order):
        kept = Bookkeeping()
        kept.send(opening("p"), opening("q"))
        for symbol in ("AAPL", "BTC", "XOM", "DUST"):
            kept.tick(symbol, "12.34")
        for place in arrangement:
            kept.send(*chains[place])
        kept.split("BTC", "4", LATER, "s")
        ends.append(([result(kept, name) for name in ("p", "q")], positions(kept)))
    assert ends[0] == ends[1]


@given(price=cents, ratio=whole_ratios, per_share=cents, quantity=shares)
@settings(max_examples=40)
def test_actions_of_different_symbols_may_come_in_any_order(
    price: str, ratio: int, per_share: str, quantity: int
) -> None:
    ends = []
    for turned in (False, True):
        kept = kept_with(fill("p", "BUY", str(quantity), "10", "a"), fill("p", "SELL", str(quantity), "10", "b", "BTC"))
        kept.tick("AAPL", price)
        kept.tick("BTC", price)
        steps = [
            lambda kept=kept: kept.split("AAPL", str(ratio), LATER, "s"),
            lambda kept=kept: kept.accrue("BTC", per_share, LATER, "d"),
            lambda kept=kept: kept.send(cash("p", "DEPOSIT", "5", "c")),
        ]
        for step in reversed(steps) if turned else steps:
            step()
        kept.pay("BTC", per_share, "d")
        ends.append((result(kept), positions(kept)))
    # The flow met another NAV on its way, which is the return's affair.
    assert replace(ends[0][0], day_pnl_ratio_e12=0) == replace(ends[1][0], day_pnl_ratio_e12=0)
    assert ends[0][1] == ends[1][1]
