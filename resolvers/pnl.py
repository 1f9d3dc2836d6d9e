"""P&L as a stream: what a portfolio gained and lost, realised, unrealised and since the day cut (engine.marks).

Each UPDATE says what changed NAV since the message that this subscription was sent before it (engine.explain): the
changes of all UPDATEs between two messages sum to the difference of their NAVs, however many marks were conflated.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import from_micro
from engine.explain import SUMS, Parts, between
from engine.marks import Mark
from resolvers.context import Info
from resolvers.fields import resolved
from resolvers.mark_messages import MARK_FIELDS, ChangeField, Fields, Head, MarkField, MarkMessage, Shown, figures
from resolvers.streams import RATE_HZ_DEFAULT, mark_updates

# Field of NavParts → attribute of engine.explain.Parts.
_PARTS = {
    "price": "price",
    "trading": "trading",
    "fees": "fees",
    "income": "income",
    "flows": "flows",
    "corporate_actions": "corporate",
}


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
class PnlUpdate(MarkMessage):
    mark: strawberry.Private[Mark]
    before: strawberry.Private[Mark | None]
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

    @resolved(
        "What changed NAV since the last SNAPSHOT, UPDATE or RESET of this subscription. Null with SNAPSHOT, RESET and "
        "HEARTBEAT, which are compared with nothing."
    )
    def change(self) -> PnlChange | None:
        return None if self.before is None else _show_change(between(self.before, self.mark))


PNL_FIELDS: Fields = MARK_FIELDS | {
    "unrealized_pnl": MarkField("unrealized", Shown.AMOUNT),
    "realized_pnl": MarkField("realized", Shown.AMOUNT),
    "fees": MarkField("fees", Shown.AMOUNT),
    "day_pnl": MarkField("day_pnl", Shown.AMOUNT),
    "day_pnl_ratio": MarkField("day_pnl_ratio_e12", Shown.RATIO),
    "day_cut_at": MarkField("day_cut_at_ns", Shown.INSTANT),
    "change": ChangeField(
        columns=SUMS,
        parts=_PARTS | {"nav": "nav_change"},
    ),
}


def show_parts(parts: Parts) -> NavParts:
    return NavParts(**_amounts(parts, _PARTS))


def _show_change(parts: Parts) -> PnlChange:
    return PnlChange(**_amounts(parts, _PARTS), nav=from_micro(parts.nav_change))


def _amounts(parts: Parts, names: Mapping[str, str]) -> dict[str, Decimal]:
    return {name: from_micro(getattr(parts, attribute)) for name, attribute in names.items()}


async def pnl_updates(
    info: Info, portfolio_id: str, max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[PnlUpdate]:
    portfolio = await info.context.portfolio(portfolio_id)
    async for update in mark_updates(info, portfolio, max_rate_hz, PNL_FIELDS, _show):
        yield update


def _show(head: Head, mark: Mark, before: Mark | None) -> PnlUpdate:
    return PnlUpdate(mark=mark, before=before, **figures(PNL_FIELDS, head, mark))
