"""From what happened to the ledger entry that will say so: drafts, before a portfolio's state completes them.

A draft has everything that the event alone decides. `engine.portfolio` fills in `realized`, `cost`, `nav_effect`,
`cash_after`, `nav_before`, its place in the sequence and its hash.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

from msgspec.structs import replace

from engine.amounts import parse_amount, parse_number, value_micro
from engine.corporate_actions import Step
from engine.ledger import OUTGOING, LedgerEntry, LedgerKind, Side
from engine.messages import CashEvent, FillEvent, OpenEvent, ReversalEvent, content_hash


def draft_event(
    event: FillEvent | CashEvent | OpenEvent, recorded_at: datetime, scale: Fraction | None = None
) -> LedgerEntry:
    """The draft of an event of `portfolio-events`; `scale` turns an early fill's shares into today's."""
    common: dict[str, Any] = {
        "portfolio_id": event.portfolio_id,
        "event_id": event.event_id,
        "recorded_at": recorded_at,
        "content_hash": content_hash(event),
    }
    if isinstance(event, FillEvent):
        side = Side(event.side)
        quantity, price = parse_number(event.quantity, "quantity"), parse_number(event.price, "price")
        notional = value_micro(quantity, price)
        return replace(
            _BLANK,
            **common,
            kind=LedgerKind.FILL,
            symbol=event.symbol,
            side=side,
            quantity=quantity,
            price=price,
            scale=scale,
            amount=-notional if side is Side.BUY else notional,
            fee=parse_amount(event.fee, "fee"),
            effective_at=event.executed_at.astimezone(UTC),
            reference=event.order_id,
        )
    if isinstance(event, CashEvent):
        kind = LedgerKind(event.kind)
        return replace(
            _BLANK,
            **common,
            kind=kind,
            amount=parse_amount(event.amount, "amount") * (-1 if kind in OUTGOING else 1),
            effective_at=event.effective_at.astimezone(UTC),
            reference=event.reference,
        )
    return replace(_BLANK, **common, effective_at=event.opened_at.astimezone(UTC))


def draft_reversal(
    event: ReversalEvent, original: LedgerEntry, recorded_at: datetime, scale: Fraction | None
) -> LedgerEntry:
    """The draft that takes `original` back; `scale` turns its shares into today's. `realized` is taken back as well."""
    side = None if original.side is None else Side.SELL if original.side is Side.BUY else Side.BUY
    return replace(
        original,
        sequence=0,
        event_id=event.event_id,
        side=side,
        scale=scale,
        amount=-original.amount,
        fee=-original.fee,
        realized=-original.realized,
        cost=0,
        nav_effect=0,
        cash_after=0,
        nav_before=None,
        effective_at=event.effective_at.astimezone(UTC),
        recorded_at=recorded_at,
        reference=event.reference,
        reverses=event.reverses,
        content_hash=content_hash(event),
        hash=b"",
    )


def draft_split(
    step: Step, portfolio_id: str, change: Decimal, recorded_at: datetime, late: bool, content: bytes
) -> LedgerEntry:
    """A split that changes a position by `change` shares."""
    blank = _corporate(step, portfolio_id, "", recorded_at, late, content)
    return replace(blank, quantity=change, scale=step.scale)


def draft_accrual(
    step: Step, portfolio_id: str, held: Decimal, recorded_at: datetime, late: bool, content: bytes
) -> LedgerEntry:
    """A dividend owed on `held` shares (owed by the portfolio when negative). Raises AmountError."""
    assert step.per_share is not None
    return replace(
        _corporate(step, portfolio_id, "", recorded_at, late, content),
        quantity=held,
        price=step.per_share,
        receivable=value_micro(held, step.per_share),
    )


def draft_payment(
    step: Step, portfolio_id: str, amount: int, recorded_at: datetime, late: bool, content: bytes
) -> LedgerEntry:
    """A dividend of `amount` micro-units, accrued before, that becomes cash."""
    blank = _corporate(step, portfolio_id, "#paid", recorded_at, late, content)
    return replace(blank, amount=amount, receivable=-amount)


def _corporate(
    step: Step, portfolio_id: str, suffix: str, recorded_at: datetime, late: bool, content: bytes
) -> LedgerEntry:
    blank = _blank(portfolio_id, f"{step.action_id}#{portfolio_id}{suffix}", recorded_at, content)
    return replace(blank, kind=step.kind, symbol=step.symbol, effective_at=step.at, late=late, reference=step.action_id)


def _blank(portfolio_id: str, event_id: str, recorded_at: datetime, content: bytes) -> LedgerEntry:
    """An OPEN entry, for whose kind nothing else is to be said."""
    return replace(
        _BLANK,
        portfolio_id=portfolio_id,
        event_id=event_id,
        effective_at=recorded_at,
        recorded_at=recorded_at,
        content_hash=content,
    )


_BLANK = LedgerEntry(
    portfolio_id="",
    sequence=0,
    event_id="",
    kind=LedgerKind.OPEN,
    symbol=None,
    side=None,
    quantity=None,
    price=None,
    scale=None,
    amount=0,
    fee=0,
    receivable=0,
    realized=0,
    cost=0,
    nav_effect=0,
    cash_after=0,
    nav_before=None,
    effective_at=datetime(1970, 1, 1, tzinfo=UTC),
    recorded_at=datetime(1970, 1, 1, tzinfo=UTC),
    late=False,
    reference=None,
    reverses=None,
    content_hash=b"",
    hash=b"",
)
