"""Reading hot state from a real server and a real cluster: round trips, moved pointers, absent values."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError

from engine.messages import Quote
from engine.runtime.connections import RedisClient, connect_redis
from engine.runtime.redis_cluster import ClusterPipeline
from engine.runtime.settings import Settings
from engine.sectors import SectorValue
from engine.stores.hot_state_reads import POINTER_READS_MAX, HotStateReads, PointerUnsettledError
from tests.builders import MICRO, HotStateBuilder, MarkRow, held
from tests.proxy import Proxy


@pytest_asyncio.fixture(loop_scope="session")
async def redis(either_redis: str) -> AsyncIterator[RedisClient]:
    client = connect_redis(Settings(redis_url=either_redis, redis_timeout_s=5), "test")
    yield client
    await client.aclose()


@pytest.fixture
def round_trips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every pipeline that is sent."""
    sent: list[int] = []

    async def count(pipeline: Pipeline | ClusterPipeline) -> None:
        sent.append(len(pipeline))

    before_each_pipeline(monkeypatch, count)
    return sent


def before_each_pipeline(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Pipeline | ClusterPipeline], Awaitable[None]]
) -> None:
    for kind in (Pipeline, ClusterPipeline):

        async def acting(self: Any, *args: Any, execute: Any = kind.execute, **kwargs: Any) -> Any:
            await act(self)
            return await execute(self, *args, **kwargs)

        monkeypatch.setattr(kind, "execute", acting)


async def test_everything_in_one_round_trip(redis: RedisClient, round_trips: list[int]) -> None:
    builder, reads = HotStateBuilder(redis), HotStateReads(redis, 1)
    await builder.point(3, 5)
    await builder.marks(3, 5, {"p-1": MarkRow(nav=7), "p-22": MarkRow(nav=8)})
    await builder.positions(3, "p-1", {"AAPL": held("2.5", 10)})
    await builder.sectors(3, "p-1", {"Energy": SectorValue(-5, 5)})
    quote = Quote("AAPL", "1.5", 12, "SIM", None)
    await builder.quotes([quote])
    await reads.mark(3, "p-1")  # learns the pointer
    round_trips.clear()
    state = await reads.read(
        marks=[(3, "p-1"), (3, "p-22"), (3, "none")],
        positions=[(3, "p-1"), (3, "none")],
        sectors=[(3, "p-1"), (3, "none")],
        quotes=["AAPL", "NONE"],
    )
    assert len(round_trips) == 1
    first, second = state.marks[3, "p-1"], state.marks[3, "p-22"]
    assert first is not None and second is not None
    assert (first.nav, second.nav, first.epoch) == (7, 8, 5)
    assert state.marks[3, "none"] is None
    assert state.positions == {(3, "p-1"): {"AAPL": held("2.5", 10)}, (3, "none"): {}}
    assert state.sectors == {(3, "p-1"): {"Energy": SectorValue(-5, 5)}, (3, "none"): {}}
    assert state.quotes == {"AAPL": quote}


async def test_a_moved_pointer_is_followed_in_the_same_read(redis: RedisClient, round_trips: list[int]) -> None:
    builder, reads = HotStateBuilder(redis), HotStateReads(redis, 1)
    for epoch, nav in ((1, 10), (2, 20)):
        await builder.marks(0, epoch, {"p": MarkRow(nav=nav)})
        await builder.point(0, epoch)
        mark = await reads.mark(0, "p")
        assert mark is not None and (mark.epoch, mark.nav) == (epoch, nav)
    assert len(round_trips) == 4  # two each time: the pointer had moved
    await reads.mark(0, "p")
    assert len(round_trips) == 5


async def test_a_pointer_that_never_settles_is_reported(redis: RedisClient, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, reads = HotStateBuilder(redis), HotStateReads(redis, 1)
    tries = 0

    async def move(_: object) -> None:
        nonlocal tries
        tries += 1
        await builder.point(0, tries)

    before_each_pipeline(monkeypatch, move)
    with pytest.raises(PointerUnsettledError):
        await reads.mark(0, "p")
    assert tries == POINTER_READS_MAX + 1


async def test_no_pointer_is_no_mark(redis: RedisClient) -> None:
    assert await HotStateReads(redis, 1).mark(9, "p") is None
    assert await HotStateReads(redis, 1).marks(9, ["a", "b"]) == {"a": None, "b": None}


async def test_after_a_flush_of_redis_there_is_nothing_rather_than_something_old(redis: RedisClient) -> None:
    builder, reads = HotStateBuilder(redis), HotStateReads(redis, 1)
    await builder.point(0, 4)
    await builder.marks(0, 4, {"p": MarkRow(nav=1 * MICRO)})
    assert await reads.mark(0, "p") is not None
    await redis.flushall()
    assert await reads.mark(0, "p") is None


async def test_reading_nothing_asks_nothing(redis: RedisClient, round_trips: list[int]) -> None:
    state = await HotStateReads(redis, 1).read()
    assert (state.marks, round_trips) == ({}, [])


async def test_a_damaged_mark_is_a_defect_not_a_zero(redis: RedisClient) -> None:
    builder = HotStateBuilder(redis)
    await builder.point(0, 1)
    await redis.hset("marks:{0}:1", "p", b"short")
    with pytest.raises(ValueError, match="bytes"):
        await HotStateReads(redis, 1).mark(0, "p")


async def test_a_frozen_server_costs_the_timeout_only(redis_db: str) -> None:
    async with Proxy(redis_db) as proxy:
        client = Redis.from_url(proxy.url, protocol=3)
        reads = HotStateReads(client, 0.3)
        await reads.mark(0, "p")
        proxy.freeze()
        begun = asyncio.get_running_loop().time()
        with pytest.raises((TimeoutError, RedisError)):
            await reads.mark(0, "p")
        assert asyncio.get_running_loop().time() - begun < 1
        await client.aclose()
