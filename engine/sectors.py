"""Sector allocation of a portfolio.

    value(sector)  = Σ value of its positions (signed; Σ over sectors = Σ over positions)
    gross(sector)  = Σ |value| of its positions
    weight(sector) = gross(sector) / Σ gross, so weights are ≥ 0 and sum to 1 also with short positions;
                     for a portfolio without shorts it is the share of its positions' value

No positions, or none worth anything: no slices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

import msgspec

from engine.amounts import EXACT


class SectorValue(msgspec.Struct, frozen=True, array_like=True):
    """Exact amounts of one sector in micro-units, as hot state keeps them."""

    value: int
    gross: int


sector_value_encoder = msgspec.msgpack.Encoder()
sector_value_decoder: msgspec.msgpack.Decoder[SectorValue] = msgspec.msgpack.Decoder(SectorValue)


@dataclass(frozen=True, slots=True)
class SectorSlice:
    sector: str
    value: int
    gross: int
    weight: Decimal


def allocate(values: Iterable[tuple[str, int]]) -> list[SectorSlice]:
    """Allocation of positions given as (sector, value in micro-units), largest weight first, then by name."""
    sums: dict[str, tuple[int, int]] = {}
    for sector, value in values:
        net, gross = sums.get(sector, (0, 0))
        sums[sector] = (net + value, gross + abs(value))
    return slices_of({sector: SectorValue(net, gross) for sector, (net, gross) in sums.items()})


def slices_of(sectors: dict[str, SectorValue]) -> list[SectorSlice]:
    """Slices with weights from exact sector values, largest first, then by name."""
    whole = sum(held.gross for held in sectors.values())
    if not whole:
        return []
    slices = [
        SectorSlice(sector, held.value, held.gross, EXACT.divide(Decimal(held.gross), Decimal(whole)))
        for sector, held in sectors.items()
    ]
    return sorted(slices, key=lambda held: (-held.gross, held.sector))
