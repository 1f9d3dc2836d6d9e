"""Portfolios and their viewer: the way in to everything that belongs to one portfolio."""

from __future__ import annotations

from datetime import datetime

import strawberry

from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import SCOPE_PORTFOLIO_READ, Info
from resolvers.enums import EquityCurveRange
from resolvers.equity_curve import EquityCurve, load_equity_curve
from resolvers.fields import resolved
from resolvers.ledger import LedgerEntry, LedgerFilter, load_ledger
from resolvers.nav import Valuation, load_valuation
from resolvers.nodes import Node, write_id
from resolvers.pages import Connection, check_first, connection, read_cursor, write_cursor
from resolvers.performance import Performance, load_performance
from resolvers.positions import Position, load_positions
from resolvers.sectors import SectorSlice, load_sectors

PORTFOLIOS_DEFAULT = 50


@strawberry.type(description="A portfolio: cash and positions of one owner in one base currency.")
class Portfolio(Node):
    identity: strawberry.Private[PortfolioIdentity]
    portfolio_id: str = strawberry.field(description="The id that people and events use.")
    name: str = strawberry.field(description="What its owner calls it.")
    base_currency: str = strawberry.field(description="ISO 4217 code of the currency that all its amounts are in.")
    opened_at: datetime = strawberry.field(description="When it was opened.")

    @resolved("What it is worth now: one consistent instant.")
    async def valuation(self, info: Info) -> Valuation:
        return await load_valuation(info.context, self._place)

    @resolved("Its open positions at the latest quotes, in symbol order.")
    async def positions(self, info: Info, first: int, after: str | None = None) -> Connection[Position]:
        return await load_positions(info.context, self._place, first, after)

    @resolved("Its ledger, newest entry first. Needs the scope ledger:read.")
    async def ledger(
        self, info: Info, first: int, after: str | None = None, filter: LedgerFilter | None = None
    ) -> Connection[LedgerEntry]:
        return await load_ledger(info.context, self.identity, first, after, filter)

    @resolved("Its allocation to sectors at the latest quotes, largest weight first.")
    async def sector_allocation(self, info: Info) -> list[SectorSlice]:
        return await load_sectors(info.context, self._place)

    @resolved("Its NAV over time, ending in the live NAV; at most maxPoints points, 500 when left out.")
    async def equity_curve(self, info: Info, range: EquityCurveRange, max_points: int | None = None) -> EquityCurve:
        return await load_equity_curve(info.context, self.identity, range, max_points)

    @resolved("Its return, risk, drawdown and trades over a range, from the points of equityCurve. Ends live.")
    async def performance(self, info: Info, range: EquityCurveRange) -> Performance:
        return await load_performance(info.context, self.identity, range)

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


def show_portfolio(identity: PortfolioIdentity) -> Portfolio:
    return Portfolio(
        id=write_id("Portfolio", identity.portfolio_id),
        identity=identity,
        portfolio_id=identity.portfolio_id,
        name=identity.name,
        base_currency=identity.base_currency,
        opened_at=identity.opened_at,
    )


async def resolve_portfolio(info: Info, portfolio_id: str) -> Portfolio | None:
    return show_portfolio(await info.context.portfolio(portfolio_id))


def resolve_viewer(info: Info) -> Viewer:
    access = info.context.require(SCOPE_PORTFOLIO_READ)
    return Viewer(subject=access.subject, scopes=sorted(access.scopes))


def _cursor(identity: PortfolioIdentity) -> str:
    return write_cursor("portfolios", identity.portfolio_id)
