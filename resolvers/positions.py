"""Positions of a portfolio at the latest quotes (engine.positions), as pages and as a stream of what changed.

The stream values a position anew when it was filled or quoted, from what the watches deliver: it reads Redis when
the portfolio's ledger has grown, not at every tick.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator
from contextlib import ExitStack, closing
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

import strawberry

from engine.amounts import from_micro
from engine.marks import Mark
from engine.messages import Quote
from engine.positions import HotPosition, PositionValuation, value_position
from engine.runtime.clock import SECOND_NS, to_datetime
from engine.stores.ledger_reads import HeldCycle, PortfolioIdentity
from resolvers.assets import Asset, show_asset
from resolvers.context import SCOPE_LEDGER_READ, Context, Info, QuoteWatch
from resolvers.enums import MarkQuality
from resolvers.errors import AWAY
from resolvers.fields import resolved
from resolvers.lots import Lot, ShownPosition, show_lot
from resolvers.nav import AS_OF, CONFLATED, EPOCH, SEQUENCE, not_ready
from resolvers.pages import Connection, check_first, connection, read_cursor, write_cursor
from resolvers.streams import RATE_HZ_DEFAULT, StreamKind, kind_of, make_pace

AWAY_RETRY_INTERVAL_S = 1
# A fill's mark may be flushed a moment before its positions are written: they are read once more after this.
SETTLE_INTERVAL_S = 0.5


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
    shown: strawberry.Private[ShownPosition]
    asset: Asset = strawberry.field(description="What is held.")
    side: PositionSide = strawberry.field(description="The sign of the quantity.")
    quantity: Decimal = strawberry.field(description="Signed quantity: above 0 long, below 0 short.")
    average_cost: Decimal = strawberry.field(
        description="costBasis / quantity, per unit, without fees; reducing a position leaves it as it is."
    )
    price: Decimal | None = strawberry.field(
        description=(
            "The last good price, in today's shares: one quoted before a split is divided by the split's ratio. Null "
            "when there never was one."
        )
    )
    price_as_of: datetime | None = strawberry.field(description="When the price was quoted; null without a price.")
    quality: MarkQuality = strawberry.field(description="How good the price is now, by the asset's class and hours.")
    cost_basis: Decimal = strawberry.field(description="Σ signed notionals of the open quantity, without fees.")
    market_value: Decimal = strawberry.field(
        description="round(quantity × price, 6 decimals); the cost basis as long as there is no price."
    )
    unrealized_pnl: Decimal = strawberry.field(description="marketValue − costBasis.")
    unrealized_pnl_ratio: Decimal | None = strawberry.field(
        description="unrealizedPnl / |costBasis| as a fraction; null when the cost is 0."
    )
    realized_pnl: Decimal = strawberry.field(
        description="Gross P&L realised by fills of this position since it was last flat."
    )
    day_pnl: Decimal = strawberry.field(
        description="marketValue − value at the day cut − Σ signed notionals traded since the cut."
    )
    weight: Decimal | None = strawberry.field(
        description="marketValue / NAV as a fraction, negative for a short; null when the NAV is 0."
    )

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
        shown=ShownPosition(cycle, held.quantity, ledger_sequence),
        asset=show_asset(context.services.assets.get(held.symbol)),
        side=PositionSide.LONG if held.quantity > 0 else PositionSide.SHORT,
        quantity=held.quantity,
        average_cost=held.average_cost,
        price=held.price,
        price_as_of=None if held.price_as_of_ns is None else to_datetime(held.price_as_of_ns),
        quality=held.quality,
        cost_basis=from_micro(held.cost),
        market_value=from_micro(held.value),
        unrealized_pnl=from_micro(held.unrealized),
        unrealized_pnl_ratio=held.unrealized_ratio,
        realized_pnl=from_micro(held.realized),
        day_pnl=from_micro(held.day_pnl),
        weight=held.weight,
    )


async def position_updates(
    info: Info, portfolio_id: str, max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[PositionUpdate]:
    context = info.context
    portfolio = await context.portfolio(portfolio_id)
    signal = asyncio.Event()
    pace = make_pace(context, max_rate_hz, signal)
    hub = context.services.hub
    with ExitStack() as stack:
        marks = stack.enter_context(hub.watch_portfolio(portfolio.shard, portfolio_id, signal))
        quotes = stack.enter_context(hub.watch_quotes((), signal))
        held = stack.enter_context(closing(_Held(context, portfolio, quotes, signal)))
        last: Mark | None = None
        mark: Mark | None = None
        conflated = 0
        withheld = False
        while True:
            changed = await pace.changed()
            if not changed:
                withheld = last is not None and not (marks.current and quotes.current)
                if last is not None and not withheld:
                    pace.sending()
                    yield _show(portfolio_id, last, StreamKind.HEARTBEAT, [], [], 0)
                continue
            taken = marks.take()
            if taken is not None:
                mark, conflated = taken[0], conflated + taken[1]
            if mark is None:
                continue
            kind = kind_of(last, mark)
            try:
                changes, closed = await held.changes(mark, whole=kind is not StreamKind.UPDATE)
            except AWAY:
                # What could not be read is still to be shown: try again, and again, until Redis is back.
                await asyncio.sleep(AWAY_RETRY_INTERVAL_S)
                signal.set()
                continue
            last = mark
            resumed = withheld and marks.current and quotes.current
            if changes or closed or kind is not StreamKind.UPDATE or resumed:
                withheld = withheld and not resumed
                pace.sending()
                positions = [show_position(context, portfolio_id, mark.ledger_sequence, row) for row in changes]
                yield _show(portfolio_id, mark, kind, positions, closed, conflated)
            conflated = 0


class _Held:
    """The positions and quotes that one stream has shown last."""

    def __init__(
        self, context: Context, portfolio: PortfolioIdentity, quotes: QuoteWatch, signal: asyncio.Event
    ) -> None:
        self._context = context
        self._signal = signal
        self._portfolio = portfolio
        self._watch = quotes
        self._positions: dict[str, HotPosition] = {}
        self._quotes: dict[str, Quote] = {}
        self._shown: dict[str, tuple[object, ...]] = {}
        self._read_at: tuple[int, int] | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._settled = True

    def close(self) -> None:
        if self._settling is not None:
            self._settling.cancel()

    async def changes(self, mark: Mark, whole: bool) -> tuple[list[PositionValuation], list[str]]:
        """The positions that differ from what was shown last (all of them when `whole`), and those now flat."""
        # Before anything is read: what waits now is no newer than what will be read, and what comes meanwhile is.
        self._take_quotes()
        if self._read_at != (mark.epoch, mark.ledger_sequence):
            await self._read()
            self._read_at = (mark.epoch, mark.ledger_sequence)
            self.close()
            self._settling = asyncio.get_running_loop().call_later(SETTLE_INTERVAL_S, self._settle)
        elif not self._settled:
            await self._read()
            self._settled = True
        self._take_quotes()
        services = self._context.services
        now_ns, stale_after_ns = services.clock.now_ns(), services.settings.stale_after_s * SECOND_NS
        changes: list[PositionValuation] = []
        shown: dict[str, tuple[object, ...]] = {}
        for symbol in sorted(self._positions):
            held = self._positions[symbol]
            quote, sessions = self._quotes.get(symbol), services.assets.sessions(symbol)
            row = value_position(symbol, held, quote, mark.nav, now_ns, stale_after_ns, sessions)
            shown[symbol] = (held, row.price, row.price_as_of_ns, row.quality)
            if whole or shown[symbol] != self._shown.get(symbol):
                changes.append(row)
        closed = sorted(self._shown.keys() - shown.keys())
        self._shown = shown
        return changes, closed

    def _take_quotes(self) -> None:
        taken = self._watch.take()
        if taken is not None:
            self._quotes.update(taken[0])

    def _settle(self) -> None:
        self._settled = False
        self._signal.set()

    async def _read(self) -> None:
        services = self._context.services
        place = (self._portfolio.shard, self._portfolio.portfolio_id)
        positions = await services.hot_state.positions(*place)
        # Watched before they are read, so that no quote falls between.
        self._watch.change(positions)
        quotes = await services.hot_state.quotes(positions)
        await services.assets.ensure(positions)
        self._positions, self._quotes = positions, quotes


def _cursor(row: PositionValuation) -> str:
    return write_cursor("positions", row.symbol)


def _show(
    portfolio_id: str,
    mark: Mark,
    kind: StreamKind,
    positions: list[Position],
    closed_symbols: list[str],
    conflated: int,
) -> PositionUpdate:
    return PositionUpdate(
        kind=kind,
        portfolio_id=portfolio_id,
        positions=positions,
        closed_symbols=closed_symbols,
        as_of=to_datetime(mark.as_of_ns),
        epoch=mark.epoch,
        sequence=mark.sequence,
        conflated=conflated,
    )
