"""Quotes on their way into the Book: the latest per symbol, conflated until the next flush takes them.

Time has boundaries (`boundary_of`) at which state is kept for ever, so the last quote of a symbol up to a boundary
must not be lost to one beyond it. Waiting quotes lie in segments, one per boundary: a symbol has at most one quote in
each, and `take(B)` hands out

    per symbol the last one published among those with `ts_event` ≤ B

A quote published later with an earlier instant takes the place of those in later segments too: published last is right.
One that is stamped up to where time is settled already (QuoteFrame.settled_ns) is late: it counts just after that, for
everybody, however far each has got meanwhile.

The latest is what the quotes worker published last; `ts_event` and sequences were judged there (engine.quotes) and are
not compared again, so that the Book can not come to disagree with `prices`. Quotes are taken in the order of frames.

Frames arrive on a Pub/Sub channel, which may lose any of them. Frames are numbered per publisher, who sends
an empty one every second; a gap, a new publisher, a (re)subscription or silence means that `prices` is read again and
believed. It is written before a frame is published, so it has the quotes of the frame that showed the gap, or newer
ones. Frames that were under way meanwhile may bring an older quote back; the last of them ends at what was read.

At most `symbols_count_max` symbols that the catalogue does not list are taken, and all that it lists: what the quotes
worker accepts has room here. More are refused and counted. At most SEGMENTS_COUNT_MAX segments are kept; beyond that
the two oldest become one, which is counted.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection

import msgspec
import structlog

from engine.assets import load_catalogue
from engine.messages import Quote, QuoteFrame, quote_decoder, quote_frame_decoder
from engine.runtime import telemetry
from engine.runtime.connections import AWAY, Outage, RedisClient, close_in_time, connect_redis, stopped_within
from engine.runtime.settings import Settings
from engine.runtime.subscriber import Notice, NoticeKind, Subscriber
from engine.stores import redis_keys

SILENT_AFTER_S = 2.5  # two heartbeats that did not come
SILENCE_MAX_S = 5  # five missed heartbeats: the connection may be dead without having said so
SEGMENTS_COUNT_MAX = 1_024  # a recorded year of daily bars has as many instants; an hour of a live market is one
PUBLISHERS_COUNT_MAX = 8  # only the last ones matter; one that is gone never speaks again

_log = structlog.get_logger(__name__)


class FrameNumbers:
    """Notices frames that were lost."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def is_gap(self, frame: QuoteFrame) -> bool:
        """Note a frame; whether others before it may have been lost. The very first one follows a reading."""
        before = self._last.get(frame.publisher)
        self._last[frame.publisher] = frame.sequence
        if before is None:
            self._last = dict(list(self._last.items())[-PUBLISHERS_COUNT_MAX:])
            return len(self._last) > 1
        return frame.sequence > before + 1


class _Segment:
    """The quotes that wait for one boundary, by symbol, each with the instant it counts at, the first of them
    `since_ns`, and with the wall instant at which the quotes worker took it in (0: not known)."""

    __slots__ = ("quotes", "since_ns")

    def __init__(self) -> None:
        self.quotes: dict[str, tuple[int, Quote, int]] = {}
        self.since_ns = math.inf

    def put(self, quote: Quote, at_ns: int, received_ns: int) -> None:
        self.quotes[quote.symbol] = at_ns, quote, received_ns
        self.since_ns = min(self.since_ns, at_ns)


class WaitingQuotes:
    """What waits to be taken, in segments. `boundary_of` says the smallest boundary ≥ an instant."""

    def __init__(self, boundary_of: Callable[[int], int] | None = None) -> None:
        self.boundary_of = boundary_of or _no_boundary
        # Time is settled up to here: what comes now and is stamped before is late, and counts just after.
        self.settled_ns = 0
        # By boundary, each quote in the segment of its instant; boundaries ascending.
        self._segments: dict[int, _Segment] = {}
        self._oldest_received_ns = 0

    def add(self, quote: Quote, received_ns: int = 0) -> None:
        """Let the quote that was published last wait."""
        at_ns = max(quote.ts_event_ns, self.settled_ns + 1)
        boundary_ns = self.boundary_of(at_ns)
        if boundary_ns not in self._segments:
            boundary_ns = self._open(boundary_ns)
        segment = self._segments[boundary_ns]
        conflated = quote.symbol in segment.quotes
        segment.put(quote, at_ns, received_ns)
        for later_ns in reversed(self._segments):
            if later_ns == boundary_ns:
                break
            conflated |= self._segments[later_ns].quotes.pop(quote.symbol, None) is not None
        if conflated:
            telemetry.QUOTES_CONFLATED.inc()

    def take(self, until_ns: int | None = None) -> list[Quote]:
        """Per symbol the last quote stamped up to `until_ns`, or at all, with which it waits no longer."""
        taken: dict[str, tuple[int, Quote, int]] = {}
        for boundary_ns, segment in list(self._segments.items()):
            if until_ns is None or boundary_ns <= until_ns:
                taken |= self._segments.pop(boundary_ns).quotes
            # Boundaries may have come into being since it was filled: a segment can lie on both sides of this one.
            elif segment.since_ns <= until_ns:
                due = [symbol for symbol, (at_ns, _, _) in segment.quotes.items() if at_ns <= until_ns]
                taken |= {symbol: segment.quotes.pop(symbol) for symbol in due}
                segment.since_ns = min((at_ns for at_ns, _, _ in segment.quotes.values()), default=math.inf)
            if not segment.quotes:
                self._segments.pop(boundary_ns, None)
        received = [received_ns for _, _, received_ns in taken.values() if received_ns]
        if received:
            self._oldest_received_ns = min(*received, self._oldest_received_ns or received[0])
        return [quote for _, quote, _ in taken.values()]

    def take_received_ns(self) -> int:
        """When the quotes worker took in the first of what was taken since this was asked last; 0 when nobody says."""
        oldest_ns, self._oldest_received_ns = self._oldest_received_ns, 0
        return oldest_ns

    def _open(self, boundary_ns: int) -> int:
        """Begin a segment, merging the two oldest when there are too many; returns the boundary of what it lies in."""
        is_last = not self._segments or boundary_ns > next(reversed(self._segments))
        self._segments[boundary_ns] = _Segment()
        if not is_last:
            self._segments = dict(sorted(self._segments.items()))
        if len(self._segments) <= SEGMENTS_COUNT_MAX:
            return boundary_ns
        oldest_ns, second_ns = list(self._segments)[:2]
        oldest, second = self._segments.pop(oldest_ns), self._segments[second_ns]
        second.quotes = oldest.quotes | second.quotes
        second.since_ns = min(oldest.since_ns, second.since_ns)
        telemetry.QUOTE_SEGMENTS_MERGED.inc()
        return max(boundary_ns, second_ns)


def _no_boundary(_: int) -> int:
    return 0


class QuoteIntake:
    """Listens to the channel of quotes while `run` runs; what came is taken by `take`.

    `catalogue`: the symbols that always have room, by default those of the shipped catalogue. `boundary_of`, which may
    be set later as `waiting.boundary_of`, says the smallest boundary ≥ an instant; without it time has none. `name` is
    the connection's.
    """

    def __init__(
        self,
        settings: Settings,
        catalogue: Collection[str] | None = None,
        boundary_of: Callable[[int], int] | None = None,
        name: str = "evaluator-quotes",
    ) -> None:
        self._settings = settings
        self._name = name
        self._catalogue = frozenset(load_catalogue() if catalogue is None else catalogue)
        # All symbols' last quotes: a fill may make any of them matter. At most the catalogue's symbols and
        # `symbols_count_max` others.
        self._last: dict[str, Quote] = {}
        self._unheard_of_count = 0
        self.waiting = WaitingQuotes(boundary_of)
        self._numbers = FrameNumbers()
        self._heard_at_s = 0.0
        self._frame_at_s = -math.inf
        # Set once `prices` has been read, so that no shard is valued before.
        self.ready = asyncio.Event()
        # Called when quotes have begun to wait.
        self.arrived: Callable[[], None] = lambda: None

    def last(self, symbol: str) -> Quote | None:
        return self._last.get(symbol)

    @property
    def settled_ns(self) -> int | None:
        """Up to where time is settled, says the quotes worker; None when it has been silent for SILENT_AFTER_S."""
        return self.waiting.settled_ns if time.monotonic() - self._frame_at_s < SILENT_AFTER_S else None

    def take(self, until_ns: int | None = None) -> list[Quote]:
        """Per symbol the last quote that waits for a flush, of those stamped up to `until_ns` when it is given."""
        return self.waiting.take(until_ns)

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until `stop` is set; a lost connection is made again."""
        outage = Outage("redis")
        while not stop.is_set():
            redis = connect_redis(self._settings, self._name)
            try:
                await self._listen(redis, stop, outage)
            except AWAY as error:
                await stopped_within(stop, outage.begin_or_continue(error))
            finally:
                await close_in_time(redis)

    async def _listen(self, redis: RedisClient, stop: asyncio.Event, outage: Outage) -> None:
        subscriber = Subscriber(redis)
        try:
            subscriber.listen_to({redis_keys.QUOTES_CHANNEL})
            self._heard_at_s = time.monotonic()
            while not stop.is_set():
                notice = await subscriber.next(timeout_s=1.0)
                if notice is not None:
                    self._heard_at_s = time.monotonic()
                    await self._receive(redis, notice)
                    outage.end()
                elif time.monotonic() - self._heard_at_s > SILENCE_MAX_S:
                    # A quotes worker that is merely down looks the same; reading `prices` then changes nothing.
                    await self._read_prices(redis)
                    self._heard_at_s = time.monotonic()
        finally:
            await subscriber.aclose()

    async def _receive(self, redis: RedisClient, notice: Notice) -> None:
        if notice.kind is NoticeKind.CONFIRMED:
            await self._read_prices(redis)
        elif notice.kind is NoticeKind.MESSAGE:
            try:
                frame = quote_frame_decoder.decode(notice.data)
            except msgspec.MsgspecError as error:
                _log.warning("bad_quote_frame", reason=str(error))
                return
            self._frame_at_s = time.monotonic()
            if self._numbers.is_gap(frame):
                telemetry.QUOTE_GAPS.inc()
                await self._read_prices(redis)
            else:
                for quote in frame.quotes:
                    self._offer(quote, frame.received_ns)
            self.waiting.settled_ns = max(self.waiting.settled_ns, frame.settled_ns)
            if frame.quotes:
                self.arrived()

    async def _read_prices(self, redis: RedisClient) -> None:
        for value in (await redis.hgetall(redis_keys.PRICES)).values():
            assert isinstance(value, bytes)
            try:
                self._offer(quote_decoder.decode(value))
            except msgspec.MsgspecError as error:
                _log.warning("bad_quote", reason=str(error))
        self.ready.set()
        self.arrived()

    def _offer(self, quote: Quote, received_ns: int = 0) -> None:
        last = self._last.get(quote.symbol)
        if quote == last:
            return
        if last is None and quote.symbol not in self._catalogue:
            if self._unheard_of_count >= self._settings.symbols_count_max:
                telemetry.QUOTES_REFUSED.inc()
                return
            self._unheard_of_count += 1
        self._last[quote.symbol] = quote
        self.waiting.add(quote, received_ns)
