"""The equity curve of a portfolio (engine.equity_curve): NAV over time, ending in the live mark."""

from __future__ import annotations

import asyncio
from datetime import datetime
from decimal import Decimal
from functools import lru_cache

import strawberry

from engine.amounts import from_micro
from engine.equity_curve import (
    POINTS_MAX,
    POINTS_MIN,
    begins_at,
    curve,
    resolution_of,
)
from engine.runtime.clock import to_datetime
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context
from resolvers.enums import EquityCurveRange, MarkQuality, Resolution
from resolvers.errors import ErrorCode, PublicError

POINTS_DEFAULT = 500
# Two years of hours: all portfolios have the same.
_instant = lru_cache(maxsize=20_000)(to_datetime)


@strawberry.type(description="NAV at an instant.")
class EquityPoint:
    at: datetime = strawberry.field(description="The instant of the snapshot; now for the live point.")
    nav: Decimal = strawberry.field(description="NAV in the base currency.")
    quality: MarkQuality = strawberry.field(description="The worst quality among the prices behind the NAV.")


@strawberry.type(
    description=(
        "NAV over time, ascending. The last point is the live NAV. A snapshot that was missed is a gap: no point "
        "is invented. Thinning keeps the first, the last, the lowest and the highest."
    )
)
class EquityCurve:
    range: EquityCurveRange = strawberry.field(description="The range asked for.")
    resolution: Resolution = strawberry.field(description="How far apart the snapshots lie before thinning.")
    points: list[EquityPoint] = strawberry.field(description="The points, ascending by `at`.")


async def load_equity_curve(
    context: Context, portfolio: PortfolioIdentity, curve_range: EquityCurveRange, max_points: int | None
) -> EquityCurve:
    """Raises PublicError BAD_POINTS."""
    count_max = POINTS_DEFAULT if max_points is None else max_points
    if not POINTS_MIN <= count_max <= POINTS_MAX:
        raise PublicError(ErrorCode.BAD_POINTS, f"maxPoints is {POINTS_MIN} to {POINTS_MAX}")
    services = context.services
    now_ns = services.clock.now_ns()
    now = to_datetime(now_ns)
    begin = begins_at(curve_range, portfolio.opened_at, now)
    resolution = resolution_of(curve_range, portfolio.opened_at, now)
    snapshots, live = await asyncio.gather(
        services.snapshots.points(portfolio.portfolio_id, begin, resolution),
        context.hot.mark((portfolio.shard, portfolio.portfolio_id)),
    )
    points = [
        EquityPoint(at=_instant(point.at_ns), nav=from_micro(point.nav), quality=point.quality)
        for point in curve(snapshots, live, now_ns, count_max)
    ]
    return EquityCurve(range=curve_range, resolution=resolution, points=points)
