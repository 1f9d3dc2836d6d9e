"""The reconciler: hot state against a Decimal fold of the ledger, for every portfolio.

Compared are

    the ledger itself     the fold's checks (engine.portfolio.LedgerMismatch): gap-free, amounts, running balances
    mark                  cash, realized, fees, nav, unrealized, and the positions value, which must be the fold's at
                          the prices after some prefix of the quote stream (workers.quote_history)
    hot positions         symbols, quantities, costs, realised P&L
    position rows         PostgreSQL's `position` against the fold

A system at work is always on its way from one state to the next, so a portfolio that does not agree is read again
up to ATTEMPTS_MAX times; what still differs then is a difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from redis.asyncio import Redis
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from engine.marks import Mark, decode_mark
from engine.portfolio import LedgerMismatch, Portfolio
from engine.positions import HotPosition, carried_value, hot_position_decoder
from engine.runtime.connections import connect_redis, make_engine
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.ledger_postgres import entry_of, position_of
from engine.stores.tables import ledger_entry, portfolio, position
from workers.quote_history import QuoteHistory

PORTFOLIOS_PER_READ_MAX = 500
ATTEMPTS_MAX = 10
ATTEMPT_INTERVAL_S = 0.3
HISTORY_LEAD_S = 2.0  # far longer than a flush takes


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure that does not agree; `expected` is the fold's."""

    portfolio_id: str
    figure: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Report:
    portfolios_count: int
    entries_count: int
    differences: Sequence[Difference]


class Reconciler:
    def __init__(self, engine: AsyncEngine, redis: Redis) -> None:
        self._engine = engine
        self._redis = redis
        self._history = QuoteHistory()

    async def reconcile(self) -> Report:
        """Compare every portfolio. Raises DBAPIError, RedisError, OSError when a server is not there."""
        watch = asyncio.create_task(self._history.watch(self._redis))
        try:
            # Marks read from here on were made from prices that the history has.
            await asyncio.sleep(HISTORY_LEAD_S)
            return await self._reconcile()
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _reconcile(self) -> Report:
        portfolios_count = entries_count = 0
        differences: list[Difference] = []
        async for names in self._batches():
            found, folded_count = await self._compare_until_agreed(names)
            portfolios_count += len(names)
            entries_count += folded_count
            differences += found
        return Report(portfolios_count, entries_count, differences)

    async def _compare_until_agreed(self, names: list[str]) -> tuple[list[Difference], int]:
        """The differences that stay, and how many ledger entries the portfolios have."""
        counts: dict[str, int] = {}
        found: dict[str, list[Difference]] = {}
        for attempt in range(ATTEMPTS_MAX):
            if attempt:
                await asyncio.sleep(ATTEMPT_INTERVAL_S)
            found = await self._compare(list(found) or names, counts)
            if not found:
                break
        return [difference for of_one in found.values() for difference in of_one], sum(counts.values())

    async def _batches(self) -> AsyncIterator[list[str]]:
        after = ""
        while True:
            async with self._engine.connect() as connection:
                statement = select(portfolio.c.id).where(portfolio.c.id > after).order_by(portfolio.c.id)
                names = list(await connection.scalars(statement.limit(PORTFOLIOS_PER_READ_MAX)))
            if not names:
                return
            yield names
            after = names[-1]

    async def _compare(self, names: list[str], counts: dict[str, int]) -> dict[str, list[Difference]]:
        """The portfolios that differ now, each with its differences; notes in `counts` what was folded."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            rows = (await connection.execute(select(portfolio).where(portfolio.c.id.in_(names)))).all()
            folds, mismatches = await _folds(connection, rows)
            stored = await _stored_positions(connection, names)
        hot = await self._hot(rows)
        found = {mismatch.portfolio_id: [mismatch] for mismatch in mismatches}
        for row in rows:
            fold = folds.get(row.id)
            if fold is not None:
                counts[row.id] = fold.ledger_sequence
                mark, positions = hot[row.id]
                differences = _differences(fold, row, mark, positions, stored.get(row.id, {}))
                if not differences and mark is not None:
                    differences = self._value_differences(fold, mark)
                if differences:
                    found[row.id] = differences
        return found

    def _value_differences(self, fold: Portfolio, mark: Mark) -> list[Difference]:
        """None when the mark's positions value is the fold's after some prefix of the quote stream."""
        values = {
            symbol: carried_value(held.quantity, held.cost, self._history.first(symbol))
            for symbol, held in fold.positions.items()
        }
        total = sum(values.values())
        for symbol, price in self._history.changes(values):
            if total == mark.positions_value:
                break
            held = fold.positions[symbol]
            value = carried_value(held.quantity, held.cost, price)
            total, values[symbol] = total + value - values[symbol], value
        if total == mark.positions_value:
            return []
        return [Difference(fold.portfolio_id, "positions value", str(total), str(mark.positions_value))]

    async def _hot(self, rows: Sequence[Any]) -> dict[str, tuple[Mark | None, dict[str, HotPosition]]]:
        """Marks and hot positions of portfolios, read in two round trips."""
        shards = sorted({row.shard for row in rows})
        async with self._redis.pipeline(transaction=False) as pipe:
            for shard in shards:
                pipe.hget(redis_keys.shard(shard), "epoch")
            epochs = dict(zip(shards, (int(epoch or 0) for epoch in await pipe.execute()), strict=True))
            for row in rows:
                pipe.hget(redis_keys.marks(row.shard, epochs[row.shard]), row.id)
                pipe.hgetall(redis_keys.positions(row.shard, row.id))
            answers = await pipe.execute()
        found = {}
        for at, row in enumerate(rows):
            packed, hashed = answers[2 * at], answers[2 * at + 1]
            mark = decode_mark(packed, epochs[row.shard]) if packed else None
            found[row.id] = (mark, {s.decode(): hot_position_decoder.decode(v) for s, v in hashed.items()})
        return found


async def _folds(connection: AsyncConnection, rows: Sequence[Any]) -> tuple[dict[str, Portfolio], list[Difference]]:
    """The fold of each portfolio's ledger; one that does not fold is a difference and missing from the folds."""
    folds = {row.id: Portfolio(row.id, row.base_currency) for row in rows}
    differences = []
    entries = (
        select(ledger_entry)
        .where(ledger_entry.c.portfolio_id.in_(list(folds)))
        .order_by(ledger_entry.c.portfolio_id, ledger_entry.c.sequence)
    )
    async with connection.stream(entries) as stream:
        async for row in stream:
            fold = folds.get(row.portfolio_id)
            if fold is None:
                continue
            try:
                fold.replay(entry_of(row))
            except LedgerMismatch as mismatch:
                differences.append(Difference(row.portfolio_id, "ledger", "a ledger that folds", str(mismatch)))
                del folds[row.portfolio_id]
    return folds, differences


async def _stored_positions(connection: AsyncConnection, names: list[str]) -> dict[str, dict[str, Any]]:
    stored: dict[str, dict[str, Any]] = {}
    for row in await connection.execute(select(position).where(position.c.portfolio_id.in_(names))):
        stored.setdefault(row.portfolio_id, {})[row.symbol] = position_of(row)
    return stored


def _differences(
    fold: Portfolio, row: Any, mark: Mark | None, hot: dict[str, HotPosition], stored: dict[str, Any]
) -> list[Difference]:
    name = fold.portfolio_id
    checks: list[tuple[str, object, object]] = [("account.ledger_sequence", fold.ledger_sequence, row.ledger_sequence)]
    if mark is None:
        checks.append(("mark", "a mark", None))
    else:
        cost = sum(held.cost for held in fold.positions.values())
        checks += [
            ("ledger_sequence", fold.ledger_sequence, mark.ledger_sequence),
            ("cash", fold.cash, mark.cash),
            ("realized", fold.realized, mark.realized),
            ("fees", fold.fees, mark.fees),
            ("nav", mark.cash + mark.positions_value, mark.nav),
            ("unrealized", mark.positions_value - cost, mark.unrealized),
        ]
    expected = {s: (held.quantity, held.cost, held.realized) for s, held in fold.positions.items()}
    found = {s: (Decimal(held.quantity), held.cost, held.realized) for s, held in hot.items()}
    rows = {s: (held.quantity, held.cost, held.realized) for s, held in stored.items()}
    for symbol in sorted(expected.keys() | found.keys() | rows.keys()):
        checks.append((f"hot position {symbol}", expected.get(symbol), found.get(symbol)))
        checks.append((f"position row {symbol}", expected.get(symbol), rows.get(symbol)))
    return [Difference(name, figure, str(wanted), str(got)) for figure, wanted, got in checks if wanted != got]


async def reconcile_once(settings: Settings) -> Report:
    """Reconcile a running system from a process of its own."""
    engine, redis = make_engine(settings, "reconciler"), connect_redis(settings, "reconciler")
    try:
        return await Reconciler(engine, redis).reconcile()
    finally:
        await redis.aclose()
        await engine.dispose()
