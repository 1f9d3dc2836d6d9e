"""The seed load as a running system: servers, one evaluator, the API, the quotes worker and a market, on loopback.

Quotes travel the real way: a WebSocket feed → quotes worker → Redis → evaluator → hot state → API → client. The market
is this process; subscribers and dashboard clients are processes of their own. Everything shares the machine's cores.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg
import orjson
import psutil
import redis.asyncio
from aiokafka.partitioner import murmur2
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from api.auth import issue_token
from benchmarks.seed_load import ASSETS_COUNT, Load, fill_database
from benchmarks.subscribers import Task
from engine.runtime.connections import make_engine
from engine.runtime.embedded import start_embedded
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.migrate import upgrade
from engine.stores.shards_postgres import Shards

SHARDS = 4
LOG_ID = "bench"
SOCKETS_PER_SUBJECT = 10_000
START_TIMEOUT_S = 60
READY_TIMEOUT_S = 600  # a million portfolios have fifteen million positions to write
QUERY = """subscription Nav($id: String!) {
  navUpdates(portfolioId: $id, maxRateHz: %g) { kind nav cash positionsValue quality asOf sequence latencyMs } }"""

_WEEK_OF_SNAPSHOTS = """
    INSERT INTO equity_snapshot (portfolio_id, at, nav, cash, receivables, positions_value, flows, twr_factor, quality,
        marked_at, epoch, sequence, ledger_sequence)
    SELECT id, date_trunc('hour', now()) - h * interval '1 hour', 10000000 + h, 0, 0, 0, 0, 1, 0, now(), 1, 1,
        ledger_sequence FROM portfolio, generate_series(1, 168) AS h
"""


@dataclass(frozen=True, slots=True)
class RunningSeed:
    settings: Settings
    pids: dict[str, int]
    start_s: float

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds of each process so far, its children's included."""
        return {role: cpu_s(pid) for role, pid in self.pids.items()}

    def rss_mb(self) -> dict[str, float]:
        return {role: psutil.Process(pid).memory_info().rss / 2**20 for role, pid in self.pids.items()}

    def token(self) -> str:
        scopes = "portfolio:read ledger:read admin"
        return issue_token(self.settings, "bench", scopes, 3_600, datetime.now(UTC))

    def task(self, names: Sequence[str], per_socket: int, rate_hz: float, seconds: float) -> Task:
        """Subscribers of these portfolios' NAV."""
        sockets = [list(names[at : at + per_socket]) for at in range(0, len(names), per_socket)]
        return Task(self.settings.port, self.token(), QUERY % rate_hz, sockets, seconds)


@contextmanager
def servers() -> Iterator[tuple[ChildProcesses, Settings]]:
    """Embedded servers, and the settings that name them."""
    with ChildProcesses() as children:
        embedded = start_embedded(children)
        yield (
            children,
            Settings(
                redis_url=embedded.redis_url,
                postgres_url=embedded.postgres_url,
                kafka_bootstrap=embedded.kafka_bootstrap,
                kafka_log_id=LOG_ID,
                jwt_secret="benchmarks only, nothing is behind this",  # type: ignore[arg-type]
                port=free_port(),
                log_level="WARNING",
            ),
        )


@asynccontextmanager
async def running_seed(
    children: ChildProcesses, settings: Settings, load: Load, quotes_per_s: float, prepared: bool = False
) -> AsyncIterator[RunningSeed]:
    """The system at this load, all of it valued. `prepared`: the database holds the load already."""
    if not prepared:
        await prepare(settings, load)
    environment = os.environ | settings.environment() | {"NAVSTREAM_KAFKA_LOG_ID": LOG_ID}
    environment["NAVSTREAM_SOCKETS_PER_SUBJECT_MAX"] = str(SOCKETS_PER_SUBJECT)
    started: dict[str, subprocess.Popen[bytes]] = {}

    def start(*arguments: str) -> None:
        argv = [sys.executable, "-m", "navstream", *arguments]
        started[arguments[0]] = children.spawn(arguments[0], argv, env=environment)

    begun_s, begun_ns = time.monotonic(), time.time_ns()
    try:
        start("evaluator")
        start("api")
        async with market(load, quotes_per_s) as url:
            start("quotes", "--feed", f"ws:{url}")
            await listens(settings.port, started["api"])
            await _until_published(settings, begun_ns)
            pids = {role: process.pid for role, process in started.items()}
            yield RunningSeed(settings, pids, time.monotonic() - begun_s)
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            await asyncio.to_thread(process.wait)
            children.forget(process)


async def prepare(settings: Settings, load: Load, with_snapshots: bool = True) -> None:
    """Bring the load into PostgreSQL: ledger, positions and a week of hourly snapshots."""
    await upgrade(settings.postgres_url)
    engine = make_engine(settings, "bench")
    await Shards(engine, "bench", 1_000).ensure(SHARDS, LOG_ID)
    await engine.dispose()
    names = [load.portfolio_id(number) for number in range(len(load.held))]
    await fill_database(settings.postgres_url, load, {name: shard_of(name) for name in names})
    connection = await asyncpg.connect(settings.postgres_url)
    if with_snapshots:
        await connection.execute(_WEEK_OF_SNAPSHOTS)
    # What autovacuum would do of a database of this age, and else does while it is measured.
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


def shard_of(portfolio_id: str) -> int:
    """The partition that Kafka's default partitioner gives this key."""
    return int((murmur2(portfolio_id.encode()) & 0x7FFFFFFF) % SHARDS)


@asynccontextmanager
async def market(load: Load, quotes_per_s: float) -> AsyncIterator[str]:
    """A WebSocket server that first quotes every asset, then so many random ones a second."""
    choices = random.Random(1)

    async def handle(socket: ServerConnection) -> None:
        for asset in range(ASSETS_COUNT):
            await socket.send(_quote(load, asset, asset + 1, 0))
        sequence, due_s = ASSETS_COUNT, time.monotonic()
        with suppress(ConnectionClosed):
            while True:
                due_s += 1 / quotes_per_s
                await asyncio.sleep(max(0, due_s - time.monotonic()))
                sequence += 1
                await socket.send(_quote(load, choices.randrange(ASSETS_COUNT), sequence, choices.randint(-20, 20)))

    async with serve(handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"ws://127.0.0.1:{port}"


def _quote(load: Load, asset: int, sequence: int, steps: int) -> str:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    price = load.prices[asset] * (10_000 + steps) / 10_000
    quote = {"symbol": load.symbol(asset), "price": str(price), "ts_event": now, "sequence": sequence, "source": "b"}
    return orjson.dumps(quote).decode()


async def listens(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server takes connections."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        assert server.poll() is None and time.monotonic() < deadline_s, "the server did not start"
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            await asyncio.sleep(1)
            return


async def _until_published(settings: Settings, since_ns: int) -> None:
    """Until each shard was published since then: another system may have left its own behind."""
    client = redis.asyncio.Redis.from_url(settings.redis_url, protocol=3)
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            updated = [await client.hget(redis_keys.shard(shard), "updated_at_ns") for shard in range(SHARDS)]
            is_published = all(int(at_ns or 0) >= since_ns for at_ns in updated)
            if is_published and await client.hlen(redis_keys.PRICES) == ASSETS_COUNT:
                break
            await asyncio.sleep(0.1)
    await client.aclose()


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its children so far."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(times.user + times.system for times in (one.cpu_times() for one in family))
