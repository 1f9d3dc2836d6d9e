"""Equity snapshots as readers see them, from the table `equity_snapshot`.

NAV is NUMERIC(38,6), so 10⁶ times it is a whole number and the cast to micro-units rounds nothing; one beyond int64
raises, as it does everywhere.
"""

from __future__ import annotations

from datetime import datetime

from engine.equity_curve import EquityPoint, Resolution
from engine.marks import MarkQuality
from engine.runtime.clock import to_ns
from engine.stores.ledger_reads import PoolSource

_HOURLY = """
    SELECT at, (nav * 1000000)::bigint, quality, ledger_sequence
    FROM equity_snapshot WHERE portfolio_id = $1 AND at >= $2 ORDER BY at
"""
# One look-up in the key for each day, so that a day costs the same however many snapshots it has. 24 hours and not
# 1 day: a day of the session's time zone may have 23 or 25.
_DAILY = """
    SELECT of_day.* FROM generate_series(
        date_trunc('day', $2::timestamptz, 'UTC'),
        (SELECT max(at) FROM equity_snapshot WHERE portfolio_id = $1),
        interval '24 hours'
    ) AS day, LATERAL (
        SELECT at, (nav * 1000000)::bigint, quality, ledger_sequence FROM equity_snapshot
        WHERE portfolio_id = $1 AND at >= greatest(day, $2) AND at < day + interval '24 hours'
        ORDER BY at DESC LIMIT 1
    ) AS of_day ORDER BY day
"""
# Looking up is a tenth of what calling the enum costs, and a curve has hundreds of points.
_QUALITIES = {quality.value: quality for quality in MarkQuality}


class SnapshotsReads:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away."""

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool

    async def points(self, portfolio_id: str, begin: datetime, resolution: Resolution) -> list[EquityPoint]:
        """The snapshots since `begin`, ascending: all of them, or the last of each UTC day."""
        statement = _DAILY if resolution is Resolution.DAILY else _HOURLY
        rows = await self._pool().fetch(statement, portfolio_id, begin)
        return [EquityPoint(to_ns(at), nav_micro, _QUALITIES[quality], seen) for at, nav_micro, quality, seen in rows]
