"""The ledger's write path: events a second, durable, from a batch of Kafka records to a committed transaction.

2,000 portfolios in 4 shards; batches of 500 records per shard, all shards at once, as an evaluator books them: nine
fills in ten records (60 symbols), the rest cash movements. PostgreSQL is embedded on the same cores and flushes to disk
at each commit (fsync on, synchronous_commit on); what a commit without rows costs is measured beside it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import orjson
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.report import Figure, Report
from engine.booking import DeadLetter, Record
from engine.instants import to_datetime
from engine.runtime.connections import make_engine, postgres_dsn
from engine.runtime.embedded import start_embedded
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.ledger_postgres import Lease, LedgerWriter
from engine.stores.migrate import upgrade
from engine.stores.shards_postgres import Shards

PORTFOLIOS_COUNT = 2_000
SHARDS = 4
BATCH_COUNT = 500
ROUNDS = 12
SYMBOLS = [f"S{n:02}" for n in range(60)]
AT = "2026-11-20T15:00:00Z"
RECORDED_AT = to_datetime(1_795_000_000_000_000_000)
EVENTS_PER_S_MIN = 5_000


class _Prices:
    """Every symbol at 100, every NAV 1,000,000."""

    def nav(self, portfolio_id: str) -> int:
        return 10**12

    def price(self, symbol: str) -> Decimal | None:
        return Decimal(100)

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        return 0, 0

    def position_day_base(self, portfolio_id: str, symbol: str) -> int:
        return 0


def run() -> None:
    report = Report("booking")
    # A kept directory is flushed to disk; a temporary one is not.
    with TemporaryDirectory() as directory, ChildProcesses() as children:
        Path(directory).chmod(0o755)  # as root, PostgreSQL runs as another account
        servers = start_embedded(children, Path(directory) / "data", redis=False, postgres=True, kafka=False)
        asyncio.run(_measure(servers.postgres_url, report))
    report.finish()


async def _measure(url: str, report: Report) -> None:
    await upgrade(url)
    engine = make_engine(Settings(postgres_url=url), "bench")
    shards = Shards(engine, "bench", 600_000)
    await shards.ensure(SHARDS, "log")
    leases = (await shards.renew([], "log")).claimed
    writer = LedgerWriter(engine)
    offsets = dict.fromkeys((lease.shard for lease in leases), 0)

    async def book(lease: Lease, events: list[dict[str, object]]) -> None:
        first = offsets[lease.shard]
        records = [
            Record(first + at, str(event["portfolio_id"]).encode(), orjson.dumps(event))
            for at, event in enumerate(events)
        ]
        outcome = await writer.book(lease, records, first, _Prices(), RECORDED_AT, _never, {})
        assert len(outcome.entries) == len(events)
        offsets[lease.shard] = first + len(events)

    names = {lease.shard: [f"p-{lease.shard}-{n}" for n in range(PORTFOLIOS_COUNT // SHARDS)] for lease in leases}
    for lease in leases:
        await book(lease, [_opening(name) for name in names[lease.shard]])
    rates, cpu = [], []
    source = random.Random(1)
    for round_number in range(ROUNDS):
        batches = [(of, _events(source, names[of.shard], round_number)) for of in leases]
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        await asyncio.gather(*(book(lease, events) for lease, events in batches))
        events_count = SHARDS * BATCH_COUNT
        rates.append(events_count / (time.perf_counter() - start_s))
        cpu.append((time.process_time() - start_cpu_s) / events_count * 1e6)
    durable = await _settings(url)
    report.add(
        Figure("booked and durable", statistics.median(rates), "events/s", at_least=EVENTS_PER_S_MIN, note=durable)
    )
    report.add(Figure("evaluator's CPU", statistics.median(cpu), "µs/event"))
    report.add(Figure("an empty commit", await _empty_commit_ms(engine), "ms"))
    await engine.dispose()


def _opening(name: str) -> dict[str, object]:
    return {
        "type": "open",
        "event_id": f"open-{name}",
        "portfolio_id": name,
        "owner": "o",
        "name": name,
        "base_currency": "USD",
        "opened_at": AT,
    }


def _events(source: random.Random, names: Sequence[str], round_number: int) -> list[dict[str, object]]:
    return [_event(source, source.choice(names), f"{names[0]}-{round_number}-{at}") for at in range(BATCH_COUNT)]


def _event(source: random.Random, name: str, event_id: str) -> dict[str, object]:
    event: dict[str, object] = {"event_id": event_id, "portfolio_id": name, "currency": "USD"}
    if source.random() < 0.1:
        return event | {"type": "cash", "kind": "DEPOSIT", "amount": "1000.00", "effective_at": AT}
    return event | {
        "type": "fill",
        "symbol": source.choice(SYMBOLS),
        "side": source.choice(["BUY", "SELL"]),
        "quantity": str(source.randint(1, 100)),
        "price": f"{source.randint(9_000, 11_000) / 100:.2f}",
        "fee": "1.00",
        "executed_at": AT,
    }


async def _never(letters: Sequence[DeadLetter]) -> None:
    raise AssertionError(letters)


async def _settings(url: str) -> str:
    connection = await asyncpg.connect(postgres_dsn(url))
    try:
        shown = [f"{name} {await connection.fetchval(f'SHOW {name}')}" for name in ("fsync", "synchronous_commit")]
    finally:
        await connection.close()
    return ", ".join(shown)


async def _empty_commit_ms(engine: AsyncEngine) -> float:
    times = []
    for _ in range(50):
        start_s = time.perf_counter()
        async with engine.begin() as connection:
            await connection.exec_driver_sql("UPDATE shard SET epoch = epoch WHERE id = 0")
        times.append(1_000 * (time.perf_counter() - start_s))
    return statistics.median(times)
