"""P&L as a stream: what a portfolio gained and lost, realised, unrealised and since the day cut (engine.marks)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import EXACT
from engine.amounts import from_micro as show_amount
from engine.marks import RATIO_SCALE, Mark
from engine.runtime.clock import to_datetime
from resolvers.context import Info
from resolvers.enums import MarkQuality
from resolvers.streams import RATE_HZ_DEFAULT, StreamKind, mark_updates

_RATIO_UNIT = Decimal(RATIO_SCALE)


@strawberry.type(description="A message of pnlUpdates: the portfolio's P&L at one mark, in the base currency.")
class PnlUpdate:
    kind: StreamKind = strawberry.field(description="Why this message was sent.")
    portfolio_id: str = strawberry.field(description="The portfolio.")
    unrealized_pnl: Decimal = strawberry.field(description="positionsValue − Σ cost of the open positions.")
    realized_pnl: Decimal = strawberry.field(
        description="Gross P&L realised by all fills since the portfolio was opened; fees are not part of it."
    )
    fees: Decimal = strawberry.field(description="Fees paid since the portfolio was opened; ≥ 0.")
    day_pnl: Decimal = strawberry.field(
        description="NAV − NAV at the day cut − external flows (deposits, withdrawals, rewards) since the cut."
    )
    day_pnl_ratio: Decimal | None = strawberry.field(
        description="Time-weighted return since the day cut as a fraction (0.01 is 1 %); null where undefined."
    )
    day_cut_at: datetime = strawberry.field(description="The day cut that dayPnl counts from.")
    quality: MarkQuality = strawberry.field(description="The worst quality among the prices behind this figure.")
    as_of: datetime = strawberry.field(description="When the mark was made.")
    epoch: int = strawberry.field(description="Grows with every change of the shard's owner.")
    sequence: int = strawberry.field(description="Grows with every flush that changed the mark, within an epoch.")
    ledger_sequence: int = strawberry.field(
        description="How many of the portfolio's ledger entries the figures include."
    )
    conflated: int = strawberry.field(
        description="How many marks this message stands for, itself included; 0 for HEARTBEAT."
    )


def show_ratio(mark: Mark) -> Decimal | None:
    """The day's return as a fraction; None where it is undefined."""
    ratio = mark.day_pnl_ratio_e12
    return None if ratio is None else EXACT.divide(Decimal(ratio), _RATIO_UNIT)


async def pnl_updates(
    info: Info, portfolio_id: str, max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[PnlUpdate]:
    portfolio = await info.context.portfolio(portfolio_id)
    async for update in mark_updates(info, portfolio, max_rate_hz, _show):
        yield update


def _show(portfolio_id: str, mark: Mark, kind: StreamKind, conflated: int) -> PnlUpdate:
    return PnlUpdate(
        kind=kind,
        portfolio_id=portfolio_id,
        unrealized_pnl=show_amount(mark.unrealized),
        realized_pnl=show_amount(mark.realized),
        fees=show_amount(mark.fees),
        day_pnl=show_amount(mark.day_pnl),
        day_pnl_ratio=show_ratio(mark),
        day_cut_at=to_datetime(mark.day_cut_at_ns),
        quality=mark.quality,
        as_of=to_datetime(mark.as_of_ns),
        epoch=mark.epoch,
        sequence=mark.sequence,
        ledger_sequence=mark.ledger_sequence,
        conflated=conflated,
    )
