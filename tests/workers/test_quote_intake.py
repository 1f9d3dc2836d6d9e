"""The evaluator's intake of quotes ends where `prices` does, whatever instants and sequences the quotes carry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from engine.assets import load_catalogue
from engine.messages import Quote, QuoteFrame, quote_frame_encoder
from engine.runtime import telemetry
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from tests.builders import HotStateBuilder
from workers.quote_intake import PUBLISHERS_COUNT_MAX, FrameNumbers, QuoteIntake

WAIT_S = 10


@pytest.fixture
async def hot(redis_db: str) -> AsyncIterator[HotStateBuilder]:
    async with Redis.from_url(redis_db, protocol=3, socket_timeout=5) as connection:
        yield HotStateBuilder(connection)


@asynccontextmanager
async def listening(intake: QuoteIntake) -> AsyncIterator[None]:
    """The intake runs inside and has read `prices`."""
    stop = asyncio.Event()
    task = asyncio.create_task(intake.run(stop))
    try:
        async with asyncio.timeout(WAIT_S):
            await intake.ready.wait()
        yield
    finally:
        stop.set()
        async with asyncio.timeout(WAIT_S):
            await task


async def ends_at(intake: QuoteIntake, quote: Quote) -> None:
    async with asyncio.timeout(WAIT_S):
        while intake.last(quote.symbol) != quote:
            await asyncio.sleep(0.01)


async def publish(hot: HotStateBuilder, sequence: int, *quotes: Quote) -> None:
    """A frame alone, as one that was under way while `prices` went on."""
    data = quote_frame_encoder.encode(QuoteFrame("one", sequence, 1, list(quotes)))
    await hot.redis.publish(redis_keys.QUOTES_CHANNEL, data)


async def test_what_was_published_last_is_right_also_with_an_older_instant(redis_db: str, hot: HotStateBuilder) -> None:
    """The filter orders a source by sequence, so an accepted quote may have an older instant than the last."""
    earlier, later = Quote("AAPL", "100", 2_000, "feed", 1), Quote("AAPL", "101", 1_000, "feed", 2)
    intake = QuoteIntake(Settings(redis_url=redis_db))
    async with listening(intake):
        await hot.quote("one", 1, [earlier])
        await ends_at(intake, earlier)
        assert intake.take() == [earlier]
        await hot.quote("one", 2, [later])
        await ends_at(intake, later)
    assert intake.take() == [later]


async def test_a_repeated_quote_does_not_wait_again(redis_db: str, hot: HotStateBuilder) -> None:
    quote, other = Quote("AAPL", "100", 2_000, "feed", 1), Quote("MSFT", "430", 2_000, "feed", 1)
    intake = QuoteIntake(Settings(redis_url=redis_db))
    async with listening(intake):
        await hot.quote("one", 1, [quote])
        await ends_at(intake, quote)
        assert intake.take() == [quote]
        await hot.quote("one", 2, [quote, other])
        await ends_at(intake, other)
    assert intake.take() == [other]


async def test_after_a_gap_prices_is_right_not_the_frame_that_showed_it(redis_db: str, hot: HotStateBuilder) -> None:
    """`prices` is written before a frame is published: it has that frame's quotes, or newer ones."""
    first, lost = Quote("AAPL", "100", 3_000, "feed", 1), Quote("MSFT", "430", 1_000, "feed", 2)
    overtaken, newest = Quote("AAPL", "101", 5_000, "feed", 3), Quote("AAPL", "102", 2_000, "feed", 4)
    intake, gaps = QuoteIntake(Settings(redis_url=redis_db)), telemetry.QUOTE_GAPS._value.get()
    async with listening(intake):
        await hot.quote("one", 1, [first, Quote("MSFT", "431", 2_000, "feed", 1)])
        await ends_at(intake, first)
        await hot.quotes([lost, newest])
        await publish(hot, 3, overtaken)
        await ends_at(intake, lost)
        assert intake.last("AAPL") == newest
    assert telemetry.QUOTE_GAPS._value.get() == gaps + 1
    assert sorted(quote.price for quote in intake.take()) == ["102", "430"]


async def test_a_flood_of_unheard_of_symbols_leaves_room_for_the_catalogue(redis_db: str, hot: HotStateBuilder) -> None:
    """At most `symbols_count_max` symbols that the catalogue does not list, and all that it lists."""
    await hot.quotes([Quote(f"JUNK{n}", "1", 1, "feed", 1) for n in range(20)])
    intake, catalogue = QuoteIntake(Settings(redis_url=redis_db, symbols_count_max=3)), load_catalogue()
    async with listening(intake):
        listed = [Quote(symbol, "100", 1, "feed", 1) for symbol in catalogue]
        await hot.quote("one", 1, [Quote("JUNK-LATE", "1", 1, "feed", 1), *listed])
        await ends_at(intake, listed[-1])
    taken = {quote.symbol for quote in intake.take()}
    assert catalogue.keys() <= taken
    assert len(taken) == 3 + len(catalogue)


def test_frames_are_missed_when_a_number_is_and_with_each_new_publisher() -> None:
    numbers = FrameNumbers()
    frames = [("a", 5), ("a", 6), ("a", 8), ("a", 8), ("a", 9), ("b", 1), ("b", 2)]
    gaps = [numbers.is_gap(QuoteFrame(publisher, sequence, 1, [])) for publisher, sequence in frames]
    assert gaps == [False, False, True, False, False, True, False]


def test_a_bounded_number_of_publishers_is_remembered() -> None:
    numbers = FrameNumbers()
    for n in range(3 * PUBLISHERS_COUNT_MAX):
        numbers.is_gap(QuoteFrame(f"p{n}", 1, 1, []))
    assert len(numbers._last) == PUBLISHERS_COUNT_MAX
