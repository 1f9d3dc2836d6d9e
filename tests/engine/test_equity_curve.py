"""The equity curve: ranges, resolution, the index that flows do not move, the live end, thinning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.equity_curve import (
    POINTS_MIN,
    CurvePoint,
    EquityCurveRange,
    EquityPoint,
    Flow,
    Resolution,
    begins_at,
    curve,
    ending_live,
    interval_factor,
    opening,
    present_ratio,
    resolution_of,
    thin,
)
from engine.marks import Mark, MarkQuality

NOW = datetime(2026, 11, 22, 10, 30, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=900)

navs = st.integers(1, 10**15)


def point(at_ns: int, nav: int = 0, ledger_sequence: int = 0) -> EquityPoint:
    return EquityPoint(at_ns, nav, MarkQuality.LIVE, ledger_sequence)


def drawn(at_ns: int, nav: int, drawdown: float = 0) -> CurvePoint:
    return CurvePoint(at_ns, nav, MarkQuality.LIVE, 1 - drawdown, 1, drawdown)


def mark(nav: int, as_of_ns: int = 0, ledger_sequence: int = 1) -> Mark:
    unsaid = dict.fromkeys((field.name for field in fields(Mark)), 0)
    return Mark(**unsaid | {
        "nav": nav, "as_of_ns": as_of_ns, "ledger_sequence": ledger_sequence, "quality": MarkQuality.STALE
    })  # type: ignore[arg-type]  # fmt: skip


def indexes(points: Sequence[EquityPoint], *flows: Flow) -> list[float | None]:
    return [one.index for one in curve(points, flows)]


@pytest.mark.parametrize(
    ("curve_range", "days"),
    [(EquityCurveRange.DAYS_7, 7), (EquityCurveRange.DAYS_30, 30), (EquityCurveRange.YEAR_1, 366)],
)
def test_ranges_reach_back_from_now_but_not_before_the_opening(curve_range: EquityCurveRange, days: int) -> None:
    assert begins_at(curve_range, LONG_AGO, NOW) == NOW - timedelta(days=days)
    opened = NOW - timedelta(days=2)
    assert begins_at(curve_range, opened, NOW) == opened
    assert begins_at(EquityCurveRange.ALL, LONG_AGO, NOW) == LONG_AGO


def test_resolution() -> None:
    young = NOW - timedelta(days=30)
    assert resolution_of(EquityCurveRange.DAYS_7, LONG_AGO, NOW) is Resolution.HOURLY
    assert resolution_of(EquityCurveRange.DAYS_30, LONG_AGO, NOW) is Resolution.HOURLY
    assert resolution_of(EquityCurveRange.YEAR_1, young, NOW) is Resolution.DAILY
    assert resolution_of(EquityCurveRange.ALL, young, NOW) is Resolution.HOURLY
    assert resolution_of(EquityCurveRange.ALL, young - timedelta(seconds=1), NOW) is Resolution.DAILY


# -- the live end ---------------------------------------------------------------------------------------------


def test_ends_in_the_live_mark_now_even_when_it_is_old() -> None:
    points = ending_live([point(10, 1), point(20, 2)], mark(7, as_of_ns=5), 30)
    assert points == [point(10, 1), point(20, 2), EquityPoint(30, 7, MarkQuality.STALE, 1)]


def test_a_snapshot_at_or_after_now_gives_way() -> None:
    points = ending_live([point(10, 1), point(30, 2), point(40, 3)], mark(7), 30)
    assert [one.nav for one in points] == [1, 7]


def test_a_snapshot_that_knows_more_of_the_ledger_than_the_mark_gives_way() -> None:
    points = ending_live([point(10, 1, 4), point(20, 900, 5)], mark(2, ledger_sequence=4), 30)
    assert [one.nav for one in points] == [1, 2]


def test_without_a_mark_it_is_the_snapshots() -> None:
    assert ending_live([point(10, 1)], None, 30) == [point(10, 1)]
    assert curve(ending_live([], None, 30), []) == []


# -- the index ------------------------------------------------------------------------------------------------


def test_golden_vector_8_drawdown_and_high_water_mark() -> None:
    points = curve([point(at, nav) for at, nav in enumerate((100, 120, 90, 130, 117))], [])
    assert [one.index for one in points] == pytest.approx([1, 1.2, 0.9, 1.3, 1.17], rel=1e-15)
    assert [one.high_water_mark for one in points] == pytest.approx([1, 1.2, 1.2, 1.3, 1.3], rel=1e-15)
    assert [one.drawdown for one in points] == pytest.approx([0, 0, 0.25, 0, 0.1], abs=1e-15)


def test_a_deposit_is_no_gain_and_a_withdrawal_no_loss() -> None:
    points = [point(0, 100), point(1, 220, 1), point(2, 110, 2)]
    flows = [Flow(0, 1, 100, 110), Flow(1, 2, -121, 231)]
    assert indexes(points, *flows) == pytest.approx([1, 1.1 * 220 / 210, 1.1 * 1.1], rel=1e-15)
    assert [one.drawdown for one in curve(points, flows)] == [0, 0, 0]


def test_golden_vector_10_a_reward_is_no_return() -> None:
    assert indexes(
        [opening(0), point(1, 10_000, 1), point(2, 10_500, 2)], Flow(1, 1, 10_000, 0), Flow(2, 2, 500, 10_000)
    )[-1] == pytest.approx(1, rel=1e-15)


def test_the_ledger_sequence_decides_on_which_side_a_flow_lies_not_the_clock() -> None:
    late_clock = Flow(at_ns=99, ledger_sequence=5, amount=100, nav_before=100)
    assert indexes([point(0, 100, 4), point(1, 200, 5)], late_clock) == [1, 1]
    assert indexes([point(0, 200, 5), point(1, 220, 5)], late_clock) == [1, 1.1]
    assert indexes([point(0, 100, 3), point(1, 110, 4)], late_clock) == [1, 1.1]


def test_a_sub_period_that_starts_at_zero_before_the_first_deposit_does_not_count() -> None:
    points = [opening(0), point(1, 0, 1), point(2, 7, 2), point(3, 110, 3), point(4, 121, 3)]
    assert indexes(points, Flow(3, 3, 93, 7)) == pytest.approx([1, 1, 1, 1.1, 1.21], rel=1e-15)


def test_nothing_in_it_has_no_return_and_goes_on_with_the_next_deposit() -> None:
    points = [point(0, 100), point(1, 0, 1), point(2, 50, 2), point(3, 55, 2)]
    flows = [Flow(1, 1, -120, 120), Flow(2, 2, 50, 0)]
    assert indexes(points, *flows) == pytest.approx([1, 1.2, 1.2, 1.32], rel=1e-15)


@pytest.mark.parametrize(
    ("points", "flows"),
    [
        ([point(0, -5), point(1, 10), point(2, 100, 1)], [Flow(2, 1, 90, 10)]),  # starts below 0
        ([point(0, 100), point(1, 3, 1), point(2, 0, 1)], [Flow(1, 1, -120, 120)]),  # a gain on nothing
        ([point(0, 100), point(1, 10, 1), point(2, 11, 1)], [Flow(1, 1, 30, -20)]),  # a flow into less than nothing
        ([point(0, 100), point(1, -5, 1), point(2, 60, 2)], [Flow(1, 1, -105, 100), Flow(2, 2, 50, 10)]),
    ],
    ids=["below-0", "gain-on-0", "flow-below-0", "withdrawn-below-0"],
)
def test_where_a_sub_period_has_no_start_the_index_ends(points: list[EquityPoint], flows: list[Flow]) -> None:
    found = curve(points, flows)
    assert (found[-1].index, found[-1].high_water_mark, found[-1].drawdown) == (None, None, None)
    assert found[1].index is None


def test_a_total_loss_stays_one() -> None:
    assert indexes([point(0, 100), point(1, 0), point(2, 50, 1)], Flow(2, 1, 50, 0)) == [1, 0, 0]


def test_a_flow_below_0_ends_the_index_also_after_a_total_loss() -> None:
    flows = [Flow(1, 1, 50, 0), Flow(2, 2, 60, -10)]
    assert indexes([point(0, 100), point(1, 50, 1), point(2, 50, 2)], *flows) == [1, 0, None]


def test_more_than_a_float_holds_is_undefined_and_no_error() -> None:
    flows = [Flow(at, at, 1 - 2**58, 2**58) for at in range(1, 30)]
    assert indexes([point(0, 1), point(1, 1, 29)], *flows) == [1, None]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.17 - 1, "0.1700000000"), (0, "0E-10"), (-0.5, "-0.5000000000"), (9e14, "900000000000000.0000000000")],
)
def test_a_ratio_is_shown_with_ten_decimals(value: float, shown: str) -> None:
    assert str(present_ratio(value)) == shown


@pytest.mark.parametrize("value", [1e15, -1e15, 1e300, math.inf, math.nan])
def test_a_ratio_beyond_all_sense_is_not_shown(value: float) -> None:
    assert present_ratio(value) is None


@given(st.lists(navs, min_size=2, max_size=30), st.integers(1, 29), navs)
def test_a_deposit_never_changes_twr(values: list[int], at: int, amount: int) -> None:
    at = min(at, len(values) - 1)
    without = [point(n, nav) for n, nav in enumerate(values)]
    # After the deposit, the same returns are earned on more.
    scaled = [Fraction(nav) * (values[at] + amount) / values[at] for nav in values]
    rest = [point(n, round(scaled[n] * 10**6), 1) for n in range(at, len(values))]
    flow = Flow(at, 1, amount * 10**6, values[at] * 10**6)
    with_deposit = [*(point(n, values[n] * 10**6) for n in range(at)), *rest]
    assert indexes(with_deposit, flow) == pytest.approx(indexes(without), rel=1e-5)
    assert indexes(with_deposit, flow)[at] == pytest.approx(values[at] / values[0], rel=1e-12)


@given(st.lists(st.tuples(navs, st.booleans(), st.integers(1, 10**15)), min_size=1, max_size=20), st.integers(2, 10**3))
def test_scaling_navs_and_flows_changes_nothing(steps: list[tuple[int, bool, int]], scale: int) -> None:
    def scaled(by: int) -> list[CurvePoint]:
        points, flows = [point(0, 100 * by)], []
        for n, (nav, flows_in, amount) in enumerate(steps, 1):
            if flows_in:
                flows.append(Flow(n, n, amount * by, nav * by))
            points.append(point(n, (nav + amount if flows_in else nav) * by, n))
        return curve(points, flows)

    for ours, theirs in zip(scaled(1), scaled(scale), strict=True):
        assert ours.index is not None and theirs.index is not None
        assert theirs.index == pytest.approx(ours.index, rel=1e-12)
        assert theirs.drawdown == pytest.approx(ours.drawdown, abs=1e-11)


@given(st.lists(st.tuples(navs, st.integers(-(10**15), 10**15), navs), min_size=1, max_size=20))
def test_the_index_is_the_exact_product_of_the_sub_periods(steps: list[tuple[int, int, int]]) -> None:
    """Against whole fractions; each step is a flow into `before` and a snapshot of `after`."""
    points, flows, expected = [point(0, 1_000)], [], [Fraction(1)]
    factor, start = Fraction(1), 1_000
    for n, (before, amount, after) in enumerate(steps, 1):
        amount = max(amount, 1 - before)
        flows.append(Flow(n, n, amount, before))
        points.append(point(n, after, n))
        factor *= Fraction(before, start)
        start = before + amount
        expected.append(factor * after / start)
    assert indexes(points, *flows) == pytest.approx([float(one) for one in expected], rel=1e-13)


# -- intervals ------------------------------------------------------------------------------------------------

some_navs = st.sampled_from([0, 0, -7, 1, 40, 100, 10**9])
intervals = st.lists(
    st.tuples(st.lists(st.tuples(some_navs, st.integers(-100, 10**9)), max_size=3), some_navs), min_size=1, max_size=8
)


def measured(steps: Sequence[tuple[list[tuple[int, int]], int]]) -> tuple[list[float | None], list[float | None]]:
    """The curve's indexes from the opening, and the factor of each interval by itself."""
    points, flows, factors, nav = [opening(0)], [], [], 0
    for at, (flowed, nav_end) in enumerate(steps, 1):
        within = [Flow(at, len(flows) + n, amount, before) for n, (before, amount) in enumerate(flowed, 1)]
        factors.append(interval_factor(nav, nav_end, within, bool(flows)))
        flows += within
        nav = nav_end
        points.append(point(at, nav, len(flows)))
    return indexes(points, *flows)[1:], factors


@given(intervals)
def test_the_product_of_defined_factors_is_the_index(steps: list[tuple[list[tuple[int, int]], int]]) -> None:
    found, factors = measured(steps)
    product = 1.0
    for index, factor in zip(found, factors, strict=True):
        if factor is None:
            break
        product *= factor
        assert index == pytest.approx(product, rel=1e-12)


@given(intervals)
def test_while_there_is_something_a_factor_is_undefined_only_where_the_index_is(
    steps: list[tuple[list[tuple[int, int]], int]],
) -> None:
    found, factors = measured([(flows, nav_end) for flows, nav_end in steps if nav_end > 0])
    for number, index in enumerate(found):
        assert (index is None) == (None in factors[: number + 1])


@pytest.mark.parametrize(
    ("start", "end", "flows", "flowed_before", "factor"),
    [
        (100, 110, [], True, 1.1),
        (100, 0, [], True, 0),
        (100, -10, [], True, -0.1),
        (-10, 5, [], True, None),
        (0, 5, [], True, None),
        (0, 0, [], True, 1),
        (0, 5, [], False, 1),
        (-5, -5, [], False, 1),
        (0, 60, [Flow(0, 1, 50, 0)], True, 1.2),
        (0, 60, [Flow(0, 1, 50, 5)], True, None),
        (-5, 60, [Flow(0, 1, 55, -5)], False, 1.2),
        (100, 300, [Flow(0, 1, 100, 110), Flow(0, 2, -50, 250)], True, 1.1 * 250 / 210 * 300 / 200),
    ],
)
def test_the_factor_of_one_interval(
    start: int, end: int, flows: list[Flow], flowed_before: bool, factor: float | None
) -> None:
    assert interval_factor(start, end, flows, flowed_before) == (
        None if factor is None else pytest.approx(factor, rel=1e-15)
    )


# -- thinning -------------------------------------------------------------------------------------------------


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        thin([], POINTS_MIN - 1)


@given(
    st.lists(st.tuples(st.integers(-(2**62), 2**62), st.floats(0, 1)), max_size=400).map(
        lambda rows: [drawn(at, nav, drawdown) for at, (nav, drawdown) in enumerate(rows)]
    ),
    st.integers(POINTS_MIN, 60),
)
def test_thinning_keeps_ends_extremes_and_order(points: list[CurvePoint], count_max: int) -> None:
    kept = thin(points, count_max)
    assert len(kept) <= count_max
    assert [one.at_ns for one in kept] == sorted({one.at_ns for one in kept})
    assert set(kept) <= set(points)
    if len(points) <= count_max:
        assert kept == points
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        values, kept_values = [one.nav for one in points], [one.nav for one in kept]
        assert (min(kept_values), max(kept_values)) == (min(values), max(values))
        assert max(one.drawdown or 0 for one in kept) == max(one.drawdown or 0 for one in points)
