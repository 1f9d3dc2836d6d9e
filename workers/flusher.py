"""From the Book to hot state: flush, snapshot frames, heartbeat.

    value     the Book is brought to the present (workers.book_time); all of a window's quotes, the last of each symbol
    look      badges look at what has changed and is not written yet, within LOOK_INTERVAL_S
    write     per owned shard one HSET and one frame (engine.stores.hot_state_redis)
    frames    of boundaries, to the snapshots worker

A window lasts `flush_interval_ms`, or as long as its work takes: what comes meanwhile is conflated, so that more than
can be done makes windows longer and nothing else. Within it are written

    watched rows that have changed            somebody watches them (workers.interest); they are in the frame
    rows that events were booked for          whoever has sent them looks for them
    others that have changed, in their turn   each within `unwatched_flush_interval_ms`, or as fast as it can be done
                                              beside what is watched (workers.slow_turns)

The frame names the flush before it also when that wrote nobody's rows, so that a frame which was lost is missed. With
nothing to do the loop sleeps until quotes come that move something watched, and looks around every IDLE_INTERVAL_S.

A shard that is not published (workers.take_over) is not flushed; its changes wait in the Book. The clock is read once
per flush.

What was taken at boundaries is kept until others have it: baselines of day cuts until PostgreSQL does, snapshot frames
until Redis does, these for FRAME_AGE_MAX_S.

A mark is never ahead of its positions: while a portfolio's are on their way from the ledger to hot state it is held
back (`holding`), and no other is. Whoever takes a shard over goes by that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog

from engine.book_columns import Int64s
from engine.marks import FrameHeader, MarkArray
from engine.runtime import telemetry
from engine.runtime.clock import Clock, MarketClock
from engine.runtime.connections import AWAY, Outage, stopped_within
from engine.runtime.settings import Settings
from engine.stores.hot_state_redis import FlushOutcome
from workers.book_time import BookTime
from workers.owned_shard import Host, OwnedShard
from workers.slow_turns import SlowTurns

__all__ = ["Flusher", "Host", "OwnedShard"]

_log = structlog.get_logger(__name__)

HEARTBEAT_INTERVAL_S = 1.0
FRAME_AGE_MAX_S = 60.0
HELD_INTERVAL_S = 0.01  # while quotes wait at a boundary it is looked at this often
# Boundaries are taken and unwatched portfolios valued this late at most. A recorded market is half a day on by then.
IDLE_INTERVAL_S = 0.1
LOOK_INTERVAL_S = 0.1
# What flushes write and look at beside what is watched: a millisecond or two each.
ROWS_PER_FLUSH = 2_000
ROWS_PER_LOOK = 20_000
# Of all shards together, also when there is more: who watches does not wait for what nobody does. Some 20 ms.
ROWS_PER_WINDOW_MAX = 20_000
LOOKS_PER_WINDOW_MAX = 400_000

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Flush:
    """A shard's flush under way. `shown_count` of the slots, the first ones, are in the frame."""

    owned: OwnedShard
    header: FrameHeader
    slots: Int64s
    shown_count: int
    marks: MarkArray
    sending: Coroutine[Any, Any, FlushOutcome]


class Flusher:
    def __init__(self, settings: Settings, clock: Clock, host: Host) -> None:
        self._clock = clock
        self._host = host
        self.time = self._time = BookTime(settings, clock, host)
        self._interval_s = settings.flush_interval_ms / 1_000
        slow_s = settings.unwatched_flush_interval_ms / 1_000
        self._turns = SlowTurns(slow_s, ROWS_PER_FLUSH) if slow_s > self._interval_s else None
        self._looks = SlowTurns(LOOK_INTERVAL_S, ROWS_PER_LOOK)
        self._outage = Outage("redis")
        self._wake = asyncio.Event()
        self._is_watched = True
        # Slots whose hot positions are on their way.
        self._held = np.zeros(0, np.bool_)
        # Of the oldest quote that was applied and is in no flush yet: its instant, and when it was received.
        self._oldest = (0, 0)
        # Told of every shard's flushed slots and their marks, once these are in hot state.
        self.watchers: list[Callable[[OwnedShard, Int64s, MarkArray], None]] = []
        host.quotes.arrived = self._quotes_arrived
        host.interest.changed = self._wake.set

    @property
    def as_of_ns(self) -> int:
        """The instant that the Book stands at: now, but not beyond a boundary that has not been taken."""
        return self._time.as_of_ns

    @property
    def reached_ns(self) -> int:
        """No boundary up to here is still to be taken."""
        return self._time.reached_ns

    def booking(self) -> AbstractContextManager[None]:
        """A batch is under way: boundaries wait for it."""
        return self._time.booking()

    def catch_up(self) -> None:
        """Between two batches: take a boundary that waited for the one before, or it would wait for ever."""
        if self._time.is_held:
            self._advance()

    def place(self, portfolio_id: str, day_cut: str) -> None:
        """Begin the day of a portfolio that the Book has just taken in, and lay out its hot row."""
        book, slot = self._host.book, self._host.book.slot(portfolio_id)
        book.begin_day(portfolio_id, day_cut, self._time.last_cut(day_cut))
        self._host.hot.layout.place(slot, portfolio_id)
        self._host.interest.opened(int(book.shard[slot]), portfolio_id)

    @contextmanager
    def holding(self, owned: OwnedShard, slots: Int64s) -> Iterator[None]:
        """While hot positions of these are on their way they are not flushed, and then with the next flush."""
        self._fit()
        self._held[slots] = True
        try:
            yield
        finally:
            self._held[slots] = False
            if owned.published:  # otherwise all of it is to be written
                owned.booked.append(slots)
            self._wake.set()

    # -- the flush loop --------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Flush every window until `stop` is set, then once more all that has changed."""
        waking = asyncio.create_task(self._wake_at(stop))
        try:
            while not stop.is_set():
                begun_s = time.monotonic()
                await self.flush()
                await self._pause(stop, begun_s)
        finally:
            waking.cancel()
        for owned in self._host.owned.values():
            owned.away_until_s = 0
        await self.flush(everything=True)

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wake.set()

    async def _pause(self, stop: asyncio.Event, begun_s: float) -> None:
        """Until the next flush may begin, and then until there is something to do."""
        interval_s = min(self._interval_s, HELD_INTERVAL_S) if self._time.is_held else self._interval_s
        await stopped_within(stop, begun_s + interval_s - time.monotonic())
        telemetry.FLUSH_WINDOW.observe(time.monotonic() - begun_s)
        is_busy = self._looks.is_under_way or (self._turns is not None and self._turns.is_under_way)
        if is_busy or self._time.is_held:
            return
        try:
            async with asyncio.timeout(begun_s + IDLE_INTERVAL_S - time.monotonic()):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _quotes_arrived(self) -> None:
        if self._is_watched:
            self._wake.set()

    async def flush(self, everything: bool = False) -> None:
        """Bring the Book to the present, then write and publish what is due, or everything that has changed."""
        self._wake.clear()
        with _timed("value"):
            as_of_ns = self._advance()
        valued_s = time.monotonic()
        published = [owned for owned in self._host.owned.values() if owned.published]
        self._is_watched = any(self._watches(owned.lease.shard) for owned in published)
        self._fit()
        with _timed("look"):
            self._look(published, as_of_ns)
        (oldest_event_ns, oldest_received_ns), self._oldest = self._oldest, (0, 0)
        if oldest_received_ns:
            telemetry.RECEIVED_TO_VALUED.observe(max(0, time.time_ns() - oldest_received_ns) / 1e9)
        with _timed("write"):
            flushes = [
                self._begin(owned, as_of_ns, (oldest_event_ns, oldest_received_ns), everything) for owned in published
            ]
            begun = [flush for flush in flushes if flush is not None]
            errors = await asyncio.gather(*(self._end(flush, valued_s) for flush in begun))
            self._note({flush.owned.lease.shard: error for flush, error in zip(begun, errors, strict=True) if error})
        with _timed("frames"):
            for owned in list(self._host.owned.values()):
                await self._push_frames(owned)

    def _note(self, failed: dict[int, Exception]) -> None:
        """Of a cluster one node may be away: its shards wait, together, and the others' are flushed."""
        if failed:
            delay_s = self._outage.begin_or_continue(next(iter(failed.values())))
            for owned in self._host.owned.values():
                if owned.lease.shard in failed:
                    owned.away_until_s = time.monotonic() + delay_s
            asyncio.get_running_loop().call_later(delay_s, self._wake.set)
        elif not any(owned.away_until_s for owned in self._host.owned.values()):
            self._outage.end()

    def _advance(self) -> int:
        as_of_ns, *oldest = self._time.advance()
        self._oldest = _older(self._oldest, (oldest[0], oldest[1]))
        return as_of_ns

    def _watches(self, shard: int) -> bool:
        slots = self._host.interest.slots_of(shard)
        return self._turns is None or slots is None or len(slots) > 0

    # -- what is due -----------------------------------------------------------------------------------------

    def _fit(self) -> None:
        more = len(self._host.book.shard) - len(self._held)
        if more > 0:
            self._held = np.pad(self._held, (0, more))

    def _changed(self, shard: int) -> Int64s:
        return np.flatnonzero(self._host.book.dirty & (self._host.book.shard == shard))

    def _due(self, turns: SlowTurns, shard: int, count_max: int) -> Int64s:
        return turns.part(shard, time.monotonic(), lambda: self._changed(shard), count_max)

    def _free(self, shard: int, slots: Int64s) -> Int64s:
        """Those of the slots that have changed, are of the shard still, and are not held back."""
        book = self._host.book
        free: Int64s = slots[book.dirty[slots] & (book.shard[slots] == shard) & ~self._held[slots]]
        return free

    def _look(self, published: list[OwnedShard], as_of_ns: int) -> None:
        """Let badges see what is not written for long yet: it may be another value by then."""
        if self._turns is None:
            return
        for turns in (self._turns, self._looks):
            turns.keep(self._host.owned)
        if not self._host.book.dirty.any():
            return
        for owned in published:
            number = owned.lease.shard
            slots = self._due(self._looks, number, LOOKS_PER_WINDOW_MAX // len(published))
            if len(slots := self._free(number, slots)):
                self._host.badges.look(owned, slots, as_of_ns)

    def _choose(self, owned: OwnedShard, everything: bool) -> tuple[Int64s, Int64s]:
        """What is due of a shard: watched slots, and others."""
        number, interest = owned.lease.shard, self._host.interest
        booked, owned.booked = owned.booked, []
        watched = interest.slots_of(number)
        if watched is None:
            return self._free(number, self._changed(number)), _NONE
        if everything or self._turns is None:
            others = self._changed(number)
        else:
            others = self._due(self._turns, number, max(1, ROWS_PER_WINDOW_MAX // len(self._host.owned)))
            if booked:
                others = np.unique(np.concatenate([others, *booked]))
        others = self._free(number, others)
        return self._free(number, watched), others[~interest.is_watched(others)]

    # -- one shard -------------------------------------------------------------------------------------------

    def _begin(self, owned: OwnedShard, as_of_ns: int, oldest: tuple[int, int], everything: bool) -> _Flush | None:
        """Take what is due of a shard out of the Book; None when there is nothing to say."""
        if time.monotonic() < owned.away_until_s:
            owned.unwritten = _older(oldest, owned.unwritten)
            return None
        watched, others = self._choose(owned, everything)
        if not len(watched) + len(others) and time.monotonic() - owned.flushed_at_s < HEARTBEAT_INTERVAL_S:
            return None
        book, lease = self._host.book, owned.lease
        slots, shown_count = np.concatenate([watched, others]), len(watched)
        book.clear(slots)
        withheld = book.out_of_range(slots)
        if withheld.any():
            telemetry.MARKS_WITHHELD.inc(int(withheld.sum()))
            slots, shown_count = slots[~withheld], shown_count - int(withheld[:shown_count].sum())
        self._host.badges.look(owned, slots, as_of_ns)
        owned.sequence += 1
        previous, owned.flushed_sequence = owned.flushed_sequence, owned.sequence
        oldest, owned.unwritten = _older(oldest, owned.unwritten), (0, 0)
        moved = oldest if shown_count else (0, 0)
        header = FrameHeader(lease.shard, lease.epoch, owned.sequence, previous, as_of_ns, *moved, time.time_ns())
        marks = book.marks(slots, as_of_ns, owned.sequence)
        sending = self._host.hot.flush(header, slots, marks, shown_count)
        return _Flush(owned, header, slots, shown_count, marks, sending)

    async def _end(self, flush: _Flush, valued_s: float) -> Exception | None:
        """Send a flush, and see what becomes of it; the error when Redis did not take it."""
        owned, header = flush.owned, flush.header
        begun_s = time.monotonic()
        try:
            outcome = await flush.sending
        except AWAY as error:
            book = self._host.book
            book.touch(flush.slots[book.shard[flush.slots] == owned.lease.shard])
            owned.booked.append(flush.slots)
            owned.unwritten = (header.oldest_event_ns, header.oldest_received_ns)
            telemetry.FLUSHES.labels("failed").inc()
            return error
        owned.flushed_at_s, owned.away_until_s = begun_s, 0
        telemetry.FLUSHES.labels(outcome.name.lower()).inc()
        telemetry.ROWS_FLUSHED.inc(len(flush.slots))
        if flush.shown_count:
            telemetry.VALUED_TO_HOT.observe(time.monotonic() - valued_s)
        if header.oldest_event_ns and not isinstance(self._clock, MarketClock):
            telemetry.TICK_TO_HOT.observe(max(0, self._clock.now_ns() - header.oldest_event_ns) / 1e9)
        if outcome is FlushOutcome.WRITTEN:
            for watch in self.watchers:
                watch(owned, flush.slots, flush.marks)
        elif outcome is FlushOutcome.FENCED:
            self._host.lose(owned.lease, "hot state has a newer epoch")
        elif outcome is FlushOutcome.LOST:
            _log.warning("hot_state_lost", shard=owned.lease.shard)
            # Positions may be older than the marks beside them say.
            owned.published, owned.is_under_repair = False, True
        return None

    async def _push_frames(self, owned: OwnedShard) -> None:
        """Give Redis the snapshot frames that it does not have; one that it can not take in time is a gap."""
        lease = owned.lease
        while owned.frames_due and not owned.away_until_s and self._host.owned.get(lease.shard) is owned:
            frame = owned.frames_due[0]
            try:
                outcome, dropped = await self._host.hot.push_snapshot(lease.shard, lease.epoch, frame.data)
            except AWAY as error:
                outcome, dropped = FlushOutcome.LOST, 0
                _log.debug("snapshot_frame_unwritten", shard=lease.shard, reason=type(error).__name__)
            telemetry.SNAPSHOT_FRAMES.labels("dropped").inc(dropped)
            if outcome is FlushOutcome.LOST and time.monotonic() - frame.made_at_s < FRAME_AGE_MAX_S:
                return  # Tried again by the next flush: Redis is away, or the shard is not published yet.
            if owned.frames_due and owned.frames_due[0] is frame:
                del owned.frames_due[0]
            telemetry.SNAPSHOT_FRAMES.labels("pushed" if outcome is FlushOutcome.WRITTEN else "lost").inc()


def _older(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The earlier of each; 0 is none."""
    return min(one[0] or other[0], other[0] or one[0]), min(one[1] or other[1], other[1] or one[1])


@contextmanager
def _timed(stage: str) -> Iterator[None]:
    with telemetry.FLUSH_STAGE.labels(stage).time():
        yield
