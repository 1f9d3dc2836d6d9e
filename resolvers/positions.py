"""Positions of a portfolio at the latest quotes (engine.positions), as pages and as a stream of what changed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

import strawberry

from engine.amounts import from_micro
from engine.instants import to_datetime
from engine.positions import PositionValuation
from engine.stores.ledger_reads import HeldCycle
from resolvers.assets import Asset, show_asset
from resolvers.context import SCOPE_LEDGER_READ, Context, Info
from resolvers.enums import MarkQuality
from resolvers.fields import resolved
from resolvers.lots import Lot, ShownPosition, show_lot
from resolvers.mark_messages import AS_OF, CONFLATED, EPOCH, SEQUENCE
from resolvers.nav import not_ready
from resolvers.pages import Connection, check_first, connection, read_cursor, write_cursor
from resolvers.position_streams import Present, follow_positions
from resolvers.stream_kind import StreamKind
from resolvers.streams import RATE_HZ_DEFAULT


class PositionSide(StrEnum):
    LONG = "LONG"
    SHORT = "SHORT"


strawberry.enum(PositionSide, description="LONG: quantity above 0. SHORT: quantity below 0.")


@strawberry.type(
    description=(
        "An open position at the latest quote of its asset. Amounts are in the base currency and signed like the "
        "quantity: a short position's value is negative. A flat position is not shown."
    )
)
class Position:
    held: strawberry.Private[PositionValuation]
    shown: strawberry.Private[ShownPosition]
    asset: Asset = strawberry.field(description="What is held.")

    @resolved("The sign of the quantity.")
    def side(self) -> PositionSide:
        return PositionSide.LONG if self.held.quantity > 0 else PositionSide.SHORT

    @resolved("Signed quantity: above 0 long, below 0 short.")
    def quantity(self) -> Decimal:
        return self.held.quantity

    @resolved("costBasis / quantity, per unit, without fees; reducing a position leaves it as it is.")
    def average_cost(self) -> Decimal:
        return self.held.average_cost

    @resolved(
        "The last good price, in today's shares: one quoted before a split is divided by the split's ratio. Null "
        "when there never was one."
    )
    def price(self) -> Decimal | None:
        return self.held.price

    @resolved("When the price was quoted; null without a price.")
    def price_as_of(self) -> datetime | None:
        return None if self.held.price_as_of_ns is None else to_datetime(self.held.price_as_of_ns)

    @resolved("How good the price is now, by the asset's class and hours.")
    def quality(self) -> MarkQuality:
        return self.held.quality

    @resolved("Σ signed notionals of the open quantity, without fees.")
    def cost_basis(self) -> Decimal:
        return from_micro(self.held.cost)

    @resolved("round(quantity × price, 6 decimals); the cost basis as long as there is no price.")
    def market_value(self) -> Decimal:
        return from_micro(self.held.value)

    @resolved("marketValue − costBasis.")
    def unrealized_pnl(self) -> Decimal:
        return from_micro(self.held.unrealized)

    @resolved("unrealizedPnl / |costBasis| as a fraction; null when the cost is 0.")
    def unrealized_pnl_ratio(self) -> Decimal | None:
        return self.held.unrealized_ratio

    @resolved("Gross P&L realised by fills of this position since it was last flat.")
    def realized_pnl(self) -> Decimal:
        return from_micro(self.held.realized)

    @resolved("marketValue − value at the day cut − Σ signed notionals traded since the cut.")
    def day_pnl(self) -> Decimal:
        return from_micro(self.held.day_pnl)

    @resolved("marketValue / NAV as a fraction, negative for a short; null when the NAV is 0.")
    def weight(self) -> Decimal | None:
        return self.held.weight

    @resolved(
        "Which purchases it consists of, first in, first out, oldest first; derived from the ledger. Needs the scope "
        "ledger:read."
    )
    async def lots(self, info: Info) -> list[Lot]:
        info.context.require(SCOPE_LEDGER_READ)
        return [show_lot(lot) for lot in await info.context.lots.load(self.shown)]


@strawberry.type(description="A message of positionUpdates: the positions that were filled or quoted since the last.")
class PositionUpdate:
    kind: StreamKind = strawberry.field(description="Why this message was sent.")
    portfolio_id: str = strawberry.field(description="The portfolio.")
    positions: list[Position] = strawberry.field(
        description=(
            "The positions that changed, by symbol; all with SNAPSHOT and RESET, none with HEARTBEAT, and perhaps none "
            "with an UPDATE after an outage."
        )
    )
    closed_symbols: list[str] = strawberry.field(description="Symbols whose position became flat.")
    as_of: datetime = strawberry.field(description=AS_OF)
    epoch: int = strawberry.field(description=EPOCH)
    sequence: int = strawberry.field(description=SEQUENCE)
    conflated: int = strawberry.field(description=CONFLATED)


async def load_positions(
    context: Context, place: tuple[int, str], first: int, after: str | None
) -> Connection[Position]:
    """A page of positions in symbol order. Raises PublicError PAGE_SIZE, BAD_CURSOR, NOT_READY."""
    first = check_first(first, context.services.settings.page_size_max)
    begin = "" if after is None else read_cursor("positions", after)
    valued = await context.hot.valued_positions(place)
    if valued is None:
        raise not_ready()
    # Only the page is valued: a portfolio may hold thousands.
    rows = [valued.value(symbol) for symbol in valued.symbols[bisect_right(valued.symbols, begin) :][: first + 1]]
    sequence = valued.mark.ledger_sequence
    return connection(rows, first, after, _cursor, lambda row: show_position(context, place[1], sequence, row))


def show_position(context: Context, portfolio_id: str, ledger_sequence: int, held: PositionValuation) -> Position:
    """The position as shown beside a mark of `ledger_sequence`."""
    cycle = HeldCycle(portfolio_id, held.symbol, held.opened_sequence)
    return Position(
        held=held,
        shown=ShownPosition(cycle, held.quantity, ledger_sequence),
        asset=show_asset(context.services.assets.get(held.symbol)),
    )


async def position_updates(
    info: Info, portfolio_id: str, max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[PositionUpdate]:
    context = info.context
    portfolio = await context.portfolio(portfolio_id)

    def compose(present: Present) -> PositionUpdate | None:
        if not (present.changes or present.closed or present.due):
            return None
        return _show_update(context, portfolio_id, present)

    async with aclosing(follow_positions(context, portfolio, max_rate_hz, compose)) as updates:
        async for update in updates:
            yield update


def _cursor(row: PositionValuation) -> str:
    return write_cursor("positions", row.symbol)


def _show_update(context: Context, portfolio_id: str, present: Present) -> PositionUpdate:
    mark = present.mark
    return PositionUpdate(
        kind=present.kind,
        portfolio_id=portfolio_id,
        positions=[show_position(context, portfolio_id, mark.ledger_sequence, row) for row in present.changes],
        closed_symbols=list(present.closed),
        as_of=to_datetime(mark.as_of_ns),
        epoch=mark.epoch,
        sequence=mark.sequence,
        conflated=present.conflated,
    )
