"""The snapshots worker: on each hourly UTC grid instant, the hot marks of all portfolios go to `equity_snapshot`.

A row is stamped with the grid instant it was taken for and carries the mark's own (`marked_at`, epoch, sequence).
An instant that passes while the worker is down, stalled or without Redis or PostgreSQL for longer than
LATENESS_MAX_S of wall time is a gap and stays one: nothing is invented afterwards. Under a market clock that runs
faster than it is polled, the instants between two polls are gaps as well and the latest one is written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.asyncio import Redis

from engine.marks import decode_mark
from engine.runtime import telemetry
from engine.runtime.clock import HOUR_NS, Clock, to_datetime
from engine.runtime.connections import AWAY, Outage, connect_postgres, connect_redis, stopped_within, wait_until
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.snapshots_timescale import Snapshot, SnapshotStore

LATENESS_MAX_S = 60
SCAN_COUNT = 5_000  # marks read from Redis per round trip: under 1 MB

_log = structlog.get_logger(__name__)


class SnapshotTaker:
    def __init__(self, clock: Clock, redis: Redis, store: SnapshotStore, shards_count: int) -> None:
        self._clock = clock
        self._redis = redis
        self._store = store
        self._shards_count = shards_count
        self._taken_for_ns = self._grid_ns()
        self._due_since_s: float | None = None

    def _grid_ns(self) -> int:
        """The last whole hour."""
        return self._clock.now_ns() // HOUR_NS * HOUR_NS

    async def poll(self) -> int:
        """Take the snapshots that are due; returns how many rows were written. Raises AWAY errors."""
        grid_ns = self._grid_ns()
        passed = (grid_ns - self._taken_for_ns) // HOUR_NS
        if not passed:
            return 0
        if self._due_since_s is None:
            self._due_since_s = time.monotonic()
        written = 0
        if time.monotonic() - self._due_since_s <= LATENESS_MAX_S:
            async for snapshots in self._snapshots(grid_ns):
                written += await self._store.write(snapshots)
            passed -= 1
        telemetry.SNAPSHOTS.inc(written)
        telemetry.SNAPSHOT_GAPS.inc(passed)
        self._taken_for_ns, self._due_since_s = grid_ns, None
        return written

    async def _snapshots(self, grid_ns: int) -> AsyncIterator[list[Snapshot]]:
        at = to_datetime(grid_ns)
        for shard in range(self._shards_count):
            pointer = await self._redis.hget(redis_keys.shard(shard), "epoch")
            if pointer is None:
                continue
            epoch, cursor = int(pointer), 0
            while True:
                page: Any = await self._redis.hscan(redis_keys.marks(shard, epoch), cursor, count=SCAN_COUNT)
                cursor = page[0]
                yield [Snapshot(name.decode(), at, decode_mark(packed, epoch)) for name, packed in page[1].items()]
                if not cursor:
                    break


async def run_snapshots(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
    """Take snapshots until `stop` is set."""
    redis = connect_redis(settings, "snapshots")
    pool = None
    try:

        async def connect() -> None:
            nonlocal pool
            pool = pool or await connect_postgres(settings, "snapshots")

        if not await wait_until("postgresql", connect, stop):
            return
        assert pool is not None
        shards_count = 0
        while not shards_count and not stop.is_set():
            shards_count = await pool.fetchval("SELECT count(*) FROM shard")
            await stopped_within(stop, settings.snapshot_poll_interval_ms / 1_000)
        taker = SnapshotTaker(clock, redis, SnapshotStore(pool), shards_count)
        outage = Outage("redis or postgresql")
        while not stop.is_set():
            delay_s = settings.snapshot_poll_interval_ms / 1_000
            try:
                await taker.poll()
                outage.end()
            except AWAY as error:
                delay_s = outage.begin_or_continue(error)
            await stopped_within(stop, delay_s)
    finally:
        await redis.aclose()
        if pool is not None:
            await pool.close()
