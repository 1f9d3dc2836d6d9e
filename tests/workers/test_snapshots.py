"""Snapshots: on the grid, once, from the marks as they were; what was missed stays a gap."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import asyncpg
import numpy as np
import pytest
import redis.asyncio

from engine.marks import MARK
from engine.runtime.clock import HOUR_NS, to_datetime
from engine.stores import redis_keys
from engine.stores.migrate import upgrade
from engine.stores.snapshots_timescale import SnapshotStore
from tests.conftest import create_database, drop_database
from workers import snapshots
from workers.snapshots import SnapshotTaker

TIMESCALE_URL = os.environ.get("NAVSTREAM_TEST_TIMESCALE_URL", "")
START_NS = 1_795_352_400_000_000_000  # 2026-11-22T13:00:00Z
MICRO = 1_000_000


class SetClock:
    def __init__(self, now_ns: int) -> None:
        self.ns = now_ns

    def now_ns(self) -> int:
        return self.ns


@pytest.fixture(params=["plain", pytest.param("timescale", marks=pytest.mark.timescale)])
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[asyncpg.Pool]:
    """One contract, both tables: a plain one, and a hypertable where a server with TimescaleDB is named."""
    if request.param == "timescale" and not TIMESCALE_URL:
        pytest.skip("NAVSTREAM_TEST_TIMESCALE_URL names no PostgreSQL server with the timescaledb extension")
    server = TIMESCALE_URL if request.param == "timescale" else request.getfixturevalue("postgres_url")
    url = create_database(server)
    try:
        await upgrade(url)
        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
            yield pool
    finally:
        drop_database(server, url)


@pytest.fixture
async def client(redis_db: str) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(redis_db, protocol=3)
    yield client
    await client.aclose()


def packed(nav: int, sequence: int = 1) -> bytes:
    row = np.zeros(1, MARK)
    row["nav"], row["cash"], row["positions_value"] = nav, nav - 5, 5
    row["as_of_ns"], row["sequence"], row["ledger_sequence"] = START_NS - 1_000, sequence, 3
    return row.tobytes()


async def mark(client: redis.asyncio.Redis, name: str, nav: int, shard: int = 0, epoch: int = 7) -> None:
    await client.hset(redis_keys.shard(shard), "epoch", epoch)
    await client.hset(redis_keys.marks(shard, epoch), name, packed(nav))


async def rows(pool: asyncpg.Pool) -> list[tuple[object, ...]]:
    found = await pool.fetch("SELECT portfolio_id, at, nav FROM equity_snapshot ORDER BY portfolio_id, at")
    return [(row["portfolio_id"], row["at"], int(row["nav"] * MICRO)) for row in found]


async def test_a_grid_instant_that_passes_is_kept_once(pool: asyncpg.Pool, client: redis.asyncio.Redis) -> None:
    clock = SetClock(START_NS + HOUR_NS // 2)
    taker = SnapshotTaker(clock, client, SnapshotStore(pool), 2)
    await mark(client, "p-1", 100 * MICRO)
    await mark(client, "p-2", -3, shard=1)
    assert await taker.poll() == 0, "nothing has passed yet, and the hour before the start was not ours"
    clock.ns = START_NS + HOUR_NS + 5
    assert await taker.poll() == 2
    await mark(client, "p-1", 999 * MICRO)
    assert await taker.poll() == 0
    at = to_datetime(START_NS + HOUR_NS)
    assert await rows(pool) == [("p-1", at, 100 * MICRO), ("p-2", at, -3)]
    marked_at, epoch = await pool.fetchrow("SELECT marked_at, epoch FROM equity_snapshot WHERE portfolio_id = 'p-1'")
    assert (marked_at, epoch) == (to_datetime(START_NS - 1_000), 7)


async def test_a_second_worker_changes_nothing(pool: asyncpg.Pool, client: redis.asyncio.Redis) -> None:
    clock = SetClock(START_NS + 1)
    takers = [SnapshotTaker(clock, client, SnapshotStore(pool), 1) for _ in range(2)]
    await mark(client, "p-1", 1)
    clock.ns += HOUR_NS
    assert await takers[0].poll() == 1
    await mark(client, "p-1", 2)
    assert await takers[1].poll() == 0
    assert await rows(pool) == [("p-1", to_datetime(START_NS + HOUR_NS), 1)]


async def test_what_passed_between_two_polls_is_a_gap(pool: asyncpg.Pool, client: redis.asyncio.Redis) -> None:
    clock = SetClock(START_NS + 1)
    taker = SnapshotTaker(clock, client, SnapshotStore(pool), 1)
    await mark(client, "p-1", 1)
    clock.ns += 4 * HOUR_NS
    assert await taker.poll() == 1
    assert [at for _, at, _ in await rows(pool)] == [to_datetime(START_NS + 4 * HOUR_NS)]


async def test_an_outage_longer_than_allowed_is_a_gap(
    pool: asyncpg.Pool, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SetClock(START_NS + 1)
    taker = SnapshotTaker(clock, client, SnapshotStore(pool), 1)
    await mark(client, "p-1", 1)
    clock.ns += HOUR_NS
    await pool.execute("ALTER TABLE equity_snapshot RENAME TO away")
    with pytest.raises(asyncpg.PostgresError):
        await taker.poll()
    await pool.execute("ALTER TABLE away RENAME TO equity_snapshot")
    monkeypatch.setattr(snapshots, "LATENESS_MAX_S", -1)
    assert await taker.poll() == 0
    monkeypatch.setattr(snapshots, "LATENESS_MAX_S", 60)
    clock.ns += HOUR_NS
    assert await taker.poll() == 1
    assert [at for _, at, _ in await rows(pool)] == [to_datetime(START_NS + 2 * HOUR_NS)]


async def test_a_shard_without_an_owner_yet_has_no_snapshots(pool: asyncpg.Pool, client: redis.asyncio.Redis) -> None:
    clock = SetClock(START_NS + 1)
    taker = SnapshotTaker(clock, client, SnapshotStore(pool), 4)
    clock.ns += HOUR_NS
    assert await taker.poll() == 0


async def test_twenty_thousand_portfolios_are_all_kept(pool: asyncpg.Pool, client: redis.asyncio.Redis) -> None:
    clock = SetClock(START_NS + 1)
    taker = SnapshotTaker(clock, client, SnapshotStore(pool), 1)
    await client.hset(redis_keys.shard(0), "epoch", 7)
    for start in range(0, 20_000, 5_000):
        names = {f"p-{number}": packed(number) for number in range(start, start + 5_000)}
        await client.hset(redis_keys.marks(0, 7), mapping=names)
    clock.ns += HOUR_NS
    assert await taker.poll() == 20_000
    assert await pool.fetchval("SELECT count(*) FROM equity_snapshot") == 20_000
