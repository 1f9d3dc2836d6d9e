from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from structlog.testing import capture_logs

from engine.runtime.connections import (
    AWAY,
    Backoff,
    connect_postgres,
    connect_redis,
    make_producer,
    postgres_dsn,
    stopped_within,
    wait_until,
)
from engine.runtime.settings import Settings


async def test_redis_knows_its_client_by_name(redis_db: str) -> None:
    async with connect_redis(Settings(redis_url=redis_db), "quotes") as client:
        assert await client.client_getname() in ("navstream-quotes", b"navstream-quotes")
        await client.set("key", b"value")
        assert await client.get("key") == b"value"


async def test_a_frozen_redis_is_given_up_in_time() -> None:
    server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = connect_redis(Settings(redis_url=f"redis://127.0.0.1:{port}/0", redis_timeout_s=1), "test")
    started_s = time.monotonic()
    with pytest.raises(RedisError):
        await client.get("key")
    assert time.monotonic() - started_s < 4
    await client.aclose()
    server.close()


@pytest.mark.parametrize("piped", [False, True])
async def test_a_cancelled_command_is_cancelled_wherever_it_stands(redis_db: str, piped: bool) -> None:
    """Every turn of the loop at which a cancellation can come; the client stays usable."""
    client = connect_redis(Settings(redis_url=redis_db), "test")
    await client.set("key", b"value")

    async def work() -> None:
        if piped:
            await client.pipeline(transaction=False).get("other").get("other").execute()
        else:
            await client.get("other")

    cancelled_count = 0
    for turns_count in range(1, 8):
        task = asyncio.create_task(work())
        for _ in range(turns_count):
            await asyncio.sleep(0)
        if task.done():
            continue
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled_count += 1
        assert await client.get("key") == b"value"
    assert cancelled_count >= 3
    await client.aclose()


async def test_a_timeout_around_a_command_is_still_a_timeout(redis_db: str) -> None:
    async with connect_redis(Settings(redis_url=redis_db), "test") as client:
        await client.get("key")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                while True:
                    await client.get("key")
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_what_comes_while_the_loop_is_busy_is_read_at_once(redis_db: str) -> None:
    async with connect_redis(Settings(redis_url=redis_db), "test") as client:
        assert isinstance(client, Redis)
        connection = await client.connection_pool.get_connection()
        # asyncio stops reading at twice this; nobody else says it.
        assert connection._reader._limit >= 16 * 2**20
        await client.connection_pool.release(connection)


async def test_postgres_knows_its_client_and_ends_long_work(postgres_url: str) -> None:
    settings = Settings(postgres_url=postgres_url, postgres_timeout_s=1, postgres_pool_size=2)
    pool = await connect_postgres(settings, "evaluator")
    async with asyncio.timeout(20):
        assert await pool.fetchval("SHOW application_name") == "navstream-evaluator"
        assert await pool.fetchval("SHOW statement_timeout") == "1s"
        with pytest.raises((TimeoutError, asyncpg.QueryCanceledError)):
            await pool.execute("SELECT pg_sleep(5)")
        assert await pool.fetchval("SELECT 1") == 1
        await pool.close()
    assert pool.get_max_size() == 2


def test_a_url_with_a_driver_is_understood_and_another_scheme_is_not() -> None:
    for url in ("postgresql://u@h/d", "postgres://u@h/d", "postgresql+asyncpg://u@h/d"):
        assert postgres_dsn(url) == "postgresql://u@h/d"
    with pytest.raises(ValueError, match="begins with postgresql://"):
        postgres_dsn("mysql://h/d")


async def test_a_producer_reaches_kafka(kafka_bootstrap: str, topic: str) -> None:
    async with make_producer(Settings(kafka_bootstrap=kafka_bootstrap), "test") as producer:
        first = await producer.send_and_wait(topic, b"a", key=b"k")
        second = await producer.send_and_wait(topic, b"b", key=b"k")
    assert (second.partition, second.offset) == (first.partition, first.offset + 1)


def test_a_backoff_doubles_up_to_its_longest_with_jitter() -> None:
    backoff = Backoff(first_ms=100, longest_ms=400)
    for _ in range(2):
        for bound_s in (0.1, 0.2, 0.4, 0.4):
            assert bound_s / 2 <= backoff.next_s() <= bound_s
        backoff.reset()


async def test_waiting_ends_when_told_to_stop() -> None:
    stop = asyncio.Event()
    assert not await stopped_within(stop, 0.01)
    assert not await stopped_within(stop, 0)
    asyncio.get_running_loop().call_later(0.05, stop.set)
    assert await stopped_within(stop, 30)


async def test_a_dependency_that_comes_late_costs_one_line_each_way() -> None:
    attempts = 0

    async def check() -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 4:
            raise RedisConnectionError("refused")

    with capture_logs() as logs:
        assert await wait_until("redis", check, asyncio.Event())
    assert [(line["event"], line["dependency"]) for line in logs] == [
        ("dependency_away", "redis"),
        ("dependency_back", "redis"),
    ]


async def test_a_wait_for_what_never_comes_ends_with_stop() -> None:
    async def check() -> None:
        raise OSError("no route")

    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, stop.set)
    assert not await wait_until("postgres", check, stop)


async def test_a_defect_is_not_retried() -> None:
    async def check() -> None:
        raise KeyError("a defect")

    assert not issubclass(KeyError, AWAY)
    with pytest.raises(KeyError):
        await wait_until("redis", check, asyncio.Event())
