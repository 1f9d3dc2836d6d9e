"""The history of prices while somebody watches: the stream and the way back, and `prices` where frames were lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal

import pytest
from prometheus_client import REGISTRY

from engine.messages import Quote
from engine.reconciliation import Price
from engine.runtime.connections import connect_redis
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from tests.builders import HotStateBuilder
from workers import quote_history
from workers.quote_history import QuoteHistory

WAIT_S = 10


@pytest.fixture
async def hot(redis_db: str) -> AsyncIterator[HotStateBuilder]:
    async with connect_redis(Settings(redis_url=redis_db), "test") as connection:
        yield HotStateBuilder(connection)


class Seconds:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def watching(hot: HotStateBuilder, symbol: str, seconds: Seconds | None = None) -> AsyncIterator[QuoteHistory]:
    """A history whose watch has begun: it knows `symbol`, which `prices` has."""
    history = QuoteHistory(seconds or Seconds())
    task = asyncio.create_task(history.watch(hot.redis))
    try:
        async with asyncio.timeout(WAIT_S):
            while history.last(symbol) is None:
                await asyncio.sleep(0.01)
        yield history
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def price(text: str | None, ts_event_ns: int = 0) -> Price | None:
    return None if text is None else Price(Decimal(text), ts_event_ns)


async def until_undone(history: QuoteHistory, symbols: set[str], *expected: tuple[str, str | None, int]) -> None:
    """Undoing what `symbols` were quoted at brings back exactly these prices, in this order."""
    wanted = [(symbol, price(text, at_ns)) for symbol, text, at_ns in expected]
    async with asyncio.timeout(WAIT_S):
        while list(history.backwards(symbols)) != wanted:
            await asyncio.sleep(0.01)


async def test_the_order_of_frames_is_kept_whatever_the_instants(hot: HotStateBuilder) -> None:
    await hot.quotes([Quote("AAPL", "100", 9, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        await hot.quote("one", 1, [Quote("AAPL", "101", 8, "feed", 2)])
        await hot.quote("one", 2, [Quote("MSFT", "430", 7, "feed", 1)])
        await hot.quote("one", 3, [Quote("AAPL", "102", 6, "feed", 3), Quote("NVDA", "9", 5, "feed", 1)])
        undone = [("AAPL", "101", 8), ("MSFT", None, 0), ("AAPL", "100", 9)]
        await until_undone(history, {"AAPL", "MSFT", "NONE"}, *undone)
        assert [history.last(symbol) for symbol in ("AAPL", "MSFT")] == [price("102", 6), price("430", 7)]
        assert history.last("NONE") is None


async def test_after_a_gap_what_prices_says_goes_on_the_stream(hot: HotStateBuilder) -> None:
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1), Quote("IDLE", "7", 1, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        await hot.quote("one", 1, [Quote("AAPL", "101", 2, "feed", 2)])
        await hot.quotes([Quote("AAPL", "102", 3, "feed", 3)])  # its frame is lost
        await hot.quote("one", 3, [])
        await until_undone(history, {"AAPL", "IDLE"}, ("AAPL", "101", 2), ("AAPL", "100", 1))
        assert history.last("AAPL") == price("102", 3)


async def test_a_connection_made_again_brings_what_was_missed(hot: HotStateBuilder) -> None:
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        await hot.quotes([Quote("AAPL", "101", 2, "feed", 2)])
        await hot.redis.client_kill_filter(_type="pubsub")
        await until_undone(history, {"AAPL"}, ("AAPL", "100", 1))
        assert history.last("AAPL") == price("101", 2)


async def test_a_watch_begun_again_goes_on_where_it_was(hot: HotStateBuilder) -> None:
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        pass
    await hot.quotes([Quote("AAPL", "101", 2, "feed", 2)])
    again = asyncio.create_task(history.watch(hot.redis))
    await until_undone(history, {"AAPL"}, ("AAPL", "100", 1))
    again.cancel()
    with suppress(asyncio.CancelledError):
        await again


async def test_what_is_older_than_the_window_can_not_be_undone(hot: HotStateBuilder) -> None:
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1), Quote("MSFT", "50", 1, "feed", 1)])
    seconds = Seconds()
    async with watching(hot, "AAPL", seconds) as history:
        await hot.quote("one", 1, [Quote("AAPL", "101", 2, "feed", 2), Quote("AAPL", "102", 3, "feed", 3)])
        await until_undone(history, {"AAPL"}, ("AAPL", "101", 2), ("AAPL", "100", 1))
        assert history.begins_at_ns == 1
        seconds.now_s += quote_history.WINDOW_S - 1
        await hot.quote("one", 2, [Quote("AAPL", "103", 4, "feed", 4), Quote("MSFT", "51", 4, "feed", 2)])
        await until_undone(history, {"AAPL"}, ("AAPL", "102", 3), ("AAPL", "101", 2), ("AAPL", "100", 1))
        seconds.now_s += 2
        await hot.quote("one", 3, [])
        await until_undone(history, {"AAPL", "MSFT"}, ("MSFT", "50", 1), ("AAPL", "102", 3))
        assert history.last("AAPL") == price("103", 4)
        assert history.begins_at_ns == 3


async def test_a_full_history_forgets_the_oldest_and_counts(
    hot: HotStateBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quote_history, "QUOTES_COUNT_MAX", 2)
    before = REGISTRY.get_sample_value("navstream_quotes_forgotten_total") or 0
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        for n in range(1, 4):
            await hot.quote("one", n, [Quote("AAPL", str(100 + n), n, "feed", n + 1)])
        await until_undone(history, {"AAPL"}, ("AAPL", "102", 2), ("AAPL", "101", 1))
    assert REGISTRY.get_sample_value("navstream_quotes_forgotten_total") == before + 1


async def test_what_can_not_be_read_is_passed_over(hot: HotStateBuilder) -> None:
    await hot.redis.hset(redis_keys.PRICES, "BAD", b"no quote")
    await hot.quotes([Quote("AAPL", "100", 1, "feed", 1)])
    async with watching(hot, "AAPL") as history:
        await hot.redis.spublish(redis_keys.QUOTES_CHANNEL, b"no frame")
        await hot.quote("one", 1, [Quote("AAPL", "101", 2, "feed", 2)])
        await until_undone(history, {"AAPL"}, ("AAPL", "100", 1))
