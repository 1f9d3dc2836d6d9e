"""The quotes worker: from a feed to Redis.

Every quote of the feed passes engine.quotes.QuoteFilter. Accepted ones are conflated per symbol and second of their
instants for `quotes_publish_interval_ms`, because a boundary of the grid may lie between two seconds and both sides of
it count; then one script writes them to `prices` and publishes a QuoteFrame with the same quotes, in this order, so
that whoever sees a gap in the frames finds the newest prices in the hash. A frame takes at most
FRAME_QUOTES_COUNT_MAX quotes; more make more frames, in one round trip. An idle worker
publishes an empty frame every HEARTBEAT_INTERVAL_S, whatever the feed does.

This worker alone says up to which instant time is settled (`QuoteFrame.settled_ns`): as far as the feed knows that
nothing older is to come, or GRACE_NS behind the clock. Whoever keeps the state at an instant takes what was published
until that instant was settled, so that all who do have the same prices; what comes later is late for all of them.

Every attempt uses up its frame sequences, also one whose answer was lost: a subscriber then sees a gap (and
reads `prices`), the same quotes under a later sequence, or the same frame twice; never nothing.

The order is the filter's: what was published last of a symbol is its price, whatever its `ts_event` or sequence. So
subscribers take quotes in the order of frames, and `prices` wherever frames were lost.

Redis away: the latest quote of each symbol is kept (as many as the filter knows) and sent when it is back.
Redis flushed, replaced or restarted from an old copy: noticed by the next frame, empty or not (the last sequence that
Redis has of this worker is not the last it was given), or within CHECK_INTERVAL_S (the hash has fewer fields than this
worker wrote), and everything known is written and published again.

Where PostgreSQL is known, the classes of its assets are read every CLASSES_INTERVAL_S and decide about bands and
sessions; before that, without it and while it is away, those last known do, at first the shipped catalogue's.

On start `prices` is read back, so that order and bands go on where the process before left off. One quotes worker
writes `prices` at a time: a second one's fields would hide that the first one's are gone.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress

import msgspec
import structlog
from prometheus_client import Counter, Gauge, Histogram

from engine.assets import Asset, load_catalogue
from engine.instants import SECOND_NS
from engine.markets import Markets
from engine.messages import Quote, QuoteFrame, quote_decoder, quote_encoder, quote_frame_encoder
from engine.quotes import QuoteFilter, Verdict
from engine.runtime.clock import Clock, MarketClock
from engine.runtime.connections import (
    AWAY,
    Outage,
    RedisClient,
    connect_postgres,
    connect_redis,
    stopped_within,
    wait_until,
)
from engine.runtime.settings import Settings
from engine.runtime.telemetry import LATENCY_BUCKETS_S
from engine.stores.assets_postgres import get_classes
from engine.stores.redis_keys import PRICES, QUOTES_CHANNEL, quotes_sequence
from workers.feeds import Feed

FRAME_QUOTES_COUNT_MAX = 2_000  # about 100 kB: a frame that every subscriber decodes in a millisecond or two
HEARTBEAT_INTERVAL_S = 0.1  # also how much later than it could a boundary of the grid is taken in a quiet market
# How far sources may lie behind each other, and behind the clock, for their quotes to count at their instants.
GRACE_NS = 200_000_000
# While Redis is away so many quotes are kept, at most a few of each symbol; then the latest of each symbol alone.
UNSENT_COUNT_MAX = 100_000
CHECK_INTERVAL_S = 1
SEQUENCE_KEPT_S = 60  # in Redis, after the last frame; a worker that was stopped for longer writes all prices again
CLASSES_INTERVAL_S = 30  # assets loaded meanwhile have their class's band this late at most
RENUMBERED_LOG_INTERVAL_S = 1  # a source that begins anew does so for all its symbols; the counter has every one
STOP_TIMEOUT_S = 3  # for the last publication and for closing: an absent server must not hold up the exit

# `source` is the feed's name, from a short list; the source in a quote comes over a wire and has no
# bound.
QUOTES = Counter("navstream_quotes_total", "Quotes judged, by verdict and feed", ["verdict", "source"])
FRAMES = Counter(
    "navstream_quote_frames_total", "Frames sent to the channel quotes, also those that got lost", ["kind"]
)
GIVEN_UP = Counter("navstream_quotes_given_up_total", "Quotes before the latest that a long outage of Redis swallowed")
REWRITES = Counter("navstream_prices_rewritten_total", "Times that all known prices were written again")
TICK_TO_RECEIVED = Histogram(
    "navstream_tick_to_received_seconds",
    "From the instant on an accepted quote until it was taken in; not by a recorded market's clock",
    buckets=LATENCY_BUCKETS_S,
)
SYMBOLS = Gauge("navstream_quotes_symbols", "Symbols with an accepted quote")

# KEYS: prices, the publisher's sequence. ARGV: channel, frame, sequence, for how many seconds it is kept, then symbols
# and packed quotes: fewer than Lua's stack takes. Returns the sequence before, or nothing.
_PUBLISH = """
if #ARGV > 4 then redis.call('HSET', KEYS[1], unpack(ARGV, 5)) end
local before = redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4], 'GET')
redis.call('SPUBLISH', ARGV[1], ARGV[2])
return before
"""

_log = structlog.get_logger(__name__)


async def run_quotes(
    settings: Settings,
    feed: Feed,
    clock: Clock,
    stop: asyncio.Event,
    assets: Mapping[str, Asset] | None = None,
) -> None:
    """Drain `feed` into Redis until `stop` is set; a feed that ends leaves the heartbeat on.

    `assets` says which band and sessions a symbol has and which symbols always have room; by default the shipped
    catalogue.
    Raises an ExceptionGroup of what the feed raises.
    """
    assets = load_catalogue() if assets is None else assets
    quote_filter = QuoteFilter(
        {asset.symbol: asset.asset_class for asset in assets.values()},
        settings.symbols_count_max,
        settings.quote_future_tolerance_ms * 1_000_000,
        settings.delayed_sources,
        None if settings.extended_hours else Markets(settings.calendars),
    )
    redis = connect_redis(settings, "quotes")
    publisher = QuotesPublisher(redis, clock, quote_filter.latest, feed.settled_ns)

    async def restore() -> None:
        await _restore(redis, quote_filter, clock.now_ns())

    try:
        if not await wait_until("redis", restore, stop):
            return
        publisher.begin()
        feed.resume(quote_filter.latest())
        async with asyncio.TaskGroup() as tasks:
            working = [tasks.create_task(_take_in(feed, clock, quote_filter, publisher))]
            if settings.postgres_url:
                working.append(tasks.create_task(_follow_classes(settings, quote_filter, stop)))
            await _publish_until(stop, publisher, settings.quotes_publish_interval_ms / 1_000)
            for task in working:
                task.cancel()
    finally:
        with suppress(*AWAY):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await redis.aclose()


async def _restore(redis: RedisClient, quote_filter: QuoteFilter, now_ns: int) -> None:
    """Read `prices` back into the filter; what does not decode there is not ours and is left out."""
    stored = await redis.hgetall(PRICES)
    quotes = []
    for value in stored.values():
        if isinstance(value, bytes):
            with suppress(msgspec.MsgspecError):
                quotes.append(quote_decoder.decode(value))
    taken_count = quote_filter.restore(quotes, now_ns)
    if stored:
        _log.info("prices_restored", taken_count=taken_count, left_out_count=len(stored) - taken_count)


async def _take_in(feed: Feed, clock: Clock, quote_filter: QuoteFilter, publisher: QuotesPublisher) -> None:
    """Judge what the feed yields, until it ends."""
    renumbered_log_at_s = 0.0
    is_timed = not isinstance(clock, MarketClock)
    counters = {verdict: QUOTES.labels(verdict.value, feed.name) for verdict in Verdict}
    async with aclosing(feed.batches()) as batches:
        async for batch in batches:
            now_ns, received_ns = clock.now_ns(), time.time_ns()
            for raw in batch:
                verdict, quote = quote_filter.judge(raw, now_ns)
                counters[verdict].inc()
                if quote is not None:
                    publisher.offer(quote, received_ns)
                    if is_timed:
                        TICK_TO_RECEIVED.observe(max(0, now_ns - quote.ts_event_ns) / 1e9)
                if verdict is Verdict.RENUMBERED and time.monotonic() >= renumbered_log_at_s:
                    renumbered_log_at_s = time.monotonic() + RENUMBERED_LOG_INTERVAL_S
                    _log.warning("quotes_renumbered", symbol=raw.symbol, source=raw.source, sequence=raw.sequence)
            SYMBOLS.set(quote_filter.symbols_count)
            # A feed with a backlog never really waits; publishing must get its turn all the same.
            await asyncio.sleep(0)
    _log.warning("feed_ended", feed=feed.name)  # prices stand still from here on, which somebody should know


async def _follow_classes(settings: Settings, quote_filter: QuoteFilter, stop: asyncio.Event) -> None:
    """Bring the filter the classes of all assets, again and again, until `stop`."""
    outage = Outage("postgres")
    while not stop.is_set():
        delay_s: float = CLASSES_INTERVAL_S
        try:
            pool = await connect_postgres(settings, "quotes")
            try:
                quote_filter.classify(await get_classes(pool))
            finally:
                pool.terminate()  # at once: there is nothing under way
            outage.end()
        except AWAY as error:
            delay_s = outage.begin_or_continue(error)
        await stopped_within(stop, delay_s)


async def _publish_until(stop: asyncio.Event, publisher: QuotesPublisher, interval_s: float) -> None:
    """Publish every interval, through outages, until `stop`; then once more."""
    outage = Outage("redis")
    while not stop.is_set():
        started_s = time.monotonic()
        try:
            await publisher.turn(started_s)
        except AWAY as error:
            await stopped_within(stop, outage.begin_or_continue(error))
            continue
        outage.end()
        await stopped_within(stop, max(0, started_s + interval_s - time.monotonic()))
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await publisher.publish()
    except AWAY as error:
        _log.warning("quotes_unsent_at_stop", count=publisher.unsent_count, reason=type(error).__name__)


class QuotesPublisher:
    """What is not yet in Redis, and the way there; `known` answers the last accepted quote of every symbol."""

    def __init__(
        self,
        redis: RedisClient,
        clock: Clock,
        known: Callable[[], Mapping[str, Quote]],
        settled_ns: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._redis = redis
        self._clock = clock
        self._known = known
        self._feed_settled_ns = settled_ns
        self._settled_ns = 0
        self._publisher = uuid.uuid4().hex
        self._sequence = 0
        self._written_sequence = 0
        # By symbol and second, in the order in which they were accepted, each with the wall instant of that.
        self._unsent: dict[tuple[str, int], tuple[Quote, int]] = {}
        self._written: set[str] = set()
        self._beat_at_s = 0.0
        self._check_at_s = 0.0

    @property
    def unsent_count(self) -> int:
        return len(self._unsent)

    def begin(self) -> None:
        """What is known before the first offer was read from Redis, so it is written there."""
        self._written = set(self._known())

    def offer(self, quote: Quote, received_ns: int) -> None:
        """Take a quote, accepted at this wall instant; it replaces an unsent one of the same symbol and second."""
        # A second ends with its last nanosecond's successor: the instant of a boundary belongs to what is before it.
        key = quote.symbol, (quote.ts_event_ns - 1) // SECOND_NS
        self._unsent.pop(key, None)
        self._unsent[key] = quote, received_ns
        if len(self._unsent) > UNSENT_COUNT_MAX:
            self._keep_latest()

    async def turn(self, now_s: float) -> None:
        """What is due at `now_s` (monotonic): quotes, a heartbeat, a look at the server. Raises AWAY."""
        if self._unsent or now_s >= self._beat_at_s:
            await self.publish(heartbeat=True)
            self._beat_at_s = now_s + HEARTBEAT_INTERVAL_S
        if now_s >= self._check_at_s:
            await self._check_server()
            self._check_at_s = now_s + CHECK_INTERVAL_S

    async def publish(self, heartbeat: bool = False) -> None:
        """Send what is unsent, or an empty frame; what could not be sent stays unsent. Raises AWAY."""
        taken, self._unsent = self._unsent, {}
        if not taken and not heartbeat:
            return
        try:
            is_complete = await self._send(list(taken.values()))
        except BaseException:
            for key, offered in self._unsent.items():  # what was offered meanwhile is newer
                taken.pop(key, None)
                taken[key] = offered
            self._unsent = taken
            raise
        self._written |= {symbol for symbol, _ in taken}
        if not is_complete:
            self._rewrite("an older copy")

    async def _send(self, quotes: list[tuple[Quote, int]]) -> bool:
        """Write and publish; False when Redis does not have what it was given before."""
        # All that was accepted by now is in these quotes.
        settled_ns = self._settle()
        pipe, kind = self._redis.pipeline(transaction=False), FRAMES.labels("quotes" if quotes else "heartbeat")
        for start in range(0, max(1, len(quotes)), FRAME_QUOTES_COUNT_MAX):
            part = quotes[start : start + FRAME_QUOTES_COUNT_MAX]
            chunk, received_ns = [quote for quote, _ in part], min((at_ns for _, at_ns in part if at_ns), default=0)
            self._sequence += 1
            is_last = start + FRAME_QUOTES_COUNT_MAX >= len(quotes)
            until_ns = settled_ns if is_last else self._settled_ns
            frame = QuoteFrame(self._publisher, self._sequence, until_ns, chunk, received_ns)
            written = [word for quote in chunk for word in (quote.symbol, quote_encoder.encode(quote))]
            told = (QUOTES_CHANNEL, quote_frame_encoder.encode(frame), self._sequence, SEQUENCE_KEPT_S)
            pipe.execute_command("EVAL", _PUBLISH, 2, PRICES, quotes_sequence(self._publisher), *told, *written)
            kind.inc()
        self._settled_ns = settled_ns
        before = int((await pipe.execute())[0] or 0)
        is_complete, self._written_sequence = before >= self._written_sequence, self._sequence
        return is_complete

    def _settle(self) -> int:
        """Up to which instant time is settled; it never goes back."""
        known_ns = self._feed_settled_ns()
        return max(self._settled_ns, self._clock.now_ns() - GRACE_NS if known_ns is None else known_ns)

    def _keep_latest(self) -> None:
        latest = {symbol: (key, offered) for key, offered in self._unsent.items() for symbol in (key[0],)}
        GIVEN_UP.inc(len(self._unsent) - len(latest))
        self._unsent = dict(latest.values())

    async def _check_server(self) -> None:
        """Notice a Redis that lost prices. Raises AWAY."""
        if await self._redis.hlen(PRICES) < len(self._written):
            self._rewrite("fields missing")

    def _rewrite(self, reason: str) -> None:
        # What is known is what was accepted last, so it includes the unsent.
        self._unsent = {(symbol, quote.ts_event_ns): (quote, 0) for symbol, quote in self._known().items()}
        self._written.clear()
        REWRITES.inc()
        _log.warning("prices_rewritten", reason=reason, symbols_count=len(self._unsent))
