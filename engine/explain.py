"""Why NAV changed between two positions of a portfolio's ledger, in parts that sum to the change exactly.

    trading    Σ (nav_effect + fee) over FILL entries: fills against the price they met
    fees       −Σ fee + Σ amount of FEE entries                                           (≤ 0 but for reversals)
    income     Σ (amount + receivable) of INTEREST, DIVIDEND and DIVIDEND_ACCRUED
    flows      Σ amount of DEPOSIT, WITHDRAWAL and REWARD
    corporate  Σ nav_effect of SPLIT: what rounding and late arrivals did
    price      the rest: what the prices' own movement did to what was held

    price + trading + fees + income + flows + corporate = ΔNAV                P&L = ΔNAV − flows

A row is one symbol's entries and positions; one more row is of what has no symbol: cash with receivables, flows,
account fees and interest. Rows sum to the total in every part. The price part of a symbol is the change of its value
less what its entries did to that value (`Effects.value_change`), so it needs prices at both ends alone, and two
spans that meet at the same prices add up to the span of both:

    explain(a, c) = explain(a, b) + explain(b, c)

All amounts are whole micro-units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter, sub

from engine.as_of import NOTHING, Effects
from engine.marks import Mark


@dataclass(frozen=True, slots=True)
class Parts:
    price: int = 0
    trading: int = 0
    fees: int = 0
    income: int = 0
    flows: int = 0
    corporate: int = 0

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, name) + getattr(other, name) for name in PARTS))

    @property
    def nav_change(self) -> int:
        return sum(getattr(self, name) for name in PARTS)

    @property
    def pnl(self) -> int:
        return self.nav_change - self.flows


PARTS = tuple(one.name for one in fields(Parts))
# The columns of a mark that say why NAV moved.
SUMS = ("nav", "trading", "fees", "income", "flows", "corporate")
_sums: Callable[[Mark], tuple[int, ...]] = attrgetter(*SUMS)


@dataclass(frozen=True, slots=True)
class Worth:
    """What a portfolio is worth at one end: `cash` with receivables, and the value of each position."""

    cash: int
    values: Mapping[str, int]

    @property
    def nav(self) -> int:
        return self.cash + sum(self.values.values())


@dataclass(frozen=True, slots=True)
class Row:
    """One symbol's part of the change, or (`symbol` None) that of cash. `symbols_count` above 1: several, summed."""

    symbol: str | None
    value_from: int
    value_to: int
    parts: Parts
    symbols_count: int = 1


@dataclass(frozen=True, slots=True)
class Explanation:
    """`rows` by symbol, each that was held or has entries; the row of cash last."""

    nav_from: int
    nav_to: int
    total: Parts
    rows: list[Row]


def explain(begin: Worth, end: Worth, effects: Mapping[str | None, Effects]) -> Explanation:
    """What happened from `begin` to `end`, given the effects of all entries between them by symbol."""
    symbols = sorted({*begin.values, *end.values, *(symbol for symbol in effects if symbol is not None)})
    rows = [
        _row(symbol, begin.values.get(symbol, 0), end.values.get(symbol, 0), effects.get(symbol, NOTHING))
        for symbol in symbols
    ]
    cash = effects.get(None, NOTHING)
    rows.append(Row(None, begin.cash, end.cash, _parts(-cash.value_change, cash), symbols_count=0))
    return Explanation(begin.nav, end.nav, sum_parts(row.parts for row in rows), rows)


def between(before: Mark, after: Mark) -> Parts:
    """The parts between two marks of a portfolio, from their running sums."""
    return Parts(*differences(_sums(before), _sums(after)))


def differences(before: Sequence[int], after: Sequence[int]) -> tuple[int, int, int, int, int, int]:
    """PARTS between two marks of which these are the SUMS."""
    nav, trading, fees, income, flows, corporate = map(sub, after, before)
    return nav - trading + fees - income - flows - corporate, trading, -fees, income, flows, corporate


def sum_parts(parts: Iterable[Parts]) -> Parts:
    return sum(parts, Parts())


def largest(rows: Iterable[Row], count_max: int) -> list[Row]:
    """The rows by falling |P&L|, cash last; beyond `count_max` symbols the smallest become one row before it."""
    rows = list(rows)
    ranked = sorted((row for row in rows if row.symbol is not None), key=_rank)
    shown, rest = ranked[:count_max], ranked[count_max:]
    if rest:
        shown.append(_merged(rest))
    return shown + [row for row in rows if row.symbol is None]


def grouped(rows: Iterable[Row], key_of: Callable[[str], str]) -> list[tuple[str | None, int]]:
    """(key, P&L) of the symbols' rows by falling |P&L|, then that of cash under None."""
    sums: dict[str | None, int] = {}
    for row in rows:
        key = None if row.symbol is None else key_of(row.symbol)
        sums[key] = sums.get(key, 0) + row.parts.pnl
    return sorted(sums.items(), key=lambda one: (one[0] is None, -abs(one[1]), one[0] or ""))


def settle(values: Mapping[str, int], total: int, moved: Iterable[str]) -> dict[str, int]:
    """`values` changed so that they sum to `total`: the difference is shared among `moved`, in proportion to |value|.

    For values read at a moment's later quotes than the mark whose positions are worth `total`: what they differ by was
    done by the quotes since. With one of them the result is what the mark saw; else each is off by less than the
    difference. Nothing moved: all share. No positions: nothing to share.
    """
    settled = dict(values)
    shares = [symbol for symbol in sorted(moved) if settled.get(symbol)]
    shares = shares or [symbol for symbol in sorted(settled) if settled[symbol]] or sorted(settled)[:1]
    rest, weight = total - sum(settled.values()), sum(abs(settled[symbol]) for symbol in shares)
    for symbol in shares:
        own = abs(settled[symbol])
        share = rest * own // weight if weight else rest
        settled[symbol] += share
        rest, weight = rest - share, weight - own
    return settled


def _row(symbol: str, value_from: int, value_to: int, effects: Effects) -> Row:
    price = value_to - value_from - effects.value_change
    return Row(symbol, value_from, value_to, _parts(price, effects))


def _parts(price: int, effects: Effects) -> Parts:
    return Parts(price, effects.trading, -effects.fees, effects.income, effects.flows, effects.corporate)


def _merged(rows: list[Row]) -> Row:
    return Row(
        symbol=None,
        value_from=sum(row.value_from for row in rows),
        value_to=sum(row.value_to for row in rows),
        parts=sum_parts(row.parts for row in rows),
        symbols_count=len(rows),
    )


def _rank(row: Row) -> tuple[int, str]:
    return -abs(row.parts.pnl), row.symbol or ""
