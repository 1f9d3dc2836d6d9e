"""Posting in steps: a committed batch into the Book and its positions into hot state, some portfolios at a time.

Between two steps others have their turn, so that a large batch makes no flush late. A portfolio is brought from one
state to the next without a pause; it is held back from flushes until hot state has its positions, the others are not.

Nothing else is booked on the shard, and no boundary passed, until all of the batch is posted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

import numpy as np

from engine.book import Book
from engine.book_columns import Int64s
from engine.booking import Booked
from engine.posting import post
from workers.corporate_actions import ActionSchedule
from workers.flusher import Flusher
from workers.hot_positions import HotPositions
from workers.owned_shard import OwnedShard
from workers.sector_map import SectorMap

PORTFOLIOS_PER_STEP = 25  # some 2 ms of this process


class Host(Protocol):
    """What posting needs of the evaluator."""

    book: Book
    actions: ActionSchedule
    sectors: SectorMap
    positions: HotPositions

    @property
    def flusher(self) -> Flusher: ...


async def post_in_steps(host: Host, owned: OwnedShard, booked: Booked, cash_alone: bool = True) -> None:
    """Post a batch. `cash_alone`: also the allocation of portfolios of which cash alone moved is written."""
    changes = post(host.book, owned.lease.shard, booked, host.sectors.sector_of, host.actions.splits_of)
    while part := list(islice(changes, PORTFOLIOS_PER_STEP)):
        for change in part:
            opened = booked.opened.get(change.portfolio_id)
            if opened is not None:
                host.flusher.place(change.portfolio_id, opened.day_cut)
        with host.flusher.holding(owned, slots_in(host.book, [change.portfolio_id for change in part])):
            await host.positions.write(owned, [change for change in part if cash_alone or change.is_of_positions])
        await asyncio.sleep(0)


def slots_in(book: Book, portfolio_ids: Iterable[str]) -> Int64s:
    """The slots of those of the portfolios that the Book has."""
    return np.array([book.slot(name) for name in portfolio_ids if name in book], np.int64)
