from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from urllib.parse import urlsplit

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from structlog.testing import capture_logs

from engine.instants import to_ns
from engine.messages import Quote, QuoteFrame, quote_decoder, quote_encoder, quote_frame_decoder
from engine.quotes import RawQuote
from engine.runtime.clock import WallClock
from engine.runtime.embedded import open_directory, start_valkey
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.redis_keys import PRICES, QUOTES_CHANNEL
from workers.catalogue import load_assets
from workers.feeds import Batch
from workers.quotes import FRAME_QUOTES_COUNT_MAX, GRACE_NS, run_quotes

WAIT_S = 10


class HandFeed:
    """A feed that says what the test tells it to; None ends it."""

    name = "hand"

    def __init__(self) -> None:
        self.queue: asyncio.Queue[list[RawQuote] | None] = asyncio.Queue()
        self.resumed: Mapping[str, Quote] = {}
        self.closed = False
        self.settled: int | None = None

    def resume(self, quotes: Mapping[str, Quote]) -> None:
        self.resumed = quotes

    def settled_ns(self) -> int | None:
        return self.settled

    async def batches(self) -> AsyncGenerator[Batch, None]:
        try:
            while (batch := await self.queue.get()) is not None:
                yield batch
        finally:
            self.closed = True

    def say(self, *quotes: RawQuote) -> None:
        self.queue.put_nowait(list(quotes))


def raw(symbol: str, price: str, sequence: int) -> RawQuote:
    return RawQuote(symbol, price, time.time_ns(), "hand", sequence)


@asynccontextmanager
async def working(feed: HandFeed, redis_url: str, **settings: object) -> AsyncIterator[None]:
    """The worker runs inside; it must end by itself when told to, and with it the feed."""
    stop = asyncio.Event()
    made = Settings.model_validate({"redis_url": redis_url, **settings})
    task = asyncio.create_task(run_quotes(made, feed, WallClock(), stop))
    try:
        yield
        assert not task.done()
    finally:
        stop.set()
        async with asyncio.timeout(WAIT_S):
            await task
    assert feed.closed or not feed.queue.empty()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            answer = condition()
            if await answer if hasattr(answer, "__await__") else answer:  # type: ignore[misc]
                return
            await asyncio.sleep(0.01)


@pytest.fixture
async def client(redis_db: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_db, protocol=3, socket_timeout=5) as connection:
        yield connection


async def prices(client: Redis) -> dict[str, str]:
    stored = await client.hgetall(PRICES)
    return {symbol.decode(): quote_decoder.decode(value).price for symbol, value in stored.items()}


@asynccontextmanager
async def listening(client: Redis) -> AsyncIterator[list[QuoteFrame]]:
    """The frames that were published meanwhile."""
    frames: list[QuoteFrame] = []
    async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.ssubscribe(QUOTES_CHANNEL)

        async def listen() -> None:
            while True:
                message = await pubsub.get_message(timeout=1)
                if message is not None:
                    frames.append(quote_frame_decoder.decode(message["data"]))

        task = asyncio.create_task(listen())
        await asyncio.sleep(0.05)
        yield frames
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def counted(verdict: str) -> float:
    labels = {"verdict": verdict, "source": "hand"}
    return REGISTRY.get_sample_value("navstream_quotes_total", labels) or 0.0


async def test_accepted_quotes_reach_the_hash_and_the_channel_the_others_do_not(redis_db: str, client: Redis) -> None:
    before = {verdict: counted(verdict) for verdict in ("ACCEPTED", "MALFORMED", "QUARANTINED", "OUT_OF_ORDER")}
    feed = HandFeed()
    async with listening(client) as frames, working(feed, redis_db):
        feed.say(raw("AAPL", "189.230", 6), raw("AAPL", "NaN", 7), raw("AAPL", "189e9", 7), raw("AAPL", "190", 5))
        feed.say(raw("MSFT", "430", 1))
        await eventually(lambda: len([q for frame in frames for q in frame.quotes]) == 2)
        stored = quote_decoder.decode(await client.hget(PRICES, "AAPL"))
    assert (stored.price, stored.source, stored.sequence) == ("189.23", "hand", 6)
    assert await prices(client) == {"AAPL": "189.23", "MSFT": "430"}
    assert {v: counted(v) - was for v, was in before.items()} == {
        "ACCEPTED": 2,
        "MALFORMED": 1,
        "QUARANTINED": 1,
        "OUT_OF_ORDER": 1,
    }


async def test_a_window_s_quotes_of_a_symbol_become_one(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    async with listening(client) as frames, working(feed, redis_db, quotes_publish_interval_ms=300):
        await eventually(lambda: frames)
        feed.say(raw("MSFT", "430", 1), *(raw("AAPL", str(100 + n), n) for n in range(10)))
        await eventually(lambda: any(frame.quotes for frame in frames))
    quotes = [quote for frame in frames for quote in frame.quotes]
    assert sorted((quote.symbol, quote.price) for quote in quotes) == [("AAPL", "109"), ("MSFT", "430")]


async def test_frames_are_numbered_without_gaps_by_one_publisher(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    async with listening(client) as frames, working(feed, redis_db):
        for n in range(20):
            feed.say(raw("AAPL", str(100 + n), n))
            await asyncio.sleep(0.02)
    assert len(frames) > 5
    assert [frame.sequence for frame in frames] == list(range(1, len(frames) + 1))
    assert len({frame.publisher for frame in frames}) == 1
    settled = [frame.settled_ns for frame in frames]
    assert settled == sorted(settled)
    assert all(time.time_ns() - 60e9 < one < time.time_ns() - GRACE_NS for one in settled)


async def test_as_far_as_the_feed_knows_time_is_settled_and_never_goes_back(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    feed.settled = 70
    async with listening(client) as frames, working(feed, redis_db):
        await eventually(lambda: frames)
        feed.settled = 50
        seen = len(frames)
        await eventually(lambda: len(frames) > seen + 1)
    assert {frame.settled_ns for frame in frames} == {70}


async def test_of_several_frames_at_once_only_the_last_settles(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    feed.settled = 10
    count = FRAME_QUOTES_COUNT_MAX + 5
    async with listening(client) as frames, working(feed, redis_db, quotes_publish_interval_ms=200):
        await eventually(lambda: frames)
        feed.settled = 90
        feed.say(*(raw(f"S{n}", "1", 1) for n in range(count)))
        await eventually(lambda: sum(len(frame.quotes) for frame in frames) == count)
    large, rest = (frame for frame in frames if frame.quotes)
    assert (large.settled_ns, rest.settled_ns) == (10, 90)


async def test_both_sides_of_a_second_are_published_in_their_order(redis_db: str, client: Redis) -> None:
    """A boundary of the grid may lie between: its last quote is not lost to the one after it."""
    feed, second_ns = HandFeed(), time.time_ns() // 10**9 * 10**9 - 10**9
    async with listening(client) as frames, working(feed, redis_db, quotes_publish_interval_ms=500):
        await eventually(lambda: frames)
        instants = (second_ns - 1, second_ns, second_ns + 1, second_ns + 2)
        feed.say(*(RawQuote("AAPL", str(100 + n), ts_ns, "hand", n) for n, ts_ns in enumerate(instants, 1)))
        await eventually(lambda: any(frame.quotes for frame in frames))
    assert [quote.price for frame in frames for quote in frame.quotes] == ["102", "104"]
    assert quote_decoder.decode(await client.hget(PRICES, "AAPL")).price == "104"


async def test_a_silent_and_an_ended_feed_leave_the_heartbeat_on(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    async with listening(client) as frames, working(feed, redis_db):
        await asyncio.sleep(1.2)
        silent_count = len(frames)
        feed.queue.put_nowait(None)
        await asyncio.sleep(2.2)
        assert feed.closed
    assert 6 <= silent_count <= 13
    assert 12 <= len(frames) - silent_count <= 23
    assert not any(frame.quotes for frame in frames)


async def test_many_symbols_make_several_frames(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    count = FRAME_QUOTES_COUNT_MAX + 5
    async with listening(client) as frames, working(feed, redis_db, quotes_publish_interval_ms=200):
        feed.say(*(raw(f"S{n}", "1", 1) for n in range(count)))
        await eventually(lambda: sum(len(frame.quotes) for frame in frames) == count)
    assert max(len(frame.quotes) for frame in frames) == FRAME_QUOTES_COUNT_MAX
    assert len(await prices(client)) == count


async def test_the_number_of_symbols_is_bounded(redis_db: str, client: Redis) -> None:
    feed, before = HandFeed(), counted("TOO_MANY_SYMBOLS")
    async with working(feed, redis_db, symbols_count_max=3):
        feed.say(*(raw(f"S{n}", "1", 1) for n in range(10)))
        await eventually(lambda: counted("TOO_MANY_SYMBOLS") == before + 7)
        await eventually(lambda: _has_count(client, 3))
    assert await prices(client) == {"S0": "1", "S1": "1", "S2": "1"}


async def test_after_a_flood_and_a_restart_the_catalogue_s_symbols_still_have_room(
    redis_db: str, client: Redis
) -> None:
    feed = HandFeed()
    async with working(feed, redis_db, symbols_count_max=3):
        feed.say(*(raw(f"JUNK{n}", "1", 1) for n in range(10)), raw("AAPL", "189", 1))
        await eventually(lambda: _has_price(client, "AAPL", "189"))
    feed = HandFeed()
    async with working(feed, redis_db, symbols_count_max=3):
        feed.say(raw("JUNK9", "1", 2), raw("MSFT", "430", 1))
        await eventually(lambda: _has_price(client, "MSFT", "430"))
    assert await prices(client) == {"JUNK0": "1", "JUNK1": "1", "JUNK2": "1", "AAPL": "189", "MSFT": "430"}


async def test_a_new_numbering_is_taken_counted_and_logged_once_for_many_symbols(redis_db: str, client: Redis) -> None:
    feed, before, symbols = HandFeed(), counted("RENUMBERED"), ("AAPL", "MSFT", "NVDA")
    with capture_logs() as logs:
        async with listening(client) as frames, working(feed, redis_db):
            feed.say(*(raw(symbol, "100", 2**63 - 1) for symbol in symbols))
            feed.say(*(raw(symbol, f"10{n}", n) for n in (1, 2, 3) for symbol in symbols))
            await eventually(lambda: _has_price(client, "NVDA", "103"))
            await eventually(lambda: "103" in _shown(frames))
    assert await prices(client) == dict.fromkeys(symbols, "103")
    assert counted("RENUMBERED") == before + 3
    lines = [line for line in logs if line["event"] == "quotes_renumbered"]
    assert [(line["symbol"], line["source"], line["sequence"]) for line in lines] == [("AAPL", "hand", 3)]


def _shown(frames: list[QuoteFrame]) -> set[str]:
    return {quote.price for frame in frames for quote in frame.quotes}


async def _has_count(client: Redis, count: int) -> bool:
    return await client.hlen(PRICES) == count


async def test_a_new_process_goes_on_where_the_last_one_left_off(redis_db: str, client: Redis) -> None:
    await client.hset(PRICES, "AAPL", quote_encoder.encode(Quote("AAPL", "100", time.time_ns(), "hand", 7)))
    await client.hset(PRICES, "IDLE", quote_encoder.encode(Quote("IDLE", "7", time.time_ns(), "hand", 1)))
    await client.hset(PRICES, "JUNK", b"\xff not ours")
    before = {verdict: counted(verdict) for verdict in ("OUT_OF_ORDER", "QUARANTINED")}
    feed = HandFeed()
    async with working(feed, redis_db):
        await eventually(lambda: feed.resumed)
        # What was only read, never written by this process, is brought back too.
        await client.flushall()
        await eventually(lambda: _has_price(client, "IDLE", "7"))
        feed.say(raw("AAPL", "99", 6), raw("AAPL", "200", 8), raw("AAPL", "101", 9))
        await eventually(lambda: _has_price(client, "AAPL", "101"))
    assert {symbol: quote.price for symbol, quote in feed.resumed.items()} == {"AAPL": "100", "IDLE": "7"}
    assert {v: counted(v) - was for v, was in before.items()} == {"OUT_OF_ORDER": 1, "QUARANTINED": 1}


async def _has_price(client: Redis, symbol: str, price: str) -> bool:
    stored = await client.hget(PRICES, symbol)
    return stored is not None and quote_decoder.decode(stored).price == price


async def test_conditions_reach_redis_and_survive_a_new_process(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    async with working(feed, redis_db, delayed_sources="other, hand"):
        feed.say(raw("AAPL", "100", 1), replace(raw("AAPL", "7", 2), condition="HALTED"), raw("MSFT", "430", 1))
        await eventually(lambda: _has_condition(client, "AAPL", "HALTED"))
        assert await _has_price(client, "AAPL", "100")
        assert await _has_condition(client, "MSFT", "DELAYED")
    resumed = HandFeed()
    async with working(resumed, redis_db):
        await eventually(lambda: resumed.resumed)
        assert resumed.resumed["AAPL"].condition == "HALTED"
        resumed.say(raw("AAPL", "101", 3))
        await eventually(lambda: _has_condition(client, "AAPL", ""))


async def _has_condition(client: Redis, symbol: str, condition: str) -> bool:
    stored = await client.hget(PRICES, symbol)
    return stored is not None and quote_decoder.decode(stored).condition == condition


async def test_quotes_of_a_closed_market_are_dropped_where_extended_hours_are_off(redis_db: str, client: Redis) -> None:
    sunday_ns = to_ns(datetime(2026, 11, 15, 17, tzinfo=UTC))
    before = counted("OUT_OF_SESSION")
    feed = HandFeed()
    async with working(feed, redis_db, extended_hours=False):
        feed.say(RawQuote("AAPL", "100", sunday_ns, "hand", 1), RawQuote("BTC-USD", "9", sunday_ns, "hand", 1))
        await eventually(lambda: _has_price(client, "BTC-USD", "9"))
    assert await prices(client) == {"BTC-USD": "9"}
    assert counted("OUT_OF_SESSION") == before + 1


async def test_loaded_assets_have_their_class_s_band(
    redis_db: str, client: Redis, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the shipped catalogue, which is all that a worker without PostgreSQL knows."""
    monkeypatch.setattr("workers.quotes.CLASSES_INTERVAL_S", 0.05)
    feed, quarantined = HandFeed(), counted("QUARANTINED")
    async with working(feed, redis_db, postgres_url=database):
        feed.say(raw("MINE", "100", 1), raw("MINE", "140", 2))
        await eventually(lambda: _has_price(client, "MINE", "140"))
        await load_assets(Settings(postgres_url=database), "symbol,name,asset_class,sector,industry\nMINE,,EQUITY,,\n")
        await asyncio.sleep(0.5)
        feed.say(raw("MINE", "190", 3), raw("THEIRS", "1", 1))
        await eventually(lambda: _has_price(client, "THEIRS", "1"))
    assert (await prices(client))["MINE"] == "140"
    assert counted("QUARANTINED") == quarantined + 1


async def test_a_worker_whose_postgresql_is_away_goes_on_with_the_classes_it_knows(
    redis_db: str, client: Redis
) -> None:
    feed = HandFeed()
    with capture_logs() as logs:
        async with working(feed, redis_db, postgres_url="postgresql://nobody@127.0.0.1:1/none"):
            feed.say(raw("AAPL", "100", 1), raw("AAPL", "130", 2), raw("AAPL", "101", 3))
            await eventually(lambda: _has_price(client, "AAPL", "101"))
            await eventually(lambda: "dependency_away" in outages(logs))


@pytest.mark.parametrize("busy", [False, True])
async def test_a_flushed_redis_is_written_again(redis_db: str, client: Redis, busy: bool) -> None:
    """Busy: the next quote makes `prices` anew at once, so its absence alone would never be seen."""
    feed = HandFeed()
    async with listening(client) as frames, working(feed, redis_db):
        feed.say(*(raw(f"S{n}", "5", 1) for n in range(50)))
        await eventually(lambda: _has_count(client, 50))
        del frames[:]
        flushed_s = time.monotonic()
        await client.flushall()
        if busy:
            feed.say(raw("S0", "5.1", 2))
        await eventually(lambda: _has_count(client, 50))
        assert time.monotonic() - flushed_s < 2
        await eventually(lambda: len({q.symbol for frame in frames for q in frame.quotes}) == 50)
    assert (await prices(client))["S0"] == ("5.1" if busy else "5")


async def test_a_feed_s_failure_ends_the_worker_with_it(redis_db: str) -> None:
    class BrokenFeed(HandFeed):
        async def batches(self) -> AsyncGenerator[Batch, None]:
            yield [raw("AAPL", "1", 1)]
            raise RuntimeError("the feed has a defect")

    with pytest.raises(ExceptionGroup, match="unhandled errors") as caught:
        async with asyncio.timeout(WAIT_S):
            await run_quotes(Settings(redis_url=redis_db), BrokenFeed(), WallClock(), asyncio.Event())
    assert caught.group_contains(RuntimeError, match="defect")


class Gate:
    """A TCP relay in front of Redis that can be shut: connections are cut and new ones refused."""

    def __init__(self, redis_url: str) -> None:
        self.port = 0
        self.target = urlsplit(redis_url).port or 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@asynccontextmanager
async def gated(redis_url: str) -> AsyncIterator[tuple[Gate, str]]:
    gate = Gate(redis_url)
    await gate.open()
    try:
        yield gate, redis_url.replace(f":{urlsplit(redis_url).port}/", f":{gate.port}/")
    finally:
        await gate.shut()


def outages(logs: list[dict[str, object]]) -> list[object]:
    return [line["event"] for line in logs if str(line["event"]).startswith("dependency_")]


async def test_an_absent_redis_costs_one_log_line_and_no_latest_quote(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    with capture_logs() as logs:
        async with gated(redis_db) as (gate, url), working(feed, url):
            feed.say(raw("AAPL", "100", 1))
            await eventually(lambda: _has_price(client, "AAPL", "100"))
            await gate.shut()
            feed.say(raw("AAPL", "101", 2), raw("MSFT", "430", 1))
            await asyncio.sleep(0.3)
            feed.say(raw("MSFT", "431", 2))
            await asyncio.sleep(0.7)
            assert await prices(client) == {"AAPL": "100"}
            await gate.open()
            await eventually(lambda: _has_price(client, "MSFT", "431"))
            assert await prices(client) == {"AAPL": "101", "MSFT": "431"}
    assert outages(logs) == ["dependency_away", "dependency_back"]


async def test_a_worker_may_start_before_redis_and_stop_without_it(redis_db: str, client: Redis) -> None:
    feed = HandFeed()
    async with gated(redis_db) as (gate, url):
        await gate.shut()
        with capture_logs() as logs:
            async with working(feed, url):
                feed.say(raw("AAPL", "100", 1))
                await asyncio.sleep(0.5)
            assert outages(logs) == ["dependency_away"]
            async with working(feed, url):
                await asyncio.sleep(0.3)
                await gate.open()
                await eventually(lambda: _has_price(client, "AAPL", "100"))
                await gate.shut()
                feed.say(raw("AAPL", "101", 2))
                await asyncio.sleep(0.3)
                stopping_s = time.monotonic()
            assert time.monotonic() - stopping_s < 5
        await gate.open()


async def test_another_server_with_an_old_copy_is_brought_up_to_date(
    redis_db: str, client: Redis, children: ChildProcesses
) -> None:
    """The old copy has every field, so neither a count nor a new field gives it away."""
    other_url, _ = start_valkey(children, open_directory(children, None))
    feed = HandFeed()
    async with (
        Redis.from_url(other_url, protocol=3) as other,
        gated(redis_db) as (gate, url),
        working(feed, url),
    ):
        feed.say(raw("AAPL", "100", 1), raw("MSFT", "430", 1))
        await eventually(lambda: _has_count(client, 2))
        await asyncio.sleep(1.1)  # the worker has looked at the first server
        for symbol in ("AAPL", "MSFT"):
            await other.hset(PRICES, symbol, quote_encoder.encode(Quote(symbol, "1", 1, "hand", 0)))
        await gate.shut()
        await other.config_set("requirepass", urlsplit(redis_db).password or "")
        gate.target = urlsplit(other_url).port or 0
        await gate.open()
        await eventually(lambda: _has_price(other, "MSFT", "430"))
        assert await prices(other) == {"AAPL": "100", "MSFT": "430"}
