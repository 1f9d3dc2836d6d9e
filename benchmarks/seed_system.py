"""The whole system at the seed load: 20,000 portfolios × 15 positions, 500 quotes a second, one evaluator.

Quotes travel the real way: a WebSocket feed on loopback → quotes worker → Redis → evaluator → hot state. `tick →
hot state` is the age of the oldest quote in a frame of marks when that frame reaches a subscriber; quotes of one
asset within one flush window are conflated. Dashboard queries go over HTTP, one after another, to random
portfolios; the client runs on the same two cores.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import orjson
import redis.asyncio
import uvloop
from aiokafka.partitioner import murmur2
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from api.auth import issue_token
from benchmarks.report import Figure, Report, quantile
from benchmarks.seed_load import ASSETS_COUNT, Load, fill_database, make_load
from engine.marks import decode_frame
from engine.runtime.connections import make_engine
from engine.runtime.embedded import start_embedded
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.migrate import upgrade
from engine.stores.shards_postgres import Shards

QUOTES_PER_S = 500
MEASURE_S = 20
WARM_UP_S = 5
SHARDS = 4
LOG_ID = "bench"


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
    report, load = Report("seed_system"), make_load()
    await _prepare(settings, load)
    environment = os.environ | settings.environment() | {"NAVSTREAM_KAFKA_LOG_ID": LOG_ID}

    def start(*arguments: str) -> int:
        return children.spawn(arguments[0], [sys.executable, "-m", "navstream", *arguments], env=environment).pid

    started_s = time.monotonic()
    evaluator = start("evaluator")
    api = start("api")
    async with _feed(load) as url:
        start("quotes", "--feed", f"ws:{url}")
        await _until_published(settings)
        report.add(Figure("start of an evaluator with 300,000 positions to marks", time.monotonic() - started_s, "s"))
        await asyncio.sleep(WARM_UP_S)
        cpu_before = _cpu_s(evaluator)
        ages, latencies = await asyncio.gather(_ages(settings), _dashboards(settings))
        report.add(Figure("evaluator CPU", (_cpu_s(evaluator) - cpu_before) / MEASURE_S, "cores"))
    report.add(Figure("tick → hot state, p50", quantile(ages, 0.5) * 1e3, "ms", note="oldest quote of a frame"))
    report.add(Figure("tick → hot state, p99", quantile(ages, 0.99) * 1e3, "ms", at_most=200))
    report.add(Figure("dashboard query, p50", quantile(latencies, 0.5) * 1e3, "ms", at_most=10))
    report.add(Figure("dashboard query, p99", quantile(latencies, 0.99) * 1e3, "ms", at_most=25))
    report.add(Figure("dashboard queries measured", len(latencies), ""))
    report.add(Figure("evaluator memory (RSS)", _rss_mb(evaluator), "MB", at_most=400))
    report.add(Figure("API memory (RSS)", _rss_mb(api), "MB"))
    report.finish()


async def _prepare(settings: Settings, load: Load) -> None:
    await upgrade(settings.postgres_url)
    engine = make_engine(settings, "bench")
    await Shards(engine, "bench", 1_000).ensure(SHARDS, LOG_ID)
    await engine.dispose()
    names = [load.portfolio_id(number) for number in range(len(load.held))]
    shard_of = {name: (murmur2(name.encode()) & 0x7FFFFFFF) % SHARDS for name in names}
    await fill_database(settings.postgres_url, load, shard_of)
    connection = await asyncpg.connect(settings.postgres_url)
    await connection.execute(
        "INSERT INTO equity_snapshot SELECT id, date_trunc('hour', now()) - h * interval '1 hour', 10000000 + h, 0, 0, "
        "0, now(), 1, 1, ledger_sequence FROM portfolio, generate_series(1, 168) AS h"
    )
    await connection.execute("ANALYZE equity_snapshot")
    await connection.close()


@asynccontextmanager
async def _feed(load: Load) -> AsyncIterator[str]:
    """A WebSocket server that first quotes every asset, then QUOTES_PER_S random ones a second."""
    choices = random.Random(1)

    async def handle(socket: ServerConnection) -> None:
        sequence = 0
        due_s = time.monotonic()
        for asset in range(ASSETS_COUNT):
            sequence += 1
            await socket.send(_quote(load, asset, sequence, 0))
        with suppress(ConnectionClosed):
            while True:
                due_s += 1 / QUOTES_PER_S
                await asyncio.sleep(max(0, due_s - time.monotonic()))
                sequence += 1
                await socket.send(_quote(load, choices.randrange(ASSETS_COUNT), sequence, choices.randint(-20, 20)))

    async with serve(handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"ws://127.0.0.1:{port}"


def _quote(load: Load, asset: int, sequence: int, cents: int) -> str:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    price = load.prices[asset] * (10_000 + cents) / 10_000
    quote = {"symbol": load.symbol(asset), "price": str(price), "ts_event": now, "sequence": sequence, "source": "b"}
    return orjson.dumps(quote).decode()


async def _until_published(settings: Settings) -> None:
    client = redis.asyncio.Redis.from_url(settings.redis_url, protocol=3)
    async with asyncio.timeout(120):
        while True:
            epochs = [await client.hget(redis_keys.shard(shard), "epoch") for shard in range(SHARDS)]
            if all(epochs) and await client.hlen(redis_keys.PRICES) == ASSETS_COUNT:
                break
            await asyncio.sleep(0.1)
    await client.aclose()


async def _ages(settings: Settings) -> list[float]:
    """Seconds from the oldest quote of each frame to its arrival here."""
    client = redis.asyncio.Redis.from_url(settings.redis_url, protocol=3)
    pubsub = client.pubsub()
    await pubsub.subscribe(*(redis_keys.marks_channel(shard) for shard in range(SHARDS)))
    ages, end_s = [], time.monotonic() + MEASURE_S
    while time.monotonic() < end_s:
        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1)
        if message is not None:
            header, _ = decode_frame(message["data"])
            if header.oldest_event_ns:
                ages.append(time.time() - header.oldest_event_ns / 1e9)
    await pubsub.aclose()
    await client.aclose()
    return ages


async def _dashboards(settings: Settings) -> list[float]:
    """Seconds per query, measured in a process of its own: this one is busy being the market."""
    token = issue_token(settings, "bench", "portfolio:read ledger:read admin", 3_600, datetime.now(UTC))
    arguments = ["-m", "benchmarks.dashboard", str(settings.port), str(MEASURE_S)]
    client = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await client.communicate(token.encode())
    latencies: list[float] = orjson.loads(answer)
    return latencies


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
