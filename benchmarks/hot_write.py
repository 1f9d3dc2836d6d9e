"""Writing 20,000 changed portfolios to hot state: one laid-out HSET per shard against pipelined HINCRBYFLOAT.

Each flush publishes a frame of those portfolios that somebody watches: a tenth of them, as at the seed load, or all.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time

import redis.asyncio
import uvloop

from benchmarks.report import Figure, Report
from benchmarks.seed_load import make_book, make_load
from engine.marks import FrameHeader
from engine.runtime.embedded import start_embedded
from engine.runtime.reaper import ChildProcesses
from engine.stores import redis_keys
from engine.stores.hot_state_redis import FlushOutcome, HotStateWriter

ROUNDS = 9
SHARDS = 4
WATCHED_PART = 0.1
FIELDS = ("nav", "unrealized", "day_pnl")


def run() -> None:
    with ChildProcesses() as children:
        servers = start_embedded(children, postgres=False, kafka=False)
        uvloop.run(_measure(servers.redis_url))


async def _measure(redis_url: str) -> None:
    report = Report("hot_write")
    load = make_load()
    book = make_book(load)
    count = len(book)
    client = redis.asyncio.Redis.from_url(redis_url, protocol=3, socket_timeout=30)
    writer = HotStateWriter(client)
    for number in range(count):
        name = load.portfolio_id(number)
        writer.layout.place(book.slot(name), name)
    for shard in range(SHARDS):
        await writer.advance(shard, 1, "bench", 1)
    slots = [book.slots_of(shard) for shard in range(SHARDS)]

    sequences = itertools.count(1)

    async def flush(watched_part: float) -> None:
        sequence = next(sequences)
        await asyncio.gather(*(flush_shard(shard, sequence, watched_part) for shard in range(SHARDS)))

    async def flush_shard(shard: int, sequence: int, watched_part: float) -> None:
        header, changed = FrameHeader(shard, 1, sequence, sequence - 1, 1, 1), slots[shard]
        marks = book.marks(changed, 1, sequence)
        assert await writer.flush(header, changed, marks, int(len(changed) * watched_part)) is FlushOutcome.WRITTEN

    async def increments() -> None:
        pipe = client.pipeline(transaction=False)
        for number in range(count):
            for field in FIELDS:
                pipe.hincrbyfloat(f"portfolio:{number}", field, 0.25)
        await pipe.execute()

    # In turns, so that a moment of the machine counts for both.
    rounds = [(await _timed(flush(WATCHED_PART)), await _timed(flush(1))) for _ in range(ROUNDS)]
    ours, in_full = zip(*rounds, strict=True)
    theirs = [await _timed(increments()) for _ in range(3)]
    written = await client.hlen(redis_keys.marks(0, 1))
    assert written == len(slots[0])
    wall, cpu = statistics.median(w for w, _ in ours), statistics.median(c for _, c in ours)
    wall_in_full = statistics.median(w for w, _ in in_full)
    their_wall, their_cpu = statistics.median(w for w, _ in theirs), statistics.median(c for _, c in theirs)
    report.add(Figure("hot write, portfolios per second", count / wall, "/s", at_least=2.5e6))
    report.add(Figure("the same where all are watched", count / wall_in_full, "/s"))
    report.add(Figure("pipelined HINCRBYFLOAT × 3, portfolios per second", count / their_wall, "/s"))
    report.add(Figure("ratio", their_wall / wall, "×", at_least=30, note="same run, wall time"))
    report.add(Figure("client CPU for 20,000 portfolios", cpu * 1e3, "ms"))
    report.add(Figure("client CPU of the pipelined way", their_cpu * 1e3, "ms"))
    report.finish()
    await client.aclose()


async def _timed(work: object) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    await work  # type: ignore[misc]
    return time.perf_counter() - wall, time.process_time() - cpu
