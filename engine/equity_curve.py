"""An equity curve: NAV over time, from snapshots, ending in the live mark.

Ranges reach back from now; each has the resolution that its length needs:

    DAYS_7   hourly snapshots of the last 7 × 24 h
    DAYS_30  hourly snapshots of the last 30 × 24 h
    YEAR_1   the last snapshot of each UTC day of the last 366 × 24 h
    ALL      everything: hourly while the portfolio is younger than 30 days, else the last of each UTC day

Snapshots that were missed are gaps and stay gaps: no point is invented. The last point is the live mark's NAV,
now, where there is a mark: the curve and the valuation beside it can not disagree. A snapshot stamped at or after
now gives way to it.

Thinning to `count_max` points keeps the first and the last point, and cuts what lies between into equal buckets
that each keep their lowest and their highest point: the extremes of the whole curve survive, and every point shown
is one that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from engine.marks import Mark, MarkQuality

POINTS_MIN = 4  # first, last, and the two extremes
POINTS_MAX = 2_000
HOURLY_DAYS_MAX = 30


class EquityCurveRange(StrEnum):
    DAYS_7 = "DAYS_7"
    DAYS_30 = "DAYS_30"
    YEAR_1 = "YEAR_1"
    ALL = "ALL"


class Resolution(StrEnum):
    HOURLY = "HOURLY"
    DAILY = "DAILY"


@dataclass(frozen=True, slots=True)
class EquityPoint:
    """NAV in micro-units at an instant (ns since 1970, UTC)."""

    at_ns: int
    nav: int
    quality: MarkQuality


_LENGTHS = {
    EquityCurveRange.DAYS_7: timedelta(days=7),
    EquityCurveRange.DAYS_30: timedelta(days=30),
    EquityCurveRange.YEAR_1: timedelta(days=366),
}


def begins_at(curve_range: EquityCurveRange, opened_at: datetime, now: datetime) -> datetime:
    """The earliest instant that the range shows: never before the portfolio was opened."""
    length = _LENGTHS.get(curve_range)
    return opened_at if length is None else max(opened_at, now - length)


def resolution_of(curve_range: EquityCurveRange, opened_at: datetime, now: datetime) -> Resolution:
    if curve_range in (EquityCurveRange.DAYS_7, EquityCurveRange.DAYS_30):
        return Resolution.HOURLY
    if curve_range is EquityCurveRange.ALL and now - opened_at <= timedelta(days=HOURLY_DAYS_MAX):
        return Resolution.HOURLY
    return Resolution.DAILY


def curve(snapshots: Sequence[EquityPoint], live: Mark | None, now_ns: int, count_max: int) -> list[EquityPoint]:
    """The curve of ascending `snapshots`, ending in `live` at `now_ns`, with at most `count_max` points.

    Raises ValueError when `count_max` is below POINTS_MIN.
    """
    if live is None:
        return thin(snapshots, count_max)
    end = EquityPoint(now_ns, live.nav, live.quality)
    return thin([*(point for point in snapshots if point.at_ns < now_ns), end], count_max)


def thin(points: Sequence[EquityPoint], count_max: int) -> list[EquityPoint]:
    """At most `count_max` of `points`, in order: the first, the last, and each bucket's lowest and highest.

    Raises ValueError when `count_max` is below POINTS_MIN.
    """
    if count_max < POINTS_MIN:
        raise ValueError(f"a curve needs at least {POINTS_MIN} points")
    if len(points) <= count_max:
        return list(points)
    inner = points[1:-1]
    buckets = (count_max - 2) // 2
    kept = [points[0]]
    for bucket in range(buckets):
        part = inner[bucket * len(inner) // buckets : (bucket + 1) * len(inner) // buckets]
        low, high = min(part, key=_nav), max(part, key=_nav)
        kept += (low,) if low is high else sorted((low, high), key=_at)
    kept.append(points[-1])
    return kept


def _nav(point: EquityPoint) -> int:
    return point.nav


def _at(point: EquityPoint) -> int:
    return point.at_ns
