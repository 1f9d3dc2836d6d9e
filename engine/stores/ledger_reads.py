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
from engine.assets import AssetClass
from engine.equity_curve import Flow
from engine.ledger import EXTERNAL_FLOWS, LedgerEntry, LedgerKind, Side
from engine.performance import Trades
from engine.runtime.clock import to_ns

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
# What a range reads: the entries of a portfolio after the range's first point up to its last, by ledger sequence.
_SPAN = "portfolio_id = $1 AND sequence > $2 AND sequence <= $3"
_FLOWS = f"""
    SELECT recorded_at, sequence, amount, nav_before FROM ledger_entry
    WHERE {_SPAN} AND kind = ANY($4::text[]) AND nav_before IS NOT NULL ORDER BY sequence
"""  # noqa: S608
_TRADES = f"""
    SELECT count(*) FILTER (WHERE realized > 0), count(*) FILTER (WHERE realized < 0),
        coalesce(sum(realized) FILTER (WHERE realized > 0), 0), coalesce(sum(realized) FILTER (WHERE realized < 0), 0)
    FROM ledger_entry WHERE {_SPAN} AND kind = 'FILL'
"""  # noqa: S608
# What was held at some time within the span is held now or was filled in it.
_HELD_CLASS = f"""
    SELECT EXISTS (SELECT FROM position JOIN asset USING (symbol) WHERE portfolio_id = $1 AND asset_class = $4)
        OR EXISTS (SELECT FROM ledger_entry JOIN asset USING (symbol) WHERE {_SPAN} AND asset_class = $4)
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

    async def flows(self, portfolio_id: str, after: int, last: int) -> list[Flow]:
        """The external flows with `after` < sequence ≤ `last`, in order, each at the instant it was booked."""
        kinds = [kind.value for kind in EXTERNAL_FLOWS]
        rows = await self._pool().fetch(_FLOWS, portfolio_id, after, last, kinds)
        return [Flow(to_ns(at), sequence, to_micro(amount), to_micro(before)) for at, sequence, amount, before in rows]

    async def trades(self, portfolio_id: str, after: int, last: int) -> Trades:
        """What the fills with `after` < sequence ≤ `last` realised."""
        row = await self._pool().fetchrow(_TRADES, portfolio_id, after, last)
        assert row is not None, "an aggregate has one row"
        wins_count, losses_count, gains, losses = row
        return Trades(wins_count, losses_count, to_micro(gains), to_micro(losses))

    async def has_held(self, portfolio_id: str, asset_class: AssetClass, after: int, last: int) -> bool:
        """Whether an asset of this class is held, or was filled in an entry with `after` < sequence ≤ `last`."""
        return bool(await self._pool().fetchval(_HELD_CLASS, portfolio_id, after, last, asset_class.value))

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
