"""The hub: who in this process watches what, and the one slot that each watch has.

A slot holds the newest value; a newer one replaces it and the slot counts how many it stands for. There is no
queue anywhere between a frame and a client, so a slow reader costs one value and never delays another. Marks are
taken in the order of (epoch, sequence) and never backwards, so that a frame and a read of Redis may arrive in any
order. Quotes are taken in the order of their frames, whatever instant their sources stamped on them: sources do not
share a clock, and the quotes worker has judged their order already. `prices` is written before the frame is
published, so a read beats all frames that came before it was begun, and a frame that comes meanwhile beats the read.

Marks wait in the columns of their shard (api/shard_marks.py) for whoever watches their portfolio: the slot of a stream
that graphql-core executes, which makes a Mark of one when it is taken, and the groups of api/delivery.py.

A watch is registered before its first value is read: it is put on the list of what to read (`unread`) when its
channel is live already, or else when the channel becomes live, so that nothing falls between reading and
listening. `api/live_feed.py` does the listening and the reading.

A slot is `current` from the first value that came by a channel that is live and heard, until that channel is lost or
silent, or one of its frames was missed. Once the channel is back, what is watched on it is read, and the slot is
signalled also when the value is still the same: that it holds is news then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import structlog

from api.heard import Heard
from api.shard_marks import MarkCell, MarkReceiver, ShardMarks
from engine.marks import Mark, mark_of, pack_mark
from engine.messages import Quote
from engine.stores.hot_state_reads import Place

_log = structlog.get_logger(__name__)


class MarkSlot:
    """The slot of a stream that graphql-core executes. `signal` is set when there is something to take."""

    __slots__ = ("_cell", "_heard", "_is_due", "_signal", "_taken_count", "_told_count")

    def __init__(self, marks: ShardMarks, portfolio_id: bytes, signal: asyncio.Event) -> None:
        self._cell = marks.add(portfolio_id, self)
        self._signal = signal
        self._taken_count = self._told_count = -1  # before the first mark
        self._is_due = False
        self._heard: Heard | None = None

    @property
    def current(self) -> bool:
        return self._cell.current

    def waiting_count(self) -> int:
        return self._cell.count - self._taken_count

    def news(self, resumed: bool) -> None:
        self._cell.tell()
        count = self._cell.count
        if self._taken_count < 0:
            self._taken_count = count - 1
        if count > self._told_count or resumed:
            self._told_count = count
            self._is_due = True
            self._signal.set()

    def take(self) -> tuple[Mark, int] | None:
        if not self._is_due:
            return None
        cell, before = self._cell, self._taken_count
        self._is_due, self._taken_count, self._heard = False, cell.count, cell.heard
        return mark_of(cell.row, cell.epoch), self._taken_count - before

    def latency_ms(self, now_ns: int) -> float | None:
        return None if self._heard is None else self._heard.latency_ms(now_ns)


class QuoteSlot:
    """Holds at most one quote per watched symbol. `fill` brings the first ones, and those read after a gap.

    `_known` is the newest quote of each symbol, and the reading during which its frame came (-1 for one that was
    read).
    """

    __slots__ = ("_count", "_current", "_due", "_hub", "_known", "_quotes", "_signal", "filled", "symbols")

    def __init__(self, hub: Hub, signal: asyncio.Event) -> None:
        self._hub = hub
        self._signal = signal
        self._quotes: dict[str, Quote] = {}
        self._known: dict[str, tuple[Quote, int]] = {}
        self._current = False
        self._count = 0
        self._due = False
        self.filled = False
        self.symbols: frozenset[str] = frozenset()

    @property
    def current(self) -> bool:
        """Nothing is missing of nothing: without symbols it always is."""
        return self._current or not self.symbols

    def lose(self) -> None:
        self._current = False

    def put(self, quote: Quote, reading: int) -> None:
        self._quotes[quote.symbol] = quote
        self._known[quote.symbol] = (quote, reading)
        self._count += 1
        if self.filled:
            self._signal.set()

    def fill(self, quotes: dict[str, Quote], reading: int, current: bool) -> None:
        """Take quotes that were read, but for those that a frame overtook. The first is always shown, and the first
        after an outage."""
        for symbol in self.symbols & quotes.keys():
            quote, (known, framed) = quotes[symbol], self._known.get(symbol, (None, -1))
            if quote != known and framed != reading:
                self._quotes[symbol] = quote
                self._known[symbol] = (quote, -1)
                self._count += 1
        self._due = self._due or not self.filled or (current and not self._current)
        self.filled = True
        self._current = self._current or current
        if self._due or self._quotes:
            self._signal.set()

    def take(self) -> tuple[dict[str, Quote], int] | None:
        if not self.filled or not (self._due or self._quotes):
            return None
        taken = (self._quotes, self._count)
        self._quotes, self._count, self._due = {}, 0, False
        return taken

    def forget(self, symbol: str) -> None:
        """The symbol is not watched any more; what is known of it grows old."""
        self._quotes.pop(symbol, None)
        self._known.pop(symbol, None)

    def change(self, symbols: Collection[str]) -> None:
        self._hub.rewatch(self, frozenset(symbols))


class Hub:
    """Watches by place and by symbol, and what of it is to be read. `unread_signal` is set when there is some."""

    def __init__(self) -> None:
        self._marks: dict[int, ShardMarks] = {}
        self._quotes: dict[str, list[QuoteSlot]] = {}
        self._badges: dict[str, list[asyncio.Event]] = {}
        self._live_shards: set[int] = set()
        self._quotes_live = False
        self._silent_shards: set[int] = set()
        self._quotes_silent = False
        self._reading = 0
        self._unread_places: set[Place] = set()
        self._unread_symbols: set[str] = set()
        self.unread_signal = asyncio.Event()
        self.watch_signal = asyncio.Event()
        self.watches_count = 0

    @contextmanager
    def watch_portfolio(self, shard: int, portfolio_id: str, signal: asyncio.Event) -> Iterator[MarkSlot]:
        slot = MarkSlot(self._shard_marks(shard), portfolio_id.encode(), signal)
        self.begin_watch((shard, portfolio_id))
        try:
            yield slot
        finally:
            self.drop_receiver((shard, portfolio_id), slot)
            self.end_watch()

    def add_receiver(self, place: Place, receiver: MarkReceiver) -> MarkCell:
        return self._shard_marks(place[0]).add(place[1].encode(), receiver)

    def drop_receiver(self, place: Place, receiver: MarkReceiver) -> None:
        marks = self._marks[place[0]]
        marks.drop(place[1].encode(), receiver)
        if not marks:
            del self._marks[place[0]]

    def _shard_marks(self, shard: int) -> ShardMarks:
        if shard not in self._marks:
            self._marks[shard] = ShardMarks()
        return self._marks[shard]

    def begin_watch(self, place: Place) -> None:
        """One more watches by a receiver of this place, and is to be told its newest mark."""
        self._count(1)
        if place[0] in self._live_shards:
            self._unread({place}, ())

    def end_watch(self) -> None:
        self._count(-1)

    @contextmanager
    def watch_badges(self, portfolio_id: str, signal: asyncio.Event) -> Iterator[None]:
        """Events are kept in PostgreSQL: the watch is told that there may be new ones, never which."""
        self._badges.setdefault(portfolio_id, []).append(signal)
        self._count(1)
        try:
            yield
        finally:
            _remove(self._badges, portfolio_id, signal)
            self._count(-1)

    @contextmanager
    def watch_quotes(self, symbols: Collection[str], signal: asyncio.Event) -> Iterator[QuoteSlot]:
        slot = QuoteSlot(self, signal)
        self.rewatch(slot, frozenset(symbols))
        self._count(1)
        try:
            yield slot
        finally:
            self.rewatch(slot, frozenset())
            self._count(-1)

    def rewatch(self, slot: QuoteSlot, symbols: frozenset[str]) -> None:
        """Let `slot` watch these symbols and no others."""
        added, dropped = symbols - slot.symbols, slot.symbols - symbols
        slot.symbols = symbols
        for symbol in dropped:
            _remove(self._quotes, symbol, slot)
            slot.forget(symbol)
        for symbol in added:
            self._quotes.setdefault(symbol, []).append(slot)
        if self._quotes_live:
            self._unread((), added)
        self.watch_signal.set()

    def shards(self) -> set[int]:
        """The shards that somebody watches."""
        return set(self._marks)

    def watched(self, shard: int) -> Collection[bytes]:
        """The portfolios of a shard that somebody watches; a view. `watch_signal` is set whenever it may change."""
        return self._marks[shard].portfolio_ids() if shard in self._marks else ()

    def watches_quotes(self) -> bool:
        return bool(self._quotes)

    def watches_badges(self) -> bool:
        return bool(self._badges)

    def badges_live(self) -> None:
        """The channel is listened to from here on; what came before may have been missed."""
        self.deliver_badges(self._badges)

    def deliver_badges(self, portfolio_ids: Iterable[str]) -> None:
        for portfolio_id in portfolio_ids:
            for signal in self._badges.get(portfolio_id, ()):
                signal.set()

    def shard_live(self, shard: int, live: bool) -> None:
        """The shard's channel is (no longer) listened to. Becoming live, all that is watched on it is to be read."""
        (self._live_shards.add if live else self._live_shards.discard)(shard)
        if live:
            self.reread_shard(shard)
        else:
            self._lose_shard(shard)

    def quotes_live(self, live: bool) -> None:
        self._quotes_live = live
        if live:
            self.reread_quotes()
        else:
            self._lose_quotes()

    def shard_heard(self, shard: int, heard: bool) -> None:
        """The shard's evaluator speaks, or has fallen silent. Only the change from one to the other does something."""
        if heard and shard in self._silent_shards:
            self._silent_shards.discard(shard)
            self.reread_shard(shard)
        elif not heard and shard not in self._silent_shards:
            self._silent_shards.add(shard)
            self._lose_shard(shard)

    def quotes_heard(self, heard: bool) -> None:
        if heard and self._quotes_silent:
            self.reread_quotes()
        elif not heard and not self._quotes_silent:
            self._lose_quotes()
        self._quotes_silent = not heard

    def reread_shard(self, shard: int) -> None:
        self._unread(((shard, key.decode()) for key in self.watched(shard)), ())

    def miss_shard(self, shard: int) -> None:
        """Frames of the shard were lost: nothing on it is current until it is read, or comes in a frame."""
        self._lose_shard(shard)
        self.reread_shard(shard)

    def reread_quotes(self) -> None:
        self._unread((), self._quotes)

    def take_unread(self) -> tuple[set[Place], set[str]]:
        """What is to be read; a reading begins, and ends in the fills or with what is put back."""
        self._reading += 1
        unread = (self._unread_places, self._unread_symbols)
        self._unread_places, self._unread_symbols = set(), set()
        self.unread_signal.clear()
        return unread

    def put_back(self, places: Iterable[Place], symbols: Iterable[str]) -> None:
        """What could not be read is still to be read, as far as it is still watched."""
        self._unread(
            (place for place in places if self._watched(place[0], place[1].encode())),
            (symbol for symbol in symbols if symbol in self._quotes),
        )

    def deliver_rows(
        self, shard: int, epoch: int, portfolio_ids: Sequence[bytes], packed: bytes, heard: Heard | None = None
    ) -> None:
        """Take the watched ones of a frame's marks. Raises ValueError for what is no mark."""
        marks = self._marks.get(shard)
        if marks is not None:
            self._tell(marks, marks.take(epoch, portfolio_ids, packed, heard, True))

    def deliver_marks(self, found: Iterable[tuple[Place, Mark]]) -> None:
        """Take the watched ones of marks that were read; of a shard not heard, they are the last ones known."""
        owned: dict[tuple[int, int], list[tuple[bytes, bytes]]] = {}
        for (shard, portfolio_id), mark in found:
            owned.setdefault((shard, mark.epoch), []).append((portfolio_id.encode(), pack_mark(mark)))
        for (shard, epoch), read in owned.items():
            marks = self._marks.get(shard)
            if marks is not None:
                current = shard in self._live_shards and shard not in self._silent_shards
                ids, packed = zip(*read, strict=True)
                self._tell(marks, marks.take(epoch, ids, b"".join(packed), None, current))

    def _tell(self, marks: ShardMarks, cells: Iterable[tuple[int, bool]]) -> None:
        for cell, resumed in cells:
            for receiver in marks.receivers[cell]:
                try:
                    receiver.news(resumed)
                except Exception:  # a defect of one is not to silence the others, nor this one for good
                    _log.exception("receiver_failed")
                    marks.eager[cell] = True

    def deliver_quotes(self, quotes: Iterable[Quote]) -> None:
        for quote in quotes:
            for slot in self._quotes.get(quote.symbol, ()):
                slot.put(quote, self._reading)

    def fill_quotes(self, symbols: Iterable[str], quotes: dict[str, Quote]) -> None:
        """Give quotes that were read to the slots that watch any of `symbols`, once to each."""
        slots = {id(slot): slot for symbol in symbols for slot in self._quotes.get(symbol, ())}
        current = self._quotes_live and not self._quotes_silent
        for slot in slots.values():
            slot.fill(quotes, self._reading, current)

    def _lose_shard(self, shard: int) -> None:
        if shard in self._marks:
            self._marks[shard].lose()

    def _lose_quotes(self) -> None:
        for slots in self._quotes.values():
            for slot in slots:
                slot.lose()

    def _watched(self, shard: int, key: bytes) -> bool:
        return key in self.watched(shard)

    def _unread(self, places: Iterable[Place], symbols: Iterable[str]) -> None:
        self._unread_places.update(places)
        self._unread_symbols.update(symbols)
        if self._unread_places or self._unread_symbols:
            self.unread_signal.set()

    def _count(self, change: int) -> None:
        self.watches_count += change
        self.watch_signal.set()


def _remove(watched: dict, key: object, slot: object) -> None:  # type: ignore[type-arg]
    slots = watched[key]
    slots.remove(slot)
    if not slots:
        del watched[key]
