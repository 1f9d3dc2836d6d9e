"""The history of a portfolio: `equityCurve(YEAR_1)` and `performance(YEAR_1)` for one of 20,000, and its writing.

Each portfolio is 400 days old and has a daily snapshot of all of them and hourly ones of the last 30: 21.8 million
rows, in the order in which they came, so that a portfolio's rows lie far apart. Of the ledger each has 24 entries,
every tenth (these are asked about) 240: its opening, 12 deposits and fills that realised something. Queries go over
HTTP to one API process, one after another, to random portfolios; the client runs on the same cores.

Before, an instant's frames of all shards are drained from Redis into the database, again for each of some instants.

By default the database is the embedded one. `NAVSTREAM_BENCH_POSTGRES_URL` names another server, for one run in a
database of its own: with TimescaleDB its daily aggregate is refreshed and older chunks are compressed beforehand.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import asyncpg
import numpy as np
import orjson
import redis.asyncio
import uvloop

from api.auth import issue_token
from benchmarks.dashboard import post
from benchmarks.report import Figure, Report, quantile
from engine.instants import to_ns
from engine.marks import MARK, FrameHeader, encode_frame
from engine.runtime.connections import connect_postgres, connect_redis, make_engine
from engine.runtime.embedded import start_embedded
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.migrate import upgrade
from engine.stores.shards_postgres import Shards
from engine.stores.snapshots_reads import has_daily_aggregate
from workers.snapshots import SnapshotDrain

PORTFOLIOS_COUNT = 20_000
DAYS = 400
HOURLY_DAYS = 30
ENTRIES_COUNT = 240
ENTRIES_COUNT_OTHERS = 24
ASKED_EVERY = 10
SHARDS = 4
LOG_ID = "bench"
QUERIES_COUNT = 500
WARM_UP_COUNT = 50
INSTANTS_COUNT = 7
MICRO = 1_000_000
SERVER_VARIABLE = "NAVSTREAM_BENCH_POSTGRES_URL"

CURVE = """query Curve($id: String!) { portfolio(portfolioId: $id) {
  equityCurve(range: YEAR_1) { resolution points { at nav quality twrIndex highWaterMark drawdown } } } }"""
PERFORMANCE = """query Performance($id: String!) { portfolio(portfolioId: $id) {
  performance(range: YEAR_1) { begunAt endedAt twr xirr annualizedReturn annualizationDays daysCount volatility sharpe
    sortino calmar maxDrawdown maxDrawdownPeakAt maxDrawdownTroughAt maxDrawdownRecoveredAt currentDrawdown
    bestDay { day twr } worstDay { day twr } dayWinRate trades winningTrades losingTrades tradeWinRate profitFactor
    averageWin averageLoss expectancy monthlyReturns { year month twr complete } undefined { statistic reason } } } }"""

_PORTFOLIOS = """
    INSERT INTO portfolio (id, shard, owner, name, base_currency, day_cut, opened_at, cash, realized, fees, income,
        flows, receivables, trading, corporate, ledger_sequence, ledger_hash)
    SELECT 'p-' || n, n % $3, 'owner', 'p-' || n, 'USD', '00:00 UTC', $1, 0, 0, 0, 0, 0, 0, 0, 0,
        CASE n % $6 WHEN 0 THEN $4::int ELSE $5::int END, '\\x00'::bytea
    FROM generate_series(0, $2 - 1) AS n
"""
_LEDGER = """
    INSERT INTO ledger_entry (portfolio_id, sequence, event_id, kind, symbol, side, quantity, price, amount, fee,
        receivable, realized, cost, nav_effect, cash_after, nav_before, effective_at, recorded_at, late, content_hash,
        hash)
    SELECT id, n, id || '-' || n, kind, CASE kind WHEN 'FILL' THEN 'A' END, CASE kind WHEN 'FILL' THEN 'SELL' END,
        CASE kind WHEN 'FILL' THEN 1 END, CASE kind WHEN 'FILL' THEN 100 END,
        CASE kind WHEN 'DEPOSIT' THEN CASE n WHEN 2 THEN 10000000 ELSE 1000 END ELSE 0 END,
        0, 0, CASE kind WHEN 'FILL' THEN n % 7 - 3 ELSE 0 END, 0, 0, 0,
        CASE kind WHEN 'DEPOSIT' THEN CASE n WHEN 2 THEN 0 ELSE 10000000 END END, at, at, false, '\\x00'::bytea,
        '\\x00'::bytea
    FROM portfolio, generate_series(1, ledger_sequence) AS n,
        LATERAL (
            SELECT CASE WHEN n = 1 THEN 'OPEN' WHEN n = 2 OR n % (ledger_sequence / 12) = 0 THEN 'DEPOSIT' ELSE 'FILL'
                END, $1::timestamptz + n * $2::interval / (ledger_sequence + 1)
        ) AS booked (kind, at)
"""
# At the instant $1, on the day $2 since the opening, after the part $3 of the time since then.
_SNAPSHOTS = """
    INSERT INTO equity_snapshot (portfolio_id, at, nav, cash, receivables, positions_value, flows, twr_factor, quality,
        marked_at, epoch, sequence, ledger_sequence)
    SELECT id, $1, round(1e7 * (1 + 0.1 * sin($2::int / 40.0 + shard) + 0.02 * random())::numeric, 6), 0, 0, 0, 0,
        1 + 0.001 * random(), 0, $1, 1, 1, floor($3::float8 * (ledger_sequence + 1)) FROM portfolio
"""
_KEY = "equity_snapshot_pkey"


def run() -> None:
    with ChildProcesses() as children:
        servers = start_embedded(children)
        settings = Settings(
            redis_url=servers.redis_url,
            postgres_url=servers.postgres_url,
            kafka_bootstrap=servers.kafka_bootstrap,
            kafka_log_id=LOG_ID,
            jwt_secret="benchmarks only, nothing is behind this",  # type: ignore[arg-type]
            port=free_port(),
            log_level="WARNING",
        )
        uvloop.run(_run(children, settings))


async def _run(children: ChildProcesses, settings: Settings) -> None:
    server = os.environ.get(SERVER_VARIABLE, "")
    report = Report("history_timescale" if server else "history")
    async with _database(server or settings.postgres_url) as url:
        settings = settings.model_copy(update={"postgres_url": url})
        await _fill_database(settings)
        writes = await _write_instants(settings)
        await _settle(settings)
        await _fill_hot_state(settings)
        environment = os.environ | settings.environment() | {"NAVSTREAM_KAFKA_LOG_ID": LOG_ID}
        api = children.spawn("api", [sys.executable, "-m", "navstream", "api"], env=environment)
        await until_listening(settings)
        curves = await _latencies(settings, CURVE, "equityCurve")
        performances = await _latencies(settings, PERFORMANCE, "performance")
        api.terminate()
        report.add(Figure("snapshots", await _count_snapshots(settings), "rows"))
    report.add(Figure("20,000 snapshots written, median", statistics.median(writes), "s", at_most=2))
    report.add(Figure("20,000 snapshots written, slowest", max(writes), "s"))
    report.add(Figure("equityCurve(YEAR_1), p50", quantile(curves, 0.5) * 1e3, "ms"))
    report.add(Figure("equityCurve(YEAR_1), p99", quantile(curves, 0.99) * 1e3, "ms", at_most=20))
    report.add(Figure("performance(YEAR_1), p50", quantile(performances, 0.5) * 1e3, "ms"))
    report.add(Figure("performance(YEAR_1), p99", quantile(performances, 0.99) * 1e3, "ms", at_most=30))
    report.finish()


@asynccontextmanager
async def _database(server: str) -> AsyncIterator[str]:
    """A database of one's own on the server, gone afterwards."""
    name = f"bench_{os.getpid()}"
    connection = await asyncpg.connect(server)
    await connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    try:
        yield urlsplit(server)._replace(path=f"/{name}").geturl()
    finally:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await connection.close()


async def _fill_database(settings: Settings) -> None:
    """The rows of all portfolios, up to the end of yesterday."""
    await upgrade(settings.postgres_url)
    engine = make_engine(settings, "bench")
    await Shards(engine, "bench", 1_000).ensure(SHARDS, LOG_ID)
    await engine.dispose()
    opened_at, length = _today() - timedelta(days=DAYS), timedelta(days=DAYS)
    connection = await asyncpg.connect(settings.postgres_url)
    await connection.execute("INSERT INTO asset VALUES ('A', 'A', 'EQUITY', 'Sector', '')")
    counts = ENTRIES_COUNT, ENTRIES_COUNT_OTHERS, ASKED_EVERY
    await connection.execute(_PORTFOLIOS, opened_at, PORTFOLIOS_COUNT, SHARDS, *counts)
    await connection.execute(_LEDGER, opened_at, length)
    # The key is built once over all rows, which takes a tenth of the time.
    key = await connection.fetchval("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = $1", _KEY)
    await connection.execute(f"ALTER TABLE equity_snapshot DROP CONSTRAINT {_KEY}")
    daily = [24 * day + 23 for day in range(DAYS - HOURLY_DAYS)]
    for hour in (*daily, *range(24 * (DAYS - HOURLY_DAYS), 24 * DAYS)):
        part = timedelta(hours=hour) / length
        await connection.execute(_SNAPSHOTS, opened_at + timedelta(hours=hour), hour // 24, part)
    await connection.execute(f"ALTER TABLE equity_snapshot ADD CONSTRAINT {_KEY} {key}")
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def _write_instants(settings: Settings) -> list[float]:
    """Seconds that the snapshots of all portfolios at one instant took, for some instants of today."""
    row = np.zeros(PORTFOLIOS_COUNT, MARK)
    row["nav"] = row["cash"] = row["flows"] = 10_000_000 * MICRO
    asked = np.arange(PORTFOLIOS_COUNT) % ASKED_EVERY == 0
    row["ledger_sequence"] = np.where(asked, ENTRIES_COUNT, ENTRIES_COUNT_OTHERS)
    names = [f"p-{number}".encode() for number in range(PORTFOLIOS_COUNT)]
    seconds = []
    pool = await connect_postgres(settings, "bench")
    async with connect_redis(settings, "bench") as client:
        for instant in range(INSTANTS_COUNT):
            at_ns = to_ns(_today() + timedelta(minutes=instant))
            for shard in range(SHARDS):
                groups: dict[int, list[int]] = {}
                for number in range(shard, PORTFOLIOS_COUNT, SHARDS):
                    groups.setdefault(len(names[number]), []).append(number)
                frame = encode_frame(
                    FrameHeader(shard, 1, instant + 1, instant, at_ns, 0),
                    [(length, b"".join(names[n] for n in of), row[of].tobytes()) for length, of in groups.items()],
                )
                await client.rpush(redis_keys.snapshots(shard), frame)  # type: ignore[arg-type]
            start_s = time.perf_counter()
            written = await SnapshotDrain(client, pool).poll()
            seconds.append(time.perf_counter() - start_s)
            assert written == PORTFOLIOS_COUNT, written
    await pool.close()
    return seconds


async def _settle(settings: Settings) -> None:
    """What TimescaleDB does by itself within a day."""
    pool = await asyncpg.create_pool(settings.postgres_url, min_size=1, max_size=1)
    if await has_daily_aggregate(pool):
        await pool.execute(
            "CALL refresh_continuous_aggregate('equity_snapshot_daily', NULL, $1::timestamptz)", _today()
        )
        await pool.execute(
            "SELECT compress_chunk(chunk, true) FROM show_chunks('equity_snapshot', $1::timestamptz) AS chunk",
            _today() - timedelta(days=7),
        )
    await pool.execute("VACUUM ANALYZE")
    await pool.close()


async def _count_snapshots(settings: Settings) -> int:
    connection = await asyncpg.connect(settings.postgres_url)
    count: int = await connection.fetchval("SELECT count(*) FROM equity_snapshot")
    await connection.close()
    return count


def _today() -> datetime:
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


async def _fill_hot_state(settings: Settings) -> None:
    row = np.zeros(1, MARK)
    row["nav"], row["cash"], row["ledger_sequence"] = 10_000_000 * MICRO, 10_000_000 * MICRO, ENTRIES_COUNT
    client = redis.asyncio.Redis.from_url(settings.redis_url, protocol=3)
    for shard in range(SHARDS):
        names = [f"p-{number}" for number in range(shard, PORTFOLIOS_COUNT, SHARDS)]
        await client.hset(redis_keys.shard(shard), "epoch", "1")
        await client.hset(redis_keys.marks(shard, 1), mapping=dict.fromkeys(names, row.tobytes()))
    await client.aclose()


async def until_listening(settings: Settings) -> None:
    """Until the API answers from PostgreSQL."""
    token = issue_token(settings, "bench", "admin", 3_600, datetime.now(UTC))
    async with asyncio.timeout(60):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", settings.port)
                body = await post(reader, writer, token, {"query": '{ portfolio(portfolioId: "p-0") { name } }'})
                writer.close()
                if b"UNAVAILABLE" not in body:
                    return
            except (OSError, EOFError):
                pass
            await asyncio.sleep(0.1)


async def _latencies(settings: Settings, query: str, field: str) -> list[float]:
    """Seconds of each query once the process is warm. Portfolios are asked once, so that nothing is remembered."""
    token = issue_token(settings, "bench", "portfolio:read admin", 3_600, datetime.now(UTC))
    asked = range(0, PORTFOLIOS_COUNT, ASKED_EVERY)
    names = [f"p-{number}" for number in random.Random(1).sample(asked, WARM_UP_COUNT + QUERIES_COUNT)]
    latencies = []
    reader, writer = await asyncio.open_connection("127.0.0.1", settings.port)
    for name in names:
        start_s = time.perf_counter()
        body = await post(reader, writer, token, {"query": query, "variables": {"id": name}})
        latencies.append(time.perf_counter() - start_s)
        answer = orjson.loads(body)
        assert "errors" not in answer, answer
        _check(answer["data"]["portfolio"][field])
    writer.close()
    return latencies[WARM_UP_COUNT:]


def _check(answer: dict[str, object]) -> None:
    """The answer is whole: a year of points, or every statistic."""
    points = answer.get("points")
    if isinstance(points, list):
        assert 367 <= len(points) <= 369, len(points)
        assert points[-1]["twrIndex"] is not None
    else:
        assert answer["undefined"] in ([], [{"statistic": "MAX_DRAWDOWN_RECOVERED_AT", "reason": "NOT_RECOVERED"}])
