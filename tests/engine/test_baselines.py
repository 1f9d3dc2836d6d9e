"""A baseline that nobody took is, estimated afterwards, the one that would have been taken."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.baselines import Baseline, Moved, Since, day_bases, estimate, held_at, price_in_shares_at
from engine.booking import AppliedSplit
from engine.corporate_actions import Split, scale_since
from engine.instants import to_ns
from engine.ledger import LedgerEntry, LedgerKind, Side
from engine.pnl import DayBase
from engine.portfolio import Portfolio
from tests.bookkeeping import AT, Bookkeeping, cash, fill, opening, reversal
from tests.oracle import MICRO

NAMES = ("p-1", "p-2")
SYMBOLS = ("AAPL", "MSFT", "XOM")


def moved(entry: LedgerEntry) -> Moved:
    return Moved(
        entry.kind,
        entry.symbol,
        entry.side,
        entry.quantity,
        entry.scale,
        entry.amount,
        entry.fee,
        entry.receivable,
        entry.cost,
        entry.nav_before or 0,
    )


def since(kept: Bookkeeping, name: str, sequence: int) -> Since:
    found = Since()
    for entry in kept.entries[name][sequence:]:
        found.add(moved(entry))
    return found


class Restarts(RuleBasedStateMachine):
    """Two portfolios, fills, flows, reversals, splits and dividends; a cut at any time, estimated after every step."""

    @initialize()
    def begin(self) -> None:
        self.kept = Bookkeeping()
        self.count = 0
        self.kept.send(*(opening(name) for name in NAMES))
        for symbol in SYMBOLS:
            self.kept.tick(symbol, "64")
        self.cut()

    def fresh_id(self) -> str:
        self.count += 1
        return f"e-{self.count}"

    @rule()
    def cut(self) -> None:
        self.kept.cut()
        self.cut_at, self.kept.now = self.kept.now, self.kept.now + timedelta(seconds=1)
        self.prices = {symbol: self.quoted(symbol) for symbol in SYMBOLS}

    def quoted(self, symbol: str) -> tuple[Decimal, int]:
        """The price as it was quoted, in the shares of its instant."""
        price, ts_event_ns = self.kept.book.price(symbol), self.kept.book.price_as_of_ns(symbol)
        assert price is not None
        scale = scale_since(ts_event_ns, self.kept.splits_in_book(symbol))
        return price * scale.numerator / scale.denominator, ts_event_ns

    @rule(
        name=st.sampled_from(NAMES),
        side=st.sampled_from(("BUY", "SELL")),
        quantity=st.sampled_from(("1", "2", "7.5", "12")),
        price=st.sampled_from(("10", "63.25", "80")),
        symbol=st.sampled_from(SYMBOLS),
        fee=st.sampled_from(("0", "1.5")),
        hours=st.integers(-30, 0),
    )
    def trade(self, name: str, side: str, quantity: str, price: str, symbol: str, fee: str, hours: int) -> None:
        """Also executed long ago, before splits that are booked."""
        executed_at = (self.kept.now + timedelta(hours=hours)).isoformat().replace("+00:00", "Z")
        event = fill(name, side, quantity, price, self.fresh_id(), symbol, fee)
        self.kept.send(event | {"executed_at": executed_at})

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(("DEPOSIT", "WITHDRAWAL", "FEE", "INTEREST")))
    def move_cash(self, name: str, kind: str) -> None:
        self.kept.send(cash(name, kind, "12.5", self.fresh_id()))

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def take_back(self, data: st.DataObject, name: str) -> None:
        gone = self.kept.reversed_ids()
        kinds = (LedgerKind.FILL, LedgerKind.DEPOSIT, LedgerKind.FEE)
        ids = [e.event_id for e in self.kept.entries[name] if e.kind in kinds and not e.reverses]
        ids = [event_id for event_id in ids if event_id not in gone]
        if ids:
            self.kept.send(reversal(name, data.draw(st.sampled_from(ids)), self.fresh_id()))

    @rule(symbol=st.sampled_from(SYMBOLS), price=st.sampled_from(("8", "32.5", "64", "96")))
    def quote(self, symbol: str, price: str) -> None:
        self.kept.tick(symbol, price)

    @rule(symbol=st.sampled_from(SYMBOLS), ratio=st.sampled_from(("2", "4", "1:2")))
    def split(self, symbol: str, ratio: str) -> None:
        self.kept.split(symbol, ratio, self.kept.now, self.fresh_id())

    @rule(symbol=st.sampled_from(SYMBOLS))
    def accrue(self, symbol: str) -> None:
        self.kept.accrue(symbol, "0.25", self.kept.now, self.fresh_id())

    @invariant()
    def an_estimate_is_what_was_taken(self) -> None:
        if not hasattr(self, "prices"):
            return
        applied = self.kept.splits.get(0, {})
        prices = {s: price_in_shares_at(self.cut_at, self.prices[s], applied.get(s, ())) for s in SYMBOLS}
        for name in NAMES:
            taken = self.kept.baselines[name]
            moves = since(self.kept, name, taken.sequence)
            found = estimate(self.kept.folded[name], moves, taken.sequence, prices.get, SYMBOLS)
            assert found == Baseline(name, taken.nav, taken.sequence, taken.values)
            unrecorded = estimate(self.kept.folded[name], moves, taken.sequence, prices.get)
            assert unrecorded.estimated is bool(taken.values)


TestRestarts = Restarts.TestCase
TestRestarts.settings = settings(
    max_examples=60, stateful_step_count=25, suppress_health_check=[HealthCheck.filter_too_much]
)


# -- case by case ------------------------------------------------------------------------------------------


def entry(kind: LedgerKind, amount: int = 0, **fields: Any) -> Moved:
    blank = {"symbol": "AAPL", "side": None, "quantity": None, "scale": None, "fee": 0, "receivable": 0, "cost": 0}
    return Moved(**{"kind": kind, "amount": amount * MICRO, "nav_before": 0, **blank, **fields})


def counted(*entries: Moved) -> Since:
    found = Since()
    for one in entries:
        found.add(one)
    return found


def holding(name: str = "p-1", **quantities: str) -> Portfolio:
    kept = Bookkeeping()
    kept.send(opening(name), *(fill(name, "BUY", q, "10", f"b-{s}", s) for s, q in quantities.items()))
    return kept.folded[name]


def test_only_fills_and_external_flows_move_day_bases() -> None:
    bought = entry(LedgerKind.FILL, -30, side=Side.BUY, quantity=Decimal(3))
    split = entry(LedgerKind.SPLIT, quantity=Decimal(9), scale=Fraction(4))
    accrued = entry(LedgerKind.DIVIDEND_ACCRUED, quantity=Decimal(3), receivable=5 * MICRO)
    paid = entry(LedgerKind.DIVIDEND_PAID, 5, receivable=-5 * MICRO)
    cash_in = entry(LedgerKind.DEPOSIT, 100, symbol=None, nav_before=1_000 * MICRO)
    interest = entry(LedgerKind.INTEREST, 7, symbol=None)
    base = Baseline("p-1", 1_000 * MICRO, 4, {"AAPL": 40 * MICRO, "XOM": 9 * MICRO})
    day, bases = day_bases(base, counted(bought, split, accrued, paid, cash_in, interest))
    assert day == DayBase(1_100 * MICRO, 1, 1_100 * MICRO)
    assert bases == {"AAPL": 70 * MICRO, "XOM": 9 * MICRO}


def test_without_a_baseline_the_day_began_with_nothing() -> None:
    bought = entry(LedgerKind.FILL, -30, side=Side.BUY, quantity=Decimal(3))
    assert day_bases(None, counted(bought)) == (DayBase(0, 1, 0), {"AAPL": 30 * MICRO})


def test_a_fill_and_what_takes_it_back_leave_what_was_held() -> None:
    bought = entry(LedgerKind.FILL, -30, side=Side.BUY, quantity=Decimal(3))
    taken_back = entry(LedgerKind.FILL, 30, side=Side.SELL, quantity=Decimal(3))
    assert held_at(holding(AAPL="5"), counted(bought, taken_back)) == {"AAPL": 5}


def test_a_position_that_was_closed_since_is_found_and_one_opened_since_is_not() -> None:
    sold = entry(LedgerKind.FILL, 30, symbol="XOM", side=Side.SELL, quantity=Decimal(3), cost=-30 * MICRO)
    bought = entry(LedgerKind.FILL, -50, side=Side.BUY, quantity=Decimal(5), cost=50 * MICRO)
    held = holding(AAPL="5")
    found = estimate(held, counted(sold, bought), 2, {"XOM": Decimal(11)}.get)
    assert found == Baseline("p-1", held.cash + 20 * MICRO + 33 * MICRO, 2, {"XOM": 33 * MICRO}, estimated=True)


def test_a_position_without_a_price_counted_at_the_cost_that_it_had() -> None:
    bought = entry(LedgerKind.FILL, -20, side=Side.BUY, quantity=Decimal(2), cost=20 * MICRO)
    assert estimate(holding(AAPL="5"), counted(bought), 2, lambda _: None).values == {"AAPL": 30 * MICRO}


@pytest.mark.parametrize(
    ("hours_quoted", "hours_booked", "price"),
    [
        (-1, 0, "30"),  # quoted before the split, held in new shares at the cut
        (-1, 9, "120"),  # quoted before the split, held in old ones: it was booked after the cut
        (1, 0, "120"),  # quoted in new shares, held in new ones
        (1, 9, "480"),  # quoted in new shares, held in old ones: the split came late
    ],
)
def test_a_price_is_brought_to_the_shares_that_were_held(hours_quoted: int, hours_booked: int, price: str) -> None:
    """A split 4:1, a cut five hours later, a price of 120."""
    split = AppliedSplit(Split(AT, Fraction(4)), AT + timedelta(hours=hours_booked))
    priced = (Decimal(120), to_ns(AT + timedelta(hours=hours_quoted)))
    assert price_in_shares_at(AT + timedelta(hours=5), priced, [split]) == Decimal(price)


def test_a_price_beyond_the_range_is_none() -> None:
    late = AppliedSplit(Split(AT, Fraction(1_000_000)), AT + timedelta(hours=2))
    assert price_in_shares_at(AT, (Decimal(10) ** 14, to_ns(AT)), [late]) is None
