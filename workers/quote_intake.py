"""Quotes on their way into the Book: the latest per symbol, conflated until the next flush takes them.

The latest is what the quotes worker published last; `ts_event` and sequences were judged there (engine.quotes) and are
not compared again, so that the Book can not come to disagree with `prices`. Quotes are taken in the order of frames.

Frames arrive on the Pub/Sub channel `quotes`, which may lose any of them. Frames are numbered per publisher, who sends
an empty one every second; a gap, a new publisher, a (re)subscription or silence means that `prices` is read again and
believed. It is written before a frame is published, so it has the quotes of the frame that showed the gap, or newer
ones. Frames that were under way meanwhile may bring an older quote back; the last of them ends at what was read.

At most `symbols_count_max` symbols that the catalogue does not list are taken, and all that it lists: what the quotes
worker accepts has room here. More are refused and counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

import msgspec
import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from engine.assets import load_catalogue
from engine.messages import Quote, QuoteFrame, quote_decoder, quote_frame_decoder
from engine.runtime import telemetry
from engine.runtime.connections import AWAY, Outage, connect_redis, stopped_within
from engine.runtime.settings import Settings
from engine.stores import redis_keys

SILENCE_MAX_S = 5  # five missed heartbeats: the connection may be dead without having said so
CLOSE_TIMEOUT_S = 1
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


class QuoteIntake:
    """`catalogue`: the symbols that always have room, by default those of the shipped catalogue."""

    def __init__(self, settings: Settings, catalogue: Collection[str] | None = None) -> None:
        self._settings = settings
        self._catalogue = frozenset(load_catalogue() if catalogue is None else catalogue)
        # All symbols' last quotes: a fill may make any of them matter. At most the catalogue's symbols and
        # `symbols_count_max` others.
        self._last: dict[str, Quote] = {}
        self._unheard_of_count = 0
        self._waiting: dict[str, Quote] = {}
        self._numbers = FrameNumbers()
        self._heard_at_s = 0.0
        # Set once `prices` has been read, so that no shard is valued before.
        self.ready = asyncio.Event()

    def last(self, symbol: str) -> Quote | None:
        return self._last.get(symbol)

    def take(self, before_ns: int | None = None) -> list[Quote]:
        """The quotes that wait for a flush, those stamped before `before_ns` only when it is given."""
        if before_ns is None:
            taken, self._waiting = self._waiting, {}
            return list(taken.values())
        taken = {symbol: quote for symbol, quote in self._waiting.items() if quote.ts_event_ns < before_ns}
        for symbol in taken:
            del self._waiting[symbol]
        return list(taken.values())

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until `stop` is set; a lost connection is made again."""
        outage = Outage("redis")
        while not stop.is_set():
            redis = connect_redis(self._settings, "evaluator-quotes")
            try:
                await self._listen(redis, stop, outage)
            except AWAY as error:
                await stopped_within(stop, outage.begin_or_continue(error))
            finally:
                await _close(redis)

    async def _listen(self, redis: Redis, stop: asyncio.Event, outage: Outage) -> None:
        pubsub = redis.pubsub()
        try:
            await pubsub.subscribe(redis_keys.QUOTES_CHANNEL)
            self._heard_at_s = time.monotonic()
            while not stop.is_set():
                message = await pubsub.get_message(timeout=1.0)
                if message is not None:
                    self._heard_at_s = time.monotonic()
                    await self._receive(redis, message)
                    outage.end()
                elif time.monotonic() - self._heard_at_s > SILENCE_MAX_S:
                    # A quotes worker that is merely down looks the same; reading `prices` then changes nothing.
                    await self._read_prices(redis)
                    self._heard_at_s = time.monotonic()
        finally:
            await _close(pubsub)

    async def _receive(self, redis: Redis, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":
            await self._read_prices(redis)
        elif message["type"] == "message":
            data = message["data"]
            assert isinstance(data, bytes)
            try:
                frame = quote_frame_decoder.decode(data)
            except msgspec.MsgspecError as error:
                _log.warning("bad_quote_frame", reason=str(error))
                return
            if self._numbers.is_gap(frame):
                telemetry.QUOTE_GAPS.inc()
                await self._read_prices(redis)
                return
            for quote in frame.quotes:
                self._offer(quote)

    async def _read_prices(self, redis: Redis) -> None:
        for value in (await redis.hgetall(redis_keys.PRICES)).values():
            assert isinstance(value, bytes)
            try:
                self._offer(quote_decoder.decode(value))
            except msgspec.MsgspecError as error:
                _log.warning("bad_quote", reason=str(error))
        self.ready.set()

    def _offer(self, quote: Quote) -> None:
        last = self._last.get(quote.symbol)
        if quote == last:
            return
        if last is None and quote.symbol not in self._catalogue:
            if self._unheard_of_count >= self._settings.symbols_count_max:
                telemetry.QUOTES_REFUSED.inc()
                return
            self._unheard_of_count += 1
        if quote.symbol in self._waiting:
            telemetry.QUOTES_CONFLATED.inc()
        self._last[quote.symbol] = self._waiting[quote.symbol] = quote


async def _close(client: Redis | PubSub) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await client.aclose()
    except AWAY:
        _log.debug("close_failed")
