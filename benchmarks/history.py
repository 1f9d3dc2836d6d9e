"""The history of a portfolio: `equityCurve(YEAR_1)` and `performance(YEAR_1)` for one of 2,000 portfolios.

Each portfolio is 400 days old and has a daily snapshot of all of them and hourly ones of the last 30 (2.2 million
rows), and 240 ledger entries: its opening, 12 deposits and fills that realised something. Queries go over HTTP to
one API process, one after another, to random portfolios; the client runs on the same cores.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from datetime import UTC, datetime, timedelta

import asyncpg
import numpy as np
import orjson
import redis.asyncio
import uvloop

from api.auth import issue_token
from benchmarks.dashboard import post
from benchmarks.report import Figure, Report, quantile
from engine.marks import MARK
from engine.runtime.connections import make_engine
from engine.runtime.embedded import start_embedded
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.migrate import upgrade
from engine.stores.shards_postgres import Shards

PORTFOLIOS_COUNT = 2_000
DAYS = 400
HOURLY_DAYS = 30
ENTRIES_COUNT = 240
SHARDS = 4
LOG_ID = "bench"
QUERIES_COUNT = 500
WARM_UP_COUNT = 50
MICRO = 1_000_000

CURVE = """query Curve($id: String!) { portfolio(portfolioId: $id) {
  equityCurve(range: YEAR_1) { resolution points { at nav quality twrIndex highWaterMark drawdown } } } }"""
PERFORMANCE = """query Performance($id: String!) { portfolio(portfolioId: $id) {
  performance(range: YEAR_1) { begunAt endedAt twr xirr annualizedReturn annualizationDays daysCount volatility sharpe
    sortino calmar maxDrawdown maxDrawdownPeakAt maxDrawdownTroughAt maxDrawdownRecoveredAt currentDrawdown
    bestDay { day twr } worstDay { day twr } dayWinRate trades winningTrades losingTrades tradeWinRate profitFactor
    averageWin averageLoss expectancy monthlyReturns { year month twr complete } undefined { statistic reason } } } }"""

_PORTFOLIOS = """
    INSERT INTO portfolio SELECT 'p-' || n, n % $3, 'owner', 'p-' || n, 'USD', '00:00 UTC', $1, 0, 0, 0, 0, 0, $4
    FROM generate_series(0, $2 - 1) AS n
"""
_LEDGER = """
    INSERT INTO ledger_entry
    SELECT id, n, id || '-' || n, kind, CASE kind WHEN 'FILL' THEN 'A' END, CASE kind WHEN 'FILL' THEN 'SELL' END,
        CASE kind WHEN 'FILL' THEN 1 END, CASE kind WHEN 'FILL' THEN 100 END,
        CASE kind WHEN 'DEPOSIT' THEN CASE n WHEN 2 THEN 10000000 ELSE 1000 END ELSE 0 END,
        0, CASE kind WHEN 'FILL' THEN n % 7 - 3 ELSE 0 END, 0,
        CASE kind WHEN 'DEPOSIT' THEN CASE n WHEN 2 THEN 0 ELSE 10000000 END END,
        $1::timestamptz + n * $2::interval, $1::timestamptz + n * $2::interval, NULL, '\\x00'::bytea
    FROM portfolio, generate_series(1, $3) AS n,
        LATERAL (SELECT CASE WHEN n = 1 THEN 'OPEN' WHEN n % 20 = 2 THEN 'DEPOSIT' ELSE 'FILL' END AS kind) AS booked
"""
_SNAPSHOTS = """
    INSERT INTO equity_snapshot
    SELECT id, at, round(1e7 * (1 + 0.1 * sin(n / 40.0 + shard) + 0.02 * random())::numeric, 6), 0, 0, 0, at, 1, 1,
        greatest(0, floor(extract(epoch FROM at - $1::timestamptz) / extract(epoch FROM $2::interval)))
    FROM portfolio, LATERAL (
        SELECT n, $1::timestamptz + n * interval '1 day' + interval '23 hours' AS at
        FROM generate_series(0, $3::int - $4::int - 1) AS n
        UNION ALL
        SELECT n / 24, $1::timestamptz + n * interval '1 hour'
        FROM generate_series(($3::int - $4::int) * 24, $3::int * 24 - 1) AS n
    ) AS grid
"""


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
    report = Report("history")
    snapshots_count = await _fill_database(settings)
    await _fill_hot_state(settings)
    environment = os.environ | settings.environment() | {"NAVSTREAM_KAFKA_LOG_ID": LOG_ID}
    children.spawn("api", [sys.executable, "-m", "navstream", "api"], env=environment)
    await _until_listening(settings)
    curves = await _latencies(settings, CURVE, "equityCurve")
    performances = await _latencies(settings, PERFORMANCE, "performance")
    report.add(Figure("snapshots", snapshots_count, "rows"))
    report.add(Figure("equityCurve(YEAR_1), p50", quantile(curves, 0.5) * 1e3, "ms"))
    report.add(Figure("equityCurve(YEAR_1), p99", quantile(curves, 0.99) * 1e3, "ms", at_most=20))
    report.add(Figure("performance(YEAR_1), p50", quantile(performances, 0.5) * 1e3, "ms"))
    report.add(Figure("performance(YEAR_1), p99", quantile(performances, 0.99) * 1e3, "ms", at_most=30))
    report.finish()


async def _fill_database(settings: Settings) -> int:
    """The rows of all portfolios, up to the end of yesterday; returns how many snapshots there are."""
    await upgrade(settings.postgres_url)
    engine = make_engine(settings, "bench")
    await Shards(engine, "bench", 1_000).ensure(SHARDS, LOG_ID)
    await engine.dispose()
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    opened_at, step = today - timedelta(days=DAYS), timedelta(days=DAYS) / (ENTRIES_COUNT + 1)
    connection = await asyncpg.connect(settings.postgres_url)
    await connection.execute("INSERT INTO asset VALUES ('A', 'A', 'EQUITY', 'Sector', '')")
    await connection.execute(_PORTFOLIOS, opened_at, PORTFOLIOS_COUNT, SHARDS, ENTRIES_COUNT)
    await connection.execute(_LEDGER, opened_at, step, ENTRIES_COUNT)
    await connection.execute(_SNAPSHOTS, opened_at, step, DAYS, HOURLY_DAYS)
    await connection.execute("VACUUM ANALYZE")
    snapshots_count: int = await connection.fetchval("SELECT count(*) FROM equity_snapshot")
    await connection.close()
    return snapshots_count


async def _fill_hot_state(settings: Settings) -> None:
    row = np.zeros(1, MARK)
    row["nav"], row["cash"], row["ledger_sequence"] = 10_000_000 * MICRO, 10_000_000 * MICRO, ENTRIES_COUNT
    client = redis.asyncio.Redis.from_url(settings.redis_url, protocol=3)
    for shard in range(SHARDS):
        names = [f"p-{number}" for number in range(shard, PORTFOLIOS_COUNT, SHARDS)]
        await client.hset(redis_keys.shard(shard), "epoch", "1")
        await client.hset(redis_keys.marks(shard, 1), mapping=dict.fromkeys(names, row.tobytes()))
    await client.aclose()


async def _until_listening(settings: Settings) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", settings.port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


async def _latencies(settings: Settings, query: str, field: str) -> list[float]:
    """Seconds of each query once the process is warm. Portfolios are asked once, so that nothing is remembered."""
    token = issue_token(settings, "bench", "portfolio:read admin", 3_600, datetime.now(UTC))
    names = [
        f"p-{number}" for number in random.Random(1).sample(range(PORTFOLIOS_COUNT), WARM_UP_COUNT + QUERIES_COUNT)
    ]
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
        assert len(points) in (367, 368), len(points)
        assert points[-1]["twrIndex"] is not None
    else:
        assert answer["undefined"] in ([], [{"statistic": "MAX_DRAWDOWN_RECOVERED_AT", "reason": "NOT_RECOVERED"}])
