"""From the Book to hot state: flush, snapshot frames, heartbeat.

Every `flush_interval_ms` the Book is brought to the present (workers.book_time) and, per owned shard, the changed marks
are written by one HSET and published as one frame. A shard that is not published (workers.take_over) is not flushed;
its changes wait in the Book. The clock is read once per flush.

What was taken at boundaries is kept until others have it: baselines of day cuts until PostgreSQL does, snapshot frames
until Redis does, these for FRAME_AGE_MAX_S.

A mark is never ahead of its positions: while a batch is on its way from the ledger to hot positions its shard is not
flushed. Whoever takes a shard over goes by that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import structlog

from engine.book_columns import Int64s
from engine.marks import FrameHeader, MarkArray
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from engine.runtime.connections import AWAY, Outage, stopped_within
from engine.runtime.settings import Settings
from engine.stores.hot_state_redis import FlushOutcome
from workers.book_time import BookTime
from workers.owned_shard import Host, OwnedShard

__all__ = ["Flusher", "Host", "OwnedShard"]

_log = structlog.get_logger(__name__)

HEARTBEAT_INTERVAL_S = 1.0
FRAME_AGE_MAX_S = 60.0
HELD_INTERVAL_S = 0.01  # while quotes wait at a boundary it is looked at this often


class Flusher:
    def __init__(self, settings: Settings, clock: Clock, host: Host) -> None:
        self._settings = settings
        self._clock = clock
        self._host = host
        self.time = self._time = BookTime(settings, clock, host)
        self._outage = Outage("redis")
        # Told of every shard's flushed slots and their marks, once these are in hot state.
        self.watchers: list[Callable[[OwnedShard, Int64s, MarkArray], None]] = []

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
            self._time.advance()

    def place(self, portfolio_id: str, day_cut: str) -> None:
        """Begin the day of a portfolio that the Book has just taken in, and lay out its hot row."""
        book = self._host.book
        book.begin_day(portfolio_id, day_cut, self._time.last_cut(day_cut))
        self._host.hot.layout.place(book.slot(portfolio_id), portfolio_id)

    # -- the flush loop --------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Flush every interval until `stop` is set, then once more."""
        interval_s = self._settings.flush_interval_ms / 1_000
        due_s = time.monotonic()
        while not stop.is_set():
            await self.flush()
            wait_s = min(interval_s, HELD_INTERVAL_S) if self._time.is_held else interval_s
            due_s = max(due_s + wait_s, time.monotonic())
            await stopped_within(stop, due_s - time.monotonic())
        await self.flush()

    async def flush(self) -> None:
        """Bring the Book to the present, then write and publish what changed."""
        as_of_ns, oldest_event_ns = self._time.advance()
        changed = self._host.book.changed()
        shard_of = self._host.book.shard[changed]
        ready = [owned for owned in self._host.owned.values() if owned.published and not owned.posting]
        await asyncio.gather(
            *(
                self._flush_shard(owned, changed[shard_of == owned.lease.shard], as_of_ns, oldest_event_ns)
                for owned in ready
            )
        )
        for owned in list(self._host.owned.values()):
            await self._push_frames(owned)

    async def _flush_shard(self, owned: OwnedShard, slots: Int64s, as_of_ns: int, oldest_event_ns: int) -> None:
        now_s = time.monotonic()
        # A shard may have been let go, and its slots taken by others, since they were counted as changed; or a batch
        # may have come to the Book.
        if self._host.owned.get(owned.lease.shard) is not owned or not owned.published or owned.posting:
            return
        slots = slots[self._host.book.shard[slots] == owned.lease.shard]
        if not len(slots) and now_s - owned.flushed_at_s < HEARTBEAT_INTERVAL_S:
            return
        book = self._host.book
        book.clear(slots)
        withheld = book.out_of_range(slots)
        if withheld.any():
            telemetry.MARKS_WITHHELD.inc(int(withheld.sum()))
            slots = slots[~withheld]
        self._host.badges.look(owned, slots, as_of_ns)
        owned.sequence += 1
        previous, owned.flushed_sequence = owned.flushed_sequence, owned.sequence
        lease = owned.lease
        header = FrameHeader(lease.shard, lease.epoch, owned.sequence, previous, as_of_ns, oldest_event_ns)
        try:
            marks = book.marks(slots, as_of_ns, owned.sequence)
            outcome = await self._host.hot.flush(header, slots, marks)
        except AWAY as error:
            book.touch(slots)
            telemetry.FLUSHES.labels("failed").inc()
            await asyncio.sleep(self._outage.begin_or_continue(error))
            return
        self._outage.end()
        owned.flushed_at_s = now_s
        telemetry.FLUSHES.labels(outcome.name.lower()).inc()
        telemetry.ROWS_FLUSHED.inc(len(slots))
        if oldest_event_ns:
            telemetry.TICK_TO_HOT.observe(max(0, self._clock.now_ns() - oldest_event_ns) / 1e9)
        if outcome is FlushOutcome.WRITTEN:
            for watch in self.watchers:
                watch(owned, slots, marks)
        elif outcome is FlushOutcome.FENCED:
            self._host.lose(lease, "hot state has a newer epoch")
        elif outcome is FlushOutcome.LOST:
            _log.warning("hot_state_lost", shard=lease.shard)
            owned.published = False

    async def _push_frames(self, owned: OwnedShard) -> None:
        """Give Redis the snapshot frames that it does not have; one that it can not take in time is a gap."""
        lease = owned.lease
        while owned.frames_due and self._host.owned.get(lease.shard) is owned:
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
