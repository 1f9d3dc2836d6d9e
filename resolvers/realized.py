"""What a portfolio realised, earned and paid between two instants, or since its day cut.

What counts is what was booked after the one and up to and with the other (engine.as_of): so the figures are the
difference of `valuation` asOf the two instants, and those of one span and the next add up.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import from_micro
from engine.as_of import sum_effects
from engine.instants import to_datetime
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context
from resolvers.errors import ErrorCode, PublicError
from resolvers.nav import not_ready


@strawberry.type(
    description=(
        "What was realised, earned and paid over a span, in the base currency: by the entries recorded after `from` "
        "and up to `to`. Exact: the difference of the valuation's sums at the two instants."
    )
)
class RealizedPnl:
    begun_at: datetime = strawberry.field(name="from", description="Where the span begins; itself not in it.")
    ended_at: datetime = strawberry.field(name="to", description="Where it ends; itself in it.")
    gross: Decimal = strawberry.field(description="Gross P&L realised by fills, by average cost; without fees.")
    fees: Decimal = strawberry.field(
        description="Fees of fills, also those of positions still open, and fees booked by themselves."
    )
    net: Decimal = strawberry.field(description="gross − fees.")
    income: Decimal = strawberry.field(
        description="Interest, and dividends from their ex-date on; in neither gross nor net."
    )


async def load_realized(
    context: Context, portfolio: PortfolioIdentity, begin: datetime | None, end: datetime | None
) -> RealizedPnl:
    """Raises PublicError BAD_SPAN, AS_OF_BEFORE_OPENING, AS_OF_IN_FUTURE."""
    services, name = context.services, portfolio.portfolio_id
    for at in (begin, end):
        if at is not None:
            services.past.check(portfolio, at)
    now = to_datetime(services.clock.now_ns())
    if begin is not None and begin >= (end or now):
        raise PublicError(ErrorCode.BAD_SPAN, "from is not before to")
    reads = services.past.ledger
    if end is None:
        last = await services.ledger.last_sequence(name)
    else:
        last = (await reads.ledger_at(name, end)).ledger_sequence
    begun_at, ended_at = begin or portfolio.opened_at, end or now
    if begin is None:
        state = await reads.state(name, last)
        return _show(begun_at, ended_at, state.realized, state.fees, state.income)
    after = (await reads.ledger_at(name, begin)).ledger_sequence
    total = sum_effects((await reads.effects(name, after, last)).values())
    return _show(begun_at, ended_at, total.realized, total.fees, total.income)


async def load_realized_today(context: Context, place: tuple[int, str]) -> RealizedPnl:
    """Since the day cut of the mark, in what its ledger sequence includes. Raises PublicError NOT_READY."""
    mark = await context.hot.mark(place)
    if mark is None:
        raise not_ready()
    reads, cut_at = context.services.past.ledger, to_datetime(mark.day_cut_at_ns)
    baseline = await reads.baseline(place[1], cut_at)
    # The baseline says which entries it includes; of a portfolio that is younger there is none.
    after = (await reads.ledger_at(place[1], cut_at) if baseline is None else baseline).ledger_sequence
    total = sum_effects((await reads.effects(place[1], after, mark.ledger_sequence)).values())
    return _show(cut_at, to_datetime(mark.as_of_ns), total.realized, total.fees, total.income)


def _show(begun_at: datetime, ended_at: datetime, realized: int, fees: int, income: int) -> RealizedPnl:
    return RealizedPnl(
        begun_at=begun_at,
        ended_at=ended_at,
        gross=from_micro(realized),
        fees=from_micro(fees),
        net=from_micro(realized - fees),
        income=from_micro(income),
    )
