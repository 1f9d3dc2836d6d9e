"""The exact reference: a portfolio as the fold of its ledger, in Decimal and whole micro-units.

    cash          = Σ (amount − fee)
    position      = one cycle from flat to flat; quantity and cost signed (short: both negative)
    adding        cost += notional; the average cost is cost / quantity
    reducing      releases cost × closed / quantity (half-even, all of it at the last unit), realises
                  (notional of the closed part − released cost) × sign, and leaves the average
    crossing 0    closes all, then opens the rest at the fill price: two effects of one event, whose notionals
                  sum to the fill's; a new cycle starts with realised 0
    fees          never part of the cost; realised P&L is gross

    NAV           = cash + Σ value, value = round(quantity × price); an unpriced position counts at its cost
    NAV           = flows + realized + unrealized + income − fees               (checked by `check_invariants`)

Every ledger entry is booked here before it is written, and folded here again by the reconciler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal

from engine.amounts import (
    AmountError,
    check_amount,
    check_number,
    parse_amount,
    parse_number,
    share_micro,
    value_micro,
)
from engine.ledger import EXTERNAL_FLOWS, INCOME, OUTGOING, LedgerEntry, LedgerKind, Side
from engine.messages import CashEvent, EventRejected, FillEvent, OpenEvent, PortfolioEvent, content_hash
from engine.positions import carried_value


class LedgerMismatch(ValueError):
    """A ledger entry whose recorded figures are not those that its content gives."""


@dataclass(frozen=True, slots=True)
class Position:
    """Signed `quantity` ≠ 0; `cost` has its sign; `realized` is this cycle's gross P&L (micro-units)."""

    quantity: Decimal
    cost: int
    realized: int
    opened_at: datetime


Admission = Callable[[LedgerEntry, Position | None], None]


@dataclass(slots=True)
class Portfolio:
    """Folded state; amounts in micro-units. `flows` and `income` are signed sums since the opening."""

    portfolio_id: str
    base_currency: str
    cash: int = 0
    realized: int = 0
    fees: int = 0
    income: int = 0
    flows: int = 0
    ledger_sequence: int = 0
    positions: dict[str, Position] = field(default_factory=dict)

    def book(
        self, event: PortfolioEvent, recorded_at: datetime, nav_before: int, admit: Admission | None = None
    ) -> LedgerEntry:
        """Book an event: change this state and return the entry to write.

        `nav_before` is the NAV just before, kept on external flows. `admit` is shown a fill's entry and the position
        after it before anything changes, and raises AmountError to refuse it.

        Raises EventRejected and changes nothing when the event breaks a rule of this portfolio (ALREADY_OPEN,
        WRONG_CURRENCY, or out of the exact range).
        """
        self._check_currency(event)
        entry = _draft(event, recorded_at, self.ledger_sequence + 1)
        if entry.kind in EXTERNAL_FLOWS:
            entry = replace(entry, nav_before=nav_before)
        try:
            return self._apply(entry, admit)
        except AmountError as error:
            raise EventRejected(error.code, str(error)) from None

    def replay(self, entry: LedgerEntry) -> None:
        """Fold one recorded entry. Raises LedgerMismatch when its figures or its sequence are not what follows."""
        if entry.sequence != self.ledger_sequence + 1:
            raise LedgerMismatch(f"{self.portfolio_id}: entry {entry.sequence} follows entry {self.ledger_sequence}")
        if entry.quantity is not None and entry.price is not None and entry.side is not None:
            notional = value_micro(entry.quantity, entry.price)
            expected = -notional if entry.side is Side.BUY else notional
            if entry.amount != expected:
                raise LedgerMismatch(f"{self.portfolio_id}#{entry.sequence}: amount {entry.amount}, not {expected}")
        booked = self._apply(entry)
        if (booked.realized, booked.cash_after) != (entry.realized, entry.cash_after):
            raise LedgerMismatch(
                f"{self.portfolio_id}#{entry.sequence}: realized, cash_after {entry.realized}, {entry.cash_after}, "
                f"not {booked.realized}, {booked.cash_after}"
            )

    def _check_currency(self, event: PortfolioEvent) -> None:
        if isinstance(event, OpenEvent):
            if self.ledger_sequence:
                raise EventRejected("ALREADY_OPEN", f"portfolio {self.portfolio_id} is open already")
        elif event.currency != self.base_currency:
            raise EventRejected("WRONG_CURRENCY", f"{event.currency} in a {self.base_currency} portfolio")

    def _apply(self, entry: LedgerEntry, admit: Admission | None = None) -> LedgerEntry:
        """Compute all before changing anything, so that a refusal leaves the state as it was."""
        cash = check_amount(self.cash + entry.amount - entry.fee, "cash")
        realized, position = 0, None
        if entry.kind is LedgerKind.FILL:
            realized, position = self._fill(entry)
            if admit is not None:
                admit(entry, position)
        total_realized = check_amount(self.realized + realized, "realized")
        paid = entry.fee - (entry.amount if entry.kind is LedgerKind.FEE else 0)
        fees = check_amount(self.fees + paid, "fees")
        income = check_amount(self.income + (entry.amount if entry.kind in INCOME else 0), "income")
        flows = check_amount(self.flows + (entry.amount if entry.kind in EXTERNAL_FLOWS else 0), "flows")
        if entry.kind is LedgerKind.FILL:
            assert entry.symbol is not None
            if position is None:
                self.positions.pop(entry.symbol, None)
            else:
                self.positions[entry.symbol] = position
        self.cash, self.realized = cash, total_realized
        self.fees, self.income, self.flows = fees, income, flows
        self.ledger_sequence = entry.sequence
        return replace(entry, realized=realized, cash_after=cash)

    def _fill(self, entry: LedgerEntry) -> tuple[int, Position | None]:
        """The realised P&L of a fill and the position after it (None: flat)."""
        assert entry.symbol is not None and entry.quantity is not None and entry.price is not None
        held = self.positions.get(entry.symbol)
        sign = 1 if entry.side is Side.BUY else -1
        traded, notional = sign * entry.quantity, -entry.amount
        if held is None:
            return 0, _checked(Position(traded, notional, 0, entry.effective_at))
        if (held.quantity > 0) == (traded > 0):
            quantity, cost = held.quantity + traded, held.cost + notional
            return 0, _checked(replace(held, quantity=quantity, cost=cost))
        closed = min(abs(held.quantity), entry.quantity)
        closing = abs(notional) if closed == entry.quantity else value_micro(closed, entry.price)
        released = share_micro(abs(held.cost), closed, abs(held.quantity))
        realized = (closing - released) * -sign
        quantity = held.quantity + traded
        if not quantity:
            return realized, None
        if (quantity > 0) == (held.quantity > 0):
            cost = held.cost + sign * released
            return realized, _checked(Position(quantity, cost, held.realized + realized, held.opened_at))
        return realized, _checked(Position(quantity, sign * (abs(notional) - closing), 0, entry.effective_at))


@dataclass(frozen=True, slots=True)
class Valuation:
    """What a portfolio is worth at given prices; micro-units."""

    nav: int
    positions_value: int
    unrealized: int
    values: dict[str, int]
    missing: frozenset[str]


def value_portfolio(portfolio: Portfolio, prices: Mapping[str, Decimal]) -> Valuation:
    """Value every position from scratch; symbols without a price count at cost and are listed as missing."""
    values = {
        symbol: carried_value(held.quantity, held.cost, prices.get(symbol))
        for symbol, held in portfolio.positions.items()
    }
    positions_value = sum(values.values())
    return Valuation(
        nav=portfolio.cash + positions_value,
        positions_value=positions_value,
        unrealized=positions_value - sum(held.cost for held in portfolio.positions.values()),
        values=values,
        missing=frozenset(symbol for symbol in values if symbol not in prices),
    )


def fold(portfolio_id: str, base_currency: str, entries: Iterable[LedgerEntry]) -> Portfolio:
    """The portfolio that a ledger describes. Raises LedgerMismatch."""
    portfolio = Portfolio(portfolio_id, base_currency)
    for entry in entries:
        portfolio.replay(entry)
    return portfolio


def check_invariants(portfolio: Portfolio, prices: Mapping[str, Decimal]) -> None:
    """Raise AssertionError when an identity of the accounting does not hold."""
    valuation = value_portfolio(portfolio, prices)
    explained = portfolio.flows + portfolio.realized + valuation.unrealized + portfolio.income - portfolio.fees
    assert valuation.nav == explained, f"NAV {valuation.nav} is not explained by {explained}"
    for symbol, held in portfolio.positions.items():
        assert held.quantity, f"{symbol} is flat and still there"
        # A dust position can cost less than half a micro-unit.
        assert held.cost == 0 or (held.cost > 0) == (held.quantity > 0), f"{symbol}: cost against quantity"


def _draft(event: PortfolioEvent, recorded_at: datetime, sequence: int) -> LedgerEntry:
    """The entry of an event, before the portfolio's state decides `realized` and `cash_after`."""
    kind, amount, fee, effective_at = LedgerKind.OPEN, 0, 0, recorded_at
    symbol, side, quantity, price, reference = None, None, None, None, None
    if isinstance(event, FillEvent):
        kind, symbol, side = LedgerKind.FILL, event.symbol, Side(event.side)
        quantity, price = parse_number(event.quantity, "quantity"), parse_number(event.price, "price")
        notional = value_micro(quantity, price)
        amount, fee = -notional if side is Side.BUY else notional, parse_amount(event.fee, "fee")
        effective_at, reference = event.executed_at, event.order_id
    elif isinstance(event, CashEvent):
        kind = LedgerKind(event.kind)
        amount = parse_amount(event.amount, "amount") * (-1 if kind in OUTGOING else 1)
        effective_at, reference = event.effective_at, event.reference
    else:
        effective_at = event.opened_at
    return LedgerEntry(
        portfolio_id=event.portfolio_id,
        sequence=sequence,
        event_id=event.event_id,
        kind=kind,
        symbol=symbol,
        side=side,
        quantity=quantity,
        price=price,
        amount=amount,
        fee=fee,
        realized=0,
        cash_after=0,
        nav_before=None,
        effective_at=effective_at.astimezone(UTC),
        recorded_at=recorded_at,
        reference=reference,
        content_hash=content_hash(event),
    )


def _checked(position: Position) -> Position:
    check_number(position.quantity, "position quantity")
    check_amount(position.cost, "position cost")
    check_amount(position.realized, "position realized")
    return position
