"""From the Book to hot state: take-over, flush, snapshot frames, heartbeat.

Every `flush_interval_ms` the Book is brought to the present (workers.book_time) and, per owned shard, the changed marks
are written by one HSET and published as one frame. A shard is published in full when it is taken over and when Redis
forgot it: positions and marks under its epoch first, then the pointer, then a frame with every row. Until then it is
not flushed; its changes wait in the Book. The clock is read once per flush.

What was taken at boundaries is kept until others have it: baselines of day cuts until PostgreSQL does, snapshot frames
until Redis does, these for FRAME_AGE_MAX_S.

What reads the ledger (`take`, `publish`, `settle`) is called by the evaluator's events loop alone, between batches, so
that positions read there are never older than what was written.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import structlog

from engine.badges import Rule
from engine.book_columns import Int64s
from engine.marks import FrameHeader, MarkArray
from engine.posting import PositionsChange, allocation, hot_position
from engine.runtime import telemetry
from engine.runtime.clock import Clock, MarketClock, to_datetime
from engine.runtime.connections import AWAY, Outage, stopped_within
from engine.runtime.settings import Settings
from engine.stores.hot_state_redis import FlushOutcome
from engine.stores.ledger_postgres import Lease
from engine.stores.shard_loading import LoadedPortfolio, LoadedShard
from workers.book_time import BookTime
from workers.owned_shard import Host, OwnedShard

__all__ = ["Flusher", "Host", "OwnedShard"]

_log = structlog.get_logger(__name__)

HEARTBEAT_INTERVAL_S = 1.0
FRAME_AGE_MAX_S = 60.0
# A recorded market cuts several days a second: what all positions are rewritten for, their day P&L, follows this late.
RECORDED_POSITIONS_INTERVAL_S = 3.0
HELD_INTERVAL_S = 0.01  # while quotes wait at a boundary it is looked at this often
PORTFOLIOS_PER_STEP_MAX = 500  # how much of a take-over runs before other tasks get their turn


class Flusher:
    def __init__(self, settings: Settings, clock: Clock, host: Host) -> None:
        self._settings = settings
        self._clock = clock
        self._host = host
        self._time = BookTime(settings, clock, host)
        self._positions_interval_s = RECORDED_POSITIONS_INTERVAL_S if isinstance(clock, MarketClock) else 0
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

    # -- called by the events loop ---------------------------------------------------------------------------

    async def take(self, lease: Lease) -> OwnedShard:
        """Load a shard into the Book, in place of what it held of it. Raises Fenced; AWAY errors of the ledger."""
        with self._time.loading():
            while True:
                self._time.advance()
                loaded = await self._load(lease, self._host.badges.rules)
                self._host.book.drop_shard(lease.shard)
                self._host.badges.drop(lease.shard)
                for start in range(0, len(loaded.portfolios), PORTFOLIOS_PER_STEP_MAX):
                    for portfolio in loaded.portfolios[start : start + PORTFOLIOS_PER_STEP_MAX]:
                        self._open(lease.shard, portfolio)
                        self._host.badges.take(lease.shard, portfolio, loaded.badges.get(portfolio.portfolio_id, {}))
                    await asyncio.sleep(0)
                if all(self._time.last_cut(day_cut) == cut_at for day_cut, cut_at in loaded.cuts.items()):
                    break
                _log.info("day_cut_while_loading", shard=lease.shard)
        owned = OwnedShard(lease, loaded.next_offset, loaded=loaded.portfolios)
        owned.cuts_due += loaded.estimated
        return owned

    async def _load(self, lease: Lease, rules: Sequence[Rule] = ()) -> LoadedShard:
        return await self._host.shards.load(lease, self._time.last_cut, self._time.quote_of, rules)

    async def publish(self, owned: OwnedShard) -> None:
        """Write all of a shard to hot state and point readers at it. Raises Fenced; AWAY errors."""
        number, epoch = owned.lease.shard, owned.lease.epoch
        if not await self.write_all_positions(owned):
            return
        slots = self._host.book.slots_of(number)
        owned.sequence += 1  # these marks are newer than any flushed before them
        owned.flushed_sequence = owned.sequence
        now_ns = self.as_of_ns
        marks = self._host.book.marks(slots, now_ns, owned.sequence)
        await self._host.hot.write_marks(number, epoch, slots, marks)
        if not await self._host.hot.advance(number, epoch, self._host.shards.owner, now_ns):
            self._host.lose(owned.lease, "hot state has a newer epoch")
            return
        self._host.book.touch(slots)
        owned.published = True

    async def write_all_positions(self, owned: OwnedShard) -> bool:
        """Write every position of a shard from the ledger, with the Book's day bases; False when fenced."""
        portfolios, owned.loaded = owned.loaded, None
        if portfolios is None:
            portfolios = (await self._load(owned.lease)).portfolios
        for start in range(0, len(portfolios), PORTFOLIOS_PER_STEP_MAX):
            part = portfolios[start : start + PORTFOLIOS_PER_STEP_MAX]
            if not await self._write(owned, [self._all_positions(portfolio) for portfolio in part]):
                return False
        return True

    async def write_positions(self, owned: OwnedShard, changes: Sequence[PositionsChange]) -> None:
        """Write what a batch changed; when Redis is away the whole shard is published again later."""
        if not changes or not owned.published:
            return
        try:
            await self._write(owned, changes)
        except AWAY as error:
            _log.warning("positions_unwritten", shard=owned.lease.shard, reason=type(error).__name__)
            owned.published = False

    async def settle(self, owned: OwnedShard) -> None:
        """Bring the ledger and hot state what they lack of a shard. Raises Fenced; AWAY errors."""
        await self.store_cuts(owned)
        if not owned.published:
            await self.publish(owned)
        elif owned.positions_due and time.monotonic() - owned.positions_written_at_s >= self._positions_interval_s:
            # Cleared first: a day cut may come while they are written, and makes them due again.
            owned.positions_due = False
            owned.positions_written_at_s = time.monotonic()
            try:
                await self.write_all_positions(owned)
            except BaseException:
                owned.positions_due, owned.positions_written_at_s = True, -math.inf
                raise

    async def store_cuts(self, owned: OwnedShard) -> None:
        """Give the ledger the day bases it does not have yet. Raises Fenced; AWAY errors."""
        while owned.cuts_due:
            cut_at_ns, baselines = owned.cuts_due[0]
            await self._host.shards.store_cut(owned.lease, to_datetime(cut_at_ns), baselines)
            owned.cuts_due.pop(0)

    async def _write(self, owned: OwnedShard, changes: Sequence[PositionsChange]) -> bool:
        if await self._host.hot.write_positions(owned.lease.shard, owned.lease.epoch, changes):
            return True
        self._host.lose(owned.lease, "hot state has a newer epoch")
        return False

    def _open(self, shard: int, portfolio: LoadedPortfolio) -> None:
        book = self._host.book
        book.open(portfolio.portfolio_id, shard, portfolio.account, portfolio.holdings)
        book.begin_day(portfolio.portfolio_id, portfolio.day_cut, portfolio.day_cut_at_ns)
        for symbol, day_base in portfolio.closed_day_bases.items():
            book.keep_closed_day_base(portfolio.portfolio_id, symbol, day_base)
        self._host.hot.layout.place(book.slot(portfolio.portfolio_id), portfolio.portfolio_id)

    def place(self, portfolio_id: str, day_cut: str) -> None:
        """Begin the day of a portfolio that the Book has just taken in, and lay out its hot row."""
        book = self._host.book
        book.begin_day(portfolio_id, day_cut, self._time.last_cut(day_cut))
        self._host.hot.layout.place(book.slot(portfolio_id), portfolio_id)

    def _all_positions(self, portfolio: LoadedPortfolio) -> PositionsChange:
        book, name = self._host.book, portfolio.portfolio_id
        positions = {
            held.symbol: hot_position(
                portfolio.positions[held.symbol],
                book.position_day_base(name, held.symbol) if name in book else held.day_base,
                self._host.actions.splits_of(held.symbol),
            )
            for held in portfolio.holdings
        }
        sectors = allocation(book, name, self._host.sectors.sector_of) if name in book else {}
        return PositionsChange(name, replace=True, closed=(), positions=positions, sectors=sectors)

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
        # A shard may have been let go, and its slots taken by others, since they were counted as changed.
        if self._host.owned.get(owned.lease.shard) is not owned or not owned.published:
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
