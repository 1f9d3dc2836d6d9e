"""The daily job of the badges worker for 20,000 portfolios of the seed load, none of which has a badge that it judges.

90 days of snapshots (one a day, the last two days hourly), 15 fills of each portfolio within the window of the sector
profits. Nobody meets a rule, which is what most days are like, so every portfolio is judged by both. The job runs as in
the worker, resting between its chunks; beside it a task looks how long the loop is held up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import asyncpg
import psutil
import uvloop

from benchmarks.report import Figure, Report, quantile
from benchmarks.seed_load import Load, fill_database, make_load
from engine.assets import AssetClass
from engine.badges import load_rules
from engine.markets import Markets
from engine.runtime.connections import make_engine, postgres_dsn
from engine.runtime.embedded import start_embedded
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.badges_postgres import sync_rules
from engine.stores.migrate import upgrade
from engine.stores.shards_postgres import Shards
from workers.daily_badges import judge_close, rest_between_chunks

SHARDS = 4
CLOSED_AT = datetime(2026, 11, 25, 21, tzinfo=UTC)
DAYS = 90
LOOK_INTERVAL_S = 0.01

_SNAPSHOTS = """
    INSERT INTO equity_snapshot (portfolio_id, at, nav, cash, receivables, positions_value, flows, twr_factor, quality,
        marked_at, epoch, sequence, ledger_sequence)
    SELECT id, at, 1e7 * (1 + 0.001 * random()::numeric(12, 6)), 0, 0,
        CASE WHEN at = $1 THEN worth.value ELSE 0 END, 0, 1, 0, at, 1, 1,
        CASE WHEN at = $1 THEN ledger_sequence ELSE 2 END
    FROM portfolio JOIN worth ON worth.portfolio_id = id, unnest($2::timestamptz[]) AS at
"""
_WORTH = """
    CREATE TEMPORARY TABLE worth AS SELECT portfolio_id, sum(round(quantity * price, 6)) AS value
    FROM position JOIN price_close USING (symbol) GROUP BY portfolio_id
"""


def run() -> None:
    with ChildProcesses() as children:
        servers = start_embedded(children, redis=False, kafka=False)
        uvloop.run(_run(Settings(postgres_url=servers.postgres_url)))


async def _run(settings: Settings) -> None:
    report, load = Report("daily_badges"), make_load()
    await _fill(settings, load)
    sessions = Markets(settings.calendars).sessions(AssetClass.EQUITY)
    connection = await asyncpg.connect(postgres_dsn(settings.postgres_url))
    held: list[float] = []
    looking = asyncio.create_task(_look(held))
    memory_before, began_s, cpu_before_s = psutil.Process().memory_info().rss, time.monotonic(), time.process_time()
    backend_before_s = _backend_s(connection)
    chunks: list[float] = []
    proofs = await judge_close(connection, settings.badge_topic, CLOSED_AT, sessions, _noting(chunks))
    took_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_before_s
    backend_s = _backend_s(connection) - backend_before_s
    grown = psutil.Process().memory_info().rss - memory_before
    looking.cancel()
    await connection.close()
    assert proofs == 0
    report.add(Figure("portfolios", len(load.held), "", note=f"{DAYS} days of snapshots"))
    report.add(Figure("all judged by both rules, rests included", took_s, "s"))
    report.add(Figure("worker's CPU", cpu_s, "s"))
    report.add(Figure("PostgreSQL's CPU", backend_s, "s"))
    report.add(Figure("longest chunk", max(chunks), "s"))
    report.add(Figure("loop held up, p99", quantile(held, 0.99) * 1e3, "ms"))
    report.add(Figure("loop held up, longest", max(held) * 1e3, "ms", at_most=100))
    report.add(Figure("memory grown by", grown / 2**20, "MB", at_most=100))
    report.finish()


async def _fill(settings: Settings, load: Load) -> None:
    await upgrade(settings.postgres_url)
    engine = make_engine(settings, "bench")
    await Shards(engine, "bench", 1_000).ensure(SHARDS, "bench")
    await engine.dispose()
    names = [load.portfolio_id(number) for number in range(len(load.held))]
    await fill_database(settings.postgres_url, load, {name: at % SHARDS for at, name in enumerate(names)})
    connection = await asyncpg.connect(postgres_dsn(settings.postgres_url))
    await sync_rules(connection, load_rules())
    begun_at = CLOSED_AT - timedelta(days=DAYS)
    await connection.execute("UPDATE portfolio SET opened_at = $1", begun_at)
    closes = [
        (load.symbol(at), CLOSED_AT, Decimal(price), CLOSED_AT, "bench", "") for at, price in enumerate(load.prices)
    ]
    await connection.copy_records_to_table("price_close", records=closes)
    await connection.execute(_WORTH)
    days = [begun_at + timedelta(days=day) for day in range(DAYS - 1)]
    hours = [CLOSED_AT - timedelta(hours=hour) for hour in range(24)]
    for first in range(0, len(days), 10):
        await connection.execute(_SNAPSHOTS, CLOSED_AT, days[first : first + 10])
    await connection.execute(_SNAPSHOTS, CLOSED_AT, hours)
    await connection.execute("ANALYZE")
    await connection.close()


def _noting(chunks: list[float]) -> Callable[[float], Awaitable[None]]:
    """The worker's rest, which notes how long each chunk took."""

    async def rest(took_s: float) -> None:
        chunks.append(took_s)
        await rest_between_chunks(took_s)

    return rest


async def _look(held: list[float]) -> None:
    """How much later than asked for the loop lets one go on."""
    while True:
        began_s = time.monotonic()
        await asyncio.sleep(LOOK_INTERVAL_S)
        held.append(time.monotonic() - began_s - LOOK_INTERVAL_S)


def _backend_s(connection: asyncpg.Connection) -> float:
    """CPU time of the connection's own backend."""
    fields = Path(f"/proc/{connection.get_server_pid()}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
