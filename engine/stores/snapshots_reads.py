"""Equity snapshots as readers see them, from `equity_snapshot` and `equity_snapshot_daily`.

The daily ones are read where that is cheap. TimescaleDB's continuous aggregate has them made, the running day
included; in a hypertable a look-up per day would visit a chunk per day. The view of the same name and content that
stands for it on plain PostgreSQL reads every hour of the range, where a look-up per day in one index does not; all
that a point has is in that index.

NAV is NUMERIC(38,6), so 10⁶ times it is a whole number and the cast to micro-units rounds nothing; one beyond int64
raises, as it does everywhere.
"""

from __future__ import annotations

from datetime import datetime

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from engine.equity_curve import EquityPoint, Resolution
from engine.instants import to_ns
from engine.marks import MarkQuality
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
_DAILY_OF_AGGREGATE = """
    SELECT at, (nav * 1000000)::bigint, quality, ledger_sequence FROM equity_snapshot_daily
    WHERE portfolio_id = $1 AND day >= date_trunc('day', $2::timestamptz, 'UTC') AND at >= $2 ORDER BY day
"""
_HAS_TIMESCALE = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
_HAS_AGGREGATE = """
    SELECT EXISTS (
        SELECT FROM timescaledb_information.continuous_aggregates WHERE view_name = 'equity_snapshot_daily'
    )
"""
# Looking up is a tenth of what calling the enum costs, and a curve has hundreds of points.
_QUALITIES = {quality.value: quality for quality in MarkQuality}


async def has_daily_aggregate(connection: asyncpg.Pool | PoolConnectionProxy) -> bool:
    """Whether `equity_snapshot_daily` is a continuous aggregate; the migration decided once."""
    if not await connection.fetchval(_HAS_TIMESCALE):
        return False
    return bool(await connection.fetchval(_HAS_AGGREGATE))


class SnapshotsReads:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away."""

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool
        self._daily: str | None = None

    async def points(self, portfolio_id: str, begin: datetime, resolution: Resolution) -> list[EquityPoint]:
        """The snapshots since `begin`, ascending: all of them, or the last of each UTC day."""
        pool = self._pool()
        if self._daily is None:
            self._daily = _DAILY_OF_AGGREGATE if await has_daily_aggregate(pool) else _DAILY
        rows = await pool.fetch(self._daily if resolution is Resolution.DAILY else _HOURLY, portfolio_id, begin)
        return [EquityPoint(to_ns(at), nav_micro, _QUALITIES[quality], seen) for at, nav_micro, quality, seen in rows]
