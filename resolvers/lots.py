"""The lots of an open position (engine.lots), read from the ledger when they are asked for.

Those of all positions of an operation are read together, LOTS_BATCH_COUNT_MAX positions a time, so that one answer
neither asks PostgreSQL for each nor holds all their entries at once. A position of more than LOTS_ENTRIES_MAX entries
since it was last flat is LOTS_TOO_LONG.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial

import strawberry
from strawberry.dataloader import DataLoader

from engine.amounts import from_micro
from engine.lots import Lot as EngineLot
from engine.lots import entries_shown, open_lots
from engine.stores.ledger_reads import CycleEntries, HeldCycle, LedgerReads
from resolvers.errors import ErrorCode, PublicError

LOTS_ENTRIES_MAX = 2_000
LOTS_BATCH_COUNT_MAX = 5


@dataclass(frozen=True, slots=True)
class ShownPosition:
    """A position as it is shown: its cycle, its quantity, and the ledger sequence of the mark beside it."""

    cycle: HeldCycle
    quantity: Decimal
    ledger_sequence: int


@strawberry.type(
    description=(
        "What is left of one purchase (of one sale, for a short position), first in, first out. Quantities are signed "
        "like the position's and in today's shares: splits since are in them."
    )
)
class Lot:
    opened_at: datetime = strawberry.field(description="When it was executed, as its source says.")
    ledger_sequence: int = strawberry.field(description="The ledger entry that it came with.")
    quantity: Decimal = strawberry.field(
        description="As bought; of a fill that crossed 0 the part that opened the position."
    )
    remaining: Decimal = strawberry.field(
        description="What later fills have left of it. Over all lots the sum is the position's quantity, exactly."
    )
    unit_cost: Decimal = strawberry.field(description="cost / remaining, without fees.")
    cost: Decimal = strawberry.field(
        description=(
            "The notional of what remains, signed, without fees. By FIFO, while the position's costBasis is by average "
            "cost: they differ once a part was sold."
        )
    )


class LotsLoader:
    """Lots of the positions that one operation shows."""

    def __init__(self, ledger: LedgerReads) -> None:
        # Not kept: a stream shows the same cycle again with other entries.
        self._loader: DataLoader[ShownPosition, list[EngineLot] | PublicError] = DataLoader(
            partial(_load, ledger, asyncio.Lock()), max_batch_size=LOTS_BATCH_COUNT_MAX, cache=False
        )

    async def load(self, position: ShownPosition) -> list[EngineLot]:
        """Raises PublicError LOTS_TOO_LONG, NOT_READY."""
        found = await self._loader.load(position)
        if isinstance(found, PublicError):
            raise found
        return found


async def _load(
    ledger: LedgerReads, turn: asyncio.Lock, positions: list[ShownPosition]
) -> list[list[EngineLot] | PublicError]:
    async with turn:
        cycles = await ledger.cycles([position.cycle for position in positions], LOTS_ENTRIES_MAX + 1)
    return [_lots(position, found) for position, found in zip(positions, cycles, strict=True)]


def _lots(position: ShownPosition, found: CycleEntries) -> list[EngineLot] | PublicError:
    if len(found.entries) > LOTS_ENTRIES_MAX:
        text = f"{position.cycle.symbol} has more than {LOTS_ENTRIES_MAX} ledger entries since it was last flat"
        return PublicError(ErrorCode.LOTS_TOO_LONG, text)
    entries = entries_shown(found.entries, position.quantity, position.ledger_sequence, found.head)
    if entries is None:
        return PublicError(ErrorCode.NOT_READY, "the position is changing; try again shortly")
    return open_lots(entries, position.quantity)


def show_lot(lot: EngineLot) -> Lot:
    return Lot(
        opened_at=lot.opened_at,
        ledger_sequence=lot.ledger_sequence,
        quantity=lot.quantity,
        remaining=lot.remaining,
        unit_cost=lot.unit_cost,
        cost=from_micro(lot.cost),
    )
