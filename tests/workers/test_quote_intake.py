"""The evaluator's intake of quotes ends where `prices` does, whatever instants and sequences the quotes carry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from engine.assets import load_catalogue
from engine.messages import Quote, QuoteFrame, quote_frame_encoder
from engine.runtime import telemetry
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from tests.builders import HotStateBuilder
from workers.boundaries import Boundaries
from workers.quote_intake import PUBLISHERS_COUNT_MAX, SEGMENTS_COUNT_MAX, FrameNumbers, QuoteIntake, WaitingQuotes

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
    await hot.redis.spublish(redis_keys.QUOTES_CHANNEL, data)


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


# -- segments ----------------------------------------------------------------------------------------------


def every(ns: int) -> Callable[[int], int]:
    """Boundaries at every multiple."""
    return lambda instant_ns: -(-instant_ns // ns) * ns


def prices(quotes: list[Quote]) -> dict[str, str]:
    return {quote.symbol: quote.price for quote in quotes}


def waiting(*quotes: tuple[str, str, int], boundary_of: Callable[[int], int] | None = None) -> WaitingQuotes:
    kept = WaitingQuotes(boundary_of or every(100))
    for symbol, price, ts_event_ns in quotes:
        kept.add(Quote(symbol, price, ts_event_ns, "feed"))
    return kept


def test_a_quote_of_the_next_segment_leaves_the_last_one_of_this() -> None:
    kept = waiting(("AAPL", "1", 40), ("AAPL", "2", 100), ("MSFT", "7", 60), ("AAPL", "3", 101))
    assert prices(kept.take(100)) == {"AAPL": "2", "MSFT": "7"}
    assert prices(kept.take(200)) == {"AAPL": "3"}
    assert kept.take() == []


def test_several_segments_at_once_give_each_symbols_last() -> None:
    kept = waiting(("AAPL", "1", 40), ("MSFT", "7", 60), ("AAPL", "2", 140), ("AAPL", "3", 240))
    assert prices(kept.take(200)) == {"AAPL": "2", "MSFT": "7"}
    assert prices(kept.take()) == {"AAPL": "3"}


def test_what_is_published_last_counts_also_with_an_instant_of_an_earlier_segment() -> None:
    kept = waiting(("AAPL", "1", 40), ("AAPL", "2", 240), ("MSFT", "7", 240), ("AAPL", "3", 30))
    assert prices(kept.take(100)) == {"AAPL": "3"}
    assert prices(kept.take(300)) == {"MSFT": "7"}


def test_a_late_quote_counts_just_after_what_is_settled() -> None:
    """Also where the boundary before it has not been taken yet."""
    kept = waiting(("AAPL", "1", 90))
    kept.settled_ns = 100
    kept.add(Quote("AAPL", "2", 95, "feed"))
    kept.add(Quote("MSFT", "7", 20, "feed"))
    assert prices(kept.take(100)) == {"AAPL": "1"}
    assert prices(kept.take(200)) == {"AAPL": "2", "MSFT": "7"}


def test_a_boundary_that_came_into_being_later_divides_a_segment() -> None:
    kept = waiting(("AAPL", "1", 50), ("MSFT", "7", 51))
    assert prices(kept.take(50)) == {"AAPL": "1"}
    assert prices(kept.take(100)) == {"MSFT": "7"}


def test_a_bounded_number_of_segments_is_kept_and_the_oldest_are_merged() -> None:
    merged = telemetry.QUOTE_SEGMENTS_MERGED._value.get()
    rising = [("AAPL", str(n), 100 * n) for n in range(1, SEGMENTS_COUNT_MAX + 4)]
    kept = waiting(("MSFT", "7", 100), *rising)
    assert telemetry.QUOTE_SEGMENTS_MERGED._value.get() == merged + 3
    assert prices(kept.take(300)) == {"MSFT": "7"}  # what was merged lost 1 to 3 of AAPL, and nothing else
    assert prices(kept.take(400)) == {"AAPL": "4"}
    assert prices(kept.take()) == {"AAPL": str(SEGMENTS_COUNT_MAX + 3)}


def test_a_quote_older_than_all_segments_joins_the_oldest_when_there_are_too_many() -> None:
    kept = waiting(*(("AAPL", str(n), 100 * n) for n in range(2, SEGMENTS_COUNT_MAX + 2)), ("MSFT", "7", 100))
    kept.add(Quote("MSFT", "8", 90, "feed"))
    assert prices(kept.take(200)) == {"AAPL": "2", "MSFT": "8"}


quotes = st.tuples(st.sampled_from(("AAPL", "MSFT")), st.integers(1, 60))


@given(st.lists(st.one_of(quotes, st.integers(0, 70)), max_size=40), st.integers(1, 12))
def test_at_each_boundary_the_last_published_of_those_up_to_it_is_the_price(
    steps: list[tuple[str, int] | int], distance: int
) -> None:
    """Against a list of all that was published: quotes come in any order of instants, boundaries are passed between."""
    kept, published, applied, passed_ns = WaitingQuotes(every(distance)), [], {}, 0
    kept.boundary_of = lambda instant_ns: every(distance)(max(instant_ns, passed_ns + 1))
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            quote = Quote(step[0], str(number), step[1], "feed")
            published.append(quote)
            kept.add(quote)
            continue
        while (boundary_ns := every(distance)(passed_ns + 1)) <= step:
            applied |= prices(kept.take(boundary_ns))
            assert applied == {quote.symbol: quote.price for quote in published if quote.ts_event_ns <= boundary_ns}
            passed_ns = boundary_ns
    applied |= prices(kept.take())
    assert applied == prices(published)


frames = st.tuples(st.lists(quotes, max_size=4), st.integers(0, 9))


@given(st.lists(frames, max_size=30), st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1))
def test_all_who_listen_see_the_same_prices_at_a_boundary_however_seldom_they_look(
    sent: list[tuple[list[tuple[str, int]], int]], distance: int, looks: list[int]
) -> None:
    """Sources are late and overtake each other; `settled` grows from frame to frame."""
    eager, lazy = Listener(distance), Listener(distance)
    until_look, pauses = 0, iter(looks * len(sent))
    settled_ns = 0
    for number, (stamped, growth) in enumerate(sent):
        settled_ns += growth
        arrived = [Quote(symbol, f"{number}.{at}", ts_ns, "feed") for at, (symbol, ts_ns) in enumerate(stamped)]
        for listener in (eager, lazy):
            listener.hear(arrived, settled_ns)
        eager.look()
        if until_look == 0:
            lazy.look()
            until_look = next(pauses)
        until_look -= 1
    lazy.look()
    assert lazy.seen == eager.seen


class Listener:
    """Takes prices at each boundary as the evaluator and the snapshots worker do."""

    def __init__(self, distance: int) -> None:
        self.boundaries = Boundaries(0, lambda after_ns: every(distance)(after_ns + 1))
        self.waiting = WaitingQuotes(self.boundaries.of)
        self.prices: dict[str, str] = {}
        self.seen: dict[int, dict[str, str]] = {}

    def hear(self, arrived: list[Quote], settled_ns: int) -> None:
        for quote in arrived:
            self.waiting.add(quote)
        self.waiting.settled_ns = settled_ns

    def look(self) -> None:
        boundaries = self.boundaries
        boundaries.observe(10**9, 0.0, self.waiting.settled_ns)
        while True:
            boundary_ns = boundaries.pending_ns
            self.prices |= prices(self.waiting.take(boundary_ns))
            if not boundaries.is_due(boundary_ns):
                return
            self.seen[boundary_ns] = dict(self.prices)
            boundaries.pass_over(boundary_ns)


async def test_the_intake_divides_by_the_boundaries_it_is_given(redis_db: str, hot: HotStateBuilder) -> None:
    intake = QuoteIntake(Settings(redis_url=redis_db), boundary_of=every(100))
    async with listening(intake):
        sent = [Quote("AAPL", "100", 40, "feed", 1), Quote("AAPL", "101", 140, "feed", 2)]
        for number, quote in enumerate(sent, start=1):
            await hot.quote("one", number, [quote])
        await ends_at(intake, sent[1])
    assert intake.take(100) == [sent[0]]
    assert intake.take() == [sent[1]]
