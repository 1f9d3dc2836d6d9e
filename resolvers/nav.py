"""NAV: what a portfolio is worth at one instant (engine.marks), as a valuation and as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import from_micro
from engine.marks import Mark
from engine.runtime.clock import to_datetime
from resolvers.context import Context, Info
from resolvers.enums import MarkQuality
from resolvers.errors import ErrorCode, PublicError
from resolvers.pnl import show_ratio
from resolvers.streams import RATE_HZ_DEFAULT, StreamKind, mark_updates

NAV = "Net asset value = cash + positionsValue, in the base currency. Exact to the micro-unit."
CASH = "Cash after all booked ledger entries, in the base currency; may be negative."
POSITIONS_VALUE = "Σ round(quantity × price, 6 decimals) over open positions; short positions count negative."
QUALITY = "The worst quality among the prices behind this figure."
AS_OF = "When the mark was made."
EPOCH = "Grows with every change of the shard's owner; (epoch, sequence) orders a portfolio's marks."
SEQUENCE = "Grows with every flush of the shard that changed the mark; begins anew with each epoch."
LEDGER_SEQUENCE = "How many of the portfolio's ledger entries the figures include."
CONFLATED = "How many marks this message stands for: those since the last message, itself included; 0 for HEARTBEAT."


@strawberry.type(
    description=(
        "What the portfolio is worth at one consistent instant. Amounts are in the base currency. "
        "nav = cash + positionsValue."
    )
)
class Valuation:
    nav: Decimal = strawberry.field(description=NAV)
    cash: Decimal = strawberry.field(description=CASH)
    positions_value: Decimal = strawberry.field(description=POSITIONS_VALUE)
    unrealized_pnl: Decimal = strawberry.field(description="positionsValue − Σ cost of the open positions.")
    realized_pnl: Decimal = strawberry.field(
        description="Gross P&L realised by all fills since the portfolio was opened; fees are not part of it."
    )
    fees: Decimal = strawberry.field(description="Fees paid since the portfolio was opened; ≥ 0.")
    day_pnl: Decimal = strawberry.field(
        description="nav − NAV at the day cut − external flows (deposits, withdrawals, rewards) since the cut."
    )
    day_pnl_ratio: Decimal | None = strawberry.field(
        description="Time-weighted return since the day cut as a fraction (0.01 is 1 %); null where undefined."
    )
    day_cut_at: datetime = strawberry.field(description="The day cut that dayPnl counts from.")
    quality: MarkQuality = strawberry.field(description=QUALITY)
    as_of: datetime = strawberry.field(description=AS_OF)
    epoch: int = strawberry.field(description=EPOCH)
    sequence: int = strawberry.field(description=SEQUENCE)
    ledger_sequence: int = strawberry.field(description=LEDGER_SEQUENCE)


@strawberry.type(description="A message of navUpdates: the portfolio's NAV at one mark.")
class NavUpdate:
    kind: StreamKind = strawberry.field(description="Why this message was sent.")
    portfolio_id: str = strawberry.field(description="The portfolio.")
    nav: Decimal = strawberry.field(description=NAV)
    cash: Decimal = strawberry.field(description=CASH)
    positions_value: Decimal = strawberry.field(description=POSITIONS_VALUE)
    quality: MarkQuality = strawberry.field(description=QUALITY)
    as_of: datetime = strawberry.field(description=AS_OF)
    epoch: int = strawberry.field(description=EPOCH)
    sequence: int = strawberry.field(description=SEQUENCE)
    ledger_sequence: int = strawberry.field(description=LEDGER_SEQUENCE)
    conflated: int = strawberry.field(description=CONFLATED)


async def load_valuation(context: Context, place: tuple[int, str]) -> Valuation:
    """Raises PublicError NOT_READY as long as the portfolio has no mark."""
    mark = await context.hot.mark(place)
    if mark is None:
        raise not_ready()
    return Valuation(
        nav=from_micro(mark.nav),
        cash=from_micro(mark.cash),
        positions_value=from_micro(mark.positions_value),
        unrealized_pnl=from_micro(mark.unrealized),
        realized_pnl=from_micro(mark.realized),
        fees=from_micro(mark.fees),
        day_pnl=from_micro(mark.day_pnl),
        day_pnl_ratio=show_ratio(mark),
        day_cut_at=to_datetime(mark.day_cut_at_ns),
        quality=mark.quality,
        as_of=to_datetime(mark.as_of_ns),
        epoch=mark.epoch,
        sequence=mark.sequence,
        ledger_sequence=mark.ledger_sequence,
    )


def not_ready() -> PublicError:
    return PublicError(ErrorCode.NOT_READY, "the portfolio has no mark yet; try again shortly")


async def nav_updates(
    info: Info, portfolio_id: str, max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[NavUpdate]:
    portfolio = await info.context.portfolio(portfolio_id)
    async for update in mark_updates(info, portfolio, max_rate_hz, _show):
        yield update


def _show(portfolio_id: str, mark: Mark, kind: StreamKind, conflated: int) -> NavUpdate:
    return NavUpdate(
        kind=kind,
        portfolio_id=portfolio_id,
        nav=from_micro(mark.nav),
        cash=from_micro(mark.cash),
        positions_value=from_micro(mark.positions_value),
        quality=mark.quality,
        as_of=to_datetime(mark.as_of_ns),
        epoch=mark.epoch,
        sequence=mark.sequence,
        ledger_sequence=mark.ledger_sequence,
        conflated=conflated,
    )
