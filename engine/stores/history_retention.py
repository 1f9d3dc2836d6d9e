"""How long history is kept, by the program's own clock: a replayed year is not old because it is long ago.

    equity_snapshot   all rows of the last `snapshot_days`, then the last row of each UTC day, for ever
    price_close       all rows of the last `close_days`; what was worth what before that is not known any more

A curve is hourly for 30 days and daily beyond, so no curve asks for a snapshot that goes.

Where TimescaleDB keeps the daily continuous aggregate, whole chunks are dropped once the aggregate has their days,
which stay in it for ever. Otherwise the rows of a day are folded into its last one, which then stands for the day:
its flows are their sum and its TWR factor their product, as `equity_snapshot_daily` had them. Both answer
`equity_snapshot_daily` alike. A chunk goes as a whole, so there rows may stay for a chunk's length longer.

The aggregate also has a refresh policy of its own, which goes by the server's clock; here it is brought up to the
start of the clock's day, so that a replayed market's days are in it too. A chunk's rows must be in it before they go:
to refresh it afterwards would delete the days again, so nothing before the oldest chunk is ever refreshed.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from engine.stores.snapshots_reads import has_daily_aggregate

# One statement may work this long. It holds back nobody: readers and the writer go on.
STATEMENT_TIMEOUT_S = 600
# Portfolios folded by one statement; 400 days of them are about five million rows at the very first time.
FOLD_COUNT_MAX = 500
# What the last run folded is not looked at again, but for late rows of the last days.
FOLD_AGAIN = timedelta(days=8)

_OLDEST = "SELECT min(range_start) FROM timescaledb_information.chunks WHERE hypertable_name = 'equity_snapshot'"
_REFRESH = "CALL refresh_continuous_aggregate('equity_snapshot_daily', $1::timestamptz, $2::timestamptz)"
_DROP = "SELECT drop_chunks($1::text::regclass, older_than => $2::timestamptz)"
_HAS_TIMESCALE = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
_PORTFOLIOS = "SELECT id FROM portfolio WHERE id > $1 ORDER BY id LIMIT $2"
_DELETE_CLOSES = "DELETE FROM price_close WHERE at < $1"
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
_FOLD = """
    WITH day AS (
        SELECT portfolio_id, max(at) AS at, sum(flows) AS flows, twr_product(twr_factor) AS twr_factor
        FROM equity_snapshot WHERE portfolio_id = ANY($1::text[]) AND at >= $2 AND at < $3
        GROUP BY portfolio_id, date_trunc('day', at, 'UTC') HAVING count(*) > 1
    ), folded AS (
        UPDATE equity_snapshot AS last SET flows = day.flows, twr_factor = day.twr_factor
        FROM day WHERE last.portfolio_id = day.portfolio_id AND last.at = day.at
    )
    DELETE FROM equity_snapshot AS earlier USING day
    WHERE earlier.portfolio_id = day.portfolio_id AND earlier.at < day.at
        AND earlier.at >= date_trunc('day', day.at, 'UTC')
"""


class HistoryRetention:
    """`snapshot_days` and `close_days` are kept in full.

    Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away.
    """

    def __init__(self, pool: asyncpg.Pool, snapshot_days: int, close_days: int) -> None:
        self._pool = pool
        self._snapshot_days = snapshot_days
        self._close_days = close_days
        self._folded_until: datetime | None = None

    async def apply(self, now: datetime) -> None:
        """Bring the daily aggregate up to the start of the day of `now`, then let go of what is older than kept."""
        today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        snapshots_until = today - timedelta(days=self._snapshot_days)
        closes_until = today - timedelta(days=self._close_days)
        async with self._pool.acquire() as connection:
            # For this session only: the pool resets it when the connection comes back.
            await connection.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'")
            if await has_daily_aggregate(connection):
                await _refresh(connection, today)
                await _run(connection, _DROP, "equity_snapshot", snapshots_until)
            else:
                await self._fold(connection, snapshots_until)
            if await connection.fetchval(_HAS_TIMESCALE):
                await _run(connection, _DROP, "price_close", closes_until)
            else:
                await _run(connection, _DELETE_CLOSES, closes_until)

    async def _fold(self, connection: PoolConnectionProxy, until: datetime) -> None:
        begin = _BEGINNING if self._folded_until is None else self._folded_until - FOLD_AGAIN
        last = ""
        while ids := [row[0] for row in await connection.fetch(_PORTFOLIOS, last, FOLD_COUNT_MAX)]:
            await _run(connection, _FOLD, ids, begin, until)
            last = ids[-1]
        self._folded_until = until


async def _refresh(connection: PoolConnectionProxy, today: datetime) -> None:
    oldest = await connection.fetchval(_OLDEST)
    if oldest is not None and oldest < today:
        await _run(connection, _REFRESH, oldest, today)


async def _run(connection: PoolConnectionProxy, statement: str, *arguments: object) -> None:
    await connection.execute(statement, *arguments, timeout=STATEMENT_TIMEOUT_S)
