"""Positions that were closed: cycles from flat to flat (engine.portfolio), the last one first."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import from_micro
from engine.portfolio import ClosedPosition as EngineClosedPosition
from engine.stores.ledger_reads import SEQUENCE_MAX, PortfolioIdentity
from resolvers.as_of import PastLoader
from resolvers.assets import Asset, show_asset
from resolvers.context import Context
from resolvers.pages import Connection, check_first, connection, read_sequence_cursor, write_cursor
from resolvers.positions import PositionSide


@strawberry.type(
    description=(
        "A position that came to its end: from the fill that opened it to the entry that made it flat or crossed 0. "
        "Amounts are in the base currency."
    )
)
class ClosedPosition:
    asset: Asset = strawberry.field(description="What was held.")
    side: PositionSide = strawberry.field(description="Which side it was closed from.")
    realized_pnl: Decimal = strawberry.field(description="Gross P&L that its fills realised, by average cost.")
    fees: Decimal = strawberry.field(
        description="The fees of its fills; that of a fill that crossed 0 belongs to the position that it closed."
    )
    realized_pnl_net: Decimal = strawberry.field(description="realizedPnl − fees.")
    opened_at: datetime = strawberry.field(description="When its first fill was executed, as its source says.")
    closed_at: datetime = strawberry.field(description="When its last entry was effective, as its source says.")
    holding_seconds: float = strawberry.field(
        description="closedAt − openedAt in seconds; 0 where the sources' instants run backwards."
    )
    opened_sequence: int = strawberry.field(description="The ledger entry that opened it.")
    closed_sequence: int = strawberry.field(description="The ledger entry that closed it.")


async def load_closed_positions(
    context: Context, portfolio: PortfolioIdentity, first: int, after: str | None, past: PastLoader | None
) -> Connection[ClosedPosition]:
    """A page of them; as of `past` those closed by then. Raises PublicError PAGE_SIZE, BAD_CURSOR."""
    services = context.services
    first = check_first(first, services.settings.page_size_max)
    before = SEQUENCE_MAX if after is None else read_sequence_cursor("closedPositions", after)
    if past is not None:
        before = min(before, await past.ledger_sequence() + 1)
    rows = await services.ledger.closed_positions(portfolio.portfolio_id, first + 1, before)
    await services.assets.ensure(row.symbol for row in rows)
    return connection(rows, first, after, _cursor, lambda row: _show(context, row))


def _show(context: Context, closed: EngineClosedPosition) -> ClosedPosition:
    return ClosedPosition(
        asset=show_asset(context.services.assets.get(closed.symbol)),
        side=PositionSide.LONG if closed.is_long else PositionSide.SHORT,
        realized_pnl=from_micro(closed.realized),
        fees=from_micro(closed.fees),
        realized_pnl_net=from_micro(closed.realized - closed.fees),
        opened_at=closed.opened_at,
        closed_at=closed.closed_at,
        holding_seconds=max(0.0, (closed.closed_at - closed.opened_at).total_seconds()),
        opened_sequence=closed.opened_sequence,
        closed_sequence=closed.closed_sequence,
    )


def _cursor(closed: EngineClosedPosition) -> str:
    return write_cursor("closedPositions", closed.closed_sequence)
