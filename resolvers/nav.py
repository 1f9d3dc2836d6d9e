"""NAV: what a portfolio is worth at one instant (engine.marks), as a valuation and as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import from_micro, present
from engine.instants import to_datetime
from engine.marks import Mark
from engine.positions import PositionValuation, quality_shares
from resolvers.context import Context, Info
from resolvers.enums import MarkQuality
from resolvers.errors import ErrorCode, PublicError
from resolvers.fields import resolved
from resolvers.mark_messages import (
    AS_OF,
    EPOCH,
    LEDGER_SEQUENCE,
    MARK_FIELDS,
    QUALITY,
    SEQUENCE,
    Fields,
    Head,
    MarkField,
    MarkMessage,
    Shown,
    figures,
    show_ratio,
)
from resolvers.streams import RATE_HZ_DEFAULT, mark_updates

SHARE_DECIMALS = 10

NAV = "Net asset value = cash + receivables + positionsValue, in the base currency. Exact to the micro-unit."
CASH = "Cash after all booked ledger entries, in the base currency; may be negative."
RECEIVABLES = "Dividends accrued at their ex-date and not paid yet; below 0 where a short position owes them."
POSITIONS_VALUE = "Σ round(quantity × price, 6 decimals) over open positions; short positions count negative."


@strawberry.type(description="The part of a portfolio's positions whose prices are of one quality.")
class QualityShare:
    quality: MarkQuality = strawberry.field(description="The quality of the prices.")
    value: Decimal = strawberry.field(description="Σ |marketValue| of these positions, in the base currency.")
    share: Decimal = strawberry.field(description="value / Σ |marketValue| of all positions, as a fraction.")


@strawberry.type(
    description=(
        "What the portfolio is worth at one consistent instant. Amounts are in the base currency. "
        "nav = cash + receivables + positionsValue = flows + realizedPnl + unrealizedPnl + income − fees."
    )
)
class Valuation:
    load_positions: strawberry.Private[Callable[[], Awaitable[list[PositionValuation]]]]
    load_estimated: strawberry.Private[Callable[[], Awaitable[bool]]]
    nav: Decimal = strawberry.field(description=NAV)
    cash: Decimal = strawberry.field(description=CASH)
    receivables: Decimal = strawberry.field(description=RECEIVABLES)
    positions_value: Decimal = strawberry.field(description=POSITIONS_VALUE)
    unrealized_pnl: Decimal = strawberry.field(description="positionsValue − Σ cost of the open positions.")
    realized_pnl: Decimal = strawberry.field(
        description="Gross P&L realised by all fills since the portfolio was opened; fees are not part of it."
    )
    realized_pnl_net: Decimal = strawberry.field(
        description="realizedPnl − fees: all fees since the portfolio was opened, also those of positions still open."
    )
    fees: Decimal = strawberry.field(
        description="Fees of fills and fees booked by themselves since the portfolio was opened; ≥ 0."
    )
    income: Decimal = strawberry.field(
        description=(
            "Interest and dividends since the portfolio was opened, a dividend from its ex-date on; below 0 where "
            "short positions owed more than was received. Part of P&L."
        )
    )
    flows: Decimal = strawberry.field(
        description="External flows since the portfolio was opened: deposits + rewards − withdrawals. Never P&L."
    )
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

    @resolved(
        "Whether NAV at the day cut, which dayPnl counts from, is an estimate: nobody evaluated then, and some price "
        "of that instant was not recorded either."
    )
    async def day_pnl_estimated(self) -> bool:
        return await self.load_estimated()

    @resolved(
        "The qualities of its prices with the value they stand for, best first, at the latest quotes. The shares sum "
        "to 1 but for rounding in the tenth decimal; empty when the positions are worth nothing."
    )
    async def quality_shares(self) -> list[QualityShare]:
        return show_shares(await self.load_positions())

    @resolved("When the oldest of its prices was quoted, at the latest quotes; null without a priced position.")
    async def prices_as_of(self) -> datetime | None:
        quoted = [one.price_as_of_ns for one in await self.load_positions() if one.price_as_of_ns is not None]
        return to_datetime(min(quoted)) if quoted else None


@strawberry.type(description="A message of navUpdates: the portfolio's NAV at one mark.")
class NavUpdate(MarkMessage):
    nav: Decimal = strawberry.field(description=NAV)
    cash: Decimal = strawberry.field(description=CASH)
    receivables: Decimal = strawberry.field(description=RECEIVABLES)
    positions_value: Decimal = strawberry.field(description=POSITIONS_VALUE)


NAV_FIELDS: Fields = MARK_FIELDS | {
    "nav": MarkField("nav", Shown.AMOUNT),
    "cash": MarkField("cash", Shown.AMOUNT),
    "receivables": MarkField("receivables", Shown.AMOUNT),
    "positions_value": MarkField("positions_value", Shown.AMOUNT),
}


async def load_valuation(context: Context, place: tuple[int, str]) -> Valuation:
    """Raises PublicError NOT_READY as long as the portfolio has no mark."""
    mark = await context.hot.mark(place)
    if mark is None:
        raise not_ready()

    async def load_positions() -> list[PositionValuation]:
        valued = await context.hot.valued_positions(place)
        return [] if valued is None else [valued.value(symbol) for symbol in valued.symbols]

    async def load_estimated() -> bool:
        return await context.services.past.ledger.is_estimated(place[1], to_datetime(mark.day_cut_at_ns))

    return _show_valuation(mark, load_positions, load_estimated)


def _show_valuation(
    mark: Mark,
    load_positions: Callable[[], Awaitable[list[PositionValuation]]],
    load_estimated: Callable[[], Awaitable[bool]],
) -> Valuation:
    """What is loaded is so when a field asks for it."""
    return Valuation(
        load_positions=load_positions,
        load_estimated=load_estimated,
        nav=from_micro(mark.nav),
        cash=from_micro(mark.cash),
        receivables=from_micro(mark.receivables),
        positions_value=from_micro(mark.positions_value),
        unrealized_pnl=from_micro(mark.unrealized),
        realized_pnl=from_micro(mark.realized),
        realized_pnl_net=from_micro(mark.realized - mark.fees),
        fees=from_micro(mark.fees),
        income=from_micro(mark.income),
        flows=from_micro(mark.flows),
        day_pnl=from_micro(mark.day_pnl),
        day_pnl_ratio=show_ratio(mark.day_pnl_ratio_e12),
        day_cut_at=to_datetime(mark.day_cut_at_ns),
        quality=mark.quality,
        as_of=to_datetime(mark.as_of_ns),
        epoch=mark.epoch,
        sequence=mark.sequence,
        ledger_sequence=mark.ledger_sequence,
    )


def show_shares(positions: Iterable[PositionValuation]) -> list[QualityShare]:
    return [
        QualityShare(quality=held.quality, value=from_micro(held.value), share=present(held.share, SHARE_DECIMALS))
        for held in quality_shares(positions)
    ]


def not_ready() -> PublicError:
    return PublicError(ErrorCode.NOT_READY, "the portfolio has no mark yet; try again shortly")


async def nav_updates(
    info: Info, portfolio_id: str, max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[NavUpdate]:
    portfolio = await info.context.portfolio(portfolio_id)
    async for update in mark_updates(info, portfolio, max_rate_hz, NAV_FIELDS, _show):
        yield update


def _show(head: Head, mark: Mark, before: Mark | None) -> NavUpdate:
    return NavUpdate(**figures(NAV_FIELDS, head, mark))
