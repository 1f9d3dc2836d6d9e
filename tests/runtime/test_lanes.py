"""Lanes against a real server: what is made leaves at once; no exchange leaves anything for the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
import pytest_asyncio
import redis
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from engine.runtime.connections import connect_redis
from engine.runtime.lanes import Lane
from engine.runtime.settings import Settings
from tests.proxy import Proxy

LARGE = b"x" * 100_000  # more than an event loop keeps back for its next turn
LENGTH: Sequence[Sequence[bytes]] = [[b"*2\r\n$6\r\nSTRLEN\r\n$1\r\na\r\n"]]


@pytest_asyncio.fixture(loop_scope="session")
async def client(redis_db: str) -> AsyncIterator[Redis]:
    client = connect_redis(Settings(redis_url=redis_db, redis_timeout_s=1), "test")
    assert isinstance(client, Redis)
    yield client
    await client.aclose()


def setting(value: bytes) -> list[list[bytes]]:
    return [[b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$%d\r\n" % len(value), value, b"\r\n"]]


async def test_what_is_sent_is_there_before_anybody_waits(client: Redis, redis_db: str) -> None:
    lane = Lane(client.connection_pool)
    assert await lane.send(LENGTH) == [0]  # the first exchange finds a connection
    answers = lane.send(setting(LARGE))
    with redis.Redis.from_url(redis_db) as other:
        # The event loop has no turn meanwhile.
        assert any(other.strlen("a") == len(LARGE) for _ in range(1_000))
    assert await answers == [b"OK"]


async def test_answers_come_in_order_and_an_error_among_them_is_raised_after_all_are_read(client: Redis) -> None:
    lane = Lane(client.connection_pool)
    assert await lane.send([*setting(b"seven__"), *LENGTH]) == [b"OK", 7]
    with pytest.raises(ResponseError, match="wrong kind"):
        await lane.send([[b"*2\r\n$4\r\nLLEN\r\n$1\r\na\r\n"], *LENGTH])
    assert await lane.send(LENGTH) == [7]


async def abandon(lane: Lane, _: Redis) -> None:
    lane.send(setting(LARGE)).close()


async def cancel(lane: Lane, _: Redis) -> None:
    exchange = asyncio.create_task(lane.send([[b"*3\r\n$5\r\nBLPOP\r\n$1\r\nb\r\n$1\r\n9\r\n"]]))
    await asyncio.sleep(0.05)
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange


async def be_too_slow(lane: Lane, _: Redis) -> None:
    with pytest.raises(RedisError):
        await lane.send([[b"*3\r\n$5\r\nBLPOP\r\n$1\r\nb\r\n$1\r\n9\r\n"]])


async def be_closed_by_the_server(_: Lane, client: Redis) -> None:
    await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")  # type: ignore[no-untyped-call]
    await asyncio.sleep(0.05)


async def be_given_back(lane: Lane, _: Redis) -> None:
    await lane.release()


@pytest.mark.parametrize("end", [abandon, cancel, be_too_slow, be_closed_by_the_server, be_given_back])
async def test_the_next_exchange_has_its_own_answers(
    client: Redis, end: Callable[[Lane, Redis], Awaitable[None]]
) -> None:
    lane = Lane(client.connection_pool)
    assert await lane.send(setting(b"four")) == [b"OK"]
    await end(lane, client)
    assert (await lane.send(LENGTH))[0] in (4, len(LARGE))  # what was abandoned may have been executed
    assert await lane.send([*setting(b"fiver"), *LENGTH]) == [b"OK", 5]
    await lane.release()
    assert await client.get("a") == b"fiver"


async def test_a_server_that_was_away_is_found_again(redis_db: str) -> None:
    async with Proxy(redis_db) as proxy:
        client = connect_redis(Settings(redis_url=proxy.url, redis_timeout_s=1), "test")
        assert isinstance(client, Redis)
        lane = Lane(client.connection_pool)
        assert await lane.send(LENGTH) == [0]
        await proxy.go_away()
        for _ in range(2):
            with pytest.raises(RedisError):
                await lane.send(LENGTH)
        await proxy.come_back()
        assert await lane.send(LENGTH) == [0]
        proxy.freeze()
        with pytest.raises(RedisError):
            await lane.send(setting(LARGE))
        proxy.thaw()
        assert await lane.send([*setting(b"two"), *LENGTH]) == [b"OK", 3]
        await client.aclose()
