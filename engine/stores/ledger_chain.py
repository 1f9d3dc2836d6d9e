"""Proof that nobody changed the ledger behind the program's back: its hash chains, recomputed outside the database.

For every portfolio, entry by entry in constant memory:

    MISSING      the sequence has a gap, or ends before the portfolio's `ledger_sequence`
    INSERTED     an entry beyond the portfolio's last, one that repeats a sequence, or entries without a portfolio
    HASH         the entry's hash does not follow from its content and the entry before: one of its columns was changed,
                 or, where the one before was changed and hashed anew, that one
    CASH         cash_after is not cash before + amount − fee
    UNREADABLE   a column holds what the program never writes
    HEAD         the last entry's hash or cash is not what the portfolio's row has: the last entries were changed and
                 hashed anew

Each bad entry is named once per finding and the check goes on behind it. What a gap leaves unknown (the hash before,
the cash before) is not held against the entry behind it. Whoever can write both tables can forge a whole chain with
its head: against that a head hash is to be kept elsewhere, for example in an exported file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from engine.amounts import from_micro
from engine.ledger import CHAIN_START, LedgerEntry, chain_hash
from engine.stores.ledger_reads import ENTRY_COLUMNS, read_entry

ENTRIES_AT_ONCE = 2_000
PORTFOLIOS_AT_ONCE = 200
# Behind bad entries any of so many hashes may be what the next one was made from.
SUSPECTS_COUNT_MAX = 8
_BEFORE_ALL = -(2**63)

_HEADS = "SELECT id, ledger_sequence, ledger_hash, cash FROM portfolio WHERE id > $1 ORDER BY id LIMIT $2"
_HEAD = "SELECT id, ledger_sequence, ledger_hash, cash FROM portfolio WHERE id = $1"
_ENTRIES = f"""
    SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE portfolio_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3
"""  # noqa: S608
# From one portfolio's entries to the next one's by the index, so that it takes no time in a long ledger.
_ORPHANS = """
    WITH RECURSIVE named (id) AS (
        SELECT min(portfolio_id) FROM ledger_entry
        UNION ALL
        SELECT (SELECT min(portfolio_id) FROM ledger_entry WHERE portfolio_id > named.id) FROM named
        WHERE named.id IS NOT NULL
    ) SELECT id FROM named WHERE id IS NOT NULL AND NOT EXISTS (SELECT FROM portfolio WHERE portfolio.id = named.id)
"""

Connection = asyncpg.Connection | PoolConnectionProxy


class FaultKind(StrEnum):
    MISSING = "MISSING"
    INSERTED = "INSERTED"
    HASH = "HASH"
    CASH = "CASH"
    UNREADABLE = "UNREADABLE"
    HEAD = "HEAD"


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one entry, or with where the chain ends."""

    portfolio_id: str
    sequence: int
    kind: FaultKind
    detail: str


@dataclass(slots=True)
class Verified:
    """How much was checked, and found."""

    portfolios_count: int = 0
    entries_count: int = 0
    faults_count: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """Where the portfolio's row says that its ledger ends."""

    portfolio_id: str
    sequence: int
    hash: bytes
    cash: Decimal


class ChainCheck:
    """One portfolio's chain, entry after entry. Pure."""

    def __init__(self, portfolio_id: str) -> None:
        self._portfolio_id = portfolio_id
        self._sequence = 0
        self._cash: int | None = 0
        # What the next entry's hash may have been made from; empty when the entry before is not known.
        self._before = [CHAIN_START]

    def take(self, entry: LedgerEntry) -> list[Fault]:
        faults = self._take_sequence(entry.sequence)
        before = self._before
        hashes = [chain_hash(one, entry) for one in before]
        if before and entry.hash not in hashes:
            text = f"its hash does not follow from its content and entry {entry.sequence - 1}"
            faults.append(self._fault(entry.sequence, FaultKind.HASH, text))
            self._suspect(entry.hash, hashes)
        else:
            self._before = [entry.hash]
        expected = None if self._cash is None else self._cash + entry.amount - entry.fee
        if expected is not None and entry.cash_after != expected:
            text = f"cash_after is {entry.cash_after} micro-units, {expected} follow from the entry before"
            faults.append(self._fault(entry.sequence, FaultKind.CASH, text))
        # A figure of a bad entry says nothing about the next.
        self._cash = entry.cash_after if len(self._before) == 1 else None
        return faults

    def take_unreadable(self, sequence: int, recorded_hash: bytes, why: str) -> list[Fault]:
        faults = self._take_sequence(sequence)
        self._suspect(recorded_hash, [])
        self._cash = None
        return [*faults, self._fault(sequence, FaultKind.UNREADABLE, why)]

    def end(self, head: Head) -> list[Fault]:
        """What the portfolio's row says against the chain."""
        last = self._sequence
        if last < head.sequence:
            return [self._missing(last + 1, head.sequence)]
        if last > head.sequence:
            text = f"entries {head.sequence + 1} to {last} are beyond the portfolio's last"
            return [self._fault(head.sequence + 1, FaultKind.INSERTED, text)]
        if last and self._before and bytes(head.hash) not in self._before:
            return [self._fault(last, FaultKind.HEAD, "the portfolio's ledger_hash is not the hash of its last entry")]
        if self._cash is not None and head.cash != from_micro(self._cash):
            text = f"the portfolio's cash is {head.cash}, its last entry says {from_micro(self._cash)}"
            return [self._fault(last, FaultKind.HEAD, text)]
        return []

    def _take_sequence(self, sequence: int) -> list[Fault]:
        expected = self._sequence + 1
        if sequence < expected:
            return [self._fault(sequence, FaultKind.INSERTED, "no further entry belongs here")]
        self._sequence = sequence
        if sequence == expected:
            return []
        self._before, self._cash = [], None
        return [self._missing(expected, sequence - 1)]

    def _suspect(self, recorded: bytes, recomputed: list[bytes]) -> None:
        known = [*self._before, *recomputed, recorded]
        self._before = known[-SUSPECTS_COUNT_MAX:]

    def _missing(self, first: int, last: int) -> Fault:
        text = "it is missing" if first == last else f"entries {first} to {last} are missing"
        return self._fault(first, FaultKind.MISSING, text)

    def _fault(self, sequence: int, kind: FaultKind, detail: str) -> Fault:
        return Fault(self._portfolio_id, sequence, kind, detail)


async def verify_ledger(
    connection: Connection,
    portfolio_id: str | None,
    report: Callable[[Fault], None],
    progress: Callable[[Verified], None],
) -> Verified:
    """Check one portfolio's chain, or all; each fault is handed to `report` as it is found.

    Raises KeyError for a portfolio that does not exist, and what asyncpg raises when PostgreSQL is away.
    """
    verified, after = Verified(), ""
    while True:
        # Heads and entries of one instant; a transaction is kept short, because what it sees can not be cleaned up.
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            if portfolio_id is None:
                rows = await connection.fetch(_HEADS, after, PORTFOLIOS_AT_ONCE)
            else:
                rows = await connection.fetch(_HEAD, portfolio_id)
                if not rows:
                    raise KeyError(portfolio_id)
            for row in rows:
                await _verify_portfolio(connection, Head(*row), verified, report, progress)
        if portfolio_id is not None or len(rows) < PORTFOLIOS_AT_ONCE:
            break
        after = rows[-1]["id"]
    if portfolio_id is None:
        for row in await connection.fetch(_ORPHANS):
            verified.faults_count += 1
            report(Fault(row["id"], 0, FaultKind.INSERTED, "there are entries, but no such portfolio"))
    progress(verified)
    return verified


async def _verify_portfolio(
    connection: Connection,
    head: Head,
    verified: Verified,
    report: Callable[[Fault], None],
    progress: Callable[[Verified], None],
) -> None:
    check = ChainCheck(head.portfolio_id)

    def found(faults: list[Fault]) -> None:
        for fault in faults:
            verified.faults_count += 1
            report(fault)

    last = _BEFORE_ALL
    while True:
        rows = await connection.fetch(_ENTRIES, head.portfolio_id, last, ENTRIES_AT_ONCE)
        for row in rows:
            found(_take(check, row))
        verified.entries_count += len(rows)
        progress(verified)
        if len(rows) < ENTRIES_AT_ONCE:
            break
        last = rows[-1]["sequence"]
    found(check.end(head))
    verified.portfolios_count += 1


def _take(check: ChainCheck, row: asyncpg.Record) -> list[Fault]:
    try:
        return check.take(read_entry(row))
    except (ArithmeticError, LookupError, ValueError) as error:
        return check.take_unreadable(row["sequence"], row["hash"], f"{type(error).__name__}: {str(error)[:100]}")
