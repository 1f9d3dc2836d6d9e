"""The evaluator's thresholds: compared at every flush for what it changed, written by a loop of its own.

    flush   `look` compares the thresholds of the changed slots with their marks, in memory, and keeps what they did
    loop    writes that in order (engine.stores.thresholds_postgres), loads the thresholds of shards that were taken
            up, and every `threshold_poll_interval_ms` looks whether some were created or deleted

A flush never waits for PostgreSQL. What was seen and not written when the process dies was not told: the next owner
loads what PostgreSQL says, and as it flushes every mark at take-over, it sees whatever is beyond its bound still. For
the same reason the portfolios of newly loaded thresholds are touched: they are compared at the next flush.

A threshold watches its portfolio: it is flushed at the full rate, so that no value is passed over for long.

The columns of a shard belong to one `OwnedShard`, because slots do; those of a former one are never looked at.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import structlog

from engine.book import Book
from engine.book_columns import Int64s
from engine.marks import MarkArray
from engine.runtime import telemetry
from engine.runtime.connections import AWAY, Outage
from engine.runtime.settings import Settings
from engine.stores.ledger_postgres import Fenced, Lease
from engine.stores.thresholds_postgres import WatchedThresholds
from engine.thresholds import Crossing, Thresholds
from workers.interest import Interest
from workers.owned_shard import OwnedShard

TURN_INTERVAL_S = 0.2  # how soon the thresholds of a shard that was taken up are loaded
WRITE_COUNT_MAX = 1_000  # crossings of one transaction

_log = structlog.get_logger(__name__)


class Owner(Protocol):
    """What the watch needs of the evaluator it belongs to."""

    book: Book
    owned: dict[int, OwnedShard]
    interest: Interest

    def lose(self, lease: Lease, reason: str) -> None: ...


class _Watched(NamedTuple):
    owned: OwnedShard
    thresholds: Thresholds


class ThresholdWatch:
    def __init__(self, settings: Settings, store: WatchedThresholds, owner: Owner) -> None:
        self._settings = settings
        self._store = store
        self._owner = owner
        self._watched: dict[int, _Watched] = {}
        self._waiting: dict[int, deque[Crossing]] = {}
        self._arrival = 0
        self._polled_at_s = -float("inf")
        self._wake = asyncio.Event()

    def look(self, owned: OwnedShard, slots: Int64s, marks: MarkArray) -> None:
        """Compare the thresholds of these slots, whose marks have just been flushed."""
        watched = self._watched.get(owned.lease.shard)
        if watched is None or watched.owned is not owned:
            return
        if crossings := watched.thresholds.cross(slots, marks):
            self._waiting.setdefault(owned.lease.shard, deque()).extend(crossings)
            self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Load, poll and write until `stop` is set; then write what waits, once."""
        outage = Outage("postgresql")
        stopping = asyncio.create_task(self._wake_at(stop))
        try:
            while not stop.is_set():
                delay_s = TURN_INTERVAL_S
                try:
                    await self.turn()
                    outage.end()
                except AWAY as error:
                    self._bound_waiting()
                    # What is to be written waits no less for having grown: no waking before the delay is over.
                    await asyncio.sleep(outage.begin_or_continue(error))
                    continue
                try:
                    async with asyncio.timeout(delay_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
        finally:
            stopping.cancel()
        try:
            await self._write()
        except AWAY:
            _log.warning("threshold_crossings_unwritten", count=sum(map(len, self._waiting.values())))

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wake.set()

    async def turn(self) -> None:
        """Write what waits, then bring what is watched up to date. Raises AWAY errors."""
        await self._write()
        self._forget()
        stale = {number for number, owned in self._owner.owned.items() if not self._is_current(number, owned)}
        if time.monotonic() - self._polled_at_s >= self._settings.threshold_poll_interval_ms / 1_000:
            arrival, changed = await self._store.arrived(self._arrival)
            missing = False
            for number in sorted(stale | (changed & self._owner.owned.keys())):
                missing |= not await self._load(number)
            # A portfolio that was booked elsewhere than in the Book by now is looked for again.
            self._arrival = self._arrival if missing else arrival
            self._polled_at_s = time.monotonic()
        else:
            for number in sorted(stale):
                # What it lacks has arrived after what was polled last, or is asked for again by the next poll.
                if not await self._load(number):
                    self._arrival = 0
        telemetry.THRESHOLDS_WATCHED.set(sum(len(watched.thresholds) for watched in self._watched.values()))

    def _is_current(self, number: int, owned: OwnedShard) -> bool:
        watched = self._watched.get(number)
        return watched is not None and watched.owned is owned

    def _forget(self) -> None:
        for number in self._watched.keys() - self._owner.owned.keys():
            del self._watched[number]
        for number in self._waiting.keys() - self._owner.owned.keys():
            del self._waiting[number]

    async def _load(self, number: int) -> bool:
        """Watch what PostgreSQL has of a shard; False when the Book lacks a portfolio of it."""
        owned = self._owner.owned.get(number)
        if owned is None:
            return True
        loaded = await self._store.of_shard(number)
        if self._owner.owned.get(number) is not owned:
            return True
        book = self._owner.book
        here = [one for one in loaded if one.portfolio_id in book]
        slot_of: Mapping[str, int] = {one.portfolio_id: book.slot(one.portfolio_id) for one in here}
        thresholds = Thresholds(here, slot_of)
        # What was seen since it was written is not in what was loaded.
        for crossing in self._waiting.get(number, ()):
            thresholds.set_armed(crossing.threshold.threshold_id, not crossing.fired)
        self._watched[number] = _Watched(owned, thresholds)
        names = {one.portfolio_id for one in here}
        self._owner.interest.tell(number, "thresholds", names, complete=True, expires_at_s=math.inf)
        book.touch(thresholds.slots)
        return len(here) == len(loaded)

    async def _write(self) -> None:
        """Write what waits, oldest first. Raises AWAY errors, with what is not written still waiting."""
        for number, waiting in list(self._waiting.items()):
            while waiting and (owned := self._owner.owned.get(number)) is not None:
                part = [waiting[at] for at in range(min(len(waiting), WRITE_COUNT_MAX))]
                try:
                    fired = await self._store.write_crossings(owned.lease, self._settings.threshold_topic, part)
                except Fenced as error:
                    self._owner.lose(owned.lease, str(error))
                    waiting.clear()
                    break
                telemetry.THRESHOLD_CROSSINGS.labels("written").inc(fired)
                for _ in part:
                    waiting.popleft()

    def _bound_waiting(self) -> None:
        """Give up what waits when it is too much: what is beyond its bound still is seen once it can be written."""
        total = sum(map(len, self._waiting.values()))
        if total > self._settings.threshold_crossings_waiting_max:
            telemetry.THRESHOLD_CROSSINGS.labels("given_up").inc(total)
            _log.warning("threshold_crossings_given_up", count=total)
            self._waiting.clear()
            self._watched.clear()
