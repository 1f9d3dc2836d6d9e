"""An equity curve: NAV and time-weighted return over time, from snapshots, ending in the live mark.

Ranges reach back from now; each has the resolution that its length needs:

    DAYS_7   hourly snapshots of the last 7 × 24 h
    DAYS_30  hourly snapshots of the last 30 × 24 h
    YEAR_1   the last snapshot of each UTC day of the last 366 × 24 h
    ALL      everything: hourly while the portfolio is younger than 30 days, else the last of each UTC day

Snapshots that were missed are gaps and stay gaps: no point is invented. The last point is the live mark's NAV,
now, where there is a mark: the curve and the valuation beside it can not disagree. A snapshot stamped at or after
now, or one that includes more of the ledger than the mark does, gives way to it.

The TWR index is 1 at the range's beginning and is cut at every external flow, where the ledger knows the NAV just
before. A flow lies between the two points of which only the later one includes it, by ledger sequence: no clock
decides on which side.

    index = Π (NAV just before flow k / NAV just after flow k−1) × (NAV / NAV just after the last flow)

A range that reaches back to the opening begins at NAV 0 there. A sub-period that starts at exactly 0 does not count
before the first flow, nor while nothing is in it; any other that starts at ≤ 0 has no return, and neither has a
flow into a NAV below 0: from there on the index is None. Index, high-water mark and drawdown are statistics
(float64, relative error about 10⁻¹⁵ per flow), NAV is money (int, micro-units).

    high_water_mark = the largest index so far           drawdown = 1 − index / high_water_mark        (≥ 0)

A snapshot is stored with the TWR factor of the interval since the one before it (`interval_factor`): the same rule,
for one interval. Where all of them are defined, their product since the opening is the index. A factor is None where
the index is, and after a NAV of 0 or less that no flow explains: an interval knows no earlier start.

Thinning to `count_max` points is min/max per bucket (not LTTB, which may drop an extreme): it keeps the first, the
last and the deepest drawdown, and cuts what lies between into equal buckets that each keep their lowest and their
highest NAV: the extremes of the whole curve survive, and every point shown is one that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise

import msgspec

from engine.amounts import present
from engine.marks import Mark, MarkQuality

POINTS_MIN = 5  # first, last, the deepest drawdown and the two extremes
POINTS_MAX = 2_000
HOURLY_DAYS_MAX = 30
# Below it a difference of two indexes is their rounding, and is shown as none.
INDEX_NOISE = 1e-12
RATIO_DECIMALS = 10
RATIO_MAX = 1e15  # beyond it a ratio says nothing, and float64 has no decimals left


class EquityCurveRange(StrEnum):
    DAYS_7 = "DAYS_7"
    DAYS_30 = "DAYS_30"
    YEAR_1 = "YEAR_1"
    ALL = "ALL"


class Resolution(StrEnum):
    HOURLY = "HOURLY"
    DAILY = "DAILY"


class EquityPoint(msgspec.Struct, frozen=True, gc=False):
    """NAV in micro-units at an instant (ns since 1970, UTC), after `ledger_sequence` entries of the ledger."""

    at_ns: int
    nav: int
    quality: MarkQuality
    ledger_sequence: int


@dataclass(frozen=True, slots=True)
class Flow:
    """An external flow as the ledger has it: signed `amount` into a NAV of `nav_before`, in micro-units."""

    at_ns: int
    ledger_sequence: int
    amount: int
    nav_before: int


class CurvePoint(msgspec.Struct, frozen=True, gc=False):
    """A point with its TWR index (1 at the beginning); the three statistics are None where it is undefined."""

    at_ns: int
    nav: int
    quality: MarkQuality
    index: float | None
    high_water_mark: float | None
    drawdown: float | None


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


def opening(opened_at_ns: int) -> EquityPoint:
    """Where a range that reaches back to the opening begins: nothing, before the first entry."""
    return EquityPoint(opened_at_ns, 0, MarkQuality.LIVE, 0)


def ending_live(snapshots: Sequence[EquityPoint], live: Mark | None, now_ns: int) -> list[EquityPoint]:
    """Ascending `snapshots`, ending in `live` at `now_ns`."""
    if live is None:
        return list(snapshots)
    before = [one for one in snapshots if one.at_ns < now_ns and one.ledger_sequence <= live.ledger_sequence]
    return [*before, EquityPoint(now_ns, live.nav, live.quality, live.ledger_sequence)]


def curve(points: Sequence[EquityPoint], flows: Iterable[Flow]) -> list[CurvePoint]:
    """The curve of ascending `points`; `flows` in ledger order, those before the first point are ignored."""
    if not points:
        return []
    chain, drawn = _Chain(points[0].nav), []
    coming = [flow for flow in flows if flow.ledger_sequence > points[0].ledger_sequence]
    next_flow, high = 0, None
    for point in points:
        while next_flow < len(coming) and coming[next_flow].ledger_sequence <= point.ledger_sequence:
            chain.cut(coming[next_flow])
            next_flow += 1
        index = chain.index(point.nav)
        if index is None:
            drawn.append(CurvePoint(point.at_ns, point.nav, point.quality, None, None, None))
            continue
        high = index if high is None else max(high, index)
        drawdown = 1 - index / high
        drawdown = drawdown if drawdown > INDEX_NOISE else 0
        drawn.append(CurvePoint(point.at_ns, point.nav, point.quality, index, high, drawdown))
    return drawn


def interval_factor(nav_start: int, nav_end: int, flows: Iterable[Flow], flowed_before: bool) -> float | None:
    """The TWR factor from a NAV to the next, with the external `flows` between them in ledger order.

    Up to the first flow of all (`flowed_before` is false) an interval starts at 0, as the opening does.
    """
    chain = _Chain(nav_start if flowed_before else 0, flowed_before)
    for flow in flows:
        chain.cut(flow)
    return chain.index(nav_end)


# The high-water mark of a curve repeats, and so does a drawdown of 0.
@lru_cache(maxsize=10_000)
def present_ratio(value: float) -> Decimal | None:
    """An index or a ratio as it is shown: 10 decimals, half-even; None where it is not within ±RATIO_MAX."""
    return present(Decimal(value), RATIO_DECIMALS) if abs(value) < RATIO_MAX else None


class _Chain:
    """The running sub-period: the NAV it started with, and the product of those before it (None: undefined)."""

    def __init__(self, nav: int, flowed_before: bool = False) -> None:
        self._start = nav
        self._factor: float | None = 1
        self._before_first_flow = not flowed_before

    def index(self, nav: int) -> float | None:
        """The index at NAV `nav` of the running sub-period; once it is None it stays so."""
        index = self._factor
        if index is not None and self._start > 0:
            index *= nav / self._start
        elif self._start < 0 or (nav and not self._before_first_flow):
            index = None
        if index is None or not math.isfinite(index):
            self._factor = index = None
        return index

    def cut(self, flow: Flow) -> None:
        """End the running sub-period just before `flow` and start the next one just after."""
        index = self.index(flow.nav_before)
        # By the NAV's sign: an index that is 0 for good has lost it.
        self._factor = None if self._start > 0 > flow.nav_before else index
        self._start = flow.nav_before + flow.amount
        self._before_first_flow = False


def thin(points: Sequence[CurvePoint], count_max: int) -> list[CurvePoint]:
    """At most `count_max` of `points`, in order: the ends, the deepest, and each bucket's lowest and highest.

    Raises ValueError when `count_max` is below POINTS_MIN.
    """
    if count_max < POINTS_MIN:
        raise ValueError(f"a curve needs at least {POINTS_MIN} points")
    if len(points) <= count_max:
        return list(points)
    last, buckets = len(points) - 1, (count_max - 3) // 2
    kept = {0, last, max(range(last), key=lambda at: points[at].drawdown or 0)}
    edges = [1 + bucket * (last - 1) // buckets for bucket in range(buckets + 1)]
    for begin, end in pairwise(edges):
        kept.add(min(range(begin, end), key=lambda at: points[at].nav))
        kept.add(max(range(begin, end), key=lambda at: points[at].nav))
    return [points[at] for at in sorted(kept)]
