"""The whole system under random events, quotes and faults ends where the oracle's fold of the events sent ends.

Evaluators are processes of their own on real servers. While events (duplicates and bad ones among them) and quotes
flow, a third evaluator joins, Redis stands still, one evaluator is killed -9, Redis loses everything (twice), and one
evaluator is stopped until others have taken its shards, then let go on as a zombie. Half-way, while no events flow, two
splits (one of them late) and a dividend come, and an evaluator is killed while they are being booked; afterwards there
are fills and reversals of before and after them. At the end, for every portfolio:
marks, positions and sectors in hot state equal the oracle's, the ledger has each event once and in gap-free sequence,
the dead letters are the bad events and nothing else, and no process is left.

`NAVSTREAM_SIMULATION_SEED` repeats a run's input, `NAVSTREAM_SIMULATION_EVENTS` sets its size.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import psutil
import pytest

from engine.assets import Asset, AssetClass
from engine.corporate_actions import encode_action
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import upsert_assets
from tests.evaluator_processes import Evaluators, evaluators
from tests.random_events import SECTORS, Stream
from tests.running_system import System, connected, eventually, read_all
from tests.whole_system import all_settled, assert_hot_state, assert_ledger, finish, produce

EVENTS_COUNT = int(os.environ.get("NAVSTREAM_SIMULATION_EVENTS", "2400"))
STEPS_COUNT = 120
STEP_S = 0.06
ACTIONS_STEP = 60
LEASE_DURATION_MS = 1_000
REDIS_PAUSE_MS = 1_500


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        actions_topic=f"{topic}-actions",
        flush_interval_ms=20,
        lease_duration_ms=LEASE_DURATION_MS,
        lease_renewal_interval_ms=200,
    )
    async with connected(settings) as one:
        classified = [
            Asset(symbol, symbol, AssetClass.EQUITY, sector, "")
            for symbol, sector in SECTORS.items()
            if sector != "UNCLASSIFIED"
        ]
        await upsert_assets(one.pool, classified, datetime.now(UTC))
        yield one


async def test_random_events_quotes_and_faults_end_as_the_oracle_says(
    system: System, children: ChildProcesses, seed: int
) -> None:
    stream = Stream(seed)
    async with evaluators(children, system.settings) as processes:
        for name in ("first", "second"):
            processes.start(name)
        await flow(system, stream, processes)
        await finish(system, stream)
        await assert_hot_state(system, stream.oracle)
        statuses = await processes.stop()
    assert statuses == {"second": 0, "third": 0, "fifth": 0}
    await assert_ledger(system, stream.oracle, {"late": True, "soon": False, "yesterday": True})
    assert {value for value, _ in await read_all(system, f"{system.settings.topic}.dlq")} == stream.bad
    assert not [p for p in psutil.Process().children(recursive=True) if is_evaluator(p)]


def is_evaluator(process: psutil.Process) -> bool:
    try:
        return "run_evaluator.py" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


async def flow(system: System, stream: Stream, processes: Evaluators) -> None:
    """Events and quotes in steps, the faults between them."""
    await produce(system, stream.openings())
    faults = {
        20: lambda: join(processes, "third"),
        35: lambda: pause_redis(system),
        45: lambda: kill_and_replace(processes),
        ACTIONS_STEP: lambda: act(system, stream, processes),
        65: lambda: lose_redis(system),
        80: lambda: freeze(system, processes, "second"),
        100: lambda: thaw(system, processes, "second"),
        116: lambda: lose_redis(system),
    }
    for step in range(STEPS_COUNT):
        if step in faults:
            await faults[step]()
        await produce(system, [stream.next() for _ in range(EVENTS_COUNT // STEPS_COUNT)])
        for _ in range(3):
            await system.quote(*stream.quote())
        await asyncio.sleep(STEP_S)


async def join(processes: Evaluators, name: str) -> None:
    processes.start(name)


async def kill_and_replace(processes: Evaluators) -> None:
    processes.kill("first")
    processes.start("fourth")


async def act(system: System, stream: Stream, processes: Evaluators) -> None:
    """Corporate actions while no events flow, so that it is known what they meet; and a crash among them."""
    await all_settled(system, stream.oracle)
    actions = stream.actions()
    for action in [*actions, *actions]:
        key = action.symbol.encode()
        await system.producer.send_and_wait(system.settings.actions_topic, encode_action(action), key=key)
    processes.kill("fourth")
    processes.start("fifth")
    await all_settled(system, stream.oracle)


async def pause_redis(system: System) -> None:
    """Longer than anybody waits for an answer."""
    await system.redis.execute_command("CLIENT", "PAUSE", REDIS_PAUSE_MS, "ALL")


async def lose_redis(system: System) -> None:
    await system.redis.flushall()


async def epochs(system: System) -> dict[str, int]:
    """Owner → the sum of its shards' epochs, of leases that still hold."""
    rows = await system.pool.fetch("SELECT owner, epoch FROM shard WHERE lease_until > now()")
    return {row["owner"]: row["epoch"] for row in rows}


async def freeze(system: System, processes: Evaluators, name: str) -> None:
    """Stop a process that owns something; who it is shows by its connections' pids only, so wait for all to own."""

    async def all_own() -> bool | None:
        return len(await epochs(system)) >= 3 or None

    await eventually(all_own, 15, lambda: epochs(system))
    processes.signal(name, signal.SIGSTOP)


async def thaw(system: System, processes: Evaluators, name: str) -> None:
    """Let the zombie go on once every shard belongs to somebody else."""

    async def others_own_all() -> bool | None:
        owners = await system.pool.fetch("SELECT owner, lease_until > now() AS holds FROM shard")
        return (all(row["holds"] for row in owners) and len({row["owner"] for row in owners}) == 2) or None

    await eventually(others_own_all, 15, lambda: epochs(system))
    processes.signal(name, signal.SIGCONT)
