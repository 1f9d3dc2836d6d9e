"""Interest as this process tells it, heard on a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from api.hub import Hub
from api.interest import EXPIRY_INTERVALS, InterestTeller
from engine.messages import InterestFrame, interest_decoder
from engine.runtime.connections import connect_redis
from engine.runtime.settings import Settings
from engine.runtime.subscriber import NoticeKind, Subscriber
from engine.stores import redis_keys
from tests.redis_cluster import RedisClusterServers

WAIT_S = 10
INTERVAL_MS = 400


@pytest.fixture
async def redis(redis_db: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_db, protocol=3, socket_timeout=5) as client:
        yield client


class Heard:
    """What was told on the channels of shards 0 to 3."""

    def __init__(self, pubsub: Any) -> None:
        self._pubsub = pubsub

    async def next(self, timeout_s: float = WAIT_S) -> tuple[int, InterestFrame] | None:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s)
                if message is not None:
                    shard = int(message["channel"].decode().removeprefix("interest:{").removesuffix("}"))
                    return shard, interest_decoder.decode(message["data"])

    async def until_complete(self) -> list[tuple[int, InterestFrame]]:
        """What comes up to the next complete frame, that one included."""
        frames = []
        while not frames or not frames[-1][1].complete:
            frames.append(await self.next())
        return frames


@asynccontextmanager
async def telling(redis: Redis, hub: Hub) -> AsyncIterator[Heard]:
    settings = Settings(interest_interval_ms=INTERVAL_MS)
    async with redis.pubsub() as pubsub:
        await pubsub.ssubscribe(*(redis_keys.interest_channel(shard) for shard in range(4)))
        for _ in range(4):
            assert (await pubsub.get_message(timeout=WAIT_S))["type"] == "ssubscribe"
        task = asyncio.create_task(InterestTeller(redis, hub, settings).run())
        try:
            yield Heard(pubsub)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def test_what_is_new_is_told_at_once_and_all_of_it_every_interval(redis: Redis) -> None:
    hub, signal = Hub(), asyncio.Event()
    with ExitStack() as watches:
        watches.enter_context(hub.watch_portfolio(2, "p-0", signal))
        async with telling(redis, hub) as heard:
            shard, first = await heard.next()
            assert (shard, first.complete, first.portfolio_ids) == (2, True, ["p-0"])
            assert first.expires_in_ms == EXPIRY_INTERVALS * INTERVAL_MS
            await asyncio.sleep(0)
            watches.enter_context(hub.watch_portfolio(2, "p-1", signal))
            began_s = time.monotonic()
            shard, new = await heard.next()
            assert time.monotonic() - began_s < INTERVAL_MS / 2_000
            assert (shard, new.node, new.complete, new.portfolio_ids) == (2, first.node, False, ["p-1"])
            (shard, everything), *_ = (await heard.until_complete())[-1:]
            assert (shard, sorted(everything.portfolio_ids)) == (2, ["p-0", "p-1"])


async def test_a_storm_of_watches_is_a_few_frames(redis: Redis) -> None:
    hub, signal = Hub(), asyncio.Event()
    with ExitStack() as watches:
        async with telling(redis, hub) as heard:
            for number in range(500):
                watches.enter_context(hub.watch_portfolio(1, f"p-{number}", signal))
                if number % 100 == 99:
                    await asyncio.sleep(0.005)
            told: set[str] = set()
            count = 0
            while len(told) < 500:
                _, frame = await heard.next()
                told |= set(frame.portfolio_ids)
                count += 1
            assert count <= 4


async def test_a_watch_that_ended_is_missing_in_the_next_complete_frame_and_an_empty_one_is_the_last(
    redis: Redis,
) -> None:
    hub, signal = Hub(), asyncio.Event()
    async with telling(redis, hub) as heard:
        with hub.watch_portfolio(3, "p-1", signal):
            with hub.watch_portfolio(3, "p-2", signal):
                frames = await heard.until_complete()
                assert sorted(frames[-1][1].portfolio_ids) == ["p-1", "p-2"]
            assert (await heard.until_complete())[-1][1].portfolio_ids == ["p-1"]
        shard, last = (await heard.until_complete())[-1]
        assert (shard, last.portfolio_ids) == (3, [])
        with pytest.raises(TimeoutError):
            await heard.next(2.5 * INTERVAL_MS / 1_000)


async def test_after_an_outage_everything_is_told(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, signal = Hub(), asyncio.Event()
    async with telling(redis, hub) as heard:
        with hub.watch_portfolio(0, "p-1", signal):
            await heard.until_complete()
            with monkeypatch.context() as patched:

                def away(*_: object, **__: object) -> Any:
                    failed.set()
                    raise RedisConnectionError("away")

                failed = asyncio.Event()
                patched.setattr(redis, "pipeline", away)
                with hub.watch_portfolio(0, "p-2", signal):
                    await asyncio.wait_for(failed.wait(), WAIT_S)
                    patched.undo()
                    _, frame = await heard.next()
                    assert frame.complete
                    assert sorted(frame.portfolio_ids) == ["p-1", "p-2"]


async def test_of_a_cluster_whose_one_master_is_away_the_others_are_told_and_it_when_it_is_back(
    cluster_db: RedisClusterServers,
) -> None:
    channels = {redis_keys.interest_channel(shard): shard for shard in range(4)}
    dead = cluster_db.owner(redis_keys.interest_channel(3))
    lost = {channel for channel in channels if cluster_db.owner(channel) is dead}
    redis = connect_redis(Settings(redis_url=cluster_db.url), "test")
    hub, signal, subscriber = Hub(), asyncio.Event(), Subscriber(redis)
    subscriber.listen_to(channels)

    async def heard(wanted: Collection[str], name: str) -> None:
        left = set(wanted)
        async with asyncio.timeout(WAIT_S):
            while left:
                notice = await subscriber.next(WAIT_S)
                if notice is not None and notice.kind is NoticeKind.MESSAGE:
                    frame = interest_decoder.decode(notice.data)
                    left -= {notice.channel} if name in frame.portfolio_ids else set()

    with ExitStack() as watches:
        for shard in channels.values():
            watches.enter_context(hub.watch_portfolio(shard, "p-1", signal))
        teller = asyncio.create_task(InterestTeller(redis, hub, Settings(interest_interval_ms=INTERVAL_MS)).run())
        try:
            await heard(channels, "p-1")
            dead.kill()
            try:
                for number in range(2, 5):
                    for shard in channels.values():
                        watches.enter_context(hub.watch_portfolio(shard, f"p-{number}", signal))
                    began_s = time.monotonic()
                    await heard(channels.keys() - lost, f"p-{number}")
                    assert time.monotonic() - began_s < 2 * INTERVAL_MS / 1_000
            finally:
                dead.start()
            await heard(lost, "p-4")
        finally:
            teller.cancel()
            with suppress(asyncio.CancelledError):
                await teller
            await subscriber.aclose()
            await redis.aclose()
