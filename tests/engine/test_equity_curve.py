"""The equity curve: ranges, resolution, thinning that keeps what matters, and the live end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.equity_curve import (
    POINTS_MIN,
    EquityCurveRange,
    EquityPoint,
    Resolution,
    begins_at,
    curve,
    resolution_of,
    thin,
)
from engine.marks import Mark, MarkQuality

NOW = datetime(2026, 11, 22, 10, 30, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=900)


def point(at_ns: int, nav: int = 0) -> EquityPoint:
    return EquityPoint(at_ns, nav, MarkQuality.LIVE)


def mark(nav: int, as_of_ns: int = 0) -> Mark:
    return Mark(nav, 0, nav, 0, 0, 0, 0, None, 0, as_of_ns, 1, 1, MarkQuality.STALE, 1)


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


def test_ends_in_the_live_mark_now_even_when_it_is_old() -> None:
    points = curve([point(10, 1), point(20, 2)], mark(7, as_of_ns=5), 30, 100)
    assert points == [point(10, 1), point(20, 2), EquityPoint(30, 7, MarkQuality.STALE)]


def test_a_snapshot_at_or_after_now_gives_way() -> None:
    points = curve([point(10, 1), point(30, 2), point(40, 3)], mark(7), 30, 100)
    assert [one.nav for one in points] == [1, 7]


def test_without_a_mark_it_is_the_snapshots() -> None:
    assert curve([point(10, 1)], None, 30, 100) == [point(10, 1)]
    assert curve([], None, 30, 100) == []


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        thin([], POINTS_MIN - 1)


@given(
    st.lists(st.integers(-(2**62), 2**62), max_size=400).map(
        lambda navs: [point(at, nav) for at, nav in enumerate(navs)]
    ),
    st.integers(POINTS_MIN, 60),
)
def test_thinning_keeps_ends_extremes_and_order(points: list[EquityPoint], count_max: int) -> None:
    kept = thin(points, count_max)
    assert len(kept) <= count_max
    assert [one.at_ns for one in kept] == sorted({one.at_ns for one in kept})
    assert set(kept) <= set(points)
    if len(points) <= count_max:
        assert kept == points
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        navs, kept_navs = [one.nav for one in points], [one.nav for one in kept]
        assert (min(kept_navs), max(kept_navs)) == (min(navs), max(navs))
