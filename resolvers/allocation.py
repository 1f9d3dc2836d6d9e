"""Allocation of a portfolio by sector, asset class and industry, its exposure and concentration (engine.sectors): as a
field, at present or as of an instant, and as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import from_micro, present
from engine.instants import to_datetime
from engine.sectors import Allocation as Allocated
from engine.sectors import SectorValue, Slice, allocation_of, slices_of
from resolvers.context import Context, Info
from resolvers.mark_messages import AS_OF, CONFLATED, EPOCH, SEQUENCE
from resolvers.nav import not_ready
from resolvers.position_streams import Present, follow_positions
from resolvers.sectors import WEIGHT_DECIMALS
from resolvers.stream_kind import StreamKind
from resolvers.streams import RATE_HZ_DEFAULT

NO_WEIGHTS: Mapping[str, Decimal] = {}


@strawberry.type(description="A group's share of a portfolio: a sector's, an asset class's or an industry's.")
class AllocationSlice:
    name: str = strawberry.field(
        description="The sector, class or industry; UNCLASSIFIED where nobody has said what it is."
    )
    value: Decimal = strawberry.field(
        description="Σ marketValue of the group's positions in the base currency; shorts count negative."
    )
    gross: Decimal = strawberry.field(description="Σ |marketValue| of the group's positions.")
    weight: Decimal = strawberry.field(
        description="gross / Σ gross of all groups: ≥ 0, and 1 in sum, also with short positions."
    )
    weight_at_last_fill: Decimal | None = strawberry.field(
        description=(
            "In bySector the weight at the portfolio's last fill or corporate action, by the classification in force; "
            "null for a sector not held then, for classes and industries, and under asOf."
        )
    )


@strawberry.type(
    description=(
        "How a portfolio's positions are spread. Slices come largest weight first; without positions that are worth "
        "anything there are none. Amounts are in the base currency."
    )
)
class Allocation:
    by_sector: list[AllocationSlice] = strawberry.field(description="By the assets' sector.")
    by_asset_class: list[AllocationSlice] = strawberry.field(description="By the assets' class.")
    by_industry: list[AllocationSlice] = strawberry.field(description="By the assets' industry.")
    long_exposure: Decimal = strawberry.field(description="Σ marketValue of the long positions.")
    short_exposure: Decimal = strawberry.field(description="Σ marketValue of the short positions; 0 or negative.")
    gross_exposure: Decimal = strawberry.field(description="longExposure − shortExposure.")
    net_exposure: Decimal = strawberry.field(description="longExposure + shortExposure.")
    concentration: Decimal | None = strawberry.field(
        description=(
            "Herfindahl index: Σ (|marketValue| / grossExposure)² over the positions. 1 for a single position, 1/n "
            "for n of the same size; null without grossExposure."
        )
    )


@strawberry.type(description="A message of allocationUpdates: the whole allocation.")
class AllocationUpdate:
    kind: StreamKind = strawberry.field(description="Why this message was sent.")
    portfolio_id: str = strawberry.field(description="The portfolio.")
    allocation: Allocation = strawberry.field(description="Its allocation at the latest quotes.")
    as_of: datetime = strawberry.field(description=AS_OF)
    epoch: int = strawberry.field(description=EPOCH)
    sequence: int = strawberry.field(description=SEQUENCE)
    conflated: int = strawberry.field(description=CONFLATED)


async def load_allocation(context: Context, place: tuple[int, str]) -> Allocation:
    """Raises PublicError NOT_READY."""
    valued, at_last_fill = await asyncio.gather(context.hot.valued_positions(place), context.hot.sectors(place))
    if valued is None:
        raise not_ready()
    assets = await context.hot.assets(valued.symbols)
    held = [(assets[symbol], valued.value(symbol).value) for symbol in valued.symbols]
    return _show(allocation_of(held), at_last_fill)


async def allocation_updates(
    info: Info, portfolio_id: str, max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[AllocationUpdate]:
    context = info.context
    portfolio = await context.portfolio(portfolio_id)
    assets = context.services.assets
    shown: Allocation | None = None

    def compose(news: Present) -> AllocationUpdate | None:
        nonlocal shown
        held = [(assets.get(row.symbol), row.value) for row in news.positions]
        allocation = _show(allocation_of(held), news.sectors_at_last_fill)
        if allocation == shown and not news.due:
            return None
        if allocation != shown and news.kind is StreamKind.HEARTBEAT:
            news = replace(news, kind=StreamKind.UPDATE)
        shown = allocation
        return _show_update(portfolio_id, news, allocation)

    async with aclosing(follow_positions(context, portfolio, max_rate_hz, compose)) as updates:
        async for update in updates:
            yield update


def _show(allocation: Allocated, at_last_fill: Mapping[str, SectorValue]) -> Allocation:
    exposure, concentration = allocation.exposure, allocation.concentration
    before = {held.name: present(held.weight, WEIGHT_DECIMALS) for held in slices_of(at_last_fill)}
    return Allocation(
        by_sector=_slices(allocation.by_sector, before),
        by_asset_class=_slices(allocation.by_asset_class, NO_WEIGHTS),
        by_industry=_slices(allocation.by_industry, NO_WEIGHTS),
        long_exposure=from_micro(exposure.long),
        short_exposure=from_micro(exposure.short),
        gross_exposure=from_micro(exposure.gross),
        net_exposure=from_micro(exposure.net),
        concentration=None if concentration is None else present(concentration, WEIGHT_DECIMALS),
    )


def _slices(slices: Iterable[Slice], at_last_fill: Mapping[str, Decimal]) -> list[AllocationSlice]:
    return [
        AllocationSlice(
            name=held.name,
            value=from_micro(held.value),
            gross=from_micro(held.gross),
            weight=present(held.weight, WEIGHT_DECIMALS),
            weight_at_last_fill=at_last_fill.get(held.name),
        )
        for held in slices
    ]


def _show_update(portfolio_id: str, news: Present, allocation: Allocation) -> AllocationUpdate:
    return AllocationUpdate(
        kind=news.kind,
        portfolio_id=portfolio_id,
        allocation=allocation,
        as_of=to_datetime(news.mark.as_of_ns),
        epoch=news.mark.epoch,
        sequence=news.mark.sequence,
        conflated=news.conflated,
    )
