"""P&L as a stream: what a portfolio gained and lost, realised, unrealised and since the day cut (engine.marks).

Each UPDATE says what changed NAV since the message that this subscription was sent before it (engine.explain): the
changes of all UPDATEs between two messages sum to the difference of their NAVs, however many marks were conflated.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import EXACT
from engine.amounts import from_micro as show_amount
from engine.explain import Parts, between
from engine.marks import RATIO_SCALE, Mark
from engine.runtime.clock import to_datetime
from resolvers.context import Info
from resolvers.enums import MarkQuality
from resolvers.fields import resolved
from resolvers.streams import RATE_HZ_DEFAULT, StreamKind, mark_updates

_RATIO_UNIT = Decimal(RATIO_SCALE)


@strawberry.type(
    description=(
        "A change of NAV in parts that sum to it exactly: price + trading + fees + income + flows + corporateActions. "
        "Amounts are in the base currency."
    )
)
class NavParts:
    price: Decimal = strawberry.field(description="What the prices' own movement did to what was held.")
    trading: Decimal = strawberry.field(
        description="Σ over fills of (quantity × (market price then − fill price)), signed: fills against the market."
    )
    fees: Decimal = strawberry.field(description="Fees of fills and fees booked by themselves; ≤ 0.")
    income: Decimal = strawberry.field(description="Interest, and dividends from their ex-date on.")
    flows: Decimal = strawberry.field(description="Deposits + rewards − withdrawals; never P&L.")
    corporate_actions: Decimal = strawberry.field(
        description="What splits did to NAV: 0 but for rounding, or for one that arrived late."
    )


@strawberry.type(description="Why NAV changed since the last message: nav is the sum of the other six.")
class PnlChange(NavParts):
    nav: Decimal = strawberry.field(description="NAV − NAV of the message before, in the base currency.")


@strawberry.type(description="A message of pnlUpdates: the portfolio's P&L at one mark, in the base currency.")
class PnlUpdate:
    mark: strawberry.Private[Mark]
    before: strawberry.Private[Mark | None]
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

    @resolved(
        "What changed NAV since the last SNAPSHOT, UPDATE or RESET of this subscription. Null with SNAPSHOT, RESET and "
        "HEARTBEAT, which are compared with nothing."
    )
    def change(self) -> PnlChange | None:
        return None if self.before is None else _show_change(between(self.before, self.mark))


def show_ratio(mark: Mark) -> Decimal | None:
    """The day's return as a fraction; None where it is undefined."""
    ratio = mark.day_pnl_ratio_e12
    return None if ratio is None else EXACT.divide(Decimal(ratio), _RATIO_UNIT)


def show_parts(parts: Parts) -> NavParts:
    return NavParts(
        price=show_amount(parts.price),
        trading=show_amount(parts.trading),
        fees=show_amount(parts.fees),
        income=show_amount(parts.income),
        flows=show_amount(parts.flows),
        corporate_actions=show_amount(parts.corporate),
    )


async def pnl_updates(
    info: Info, portfolio_id: str, max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[PnlUpdate]:
    portfolio = await info.context.portfolio(portfolio_id)
    sent: Mark | None = None

    def show(portfolio_id: str, mark: Mark, kind: StreamKind, conflated: int) -> PnlUpdate:
        before = sent if kind is StreamKind.UPDATE else None
        return _show(portfolio_id, mark, before, kind, conflated)

    async for update in mark_updates(info, portfolio, max_rate_hz, show, _compared):
        if update.kind is not StreamKind.HEARTBEAT:
            sent = update.mark
        yield update


def _compared(update: PnlUpdate, name: str) -> object:
    """What has to differ from the message before to be worth another: of a change, what it changes."""
    mark = update.mark
    if name == "change":
        return mark.nav, mark.trading, mark.fees, mark.income, mark.flows, mark.corporate
    return getattr(update, name)


def _show(portfolio_id: str, mark: Mark, before: Mark | None, kind: StreamKind, conflated: int) -> PnlUpdate:
    return PnlUpdate(
        mark=mark,
        before=before,
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


def _show_change(parts: Parts) -> PnlChange:
    return PnlChange(nav=show_amount(parts.nav_change), **vars(show_parts(parts)))
