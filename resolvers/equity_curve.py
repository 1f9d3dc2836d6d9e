"""The equity curve of a portfolio (engine.equity_curve): NAV and return over time, ending in the live mark."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache

import strawberry

from engine.amounts import from_micro
from engine.equity_curve import (
    POINTS_MAX,
    POINTS_MIN,
    CurvePoint,
    Flow,
    begins_at,
    curve,
    ending_live,
    opening,
    present_ratio,
    resolution_of,
    thin,
)
from engine.instants import to_datetime, to_ns
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context
from resolvers.enums import EquityCurveRange, MarkQuality, Resolution
from resolvers.errors import ErrorCode, PublicError
from resolvers.fields import resolved

POINTS_DEFAULT = 500
# Two years of hours: all portfolios have the same.
_instant = lru_cache(maxsize=20_000)(to_datetime)


@strawberry.type(description="NAV and return at an instant.")
class EquityPoint:
    # A curve has hundreds of points: what is not asked for is not made.
    point: strawberry.Private[CurvePoint]

    @resolved("The instant of the snapshot; now for the live point.")
    def at(self) -> datetime:
        return _instant(self.point.at_ns)

    @resolved("NAV in the base currency.")
    def nav(self) -> Decimal:
        return from_micro(self.point.nav)

    @resolved("The worst quality among the prices behind the NAV.")
    def quality(self) -> MarkQuality:
        return self.point.quality

    @resolved(
        "Time-weighted index, 1 at the range's beginning: deposits, withdrawals and rewards do not move it. "
        "twrIndex − 1 is the return so far. Null from where a period starts at a NAV of 0 or less."
    )
    def twr_index(self) -> Decimal | None:
        return _show_index(self.point.index)

    @resolved("The largest twrIndex up to here, within the range.")
    def high_water_mark(self) -> Decimal | None:
        return _show_index(self.point.high_water_mark)

    @resolved("1 − twrIndex / highWaterMark as a fraction ≥ 0 (0.25 is 25 % below the mark).")
    def drawdown(self) -> Decimal | None:
        return _show_index(self.point.drawdown)


@strawberry.type(
    description=(
        "NAV and return over time, ascending. The last point is the live NAV. A snapshot that was missed is a gap: "
        "no point is invented. Thinning is min/max per bucket (not LTTB): it keeps the first, the last and the deepest "
        "drawdown, and of each of equally long buckets the lowest and the highest NAV."
    )
)
class EquityCurve:
    range: EquityCurveRange = strawberry.field(description="The range asked for.")
    resolution: Resolution = strawberry.field(description="How far apart the snapshots lie before thinning.")
    points: list[EquityPoint] = strawberry.field(description="The points, ascending by `at`.")


@dataclass(frozen=True, slots=True)
class History:
    """A range's points, `flows` between them, and the ledger entries `after` < sequence ≤ `last` that they span.

    `shown` leaves out where a portfolio that was opened within the range begins: nobody measured that. `ends_live`:
    the last point is the live mark.
    """

    resolution: Resolution
    points: list[CurvePoint]
    shown: list[CurvePoint]
    flows: list[Flow]
    after: int
    last: int
    ends_live: bool = False


async def load_history(context: Context, portfolio: PortfolioIdentity, curve_range: EquityCurveRange) -> History:
    """What the curve and the performance of a range are both made of."""
    services = context.services
    now_ns = services.clock.now_ns()
    now = to_datetime(now_ns)
    begin = begins_at(curve_range, portfolio.opened_at, now)
    resolution = resolution_of(curve_range, portfolio.opened_at, now)
    snapshots, live = await asyncio.gather(
        services.snapshots.points(portfolio.portfolio_id, begin, resolution),
        context.hot.mark((portfolio.shard, portfolio.portfolio_id)),
    )
    measured = ending_live(snapshots, live, now_ns)
    if not measured:
        return History(resolution, [], [], [], 0, 0)
    from_opening = begin == portfolio.opened_at
    points = [opening(to_ns(begin)), *measured] if from_opening else measured
    after, last = points[0].ledger_sequence, points[-1].ledger_sequence
    # Read after the mark: what the mark includes is in the ledger by now.
    flows = await services.ledger.flows(portfolio.portfolio_id, after, last) if last > after else []
    drawn = curve(points, flows)
    return History(resolution, drawn, drawn[1:] if from_opening else drawn, flows, after, last, live is not None)


async def load_equity_curve(
    context: Context, portfolio: PortfolioIdentity, curve_range: EquityCurveRange, max_points: int | None
) -> EquityCurve:
    """Raises PublicError BAD_POINTS."""
    count_max = POINTS_DEFAULT if max_points is None else max_points
    if not POINTS_MIN <= count_max <= POINTS_MAX:
        raise PublicError(ErrorCode.BAD_POINTS, f"maxPoints is {POINTS_MIN} to {POINTS_MAX}")
    history = await load_history(context, portfolio, curve_range)
    points = [EquityPoint(point=point) for point in thin(history.shown, count_max)]
    return EquityCurve(range=curve_range, resolution=history.resolution, points=points)


def _show_index(value: float | None) -> Decimal | None:
    return None if value is None else present_ratio(value)
