"""Interest: which portfolios of an evaluator's shards somebody watches (engine.messages.InterestFrame).

API nodes say so on `interest:{n}`; thresholds are a watch of the evaluator's own. A portfolio is watched while anybody
watches it. Whoever has not been heard for as long as it said itself is forgotten, but nobody while the channel is not
listened to: then the nodes can not be heard.

A frame of marks has the watched rows alone, and a node reads what it begins to watch. What is flushed between that
reading and its interest would be in neither, so a portfolio that becomes watched counts as changed: its newest mark
comes with the next flush, whatever the node has read.

Whoever begins to listen to a shard's channel, or does so again, has heard of all interest after `interest_interval_ms`.
Before that, and while the channel is lost, the whole shard counts as watched (`slots_of` is None): what a node says
meanwhile is not heard, and its streams would stand still while the shard's heartbeats say that they hold.

Answers are by Book slot. Slots have one owner after another, so `opened` and `taken` are to be told of every new one.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from engine.book import Book
from engine.book_columns import Int64s
from engine.messages import interest_decoder
from engine.runtime import telemetry
from engine.runtime.connections import AWAY, Outage, RedisClient, close_in_time, connect_redis, stopped_within
from engine.runtime.settings import Settings
from engine.runtime.subscriber import Notice, NoticeKind, Subscriber
from engine.stores import redis_keys

LISTEN_INTERVAL_S = 0.1  # also how late the channel of a shard that was claimed is subscribed to

_log = structlog.get_logger(__name__)


class _Listener:
    """What one node watches of a shard."""

    __slots__ = ("expires_at_s", "ids")

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.expires_at_s = 0.0


class _Shard:
    """What is known of a shard: its listeners, how many watch each portfolio, and since when nobody was missed."""

    __slots__ = ("counts", "known_at_s", "listeners", "slots")

    def __init__(self) -> None:
        self.listeners: dict[str, _Listener] = {}
        self.counts: Counter[str] = Counter()
        self.known_at_s = float("inf")
        # The watched slots, ascending; None when they are to be found anew.
        self.slots: Int64s | None = None


class Interest:
    """`shards` says whose channels to listen to; `changed` is called when a flush has something new to do."""

    def __init__(
        self,
        settings: Settings,
        book: Book,
        shards: Callable[[], Collection[int]],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._book = book
        self._wanted = shards
        self.changed = changed
        self._shards: dict[int, _Shard] = {}
        self._mask = np.zeros(0, np.bool_)

    # -- what is watched ---------------------------------------------------------------------------------------

    def slots_of(self, shard: int) -> Int64s | None:
        """The watched slots of a shard, ascending; None while it is not known, and all of them count."""
        known = self._shards.get(shard)
        if known is None or time.monotonic() < known.known_at_s:
            return None
        if known.slots is None:
            slots = [self._book.slot(name) for name in known.counts if name in self._book]
            mine = np.sort(np.array(slots, np.int64))
            known.slots = mine[self._book.shard[mine] == shard]
        return known.slots

    def is_watched(self, slots: Int64s) -> NDArray[np.bool_]:
        """Which of the slots, all of known shards, are watched."""
        self._fit()
        watched: NDArray[np.bool_] = self._mask[slots]
        return watched

    # -- what the Book takes in --------------------------------------------------------------------------------

    def opened(self, shard: int, portfolio_id: str) -> None:
        """The Book has taken a portfolio in."""
        self._fit()
        known = self._shards.get(shard)
        is_watched = known is not None and portfolio_id in known.counts
        self._mask[self._book.slot(portfolio_id)] = is_watched
        if is_watched and known is not None:
            known.slots = None

    def taken(self, shard: int) -> None:
        """The Book has taken a shard in, in place of what it held of it."""
        self._fit()
        self._mask[self._book.slots_of(shard)] = False
        if shard in self._shards:
            self._shards[shard].slots = None
            self._set(shard, self._shards[shard].counts)

    def _fit(self) -> None:
        more = len(self._book.shard) - len(self._mask)
        if more > 0:
            self._mask = np.pad(self._mask, (0, more))

    def _set(self, shard: int, names: Iterable[str], watched: bool = True) -> Int64s:
        """Mark those of the portfolios that are in the Book; returns their slots."""
        self._fit()
        slots = np.array([self._book.slot(name) for name in names if name in self._book], np.int64)
        mine: Int64s = slots[self._book.shard[slots] == shard]
        self._mask[mine] = watched
        return mine

    # -- who watches -------------------------------------------------------------------------------------------

    def tell(
        self, shard: int, listener: str, portfolio_ids: Iterable[str], complete: bool, expires_at_s: float
    ) -> None:
        """A listener watches these portfolios until then (monotonic); with `complete` these alone."""
        known = self._shards.setdefault(shard, _Shard())
        of = known.listeners.setdefault(listener, _Listener())
        of.expires_at_s = expires_at_s
        told = set(portfolio_ids)
        self._change(shard, told - of.ids, of.ids - told if complete else ())
        of.ids = told if complete else of.ids | told

    def live(self, shard: int) -> None:
        """The shard's channel is listened to from here on: every node says within an interval what it watches."""
        known, now_s = self._shards.setdefault(shard, _Shard()), time.monotonic()
        interval_s = self._settings.interest_interval_ms / 1_000
        known.known_at_s = min(known.known_at_s, now_s + interval_s)
        for of in known.listeners.values():
            of.expires_at_s = max(of.expires_at_s, now_s + 2 * interval_s)

    def lost(self, shard: int) -> None:
        """The shard's channel is not listened to from here on."""
        if shard in self._shards:
            self._shards[shard].known_at_s = float("inf")

    def forget(self, shards: Collection[int]) -> None:
        """Forget who has not been heard for too long on these shards' channels, which are listened to."""
        now_s = time.monotonic()
        for shard in shards:
            known = self._shards[shard]
            for name in [name for name, of in known.listeners.items() if of.expires_at_s <= now_s]:
                self._change(shard, (), known.listeners.pop(name).ids)

    def drop(self, shard: int) -> None:
        """The shard is not ours any more."""
        self._shards.pop(shard, None)

    def _change(self, shard: int, added: Collection[str], dropped: Collection[str]) -> None:
        known = self._shards[shard]
        new = [name for name in added if name not in known.counts]
        known.counts.update(added)
        known.counts.subtract(dropped)
        gone = [name for name in dropped if not known.counts[name]]
        for name in gone:
            del known.counts[name]
        if new or gone:
            known.slots = None
            self._set(shard, gone, watched=False)
            self._book.touch(self._set(shard, new))
        if new:
            self.changed()
        telemetry.PORTFOLIOS_WATCHED.set(sum(len(one.counts) for one in self._shards.values()))

    # -- the channels ------------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until `stop` is set; a lost connection is made again."""
        outage = Outage("redis")
        while not stop.is_set():
            redis = connect_redis(self._settings, "evaluator-interest")
            try:
                await self._listen(redis, stop, outage)
            except AWAY as error:
                await stopped_within(stop, outage.begin_or_continue(error))
            finally:
                await close_in_time(redis)

    async def _listen(self, redis: RedisClient, stop: asyncio.Event, outage: Outage) -> None:
        subscriber, shard_of, live = Subscriber(redis), dict[str, int](), set[int]()
        try:
            while not stop.is_set():
                self._follow(subscriber, shard_of, live)
                if not shard_of:
                    await stopped_within(stop, LISTEN_INTERVAL_S)
                    continue
                notice = await subscriber.next(LISTEN_INTERVAL_S)
                if notice is not None:
                    outage.end()
                    self._receive(notice, shard_of, live)
                self.forget(live)
        finally:
            for shard in live:
                self.lost(shard)
            await subscriber.aclose()

    def _follow(self, subscriber: Subscriber, shard_of: dict[str, int], live: set[int]) -> None:
        """Listen to the channels of the shards that are ours by now."""
        wanted = {redis_keys.interest_channel(shard): shard for shard in self._wanted()}
        for shard in self._shards.keys() - wanted.values():
            live.discard(shard)
            self.drop(shard)
        subscriber.listen_to(wanted.keys())
        shard_of.clear()
        shard_of |= wanted

    def _receive(self, notice: Notice, shard_of: dict[str, int], live: set[int]) -> None:
        shard = shard_of.get(notice.channel)
        if shard is None:
            return
        if notice.kind is NoticeKind.CONFIRMED:
            live.add(shard)
            self.live(shard)
        elif notice.kind is NoticeKind.LOST:
            live.discard(shard)
            self.lost(shard)
        elif notice.kind is NoticeKind.MESSAGE:
            try:
                frame = interest_decoder.decode(notice.data)
            except msgspec.MsgspecError as error:
                _log.warning("bad_interest_frame", reason=str(error))
                return
            expires_at_s = time.monotonic() + frame.expires_in_ms / 1_000
            self.tell(shard, frame.node, frame.portfolio_ids, frame.complete, expires_at_s)
