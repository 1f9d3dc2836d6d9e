"""Why NAV changed (engine.explain): over any span of a portfolio's life, between two marks, and over a range."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import from_micro, ratio
from engine.explain import Explanation as Explained
from engine.explain import Row, Worth, explain, grouped, largest, settle
from engine.instants import SECOND_NS, to_datetime, to_ns
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.as_of import PricedState
from resolvers.assets import Asset, show_asset
from resolvers.context import Context
from resolvers.enums import MarkQuality, StatisticReason
from resolvers.equity_curve import History
from resolvers.errors import ErrorCode, PublicError
from resolvers.nav import not_ready
from resolvers.pnl import NavParts, show_parts

ASSETS_SHOWN_MAX = 200
# A mark lags behind the quotes by a flush and a bit of travel: those of before were in it.
QUOTES_LAG_MAX_NS = 2 * SECOND_NS

PNL = "price + trading + fees + income + corporateActions, in the base currency."


@strawberry.type(
    description=(
        "One asset's part of a change of NAV. A row without an asset is cash with receivables (assetsCount 0), or all "
        f"assets beyond the {ASSETS_SHOWN_MAX} with the largest |pnl| (assetsCount above 1)."
    )
)
class ExplainedRow:
    asset: Asset | None = strawberry.field(description="The asset; null for cash, and for several.")
    assets_count: int = strawberry.field(description="How many assets the row stands for: 1, 0 for cash, or more.")
    value_from: Decimal = strawberry.field(description="The position's value at `from`; of cash: cash + receivables.")
    value_to: Decimal = strawberry.field(
        description="The same at `to`. It differs from valueFrom by what was bought and sold, too, which is in no part."
    )
    parts: NavParts = strawberry.field(description="The asset's parts; over all rows they sum to the total's.")
    pnl: Decimal = strawberry.field(description=PNL)


@strawberry.type(description="A change of NAV, and its parts.")
class ExplainedTotal:
    nav_from: Decimal = strawberry.field(description="NAV at `from`.")
    nav_to: Decimal = strawberry.field(description="NAV at `to`.")
    nav_change: Decimal = strawberry.field(description="navTo − navFrom.")
    parts: NavParts = strawberry.field(description="Its parts, summing to navChange exactly.")
    pnl: Decimal = strawberry.field(description=PNL + " navChange − flows.")


@strawberry.type(
    description=(
        "Why NAV changed between two instants, by what navstream had booked at each. A span cut in two at any instant "
        "has the sum of its halves' parts. Prices at a past instant are the last ones recorded on the hourly grid."
    )
)
class Explanation:
    begins_at: datetime = strawberry.field(name="from", description="The beginning.")
    ends_at: datetime = strawberry.field(name="to", description="The end: as asked, or now.")
    ledger_sequence_from: int = strawberry.field(description="How many ledger entries were booked at the beginning.")
    ledger_sequence_to: int = strawberry.field(description="How many at the end.")
    quality_from: MarkQuality = strawberry.field(description="The worst quality among the prices at the beginning.")
    quality_to: MarkQuality = strawberry.field(description="The worst quality among the prices at the end.")
    total: ExplainedTotal = strawberry.field(description="The whole portfolio.")
    rows: list[ExplainedRow] = strawberry.field(
        description="By asset, largest |pnl| first, cash last. They sum to the total in every part."
    )


@strawberry.type(description="A share of a range's P&L.")
class ContributionShare:
    key: str | None = strawberry.field(
        description="The symbol, sector or asset class; null for cash (interest and account fees), and for several."
    )
    asset: Asset | None = strawberry.field(description="The asset, in byAsset.")
    pnl: Decimal = strawberry.field(description=PNL)
    share: Decimal | None = strawberry.field(
        description="pnl / total as a fraction, below 0 where it went the other way; null when the total is 0."
    )


@strawberry.type(
    description=(
        "What each asset contributed to the range's P&L, by explain's parts. Each list sums to the total exactly. "
        "Sectors and classes are those in force at the range's end: an asset that was reclassified within the range is "
        "not split, all that it contributed is in the sector and class that it came to last."
    )
)
class Contribution:
    total: Decimal | None = strawberry.field(
        description="The range's P&L: NAV at its end − NAV at its beginning − flows. Null where `reason` says why."
    )
    reason: StatisticReason | None = strawberry.field(
        description=(
            "NO_HISTORY: the range has fewer than two points. PRICES_NOT_RECORDED: the recorded prices do not give the "
            "NAV that the range begins or ends with."
        )
    )
    by_asset: list[ContributionShare] = strawberry.field(
        description=(
            f"By asset, largest |pnl| first; beyond {ASSETS_SHOWN_MAX} the rest in one. Cash last. Empty without total."
        )
    )
    by_sector: list[ContributionShare] = strawberry.field(description="By the assets' sector.")
    by_asset_class: list[ContributionShare] = strawberry.field(description="By the assets' class.")


async def load_explanation(
    context: Context, portfolio: PortfolioIdentity, begin: datetime, end: datetime | None
) -> Explanation:
    """From `begin` to `end`, which is the latest mark when left out.

    Raises PublicError BAD_SPAN, AS_OF_BEFORE_OPENING, AS_OF_IN_FUTURE, NOT_READY.
    """
    past, now = context.services.past, to_datetime(context.services.clock.now_ns())
    for instant in (begin,) if end is None else (begin, end):
        past.check(portfolio, instant)
    if begin >= (end or now):
        raise PublicError(ErrorCode.BAD_SPAN, "from is not before to")
    (start, _), (finish, worth_to, quality_to) = await asyncio.gather(
        _at(context, portfolio, begin), _at_end(context, portfolio, end)
    )
    after, last = start.state.ledger_sequence, finish.state.ledger_sequence
    effects = await past.ledger.effects(portfolio.portfolio_id, after, last)
    explained = explain(start.worth, worth_to, effects)
    rows = largest(explained.rows, ASSETS_SHOWN_MAX)
    await context.services.assets.ensure(row.symbol for row in rows if row.symbol)
    return Explanation(
        begins_at=begin,
        ends_at=end or now,
        ledger_sequence_from=after,
        ledger_sequence_to=last,
        quality_from=start.quality,
        quality_to=quality_to,
        total=_show_total(explained),
        rows=[_show_row(context, row) for row in rows],
    )


async def load_contribution(context: Context, portfolio: PortfolioIdentity, history: History) -> Contribution:
    """What the assets contributed between the first and the last point of a range."""
    if len(history.points) < 2:
        return _no_contribution(StatisticReason.NO_HISTORY)
    past, name = context.services.past, portfolio.portfolio_id
    first, last = history.points[0], history.points[-1]
    start, finish, effects = await asyncio.gather(
        past.priced(name, history.after, first.at_ns),
        past.priced(name, history.last, last.at_ns, live=history.ends_live),
        past.ledger.effects(name, history.after, history.last),
    )
    worth_to = _settled(finish, last.nav, last.at_ns) if history.ends_live else finish.worth
    explained = explain(start.worth, worth_to, effects)
    if (explained.nav_from, explained.nav_to) != (first.nav, last.nav):
        return _no_contribution(StatisticReason.PRICES_NOT_RECORDED)
    return await _show_contribution(context, explained, None if history.ends_live else to_datetime(last.at_ns))


async def _at(context: Context, portfolio: PortfolioIdentity, at: datetime) -> tuple[PricedState, Worth]:
    past, name = context.services.past, portfolio.portfolio_id
    found = await past.ledger.ledger_at(name, at)
    priced = await past.priced(name, found.ledger_sequence, to_ns(at))
    return priced, priced.worth


async def _at_end(
    context: Context, portfolio: PortfolioIdentity, at: datetime | None
) -> tuple[PricedState, Worth, MarkQuality]:
    if at is not None:
        priced, worth = await _at(context, portfolio, at)
        return priced, worth, priced.quality
    mark = await context.hot.mark((portfolio.shard, portfolio.portfolio_id))
    if mark is None:
        raise not_ready()
    now_ns = context.services.clock.now_ns()
    priced = await context.services.past.priced(portfolio.portfolio_id, mark.ledger_sequence, now_ns, live=True)
    return priced, _settled(priced, mark.nav, now_ns), mark.quality


def _settled(priced: PricedState, nav: int, now_ns: int) -> Worth:
    """The latest quotes are a moment newer than the mark; what it is worth is the mark's NAV."""
    moved = [symbol for symbol, quote in priced.quotes.items() if quote.ts_event_ns > now_ns - QUOTES_LAG_MAX_NS]
    worth = priced.worth
    return replace(worth, values=settle(worth.values, nav - worth.cash, moved))


async def _show_contribution(context: Context, explained: Explained, at: datetime | None) -> Contribution:
    """Grouped by the classification in force `at` an instant, or now."""
    assets, total = context.services.assets, explained.total.pnl
    symbols = [row.symbol for row in explained.rows if row.symbol]
    await assets.ensure(symbols)
    classified = await (context.hot.assets(symbols) if at is None else assets.in_force(symbols, at))

    def share(key: str | None, pnl: int, asset: Asset | None = None) -> ContributionShare:
        return ContributionShare(key=key, asset=asset, pnl=from_micro(pnl), share=ratio(pnl, total))

    return Contribution(
        total=from_micro(total),
        reason=None,
        by_asset=[
            share(row.symbol, row.parts.pnl, _asset(context, row.symbol))
            for row in largest(explained.rows, ASSETS_SHOWN_MAX)
        ],
        by_sector=[share(*one) for one in grouped(explained.rows, lambda symbol: classified[symbol].sector)],
        by_asset_class=[
            share(*one) for one in grouped(explained.rows, lambda symbol: classified[symbol].asset_class.value)
        ],
    )


def _no_contribution(reason: StatisticReason) -> Contribution:
    return Contribution(total=None, reason=reason, by_asset=[], by_sector=[], by_asset_class=[])


def _show_total(explained: Explained) -> ExplainedTotal:
    return ExplainedTotal(
        nav_from=from_micro(explained.nav_from),
        nav_to=from_micro(explained.nav_to),
        nav_change=from_micro(explained.nav_to - explained.nav_from),
        parts=show_parts(explained.total),
        pnl=from_micro(explained.total.pnl),
    )


def _show_row(context: Context, row: Row) -> ExplainedRow:
    return ExplainedRow(
        asset=_asset(context, row.symbol),
        assets_count=row.symbols_count,
        value_from=from_micro(row.value_from),
        value_to=from_micro(row.value_to),
        parts=show_parts(row.parts),
        pnl=from_micro(row.parts.pnl),
    )


def _asset(context: Context, symbol: str | None) -> Asset | None:
    return None if symbol is None else show_asset(context.services.assets.get(symbol))
