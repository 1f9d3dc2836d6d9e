"""A portfolio's past, read from its ledger (engine.as_of).

A past position of the ledger is found by a search over `sequence` between the two snapshots around the instant, and
its state is made from whichever is shorter: the entries before it or those since. Sums are made by PostgreSQL, in
NUMERIC, so that no row of a long ledger travels. What is read here of a position of the ledger never changes, except
that `recorded_at` of two owners' clocks may disagree for as long as these do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import asyncpg

from engine.amounts import EXACT, to_micro
from engine.as_of import Cycle, DayStart, Effects, LedgerState, PastPosition, traded_shares
from engine.instants import to_ns
from engine.ledger import EXTERNAL_FLOWS, INCOME, LedgerKind, Side
from engine.stores.ledger_reads import PoolSource

# What the portfolio had booked at $2: between the ledger sequences of what was recorded around that instant, and at an
# instant that has a snapshot exactly the snapshot's.
_BRACKET = """
    SELECT p.ledger_sequence AS last, p.day_cut,
        (SELECT ledger_sequence FROM equity_snapshot WHERE portfolio_id = $1 AND at = $2) AS exact,
        greatest(
            (SELECT ledger_sequence FROM equity_snapshot
                WHERE portfolio_id = $1 AND at <= $2 ORDER BY at DESC LIMIT 1),
            (SELECT ledger_sequence FROM day_baseline WHERE portfolio_id = $1 AND cut_at <= $2
                ORDER BY cut_at DESC LIMIT 1)
        ) AS low,
        (SELECT ledger_sequence FROM equity_snapshot WHERE portfolio_id = $1 AND at > $2 ORDER BY at LIMIT 1) AS high
    FROM portfolio AS p WHERE p.id = $1
"""
_SEARCH = """
    WITH RECURSIVE search (low, high) AS (
        SELECT $2::bigint, $3::bigint
        UNION ALL
        SELECT CASE WHEN e.recorded_at <= $4 THEN e.sequence ELSE low END,
               CASE WHEN e.recorded_at <= $4 THEN high ELSE e.sequence - 1 END
        FROM search JOIN ledger_entry AS e ON e.portfolio_id = $1 AND e.sequence = (low + high + 1) / 2
        WHERE low < high
    ) SELECT low FROM search WHERE low = high
"""
_PRESENT = """
    SELECT ledger_sequence, cash, receivables, realized, fees, income, flows, trading, corporate
    FROM portfolio WHERE id = $1
"""
_HELD = "SELECT symbol, quantity, cost FROM position WHERE portfolio_id = $1"


def _sum(figure: str, condition: str = "") -> str:
    chosen = f" FILTER (WHERE {condition})" if condition else ""
    return f"(coalesce(sum({figure}){chosen}, 0) * 1000000)::bigint"


def _kinds(kinds: Collection[LedgerKind]) -> str:
    return "kind IN (" + ", ".join(f"'{kind}'" for kind in sorted(kinds)) + ")"


_FILL, _SPLIT = _kinds([LedgerKind.FILL]), _kinds([LedgerKind.SPLIT])
_SPAN = "portfolio_id = $1 AND sequence > $2 AND sequence <= $3"
# In the order of Effects. Fills booked in other shares than they were executed in (there are few) are counted one by
# one, because only engine.amounts rounds.
_EFFECTS = f"""
    SELECT symbol,
        coalesce(sum(CASE WHEN {_SPLIT} OR side = 'BUY' THEN quantity ELSE -quantity END)
            FILTER (WHERE {_SPLIT} OR ({_FILL} AND scale IS NULL)), 0),
        {_sum("cost")}, {_sum("amount - fee")}, {_sum("receivable")}, {_sum("realized")},
        {_sum("fee - CASE WHEN kind = 'FEE' THEN amount ELSE 0 END")},
        {_sum("amount + receivable", _kinds(INCOME))}, {_sum("amount", _kinds(EXTERNAL_FLOWS))},
        {_sum("nav_effect + fee", _FILL)}, {_sum("nav_effect", _SPLIT)}, {_sum("-amount", _FILL)},
        {_sum("nav_effect")},
        array_agg(ARRAY[side, quantity::text, scale]) FILTER (WHERE {_FILL} AND scale IS NOT NULL)
    FROM ledger_entry WHERE {_SPAN} GROUP BY symbol
"""  # noqa: S608 -- constants of this module only
_FLOWS = f"""
    SELECT nav_before, amount FROM ledger_entry
    WHERE {_SPAN} AND {_kinds(EXTERNAL_FLOWS)} AND nav_before IS NOT NULL ORDER BY sequence
"""  # noqa: S608
# The cycle that each symbol was in after the entry $2: one that ended since, or the present one. `crossed`: the entry
# that opened it ended the one before, and what it realised belongs there.
_CYCLES = """
    SELECT cycle.*, EXISTS (
        SELECT FROM closed_position WHERE portfolio_id = $1 AND closed_sequence = cycle.opened_sequence
    ) AS crossed
    FROM (
        SELECT symbol, opened_at, opened_sequence, closed_sequence AS ends, realized, fees
        FROM closed_position
        WHERE portfolio_id = $1 AND closed_sequence > $2 AND opened_sequence <= $2 AND symbol = ANY($3::text[])
        UNION ALL
        SELECT symbol, opened_at, opened_sequence, (SELECT ledger_sequence FROM portfolio WHERE id = $1), realized, fees
        FROM position WHERE portfolio_id = $1 AND opened_sequence <= $2 AND symbol = ANY($3::text[])
    ) AS cycle
"""
_CYCLE_SUMS = """
    SELECT asked.symbol, coalesce(sum(e.realized), 0), coalesce(sum(e.fee), 0)
    FROM unnest($2::text[], $3::bigint[], $4::bigint[]) AS asked (symbol, after, until)
    JOIN ledger_entry AS e
        ON e.portfolio_id = $1 AND e.symbol = asked.symbol AND e.sequence > asked.after AND e.sequence <= asked.until
    WHERE e.kind IN ('FILL', 'SPLIT') GROUP BY asked.symbol
"""
_BASELINE = """
    SELECT nav, ledger_sequence, symbols, position_values FROM day_baseline WHERE portfolio_id = $1 AND cut_at = $2
"""
_IS_ESTIMATED = "SELECT estimated FROM day_baseline WHERE portfolio_id = $1 AND cut_at = $2"
# The splits of some symbols, and when they came: to the portfolio as an entry, else to its shard.
_SPLITS = """
    SELECT a.symbol, a.effective_at, a.terms, e.sequence, s.applied_at
    FROM corporate_action AS a
    LEFT JOIN ledger_entry AS e ON e.event_id = a.action_id || '#' || $1
    LEFT JOIN shard_action AS s ON s.action_id = a.action_id AND s.step = 'SPLIT'
        AND s.shard = (SELECT shard FROM portfolio WHERE id = $1)
    WHERE a.kind = 'SPLIT' AND a.symbol = ANY($2::text[]) ORDER BY a.effective_at, a.arrival
"""


@dataclass(frozen=True, slots=True)
class PastLedger:
    """How many entries a portfolio had at an instant, and the day cut that it keeps."""

    ledger_sequence: int
    day_cut: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """The portfolio at a day cut, as it was stored then; amounts in micro-units."""

    nav: int
    ledger_sequence: int
    values: Mapping[str, int]


class AsOfReads:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away; KeyError
    for a portfolio that does not exist."""

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool

    async def ledger_at(self, portfolio_id: str, at: datetime) -> PastLedger:
        """Where the ledger was at an instant."""
        async with self._pool().acquire() as connection:
            row = await connection.fetchrow(_BRACKET, portfolio_id, at)
            if row is None:
                raise KeyError(portfolio_id)
            last = row["last"]
            if row["exact"] is not None:
                return PastLedger(min(row["exact"], last), row["day_cut"])
            low = min(row["low"] or 0, last)
            high = max(low, last if row["high"] is None else min(row["high"], last))
            found = await connection.fetchval(_SEARCH, portfolio_id, low, high, at)
            return PastLedger(int(found), row["day_cut"])

    async def state(self, portfolio_id: str, ledger_sequence: int) -> LedgerState:
        """What the first entries, up to and with `ledger_sequence`, add up to."""
        async with (
            self._pool().acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            row = await connection.fetchrow(_PRESENT, portfolio_id)
            if row is None:
                raise KeyError(portfolio_id)
            last = row["ledger_sequence"]
            if ledger_sequence < last - ledger_sequence:
                effects = await _read_effects(connection, portfolio_id, 0, ledger_sequence)
                return LedgerState().plus(effects, ledger_sequence)
            held = await connection.fetch(_HELD, portfolio_id)
            positions = {symbol: PastPosition(quantity, to_micro(cost)) for symbol, quantity, cost in held}
            present = LedgerState(last, positions, *(to_micro(amount) for amount in tuple(row)[1:]))
            effects = await _read_effects(connection, portfolio_id, ledger_sequence, last)
            return present.minus(effects, ledger_sequence)

    async def effects(self, portfolio_id: str, after: int, last: int) -> dict[str | None, Effects]:
        """What the entries with `after` < sequence ≤ `last` did, by symbol."""
        async with self._pool().acquire() as connection:
            return await _read_effects(connection, portfolio_id, after, last)

    async def cycles(self, portfolio_id: str, ledger_sequence: int, symbols: Collection[str]) -> dict[str, Cycle]:
        """The cycles of positions held after `ledger_sequence`, with what they had realised and paid by then."""
        async with (
            self._pool().acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = await connection.fetch(_CYCLES, portfolio_id, ledger_sequence, list(symbols))
            # Forward from the beginning of the cycle, or back from its end: whichever is shorter.
            spans = {row["symbol"]: _span(row, ledger_sequence) for row in rows}
            asked = ([*spans], [after for after, _, _ in spans.values()], [until for _, until, _ in spans.values()])
            summed = await connection.fetch(_CYCLE_SUMS, portfolio_id, *asked) if rows else []
        sums = {symbol: (to_micro(realized), to_micro(fees)) for symbol, realized, fees in summed}
        return {row["symbol"]: _cycle(row, sums.get(row["symbol"], (0, 0)), spans[row["symbol"]][2]) for row in rows}

    async def baseline(self, portfolio_id: str, cut_at: datetime) -> Baseline | None:
        """What was stored at a day cut; None when nothing was."""
        row = await self._pool().fetchrow(_BASELINE, portfolio_id, cut_at)
        if row is None:
            return None
        values = zip(row["symbols"], map(to_micro, row["position_values"]), strict=True)
        return Baseline(to_micro(row["nav"]), row["ledger_sequence"], dict(values))

    async def is_estimated(self, portfolio_id: str, cut_at: datetime) -> bool:
        """Whether what was stored at a day cut was made afterwards from prices of another instant."""
        return bool(await self._pool().fetchval(_IS_ESTIMATED, portfolio_id, cut_at))

    async def since(self, portfolio_id: str, start: Baseline, cut_at: datetime, last: int) -> DayStart:
        """The day that began with `start`, up to the entry `last`."""
        effects: dict[str | None, Effects] = {}
        flows: list[tuple[int, int]] = []
        if last > start.ledger_sequence:
            span = (portfolio_id, start.ledger_sequence, last)
            async with self._pool().acquire() as connection:
                effects = await _read_effects(connection, *span)
                if any(one.flows for one in effects.values()) or None in effects:
                    rows = await connection.fetch(_FLOWS, *span)
                    flows = [(to_micro(before), to_micro(amount)) for before, amount in rows]
        return DayStart(to_ns(cut_at), start.nav, start.values, effects, flows)

    async def splits(
        self, portfolio_id: str, symbols: Collection[str], ledger_sequence: int, at: datetime
    ) -> dict[str, tuple[tuple[int, str], ...]]:
        """The splits (effective instant in ns, new:old) of some symbols that the ledger has after `ledger_sequence`.

        A portfolio that held nothing when its shard split has no entry; for it they count from when the shard did.
        """
        found: dict[str, tuple[tuple[int, str], ...]] = {}
        for symbol, effective_at, terms, sequence, applied_at in await self._pool().fetch(
            _SPLITS, portfolio_id, list(symbols)
        ):
            known = applied_at is not None and applied_at <= at if sequence is None else sequence <= ledger_sequence
            if known:
                found[symbol] = (*found.get(symbol, ()), (to_ns(effective_at), terms))
        return found


async def _read_effects(connection: Any, portfolio_id: str, after: int, last: int) -> dict[str | None, Effects]:
    rows: list[asyncpg.Record] = await connection.fetch(_EFFECTS, portfolio_id, after, last) if last > after else []
    effects = {}
    for symbol, quantity, *amounts, scaled in rows:
        for side, shares, scale in scaled or ():
            ratio = Fraction(*map(int, scale.split(":")))
            quantity = EXACT.add(quantity, traded_shares(Side(side), Decimal(shares), ratio))
        effects[symbol] = Effects(quantity, *amounts)
    return effects


def _span(row: asyncpg.Record, ledger_sequence: int) -> tuple[int, int, bool]:
    """After which entry and up to which one to sum, and whether that is what came since (to be taken off)."""
    begin = row["opened_sequence"] - (0 if row["crossed"] else 1)
    if ledger_sequence - begin <= row["ends"] - ledger_sequence:
        return begin, ledger_sequence, False
    return ledger_sequence, row["ends"], True


def _cycle(row: asyncpg.Record, sums: tuple[int, int], since: bool) -> Cycle:
    realized, fees = sums
    if since:
        realized, fees = to_micro(row["realized"]) - realized, to_micro(row["fees"]) - fees
    return Cycle(realized, fees, to_ns(row["opened_at"]), row["opened_sequence"])
