"""The evaluator against real servers: events in, ledger and hot state out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import TypeVar

import asyncpg
import pytest
import redis.asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from engine.marks import Mark, MarkQuality, decode_mark
from engine.messages import (
    CashEvent,
    FillEvent,
    OpenEvent,
    PortfolioEvent,
    Quote,
    QuoteFrame,
    encode_event,
    quote_encoder,
    quote_frame_encoder,
)
from engine.positions import hot_position_decoder
from engine.runtime.clock import WallClock
from engine.runtime.connections import postgres_dsn
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from workers.evaluator import Evaluator

AT = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
MICRO = 1_000_000
T = TypeVar("T")


def opening(name: str, event_id: str | None = None) -> OpenEvent:
    return OpenEvent(
        event_id=event_id or f"open-{name}",
        portfolio_id=name,
        owner="user-1",
        name=name,
        base_currency="USD",
        opened_at=AT,
    )


def deposit(name: str, amount: str, event_id: str) -> CashEvent:
    return CashEvent(
        event_id=event_id, portfolio_id=name, kind="DEPOSIT", amount=amount, currency="USD", effective_at=AT
    )


def fill(
    name: str, side: str, quantity: str, price: str, event_id: str, symbol: str = "AAPL", fee: str = "0"
) -> FillEvent:
    return FillEvent(
        event_id=event_id,
        portfolio_id=name,
        symbol=symbol,
        side=side,  # type: ignore[arg-type]
        quantity=quantity,
        price=price,
        fee=fee,
        currency="USD",
        executed_at=AT,
    )


class System:
    """The servers as a test sees them: events and quotes in, ledger and marks out."""

    def __init__(self, settings: Settings, producer: AIOKafkaProducer, pool: asyncpg.Pool) -> None:
        self.settings = settings
        self.producer = producer
        self.pool = pool
        self.redis = redis.asyncio.Redis.from_url(settings.redis_url, protocol=3)
        self._frames = 0

    async def send(self, *events: PortfolioEvent) -> None:
        for event in events:
            await self.send_bytes(event.portfolio_id, encode_event(event))

    async def send_bytes(self, key: str | None, value: bytes) -> None:
        name = key.encode() if key else None
        await self.producer.send_and_wait(self.settings.topic, value, key=name)

    async def quote(self, symbol: str, price: str, ts_event_ns: int | None = None) -> None:
        now_ns = WallClock().now_ns()
        self._frames += 1
        quote = Quote(symbol, price, now_ns if ts_event_ns is None else ts_event_ns, "test", self._frames)
        frame = QuoteFrame("test", self._frames, now_ns, [quote])
        await self.redis.hset(redis_keys.PRICES, symbol, quote_encoder.encode(quote))
        await self.redis.publish(redis_keys.QUOTES_CHANNEL, quote_frame_encoder.encode(frame))

    async def shard_of(self, name: str) -> int:
        return await self.pool.fetchval("SELECT shard FROM portfolio WHERE id = $1", name)

    async def mark(self, name: str) -> Mark | None:
        shard = await self.shard_of(name)
        if shard is None or (epoch := await self.redis.hget(redis_keys.shard(shard), "epoch")) is None:
            return None
        packed = await self.redis.hget(redis_keys.marks(shard, int(epoch)), name)
        return decode_mark(packed, int(epoch)) if packed else None

    async def mark_when(self, name: str, holds: Callable[[Mark], bool], timeout_s: float = 15) -> Mark:
        async def ready() -> Mark | None:
            mark = await self.mark(name)
            return mark if mark and holds(mark) else None

        return await eventually(ready, timeout_s, lambda: self.mark(name))


async def eventually(
    ready: Callable[[], Awaitable[T | None]], timeout_s: float, last: Callable[[], Awaitable[object]]
) -> T:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while True:
                if (answer := await ready()) is not None:
                    return answer
                await asyncio.sleep(0.02)
    pytest.fail(f"not within {timeout_s} s; last seen: {await last()}")


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Evaluator]:
    stop = asyncio.Event()
    evaluator = Evaluator(settings, WallClock())
    task = asyncio.create_task(evaluator.run(stop))
    try:
        yield evaluator
    finally:
        stop.set()
        await task


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        flush_interval_ms=20,
    )
    producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, enable_idempotence=True, acks="all")
    await producer.start()
    async with asyncpg.create_pool(postgres_dsn(fresh_database), min_size=1, max_size=2) as pool:
        one = System(settings, producer, pool)
        yield one
        await one.redis.aclose()
    await producer.stop()


async def test_golden_vector_1_end_to_end(system: System) -> None:
    async with running(system.settings):
        await system.send(
            opening("p-1"),
            deposit("p-1", "10000", "d"),
            fill("p-1", "BUY", "10", "100", "b1", fee="1"),
            fill("p-1", "BUY", "10", "110", "b2", fee="1"),
            fill("p-1", "SELL", "5", "120", "s1", fee="1"),
        )
        unpriced = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 5)
        assert unpriced.quality is MarkQuality.MISSING
        await system.quote("AAPL", "120")
        mark = await system.mark_when("p-1", lambda mark: mark.quality is MarkQuality.LIVE)
    assert (mark.cash, mark.nav) == (8497 * MICRO, 10297 * MICRO)
    assert (mark.realized, mark.unrealized, mark.fees) == (75 * MICRO, 225 * MICRO, 3 * MICRO)
    shard = await system.shard_of("p-1")
    packed = await system.redis.hget(redis_keys.positions(shard, "p-1"), "AAPL")
    position = hot_position_decoder.decode(packed)
    assert (position.quantity, position.cost, position.realized) == ("15", 1575 * MICRO, 75 * MICRO)


async def test_a_redelivered_event_has_no_second_effect(system: System) -> None:
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "100", "d"), deposit("p-1", "100", "d"))
        await system.send(deposit("p-1", "7", "last"))
        mark = await system.mark_when("p-1", lambda mark: mark.cash in (107 * MICRO, 207 * MICRO))
    assert (mark.cash, mark.ledger_sequence) == (107 * MICRO, 3)


async def test_bad_events_become_dead_letters_and_the_partition_goes_on(system: System) -> None:
    bad = [
        (b"not json", "MALFORMED"),
        (encode_event(deposit("p-1", "-5", "x1")), "NOT_POSITIVE"),
        (encode_event(deposit("p-1", "NaN", "x2")), "NOT_FINITE"),
        (encode_event(fill("p-1", "BUY", "1", "0", "x3")), "NOT_POSITIVE"),
        (encode_event(deposit("p-1", "5", "d")), "EVENT_ID_REUSED"),
        (encode_event(opening("p-1", "again")), "ALREADY_OPEN"),
        (encode_event(fill("p-2", "BUY", "1", "1", "x4")), "WRONG_KEY"),
        (b"{" * 70_000, "TOO_LONG"),
    ]
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "100", "d"))
        for value, _ in bad:
            await system.send_bytes("p-1", value)
        await system.send(deposit("p-1", "1", "last"))
        mark = await system.mark_when("p-1", lambda mark: mark.cash == 101 * MICRO)
    assert mark.ledger_sequence == 3
    letters = await read_all(system, f"{system.settings.topic}.dlq")
    assert sorted((value, code) for value, code in letters) == sorted((value, code.encode()) for value, code in bad)


async def read_all(system: System, topic: str) -> list[tuple[bytes, bytes]]:
    """(value, code header) of every record of a topic."""
    consumer = AIOKafkaConsumer(bootstrap_servers=system.settings.kafka_bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    partitions = [TopicPartition(topic, n) for n in await system.producer.partitions_for(topic)]
    ends = await consumer.end_offsets(partitions)
    consumer.assign(partitions)
    await consumer.seek_to_beginning()
    records = []
    while len(records) < sum(ends.values()):
        for fetched in (await consumer.getmany(timeout_ms=500)).values():
            records += fetched
    await consumer.stop()
    return [(record.value, dict(record.headers)["code"]) for record in records]


async def test_a_tick_moves_only_holders(system: System) -> None:
    async with running(system.settings):
        for name in ("p-1", "p-2"):
            await system.send(opening(name), deposit(name, "1000", f"d-{name}"))
        await system.send(fill("p-1", "BUY", "2", "100", "b1"), fill("p-2", "BUY", "1", "50", "b2", symbol="MSFT"))
        await system.quote("AAPL", "100")
        await system.quote("MSFT", "50")
        live = lambda mark: mark.quality is MarkQuality.LIVE and mark.ledger_sequence == 3  # noqa: E731
        before = await system.mark_when("p-2", live)
        await system.mark_when("p-1", live)
        await system.quote("AAPL", "101.5")
        moved = await system.mark_when("p-1", lambda mark: mark.nav == 1003 * MICRO)
        assert moved.day_pnl == 3 * MICRO
        assert await system.mark("p-2") == before


async def test_hot_state_comes_back_after_redis_lost_everything(system: System) -> None:
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "10", "d"), fill("p-1", "BUY", "2", "1.5", "b"))
        await system.quote("AAPL", "2")
        before = await system.mark_when("p-1", lambda mark: mark.nav == 11 * MICRO)
        await system.redis.flushall()
        after = await system.mark_when("p-1", lambda mark: True)
        shard = await system.shard_of("p-1")
        assert await system.redis.hgetall(redis_keys.positions(shard, "p-1"))
        assert await system.redis.zrange(redis_keys.sectors(shard, "p-1"), 0, -1)
    assert (after.nav, after.day_pnl) == (before.nav, before.day_pnl)


async def test_a_second_evaluator_takes_half_and_a_dead_one_is_replaced(system: System) -> None:
    names = [f"p-{n}" for n in range(16)]
    settings = system.settings.model_copy(update={"lease_duration_ms": 1_000, "lease_renewal_interval_ms": 200})
    async with running(settings) as first:
        await system.send(*(opening(name) for name in names))
        await system.send(*(deposit(name, "1", f"a-{name}") for name in names))
        async with running(settings) as second:
            await until(lambda: len(first.owned) == len(second.owned) == 2)
            await system.send(*(deposit(name, "1", f"b-{name}") for name in names))
            for name in names:
                await system.mark_when(name, lambda mark: mark.cash == 2 * MICRO)
        await until(lambda: len(first.owned) == 4)
        await system.send(*(deposit(name, "1", f"c-{name}") for name in names))
        for name in names:
            await system.mark_when(name, lambda mark: mark.cash == 3 * MICRO)


async def until(holds: Callable[[], bool], timeout_s: float = 15) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.02)


async def test_day_base_and_ratio_survive_a_take_over(system: System) -> None:
    """Golden vector 3 in shape: a gain, then a deposit, then a gain; recovered from the ledger alone."""
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "10000", "d1"), fill("p-1", "BUY", "100", "100", "b"))
        await system.quote("AAPL", "101")
        await system.mark_when("p-1", lambda mark: mark.nav == 10_100 * MICRO)
        await system.send(deposit("p-1", "5000", "d2"))
        await system.mark_when("p-1", lambda mark: mark.nav == 15_100 * MICRO)
        await system.quote("AAPL", "102")
        before = await system.mark_when("p-1", lambda mark: mark.nav == 15_200 * MICRO)
    assert before.day_pnl == 200 * MICRO
    assert before.day_pnl_ratio_e12 == round((Decimal("1.01") * 15_200 / 15_100 - 1) * 10**12)
    async with running(system.settings):
        after = await system.mark_when("p-1", lambda mark: mark.epoch > before.epoch)
    assert (after.nav, after.day_pnl, after.day_pnl_ratio_e12) == (
        before.nav,
        before.day_pnl,
        before.day_pnl_ratio_e12,
    )
