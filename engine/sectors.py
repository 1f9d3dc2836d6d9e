"""Allocation of a portfolio to sectors, or to whatever else its positions are grouped by, and its exposure.

    value(group)  = Σ value of its positions (signed; Σ over groups = Σ over positions)
    gross(group)  = Σ |value| of its positions
    weight(group) = gross(group) / Σ gross, so weights are ≥ 0 and sum to 1 also with short positions;
                    for a portfolio without shorts it is the share of its positions' value

    long, short   = Σ of the values above 0, Σ of those below 0 (≤ 0)
    gross, net    = long − short, long + short
    concentration = Σ (|value| / Σ |value|)² over positions (Herfindahl): 1 for one position, 1/n for n equal ones

No positions, or none worth anything: no slices, no concentration. Amounts are whole micro-units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import msgspec

from engine.amounts import EXACT
from engine.assets import UNCLASSIFIED, Asset


class SectorValue(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Exact amounts of one sector in micro-units, as hot state keeps them."""

    value: int
    gross: int


sector_value_encoder = msgspec.msgpack.Encoder()
sector_value_decoder: msgspec.msgpack.Decoder[SectorValue] = msgspec.msgpack.Decoder(SectorValue)


@dataclass(frozen=True, slots=True)
class Slice:
    """One group: a sector, an asset class or an industry, by its name."""

    name: str
    value: int
    gross: int
    weight: Decimal


@dataclass(frozen=True, slots=True)
class Exposure:
    """`short` ≤ 0, as short positions have negative values."""

    long: int
    short: int

    @property
    def gross(self) -> int:
        return self.long - self.short

    @property
    def net(self) -> int:
        return self.long + self.short


@dataclass(frozen=True, slots=True)
class Allocation:
    """A portfolio grouped in every way that its assets are classified in."""

    by_sector: Sequence[Slice]
    by_asset_class: Sequence[Slice]
    by_industry: Sequence[Slice]
    exposure: Exposure
    concentration: Decimal | None


def allocation_of(held: Sequence[tuple[Asset, int]]) -> Allocation:
    """The allocation of positions given as (asset, value). Without an industry an asset is UNCLASSIFIED in it."""
    values = [value for _, value in held]
    return Allocation(
        allocate((asset.sector, value) for asset, value in held),
        allocate((asset.asset_class.value, value) for asset, value in held),
        allocate((asset.industry or UNCLASSIFIED, value) for asset, value in held),
        exposure_of(values),
        concentration_of(values),
    )


def allocate(values: Iterable[tuple[str, int]]) -> list[Slice]:
    """Allocation of positions given as (group, value), largest weight first, then by name."""
    return slices_of(sum_up(values))


def sum_up(values: Iterable[tuple[str, int]]) -> dict[str, SectorValue]:
    """The sums by group of positions given as (group, value)."""
    net: dict[str, int] = {}
    gross: dict[str, int] = {}
    for name, value in values:
        net[name] = net.get(name, 0) + value
        gross[name] = gross.get(name, 0) + abs(value)
    return {name: SectorValue(value, gross[name]) for name, value in net.items()}


def slices_of(sums: Mapping[str, SectorValue]) -> list[Slice]:
    """Slices with weights from exact sums, largest first, then by name."""
    whole = sum(held.gross for held in sums.values())
    if not whole:
        return []
    slices = [
        Slice(name, held.value, held.gross, EXACT.divide(Decimal(held.gross), Decimal(whole)))
        for name, held in sums.items()
    ]
    return sorted(slices, key=lambda held: (-held.gross, held.name))


def ranks_of(sums: Mapping[str, SectorValue]) -> dict[str, float]:
    """The weights as the doubles next to them, which sum to 1 within 10⁻¹²: for ranking. None where nothing is worth
    anything."""
    whole = sum(held.gross for held in sums.values())
    return {name: held.gross / whole for name, held in sums.items()} if whole else {}


def exposure_of(values: Iterable[int]) -> Exposure:
    long = short = 0
    for value in values:
        if value > 0:
            long += value
        else:
            short += value
    return Exposure(long, short)


def concentration_of(values: Sequence[int]) -> Decimal | None:
    whole = sum(abs(value) for value in values)
    if not whole:
        return None
    return EXACT.divide(Decimal(sum(value * value for value in values)), Decimal(whole * whole))
