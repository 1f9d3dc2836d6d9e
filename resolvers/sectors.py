"""Sector allocation of a portfolio (engine.sectors): at the latest quotes, and as it was at the last fill."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import strawberry

from engine.amounts import from_micro, present
from engine.sectors import allocate, slices_of
from resolvers.context import Context
from resolvers.nav import not_ready

WEIGHT_DECIMALS = 10


@strawberry.type(
    description=(
        "One sector's share of a portfolio. Weights are shares of Σ |value|, so they are ≥ 0 and sum to 1 also "
        "with short positions; without shorts they are shares of positionsValue."
    )
)
class SectorSlice:
    sector: str = strawberry.field(description="The sector of the assets in this slice.")
    value: Decimal = strawberry.field(
        description="Σ marketValue of the sector's positions in the base currency; shorts count negative."
    )
    weight: Decimal = strawberry.field(
        description="Σ |marketValue| of the sector / Σ |marketValue| of all positions, at the latest quotes."
    )
    weight_at_last_fill: Decimal | None = strawberry.field(
        description="The weight at the portfolio's last fill; null for a sector not held then."
    )


async def load_sectors(context: Context, place: tuple[int, str]) -> list[SectorSlice]:
    """Slices, largest weight first; none without positions. Raises PublicError NOT_READY."""
    valued, at_last_fill = await asyncio.gather(context.hot.valued_positions(place), context.hot.sectors(place))
    if valued is None:
        raise not_ready()
    assets = await context.hot.assets(valued.symbols)
    live = allocate((assets[symbol].sector, valued.value(symbol).value) for symbol in valued.symbols)
    before = {held.name: present(held.weight, WEIGHT_DECIMALS) for held in slices_of(at_last_fill)}
    return [
        SectorSlice(
            sector=held.name,
            value=from_micro(held.value),
            weight=present(held.weight, WEIGHT_DECIMALS),
            weight_at_last_fill=before.get(held.name),
        )
        for held in live
    ]
