"""What prices were, quote by quote, while somebody watches: so that a mark can be checked against its instant.

The evaluator applies quotes in the order of their frames, so the prices behind a mark are those after some prefix
of the stream. `QuoteHistory` keeps the stream from a reading of `prices` on. Where frames were lost, `prices` is read
again, as the evaluator does, and what changed meanwhile goes on the stream in place of the frame that showed the gap.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from decimal import Decimal

from redis.asyncio import Redis

from engine.messages import quote_decoder, quote_frame_decoder
from engine.stores import redis_keys
from workers.quote_intake import FrameNumbers

QUOTES_COUNT_MAX = 5_000_000  # an hour of a busy market; a longer watch would forget nothing and say so by failing


class HistoryFull(Exception):
    """More quotes came than a watch keeps."""


class QuoteHistory:
    def __init__(self) -> None:
        self._first: dict[str, Decimal] = {}
        self._changes: dict[str, list[tuple[int, str, Decimal]]] = {}
        self._count = 0
        self._began = False

    async def watch(self, redis: Redis) -> None:
        """Listen until cancelled. Raises RedisError, OSError when the server goes away, HistoryFull."""
        pubsub, numbers = redis.pubsub(), FrameNumbers()
        try:
            await pubsub.subscribe(redis_keys.QUOTES_CHANNEL)
            while True:
                message = await pubsub.get_message(timeout=1.0)
                if message is None:
                    continue
                if message["type"] == "subscribe":
                    await self._read_prices(redis)
                elif message["type"] == "message":
                    frame = quote_frame_decoder.decode(message["data"])
                    if numbers.is_gap(frame):
                        await self._read_prices(redis)
                        continue
                    for quote in frame.quotes:
                        self._note(quote.symbol, Decimal(quote.price))
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _read_prices(self, redis: Redis) -> None:
        """The first reading is where the watch begins; a later one brings what no frame brought."""
        for value in (await redis.hgetall(redis_keys.PRICES)).values():
            quote = quote_decoder.decode(value)  # type: ignore[arg-type]
            price = Decimal(quote.price)
            if not self._began:
                self._first[quote.symbol] = price
            elif price != self._last(quote.symbol):
                self._note(quote.symbol, price)
        self._began = True

    def _last(self, symbol: str) -> Decimal | None:
        changes = self._changes.get(symbol)
        return changes[-1][2] if changes else self._first.get(symbol)

    def _note(self, symbol: str, price: Decimal) -> None:
        self._count += 1
        if self._count > QUOTES_COUNT_MAX:
            raise HistoryFull(f"more than {QUOTES_COUNT_MAX} quotes came while reconciling")
        self._changes.setdefault(symbol, []).append((self._count, symbol, price))

    def first(self, symbol: str) -> Decimal | None:
        """The price when the watch began; None when there was none."""
        return self._first.get(symbol)

    def changes(self, symbols: Iterable[str]) -> Iterator[tuple[str, Decimal]]:
        """What `symbols` were quoted at since, in the order of the stream."""
        wanted = sorted(set(symbols))
        for _, symbol, price in heapq.merge(*(self._changes.get(symbol, []) for symbol in wanted)):
            yield symbol, price
