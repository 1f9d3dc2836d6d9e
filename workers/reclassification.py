"""Reclassified assets, as an evaluator learns of them: their holders' allocations are another one from then on.

Looked for every CHECK_INTERVAL_S, between batches of events, so that no allocation is written that is older than one
of a fill. Which positions there are does not change. A shard that is taken over has all its allocations written again
when they are of older classifications (workers.hot_positions); badges follow on their own (workers.badge_proving).
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from engine.book import Book
from engine.posting import PositionsChange, allocation
from engine.runtime import telemetry
from workers.hot_positions import HotPositions
from workers.owned_shard import OwnedShard
from workers.sector_map import SectorMap

CHECK_INTERVAL_S = 2.0
PORTFOLIOS_PER_WRITE_MAX = 500


class Host(Protocol):
    """What is needed of the evaluator."""

    book: Book
    owned: dict[int, OwnedShard]
    sectors: SectorMap
    positions: HotPositions


class Reclassification:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._checked_at_s = 0.0

    async def follow(self) -> None:
        """Learn what was loaded since the last check, when one is due. Raises AWAY errors."""
        if time.monotonic() - self._checked_at_s < CHECK_INTERVAL_S:
            return
        symbols = await self._host.sectors.refresh()
        self._checked_at_s = time.monotonic()
        if not symbols:
            return
        telemetry.RECLASSIFIED.inc(len(symbols))
        book = self._host.book
        slots = np.unique(np.concatenate([book.holders(symbol) for symbol in symbols]))
        shards = book.shard[slots]
        for owned in list(self._host.owned.values()):
            await self._write(owned, book.portfolio_ids(slots[shards == owned.lease.shard]))

    async def _write(self, owned: OwnedShard, portfolio_ids: list[str]) -> None:
        book, sector_of = self._host.book, self._host.sectors.sector_of
        for start in range(0, len(portfolio_ids), PORTFOLIOS_PER_WRITE_MAX):
            changes = [
                PositionsChange(name, replace=False, closed=(), positions={}, sectors=allocation(book, name, sector_of))
                for name in portfolio_ids[start : start + PORTFOLIOS_PER_WRITE_MAX]
                if name in book
            ]
            await self._host.positions.write(owned, changes)
