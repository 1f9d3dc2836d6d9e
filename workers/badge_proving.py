"""Badges of an evaluator's portfolios, from what an event or a price changed to the transaction that proves it.

    booking    `prover` follows a batch in its transaction, `booked` takes in what it proved once it is committed
    flush      `look` compares the NAVs of the changed rows, and of all rows at a snapshot, and keeps what was found
    events     `prove_due`, between batches: writes what flushes found, and looks at positions that are due, and at
               the holders of assets that have come to another sector

Memory follows the ledger: after a failure of which nobody knows whether it was committed, the same is written again,
and counts once. A NAV that was reached is kept until it is written, also when the shard is read again meanwhile and the
NAV is less by then. What a process found and had not written when it died is found again by the next owner, who flushes
every row at take-over and loads every due date. The ledger says of each shard up to which version of the assets its
badges were looked at: what was loaded since, whoever was there or nobody, is looked at by whoever owns the shard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from typing import Protocol

import numpy as np

from engine.badge_book import BadgeBook
from engine.badges import Proof, Rule
from engine.book import Book
from engine.book_columns import Int64s
from engine.booking import Booked
from engine.instants import to_datetime
from engine.runtime import telemetry
from engine.stores.badges_postgres import BadgesStore, BatchProver
from engine.stores.ledger_postgres import Fenced, Lease
from engine.stores.shard_loading import LoadedShard
from workers.owned_shard import OwnedShard
from workers.sector_map import SectorMap

# How much one transaction proves; the rest has its turn right after.
PER_TRANSACTION_MAX = 500


class Host(Protocol):
    """What proving needs of the evaluator it belongs to."""

    book: Book
    owned: dict[int, OwnedShard]
    sectors: SectorMap

    def lose(self, lease: Lease, reason: str) -> None: ...

    def is_leaving(self, shard: int) -> bool: ...


class BadgeProving:
    def __init__(self, store: BadgesStore, host: Host) -> None:
        self._store = store
        self._host = host
        self.book = BadgeBook()
        # By shard, in the order in which they were found, and by portfolio and badge: the first one counts.
        self._found: dict[int, dict[tuple[str, str], Proof]] = {}
        # By shard: the newest version of an asset that its badges were looked at with.
        self._classified: dict[int, int] = {}

    @property
    def rules(self) -> Sequence[Rule]:
        """The current version of each badge."""
        return self.book.rules

    async def open(self) -> None:
        """Read the rules, before any shard is taken. Raises AWAY errors."""
        self.book.set_rules(await self._store.rules())

    # -- shards ----------------------------------------------------------------------------------------------

    def take(self, shard: int, loaded: LoadedShard, start: int, slots: Int64s) -> None:
        """Portfolios that the Book has just taken in at these slots, from a place on, with what they have met."""
        for place, slot in enumerate(slots.tolist(), start):
            name = loaded.portfolio_ids[place]
            self.book.open(name, shard, slot, loaded.badges.get(name, {}), loaded.oldest(place))

    def drop(self, shard: int) -> None:
        """Forget a shard's portfolios, to take in what the ledger has; what was found is still true, and kept."""
        self.book.drop_shard(shard)
        self._classified.pop(shard, None)

    def let_go(self, shard: int) -> None:
        """Forget all of a shard; what was found and not written is somebody else's to find."""
        self.drop(shard)
        self._found.pop(shard, None)

    # -- with the bookings -----------------------------------------------------------------------------------

    def prover(self, shard: int) -> BatchProver:
        """To follow one batch of a shard in its transaction."""
        turn = self.book.turn(shard, self._host.book, self._host.sectors.sector_of)
        return BatchProver(self._store.topic, turn)

    def booked(self, prover: BatchProver, booked: Booked) -> None:
        """A batch is committed, and posted to the Book."""
        self.book.accept_turn(prover.turn, booked, self._host.book)
        _count(prover.turn.proofs)

    # -- at flush --------------------------------------------------------------------------------------------

    def look(self, owned: OwnedShard, slots: Int64s, as_of_ns: int) -> None:
        """Find NAVs that prove something among the rows of a shard that are about to be flushed."""
        for proof in self.book.rich(slots, self._host.book, to_datetime(as_of_ns)):
            place = proof.portfolio_id, proof.transition.rule.badge_id
            self._found.setdefault(owned.lease.shard, {}).setdefault(place, proof)

    # -- between batches -------------------------------------------------------------------------------------

    async def prove_due(self, as_of_ns: int) -> None:
        """Write what was found, and look at what is due. Raises AWAY errors; it is all tried again then."""
        at = to_datetime(as_of_ns)
        for owned in list(self._host.owned.values()):
            if self._host.is_leaving(owned.lease.shard):
                continue
            try:
                await self._prove_found(owned)
                await self._prove_reclassified(owned, at)
                await self._prove_held(owned, at)
            except Fenced as error:
                self._host.lose(owned.lease, str(error))

    async def _prove_found(self, owned: OwnedShard) -> None:
        found = self._found.get(owned.lease.shard)
        while found:
            proofs = list(islice(found.values(), PER_TRANSACTION_MAX))
            await self._store.prove(owned.lease, proofs)
            for proof in proofs:
                del found[proof.portfolio_id, proof.transition.rule.badge_id]
            self.book.accept(proofs)
            _count(proofs)

    async def _prove_held(self, owned: OwnedShard, at: datetime) -> None:
        while names := self.book.take_due(owned.lease.shard, at, PER_TRANSACTION_MAX):
            try:
                oldest, proofs = await self._store.prove_held(
                    owned.lease, names, lambda one: self.book.held_long(one, at)
                )
            except BaseException:
                self.book.give_back(names, at)
                raise
            self.book.accept(proofs)
            for one in oldest:
                self.book.looked_at(one)
            _count(proofs)

    async def _prove_reclassified(self, owned: OwnedShard, at: datetime) -> None:
        """Nothing is booked meanwhile: the events loop is here."""
        shard, newest = owned.lease.shard, self._host.sectors.arrival
        if shard not in self._classified:
            self._classified[shard] = await self._store.classified_arrival(shard)
        if newest <= self._classified[shard]:
            return
        symbols = self._host.sectors.reclassified_since(self._classified[shard])
        if symbols:
            names = self._holders(shard, symbols)
            for start in range(0, len(names), PER_TRANSACTION_MAX):
                await self._prove_sectors(owned, names[start : start + PER_TRANSACTION_MAX], at)
                await asyncio.sleep(0)
            await self._store.note_classified(owned.lease, newest)
        self._classified[shard] = newest

    def _holders(self, shard: int, symbols: Iterable[str]) -> list[str]:
        book = self._host.book
        slots = np.unique(np.concatenate([book.holders(symbol) for symbol in symbols]))
        return book.portfolio_ids(slots[book.shard[slots] == shard])

    async def _prove_sectors(self, owned: OwnedShard, names: Iterable[str], at: datetime) -> None:
        book, sector_of = self._host.book, self._host.sectors.sector_of
        proofs = [proof for name in names for proof in self.book.reclassified(name, book, sector_of, at)]
        if proofs:
            await self._store.prove(owned.lease, proofs)
            self.book.accept(proofs)
            _count(proofs)


def _count(proofs: Iterable[Proof]) -> None:
    for proof in proofs:
        telemetry.BADGES_PROVED.labels(proof.transition.rule.badge_id, proof.transition.kind.value).inc()
