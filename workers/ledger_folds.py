"""Folds of ledgers, kept where making them anew is dear.

A short ledger is folded from its first entry at every check. The fold of a long one (KEPT_ENTRIES_MIN) is kept and
taken on over what came since: the ledger is append-only, and each entry's hash stands for all before it. Every
`REFOLD_INTERVAL_S` a kept fold is given up, so that also a long ledger is read from its first entry again. When there
are more than FOLDS_COUNT_MAX long ledgers, the shortest of them are not kept.

Entries are read in pieces of ENTRIES_PER_READ, without a transaction around them: what is before an account's ledger
sequence does not change.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.ledger import LedgerEntry
from engine.portfolio import LedgerMismatch, Portfolio
from engine.reconciliation import replay
from engine.stores.ledger_rows import entry_of
from engine.stores.tables import portfolio

KEPT_ENTRIES_MIN = 200
FOLDS_COUNT_MAX = 5_000  # of 15 positions each: about 40 MB
REFOLD_INTERVAL_S = 24 * 3_600
ENTRIES_PER_READ = 1_000

_ENTRIES = text(
    "SELECT ledger_entry.* FROM unnest(CAST(:ids AS text[]), CAST(:afters AS bigint[]), CAST(:untils AS bigint[])) "
    "AS span (id, after, until) JOIN ledger_entry "
    "ON portfolio_id = span.id AND sequence > span.after AND sequence <= span.until ORDER BY portfolio_id, sequence"
)


@dataclass(slots=True)
class Fold:
    """A portfolio's fold so far; `mismatch` says why it ends there, `begun_at_s` when its first entry was read."""

    portfolio: Portfolio
    begun_at_s: float
    mismatch: str = ""


@dataclass(frozen=True, slots=True)
class _Span:
    """The entries after < sequence ≤ until."""

    portfolio_id: str
    after: int
    until: int


class LedgerFolds:
    """`pause` is awaited after every read, for the sake of other work."""

    def __init__(self, engine: AsyncEngine, pause: Callable[[], Awaitable[None]]) -> None:
        self._engine = engine
        self._pause = pause
        self._kept: dict[str, Fold] = {}

    async def fold(self, names: Iterable[str]) -> dict[str, Fold]:
        """Each portfolio folded up to where its account is now. Raises DBAPIError, OSError."""
        began_at_s = time.monotonic()
        async with self._engine.connect() as connection:
            known = portfolio.c.id, portfolio.c.base_currency, portfolio.c.ledger_sequence
            rows = (await connection.execute(select(*known).where(portfolio.c.id.in_(list(names))))).all()
        folds: dict[str, Fold] = {}
        spans: deque[_Span] = deque()
        for row in rows:
            fold = self._kept.pop(row.id, None)
            if fold is None or not self._serves(fold, row.ledger_sequence, began_at_s):
                fold = Fold(Portfolio(row.id, row.base_currency), began_at_s)
            folds[row.id] = fold
            spans.append(_Span(row.id, fold.portfolio.ledger_sequence, row.ledger_sequence))
        while spans:
            read = _cut(spans)
            entries = await self._entries(read)
            for span in read:
                _replay(folds[span.portfolio_id], entries.get(span.portfolio_id, []), span.until)
            spans = deque(span for span in spans if not folds[span.portfolio_id].mismatch)
            await self._pause()
        return folds

    async def entries(self, afters: Mapping[str, int]) -> dict[str, list[LedgerEntry]]:
        """The first ENTRIES_PER_READ entries after a sequence of each portfolio, in order."""
        return await self._entries([_Span(name, after, after + ENTRIES_PER_READ) for name, after in afters.items()])

    def keep(self, fold: Fold) -> None:
        """Keep a fold for the next check if it is worth it."""
        folded = fold.portfolio
        if fold.mismatch or folded.ledger_sequence < KEPT_ENTRIES_MIN:
            return
        if len(self._kept) >= FOLDS_COUNT_MAX:
            shortest = min(self._kept.values(), key=lambda kept: kept.portfolio.ledger_sequence).portfolio
            if shortest.ledger_sequence >= folded.ledger_sequence:
                return
            del self._kept[shortest.portfolio_id]
        self._kept[folded.portfolio_id] = fold

    def _serves(self, fold: Fold, ledger_sequence: int, now_s: float) -> bool:
        return fold.portfolio.ledger_sequence <= ledger_sequence and now_s - fold.begun_at_s < REFOLD_INTERVAL_S

    async def _entries(self, spans: list[_Span]) -> dict[str, list[LedgerEntry]]:
        if not spans:
            return {}
        async with self._engine.connect() as connection:
            values = {
                "ids": [span.portfolio_id for span in spans],
                "afters": [span.after for span in spans],
                "untils": [span.until for span in spans],
            }
            rows = (await connection.execute(_ENTRIES, values)).all()
        found: dict[str, list[LedgerEntry]] = {}
        for row in rows:
            found.setdefault(row.portfolio_id, []).append(entry_of(row))
        return found


def _replay(fold: Fold, entries: Iterable[LedgerEntry], until: int) -> None:
    """Take a fold on to the entry `until`; one that is not there is a mismatch."""
    try:
        for entry in entries:
            replay(fold.portfolio, entry)
        if fold.portfolio.ledger_sequence < until:
            raise LedgerMismatch(f"{fold.portfolio.portfolio_id}: no entry {fold.portfolio.ledger_sequence + 1}")
    except LedgerMismatch as mismatch:
        fold.mismatch = str(mismatch)


def _cut(spans: deque[_Span]) -> list[_Span]:
    """Take spans of together at most ENTRIES_PER_READ entries off the front; a longer one is cut."""
    taken, room = [], ENTRIES_PER_READ
    while spans and room > 0:
        span = spans.popleft()
        if span.until - span.after > room:
            spans.appendleft(_Span(span.portfolio_id, span.after + room, span.until))
            span = _Span(span.portfolio_id, span.after, span.after + room)
        taken.append(span)
        room -= max(1, span.until - span.after)
    return taken
