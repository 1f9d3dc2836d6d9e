"""A past state, folded from either side, and the mark that it makes."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.as_of import (
    NOTHING,
    NOTHING_BEFORE,
    Cycle,
    DayStart,
    Effects,
    LedgerState,
    PastPosition,
    effects_of,
    hot_positions,
    mark_at,
    sum_effects,
    traded_shares,
)
from engine.ledger import Side
from engine.marks import MarkQuality
from engine.messages import Quote
from engine.positions import HotPosition, value_position
from tests.builders import MICRO
from tests.engine.test_explain import _steps, lived
from tests.scripted_ledger import Moment


def state_of(moment: Moment) -> LedgerState:
    held = {symbol: PastPosition(one.quantity, one.cost) for symbol, one in moment.positions.items()}
    return LedgerState(moment.ledger_sequence, held, **moment.figures)


@given(_steps, st.data())
def test_forward_and_backward_lead_to_the_same_state(steps: list[tuple[object, ...]], data: st.DataObject) -> None:
    script, moments = lived(steps)
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(moments) - 1)] * 2)))
    a, b = moments[first], moments[last]
    effects = effects_of(script.entries[a.ledger_sequence : b.ledger_sequence])
    assert state_of(a).plus(effects, b.ledger_sequence) == state_of(b)
    assert state_of(b).minus(effects, a.ledger_sequence) == state_of(a)
    assert LedgerState().plus(effects_of(script.entries[: b.ledger_sequence]), b.ledger_sequence) == state_of(b)


@given(_steps, st.integers(0, 60))
def test_effects_add_up(steps: list[tuple[object, ...]], at: int) -> None:
    script, _ = lived(steps)
    whole, one, other = effects_of(script.entries), effects_of(script.entries[:at]), effects_of(script.entries[at:])
    assert whole == {
        symbol: one.get(symbol, NOTHING) + other.get(symbol, NOTHING) for symbol in one.keys() | other.keys()
    }
    assert sum_effects(whole.values()).cash == script.portfolio.cash


def test_a_state_is_not_changed_by_looking_back() -> None:
    state = LedgerState(3, {"A": PastPosition(Decimal(2), 5)}, cash=7)
    assert state.minus({"A": Effects(quantity=Decimal(2), cost=5, cash=-5)}, 2) == LedgerState(2, {}, cash=12)
    assert state.positions == {"A": PastPosition(Decimal(2), 5)}


@pytest.mark.parametrize(
    ("side", "scale", "shares"),
    [(Side.BUY, None, "3"), (Side.SELL, None, "-3"), (Side.SELL, Fraction(4), "-12"), (Side.BUY, Fraction(1, 3), "1")],
)
def test_shares_are_those_of_the_booking(side: Side, scale: Fraction | None, shares: str) -> None:
    assert traded_shares(side, Decimal(3), scale) == Decimal(shares)


def test_positions_are_as_hot_state_had_them() -> None:
    state = LedgerState(9, {"A": PastPosition(Decimal("2.50"), 5), "B": PastPosition(Decimal(-1), -3)})
    day = DayStart(7, 0, {"A": 4}, {"A": Effects(notional=6), "B": Effects(notional=-3)})
    held = hot_positions(state, {"A": ((5, "2:1"),)}, {"A": Cycle(11, 2, 77, 3)}, day)
    assert held == {
        "A": HotPosition("2.5", 5, 11, 10, 77, 2, 3, ((5, "2:1"),)),
        "B": HotPosition("-1", -3, 0, -3, 0, 0, 0, ()),
    }


def marked(state: LedgerState, prices: dict[str, str], day: DayStart) -> Any:
    held = hot_positions(state, {}, {}, day)
    quotes = {symbol: Quote(symbol, price, 100, "s") for symbol, price in prices.items()}
    valued = [value_position(symbol, held[symbol], quotes.get(symbol), 0, 100, 10) for symbol in sorted(held)]
    return mark_at(state, valued, day, 100)


def test_a_mark_of_the_past() -> None:
    held = {"A": PastPosition(Decimal(10), 90 * MICRO), "B": PastPosition(Decimal(2), 30 * MICRO)}
    state = LedgerState(6, held, 50 * MICRO, 4 * MICRO, 1, 2, 3, 100 * MICRO, 5, 6)
    day = DayStart(40, 150 * MICRO, {}, {}, [(160 * MICRO, 20 * MICRO)])
    mark = marked(state, {"A": "12"}, day)
    assert (mark.nav, mark.positions_value, mark.unrealized) == (204 * MICRO, 150 * MICRO, 30 * MICRO)
    sums = (mark.realized, mark.fees, mark.income, mark.flows, mark.trading, mark.corporate)
    assert sums == (1, 2, 3, 100 * MICRO, 5, 6)
    assert (mark.epoch, mark.sequence, mark.ledger_sequence, mark.as_of_ns, mark.day_cut_at_ns) == (0, 0, 6, 100, 40)
    assert mark.quality is MarkQuality.MISSING
    assert mark.day_pnl == 34 * MICRO
    assert mark.day_pnl_ratio_e12 == round((160 / 150 * 204 / 180 - 1) * 10**12)


def test_golden_vector_3_a_deposit_in_the_day() -> None:
    """NAV 10,000 at the cut; rises to 10,100; deposit 5,000; NAV now 15,200."""
    day = DayStart(0, 10_000 * MICRO, {}, {}, [(10_100 * MICRO, 5_000 * MICRO)])
    mark = marked(LedgerState(2, {}, cash=15_200 * MICRO), {}, day)
    assert mark.day_pnl == 200 * MICRO
    assert round(mark.day_pnl_ratio_e12 / 10**12, 10) == 0.0166887417


def test_a_day_without_capital_and_one_with_an_unknown_return() -> None:
    empty = marked(LedgerState(), {}, NOTHING_BEFORE)
    assert (empty.nav, empty.day_pnl, empty.day_pnl_ratio_e12, empty.quality) == (0, 0, 0, MarkQuality.LIVE)
    below = DayStart(0, -MICRO, {}, {}, [])
    assert marked(LedgerState(1, {}, cash=5), {}, below).day_pnl_ratio_e12 is None
