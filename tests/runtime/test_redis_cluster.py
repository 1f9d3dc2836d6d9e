"""The cluster's client: slots that move, masters that are away, and what the others' share in that is: none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from redis.exceptions import RedisClusterException, ResponseError

from engine.runtime.connections import AWAY, RedisClient, connect_redis
from engine.runtime.redis_cluster import ClusterClient
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from tests.redis_cluster import Master, RedisClusterServers

SHARDS = range(12)


@pytest.fixture
async def client(cluster_db: RedisClusterServers) -> AsyncIterator[ClusterClient]:
    redis = connected(cluster_db)
    yield redis
    await redis.aclose()


def connected(cluster: RedisClusterServers) -> ClusterClient:
    redis = connect_redis(Settings(redis_url=cluster.url, redis_timeout_s=2), "test")
    assert isinstance(redis, ClusterClient)
    return redis


def packed(redis: RedisClient, *command: str | bytes) -> list[bytes]:
    assert isinstance(redis, ClusterClient)
    return redis.get_primaries()[0].acquire_connection().pack_command(*command)


def elsewhere(cluster: RedisClusterServers, key: str) -> Master:
    owner = cluster.owner(key)
    return next(master for master in cluster.masters if master is not owner)


def by_owner(cluster: RedisClusterServers) -> dict[Master, list[int]]:
    shards: dict[Master, list[int]] = {}
    for shard in SHARDS:
        shards.setdefault(cluster.owner(redis_keys.shard(shard)), []).append(shard)
    assert len(shards) == len(cluster.masters)
    return shards


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://127.0.0.1:7000/3",
        "redis+cluster://",
        "redis+cluster://127.0.0.1:seven",
    ],
)
def test_a_url_that_names_no_cluster_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        connect_redis(Settings(redis_url=url), "test")


def test_a_url_names_several_nodes_one_user_and_options() -> None:
    url = "rediss+cluster://ann:p%40ss@one:7000,two,[::1]:7001/?ssl_cert_reqs=none"
    client = connect_redis(Settings(redis_url=url, redis_timeout_s=7), "quotes")
    assert isinstance(client, ClusterClient)
    nodes = client.nodes_manager.startup_nodes.values()
    assert [(node.host, node.port) for node in nodes] == [("one", 7000), ("two", 6379), ("::1", 7001)]
    for node in nodes:
        options = node.connection_kwargs
        assert (options["username"], options["password"]) == ("ann", "p@ss")
        assert (options["socket_timeout"], options["client_name"]) == (7, "navstream-quotes")
        assert node.connection_class.__name__ == "_TlsConnection"


async def test_one_node_named_is_enough(cluster_db: RedisClusterServers) -> None:
    url = f"redis+cluster://:{cluster_db.password}@127.0.0.1:{cluster_db.masters[1].port}"
    async with connect_redis(Settings(redis_url=url), "test") as client:
        for shard in SHARDS:
            await client.hset(redis_keys.shard(shard), "epoch", shard)
    assert [int(str(master.ask("DBSIZE"))) > 0 for master in cluster_db.masters] == [True] * 3


async def test_a_pipeline_is_one_round_trip_to_each_node_and_keeps_its_order(client: ClusterClient) -> None:
    async with client.pipeline(transaction=False) as pipeline:
        for shard in SHARDS:
            pipeline.hset(redis_keys.shard(shard), "epoch", shard)
            pipeline.hget(redis_keys.shard(shard), "epoch")
        answers = await pipeline.execute()
    assert answers[1::2] == [b"%d" % shard for shard in SHARDS]


async def test_an_error_of_one_command_is_raised_or_left_in_its_place(client: ClusterClient) -> None:
    await client.set(redis_keys.shard(1), "no hash")
    pipeline = client.pipeline(transaction=False)
    pipeline.hget(redis_keys.shard(0), "epoch").hget(redis_keys.shard(1), "epoch")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await pipeline.execute()
    pipeline.hget(redis_keys.shard(0), "epoch").hget(redis_keys.shard(1), "epoch")
    nothing, error = await pipeline.execute(raise_on_error=False)
    assert (nothing, type(error)) == (None, ResponseError)


async def test_a_moved_slot_is_followed(cluster_db: RedisClusterServers, client: ClusterClient) -> None:
    key = redis_keys.shard(3)
    await client.hset(key, "epoch", 1)
    for value in (b"2", b"3"):
        await asyncio.to_thread(cluster_db.move, key, elsewhere(cluster_db, key))
        commands = [packed(client, "HSET", key, "epoch", value), packed(client, "HGET", key, "epoch")]
        assert await client.send(key, commands) == [0, value]
        await asyncio.to_thread(cluster_db.move, key, elsewhere(cluster_db, key))
        assert await client.pipeline().hget(key, "epoch").hget("other", "epoch").execute() == [value, None]


async def test_a_slot_on_its_way_is_found_on_either_side(
    cluster_db: RedisClusterServers, client: ClusterClient
) -> None:
    """ASK: the key has been moved already, its slot not yet."""
    key, target = redis_keys.shard(3), elsewhere(cluster_db, redis_keys.shard(3))
    await client.hset(key, "epoch", 1)
    with cluster_db.moving(key, target):
        commands = [packed(client, "HGET", key, "epoch"), packed(client, "HSET", key, "owner", "me")]
        assert await client.send(key, commands) == [b"1", 1]
        assert await client.pipeline().hget(key, "owner").execute() == [b"me"]
    assert await client.hgetall(key) == {b"epoch": b"1", b"owner": b"me"}
    assert cluster_db.owner(key) is target


async def test_what_a_dead_master_has_fails_and_nothing_else(
    cluster_db: RedisClusterServers, client: ClusterClient
) -> None:
    shards = by_owner(cluster_db)
    dead, *living = cluster_db.masters
    for shard in SHARDS:
        await client.hset(redis_keys.shard(shard), "epoch", 1)
    dead.kill()
    try:
        asking = {
            (shard, attempt): client.pipeline().hget(redis_keys.shard(shard), "epoch").execute()
            for attempt in range(10)
            for shard in SHARDS
        }
        with pytest.raises(AWAY):
            await client.send(redis_keys.shard(shards[dead][0]), [packed(client, "PING")])
        answers = await asyncio.gather(*asking.values(), return_exceptions=True)
        for (shard, _), answer in zip(asking, answers, strict=True):
            assert isinstance(answer, AWAY) if shard in shards[dead] else answer == [b"1"], repr(answer)
        # A process that starts now serves what there is.
        fresh = connected(cluster_db)
        for master in living:
            assert await fresh.hget(redis_keys.shard(shards[master][0]), "epoch") == b"1"
        with pytest.raises(AWAY):
            await fresh.hget(redis_keys.shard(shards[dead][0]), "epoch")
        await fresh.aclose()
    finally:
        dead.start()
    await asyncio.to_thread(cluster_db.wait_until_whole)
    async with asyncio.timeout(5):
        while True:
            try:
                assert await client.pipeline().hget(redis_keys.shard(shards[dead][0]), "epoch").execute() == [None]
                break
            except AWAY:
                await asyncio.sleep(0.05)


async def test_a_frozen_master_costs_the_timeout_of_those_who_ask_it(
    cluster_db: RedisClusterServers, client: ClusterClient
) -> None:
    shards = by_owner(cluster_db)
    frozen, living = cluster_db.masters[0], cluster_db.masters[1]
    for shard in SHARDS:
        await client.hget(redis_keys.shard(shard), "epoch")
    frozen.freeze()
    try:
        asked = asyncio.create_task(client.send(redis_keys.shard(shards[frozen][0]), [packed(client, "PING")]))
        begun_s = time.monotonic()
        await client.pipeline().hget(redis_keys.shard(shards[living][0]), "epoch").execute()
        assert time.monotonic() - begun_s < 1
        with pytest.raises(AWAY):
            await asked
        assert 1 < time.monotonic() - begun_s < 4
        begun_s = time.monotonic()
        await client.pipeline().hget(redis_keys.shard(shards[living][0]), "epoch").execute()
        assert time.monotonic() - begun_s < 1
    finally:
        frozen.thaw()


async def test_a_cluster_that_is_away_is_an_outage_not_a_defect() -> None:
    client = connect_redis(Settings(redis_url="redis+cluster://127.0.0.1:1,127.0.0.1:2"), "test")
    for asking in (client.hget("key", "field"), client.pipeline(transaction=False).hget("key", "field").execute()):
        with pytest.raises(RedisClusterException):
            await asking
    await client.aclose()
    assert issubclass(RedisClusterException, AWAY)
