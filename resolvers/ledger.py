"""The ledger of a portfolio (engine.ledger), as pages and as a lossless stream.

The stream reads PostgreSQL when a mark says that the ledger has grown, and every LEDGER_POLL_INTERVAL_S besides,
so that it goes on when Redis is away. It sends every entry once, in the order of `sequence`; a client that was
away gives the last cursor it saw and gets all that came since.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.amounts import from_micro
from engine.ledger import LedgerEntry as EngineEntry
from engine.stores.ledger_reads import EVERYTHING, SEQUENCE_MAX, LedgerSelection, PortfolioIdentity
from resolvers.context import SCOPE_LEDGER_READ, Context, Info, MarkWatch
from resolvers.enums import LedgerKind, Side
from resolvers.errors import AWAY
from resolvers.nodes import write_id
from resolvers.pages import Connection, check_first, connection, read_sequence_cursor, write_cursor

LEDGER_POLL_INTERVAL_S = 2
EVENT_BATCH_COUNT_MAX = 200


@strawberry.type(
    description=(
        "One event, booked; never changed afterwards. Amounts are in the base currency. "
        "cashAfter = cash before + amount − fee."
    )
)
class LedgerEntry:
    id: strawberry.ID = strawberry.field(description="Opaque and unique. For caches.")
    sequence: int = strawberry.field(description="Counts the portfolio's entries from 1, without gaps.")
    kind: LedgerKind = strawberry.field(description="What was booked.")
    symbol: str | None = strawberry.field(description="The asset of a fill; null otherwise.")
    side: Side | None = strawberry.field(description="The side of a fill; null otherwise.")
    quantity: Decimal | None = strawberry.field(description="The quantity of a fill, above 0; null otherwise.")
    price: Decimal | None = strawberry.field(description="The price of a fill per unit; null otherwise.")
    amount: Decimal = strawberry.field(
        description=(
            "The effect on cash without the fee: −quantity × price for a BUY, + for a SELL; negative for "
            "WITHDRAWAL and FEE; 0 for OPEN."
        )
    )
    fee: Decimal = strawberry.field(description="The fee of a fill, ≥ 0; taken from cash besides the amount.")
    realized_pnl: Decimal = strawberry.field(description="Gross P&L that this fill realised; 0 otherwise.")
    cash_after: Decimal = strawberry.field(description="Cash after this entry.")
    effective_at: datetime = strawberry.field(description="When it happened, as its source says.")
    recorded_at: datetime = strawberry.field(description="When it was booked.")
    event_id: strawberry.ID = strawberry.field(description="The event's id; the ledger takes each once.")
    reference: str | None = strawberry.field(description="What the source called it; null where it said nothing.")


@strawberry.input(description="Which ledger entries to show; what is left out does not restrict.")
class LedgerFilter:
    kind: LedgerKind | None = strawberry.field(default=None, description="Only entries of this kind.")
    symbol: str | None = strawberry.field(default=None, description="Only fills of this symbol.")
    side: Side | None = strawberry.field(default=None, description="Only fills of this side.")
    effective_from: datetime | None = strawberry.field(
        default=None, name="from", description="Only entries with effectiveAt at or after this instant."
    )
    effective_to: datetime | None = strawberry.field(
        default=None, name="to", description="Only entries with effectiveAt before this instant."
    )


@strawberry.type(description="A message of ledgerEvents: one entry, and where to resume after it.")
class LedgerEvent:
    cursor: str = strawberry.field(description="Opaque; give it as `after` to resume behind this entry.")
    entry: LedgerEntry = strawberry.field(description="The entry.")


async def load_ledger(
    context: Context, portfolio: PortfolioIdentity, first: int, after: str | None, chosen: LedgerFilter | None
) -> Connection[LedgerEntry]:
    """A page of entries, newest first. Raises PublicError PAGE_SIZE, BAD_CURSOR, FORBIDDEN."""
    context.require(SCOPE_LEDGER_READ)
    first = check_first(first, context.services.settings.page_size_max)
    before = SEQUENCE_MAX if after is None else read_sequence_cursor("ledger", after)
    selection = EVERYTHING if chosen is None else _selection(chosen)
    entries = await context.services.ledger.page(portfolio.portfolio_id, first + 1, before, selection)
    return connection(entries, first, after, _cursor, show_entry)


async def ledger_events(info: Info, portfolio_id: str, after: str | None = None) -> AsyncIterator[LedgerEvent]:
    context = info.context
    portfolio = await context.portfolio(portfolio_id, SCOPE_LEDGER_READ)
    ledger, signal = context.services.ledger, asyncio.Event()
    sent = None if after is None else read_sequence_cursor("ledger", after)
    with context.services.hub.watch_portfolio(portfolio.shard, portfolio_id, signal) as watch:
        if sent is None:
            sent = await ledger.last_sequence(portfolio_id)
        while True:
            entries = await _read_after(context, portfolio_id, sent)
            for entry in entries:
                sent = entry.sequence
                yield LedgerEvent(cursor=_cursor(entry), entry=show_entry(entry))
            if len(entries) < EVENT_BATCH_COUNT_MAX:
                await _wait_for_growth(watch, signal, sent)


async def _wait_for_growth(watch: MarkWatch, signal: asyncio.Event, sent: int) -> None:
    """Until a mark includes an entry after `sent`, at most the poll interval."""
    try:
        async with asyncio.timeout(LEDGER_POLL_INTERVAL_S):
            while True:
                await signal.wait()
                signal.clear()
                taken = watch.take()
                if taken is not None and taken[0].ledger_sequence > sent:
                    return
    except TimeoutError:
        return


async def _read_after(context: Context, portfolio_id: str, sequence: int) -> list[EngineEntry]:
    try:
        return await context.services.ledger.after(portfolio_id, sequence, EVENT_BATCH_COUNT_MAX)
    except AWAY:
        # The stream outlives the outage: the next round reads from the same place.
        return []


def _selection(chosen: LedgerFilter) -> LedgerSelection:
    # PostgreSQL takes no NUL in a text; no symbol has one either.
    symbol = None if chosen.symbol is None else chosen.symbol.replace("\0", " ")
    return LedgerSelection(chosen.kind, symbol, chosen.side, chosen.effective_from, chosen.effective_to)


def show_entry(entry: EngineEntry) -> LedgerEntry:
    return LedgerEntry(
        id=write_id("LedgerEntry", f"{entry.portfolio_id}:{entry.sequence}"),
        sequence=entry.sequence,
        kind=entry.kind,
        symbol=entry.symbol,
        side=entry.side,
        quantity=entry.quantity,
        price=entry.price,
        amount=from_micro(entry.amount),
        fee=from_micro(entry.fee),
        realized_pnl=from_micro(entry.realized),
        cash_after=from_micro(entry.cash_after),
        effective_at=entry.effective_at,
        recorded_at=entry.recorded_at,
        event_id=strawberry.ID(entry.event_id),
        reference=entry.reference,
    )


def _cursor(entry: EngineEntry) -> str:
    return write_cursor("ledger", entry.sequence)
