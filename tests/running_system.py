"""The whole system as a test sees it: events and quotes in, ledger and hot state out, on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from engine.marks import Mark, decode_mark
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
from engine.runtime.clock import Clock, WallClock
from engine.runtime.connections import connect_redis, postgres_dsn
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from workers.evaluator import Evaluator
from workers.quotes import GRACE_NS

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
        # Its commands can be cancelled for good, which tasks of the tests rely on.
        self.redis = connect_redis(settings, "test")
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
        frame = QuoteFrame("test", self._frames, now_ns - GRACE_NS, [quote])
        await self.redis.hset(redis_keys.PRICES, symbol, quote_encoder.encode(quote))
        await self.redis.spublish(redis_keys.QUOTES_CHANNEL, quote_frame_encoder.encode(frame))

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


@dataclass(frozen=True)
class EarlierClock:
    """A clock that is behind: what is booked by it was booked then."""

    ago: timedelta

    def now_ns(self) -> int:
        return WallClock().now_ns() - self.ago // timedelta(microseconds=1) * 1_000


@asynccontextmanager
async def running(settings: Settings, clock: Clock | None = None) -> AsyncIterator[Evaluator]:
    stop = asyncio.Event()
    evaluator = Evaluator(settings, clock or WallClock())
    task = asyncio.create_task(evaluator.run(stop))
    try:
        yield evaluator
    finally:
        stop.set()
        await task


async def until(holds: Callable[[], bool], timeout_s: float = 15) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.02)


async def until_answered(asks: Callable[[], Awaitable[object]], timeout_s: float = 15) -> None:
    """Until what is asked of a server is true."""
    async with asyncio.timeout(timeout_s):
        while not await asks():
            await asyncio.sleep(0.02)


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


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[System]:
    """A System on the servers that `settings` name; nothing of navstream runs yet."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap, enable_idempotence=True, acks="all")
    await producer.start()
    try:
        async with asyncpg.create_pool(postgres_dsn(settings.postgres_url), min_size=1, max_size=2) as pool:
            system = System(settings, producer, pool)
            yield system
            await system.redis.aclose()
    finally:
        await producer.stop()
