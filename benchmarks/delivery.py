"""Deliveries of GraphQL subscriptions per server CPU-second, beside what people would use instead.

Everybody gets the same frames of marks from the same Redis, FRAMES_HZ times a second all rows changed, and serves the
same subscribers over loopback: 500 sockets × 4 subscriptions of 6 fields, once to distinct portfolios, once 50 to each
portfolio. navstream's API is the program itself, with tokens, access checks, rates and limits; the others have none of
these. Nobody queues: who is too slow sends the latest value. What is counted is messages at the client; the CPU is the
server process's own, with its children. A second client that only counts says what the load generator can do alone.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import redis.asyncio
import uvloop

from api.auth import issue_token
from benchmarks.report import Figure, Report
from benchmarks.running_seed import LOG_ID, SHARDS, cpu_s, listens, prepare, servers, shard_of
from benchmarks.seed_load import make_load, portfolio_id
from benchmarks.subscribers import Tally, Task
from engine.marks import MARK, FrameHeader
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.hot_state_redis import HotStateWriter

SOCKETS = 500
SUBSCRIPTIONS_PER_SOCKET = 4
SUBSCRIBERS_PER_PORTFOLIO = 50
FRAMES_HZ = 10
MEASURE_S = 6.0
ROUNDS = 3
SUBSCRIBED_S = 2.0  # what was asked for takes a server so long to begin
OTHERS = Path(__file__).parent / "others"

QUERY = """subscription Nav($id: String!) {
  navUpdates(portfolioId: $id, maxRateHz: 20) { nav cash positionsValue quality asOf sequence } }"""


def run() -> None:
    with servers() as (children, settings):
        uvloop.run(_run(children, settings))


async def _run(children: ChildProcesses, settings: Settings) -> None:
    report, distinct = Report("delivery"), SOCKETS * SUBSCRIPTIONS_PER_SOCKET
    shards = await _prepare(settings, distinct)
    names = list(shards)
    shared = [names[number % (distinct // SUBSCRIBERS_PER_PORTFOLIO)] for number in range(distinct)]
    async with _marks(settings, shards) as flow:
        commands = _commands()
        results: dict[tuple[str, str], list[Tally]] = {}
        cpus: dict[tuple[str, str], list[float]] = {}
        # All in turn, several times: what else the machine does then meets everybody.
        for _ in range(ROUNDS):
            for name, argv in commands.items():
                for load, watched in (("distinct", names), ("shared", shared)):
                    tally, cpu_s = await _serve(children, settings, name, argv, watched, flow)
                    assert not tally.failures, (name, tally.failures)
                    results.setdefault((name, load), []).append(tally)
                    cpus.setdefault((name, load), []).append(tally.deliveries / cpu_s)
        for load, at_least in (("distinct", 60_000), ("shared", 120_000)):
            _report_load(report, load, at_least, list(commands), results, cpus)
    alone = await _client_alone(children)
    report.add(Figure("load generator alone, messages per second", alone, "/s", note="one core, frames told apart"))
    report.finish()


def _report_load(
    report: Report,
    load: str,
    at_least: float,
    names: Sequence[str],
    results: dict[tuple[str, str], list[Tally]],
    cpus: dict[tuple[str, str], list[float]],
) -> None:
    ours = statistics.median(cpus["navstream", load])
    for name in names:
        figure = statistics.median(cpus[name, load])
        tallies = results[name, load]
        rate = statistics.median(tally.deliveries / tally.seconds for tally in tallies)
        note = f"{rate:,.0f} of {tallies[0].subscriptions * FRAMES_HZ:,} a second delivered"
        if name != "navstream":
            note += f"; navstream {ours / figure:.1f} ×"
        target = at_least if name == "navstream" else None
        report.add(Figure(f"{load}: {name}, deliveries per CPU-second", figure, "/s", at_least=target, note=note))


def _commands() -> dict[str, list[str]]:
    """How each server is started; the others take port, Redis and shards as arguments."""
    commands = {
        "navstream": [sys.executable, "-m", "navstream", "api"],
        "stock Strawberry": [sys.executable, "-m", "benchmarks.others.stock_strawberry"],
    }
    if shutil.which("node") and shutil.which("npm"):
        if not (OTHERS / "node_modules").exists():
            subprocess.run(["npm", "install", "--silent"], cwd=OTHERS, check=True)
        commands["graphql-ws on Node"] = ["node", str(OTHERS / "graphql_ws.mjs")]
        commands["mercurius with JIT"] = ["node", str(OTHERS / "mercurius.mjs")]
    else:
        print("graphql-ws and mercurius are left out: they need node and npm")
    return commands


async def _serve(
    children: ChildProcesses, settings: Settings, name: str, argv: list[str], watched: list[str], flow: asyncio.Event
) -> tuple[Tally, float]:
    """Start a server, let the subscribers count, end it; what they counted and the server's CPU meanwhile."""
    port = free_port()
    environment = os.environ | settings.environment() | {"NAVSTREAM_KAFKA_LOG_ID": LOG_ID, "NAVSTREAM_PORT": str(port)}
    environment["NAVSTREAM_SOCKETS_PER_SUBJECT_MAX"] = str(SOCKETS)
    if name != "navstream":
        argv = [*argv, str(port), settings.redis_url, str(SHARDS)]
    # Strawberry as it comes prints a traceback for each subscriber that leaves.
    quiet = None if name == "navstream" else subprocess.DEVNULL
    server = children.spawn(name, argv, env=environment, stdout=subprocess.DEVNULL, stderr=quiet)
    try:
        await listens(port, server)
        token = issue_token(settings, "bench", "portfolio:read admin", 3_600, datetime.now(UTC))
        sockets = [
            watched[at : at + SUBSCRIPTIONS_PER_SOCKET] for at in range(0, len(watched), SUBSCRIPTIONS_PER_SOCKET)
        ]
        task = Task(port, token if name == "navstream" else "", QUERY, sockets, MEASURE_S)
        return await count(task, server.pid, flow)
    finally:
        server.terminate()
        await asyncio.to_thread(server.wait)
        children.forget(server)


async def count(task: Task, server_pid: int, flow: asyncio.Event) -> tuple[Tally, float]:
    """What subscribers in a process of their own counted, and the server's CPU seconds while they did.

    `flow` is set when they have subscribed, and cleared when they have counted.
    """
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.subscribers",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert client.stdin is not None and client.stdout is not None and client.stderr is not None
    client.stdin.write(msgspec.json.encode(task))
    client.stdin.close()
    assert await client.stderr.readline() == b"subscribed\n", (await client.stderr.read()).decode()
    await asyncio.sleep(SUBSCRIBED_S)
    flow.set()
    said = await client.stderr.readline()
    if said != b"warm\n":
        raise RuntimeError((said + await client.stderr.read()).decode())
    before_s = cpu_s(server_pid)
    await asyncio.sleep(task.seconds)
    used_s = cpu_s(server_pid) - before_s
    flow.clear()
    counted = await client.stdout.read()
    if await client.wait():
        raise RuntimeError((await client.stderr.read()).decode())
    tally = msgspec.json.decode(counted, type=Tally)
    # Both took the time by themselves; they differ by the moment between.
    return tally, used_s * tally.seconds / task.seconds


async def begin_count(task: Task, server_pid: int) -> asyncio.Task[tuple[Tally, float]]:
    """`count` under way, from when everything is subscribed to. Raises what it raises before."""
    flow = asyncio.Event()
    counting, flowing = asyncio.create_task(count(task, server_pid, flow)), asyncio.create_task(flow.wait())
    await asyncio.wait({counting, flowing}, return_when=asyncio.FIRST_COMPLETED)
    if not flow.is_set():
        flowing.cancel()
        await counting
    return counting


async def _prepare(settings: Settings, count: int) -> dict[str, int]:
    """The portfolios with their shards, in PostgreSQL."""
    await prepare(settings, make_load(count))
    return {name: shard_of(name) for name in map(portfolio_id, range(count))}


@asynccontextmanager
async def _marks(settings: Settings, shards: dict[str, int]) -> AsyncIterator[asyncio.Event]:
    """Every portfolio's mark changes FRAMES_HZ times a second while the event is set, written as an evaluator does."""
    flow = asyncio.Event()
    client = redis.asyncio.Redis.from_url(settings.redis_url, protocol=3)
    writer = HotStateWriter(client)
    slots: dict[int, list[int]] = {shard: [] for shard in range(SHARDS)}
    for slot, (name, shard) in enumerate(shards.items()):
        writer.layout.place(slot, name)
        slots[shard].append(slot)
    marks = np.zeros(len(shards), MARK)
    marks["cash"] = np.arange(len(marks)) * 1_000_003 + 250_000
    marks["positions_value"] = 10_000_000_000 + np.arange(len(marks)) * 777_777
    of_shard = {shard: np.array(of, np.int64) for shard, of in slots.items()}
    for shard in range(SHARDS):
        await writer.advance(shard, 1, "bench", 1)

    async def publish() -> None:
        sequence, due_s = 0, time.monotonic()
        while True:
            if not flow.is_set():
                await flow.wait()
                due_s = time.monotonic()
            sequence += 1
            marks["positions_value"] += 1_234_567 + sequence % 7
            marks["nav"] = marks["cash"] + marks["positions_value"]
            marks["sequence"], marks["as_of_ns"], marks["ledger_sequence"] = sequence, time.time_ns(), 3
            for shard, mine in of_shard.items():
                now_ns = time.time_ns()
                header = FrameHeader(shard, 1, sequence, sequence - 1, now_ns, now_ns, now_ns, now_ns)
                await writer.flush(header, mine, marks[mine])
            due_s += 1 / FRAMES_HZ
            await asyncio.sleep(max(0, due_s - time.monotonic()))

    publishing = asyncio.create_task(publish())
    try:
        yield flow
    finally:
        # What ended it, if anything did, is why nothing was delivered.
        assert not publishing.done(), publishing.result()
        publishing.cancel()
        await client.aclose()


async def _client_alone(children: ChildProcesses) -> float:
    """Messages per second that the load generator counts when a server does nothing but send."""
    port = free_port()
    blaster = children.spawn("blaster", [sys.executable, "-m", "benchmarks.blaster", str(port)])
    try:
        await listens(port, blaster)
        task = Task(port, "", QUERY, [["p"] * SUBSCRIPTIONS_PER_SOCKET] * 50, 4.0)
        tally, _ = await count(task, blaster.pid, asyncio.Event())
        return tally.deliveries / tally.client_cpu_s
    finally:
        blaster.terminate()
        await asyncio.to_thread(blaster.wait)
        children.forget(blaster)
