"""Dependencies that are away at start, go away later, or freeze: clear answers meanwhile, recovery without restart."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from engine.messages import Quote
from engine.positions import HotPosition
from engine.runtime.connections import connect_postgres, connect_redis
from tests.builders import MICRO, HotStateBuilder, LedgerBuilder, MarkRow, frame, held
from tests.gateway import WAIT_S, Gateway, Stream, gateway_of, make_settings, running
from tests.proxy import Proxy

NAV = "subscription($id: String!) { navUpdates(portfolioId: $id, maxRateHz: 20) { kind nav } }"
VALUATION = "query($id: String!) { portfolio(portfolioId: $id) { valuation { nav } } }"
SHARD = 7


@asynccontextmanager
async def behind(redis: Proxy, postgres: Proxy, valkey_url: str, **changes: Any) -> AsyncIterator[Gateway]:
    """A gateway behind proxies, whose builders go straight to the servers."""
    settings = make_settings(redis.url, postgres.url, **changes)
    async with gateway_of(settings) as gateway:
        direct = connect_redis(settings.model_copy(update={"redis_url": valkey_url}), "test")
        gateway.redis = HotStateBuilder(direct)
        try:
            yield gateway
        finally:
            await direct.aclose()


async def booked(gateway: Gateway) -> str:
    name = f"p-{uuid.uuid4().hex[:8]}"
    await gateway.ledger.portfolio(name, "ann", SHARD)
    await gateway.redis.point(SHARD, 1)
    await gateway.redis.marks(SHARD, 1, {name: MarkRow(nav=1 * MICRO)})
    return name


async def eventually(gateway: Gateway, name: str) -> Any:
    async with asyncio.timeout(WAIT_S * 2):
        while "errors" in (answer := (await gateway.post(VALUATION, {"id": name})).json()):
            assert answer["errors"][0]["extensions"]["code"] == "UNAVAILABLE"
            await asyncio.sleep(0.05)
    return answer["data"]["portfolio"]["valuation"]["nav"]


STREAMS = {
    "navUpdates": "subscription($id: String!) { navUpdates(portfolioId: $id) { kind nav } }",
    "pnlUpdates": "subscription($id: String!) { pnlUpdates(portfolioId: $id) { kind dayPnl } }",
    "positionUpdates": "subscription($id: String!) { positionUpdates(portfolioId: $id) { kind positions { price } } }",
    "quotes": 'subscription { quotes(symbols: ["AAPL"]) { kind quotes { price } } }',
}


async def held_and_quoted(gateway: Gateway) -> str:
    name = await booked(gateway)
    await gateway.redis.positions(SHARD, name, {"AAPL": held("1", 10)})
    await gateway.redis.quotes([Quote("AAPL", "11", time.time_ns(), "SIM", 1)])
    return name


async def beats(stream: Stream) -> Any:
    """The first message that comes right after a heartbeat that was due, or before."""
    update = await stream.next()
    while update["kind"] != "HEARTBEAT":
        update = await stream.next()
    return update


@pytest.mark.parametrize("stream", STREAMS)
async def test_a_lost_feed_silences_heartbeats_until_the_value_is_known_again(
    valkey_url: str, database: str, stream: str
) -> None:
    async with (
        Proxy(valkey_url) as redis,
        Proxy(database) as postgres,
        behind(redis, postgres, valkey_url, heartbeat_interval_s=1) as gateway,
    ):
        name = await held_and_quoted(gateway)
        async with gateway.socket() as socket:
            messages = await socket.subscribe(STREAMS[stream], {"id": name} if stream != "quotes" else None)
            shown = await messages.next()
            assert (await beats(messages))["kind"] == "HEARTBEAT"
            await redis.go_away()
            assert await messages.silent(2.5)
            await redis.come_back()
            # Nothing has changed meanwhile, and that is said at once.
            back = await messages.next(wait_s=10)
            assert back["kind"] == "UPDATE"
            if stream in ("navUpdates", "pnlUpdates"):
                assert {**back, "kind": "SNAPSHOT"} == shown
            assert (await messages.next())["kind"] == "HEARTBEAT"


@pytest.mark.parametrize("stream", STREAMS)
async def test_no_heartbeat_vouches_for_a_dead_worker(valkey_url: str, database: str, stream: str) -> None:
    async with (
        Proxy(valkey_url) as redis,
        Proxy(database) as postgres,
        behind(redis, postgres, valkey_url, heartbeat_interval_s=1, feed_silence_max_ms=600) as gateway,
    ):
        name = await held_and_quoted(gateway)

        async def speak() -> None:
            sequence = 1
            while True:
                await gateway.redis.publish(SHARD, frame(SHARD, 1, sequence, previous=0))
                await gateway.redis.quote("feed", sequence, [])
                sequence += 1
                await asyncio.sleep(0.1)

        async with gateway.socket() as socket:
            speaking = asyncio.create_task(speak())
            messages = await socket.subscribe(STREAMS[stream], {"id": name} if stream != "quotes" else None)
            assert (await beats(messages))["kind"] == "HEARTBEAT"
            speaking.cancel()
            # Redis answers all the time, and what it has is read again and again.
            assert await messages.silent(3)
            speaking = asyncio.create_task(speak())
            assert (await messages.next())["kind"] == "UPDATE"
            assert (await messages.next())["kind"] == "HEARTBEAT"
            speaking.cancel()


async def test_an_outage_is_two_lines_in_the_log(valkey_url: str, database: str) -> None:
    async with (
        Proxy(valkey_url) as redis,
        Proxy(database) as postgres,
        behind(redis, postgres, valkey_url, feed_silence_max_ms=300) as gateway,
    ):
        name = await booked(gateway)
        async with gateway.socket() as socket:
            stream = await socket.subscribe(NAV, {"id": name})
            await stream.next()
            with capture_logs() as logs:
                # Frozen, then refused, then there but with nobody speaking: one outage with three faces.
                redis.freeze()
                await asyncio.sleep(1)
                await redis.go_away()
                redis.thaw()
                await asyncio.sleep(1)
                await redis.come_back()
                await asyncio.sleep(3)

                def lines() -> list[str]:
                    return [line["event"] for line in logs if line.get("dependency") == "live_feed"]

                async with asyncio.timeout(WAIT_S):
                    while "dependency_back" not in lines():
                        await gateway.redis.publish(SHARD, frame(SHARD, 1, 9))
                        await asyncio.sleep(0.1)
        assert lines() == ["dependency_away", "dependency_back"]


async def test_positions_that_could_not_be_read_at_first_are_shown_once_they_can(
    valkey_url: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Proxy(valkey_url) as redis, Proxy(database) as postgres, behind(redis, postgres, valkey_url) as gateway:
        name = await held_and_quoted(gateway)
        hot_state = gateway.application.services.hot_state
        read, failures = hot_state.positions, [TimeoutError(), TimeoutError()]

        async def slow(shard: int, portfolio_id: str) -> dict[str, HotPosition]:
            if failures:
                raise failures.pop()
            return await read(shard, portfolio_id)

        monkeypatch.setattr(hot_state, "positions", slow)
        async with gateway.socket() as socket:
            stream = await socket.subscribe(STREAMS["positionUpdates"], {"id": name})
            assert await stream.next() == {"kind": "SNAPSHOT", "positions": [{"price": "11"}]}


async def test_a_restarted_redis_is_used_again_and_streams_catch_up(valkey_url: str, database: str) -> None:
    async with (
        Proxy(valkey_url) as redis,
        Proxy(database) as postgres,
        behind(redis, postgres, valkey_url) as gateway,
    ):
        name = await booked(gateway)
        async with gateway.socket() as socket:
            stream = await socket.subscribe(NAV, {"id": name})
            assert await stream.next() == {"kind": "SNAPSHOT", "nav": "1"}
            await redis.go_away()
            assert await gateway.codes(VALUATION, {"id": name}) == ["UNAVAILABLE"]
            # What was flushed meanwhile was published to nobody.
            await gateway.redis.flush(SHARD, 1, 2, {name: MarkRow(nav=2 * MICRO, sequence=2)})
            await redis.come_back()
            assert await stream.next(wait_s=10) == {"kind": "UPDATE", "nav": "2"}
            assert await eventually(gateway, name) == "2"
            await gateway.listening(SHARD)
            await gateway.redis.flush(SHARD, 1, 3, {name: MarkRow(nav=3 * MICRO, sequence=3)})
            assert await stream.next() == {"kind": "UPDATE", "nav": "3"}


async def test_a_subscription_begun_while_redis_is_away_starts_when_it_is_back(valkey_url: str, database: str) -> None:
    async with (
        Proxy(valkey_url) as redis,
        Proxy(database) as postgres,
        behind(redis, postgres, valkey_url) as gateway,
    ):
        name = await booked(gateway)
        await redis.go_away()
        async with gateway.socket() as socket:
            stream = await socket.subscribe(NAV, {"id": name})
            assert await stream.silent(0.3)
            await redis.come_back()
            assert await stream.next(wait_s=10) == {"kind": "SNAPSHOT", "nav": "1"}


async def test_a_frozen_redis_is_noticed_by_its_silence(valkey_url: str, database: str) -> None:
    async with (
        Proxy(valkey_url) as redis,
        Proxy(database) as postgres,
        behind(redis, postgres, valkey_url, feed_silence_max_ms=500) as gateway,
    ):
        name = await booked(gateway)
        async with gateway.socket() as socket:
            stream = await socket.subscribe(NAV, {"id": name})
            await stream.next()
            redis.freeze()
            begun = asyncio.get_running_loop().time()
            assert await gateway.codes(VALUATION, {"id": name}) == ["UNAVAILABLE"]
            assert asyncio.get_running_loop().time() - begun < 2.5
            await gateway.redis.flush(SHARD, 1, 2, {name: MarkRow(nav=2 * MICRO, sequence=2)})
            await asyncio.sleep(1)
            await redis.go_away()  # the frozen connections never wake up
            redis.thaw()
            await redis.come_back()
            assert await stream.next(wait_s=10) == {"kind": "UPDATE", "nav": "2"}


async def test_a_silent_shard_is_read_again_while_others_speak(valkey_url: str, database: str) -> None:
    async with (
        Proxy(valkey_url) as redis,
        Proxy(database) as postgres,
        behind(redis, postgres, valkey_url, feed_silence_max_ms=300) as gateway,
    ):
        name = await booked(gateway)
        other = f"{name}-other"
        await gateway.ledger.portfolio(other, "ann", SHARD + 1)
        async with gateway.socket() as socket:
            stream = await socket.subscribe(NAV, {"id": name})
            await stream.next()
            await socket.subscribe(NAV, {"id": other})
            await gateway.listening(SHARD, SHARD + 1)
            await gateway.redis.marks(SHARD, 1, {name: MarkRow(nav=9 * MICRO, sequence=5)})
            for sequence in range(1, 12):
                await gateway.redis.publish(SHARD + 1, frame(SHARD + 1, 1, sequence))
                await asyncio.sleep(0.05)
            assert await stream.next() == {"kind": "UPDATE", "nav": "9"}


async def test_a_restarted_postgres_is_used_again(valkey_url: str, database: str) -> None:
    async with (
        Proxy(valkey_url) as redis,
        Proxy(database) as postgres,
        behind(redis, postgres, valkey_url) as gateway,
    ):
        name = await booked(gateway)
        ledger = "query($id: String!) { portfolio(portfolioId: $id) { ledger(first: 1) { edges { cursor } } } }"
        await gateway.ask(ledger, {"id": name})
        await postgres.go_away()
        assert await gateway.codes(ledger, {"id": name}) == ["UNAVAILABLE"]
        await postgres.come_back()
        async with asyncio.timeout(WAIT_S):
            while "errors" in (await gateway.post(ledger, {"id": name})).json():
                await asyncio.sleep(0.05)


async def test_starts_with_everything_away_and_recovers(valkey_url: str, database: str) -> None:
    async with Proxy(valkey_url) as redis, Proxy(database) as postgres:
        settings = make_settings(redis.url, postgres.url)
        await redis.go_away()
        await postgres.go_away()
        pool = await connect_postgres(settings.model_copy(update={"postgres_url": database}), "test")
        direct = connect_redis(settings.model_copy(update={"redis_url": valkey_url}), "test")
        async with running(settings) as (application, url):
            gateway = Gateway(settings, application, url, HotStateBuilder(direct), LedgerBuilder(pool))
            name = await booked(gateway)
            async with httpx.AsyncClient(base_url=url) as client:
                assert (await client.get("/healthz")).status_code == 200
                ready = await client.get("/readyz")
                assert ready.status_code == 503
                assert set(ready.json()["missing"]) == {"redis", "postgres", "evaluators", "kafka"}
            assert await gateway.codes(VALUATION, {"id": name}) == ["UNAVAILABLE"]
            await redis.come_back()
            await postgres.come_back()
            assert await eventually(gateway, name) == "1"
            await gateway.ledger.leases(60)
            async with httpx.AsyncClient(base_url=url) as client:
                assert set((await client.get("/readyz")).json()["missing"]) == {"kafka"}
        await direct.aclose()
        await pool.close()
