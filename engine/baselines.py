"""What portfolios were worth at a day cut: their baselines, and how to find one that nobody took.

A baseline is taken at the cut by the evaluator that owns the portfolio. When nobody evaluated then, it is estimated
afterwards: the ledger entries recorded since the cut are taken back from the present state,

    quantity    − ± quantity × scale of each FILL (a reversal has the other side), − quantity of each SPLIT
    cash        − (amount − fee)          receivables − receivable          cost − cost

and what was held is valued at the prices of the cut, in the shares that it was held in (`price_in_shares_at`). A
position without a price counts at its cost. Where all these prices were recorded at the cut, that is the baseline which
would have been taken; otherwise `estimated` says for ever that it was made from older ones, or from later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from fractions import Fraction

from engine.amounts import AmountError, scale_number
from engine.booking import AppliedSplit
from engine.ledger import EXTERNAL_FLOWS, LedgerKind, Side
from engine.pnl import DayBase, day_base_since
from engine.portfolio import Portfolio
from engine.positions import carried_value

_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a portfolio was worth at a cut, `ledger_sequence` entries being booked; micro-units."""

    portfolio_id: str
    nav: int
    ledger_sequence: int
    values: dict[str, int]
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Moved:
    """What one ledger entry moved; amounts in micro-units."""

    kind: LedgerKind
    symbol: str | None
    side: Side | None
    quantity: Decimal | None
    scale: Fraction | None
    amount: int
    fee: int
    receivable: int
    cost: int
    nav_before: int


@dataclass(slots=True)
class Since:
    """Of one portfolio since a cut: flows (NAV before, amount), and per symbol signed notionals and what else moved."""

    flows: list[tuple[int, int]] = field(default_factory=list)
    traded: dict[str, int] = field(default_factory=dict)
    cash: int = 0
    receivables: int = 0
    quantities: dict[str, Decimal] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)

    def add(self, entry: Moved) -> None:
        """Count the next entry."""
        self.cash += entry.amount - entry.fee
        self.receivables += entry.receivable
        if entry.kind in EXTERNAL_FLOWS:
            self.flows.append((entry.nav_before, entry.amount))
        if entry.kind not in (LedgerKind.FILL, LedgerKind.SPLIT):
            return
        symbol, change = entry.symbol, entry.quantity
        assert symbol is not None and change is not None
        if entry.kind is LedgerKind.FILL:
            self.traded[symbol] = self.traded.get(symbol, 0) - entry.amount
            if entry.scale is not None:
                change = scale_number(change, entry.scale, "quantity")
            change = change if entry.side is Side.BUY else -change
        self.quantities[symbol] = self.quantities.get(symbol, _ZERO) + change
        self.costs[symbol] = self.costs.get(symbol, 0) + entry.cost


# A price and its instant; the price in the shares of that instant.
Priced = tuple[Decimal, int]


def day_bases(baseline: Baseline | None, since: Since) -> tuple[DayBase, dict[str, int]]:
    """The day base of a portfolio and of each position held at the cut or traded since."""
    values, traded = (baseline.values if baseline else {}), since.traded
    bases = {symbol: values.get(symbol, 0) + traded.get(symbol, 0) for symbol in values.keys() | traded.keys()}
    return day_base_since(baseline.nav if baseline else 0, since.flows), bases


def held_at(portfolio: Portfolio, since: Since) -> dict[str, Decimal]:
    """The quantities before what moved since."""
    now = {symbol: position.quantity for symbol, position in portfolio.positions.items()}
    symbols = now.keys() | since.quantities.keys()
    before = {symbol: now.get(symbol, _ZERO) - since.quantities.get(symbol, _ZERO) for symbol in symbols}
    return {symbol: quantity for symbol, quantity in before.items() if quantity}


def price_in_shares_at(cut_at: datetime, priced: Priced, splits: Iterable[AppliedSplit]) -> Decimal | None:
    """A price in the shares that the ledger counted at a cut; `splits` are those it has, with when it got them.

    Of the splits after the price's instant it had some at the cut, which divide the price; of those up to the price's
    instant it got some after the cut, which multiply it. None when it leaves the exact range.
    """
    price, ts_event_ns = priced
    scale = Fraction(1)
    for applied in splits:
        is_later = applied.split.effective_at_ns > ts_event_ns
        if is_later and applied.applied_at <= cut_at:
            scale /= applied.split.scale
        elif not is_later and applied.applied_at > cut_at:
            scale *= applied.split.scale
    try:
        return scale_number(price, scale, "price")
    except AmountError:
        return None


def estimate(
    portfolio: Portfolio,
    since: Since,
    ledger_sequence: int,
    price_of: Callable[[str], Decimal | None],
    recorded: Container[str] = (),
) -> Baseline:
    """The baseline before what moved since, at the prices of the cut; `ledger_sequence` entries were booked then.

    `recorded`: the symbols whose prices are those of the cut.
    """
    values = {}
    for symbol, quantity in held_at(portfolio, since).items():
        held = portfolio.positions.get(symbol)
        cost = (held.cost if held else 0) - since.costs.get(symbol, 0)
        values[symbol] = carried_value(quantity, cost, price_of(symbol))
    nav = portfolio.cash - since.cash + portfolio.receivables - since.receivables + sum(values.values())
    is_exact = all(symbol in recorded for symbol in values)
    return Baseline(portfolio.portfolio_id, nav, ledger_sequence, values, estimated=not is_exact)
