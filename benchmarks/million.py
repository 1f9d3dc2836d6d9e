"""1,000,000 portfolios × 15 positions, 500 quotes a second, 1,000 of them watched: how old news is, and what it takes.

The whole system as in `seed_system`, fifty times as large. The database gets portfolios and positions without their
ledgers: nothing here reads those. `NAVSTREAM_MILLION` sets another number of portfolios.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from datetime import UTC, datetime

import asyncpg
import psutil
import uvloop

from benchmarks.delivery import begin_count
from benchmarks.report import Figure, Report, quantile
from benchmarks.running_seed import LOG_ID, SHARDS, running_seed, servers, shard_of
from benchmarks.seed_load import ASSET_COLUMNS, ASSETS_COUNT, Load, make_load, portfolio_id
from engine.runtime.connections import make_engine
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.migrate import upgrade
from engine.stores.shards_postgres import Shards

PORTFOLIOS_COUNT = int(os.environ.get("NAVSTREAM_MILLION", "1000000"))
QUOTES_PER_S = 500
WATCHED = 1_000
PER_SOCKET = 4
RATE_HZ = 4.0
WARM_UP_S = 10
MEASURE_S = 30.0
CHUNK = 50_000

_POSITIONS = """
    INSERT INTO position (portfolio_id, symbol, quantity, cost, realized, fees, opened_at, opened_sequence, held_since)
    SELECT id, 'A' || lpad(asset::text, 3, '0'), quantity, quantity * price, 0, 0, $1, 1, $1
    FROM held, unnest(assets, quantities, prices) AS of (asset, quantity, price)
"""


def run() -> None:
    with servers() as (children, settings):
        uvloop.run(_run(children, settings))


async def _run(children: ChildProcesses, settings: Settings) -> None:
    report, load = Report("million"), make_load(PORTFOLIOS_COUNT)
    await prepare(settings, load)
    names = [portfolio_id(number) for number in range(0, PORTFOLIOS_COUNT, PORTFOLIOS_COUNT // WATCHED)][:WATCHED]
    async with running_seed(children, settings, load, QUOTES_PER_S, prepared=True) as system:
        report.add(Figure("start of the evaluator to marks of all portfolios", system.start_s, "s"))
        await asyncio.sleep(WARM_UP_S)
        counting = await begin_count(system.task(names, PER_SOCKET, RATE_HZ, MEASURE_S), system.pids["api"])
        before = system.cpu_s()
        tally, _ = await counting
        used = {role: (after - before[role]) / MEASURE_S for role, after in system.cpu_s().items()}
        memory = _memory_mb()
    assert not tally.failures, tally.failures
    report.add(Figure("age of the news at the client, p50", quantile(tally.latencies_s, 0.5) * 1e3, "ms"))
    report.add(
        Figure("age of the news at the client, p99", quantile(tally.latencies_s, 0.99) * 1e3, "ms", at_most=1_000)
    )
    report.add(Figure("messages per subscription and second", tally.deliveries / tally.seconds / len(names), "/s"))
    for role, share in used.items():
        report.add(Figure(f"CPU of {role}", share, "cores"))
    for name, size in sorted(memory.items()):
        report.add(Figure(f"memory (PSS) of {name}", size, "MB"))
    report.add(Figure("memory (PSS) of all processes", sum(memory.values()), "MB", at_most=6 * 1024))
    report.finish()


async def prepare(settings: Settings, load: Load) -> None:
    """Portfolios and positions by COPY; PostgreSQL makes rows of positions of one row of arrays a portfolio."""
    await upgrade(settings.postgres_url)
    engine = make_engine(settings, "bench")
    await Shards(engine, "bench", 1_000).ensure(SHARDS, LOG_ID)
    await engine.dispose()
    connection = await asyncpg.connect(settings.postgres_url)
    assets = [(load.symbol(n), load.symbol(n), "EQUITY", f"Sector {n % 11}", "") for n in range(ASSETS_COUNT)]
    await connection.copy_records_to_table("asset", records=assets, columns=ASSET_COLUMNS)
    now = datetime.now(UTC)
    columns = ["id", "shard", "owner", "name", "base_currency", "day_cut", "opened_at", "cash", "realized", "fees"]
    columns += ["income", "flows", "receivables", "trading", "corporate", "ledger_sequence", "ledger_hash"]
    for first in range(0, len(load.held), CHUNK):
        chunk = range(first, min(first + CHUNK, len(load.held)))
        rows = [(*_account(number, now), *[0] * 8, 0, b"") for number in chunk]
        await connection.copy_records_to_table("portfolio", records=rows, columns=columns)
    await connection.execute("CREATE UNLOGGED TABLE held (id text, assets int[], quantities int[], prices numeric[])")
    for first in range(0, len(load.held), CHUNK):
        await connection.copy_records_to_table("held", records=_held(load, first, first + CHUNK))
    await connection.execute("SET session_replication_role = replica")  # 30 million checks of keys known to be there
    await connection.execute(_POSITIONS, now, timeout=3_600)
    await connection.execute("DROP TABLE held")
    await connection.execute("ANALYZE", timeout=600)
    await connection.close()


def _account(number: int, now: datetime) -> tuple[object, ...]:
    name = portfolio_id(number)
    return name, shard_of(name), f"owner-{number % 5_000}", name, "USD", "00:00 UTC", now


def _held(load: Load, first: int, end: int) -> Iterator[tuple[object, ...]]:
    for number in range(first, min(end, len(load.held))):
        assets = load.held[number].tolist()
        yield portfolio_id(number), assets, load.quantities[number].tolist(), [load.prices[at] for at in assets]


def _memory_mb() -> dict[str, float]:
    """The proportional set size of this process's descendants, by program; pages that are shared count once."""
    sizes: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        name = process.name()
        arguments = " ".join(process.cmdline())
        role = arguments.rpartition("navstream ")[2].split()[0] if "-m navstream" in arguments else name
        if "benchmarks" not in arguments:
            sizes[role] = sizes.get(role, 0.0) + process.memory_full_info().pss / 2**20
    return sizes
