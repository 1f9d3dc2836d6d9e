"""The exact reference: a portfolio as the fold of its ledger, in Decimal and whole micro-units.

    cash          = Σ (amount − fee)                receivables = Σ receivable
    position      = one cycle from flat to flat; quantity and cost signed (short: both negative)
    adding        cost += notional; the average cost is cost / quantity
    reducing      releases cost × closed / quantity (half-even, all of it at the last unit), realises
                  (notional of the closed part − released cost) × sign, and leaves the average
    crossing 0    closes all, then opens the rest at the fill price: two effects of one event, whose notionals
                  sum to the fill's; a new cycle starts with realised 0; the fee belongs to the cycle that ends
    fees          never part of the cost; realised P&L is gross
    every fill    change of cost = realized − amount

    split         quantity × ratio, half-even to the exact range; the cost stays
    reversal      takes back what the entry did to quantity (in today's shares), cost, realised P&L, cash and fees

After a split or a reversal a cost may have no quantity of its sign to stand for (the position is flat, or its quantity
changed sides): it is realised, `realized −= cost`, and NAV does not move.

    NAV           = cash + receivables + Σ value, value = round(quantity × price); an unpriced position counts at cost
    NAV           = flows + realized + unrealized + income − fees               (checked by `check_invariants`)
    ΔNAV          = Σ nav_effect of the entries + what prices did; `trading` is the part of the fills without their
                  fees, `corporate` that of splits, both since the opening

Every ledger entry is booked here before it is written, and folded here again by the reconciler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

import msgspec
from msgspec.structs import replace

from engine.amounts import AmountError, check_amount, check_number, scale_number, share_micro, value_micro
from engine.ledger import CHAIN_START, EXTERNAL_FLOWS, INCOME, LedgerEntry, LedgerKind, Side, chain_hash
from engine.messages import EventRejected, OpenEvent, PortfolioEvent, ReversalEvent
from engine.positions import carried_value


class LedgerMismatch(ValueError):
    """A ledger entry whose recorded figures are not those that its content gives."""


class Position(msgspec.Struct, frozen=True, gc=False):
    """Signed `quantity` ≠ 0; `cost` has its sign. `realized` (gross) and `fees` are of the cycle that began with the
    entry `opened_sequence`; micro-units. `opened_at` is what that entry says of itself, `held_since` the later of that
    and the instant at which it was booked: nobody has held a position before both."""

    quantity: Decimal
    cost: int
    realized: int
    fees: int
    opened_at: datetime
    opened_sequence: int
    held_since: datetime


@dataclass(frozen=True, slots=True)
class ClosedPosition:
    """A cycle that came to its end with the entry `closed_sequence`; micro-units."""

    symbol: str
    is_long: bool
    realized: int
    fees: int
    opened_at: datetime
    closed_at: datetime
    opened_sequence: int
    closed_sequence: int

    @property
    def is_profitable(self) -> bool:
        """Whether anything is left of what the cycle realised once its fees are paid."""
        return self.realized > self.fees


class Present(msgspec.Struct, frozen=True, gc=False):
    """What the evaluator knows while it books: NAV just before, and the price of the entry's symbol before and after
    it (they differ at a split alone); None where there is no price."""

    nav: int
    price_before: Decimal | None = None
    price: Decimal | None = None


class Booking(msgspec.Struct, frozen=True):
    """A complete entry, the cycle that it ended if any, what it did to the value of its position (micro-units), and
    the position before it."""

    entry: LedgerEntry
    closed: ClosedPosition | None
    value_change: int
    before: Position | None = None


class _Effect(msgspec.Struct, frozen=True):
    """What an entry does to the position in its symbol."""

    realized: int = 0
    position: Position | None = None
    closed: ClosedPosition | None = None


class Move(msgspec.Struct, frozen=True):
    """What an entry would do to a position: the position before and after it, and what each is worth (micro-units)."""

    before: Position | None
    after: Position | None
    worth_before: int
    worth_after: int


Admission = Callable[[LedgerEntry, Move], None]


@dataclass(slots=True)
class Portfolio:
    """Folded state; amounts in micro-units. The sums are signed and count from the opening.

    `fills` counts the fills that stand; `streak` the closes in a row, up to the last one, that were profitable, since
    the last reversal of a fill: an entry does not tell which closes rested on the fill that it takes back.
    """

    portfolio_id: str
    base_currency: str
    cash: int = 0
    receivables: int = 0
    realized: int = 0
    fees: int = 0
    income: int = 0
    flows: int = 0
    trading: int = 0
    corporate: int = 0
    ledger_sequence: int = 0
    ledger_hash: bytes = CHAIN_START
    fills: int = 0
    streak: int = 0
    positions: dict[str, Position] = field(default_factory=dict)

    def check_event(self, event: PortfolioEvent) -> None:
        """Raises EventRejected (ALREADY_OPEN, WRONG_CURRENCY) when the event is not for a portfolio like this."""
        if isinstance(event, OpenEvent):
            if self.ledger_sequence:
                raise EventRejected("ALREADY_OPEN", f"portfolio {self.portfolio_id} is open already")
        elif not isinstance(event, ReversalEvent) and event.currency != self.base_currency:
            raise EventRejected("WRONG_CURRENCY", f"{event.currency} in a {self.base_currency} portfolio")

    def book(self, draft: LedgerEntry, present: Present, admit: Admission | None = None) -> Booking:
        """Complete a draft (engine.entries): change this state and return the entry to write.

        `admit` is shown an entry that moves a position before anything changes, and raises AmountError to refuse it.
        Raises AmountError and changes nothing when a figure leaves the exact range.
        """
        effect = self._effect(draft, self.ledger_sequence + 1)
        value_change, before = 0, None
        if _moves_position(draft):
            before, after = self.positions.get(draft.symbol or ""), effect.position
            worth_before, worth_after = _worth(before, present.price_before), _worth(after, present.price)
            value_change = worth_after - worth_before
            if admit is not None:
                admit(draft, Move(before, after, worth_before, worth_after))
        entry = replace(
            draft,
            sequence=self.ledger_sequence + 1,
            realized=effect.realized,
            cost=_cost_change(draft, effect.realized),
            nav_effect=draft.amount - draft.fee + draft.receivable + value_change,
            cash_after=self.cash + draft.amount - draft.fee,
            nav_before=present.nav if draft.kind in EXTERNAL_FLOWS else None,
        )
        entry = replace(entry, hash=chain_hash(self.ledger_hash, entry))
        self._apply(entry, effect)
        return Booking(entry, effect.closed, value_change, before)

    def replay(self, entry: LedgerEntry) -> ClosedPosition | None:
        """Fold one recorded entry; returns the cycle that it ended.

        Raises LedgerMismatch when its figures, its sequence or its hash are not what follows.
        """
        if entry.sequence != self.ledger_sequence + 1:
            raise LedgerMismatch(f"{self.portfolio_id}: entry {entry.sequence} follows entry {self.ledger_sequence}")
        if entry.quantity is not None and entry.price is not None and entry.side is not None:
            notional = value_micro(entry.quantity, entry.price)
            expected = -notional if entry.side is Side.BUY else notional
            if entry.amount != expected:
                raise LedgerMismatch(f"{self.portfolio_id}#{entry.sequence}: amount {entry.amount}, not {expected}")
        effect = self._effect(entry, entry.sequence)
        follows: dict[str, object] = {
            "realized": effect.realized,
            "cost": _cost_change(entry, effect.realized),
            "cash_after": self.cash + entry.amount - entry.fee,
            "hash": chain_hash(self.ledger_hash, entry),
        }
        for name, figure in follows.items():
            if getattr(entry, name) != figure:
                found, wanted = _readable(getattr(entry, name)), _readable(figure)
                raise LedgerMismatch(f"{self.portfolio_id}#{entry.sequence}: {name} {found}, not {wanted}")
        self._apply(entry, effect)
        return effect.closed

    def _apply(self, entry: LedgerEntry, effect: _Effect) -> None:
        """Compute all before changing anything, so that a refusal leaves the state as it was."""
        kind = entry.kind
        cash = check_amount(entry.cash_after, "cash")
        receivables = check_amount(self.receivables + entry.receivable, "receivables")
        realized = check_amount(self.realized + entry.realized, "realized")
        paid = entry.fee - (entry.amount if kind is LedgerKind.FEE else 0)
        fees = check_amount(self.fees + paid, "fees")
        earned = entry.amount + entry.receivable if kind in INCOME else 0
        income = check_amount(self.income + earned, "income")
        flows = check_amount(self.flows + (entry.amount if kind in EXTERNAL_FLOWS else 0), "flows")
        traded = entry.nav_effect + entry.fee if kind is LedgerKind.FILL else 0
        trading = check_amount(self.trading + traded, "trading")
        moved = entry.nav_effect if kind is LedgerKind.SPLIT else 0
        corporate = check_amount(self.corporate + moved, "corporate")
        if _moves_position(entry):
            assert entry.symbol is not None
            self.positions.pop(entry.symbol, None)
            if effect.position is not None:
                self.positions[entry.symbol] = effect.position
        self.cash, self.receivables, self.realized = cash, receivables, realized
        self.fees, self.income, self.flows = fees, income, flows
        self.trading, self.corporate = trading, corporate
        if kind is LedgerKind.FILL:
            if entry.reverses is not None:
                self.fills, self.streak = self.fills - 1, 0
            else:
                self.fills += 1
                if effect.closed is not None:
                    self.streak = self.streak + 1 if effect.closed.is_profitable else 0
        self.ledger_sequence, self.ledger_hash = entry.sequence, entry.hash

    def _effect(self, entry: LedgerEntry, sequence: int) -> _Effect:
        if not _moves_position(entry):
            return _Effect()
        assert entry.symbol is not None and entry.quantity is not None
        held = self.positions.get(entry.symbol)
        if entry.kind is LedgerKind.SPLIT:
            return _shift(held, entry, sequence, entry.quantity)
        shares = entry.quantity if entry.scale is None else scale_number(entry.quantity, entry.scale, "quantity")
        traded = shares if entry.side is Side.BUY else -shares
        move = _fill if entry.reverses is None else _shift
        return move(held, entry, sequence, traded)


def _fill(held: Position | None, entry: LedgerEntry, sequence: int, traded: Decimal) -> _Effect:
    """`traded`: signed, in today's shares."""
    if not traded:
        raise AmountError("NOT_POSITIVE", "quantity in today's shares is 0")
    notional = -entry.amount
    if held is None:
        opened = Position(traded, notional, 0, entry.fee, entry.effective_at, sequence, _held_since(entry))
        return _Effect(0, _checked(opened))
    quantity, fees = held.quantity + traded, held.fees + entry.fee
    if (held.quantity > 0) == (traded > 0):
        return _Effect(0, _checked(replace(held, quantity=quantity, cost=held.cost + notional, fees=fees)))
    sign = 1 if traded > 0 else -1
    closed = min(abs(held.quantity), abs(traded))
    closing = _part(entry, closed, abs(traded))
    released = share_micro(abs(held.cost), closed, abs(held.quantity))
    realized = (closing - released) * -sign
    after = replace(
        held, quantity=quantity, cost=held.cost + sign * released, realized=held.realized + realized, fees=fees
    )
    if not quantity:
        return _Effect(realized, None, _close(entry, sequence, after, held))
    if (quantity > 0) == (held.quantity > 0):
        return _Effect(realized, _checked(after))
    rest = sign * (abs(notional) - closing)
    opened = Position(quantity, rest, 0, 0, entry.effective_at, sequence, _held_since(entry))
    return _Effect(realized, _checked(opened), _close(entry, sequence, after, held))


def _part(entry: LedgerEntry, closed: Decimal, traded: Decimal) -> int:
    """The notional of `closed` of the `traded` shares."""
    if closed == traded:
        return abs(entry.amount)
    assert entry.price is not None
    if entry.scale is None:
        return value_micro(closed, entry.price)
    return share_micro(abs(entry.amount), closed, traded)


def _shift(held: Position | None, entry: LedgerEntry, sequence: int, change: Decimal) -> _Effect:
    """Quantity += change, cost += realized − amount; a cost without a quantity of its sign is realised.

    Recorded entries pass through unchanged: what was realised once leaves nothing to realise.
    """
    before = held or Position(Decimal(0), 0, 0, 0, entry.effective_at, sequence, _held_since(entry))
    realized = entry.realized
    quantity, cost = before.quantity + change, before.cost + realized - entry.amount
    if not quantity or (cost and (cost > 0) != (quantity > 0)):
        realized, cost = realized - cost, 0
    after = replace(
        before, quantity=quantity, cost=cost, realized=before.realized + realized, fees=before.fees + entry.fee
    )
    if quantity:
        return _Effect(realized, _checked(after))
    return _Effect(realized, None, _close(entry, sequence, after, held) if held else None)


def _close(entry: LedgerEntry, sequence: int, after: Position, held: Position) -> ClosedPosition:
    assert entry.symbol is not None
    return ClosedPosition(
        symbol=entry.symbol,
        is_long=held.quantity > 0,
        realized=after.realized,
        fees=after.fees,
        opened_at=held.opened_at,
        closed_at=entry.effective_at,
        opened_sequence=held.opened_sequence,
        closed_sequence=sequence,
    )


def _held_since(entry: LedgerEntry) -> datetime:
    return max(entry.effective_at, entry.recorded_at)


def _moves_position(entry: LedgerEntry) -> bool:
    return entry.kind in (LedgerKind.FILL, LedgerKind.SPLIT)


def _cost_change(entry: LedgerEntry, realized: int) -> int:
    return realized - entry.amount if _moves_position(entry) else 0


def _worth(held: Position | None, price: Decimal | None) -> int:
    """What the position counts for in the Book."""
    return carried_value(held.quantity, held.cost, price) if held else 0


def _readable(figure: object) -> object:
    return figure.hex() if isinstance(figure, bytes) else figure


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
    values = {symbol: _worth(held, prices.get(symbol)) for symbol, held in portfolio.positions.items()}
    positions_value = sum(values.values())
    return Valuation(
        nav=portfolio.cash + portfolio.receivables + positions_value,
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


def _checked(position: Position) -> Position:
    check_number(position.quantity, "position quantity")
    check_amount(position.cost, "position cost")
    check_amount(position.realized, "position realized")
    check_amount(position.fees, "position fees")
    return position
