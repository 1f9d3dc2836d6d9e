"""A portfolio as it was: the state of its ledger at a past position, valued at the prices of a past instant.

What counts at an instant t is what navstream had booked by t: the entries with recorded_at ≤ t, whenever they were
effective. What came late is not in it, and a later reversal does not take anything out of it. At an instant of the
grid the entries are exactly those that its equity snapshot includes, so that both show the same NAV.

Every entry carries its effects (engine.ledger), so a past state is the present one minus the effects of the entries
since, or the sum of the effects up to it: exact both ways, and the shorter way is taken.

    quantity     Σ ± shares of the fills, in the shares of their booking, + Σ changes by splits
    cost         Σ `cost`            cash = Σ (amount − fee)           receivables = Σ `receivable`

Prices at t are the newest ones recorded on the grid (hourly, at session closes and day cuts, and a symbol's first) at
or before t. Between two instants of the grid a price is therefore up to an hour older than what was known then; its
age and quality tell, and the answer stays the same whenever it is asked for. A price of before a split that the ledger
has at that position is divided by the split's ratio.

    day_pnl      NAV − NAV at the portfolio's last day cut ≤ t − external flows since
    day_base     of a position: its value at the cut + Σ signed notionals since (engine.positions)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from fractions import Fraction

import numpy as np

from engine.amounts import EXACT, plain, scale_number
from engine.ledger import EXTERNAL_FLOWS, INCOME, LedgerEntry, LedgerKind, Side
from engine.marks import UNKNOWN, Mark, MarkQuality
from engine.pnl import day_base_since, day_ratio_e12
from engine.positions import HotPosition, PositionValuation

_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class Effects:
    """What the entries of a span did, summed: those of one symbol, or those of none. Amounts in micro-units.

    `cash` = Σ (amount − fee), `fees` ≥ 0 are paid (FEE entries included), `notional` = −Σ amount of the fills;
    `trading`, `corporate`, `income` and `flows` as in engine.explain.
    """

    quantity: Decimal = _ZERO
    cost: int = 0
    cash: int = 0
    receivable: int = 0
    realized: int = 0
    fees: int = 0
    income: int = 0
    flows: int = 0
    trading: int = 0
    corporate: int = 0
    notional: int = 0
    nav_effect: int = 0

    def __add__(self, other: Effects) -> Effects:
        amounts = (getattr(self, name) + getattr(other, name) for name in _AMOUNTS)
        return Effects(EXACT.add(self.quantity, other.quantity), *amounts)

    @property
    def value_change(self) -> int:
        """What the entries themselves did to the value of positions: nav_effect without cash and receivables."""
        return self.nav_effect - self.cash - self.receivable


_AMOUNTS = tuple(one.name for one in fields(Effects) if one.name != "quantity")
NOTHING = Effects()


@dataclass(frozen=True, slots=True)
class PastPosition:
    """Signed `quantity` ≠ 0 in the shares of its time; `cost` in micro-units."""

    quantity: Decimal
    cost: int


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What the first `ledger_sequence` entries of a portfolio add up to; micro-units, sums count from the opening."""

    ledger_sequence: int = 0
    positions: dict[str, PastPosition] = field(default_factory=dict)
    cash: int = 0
    receivables: int = 0
    realized: int = 0
    fees: int = 0
    income: int = 0
    flows: int = 0
    trading: int = 0
    corporate: int = 0

    def plus(self, effects: Mapping[str | None, Effects], ledger_sequence: int) -> LedgerState:
        """The state at `ledger_sequence`, after entries with these effects."""
        return self._moved(effects, 1, ledger_sequence)

    def minus(self, effects: Mapping[str | None, Effects], ledger_sequence: int) -> LedgerState:
        """The state at `ledger_sequence`, before entries with these effects."""
        return self._moved(effects, -1, ledger_sequence)

    def _moved(self, effects: Mapping[str | None, Effects], sign: int, ledger_sequence: int) -> LedgerState:
        total = sum_effects(effects.values())
        positions = dict(self.positions)
        for symbol, one in effects.items():
            if symbol is None:
                continue
            held = positions.pop(symbol, PastPosition(_ZERO, 0))
            quantity = EXACT.add(held.quantity, EXACT.multiply(one.quantity, sign))
            if quantity:
                positions[symbol] = PastPosition(quantity, held.cost + sign * one.cost)
        return LedgerState(
            ledger_sequence=ledger_sequence,
            positions=positions,
            cash=self.cash + sign * total.cash,
            receivables=self.receivables + sign * total.receivable,
            realized=self.realized + sign * total.realized,
            fees=self.fees + sign * total.fees,
            income=self.income + sign * total.income,
            flows=self.flows + sign * total.flows,
            trading=self.trading + sign * total.trading,
            corporate=self.corporate + sign * total.corporate,
        )


@dataclass(frozen=True, slots=True)
class Cycle:
    """The cycle that a position was in: what it had realised (gross) and paid in fees by then; micro-units."""

    realized: int
    fees: int
    opened_at_ns: int
    opened_sequence: int


@dataclass(frozen=True, slots=True)
class DayStart:
    """The portfolio at its day cut (before the opening: nothing), and what was booked since.

    `values` are of the positions then; `flows` are (NAV before, amount) of the external ones since, oldest first.
    """

    cut_at_ns: int
    nav: int = 0
    values: Mapping[str, int] = field(default_factory=dict)
    effects: Mapping[str | None, Effects] = field(default_factory=dict)
    flows: Sequence[tuple[int, int]] = ()

    def base(self, symbol: str) -> int:
        """The day base of a position."""
        return self.values.get(symbol, 0) + self.effects.get(symbol, NOTHING).notional


NOTHING_BEFORE = DayStart(0)
Splits = Mapping[str, tuple[tuple[int, str], ...]]


def effects_of(entries: Iterable[LedgerEntry]) -> dict[str | None, Effects]:
    """The effects of entries by their symbol."""
    effects: dict[str | None, Effects] = {}
    for entry in entries:
        effects[entry.symbol] = effects.get(entry.symbol, NOTHING) + _effects(entry)
    return effects


def sum_effects(effects: Iterable[Effects]) -> Effects:
    return sum(effects, NOTHING)


def traded_shares(side: Side, quantity: Decimal, scale: Fraction | None) -> Decimal:
    """The signed shares of a fill, in the shares of its booking."""
    shares = quantity if scale is None else scale_number(quantity, scale, "quantity")
    return shares if side is Side.BUY else shares.copy_negate()


def hot_positions(
    state: LedgerState, splits: Splits, cycles: Mapping[str, Cycle], day: DayStart
) -> dict[str, HotPosition]:
    """The positions as hot state had them. Without its cycle a position shows no realised P&L."""
    unknown = Cycle(0, 0, 0, 0)
    held = {}
    for symbol, position in state.positions.items():
        cycle = cycles.get(symbol, unknown)
        held[symbol] = HotPosition(
            quantity=plain(position.quantity),
            cost=position.cost,
            realized=cycle.realized,
            day_base=day.base(symbol),
            opened_at_ns=cycle.opened_at_ns,
            fees=cycle.fees,
            opened_sequence=cycle.opened_sequence,
            splits=splits.get(symbol, ()),
        )
    return held


def nav_of(state: LedgerState, values: Iterable[int]) -> int:
    return state.cash + state.receivables + sum(values)


def mark_at(state: LedgerState, valued: Sequence[PositionValuation], day: DayStart, at_ns: int) -> Mark:
    """The mark of the past: no evaluator made it, so its epoch and its sequence are 0."""
    positions_value = sum(one.value for one in valued)
    nav = nav_of(state, (positions_value,))
    start = day_base_since(day.nav, day.flows)
    factor = np.nan if start.factor is None else start.factor
    ratio = int(day_ratio_e12(np.array([nav]), np.array([factor]), np.array([start.segment_base]))[0])
    return Mark(
        nav=nav,
        cash=state.cash,
        receivables=state.receivables,
        positions_value=positions_value,
        unrealized=positions_value - sum(one.cost for one in valued),
        realized=state.realized,
        fees=state.fees,
        income=state.income,
        flows=state.flows,
        trading=state.trading,
        corporate=state.corporate,
        day_pnl=nav - start.base,
        day_pnl_ratio_e12=None if ratio == UNKNOWN else ratio,
        day_cut_at_ns=day.cut_at_ns,
        as_of_ns=at_ns,
        sequence=0,
        ledger_sequence=state.ledger_sequence,
        quality=max((one.quality for one in valued), default=MarkQuality.LIVE),
        epoch=0,
    )


def _effects(entry: LedgerEntry) -> Effects:
    kind, quantity = entry.kind, _ZERO
    if kind is LedgerKind.FILL:
        assert entry.side is not None and entry.quantity is not None
        quantity = traded_shares(entry.side, entry.quantity, entry.scale)
    elif kind is LedgerKind.SPLIT:
        quantity = entry.quantity or _ZERO
    return Effects(
        quantity=quantity,
        cost=entry.cost,
        cash=entry.amount - entry.fee,
        receivable=entry.receivable,
        realized=entry.realized,
        fees=entry.fee - (entry.amount if kind is LedgerKind.FEE else 0),
        income=entry.amount + entry.receivable if kind in INCOME else 0,
        flows=entry.amount if kind in EXTERNAL_FLOWS else 0,
        trading=entry.nav_effect + entry.fee if kind is LedgerKind.FILL else 0,
        corporate=entry.nav_effect if kind is LedgerKind.SPLIT else 0,
        notional=-entry.amount if kind is LedgerKind.FILL else 0,
        nav_effect=entry.nav_effect,
    )
