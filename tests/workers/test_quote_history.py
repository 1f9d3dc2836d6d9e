"""The history of prices while somebody watches: the stream, and `prices` where frames were lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal

import pytest

from engine.messages import Quote
from engine.runtime.connections import connect_redis
from engine.runtime.settings import Settings
from tests.builders import HotStateBuilder
from workers import quote_history
from workers.quote_history import HistoryFull, QuoteHistory

WAIT_S = 10


@pytest.fixture
async def hot(redis_db: str) -> AsyncIterator[HotStateBuilder]:
    async with connect_redis(Settings(redis_url=redis_db), "test") as connection:
        yield HotStateBuilder(connection)


@asynccontextmanager
async def watching(hot: HotStateBuilder, symbol: str) -> AsyncIterator[QuoteHistory]:
    """A history whose watch has begun: it knows `symbol`, which `prices` has."""
    history = QuoteHistory()
    task = asyncio.create_task(history.watch(hot.redis))
    try:
        async with asyncio.timeout(WAIT_S):
            while history.first(symbol) is None:
                await asyncio.sleep(0.01)
        yield history
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until_changes(history: QuoteHistory, *expected: tuple[str, str]) -> None:
    """The changes of all symbols named, in their order, are exactly these."""
    wanted = [(symbol, Decimal(price)) for symbol, price in expected]
    async with asyncio.timeout(WAIT_S):
        while list(history.changes({symbol for symbol, _ in expected})) != wanted:
            await asyncio.sleep(0.01)


async def test_the_order_of_frames_is_kept_whatever_the_instants(hot: HotStateBuilder) -> None:
    await hot.quotes([Quote("AAPL", "100", 9, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        await hot.quote("one", 1, [Quote("AAPL", "101", 8, "feed", 2)])
        await hot.quote("one", 2, [Quote("MSFT", "430", 7, "feed", 1)])
        await hot.quote("one", 3, [Quote("AAPL", "102", 6, "feed", 3)])
        await until_changes(history, ("AAPL", "101"), ("MSFT", "430"), ("AAPL", "102"))
        assert history.first("AAPL") == 100
        assert history.first("MSFT") is None


async def test_after_a_gap_what_prices_says_goes_on_the_stream(hot: HotStateBuilder) -> None:
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1), Quote("IDLE", "7", 1, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        await hot.quote("one", 1, [Quote("AAPL", "101", 2, "feed", 2)])
        await hot.quotes([Quote("AAPL", "102", 3, "feed", 3)])  # its frame is lost
        await hot.quote("one", 3, [])
        await until_changes(history, ("AAPL", "101"), ("AAPL", "102"))
        assert list(history.changes(["IDLE"])) == []
        assert history.first("AAPL") == 100


async def test_a_connection_made_again_brings_what_was_missed(hot: HotStateBuilder) -> None:
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        await hot.quotes([Quote("AAPL", "101", 2, "feed", 2)])
        await hot.redis.client_kill_filter(_type="pubsub")
        await until_changes(history, ("AAPL", "101"))
        assert history.first("AAPL") == 100


async def test_a_full_history_fails_rather_than_forgets(hot: HotStateBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quote_history, "QUOTES_COUNT_MAX", 2)
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1)])
    with pytest.raises(HistoryFull):
        async with watching(hot, "AAPL"), asyncio.timeout(WAIT_S):
            for n in range(1, 4):
                await hot.quote("one", n, [Quote("AAPL", str(100 + n), n, "feed", n + 1)])
            await asyncio.sleep(0.3)
