"""Hot positions and sectors of the shards that this evaluator owns: what a batch changed, and all of them again.

What a batch changed is written right after it. All of a shard's positions are written again, from the ledger and with
the Book's day bases, when Redis does not have them and when something else in them than the ledger has changed:

    a day cut          every day base
    a split            the list of splits, also where the quantity stayed
    classifications    the sectors, where nobody was there to follow (workers.reclassification)

The shard's `basis` names these three. Hot state is told of it when all positions have it, so that the next owner knows
what it need not write. It is done PORTFOLIOS_PER_STEP at a time, one step between two batches; meanwhile positions may
have the day bases of the cut before. They are never behind the marks in what the ledger says: batches see to that.

Everything here is called by the events loop alone, between batches, so that positions read from the ledger are never
older than those written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import structlog

from engine.book import Book
from engine.portfolio import Position
from engine.posting import PositionsChange, hot_position
from engine.runtime.clock import Clock, MarketClock
from engine.runtime.connections import AWAY
from engine.sectors import sum_up
from engine.stores.hot_state_former import FormerHotState
from engine.stores.hot_state_redis import HotStateWriter
from engine.stores.ledger_postgres import Lease
from engine.stores.shards_postgres import Shards
from workers.corporate_actions import ActionSchedule
from workers.owned_shard import OwnedShard, Rewriting
from workers.sector_map import SectorMap

_log = structlog.get_logger(__name__)

# A recorded market cuts several days a second: what all positions are rewritten for, their day P&L, follows this late.
RECORDED_POSITIONS_INTERVAL_S = 3.0
PORTFOLIOS_PER_STEP = 200  # some 20 ms of this process, in which nothing is flushed
# New classifications that moved nobody's sectors are told of this late; until then a new owner would write too much.
BASIS_CHECK_INTERVAL_S = 1.0


class Host(Protocol):
    """What is needed of the evaluator."""

    book: Book
    owned: dict[int, OwnedShard]
    hot: HotStateWriter
    former: FormerHotState
    shards: Shards
    sectors: SectorMap
    actions: ActionSchedule

    def lose(self, lease: Lease, reason: str) -> None: ...


class HotPositions:
    def __init__(self, clock: Clock, host: Host) -> None:
        self._host = host
        self._interval_s = RECORDED_POSITIONS_INTERVAL_S if isinstance(clock, MarketClock) else 0

    async def write(self, owned: OwnedShard, changes: Sequence[PositionsChange]) -> None:
        """Write what a batch changed; when Redis is away the shard is published again later."""
        if not changes or not owned.published:
            return
        try:
            await self._write(owned, changes)
        except AWAY as error:
            _log.warning("positions_unwritten", shard=owned.lease.shard, reason=type(error).__name__)
            owned.published = False

    async def write_again(self, owned: OwnedShard, portfolio_ids: Sequence[str]) -> bool:
        """Write all positions of some portfolios, step by step; False when fenced. Raises AWAY errors."""
        for start in range(0, len(portfolio_ids), PORTFOLIOS_PER_STEP):
            part = portfolio_ids[start : start + PORTFOLIOS_PER_STEP]
            held = await self._host.shards.positions(part)
            if not await self._write(owned, [self._all_of(name, held[name]) for name in part]):
                return False
        return True

    async def go_on(self, owned: OwnedShard) -> None:
        """Take the next step of what is due of a published shard. Raises AWAY errors."""
        now_s = time.monotonic()
        if owned.rewriting is None and owned.positions_due and now_s - owned.positions_written_at_s >= self._interval_s:
            # Cleared first: a day cut may come while they are written, and makes them due again.
            owned.positions_due, owned.positions_written_at_s = False, now_s
            slots = self._host.book.slots_of(owned.lease.shard)
            owned.rewriting = Rewriting(self.basis(owned.lease.shard), self._host.book.portfolio_ids(slots))
        if owned.rewriting is not None:
            left = owned.rewriting.left
            if await self.write_again(owned, left[-PORTFOLIOS_PER_STEP:]):
                del left[-PORTFOLIOS_PER_STEP:]
                if not left:
                    await self.tell_basis(owned, owned.rewriting.basis)
                    owned.rewriting = None
        elif not owned.positions_due and now_s - owned.basis_checked_at_s >= BASIS_CHECK_INTERVAL_S:
            owned.basis_checked_at_s = now_s
            basis = self.basis(owned.lease.shard)
            if basis != owned.basis:
                await self.tell_basis(owned, basis)

    def basis(self, shard: int) -> str:
        """What positions of a shard that are written now are made with, besides the ledger.

        The latest cut stands for all of them: whose day begins anew, begins it at a later instant than any before.
        """
        book = self._host.book
        cut_at_ns = int(np.max(book.day_cut_at_ns[book.slots_of(shard)], initial=0))
        return f"{cut_at_ns}/{self._host.actions.splits_digest()}/{self._host.sectors.arrival}"

    async def tell_basis(self, owned: OwnedShard, basis: str) -> None:
        """All positions of the shard have this basis. Raises AWAY errors."""
        if await self._host.former.set_basis(owned.lease.shard, owned.lease.epoch, basis):
            owned.basis = basis

    async def _write(self, owned: OwnedShard, changes: Sequence[PositionsChange]) -> bool:
        if await self._host.hot.write_positions(owned.lease.shard, owned.lease.epoch, changes):
            return True
        owned.published = False  # before anything else: no mark may say that these were written
        self._host.lose(owned.lease, "hot state has a newer epoch")
        return False

    def _all_of(self, portfolio_id: str, held: dict[str, Position]) -> PositionsChange:
        splits_of, sector_of = self._host.actions.splits_of, self._host.sectors.sector_of
        valued = self._host.book.held(portfolio_id)
        day_bases = {one.symbol: one.day_base for one in valued}
        positions = {
            symbol: hot_position(position, day_bases[symbol], splits_of(symbol)) for symbol, position in held.items()
        }
        sectors = sum_up((sector_of(one.symbol), one.value) for one in valued)
        return PositionsChange(portfolio_id, replace=True, closed=(), positions=positions, sectors=sectors)
