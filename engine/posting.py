"""Posting: what a committed batch does to the Book, and what hot state is to be told.

The ledger is written first; only then does a fill reach the Book. Per portfolio a batch gives one new account and
one new state per touched position (absolute, not a delta), and one `PositionsChange` for hot state with the
allocation at that moment. A position's day base moves by the signed notional of each of its fills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from engine.amounts import plain
from engine.book import Account, Book, Holding
from engine.booking import Booked
from engine.ledger import EXTERNAL_FLOWS, LedgerEntry, LedgerKind
from engine.pnl import DayBase
from engine.portfolio import Portfolio
from engine.positions import HotPosition
from engine.sectors import SectorSlice, allocate

SectorOf = Callable[[str], str]
_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class PositionsChange:
    """New hot positions of one portfolio: those that changed, or with `replace` all there are."""

    portfolio_id: str
    replace: bool
    closed: Sequence[str]
    positions: Mapping[str, HotPosition]
    sectors: Sequence[SectorSlice]


def post(book: Book, shard: int, booked: Booked, sector_of: SectorOf) -> list[PositionsChange]:
    """Bring the Book to the state after a committed batch; returns what changed in hot positions."""
    entries: dict[str, list[LedgerEntry]] = {}
    for entry in booked.entries:
        entries.setdefault(entry.portfolio_id, []).append(entry)
    changes = []
    for portfolio_id, posted in entries.items():
        held = booked.portfolios[portfolio_id]
        day = book.day(portfolio_id) if portfolio_id in book else DayBase(0, 1, 0)
        account = _account(held, _day_after(day, posted))
        if portfolio_id in book:
            book.set_account(portfolio_id, account)
        else:
            book.open(portfolio_id, shard, account)
        traded = _traded(posted)
        changed = {symbol: _move(book, held, symbol, traded[symbol]) for symbol in traded}
        changes.append(
            PositionsChange(
                portfolio_id,
                replace=False,
                closed=[symbol for symbol, position in changed.items() if position is None],
                positions={symbol: position for symbol, position in changed.items() if position},
                sectors=allocation(book, portfolio_id, sector_of),
            )
        )
    return changes


def allocation(book: Book, portfolio_id: str, sector_of: SectorOf) -> list[SectorSlice]:
    """The portfolio's sector allocation at the Book's present prices."""
    return allocate((sector_of(held.symbol), held.value) for held in book.held(portfolio_id))


def hot_position(quantity: Decimal, cost: int, realized: int, day_base: int, opened_at: datetime) -> HotPosition:
    opened_at_ns = int(opened_at.timestamp()) * 1_000_000_000 + opened_at.microsecond * 1_000
    return HotPosition(plain(quantity), cost, realized, day_base, opened_at_ns)


def _account(held: Portfolio, day: DayBase) -> Account:
    return Account(held.cash, held.realized, held.fees, held.ledger_sequence, day)


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


def _move(book: Book, held: Portfolio, symbol: str, traded: int) -> HotPosition | None:
    day_base = book.position_day_base(held.portfolio_id, symbol) + traded
    position = held.positions.get(symbol)
    if position is None:
        book.set_position(held.portfolio_id, Holding(symbol, _ZERO, 0, day_base))
        return None
    book.set_position(held.portfolio_id, Holding(symbol, position.quantity, position.cost, day_base))
    return hot_position(position.quantity, position.cost, position.realized, day_base, position.opened_at)
