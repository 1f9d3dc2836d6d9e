"""From the Book to hot state: take-over, flush, day cut, heartbeat.

Every `flush_interval_ms` the waiting quotes are applied to the Book and, per owned shard, the changed marks are
written by one HSET and published as one frame. A shard is published in full when it is taken over and when Redis
forgot it: positions and marks under its epoch first, then the pointer, then a frame with every row. Until then it
is not flushed; its changes wait in the Book.

The day cut is taken between quotes: those stamped before it are applied, the bases are set, the others follow.
Its baselines are kept until PostgreSQL has them.

What reads the ledger (`take`, `publish`, `settle`) is called by the evaluator's events loop alone, between
batches, so that positions read there are never older than what was written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from engine.amounts import AmountError, parse_number
from engine.book import Book
from engine.marks import FrameHeader, MarkArray
from engine.messages import Quote
from engine.posting import PositionsChange, allocation, hot_position
from engine.runtime import telemetry
from engine.runtime.clock import DAY_NS, SECOND_NS, Clock, to_datetime, to_ns
from engine.runtime.connections import AWAY, Outage, stopped_within
from engine.runtime.settings import Settings
from engine.stores.hot_state_redis import FlushOutcome, HotStateWriter
from engine.stores.ledger_postgres import Lease
from engine.stores.shards_postgres import Baseline, LoadedPortfolio, Shards
from workers.quote_intake import QuoteIntake
from workers.sector_map import SectorMap

_log = structlog.get_logger(__name__)

HEARTBEAT_INTERVAL_S = 1.0
STALE_CHECK_INTERVAL_S = 1.0
PORTFOLIOS_PER_STEP_MAX = 500  # how much of a take-over runs before other tasks get their turn


@dataclass(slots=True)
class OwnedShard:
    """A shard of ours: its lease, where to read on, its last frame, and what others still lack of it."""

    lease: Lease
    next_offset: int
    sequence: int = 0
    flushed_at_s: float = 0.0
    published: bool = False
    positions_due: bool = False
    # True while a batch is on its way from the ledger to hot positions: a mark is never ahead of its positions.
    posting: bool = False
    cuts_due: list[tuple[int, list[Baseline]]] = field(default_factory=list)
    # What `take` read, for the `settle` right after it: nothing is booked in between.
    loaded: Sequence[LoadedPortfolio] | None = None


class Host(Protocol):
    """What the flusher needs of the evaluator it belongs to."""

    book: Book
    owned: dict[int, OwnedShard]
    quotes: QuoteIntake
    hot: HotStateWriter
    shards: Shards
    sectors: SectorMap

    def lose(self, shard: int, reason: str) -> None: ...


class Flusher:
    def __init__(self, settings: Settings, clock: Clock, host: Host) -> None:
        self._settings = settings
        self._clock = clock
        self._host = host
        self._stale_checked_at_s = 0.0
        self._outage = Outage("redis")

    # -- called by the events loop ---------------------------------------------------------------------------

    async def take(self, lease: Lease) -> OwnedShard:
        """Load a shard into the Book, in place of what it held of it. Raises Fenced; AWAY errors of the ledger."""
        book = self._host.book
        self._cut_when_due(self._day_cut_at_ns())
        loaded = await self._host.shards.load(lease, to_datetime(book.day_cut_at_ns))
        if loaded.cut_at is not None and to_ns(loaded.cut_at) > book.day_cut_at_ns:
            # Its former owner's clock was ahead of ours over a cut: the day never goes back.
            self._cut_when_due(to_ns(loaded.cut_at))
            loaded = await self._host.shards.load(lease, to_datetime(book.day_cut_at_ns))
        book.drop_shard(lease.shard)
        for start in range(0, len(loaded.portfolios), PORTFOLIOS_PER_STEP_MAX):
            for portfolio in loaded.portfolios[start : start + PORTFOLIOS_PER_STEP_MAX]:
                self._open(lease.shard, portfolio)
            await asyncio.sleep(0)
        owned = OwnedShard(lease, loaded.next_offset, loaded=loaded.portfolios)
        if loaded.cut_at is None or to_ns(loaded.cut_at) != book.day_cut_at_ns:
            self._cut_shard(owned, book.day_cut_at_ns)
        return owned

    async def publish(self, owned: OwnedShard) -> None:
        """Write all of a shard to hot state and point readers at it. Raises Fenced; AWAY errors."""
        number, epoch = owned.lease.shard, owned.lease.epoch
        if not await self.write_all_positions(owned):
            return
        slots = self._host.book.slots_of(number)
        owned.sequence += 1  # these marks are newer than any flushed before them
        await self._host.hot.write_marks(number, epoch, slots, self._marks(slots, owned.sequence))
        now_ns = self._clock.now_ns()
        if not await self._host.hot.advance(number, epoch, self._host.shards.owner, now_ns):
            self._host.lose(number, "hot state has a newer epoch")
            return
        self._host.book.touch(slots)
        owned.published = True

    async def write_all_positions(self, owned: OwnedShard) -> bool:
        """Write every position of a shard from the ledger, with the Book's day bases; False when fenced."""
        portfolios, owned.loaded = owned.loaded, None
        if portfolios is None:
            cut_at = to_datetime(self._host.book.day_cut_at_ns)
            portfolios = (await self._host.shards.load(owned.lease, cut_at)).portfolios
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
        elif owned.positions_due:
            # Cleared first: a day cut may come while they are written, and makes them due again.
            owned.positions_due = False
            try:
                await self.write_all_positions(owned)
            except BaseException:
                owned.positions_due = True
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
        self._host.lose(owned.lease.shard, "hot state has a newer epoch")
        return False

    def _open(self, shard: int, portfolio: LoadedPortfolio) -> None:
        book = self._host.book
        for holding in portfolio.holdings:
            last = self._host.quotes.last(holding.symbol)
            if last is not None and book.price(holding.symbol) is None:
                self._tick(last)
        book.open(portfolio.portfolio_id, shard, portfolio.account, portfolio.holdings)
        for symbol, day_base in portfolio.closed_day_bases.items():
            book.keep_closed_day_base(portfolio.portfolio_id, symbol, day_base)
        self.place(portfolio.portfolio_id)

    def place(self, portfolio_id: str) -> None:
        """Lay out the hot row of a portfolio that the Book has just taken in."""
        self._host.hot.layout.place(self._host.book.slot(portfolio_id), portfolio_id)

    def _all_positions(self, portfolio: LoadedPortfolio) -> PositionsChange:
        book, name = self._host.book, portfolio.portfolio_id
        positions = {
            held.symbol: hot_position(
                held.quantity,
                held.cost,
                portfolio.realized[held.symbol],
                book.position_day_base(name, held.symbol) if name in book else held.day_base,
                portfolio.opened_at[held.symbol],
            )
            for held in portfolio.holdings
        }
        sectors = allocation(book, name, self._host.sectors.sector_of) if name in book else []
        return PositionsChange(name, replace=True, closed=(), positions=positions, sectors=sectors)

    # -- the flush loop --------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Flush every interval until `stop` is set, then once more."""
        interval_s = self._settings.flush_interval_ms / 1_000
        due_s = time.monotonic()
        while not stop.is_set():
            await self.flush()
            due_s = max(due_s + interval_s, time.monotonic())
            await stopped_within(stop, due_s - time.monotonic())
        await self.flush()

    async def flush(self) -> None:
        """Apply what waits, then write and publish what changed."""
        self._cut_when_due(self._day_cut_at_ns())
        oldest_event_ns = self._apply(self._host.quotes.take())
        self._flag_stale()
        changed = self._host.book.changed()
        shard_of = self._host.book.shard[changed]
        ready = [owned for owned in self._host.owned.values() if owned.published and not owned.posting]
        await asyncio.gather(
            *(self._flush_shard(owned, changed[shard_of == owned.lease.shard], oldest_event_ns) for owned in ready)
        )

    async def _flush_shard(self, owned: OwnedShard, slots: NDArray[np.int64], oldest_event_ns: int) -> None:
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
        previous, owned.sequence = owned.sequence, owned.sequence + 1
        now_ns = self._clock.now_ns()
        lease = owned.lease
        header = FrameHeader(lease.shard, lease.epoch, owned.sequence, previous, now_ns, oldest_event_ns)
        try:
            outcome = await self._host.hot.flush(header, slots, book.marks(slots, now_ns, owned.sequence))
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
        if outcome is FlushOutcome.FENCED:
            self._host.lose(lease.shard, "hot state has a newer epoch")
        elif outcome is FlushOutcome.LOST:
            _log.warning("hot_state_lost", shard=lease.shard)
            owned.published = False

    def _marks(self, slots: NDArray[np.int64], sequence: int) -> MarkArray:
        return self._host.book.marks(slots, self._clock.now_ns(), sequence)

    def _apply(self, quotes: Sequence[Quote]) -> int:
        """Bring quotes into the Book; returns the oldest one's instant, 0 when none moved anything."""
        moved = [quote.ts_event_ns for quote in quotes if self._tick(quote)]
        telemetry.QUOTES_APPLIED.inc(len(quotes))
        return min(moved, default=0)

    def _tick(self, quote: Quote) -> int:
        try:
            price = parse_number(quote.price, "price")
            if price <= 0:
                raise AmountError("NOT_POSITIVE", "price is not positive")
            return self._host.book.tick(quote.symbol, price, quote.ts_event_ns)
        except AmountError as error:
            telemetry.QUOTES_REFUSED.inc()
            _log.warning("quote_refused", symbol=quote.symbol, price=quote.price, reason=str(error))
            return 0

    def _flag_stale(self) -> None:
        now_s = time.monotonic()
        if now_s - self._stale_checked_at_s >= STALE_CHECK_INTERVAL_S:
            self._stale_checked_at_s = now_s
            self._host.book.flag_stale(self._clock.now_ns(), self._settings.stale_after_s * SECOND_NS)

    # -- the day cut -----------------------------------------------------------------------------------------

    def _day_cut_at_ns(self) -> int:
        """The last 00:00 UTC."""
        return self._clock.now_ns() // DAY_NS * DAY_NS

    def _cut_when_due(self, cut_at_ns: int) -> None:
        """Begin the day of `cut_at_ns` unless it, or a later one, has begun."""
        book = self._host.book
        if cut_at_ns <= book.day_cut_at_ns:
            return
        self._apply(self._host.quotes.take(before_ns=cut_at_ns))
        book.begin_day(cut_at_ns)
        for owned in self._host.owned.values():
            self._cut_shard(owned, cut_at_ns)
            owned.positions_due = True
        _log.info("day_cut", cut_at=to_datetime(cut_at_ns).isoformat(), portfolios=len(book))

    def _cut_shard(self, owned: OwnedShard, cut_at_ns: int) -> None:
        """Set a shard's day bases to the present values and keep them for the ledger."""
        book = self._host.book
        book.cut(owned.lease.shard)
        slots = book.slots_of(owned.lease.shard)
        baselines = [
            Baseline(
                name,
                book.nav(name),
                int(book.ledger_sequence[slot]),
                {held.symbol: held.value for held in book.held(name)},
            )
            for slot, name in zip(slots.tolist(), book.portfolio_ids(slots), strict=True)
        ]
        owned.cuts_due.append((cut_at_ns, baselines))
