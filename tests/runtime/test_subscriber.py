"""Sharded channels on a server and on a cluster: nothing missed between CONFIRMED and LOST, and back by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest
from redis.asyncio import Redis

from engine.runtime.connections import AWAY, RedisClient, connect_redis
from engine.runtime.redis_cluster import ClusterClient
from engine.runtime.settings import Settings
from engine.runtime.subscriber import Notice, NoticeKind, Subscriber
from engine.stores import redis_keys
from tests.proxy import Proxy
from tests.redis_cluster import RedisClusterServers

CHANNELS = {redis_keys.marks_channel(shard) for shard in range(12)}
WAIT_S = 5


@pytest.fixture
async def client(either_redis: str) -> AsyncIterator[RedisClient]:
    redis = connect_redis(Settings(redis_url=either_redis), "test")
    yield redis
    await redis.aclose()


@pytest.fixture
async def subscriber(client: RedisClient) -> AsyncIterator[Subscriber]:
    made = Subscriber(client)
    yield made
    await made.aclose()


async def until(subscriber: Subscriber, kind: NoticeKind, channels: Collection[str]) -> list[Notice]:
    """Hear until all of these were said of, each once; returns what else was heard."""
    left, others = set(channels), []
    async with asyncio.timeout(WAIT_S):
        while left:
            heard = await subscriber.next(WAIT_S)
            assert heard is not None
            if heard.kind is kind and heard.channel in left:
                left.remove(heard.channel)
            else:
                others.append(heard)
    return others


async def published(client: RedisClient, channels: Collection[str], data: bytes) -> int:
    return sum([await client.spublish(channel, data) for channel in sorted(channels)])


async def test_what_is_published_after_the_confirmation_is_heard(client: RedisClient, subscriber: Subscriber) -> None:
    subscriber.listen_to(CHANNELS)
    assert await until(subscriber, NoticeKind.CONFIRMED, CHANNELS) == []
    for number in range(100):
        assert await published(client, CHANNELS, b"%d" % number) == len(CHANNELS)
    heard: dict[str, list[bytes]] = {}
    for _ in range(100 * len(CHANNELS)):
        message = await subscriber.next(WAIT_S)
        assert message is not None
        heard.setdefault(message.channel, []).append(message.data)
    assert heard == {channel: [b"%d" % number for number in range(100)] for channel in CHANNELS}
    assert await subscriber.next(0.05) is None


async def test_channels_come_and_go(client: RedisClient, subscriber: Subscriber) -> None:
    first, second, third = sorted(CHANNELS)[:3]
    subscriber.listen_to({first})
    await until(subscriber, NoticeKind.CONFIRMED, {first})
    subscriber.listen_to({second, third})
    await until(subscriber, NoticeKind.CONFIRMED, {second, third})
    async with asyncio.timeout(WAIT_S):
        while await client.spublish(first, b"to nobody"):
            await asyncio.sleep(0.01)
    subscriber.listen_to({first, second, third})
    await until(subscriber, NoticeKind.CONFIRMED, {first})
    assert await published(client, {first, second, third}, b"to all") == 3
    await until(subscriber, NoticeKind.MESSAGE, {first, second, third})


async def test_closing_leaves_no_connection_and_no_task(client: RedisClient) -> None:
    before = asyncio.all_tasks()
    subscriber = Subscriber(client)
    subscriber.listen_to(CHANNELS)
    await until(subscriber, NoticeKind.CONFIRMED, CHANNELS)
    await subscriber.aclose()
    assert asyncio.all_tasks() == before
    async with asyncio.timeout(WAIT_S):
        while await published(client, CHANNELS, b"to nobody"):
            await asyncio.sleep(0.01)


async def test_a_killed_connection_is_made_again(client: RedisClient, subscriber: Subscriber) -> None:
    subscriber.listen_to(CHANNELS)
    await until(subscriber, NoticeKind.CONFIRMED, CHANNELS)
    everywhere = {"target_nodes": "primaries"} if isinstance(client, ClusterClient) else {}
    await client.execute_command("CLIENT KILL", "TYPE", "PUBSUB", **everywhere)
    others = await until(subscriber, NoticeKind.CONFIRMED, CHANNELS)
    assert {(heard.kind, heard.channel) for heard in others} == {(NoticeKind.LOST, channel) for channel in CHANNELS}
    assert await published(client, CHANNELS, b"again") == len(CHANNELS)
    await until(subscriber, NoticeKind.MESSAGE, CHANNELS)


async def test_a_server_that_is_away_is_an_error(valkey_url: str) -> None:
    async with Proxy(valkey_url) as proxy:
        client = connect_redis(Settings(redis_url=proxy.url), "test")
        subscriber = Subscriber(client)
        subscriber.listen_to({"marks:{1}"})
        await until(subscriber, NoticeKind.CONFIRMED, {"marks:{1}"})
        await proxy.go_away()
        with pytest.raises(AWAY):
            await until(subscriber, NoticeKind.CONFIRMED, {"marks:{1}"})
        await subscriber.aclose()
        await client.aclose()


async def test_a_frozen_server_is_noticed_though_its_channels_may_be_silent(valkey_url: str) -> None:
    async with Proxy(valkey_url) as proxy:
        client = connect_redis(Settings(redis_url=proxy.url), "test")
        assert isinstance(client, Redis)
        client.connection_pool.connection_kwargs["socket_timeout"] = 0.2
        subscriber = Subscriber(client)
        subscriber.listen_to({"badges"})
        await until(subscriber, NoticeKind.CONFIRMED, {"badges"})
        assert await subscriber.next(0.7) is None
        proxy.freeze()
        lost = await subscriber.next(WAIT_S)
        assert lost == Notice(NoticeKind.LOST, "badges")
        proxy.thaw()
        await subscriber.aclose()
        await client.aclose()


# -- in a cluster ------------------------------------------------------------------------------------------


@pytest.fixture
async def in_cluster(cluster_db: RedisClusterServers) -> AsyncIterator[tuple[RedisClient, Subscriber]]:
    client = connect_redis(Settings(redis_url=cluster_db.url), "test")
    subscriber = Subscriber(client)
    subscriber.listen_to(CHANNELS)
    await until(subscriber, NoticeKind.CONFIRMED, CHANNELS)
    yield client, subscriber
    await subscriber.aclose()
    await client.aclose()


async def test_a_message_goes_to_the_node_of_its_slot_alone_and_each_node_has_one_connection(
    cluster_db: RedisClusterServers, in_cluster: tuple[RedisClient, Subscriber]
) -> None:
    client, _ = in_cluster
    for master in cluster_db.masters:
        lines = bytes(master.ask("CLIENT", "LIST", "TYPE", "PUBSUB")).decode().splitlines()  # type: ignore[call-overload]
        own = [channel for channel in CHANNELS if cluster_db.owner(channel) is master]
        assert [f" ssub={len(own)} " in line for line in lines] == [True]
    sent = sent_over_bus(cluster_db)
    await published(client, CHANNELS, b"x" * 10_000)
    assert sent_over_bus(cluster_db) == sent


def sent_over_bus(cluster: RedisClusterServers) -> int:
    """How many published messages masters have passed to each other."""
    told = [bytes(master.ask("CLUSTER", "INFO")).decode() for master in cluster.masters]  # type: ignore[call-overload]
    lines = [line.partition(":") for text in told for line in text.split()]
    return sum(int(count) for name, _, count in lines if name.startswith("cluster_stats_messages_publish"))


async def test_a_channel_whose_slot_moves_is_lost_and_confirmed_at_its_new_place(
    cluster_db: RedisClusterServers, in_cluster: tuple[RedisClient, Subscriber]
) -> None:
    client, subscriber = in_cluster
    channel = redis_keys.marks_channel(3)
    for _ in range(2):
        target = next(master for master in cluster_db.masters if master is not cluster_db.owner(channel))
        await asyncio.to_thread(cluster_db.move, channel, target)
        assert await until(subscriber, NoticeKind.CONFIRMED, {channel}) == [Notice(NoticeKind.LOST, channel)]
        assert await client.spublish(channel, b"here") == 1
        await until(subscriber, NoticeKind.MESSAGE, {channel})


async def test_one_dead_master_silences_its_own_channels_alone_until_it_is_back(
    cluster_db: RedisClusterServers, in_cluster: tuple[RedisClient, Subscriber]
) -> None:
    client, subscriber = in_cluster
    dead = cluster_db.owner(redis_keys.marks_channel(0))
    lost = {channel for channel in CHANNELS if cluster_db.owner(channel) is dead}
    dead.kill()
    try:
        assert await until(subscriber, NoticeKind.LOST, lost) == []
        for _ in range(5):
            assert await published(client, CHANNELS - lost, b"still") == len(CHANNELS - lost)
            assert await until(subscriber, NoticeKind.MESSAGE, CHANNELS - lost) == []
            await asyncio.sleep(0.1)
    finally:
        dead.start()
    assert await until(subscriber, NoticeKind.CONFIRMED, lost) == []
    await asyncio.to_thread(cluster_db.wait_until_whole)
    assert await published(client, CHANNELS, b"all") == len(CHANNELS)
    assert await until(subscriber, NoticeKind.MESSAGE, CHANNELS) == []
