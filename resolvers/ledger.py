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
from engine.ledger import write_scale
from engine.stores.ledger_reads import SEQUENCE_MAX, PortfolioIdentity, ShownEntry
from engine.stores.ledger_selection import EVERYTHING, LedgerSelection, SelectionError, check_selection
from resolvers.as_of import PastLoader
from resolvers.context import SCOPE_LEDGER_READ, Context, Info, MarkWatch
from resolvers.enums import LedgerKind, Side
from resolvers.errors import AWAY, ErrorCode, PublicError
from resolvers.nodes import write_id
from resolvers.pages import Connection, check_first, connection, read_sequence_cursor, write_cursor

LEDGER_POLL_INTERVAL_S = 2
EVENT_BATCH_COUNT_MAX = 200


@strawberry.type(
    description=(
        "One event, booked; never changed afterwards. Amounts are in the base currency. cashAfter = cash before + "
        "amount − fee. A reversal is an entry of the kind that it reverses, with every effect negated."
    )
)
class LedgerEntry:
    id: strawberry.ID = strawberry.field(description="Opaque and unique. For caches.")
    sequence: int = strawberry.field(description="Counts the portfolio's entries from 1, without gaps.")
    kind: LedgerKind = strawberry.field(description="What was booked.")
    symbol: str | None = strawberry.field(description="The asset of a fill, a split or a dividend of it.")
    side: Side | None = strawberry.field(
        description="The side of a fill; null otherwise. A reversal has the other side of the fill that it reverses."
    )
    quantity: Decimal | None = strawberry.field(
        description=(
            "FILL: the quantity, above 0, in the shares of its execution. SPLIT: the change of the position, signed. "
            "DIVIDEND_ACCRUED: the shares held, signed. Null otherwise."
        )
    )
    price: Decimal | None = strawberry.field(
        description="FILL: the price per unit. DIVIDEND_ACCRUED: the dividend per share. Null otherwise."
    )
    scale: str | None = strawberry.field(
        description=(
            "A ratio new:old of shares. SPLIT: that of the split. FILL: where it was executed before a split that was "
            "booked first, what its quantity was multiplied by. Null otherwise."
        )
    )
    amount: Decimal = strawberry.field(
        description=(
            "The effect on cash without the fee: −quantity × price for a BUY, + for a SELL; negative for "
            "WITHDRAWAL and FEE; 0 for OPEN, SPLIT and DIVIDEND_ACCRUED."
        )
    )
    fee: Decimal = strawberry.field(
        description="The fee of a fill, taken from cash besides the amount; below 0 where a reversal gives it back."
    )
    receivable: Decimal = strawberry.field(
        description=(
            "The effect on what is owed to the portfolio. DIVIDEND_ACCRUED: quantity × price. DIVIDEND_PAID: what was "
            "accrued, negated, as it moves to cash. 0 otherwise."
        )
    )
    realized_pnl: Decimal = strawberry.field(description="Gross P&L that this entry realised, by average cost.")
    nav_effect: Decimal = strawberry.field(
        description=(
            "What the entry itself did to NAV, at the prices of its booking: amount − fee + receivable + change of the "
            "position's value."
        )
    )
    cash_after: Decimal = strawberry.field(description="Cash after this entry.")
    effective_at: datetime = strawberry.field(description="When it happened, as its source says.")
    recorded_at: datetime = strawberry.field(description="When it was booked.")
    late: bool = strawberry.field(
        description="A corporate action that arrived after its effective instant, and counts from its arrival."
    )
    event_id: strawberry.ID = strawberry.field(description="The event's id; the ledger takes each once.")
    reference: str | None = strawberry.field(description="What the source called it; null where it said nothing.")
    reverses: strawberry.ID | None = strawberry.field(description="The event that this entry takes back.")
    reversed_by: strawberry.ID | None = strawberry.field(description="The event that takes this entry back.")
    hash: str = strawberry.field(
        description=(
            "SHA-256, in hexadecimal, over the hash of the portfolio's entry before and this entry's content: no entry "
            "can be changed, left out or put in between without changing the hashes of all that follow."
        )
    )


@strawberry.input(
    description="Which ledger entries to show; what is left out does not restrict. One that contradicts itself is "
    "refused with BAD_FILTER."
)
class LedgerFilter:
    kind: LedgerKind | None = strawberry.field(default=None, description="Only entries of this kind.")
    kinds: list[LedgerKind] | None = strawberry.field(
        default=None, description="Only entries of these kinds; not beside `kind`, and not empty."
    )
    symbol: str | None = strawberry.field(
        default=None, description="Only fills of this symbol, and the splits and dividends of it."
    )
    side: Side | None = strawberry.field(default=None, description="Only fills of this side.")
    effective_from: datetime | None = strawberry.field(
        default=None, name="from", description="Only entries with effectiveAt at or after this instant."
    )
    effective_to: datetime | None = strawberry.field(
        default=None, name="to", description="Only entries with effectiveAt before this instant."
    )
    recorded_from: datetime | None = strawberry.field(
        default=None, description="Only entries with recordedAt at or after this instant."
    )
    recorded_to: datetime | None = strawberry.field(
        default=None, description="Only entries with recordedAt before this instant."
    )
    min_amount: Decimal | None = strawberry.field(
        default=None, description="Only entries with |amount| at or above this, whatever their sign; ≥ 0."
    )
    max_amount: Decimal | None = strawberry.field(
        default=None, description="Only entries with |amount| at or below this, whatever their sign; ≥ 0."
    )
    reversals: bool | None = strawberry.field(
        default=None, description="true: only reversals. false: no reversals; what they reverse is still shown."
    )


@strawberry.type(description="A message of ledgerEvents: one entry, and where to resume after it.")
class LedgerEvent:
    cursor: str = strawberry.field(description="Opaque; give it as `after` to resume behind this entry.")
    entry: LedgerEntry = strawberry.field(description="The entry.")


async def load_ledger(
    context: Context,
    portfolio: PortfolioIdentity,
    first: int,
    after: str | None,
    chosen: LedgerFilter | None,
    past: PastLoader | None = None,
) -> Connection[LedgerEntry]:
    """A page of entries, newest first; as of `past` those booked by then.

    Raises PublicError PAGE_SIZE, BAD_CURSOR, BAD_FILTER, FORBIDDEN.
    """
    context.require(SCOPE_LEDGER_READ)
    first = check_first(first, context.services.settings.page_size_max)
    before = SEQUENCE_MAX if after is None else read_sequence_cursor("ledger", after)
    if past is not None:
        before = min(before, await past.ledger_sequence() + 1)
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
            for shown in entries:
                sent = shown.entry.sequence
                yield LedgerEvent(cursor=_cursor(shown), entry=show_entry(shown))
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


async def _read_after(context: Context, portfolio_id: str, sequence: int) -> list[ShownEntry]:
    try:
        return await context.services.ledger.after(portfolio_id, sequence, EVENT_BATCH_COUNT_MAX)
    except AWAY:
        # The stream outlives the outage: the next round reads from the same place.
        return []


def _selection(chosen: LedgerFilter) -> LedgerSelection:
    """Raises PublicError BAD_FILTER."""
    if chosen.kind is not None and chosen.kinds is not None:
        raise PublicError(ErrorCode.BAD_FILTER, "kind and kinds exclude each other")
    selection = LedgerSelection(
        kinds=chosen.kinds if chosen.kind is None else [chosen.kind],
        symbol=chosen.symbol,
        side=chosen.side,
        effective_from=chosen.effective_from,
        effective_to=chosen.effective_to,
        recorded_from=chosen.recorded_from,
        recorded_to=chosen.recorded_to,
        amount_min=chosen.min_amount,
        amount_max=chosen.max_amount,
        reversals=chosen.reversals,
    )
    try:
        check_selection(selection)
    except SelectionError as error:
        raise PublicError(error.code, str(error)) from None
    return selection


def show_entry(shown: ShownEntry) -> LedgerEntry:
    entry, reversed_by = shown
    return LedgerEntry(
        id=write_id("LedgerEntry", f"{entry.portfolio_id}:{entry.sequence}"),
        sequence=entry.sequence,
        kind=entry.kind,
        symbol=entry.symbol,
        side=entry.side,
        quantity=entry.quantity,
        price=entry.price,
        scale=None if entry.scale is None else write_scale(entry.scale),
        amount=from_micro(entry.amount),
        fee=from_micro(entry.fee),
        receivable=from_micro(entry.receivable),
        realized_pnl=from_micro(entry.realized),
        nav_effect=from_micro(entry.nav_effect),
        cash_after=from_micro(entry.cash_after),
        effective_at=entry.effective_at,
        recorded_at=entry.recorded_at,
        late=entry.late,
        event_id=strawberry.ID(entry.event_id),
        reference=entry.reference,
        reverses=None if entry.reverses is None else strawberry.ID(entry.reverses),
        reversed_by=None if reversed_by is None else strawberry.ID(reversed_by),
        hash=entry.hash.hex(),
    )


def _cursor(shown: ShownEntry) -> str:
    return write_cursor("ledger", shown.entry.sequence)
