"""The ledger and its portfolios as readers see them, from PostgreSQL.

Pages are keysets: entries and closed positions by `sequence`, portfolios by `id`, so that a page costs the same
wherever it lies and what is appended meanwhile neither repeats nor hides a row. Amounts come back as micro-units,
exactly.

A page of entries is found in an index that holds all that a filter asks about, and only its own rows are read from the
table: a filter that matches nothing in a ledger of a million entries reads a million index rows at worst.

A portfolio's identity (owner, shard, name …) never changes once it is booked, so readers may remember it; its
cash and counters do change and are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import asyncpg
import msgspec

from engine.amounts import to_micro
from engine.assets import AssetClass
from engine.equity_curve import Flow
from engine.instants import to_ns
from engine.ledger import EXTERNAL_FLOWS, LedgerEntry, LedgerKind, Side
from engine.performance import Trades
from engine.portfolio import ClosedPosition
from engine.stores.ledger_rows import read_scale
from engine.stores.ledger_selection import EVERYTHING, LedgerSelection, conditions

# A pool may not be there yet when its reader is made: it is asked for at every read, and raises OSError till then.
PoolSource = Callable[[], asyncpg.Pool]


class PortfolioIdentity(msgspec.Struct, frozen=True, gc=False):
    """Whose a portfolio is and where; set when it is opened, and never changed."""

    portfolio_id: str
    shard: int
    owner: str
    name: str
    base_currency: str
    opened_at: datetime


class ShownEntry(NamedTuple):
    """An entry, and the event of the one that reverses it, if any."""

    entry: LedgerEntry
    reversed_by: str | None


class HeldCycle(NamedTuple):
    """Which position's entries are asked for: those of the cycle that began with the entry `opened_sequence`."""

    portfolio_id: str
    symbol: str
    opened_sequence: int


class CycleEntries(NamedTuple):
    """FILL and SPLIT entries of a cycle and what followed it; `head` is the position's quantity after the last of
    them, None when the position is of another cycle by now."""

    entries: list[LedgerEntry]
    head: Decimal | None


_IDENTITY = "id, shard, owner, name, base_currency, opened_at"
_PORTFOLIO = f"SELECT {_IDENTITY} FROM portfolio WHERE id = $1"  # noqa: S608 -- constants of this module only
_PORTFOLIOS = f"SELECT {_IDENTITY} FROM portfolio WHERE id > $1 ORDER BY id LIMIT $2"  # noqa: S608
_PORTFOLIOS_OF_OWNER = f"""
    SELECT {_IDENTITY} FROM portfolio WHERE owner = $3 AND id > $1 ORDER BY id LIMIT $2
"""  # noqa: S608
ENTRY_COLUMNS = ", ".join(LedgerEntry.__struct_fields__)
_SHOWN = f"""
    {", ".join(f"e.{name}" for name in LedgerEntry.__struct_fields__)},
    (SELECT event_id FROM ledger_entry WHERE reverses = e.event_id) AS reversed_by
"""  # noqa: S608
_PAGE = f"""
    WITH page AS MATERIALIZED (
        SELECT sequence FROM ledger_entry WHERE portfolio_id = $1 AND sequence < $2{{conditions}}
        ORDER BY sequence DESC LIMIT $3
    ) SELECT {_SHOWN} FROM page JOIN ledger_entry AS e ON e.portfolio_id = $1 AND e.sequence = page.sequence
    ORDER BY page.sequence DESC
"""  # noqa: S608
_AFTER = f"""
    SELECT {_SHOWN} FROM ledger_entry AS e WHERE portfolio_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3
"""  # noqa: S608
_EVENT = f"SELECT {_SHOWN} FROM ledger_entry AS e WHERE event_id = $1"  # noqa: S608
_CLOSED = """
    SELECT symbol, side = 'LONG', realized, fees, opened_at, closed_at, opened_sequence, closed_sequence
    FROM closed_position WHERE portfolio_id = $1 AND closed_sequence < $2 ORDER BY closed_sequence DESC LIMIT $3
"""
# The head and the entries are of one snapshot, because they are read by one statement.
_CYCLES = f"""
    SELECT asked.at, p.quantity, p.opened_sequence AS opened, e.*
    FROM unnest($1::text[], $2::text[], $3::bigint[]) WITH ORDINALITY AS asked (portfolio, held, since, at)
    LEFT JOIN position AS p ON p.portfolio_id = asked.portfolio AND p.symbol = asked.held
    CROSS JOIN LATERAL (
        SELECT {ENTRY_COLUMNS} FROM ledger_entry
        WHERE portfolio_id = asked.portfolio AND symbol = asked.held AND sequence >= asked.since
            AND kind IN ('FILL', 'SPLIT')
        ORDER BY sequence LIMIT $4
    ) AS e ORDER BY asked.at, e.sequence
"""  # noqa: S608
# What a range reads: the entries of a portfolio after the range's first point up to its last, by ledger sequence.
_SPAN = "portfolio_id = $1 AND sequence > $2 AND sequence <= $3"
_FLOWS = f"""
    SELECT recorded_at, sequence, amount, nav_before FROM ledger_entry
    WHERE {_SPAN} AND kind = ANY($4::text[]) AND nav_before IS NOT NULL ORDER BY sequence
"""  # noqa: S608
# A fill that was reversed within the span was none.
_TRADES = f"""
    SELECT count(*) FILTER (WHERE realized > 0), count(*) FILTER (WHERE realized < 0),
        coalesce(sum(realized) FILTER (WHERE realized > 0), 0), coalesce(sum(realized) FILTER (WHERE realized < 0), 0)
    FROM ledger_entry AS e WHERE {_SPAN} AND kind = 'FILL' AND reverses IS NULL
        AND NOT EXISTS (SELECT FROM ledger_entry WHERE reverses = e.event_id AND sequence <= $3)
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
    ) -> list[ShownEntry]:
        """At most `count_max` selected entries with a sequence below `before`, newest first."""
        chosen, arguments = conditions(selection, first=4)
        query = _PAGE.format(conditions=chosen)
        rows = await self._pool().fetch(query, portfolio_id, before, count_max, *arguments)
        return [_shown(row) for row in rows]

    async def after(self, portfolio_id: str, sequence: int, count_max: int) -> list[ShownEntry]:
        """At most `count_max` entries with a sequence above `sequence`, in order."""
        rows = await self._pool().fetch(_AFTER, portfolio_id, sequence, count_max)
        return [_shown(row) for row in rows]

    async def event(self, event_id: str) -> ShownEntry | None:
        """The entry of an event, whosever it is."""
        row = await self._pool().fetchrow(_EVENT, event_id)
        return None if row is None else _shown(row)

    async def closed_positions(self, portfolio_id: str, count_max: int, before: int) -> list[ClosedPosition]:
        """At most `count_max` cycles that ended before the entry `before`, the last one first."""
        rows = await self._pool().fetch(_CLOSED, portfolio_id, before, count_max)
        return [
            ClosedPosition(symbol, is_long, to_micro(realized), to_micro(fees), *instants_and_sequences)
            for symbol, is_long, realized, fees, *instants_and_sequences in rows
        ]

    async def cycles(self, asked: Sequence[HeldCycle], count_max: int) -> list[CycleEntries]:
        """The entries of each cycle from its first one on, at most `count_max` of each."""
        rows = await self._pool().fetch(_CYCLES, *map(list, zip(*asked, strict=True)), count_max)
        found = [CycleEntries([], None) for _ in asked]
        for row in rows:
            at = row[0] - 1
            entries, head = found[at]
            if row[2] == asked[at].opened_sequence:
                head = row[1].normalize()
            entries.append(read_entry(row[3:]))
            found[at] = CycleEntries(entries, head)
        return found

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


def read_entry(values: Iterable[Any]) -> LedgerEntry:
    """An entry from the values of ENTRY_COLUMNS, in their order."""
    entry = list(values)
    for at in _MONEY_AT:
        entry[at] = to_micro(entry[at])
    entry[_KIND_AT] = _KINDS[entry[_KIND_AT]]
    for at, read in _OPTIONAL:
        if entry[at] is not None:
            entry[at] = read(entry[at])
    return LedgerEntry(*entry)


_MONEY = ("amount", "fee", "receivable", "realized", "cost", "nav_effect", "cash_after")
_MONEY_AT = [LedgerEntry.__struct_fields__.index(name) for name in _MONEY]
_KIND_AT = LedgerEntry.__struct_fields__.index("kind")
_KINDS = {kind.value: kind for kind in LedgerKind}
_READERS: dict[str, Callable[[Any], object]] = {"side": Side, "scale": read_scale, "nav_before": to_micro}
_OPTIONAL = [(LedgerEntry.__struct_fields__.index(name), read) for name, read in _READERS.items()]


def _shown(row: asyncpg.Record) -> ShownEntry:
    *values, reversed_by = row
    return ShownEntry(read_entry(values), reversed_by)
