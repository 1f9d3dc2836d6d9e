"""What prices were, quote by quote, for a while back: so that a mark can be checked against its instant.

The evaluator applies quotes in the order of their frames, so the prices behind a mark are those after some prefix
of the stream. `QuoteHistory` keeps the last WINDOW_S of the stream and the prices before it. Where frames were lost,
`prices` is read again, as the evaluator does, and what changed meanwhile goes on the stream in place of the frame that
showed the gap.

A mark is checked within seconds of being read, and is no older than a flush then, or than the longest that a
corporate action holds quotes back. What an evaluator that is further behind made is of before the window
(`begins_at_ns`) and can not be checked. More than QUOTES_COUNT_MAX quotes are not kept; what is forgotten early is
counted.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import msgspec

from engine.messages import Quote, quote_decoder, quote_frame_decoder
from engine.reconciliation import Price
from engine.runtime import telemetry
from engine.runtime.connections import RedisClient
from engine.runtime.subscriber import NoticeKind, Subscriber
from engine.stores import redis_keys
from workers.quote_intake import FrameNumbers

WINDOW_S = 30.0
QUOTES_COUNT_MAX = 250_000  # 8,000 a second; about 80 MB


class _Change(NamedTuple):
    number: int
    price: Price


@dataclass(slots=True)
class _Stream:
    """One symbol's: the price before the window, and the quotes within it."""

    before: Price | None
    changes: deque[_Change]

    @property
    def last(self) -> Price | None:
        return self.changes[-1].price if self.changes else self.before

    def undone(self, symbol: str) -> Iterator[tuple[int, str, Price | None]]:
        """(−number, symbol, price before) of each change, newest first."""
        for at in range(len(self.changes) - 1, -1, -1):
            yield -self.changes[at].number, symbol, self.changes[at - 1].price if at else self.before


class QuoteHistory:
    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._streams: dict[str, _Stream] = {}
        self._order: deque[tuple[float, str]] = deque()
        self._count = 0
        self._began = False
        # The latest instant on a quote before the window: states of before it can not be told any more.
        self.begins_at_ns = 0

    async def watch(self, redis: RedisClient) -> None:
        """Listen until cancelled. Raises AWAY errors when the server goes away; watch again then."""
        subscriber, numbers = Subscriber(redis), FrameNumbers()
        try:
            subscriber.listen_to({redis_keys.QUOTES_CHANNEL})
            while True:
                notice = await subscriber.next(timeout_s=1.0)
                self._forget()
                if notice is None:
                    continue
                if notice.kind is NoticeKind.CONFIRMED:
                    await self._read_prices(redis)
                elif notice.kind is NoticeKind.MESSAGE:
                    with suppress(msgspec.MsgspecError):  # nobody applies a frame that can not be read
                        frame = quote_frame_decoder.decode(notice.data)
                        if numbers.is_gap(frame):
                            await self._read_prices(redis)
                            continue
                        for quote in frame.quotes:
                            self._note(quote)
        finally:
            await subscriber.aclose()

    async def _read_prices(self, redis: RedisClient) -> None:
        """The first reading is where the watch begins; a later one brings what no frame brought."""
        for value in (await redis.hgetall(redis_keys.PRICES)).values():
            try:
                quote = quote_decoder.decode(value)  # type: ignore[arg-type]
            except msgspec.MsgspecError:
                continue
            if not self._began:
                self._streams[quote.symbol] = _Stream(_price(quote), deque())
                self.begins_at_ns = max(self.begins_at_ns, quote.ts_event_ns)
            elif _price(quote) != self.last(quote.symbol):
                self._note(quote)
        self._began = True

    def _note(self, quote: Quote) -> None:
        self._count += 1
        stream = self._streams.setdefault(quote.symbol, _Stream(None, deque()))
        stream.changes.append(_Change(self._count, _price(quote)))
        self._order.append((self._monotonic(), quote.symbol))
        if len(self._order) > QUOTES_COUNT_MAX:
            telemetry.QUOTES_FORGOTTEN.inc()
            self._forget_oldest()

    def _forget(self) -> None:
        """Move what is older than the window to before it."""
        until_s = self._monotonic() - WINDOW_S
        while self._order and self._order[0][0] < until_s:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        stream = self._streams[self._order.popleft()[1]]
        stream.before = stream.changes.popleft().price
        self.begins_at_ns = max(self.begins_at_ns, stream.before.ts_event_ns)

    def last(self, symbol: str) -> Price | None:
        """The newest price; None when there never was one."""
        stream = self._streams.get(symbol)
        return stream.last if stream else None

    def backwards(self, symbols: Iterable[str]) -> Iterator[tuple[str, Price | None]]:
        """Undo the window's quotes of `symbols`, newest first: each symbol with the price it had before."""
        streams = {symbol: self._streams[symbol] for symbol in sorted(set(symbols)) if symbol in self._streams}
        for _, symbol, price in heapq.merge(*(stream.undone(symbol) for symbol, stream in streams.items())):
            yield symbol, price


def _price(quote: Quote) -> Price:
    return Price(Decimal(quote.price), quote.ts_event_ns)
