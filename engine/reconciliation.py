"""Hot state against the fold of the ledger: which figures are compared, and what a difference is.

    record      account and position rows of PostgreSQL      = the fold at the account's ledger sequence
    mark        every sum, unrealized and NAV                 = the fold at the mark's ledger sequence
    value       positions value                               = Σ quantity × price after some prefix of the quote stream
    positions   quantity, cost, realized, fees, splits, …     = the fold after some entry from the mark's on

A mark is never ahead of its hot positions, so positions may be some entries further than the mark that was read with
them. Prices of before a split are divided by its ratio, as the Book does (engine.corporate_actions). Day figures and
qualities depend on when they were made and are not compared. A mark whose NAV is out of the Book's range is withheld.

`drift` is |NAV shown − NAV of the fold| in micro-units; where no mark can be read, all of the NAV.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Protocol

from engine.amounts import AmountError
from engine.book import NAV_MAX_MICRO
from engine.corporate_actions import Split, price_after
from engine.ledger import LedgerEntry
from engine.marks import Mark
from engine.portfolio import LedgerMismatch, Portfolio
from engine.positions import HotPosition, carried_value
from engine.posting import hot_position

SUMS = ("cash", "receivables", "realized", "fees", "income", "flows", "trading", "corporate")
COUNTS = ("fills", "streak")


class ReconciliationStatus(StrEnum):
    """What a check found. NEVER_CHECKED stands for no check at all."""

    AGREED = "AGREED"
    REPAIRED = "REPAIRED"
    DRIFTED = "DRIFTED"
    BROKEN_LEDGER = "BROKEN_LEDGER"
    NEVER_CHECKED = "NEVER_CHECKED"


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure that does not agree; `expected` is the fold's."""

    portfolio_id: str
    figure: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Price:
    price: Decimal
    ts_event_ns: int


class PriceHistory(Protocol):
    """Prices as the quote stream left them, and the way back."""

    def last(self, symbol: str) -> Price | None: ...

    def backwards(self, symbols: Iterable[str]) -> Iterator[tuple[str, Price | None]]:
        """Undo the quotes of `symbols`, newest first: each symbol with the price it had before."""


@dataclass(frozen=True, slots=True)
class HotPortfolio:
    """What was read of hot state. `missing` says why there is no mark; a position that does not decode is None."""

    epoch: int
    mark: Mark | None
    missing: str
    positions: Mapping[str, HotPosition | None]


@dataclass(frozen=True, slots=True)
class Record:
    """What PostgreSQL keeps of a portfolio beside its ledger; `receivables` is the sum of what is not paid yet."""

    portfolio: Portfolio
    receivables: int


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check of one portfolio found; `is_broken`: the ledger does not fold, or the record is not its fold."""

    portfolio_id: str
    epoch: int
    sequence: int
    ledger_sequence: int
    drift: int
    differences: Sequence[Difference] = ()
    is_broken: bool = False

    @property
    def figures(self) -> list[str]:
        return sorted({difference.figure for difference in self.differences})


def compare(
    fold: Portfolio,
    entries: Sequence[LedgerEntry],
    record: Record,
    hot: HotPortfolio,
    splits: Mapping[str, Sequence[Split]],
    history: PriceHistory,
) -> Finding:
    """Take `fold` on over `entries`, those that follow it, until all has been compared at its own sequence.

    Raises LedgerMismatch when the entries do not fold; `fold` is of no use then.
    """
    comparison = _Comparison(fold, record, hot, splits, history)
    comparison.visit()
    for entry in entries:
        if comparison.is_complete:
            break
        replay(fold, entry)
        comparison.visit()
    return comparison.finding()


def replay(fold: Portfolio, entry: LedgerEntry) -> None:
    """Fold one entry; figures out of the exact range are a mismatch like any other. Raises LedgerMismatch."""
    try:
        fold.replay(entry)
    except AmountError as error:
        raise LedgerMismatch(f"{fold.portfolio_id}#{entry.sequence}: {error}") from None


class _Comparison:
    def __init__(
        self,
        fold: Portfolio,
        record: Record,
        hot: HotPortfolio,
        splits: Mapping[str, Sequence[Split]],
        history: PriceHistory,
    ) -> None:
        self._fold = fold
        self._record = record
        self._hot = hot
        self._splits = splits
        self._history = history
        name = fold.portfolio_id
        kept = record.portfolio.ledger_sequence
        self._of_record = [Difference(name, "account ledger_sequence", str(fold.ledger_sequence), str(kept))]
        self._of_mark = [Difference(name, "mark", "a mark", hot.missing)]
        self._of_positions: list[Difference] | None = None
        self._is_recorded = False
        self._drift: int | None = None

    def visit(self) -> None:
        """Compare what is of the fold's present sequence."""
        fold, mark = self._fold, self._hot.mark
        if fold.ledger_sequence == self._record.portfolio.ledger_sequence:
            self._of_record = record_differences(fold, self._record)
            self._is_recorded = True
        if mark is not None and fold.ledger_sequence == mark.ledger_sequence:
            self._compare_mark(mark)
        if self._of_positions != [] and (mark is None or fold.ledger_sequence >= mark.ledger_sequence):
            self._of_positions = position_differences(fold, self._hot.positions, self._splits)

    @property
    def is_complete(self) -> bool:
        """Whether account and mark were passed, and hot positions were found to be those of a sequence."""
        is_marked = self._hot.mark is None or self._drift is not None
        return self._is_recorded and is_marked and self._of_positions == []

    def finding(self) -> Finding:
        fold, mark = self._fold, self._hot.mark
        if self._drift is None:
            # The mark is missing or of another sequence than any that was passed.
            nav = fold.cash + fold.receivables + nearest_value(fold, 0, self._history, self._splits, at_last=True)
            self._drift = abs(nav if mark is None else mark.nav - nav)
            if mark is not None:
                expected, found = str(fold.ledger_sequence), str(mark.ledger_sequence)
                self._of_mark = [Difference(fold.portfolio_id, "ledger_sequence", expected, found)]
            if abs(nav) >= NAV_MAX_MICRO:
                self._of_mark, self._drift = [], 0
        if self._of_positions is None:
            self._of_positions = position_differences(fold, self._hot.positions, self._splits)
        return Finding(
            portfolio_id=fold.portfolio_id,
            epoch=self._hot.epoch,
            sequence=mark.sequence if mark else 0,
            ledger_sequence=fold.ledger_sequence,
            drift=self._drift,
            differences=[*self._of_record, *self._of_mark, *self._of_positions],
            is_broken=bool(self._of_record),
        )

    def _compare_mark(self, mark: Mark) -> None:
        value = nearest_value(self._fold, mark.positions_value, self._history, self._splits)
        nav = self._fold.cash + self._fold.receivables + value
        is_withheld = abs(nav) >= NAV_MAX_MICRO
        self._of_mark = [] if is_withheld else mark_differences(self._fold, mark, value)
        self._drift = 0 if is_withheld else abs(mark.nav - nav)


def record_differences(fold: Portfolio, record: Record) -> list[Difference]:
    """The account and the position rows against the fold."""
    kept = record.portfolio
    checks: list[tuple[str, object, object]] = [
        (f"account {name}", getattr(fold, name), getattr(kept, name)) for name in (*SUMS, *COUNTS)
    ]
    checks.append(("account ledger_hash", fold.ledger_hash.hex(), kept.ledger_hash.hex()))
    checks.append(("receivable rows", fold.receivables, record.receivables))
    for symbol in sorted(fold.positions.keys() | kept.positions.keys()):
        checks.append((f"position row {symbol}", fold.positions.get(symbol), kept.positions.get(symbol)))
    return _differing(fold.portfolio_id, checks)


def mark_differences(fold: Portfolio, mark: Mark, positions_value: int) -> list[Difference]:
    """The mark against the fold; `positions_value` is what the positions were worth."""
    cost = sum(held.cost for held in fold.positions.values())
    checks: list[tuple[str, object, object]] = [(name, getattr(fold, name), getattr(mark, name)) for name in SUMS]
    checks += [
        ("positions value", positions_value, mark.positions_value),
        ("unrealized", mark.positions_value - cost, mark.unrealized),
        ("nav", fold.cash + fold.receivables + mark.positions_value, mark.nav),
    ]
    return _differing(fold.portfolio_id, checks)


def position_differences(
    fold: Portfolio, hot: Mapping[str, HotPosition | None], splits: Mapping[str, Sequence[Split]]
) -> list[Difference]:
    """Hot positions against the fold; day bases are not the ledger's to say."""
    checks: list[tuple[str, object, object]] = []
    for symbol in sorted(fold.positions.keys() | hot.keys()):
        held, found = fold.positions.get(symbol), hot.get(symbol)
        expected = None
        if held is not None:
            expected = hot_position(held, found.day_base if found else 0, splits.get(symbol, ()))
        readable = found if found is not None or symbol not in hot else "unreadable"
        checks.append((f"hot position {symbol}", expected, readable))
    return _differing(fold.portfolio_id, checks)


def nearest_value(
    fold: Portfolio,
    wanted: int,
    history: PriceHistory,
    splits: Mapping[str, Sequence[Split]],
    at_last: bool = False,
) -> int:
    """What the positions were worth after the prefix of the quote stream that comes nearest to `wanted`.

    With `at_last` only the whole stream counts. Walks backwards: marks are hardly ever older than the last flush.
    """

    def value(symbol: str, price: Price | None) -> int:
        held = fold.positions[symbol]
        return carried_value(held.quantity, held.cost, _todays(price, splits.get(symbol, ())))

    values = {symbol: value(symbol, history.last(symbol)) for symbol in fold.positions}
    total = sum(values.values())
    nearest = total
    if at_last or total == wanted:
        return nearest
    for symbol, price in history.backwards(values):
        before = value(symbol, price)
        total, values[symbol] = total + before - values[symbol], before
        if abs(total - wanted) < abs(nearest - wanted):
            nearest = total
        if nearest == wanted:
            break
    return nearest


def _todays(price: Price | None, splits: Sequence[Split]) -> Decimal | None:
    """The price in today's shares; None when there is none, or nothing is left of it."""
    if price is None:
        return None
    if not splits:
        return price.price
    try:
        return price_after(price.price, price.ts_event_ns, splits) or None
    except AmountError:
        return None


def _differing(portfolio_id: str, checks: Iterable[tuple[str, object, object]]) -> list[Difference]:
    return [Difference(portfolio_id, figure, str(wanted), str(got)) for figure, wanted, got in checks if wanted != got]
