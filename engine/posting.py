"""Posting: what a committed batch does to the Book, and what hot state is to be told.

The ledger is written first; only then does a fill reach the Book. Per portfolio a batch gives one new account and
one new state per touched position (absolute, not a delta), and one `PositionsChange` for hot state with the
allocation at that moment. A position's day base moves by the signed notional of each of its fills; it is a value, so
that a split leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from engine.amounts import plain
from engine.book import Account, Book, Holding
from engine.booking import Booked
from engine.corporate_actions import Split
from engine.instants import to_ns
from engine.ledger import EXTERNAL_FLOWS, LedgerEntry, LedgerKind, write_scale
from engine.pnl import DayBase
from engine.portfolio import Portfolio, Position
from engine.positions import HotPosition
from engine.sectors import SectorValue, sum_up

SectorOf = Callable[[str], str]
SplitsOf = Callable[[str], Sequence[Split]]
_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class PositionsChange:
    """New hot positions of one portfolio: those that changed, or with `replace` all there are."""

    portfolio_id: str
    replace: bool
    closed: Sequence[str]
    positions: Mapping[str, HotPosition]
    sectors: Mapping[str, SectorValue]

    @property
    def is_of_positions(self) -> bool:
        """False when cash alone moved."""
        return self.replace or bool(self.closed or self.positions)


def post(book: Book, shard: int, booked: Booked, sector_of: SectorOf, splits_of: SplitsOf) -> Iterator[PositionsChange]:
    """Bring the Book to the state after a committed batch, one portfolio after the other, each with what changes in hot
    positions. What is between two of them is the caller's; a portfolio is never between two states."""
    entries: dict[str, list[LedgerEntry]] = {}
    for entry in booked.entries:
        entries.setdefault(entry.portfolio_id, []).append(entry)
    for portfolio_id, posted in entries.items():
        held = booked.portfolios[portfolio_id]
        day = book.day(portfolio_id) if portfolio_id in book else DayBase(0, 1, 0)
        figures = account(held, _day_after(day, posted))
        if portfolio_id in book:
            book.set_account(portfolio_id, figures)
        else:
            book.open(portfolio_id, shard, figures)
        traded, moved = _traded(posted), sorted(booked.touched[portfolio_id])
        changed = {symbol: _move(book, held, symbol, traded.get(symbol, 0), splits_of) for symbol in moved}
        yield PositionsChange(
            portfolio_id,
            replace=False,
            closed=[symbol for symbol, position in changed.items() if position is None],
            positions={symbol: position for symbol, position in changed.items() if position},
            sectors=allocation(book, portfolio_id, sector_of),
        )


def allocation(book: Book, portfolio_id: str, sector_of: SectorOf) -> dict[str, SectorValue]:
    """The portfolio's sectors at the Book's present prices."""
    return sum_up((sector_of(symbol), value) for symbol, value in book.values(portfolio_id))


def hot_position(held: Position, day_base: int, splits: Sequence[Split]) -> HotPosition:
    """`splits`: all of the symbol's that are in the quantity."""
    told = tuple((split.effective_at_ns, write_scale(split.scale)) for split in splits)
    return HotPosition(
        plain(held.quantity),
        held.cost,
        held.realized,
        day_base,
        to_ns(held.opened_at),
        held.fees,
        held.opened_sequence,
        told,
    )


def account(held: Portfolio, day: DayBase) -> Account:
    """The portfolio's own figures as the Book takes them."""
    return Account(
        cash=held.cash,
        receivables=held.receivables,
        realized=held.realized,
        fees=held.fees,
        income=held.income,
        flows=held.flows,
        trading=held.trading,
        corporate=held.corporate,
        ledger_sequence=held.ledger_sequence,
        day=day,
    )


def _day_after(day: DayBase, entries: Sequence[LedgerEntry]) -> DayBase:
    for entry in entries:
        if entry.kind in EXTERNAL_FLOWS:
            assert entry.nav_before is not None
            day = day.after_flow(entry.nav_before, entry.amount)
    return day


def _traded(entries: Sequence[LedgerEntry]) -> dict[str, int]:
    """Signed notional bought (+) and sold (−) per symbol."""
    traded: dict[str, int] = {}
    for entry in entries:
        if entry.kind is LedgerKind.FILL:
            assert entry.symbol is not None
            traded[entry.symbol] = traded.get(entry.symbol, 0) - entry.amount
    return traded


def _move(book: Book, held: Portfolio, symbol: str, traded: int, splits_of: SplitsOf) -> HotPosition | None:
    day_base = book.position_day_base(held.portfolio_id, symbol) + traded
    position = held.positions.get(symbol)
    if position is None:
        book.set_position(held.portfolio_id, Holding(symbol, _ZERO, 0, day_base))
        return None
    book.set_position(held.portfolio_id, Holding(symbol, position.quantity, position.cost, day_base))
    return hot_position(position, day_base, splits_of(symbol))
