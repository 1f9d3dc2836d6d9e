"""Portfolios and their viewer: the way in to everything that belongs to one portfolio.

A portfolio asked for `asOf` a past instant is an object of its own, under an id of its own: caches keep it apart from
the present one. It has no future, so what ends in the present (curve, performance …) is AS_OF_UNSUPPORTED.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Annotated

import strawberry

from engine.instants import to_datetime, to_ns
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.allocation import Allocation, load_allocation
from resolvers.as_of import PastLoader
from resolvers.badges import BadgeProgress, load_badges
from resolvers.closed_positions import ClosedPosition, load_closed_positions
from resolvers.context import SCOPE_PORTFOLIO_READ, Context, Info
from resolvers.enums import EquityCurveRange
from resolvers.equity_curve import EquityCurve, load_equity_curve
from resolvers.errors import ErrorCode, PublicError, not_found
from resolvers.explain import Explanation, load_explanation
from resolvers.fields import resolved
from resolvers.ledger import LedgerEntry, LedgerFilter, load_ledger
from resolvers.nav import Valuation, load_valuation
from resolvers.nodes import Node, write_id
from resolvers.pages import Connection, check_first, connection, read_cursor, write_cursor
from resolvers.performance import Performance, load_performance
from resolvers.positions import Position, load_positions
from resolvers.realized import RealizedPnl, load_realized, load_realized_today
from resolvers.reconciliation import Reconciliation, load_reconciliation
from resolvers.sectors import SectorSlice, load_sectors
from resolvers.thresholds import Threshold, load_thresholds
from resolvers.webhooks import WEBHOOKS_DEFAULT, Webhook, load_webhooks

PORTFOLIOS_DEFAULT = 50
INSTANT_DIGITS_MAX = 16  # microseconds since 1970, until the year 2286
_AT = "#"  # no identifier has it


@strawberry.type(description="A portfolio: cash and positions of one owner in one base currency.")
class Portfolio(Node):
    identity: strawberry.Private[PortfolioIdentity]
    past: strawberry.Private[PastLoader | None]
    portfolio_id: str = strawberry.field(description="The id that people and events use.")
    name: str = strawberry.field(description="What its owner calls it.")
    base_currency: str = strawberry.field(description="ISO 4217 code of the currency that all its amounts are in.")
    opened_at: datetime = strawberry.field(description="When it was opened.")

    @resolved(
        "What it is worth: one consistent instant, now or asOf. Under asOf epoch and sequence are 0, because it is no "
        "mark of an evaluator, and dayPnl counts from the last day cut before."
    )
    async def valuation(self, info: Info) -> Valuation:
        return await load_valuation(self._context(info), self._place)

    @resolved("Its open positions at the latest quotes (under asOf: at the prices known of then), in symbol order.")
    async def positions(self, info: Info, first: int, after: str | None = None) -> Connection[Position]:
        return await load_positions(self._context(info), self._place, first, after)

    @resolved("Its ledger, newest entry first; under asOf as it was. Needs the scope ledger:read.")
    async def ledger(
        self, info: Info, first: int, after: str | None = None, filter: LedgerFilter | None = None
    ) -> Connection[LedgerEntry]:
        return await load_ledger(info.context, self.identity, first, after, filter, self.past)

    @resolved(
        "Its allocation to sectors at the latest quotes, largest weight first. Under asOf without weightAtLastFill."
    )
    async def sector_allocation(self, info: Info) -> list[SectorSlice]:
        return await load_sectors(self._context(info), self._place)

    @resolved("The same by asset class and by industry too, its exposure, and how concentrated it is; also under asOf.")
    async def allocation(self, info: Info) -> Allocation:
        return await load_allocation(self._context(info), self._place)

    @resolved("Its NAV over time, ending in the live NAV; at most maxPoints points, 500 when left out.")
    async def equity_curve(self, info: Info, range: EquityCurveRange, max_points: int | None = None) -> EquityCurve:
        return await load_equity_curve(info.context, self._present, range, max_points)

    @resolved("Its return, risk, drawdown and trades over a range, from the points of equityCurve. Ends live.")
    async def performance(self, info: Info, range: EquityCurveRange) -> Performance:
        return await load_performance(info.context, self._present, range)

    @resolved("Every badge there is, with how far it is with it, and what it was awarded for.")
    async def badges(self, info: Info) -> list[BadgeProgress]:
        return await load_badges(info.context, self._present)

    @resolved("Whether what is shown of it now is what its ledger says, as last checked.")
    async def reconciliation(self, info: Info) -> Reconciliation:
        return await load_reconciliation(info.context, self._present)

    @resolved(
        "Why its NAV changed from an instant to another (now when left out), in parts that sum exactly. What counts is "
        "what was booked by then, as under asOf."
    )
    async def explain(
        self,
        info: Info,
        begin: Annotated[datetime, strawberry.argument(name="from", description="The beginning, not before openedAt.")],
        end: Annotated[
            datetime | None, strawberry.argument(name="to", description="The end, not in the future; now when null.")
        ] = None,
    ) -> Explanation:
        return await load_explanation(info.context, self._present, begin, end)

    @resolved(
        "What it realised, earned and paid from one instant (its opening when null) to another (now when null). "
        "Refused: BAD_SPAN, AS_OF_BEFORE_OPENING, AS_OF_IN_FUTURE."
    )
    async def realized_pnl(
        self,
        info: Info,
        begin: Annotated[
            datetime | None, strawberry.argument(name="from", description="The beginning; the opening when null.")
        ] = None,
        end: Annotated[datetime | None, strawberry.argument(name="to", description="The end; now when null.")] = None,
    ) -> RealizedPnl:
        return await load_realized(info.context, self._present, begin, end)

    @resolved("The same since the day cut that valuation.dayPnl counts from, in the ledger entries that it includes.")
    async def realized_today(self, info: Info) -> RealizedPnl:
        return await load_realized_today(self._context(info), self._place)

    @resolved("The positions that it has closed, the last one first; under asOf those closed by then.")
    async def closed_positions(self, info: Info, first: int, after: str | None = None) -> Connection[ClosedPosition]:
        return await load_closed_positions(info.context, self.identity, first, after, self.past)

    @resolved("The bounds that its figures are watched for, oldest first.")
    async def thresholds(self, info: Info) -> list[Threshold]:
        return await load_thresholds(info.context, self._present)

    def _context(self, info: Info) -> Context:
        return info.context if self.past is None else replace(info.context, hot=self.past)

    @property
    def _present(self) -> PortfolioIdentity:
        """For what shows the present alone. Raises PublicError AS_OF_UNSUPPORTED."""
        if self.past is not None:
            raise PublicError(ErrorCode.AS_OF_UNSUPPORTED, "this field shows the present; ask for it without asOf")
        return self.identity

    @property
    def _place(self) -> tuple[int, str]:
        return (self.identity.shard, self.identity.portfolio_id)


@strawberry.type(description="Who asks.")
class Viewer:
    subject: str = strawberry.field(description="The subject of the token.")
    scopes: list[str] = strawberry.field(description="The scopes of the token, sorted.")

    @resolved("The portfolios that the viewer may see, by portfolioId; all of them for admin.")
    async def portfolios(
        self, info: Info, first: int = PORTFOLIOS_DEFAULT, after: str | None = None
    ) -> Connection[Portfolio]:
        access = info.context.require(SCOPE_PORTFOLIO_READ)
        services = info.context.services
        first = check_first(first, services.settings.page_size_max)
        begin = "" if after is None else read_cursor("portfolios", after)
        owner = None if access.sees_all else access.subject
        rows = await services.ledger.portfolios(owner, first + 1, begin)
        return connection(rows, first, after, _cursor, show_portfolio)

    @resolved("The viewer's own webhooks, oldest first; also for admin nobody else's. Needs the scope webhooks:write.")
    async def webhooks(
        self, info: Info, first: int = WEBHOOKS_DEFAULT, after: str | None = None
    ) -> Connection[Webhook]:
        return await load_webhooks(info.context, first, after)


def show_portfolio(identity: PortfolioIdentity, past: PastLoader | None = None) -> Portfolio:
    key = identity.portfolio_id if past is None else f"{identity.portfolio_id}{_AT}{to_ns(past.at) // 1_000}"
    return Portfolio(
        id=write_id("Portfolio", key),
        identity=identity,
        past=past,
        portfolio_id=identity.portfolio_id,
        name=identity.name,
        base_currency=identity.base_currency,
        opened_at=identity.opened_at,
    )


async def resolve_portfolio(
    info: Info,
    portfolio_id: str,
    as_of: Annotated[
        datetime | None,
        strawberry.argument(
            description=(
                "A past instant, at which valuation, positions and allocation are shown by what navstream had booked "
                "by then (recordedAt), at the prices known of then and by the classification of then (positions show "
                "their asset as it is today), and the ledger ends. Prices are recorded "
                "hourly and at session closes; each says when it was quoted and how good it was. Refused: "
                "AS_OF_BEFORE_OPENING, AS_OF_IN_FUTURE; other fields are AS_OF_UNSUPPORTED."
            )
        ),
    ] = None,
) -> Portfolio | None:
    identity = await info.context.portfolio(portfolio_id)
    if as_of is None:
        return show_portfolio(identity)
    past = info.context.services.past
    past.check(identity, as_of)
    return show_portfolio(identity, PastLoader(past, identity, as_of))


async def resolve_portfolio_key(info: Info, key: str) -> Portfolio | None:
    """The portfolio under the key of its id."""
    portfolio_id, separator, at = key.partition(_AT)
    if not separator:
        return await resolve_portfolio(info, portfolio_id)
    if not (at.isascii() and at.isdigit() and len(at) <= INSTANT_DIGITS_MAX):
        raise not_found("portfolio")
    return await resolve_portfolio(info, portfolio_id, to_datetime(int(at) * 1_000))


def resolve_viewer(info: Info) -> Viewer:
    access = info.context.require(SCOPE_PORTFOLIO_READ)
    return Viewer(subject=access.subject, scopes=sorted(access.scopes))


def _cursor(identity: PortfolioIdentity) -> str:
    return write_cursor("portfolios", identity.portfolio_id)
