"""Taking a shard over: from the ledger into the Book, and from the Book to readers.

    take       read the shard as arrays, into the Book in place of what it held of it
    publish    1. claim the positions in hot state, so that nobody older writes them
               2. write those that hot state does not have at their ledger sequence (engine.stores.hot_state_former)
               3. write all marks under this epoch, then move the pointer: readers see fresh marks
               4. write all positions again if their day bases, splits or sectors are of another basis
    settle     what the ledger and hot state lack of a shard, between two batches

Most of a dead owner's positions are right, so the second step writes few; a Redis that forgot the shard, and a shard
under repair, is written in full. A published shard's flushes bring a frame with every row. While a shard is loaded the
loop goes on every PORTFOLIOS_PER_STEP, so that others are flushed.

All of it is called by the events loop alone, between batches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import structlog

from engine.book_columns import Int64s
from engine.instants import to_datetime
from engine.runtime import telemetry
from engine.stores.hot_state_former import FormerState
from engine.stores.ledger_postgres import Lease
from engine.stores.shard_loading import LoadedShard
from workers.book_time import BookTime
from workers.hot_positions import HotPositions
from workers.owned_shard import Host, OwnedShard

_log = structlog.get_logger(__name__)

PORTFOLIOS_PER_STEP = 1_000  # into the Book at a time: some 10 ms
MARKS_PER_WRITE_MAX = 10_000  # one HSET blocks Redis for a few milliseconds


class TakeOver:
    def __init__(self, host: Host, positions: HotPositions, book_time: BookTime) -> None:
        self._host = host
        self._positions = positions
        self._time = book_time

    async def take(self, lease: Lease) -> OwnedShard:
        """Load a shard into the Book, in place of what it held of it. Raises Fenced; AWAY errors of the ledger."""
        with self._time.loading():
            while True:
                self._time.advance()
                with _timed("read"):
                    loaded = await self._host.shards.load(
                        lease, self._time.last_cut, self._time.quote_of, self._host.badges.rules
                    )
                with _timed("build"):
                    self._host.book.drop_shard(lease.shard)
                    self._host.badges.drop(lease.shard)
                    await self._open(lease.shard, loaded)
                if all(self._time.last_cut(day_cut) == cut_at for day_cut, cut_at in loaded.cuts.items()):
                    break
                _log.info("day_cut_while_loading", shard=lease.shard)
        self._host.interest.taken(lease.shard)
        owned = OwnedShard(lease, loaded.next_offset, is_under_repair=loaded.is_under_repair)
        owned.cuts_due += loaded.estimated
        return owned

    async def publish(self, owned: OwnedShard) -> None:
        """Write to hot state what it lacks of a shard and point readers at it. Raises AWAY errors."""
        number, epoch, book = owned.lease.shard, owned.lease.epoch, self._host.book
        with _timed("write"):
            former = await self._host.former.claim(number, epoch)
            if former is None:
                self._host.lose(owned.lease, "hot state has a newer epoch")
                return
            basis, slots = self._positions.basis(number), book.slots_of(number)
            is_whole = owned.is_under_repair or former.epoch is None or not former.basis
            # Set first: a day cut may come while the others are written.
            owned.positions_due, owned.rewriting, owned.basis = (
                not is_whole and basis != former.basis,
                None,
                former.basis,
            )
            behind = slots if is_whole else await self._behind(former, number, slots)
            if not await self._positions.write_again(owned, book.portfolio_ids(behind)):
                return
            owned.sequence += 1  # these marks are newer than any flushed before them
            owned.flushed_sequence = owned.sequence
            await self._write_marks(owned, slots)
            if not await self._host.hot.advance(number, epoch, self._host.shards.owner, self._time.as_of_ns):
                self._host.lose(owned.lease, "hot state has a newer epoch")
                return
            book.touch(slots)
            owned.published, owned.is_under_repair = True, False
        _log.info("shard_published", shard=number, epoch=epoch, portfolios=len(slots), positions_of=len(behind))

    async def settle(self, owned: OwnedShard) -> None:
        """Bring the ledger and hot state what they lack of a shard. Raises Fenced; AWAY errors."""
        await self.store_cuts(owned)
        if owned.published:
            await self._positions.go_on(owned)
        else:
            await self.publish(owned)

    async def store_cuts(self, owned: OwnedShard) -> None:
        """Give the ledger the day bases it does not have yet. Raises Fenced; AWAY errors."""
        while owned.cuts_due:
            cut_at_ns, baselines = owned.cuts_due[0]
            await self._host.shards.store_cut(owned.lease, to_datetime(cut_at_ns), baselines)
            owned.cuts_due.pop(0)

    async def _behind(self, former: FormerState, shard: int, slots: Int64s) -> Int64s:
        """The slots whose positions hot state does not have as the ledger has them."""
        assert former.epoch is not None
        book = self._host.book
        sequences = await self._host.former.ledger_sequences(shard, former.epoch, book.portfolio_ids(slots))
        behind: Int64s = slots[sequences != book.ledger_sequence[slots]]
        return behind

    async def _write_marks(self, owned: OwnedShard, slots: Int64s) -> None:
        lease, book = owned.lease, self._host.book
        for start in range(0, len(slots), MARKS_PER_WRITE_MAX):
            part = slots[start : start + MARKS_PER_WRITE_MAX]
            part = part[~book.out_of_range(part)]
            marks = book.marks(part, self._time.as_of_ns, owned.sequence)
            await self._host.hot.write_marks(lease.shard, lease.epoch, part, marks)

    async def _open(self, shard: int, loaded: LoadedShard) -> None:
        """Into the Book, with the days that have begun, into the layout of hot rows, and to the badges."""
        book, held, layout = self._host.book, loaded.positions, self._host.hot.layout
        slots = np.zeros(len(loaded.portfolio_ids), np.int64)
        for start in range(0, len(slots), PORTFOLIOS_PER_STEP):
            places = slice(start, min(start + PORTFOLIOS_PER_STEP, len(slots)))
            rows = slice(held.first[places.start], held.first[places.stop])
            names = loaded.portfolio_ids[places]
            slots[places] = book.open_many(
                shard,
                names,
                {name: of[places] for name, of in loaded.accounts.items()},
                loaded.symbols,
                held.holder[rows].astype(np.int64) - start,
                held.asset[rows].astype(np.int64),
                np.ascontiguousarray(held.quantity[rows]),
                held.decimals[rows].astype(np.int64),
                np.ascontiguousarray(held.cost[rows]),
                held.day_base[rows],
            )
            for number in np.unique(loaded.day_cut_of[places]).tolist():
                day_cut = loaded.day_cuts[number]
                book.begin_days(slots[places][loaded.day_cut_of[places] == number], day_cut, loaded.cuts[day_cut])
            layout.place_many(slots[places], names)
            self._host.badges.take(shard, loaded, start, slots[places])
            await asyncio.sleep(0)
        for place, symbol, day_base in loaded.closed_day_bases:
            book.keep_closed_day_base(loaded.portfolio_ids[place], symbol, day_base)


@contextmanager
def _timed(stage: str) -> Iterator[None]:
    """What a stage of a take-over took, by wall time."""
    began_s = time.monotonic()
    yield
    telemetry.TAKE_OVER.labels(stage).observe(time.monotonic() - began_s)
