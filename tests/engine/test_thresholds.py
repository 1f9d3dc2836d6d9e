"""Thresholds: once at the bound, again after the band; columns against one threshold at a time; only what changed."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.marks import MARK, UNKNOWN, MarkArray, MarkQuality
from engine.thresholds import (
    Crossing,
    Threshold,
    ThresholdFigure,
    ThresholdRefused,
    Thresholds,
    ThresholdSide,
    check_threshold,
    encode_threshold_message,
    from_unit,
    message_of,
    to_unit,
)

MICRO = 1_000_000
NAV, DAY_PNL, RATIO = ThresholdFigure.NAV, ThresholdFigure.DAY_PNL, ThresholdFigure.DAY_PNL_RATIO
ABOVE, BELOW = ThresholdSide.ABOVE, ThresholdSide.BELOW


def threshold(**changes: Any) -> Threshold:
    one = Threshold("t", "p", NAV, ABOVE, Decimal(100), Decimal(5), armed=True)
    return replace(one, **changes)


def mark(count: int = 1, **figures: int) -> MarkArray:
    marks = np.zeros(count, MARK)
    for name, value in figures.items():
        marks[name] = value
    return marks


def follow(one: Threshold, values: list[str], field: str = "nav") -> list[bool | None]:
    """Of each value in turn: True where it fires, False where it is armed again, None where nothing happens."""
    thresholds, slots = Thresholds([one], {one.portfolio_id: 7}), np.array([7])
    found: list[bool | None] = []
    for value in values:
        crossings = thresholds.cross(slots, mark(**{field: to_unit(one.figure, Decimal(value), "value")}))
        found.append(crossings[0].fired if crossings else None)
    return found


def test_a_figure_at_the_bound_fires_once() -> None:
    values = ["99.999999", "100", "100", "99.999999", "100", "101", "95", "94.999999", "99", "100.000001", "100"]
    expected = [None, True, None, None, None, None, None, False, None, True, None]
    assert follow(threshold(), values) == expected


def test_below_is_the_mirror_image() -> None:
    values = ["100.000001", "100", "99", "100", "105", "105.000001", "101", "99.5"]
    assert follow(threshold(side=BELOW), values) == [None, True, None, None, None, False, None, True]


def test_without_hysteresis_the_bound_itself_does_not_arm_again() -> None:
    values = ["100", "100", "99.999999", "100"]
    assert follow(threshold(hysteresis=Decimal(0)), values) == [True, None, False, True]
    assert follow(threshold(hysteresis=Decimal(0), side=BELOW), ["100", "100", "100.000001", "100"]) == [
        True,
        None,
        False,
        True,
    ]


def test_a_negative_bound() -> None:
    loss = threshold(figure=DAY_PNL, side=BELOW, bound=Decimal("-50"), hysteresis=Decimal("10"))
    values = ["0", "-49.999999", "-50", "-60", "-40", "-39.999999", "-51"]
    assert follow(loss, values, "day_pnl") == [None, None, True, None, None, False, True]


def test_a_ratio_is_compared_to_its_twelfth_decimal() -> None:
    one = threshold(figure=RATIO, bound=Decimal("0.05"), hysteresis=Decimal(0))
    values = ["0.049999999999", "0.05", "0.049999999999"]
    assert follow(one, values, "day_pnl_ratio_e12") == [None, True, False]


def test_what_is_loaded_as_fired_does_not_fire_again() -> None:
    assert follow(threshold(armed=False), ["120", "100", "96", "94", "100"]) == [None, None, None, False, True]


def test_a_state_that_was_seen_later_overrules_the_loaded_one() -> None:
    thresholds = Thresholds([threshold()], {"p": 0})
    thresholds.set_armed("t", False)
    thresholds.set_armed("somebody else's", False)
    assert thresholds.cross(np.array([0]), mark(nav=200 * MICRO)) == []


@pytest.mark.parametrize("side", [ABOVE, BELOW])
@pytest.mark.parametrize("armed", [True, False])
def test_what_is_unknown_neither_fires_nor_arms(side: ThresholdSide, armed: bool) -> None:
    ratio = threshold(figure=RATIO, side=side, bound=Decimal(0), hysteresis=Decimal(0), armed=armed)
    assert Thresholds([ratio], {"p": 0}).cross(np.array([0]), mark(day_pnl_ratio_e12=UNKNOWN)) == []
    for nav in (0, 10**12):
        missing = mark(nav=nav, quality=MarkQuality.MISSING)
        assert Thresholds([threshold(side=side, armed=armed)], {"p": 0}).cross(np.array([0]), missing) == []


def test_only_the_slots_that_changed_are_compared() -> None:
    thresholds = Thresholds(
        [threshold(threshold_id=name, portfolio_id=name) for name in "abc"], {"a": 4, "b": 2, "c": 9}
    )
    assert len(thresholds) == 3 and thresholds.slots.tolist() == [2, 4, 9]
    fired = thresholds.cross(np.array([9, 3, 2]), mark(3, nav=200 * MICRO))
    assert [crossing.threshold.threshold_id for crossing in fired] == ["c", "b"]
    assert [crossing.threshold.threshold_id for crossing in thresholds.cross(np.array([4]), mark(nav=200 * MICRO))] == [
        "a"
    ]
    assert thresholds.cross(np.zeros(0, np.int64), mark(0)) == []
    assert Thresholds([], {}).cross(np.array([1]), mark()) == []


MONEY = st.integers(-(10**12), 10**12)
RATIOS = st.integers(-(10**13), 10**13)


@st.composite
def many(draw: st.DrawFn) -> list[Threshold]:
    found = []
    for number in range(draw(st.integers(0, 12))):
        figure = draw(st.sampled_from(ThresholdFigure))
        values = RATIOS if figure is RATIO else MONEY
        found.append(
            Threshold(
                f"t{number}",
                f"p{draw(st.integers(0, 4))}",
                figure,
                draw(st.sampled_from(ThresholdSide)),
                from_unit(figure, draw(values)),
                from_unit(figure, abs(draw(values))),
                draw(st.booleans()),
            )
        )
    return found


class Slow:
    """One threshold in Decimal, as its docstring says it."""

    def __init__(self, one: Threshold) -> None:
        self.one, self.armed = one, one.armed

    def see(self, value: Decimal) -> bool | None:
        one = self.one
        above = one.side is ABOVE
        if self.armed and (value >= one.bound if above else value <= one.bound):
            self.armed = False
            return True
        left = value < one.bound - one.hysteresis if above else value > one.bound + one.hysteresis
        if not self.armed and left:
            self.armed = True
            return False
        return None


@given(
    thresholds=many(), steps=st.lists(st.dictionaries(st.integers(0, 4), st.tuples(MONEY, MONEY, RATIOS)), max_size=8)
)
def test_columns_do_what_one_threshold_at_a_time_does(
    thresholds: list[Threshold], steps: list[dict[int, tuple[int, int, int]]]
) -> None:
    columns = Thresholds(thresholds, {f"p{n}": 10 * n for n in range(5)})
    slow = [Slow(one) for one in thresholds]
    for step in steps:
        marks = mark(len(step))
        for at, (nav, day_pnl, ratio) in enumerate(step.values()):
            marks["nav"][at], marks["day_pnl"][at], marks["day_pnl_ratio_e12"][at] = nav, day_pnl, ratio
        expected = set()
        for one in slow:
            values = step.get(int(one.one.portfolio_id[1:]))
            if values is not None:
                value = values[list(ThresholdFigure).index(one.one.figure)]
                fired = one.see(from_unit(one.one.figure, value))
                if fired is not None:
                    expected.add((one.one.threshold_id, fired, value))
        found = columns.cross(np.array([10 * n for n in step], np.int64), marks)
        assert {(c.threshold.threshold_id, c.fired, c.value) for c in found} == expected


# -- bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "bound", "hysteresis", "code"),
    [
        (NAV, "1.0000001", "0", "TOO_PRECISE"),
        (NAV, "1", "0.0000001", "TOO_PRECISE"),
        (NAV, "1e12", "0", "TOO_LARGE"),
        (NAV, "-1e40", "0", "TOO_LARGE"),
        (NAV, "1e-40", "0", "TOO_PRECISE"),
        (DAY_PNL, "1", "-0.01", "BAD_HYSTERESIS"),
        (RATIO, "0.0000000000001", "0", "TOO_PRECISE"),
        (RATIO, "1000000", "0", "TOO_LARGE"),
        (NAV, "NaN", "0", "NOT_FINITE"),
        (NAV, "1", "Infinity", "NOT_FINITE"),
    ],
)
def test_bounds_that_can_not_be_compared_exactly(
    figure: ThresholdFigure, bound: str, hysteresis: str, code: str
) -> None:
    with pytest.raises(ThresholdRefused) as refused:
        check_threshold(figure, Decimal(bound), Decimal(hysteresis))
    assert refused.value.code == code


def test_bounds_that_can() -> None:
    check_threshold(NAV, Decimal("1000000.000001"), Decimal(0))
    check_threshold(DAY_PNL, Decimal("-0.5"), Decimal("0.25"))
    check_threshold(RATIO, Decimal("-0.000000000001"), Decimal("0.01"))


def test_the_message_counts_and_shows_plain_decimals() -> None:
    at = datetime(2026, 11, 20, 15, tzinfo=UTC)
    crossing = Crossing(threshold(bound=Decimal("1E+6")), True, 1_000_000_500_000, 0, 17)
    assert json.loads(encode_threshold_message(message_of(crossing, 3, at))) == {
        "v": 1,
        "event_id": "t#3",
        "threshold_id": "t",
        "portfolio_id": "p",
        "figure": "NAV",
        "side": "ABOVE",
        "bound": "1000000",
        "hysteresis": "5",
        "value": "1000000.5",
        "at": "2026-11-20T15:00:00Z",
        "ledger_sequence": 17,
    }
