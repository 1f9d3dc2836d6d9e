"""The ledger and its portfolios as readers see them, from PostgreSQL.

Pages are keysets: entries by `sequence`, portfolios by `id`, so that a page costs the same wherever it lies and
what is appended meanwhile neither repeats nor hides a row. Amounts come back as micro-units, exactly.

A portfolio's identity (owner, shard, name …) never changes once it is booked, so readers may remember it; its
cash and counters do change and are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import asyncpg

from engine.amounts import to_micro
from engine.ledger import LedgerEntry, LedgerKind, Side

# A pool may not be there yet when its reader is made: it is asked for at every read, and raises OSError till then.
PoolSource = Callable[[], asyncpg.Pool]


@dataclass(frozen=True, slots=True)
class PortfolioIdentity:
    portfolio_id: str
    shard: int
    owner: str
    name: str
    base_currency: str
    opened_at: datetime


@dataclass(frozen=True, slots=True)
class LedgerSelection:
    """Which entries a page shows; None takes all. `effective_from` is included, `effective_to` is not."""

    kind: LedgerKind | None = None
    symbol: str | None = None
    side: Side | None = None
    effective_from: datetime | None = None
    effective_to: datetime | None = None


EVERYTHING = LedgerSelection()

_IDENTITY = "id, shard, owner, name, base_currency, opened_at"
_PORTFOLIO = f"SELECT {_IDENTITY} FROM portfolio WHERE id = $1"  # noqa: S608 -- constants of this module only
_PORTFOLIOS = f"SELECT {_IDENTITY} FROM portfolio WHERE id > $1 ORDER BY id LIMIT $2"  # noqa: S608
_PORTFOLIOS_OF_OWNER = f"""
    SELECT {_IDENTITY} FROM portfolio WHERE owner = $3 AND id > $1 ORDER BY id LIMIT $2
"""  # noqa: S608
_ENTRY = """
    portfolio_id, sequence, event_id, kind, symbol, side, quantity, price, amount, fee, realized, cash_after,
    nav_before, effective_at, recorded_at, reference, content_hash
"""
_PAGE = f"""
    SELECT {_ENTRY} FROM ledger_entry
    WHERE portfolio_id = $1 AND sequence < $2
      AND ($4::text IS NULL OR kind = $4) AND ($5::text IS NULL OR symbol = $5) AND ($6::text IS NULL OR side = $6)
      AND ($7::timestamptz IS NULL OR effective_at >= $7) AND ($8::timestamptz IS NULL OR effective_at < $8)
    ORDER BY sequence DESC LIMIT $3
"""  # noqa: S608
_AFTER = f"""
    SELECT {_ENTRY} FROM ledger_entry WHERE portfolio_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3
"""  # noqa: S608
_LAST = "SELECT coalesce(max(sequence), 0) FROM ledger_entry WHERE portfolio_id = $1"

SEQUENCE_MAX = 2**63 - 1


class LedgerReads:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away."""

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool

    async def portfolio(self, portfolio_id: str) -> PortfolioIdentity | None:
        row = await self._pool().fetchrow(_PORTFOLIO, portfolio_id)
        return None if row is None else PortfolioIdentity(*row)

    async def portfolios(self, owner: str | None, count_max: int, after: str = "") -> list[PortfolioIdentity]:
        """At most `count_max` portfolios of `owner` (None: of everybody) in id order, beginning after `after`."""
        if owner is None:
            rows = await self._pool().fetch(_PORTFOLIOS, after, count_max)
        else:
            rows = await self._pool().fetch(_PORTFOLIOS_OF_OWNER, after, count_max, owner)
        return [PortfolioIdentity(*row) for row in rows]

    async def page(
        self,
        portfolio_id: str,
        count_max: int,
        before: int = SEQUENCE_MAX,
        selection: LedgerSelection = EVERYTHING,
    ) -> list[LedgerEntry]:
        """At most `count_max` selected entries with a sequence below `before`, newest first."""
        rows = await self._pool().fetch(
            _PAGE,
            portfolio_id,
            before,
            count_max,
            selection.kind,
            selection.symbol,
            selection.side,
            selection.effective_from,
            selection.effective_to,
        )
        return [_entry(row) for row in rows]

    async def after(self, portfolio_id: str, sequence: int, count_max: int) -> list[LedgerEntry]:
        """At most `count_max` entries with a sequence above `sequence`, in order."""
        rows = await self._pool().fetch(_AFTER, portfolio_id, sequence, count_max)
        return [_entry(row) for row in rows]

    async def last_sequence(self, portfolio_id: str) -> int:
        """The sequence of the newest entry; 0 when there is none."""
        return int(await self._pool().fetchval(_LAST, portfolio_id))


def _entry(row: asyncpg.Record) -> LedgerEntry:
    return LedgerEntry(
        portfolio_id=row["portfolio_id"],
        sequence=row["sequence"],
        event_id=row["event_id"],
        kind=LedgerKind(row["kind"]),
        symbol=row["symbol"],
        side=None if row["side"] is None else Side(row["side"]),
        quantity=row["quantity"],
        price=row["price"],
        amount=to_micro(row["amount"]),
        fee=to_micro(row["fee"]),
        realized=to_micro(row["realized"]),
        cash_after=to_micro(row["cash_after"]),
        nav_before=_micro_or_none(row["nav_before"]),
        effective_at=row["effective_at"],
        recorded_at=row["recorded_at"],
        reference=row["reference"],
        content_hash=row["content_hash"],
    )


def _micro_or_none(amount: Decimal | None) -> int | None:
    return None if amount is None else to_micro(amount)
