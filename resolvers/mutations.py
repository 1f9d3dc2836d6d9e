"""Mutations: portfolio events into Kafka, answered when Kafka has acknowledged.

The answer says that the event is safe in the log, not that it is booked: the evaluator books it within a flush or
two, and what it refuses becomes a dead letter. Rules that need no state are checked before anything is sent, and
answered with the code of engine.messages.EventRejected. The client may give the `eventId`: sending the same one
again changes nothing, which makes a retry after UNAVAILABLE safe.

A reversal names an event that the ledger has, so what it names is looked up first; one that was recorded a moment ago
is waited for. What can not be reversed is refused at once, with the codes that booking would have for it.

The ledger takes an event id once, whoever's it is. So that nobody can use up an id of somebody else's, the event
gets `<portfolioId>/<eventId>`; `/` is not taken in the client's part, so that the full id names one portfolio. An id
that is made up is a UUID without a `/`, which no client can give.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum

import strawberry
import uuid_utils

from engine.amounts import plain
from engine.instants import to_datetime
from engine.ledger import CORPORATE, LedgerKind
from engine.messages import (
    IDENTIFIER_LENGTH_MAX,
    CashEvent,
    EventRejected,
    FillEvent,
    OpenEvent,
    PortfolioEvent,
    ReversalEvent,
    check_event,
)
from engine.stores.events_kafka import ProducerAwayError
from engine.stores.ledger_reads import PortfolioIdentity, ShownEntry
from resolvers.context import SCOPE_LEDGER_WRITE, Context, Info
from resolvers.enums import Side
from resolvers.errors import ErrorCode, PublicError, not_found
from resolvers.loaders import BOOKING_POLL_INTERVAL_MS, BOOKING_WAIT_S

DAY_CUT_DEFAULT = "00:00 UTC"
EVENT_ID = (
    "Idempotency key, within the portfolio; made up when left out. The event's id is <portfolioId>/<eventId>: letters, "
    "digits and ._:=^@- of at most 64 characters together."
)


class CashMovementKind(StrEnum):
    DEPOSIT = "DEPOSIT"
    WITHDRAWAL = "WITHDRAWAL"
    REWARD = "REWARD"
    FEE = "FEE"
    INTEREST = "INTEREST"
    DIVIDEND = "DIVIDEND"


strawberry.enum(
    CashMovementKind,
    description=(
        "DEPOSIT, WITHDRAWAL and REWARD are external flows: they move NAV, never P&L. FEE costs, INTEREST and "
        "DIVIDEND earn: they are P&L. WITHDRAWAL and FEE leave the portfolio, the others enter it."
    ),
)


@strawberry.type(description="Kafka's acknowledgement of an event: it will be booked or refused, and is not lost.")
class EventReceipt:
    event_id: strawberry.ID = strawberry.field(
        description=(
            "The event's full id, as the ledger shows it: <portfolioId>/<eventId> where the client gave one. The "
            "ledger takes each once."
        )
    )
    portfolio_id: str = strawberry.field(description="The portfolio that the event is for.")
    accepted_at: datetime = strawberry.field(description="When the acknowledgement came.")
    partition: int = strawberry.field(description="The partition of the log, which is the portfolio's shard.")
    offset: str = strawberry.field(description="The offset within the partition; text, because it is 64 bits long.")


@strawberry.input(description="A new portfolio.")
class OpenPortfolioInput:
    name: str = strawberry.field(description="What to call it: 1 to 200 printable characters.")
    base_currency: str = strawberry.field(default="USD", description="ISO 4217 code of its currency.")
    portfolio_id: str | None = strawberry.field(
        default=None,
        description="Its id: 1 to 64 letters, digits and ._:/=^@-; made up when left out. Needed beside an eventId.",
    )
    owner: str | None = strawberry.field(
        default=None, description="Whose it is; only admin may name somebody else. The caller's when left out."
    )
    opened_at: datetime | None = strawberry.field(default=None, description="When; now when left out.")
    day_cut: str = strawberry.field(
        default=DAY_CUT_DEFAULT,
        description=(
            "When its days end: `HH:MM <IANA zone>` by the zone's clocks, or `close:<exchange>` at an exchange's "
            "session closes, for example close:XNYS. Else BAD_DAY_CUT."
        ),
    )
    event_id: strawberry.ID | None = strawberry.field(default=None, description=EVENT_ID)


@strawberry.input(description="An execution.")
class RecordFillInput:
    portfolio_id: str = strawberry.field(description="The portfolio that traded.")
    symbol: str = strawberry.field(description="What was traded.")
    side: Side = strawberry.field(description="BUY or SELL.")
    quantity: Decimal = strawberry.field(description="How much, above 0; at most 15 significant digits.")
    price: Decimal = strawberry.field(description="Price per unit in `currency`, above 0; at most 15 digits.")
    fee: Decimal = strawberry.field(default=Decimal(0), description="Fee in `currency`, ≥ 0, at most 6 decimals.")
    currency: str | None = strawberry.field(
        default=None, description="Must be the portfolio's base currency; that when left out."
    )
    executed_at: datetime | None = strawberry.field(default=None, description="When; now when left out.")
    order_id: str | None = strawberry.field(default=None, description="The order's id at its venue.")
    venue: str | None = strawberry.field(default=None, description="Where it was executed.")
    event_id: strawberry.ID | None = strawberry.field(default=None, description=EVENT_ID)


@strawberry.input(description="A movement of cash into or out of a portfolio; the kind gives the direction.")
class RecordCashMovementInput:
    portfolio_id: str = strawberry.field(description="The portfolio.")
    kind: CashMovementKind = strawberry.field(description="What kind of movement.")
    amount: Decimal = strawberry.field(description="How much in `currency`, above 0, at most 6 decimals.")
    currency: str | None = strawberry.field(
        default=None, description="Must be the portfolio's base currency; that when left out."
    )
    effective_at: datetime | None = strawberry.field(default=None, description="When; now when left out.")
    reference: str | None = strawberry.field(default=None, description="What to call it; at most 200 characters.")
    event_id: strawberry.ID | None = strawberry.field(default=None, description=EVENT_ID)


@strawberry.input(
    description=(
        "Takes back a fill or a cash movement that should not have been: the ledger keeps both, every effect of the "
        "reversal is that of the event negated. A fill's quantity is taken back in today's shares."
    )
)
class RecordReversalInput:
    portfolio_id: str = strawberry.field(description="The portfolio.")
    reverses: strawberry.ID = strawberry.field(description="The eventId of the ledger entry that is to be taken back.")
    effective_at: datetime | None = strawberry.field(default=None, description="When; now when left out.")
    reference: str | None = strawberry.field(default=None, description="Why; at most 200 characters.")
    event_id: strawberry.ID | None = strawberry.field(default=None, description=EVENT_ID)


async def open_portfolio(info: Info, input: OpenPortfolioInput) -> EventReceipt:
    context = info.context
    access = context.require(SCOPE_LEDGER_WRITE)
    owner = access.subject if input.owner is None else input.owner
    if not access.may_see(owner):
        raise PublicError(ErrorCode.FORBIDDEN, "only admin may open a portfolio for somebody else")
    if input.event_id is not None and input.portfolio_id is None:
        # Each retry would make up another portfolio, and open all of them.
        raise PublicError(ErrorCode.BAD_IDENTIFIER, "an eventId needs a portfolioId beside it")
    portfolio_id = f"p-{uuid_utils.uuid7()}" if input.portfolio_id is None else input.portfolio_id
    event = OpenEvent(
        event_id=_event_id(portfolio_id, input.event_id),
        portfolio_id=portfolio_id,
        owner=owner,
        name=input.name,
        base_currency=input.base_currency,
        opened_at=_instant(context, input.opened_at),
        day_cut=input.day_cut,
    )
    # The first use of an exchange reads its calendar, for longer than the loop may wait.
    await asyncio.to_thread(_check, event)
    portfolios = context.services.portfolios
    # A retry under the same event id changes nothing, so it is let through even once the portfolio is booked.
    if input.event_id is None and await portfolios.find(event.portfolio_id) is not None:
        raise PublicError(ErrorCode.ALREADY_EXISTS, "the portfolio id is taken")
    receipt = await _produce(context, event)
    portfolios.expect(event.portfolio_id)
    return receipt


async def record_fill(info: Info, input: RecordFillInput) -> EventReceipt:
    context = info.context
    portfolio = await _writable(context, input.portfolio_id)
    event = FillEvent(
        event_id=_event_id(portfolio.portfolio_id, input.event_id),
        portfolio_id=portfolio.portfolio_id,
        symbol=input.symbol,
        side=input.side.value,
        quantity=plain(input.quantity),
        price=plain(input.price),
        fee=plain(input.fee),
        currency=portfolio.base_currency if input.currency is None else input.currency,
        executed_at=_instant(context, input.executed_at),
        order_id=input.order_id,
        venue=input.venue,
    )
    _check_currency(event.currency, portfolio)
    return await _produce(context, event)


async def record_cash_movement(info: Info, input: RecordCashMovementInput) -> EventReceipt:
    context = info.context
    portfolio = await _writable(context, input.portfolio_id)
    event = CashEvent(
        event_id=_event_id(portfolio.portfolio_id, input.event_id),
        portfolio_id=portfolio.portfolio_id,
        kind=input.kind.value,
        amount=plain(input.amount),
        currency=portfolio.base_currency if input.currency is None else input.currency,
        effective_at=_instant(context, input.effective_at),
        reference=input.reference,
    )
    _check_currency(event.currency, portfolio)
    return await _produce(context, event)


async def record_reversal(info: Info, input: RecordReversalInput) -> EventReceipt:
    context = info.context
    portfolio = await _writable(context, input.portfolio_id)
    event = ReversalEvent(
        event_id=_event_id(portfolio.portfolio_id, input.event_id),
        portfolio_id=portfolio.portfolio_id,
        reverses=input.reverses,
        effective_at=_instant(context, input.effective_at),
        reference=input.reference,
    )
    _check(event)
    _check_reversible(event, await _booked(context, event))
    return await _produce(context, event)


async def _booked(context: Context, event: ReversalEvent) -> ShownEntry | None:
    """The entry that a reversal names, waited for as long as a portfolio that is about to be booked."""
    patience_ends_s = time.monotonic() + BOOKING_WAIT_S
    while True:
        found = await context.services.ledger.event(event.reverses)
        if found is not None or time.monotonic() >= patience_ends_s:
            return found
        await asyncio.sleep(BOOKING_POLL_INTERVAL_MS / 1_000)


def _check_reversible(event: ReversalEvent, found: ShownEntry | None) -> None:
    """Raises PublicError UNKNOWN_EVENT, ALREADY_REVERSED, NOT_REVERSIBLE."""
    if found is None or found.entry.portfolio_id != event.portfolio_id:
        raise PublicError("UNKNOWN_EVENT", "there is no such event in this portfolio's ledger")
    # A retry under the same event id changes nothing.
    if found.reversed_by not in (None, event.event_id):
        raise PublicError("ALREADY_REVERSED", f"it is reversed by {found.reversed_by} already")
    kind = found.entry.kind
    if kind in CORPORATE or kind is LedgerKind.OPEN or found.entry.reverses is not None:
        raise PublicError("NOT_REVERSIBLE", "only fills and cash movements are reversed, and no reversals")


async def _writable(context: Context, portfolio_id: str) -> PortfolioIdentity:
    """A portfolio that the caller may write to. Raises PublicError NOT_FOUND, UNAUTHENTICATED, FORBIDDEN."""
    access = context.require(SCOPE_LEDGER_WRITE)
    identity = await context.services.portfolios.find_expected(portfolio_id)
    if identity is None or not access.may_see(identity.owner):
        raise not_found("portfolio")
    return identity


def _check_currency(currency: str, portfolio: PortfolioIdentity) -> None:
    if currency != portfolio.base_currency:
        raise PublicError("BAD_CURRENCY", f"the portfolio's base currency is {portfolio.base_currency}")


def _event_id(portfolio_id: str, given: str | None) -> str:
    """The event's full id. Raises PublicError BAD_IDENTIFIER."""
    if given is None:
        return str(uuid_utils.uuid7())
    event_id = f"{portfolio_id}/{given}"
    if not given or "/" in given:
        raise PublicError(ErrorCode.BAD_IDENTIFIER, "eventId has at least one character and no /")
    if len(event_id) > IDENTIFIER_LENGTH_MAX:
        text = f"<portfolioId>/<eventId> has {len(event_id)} characters, {IDENTIFIER_LENGTH_MAX} are allowed"
        raise PublicError(ErrorCode.BAD_IDENTIFIER, text)
    return event_id


def _instant(context: Context, given: datetime | None) -> datetime:
    return to_datetime(context.services.clock.now_ns()) if given is None else given


def _check(event: PortfolioEvent) -> None:
    try:
        check_event(event)
    except EventRejected as error:
        raise PublicError(error.code, str(error)) from None


async def _produce(context: Context, event: PortfolioEvent) -> EventReceipt:
    _check(event)
    try:
        acknowledgement = await context.services.events.produce(event)
    except ProducerAwayError as error:
        raise PublicError(ErrorCode.UNAVAILABLE, f"the event log is away: {error}") from error
    return EventReceipt(
        event_id=strawberry.ID(event.event_id),
        portfolio_id=event.portfolio_id,
        accepted_at=datetime.now(UTC),
        partition=acknowledgement.partition,
        offset=str(acknowledgement.offset),
    )
