"""Recorded prices, table `price_close`: the last accepted quote of every symbol at each instant of the grid.

A row (symbol, at) says that at `at` the last quote was `price`, stamped `ts_event` ≤ `at`; a symbol that was quiet
repeats its last one, so a row's `ts_event` says how old it is. The first row of an instant stays. What a symbol was
worth at an instant between is the row before it:

A symbol's very first quote is a row of its own at that quote's instant, so that there is a price from then on.

    closes_at(symbols, t) = of each symbol the row with the greatest at ≤ t, as a quote         (absent: none)

Instants have microseconds here; `ts_event` is cut to them, never moved past its split or its cut. Prices are as they
were quoted, in the shares of their `ts_event` (engine.corporate_actions.price_after brings them to later ones).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from decimal import Decimal

import asyncpg

from engine.amounts import plain
from engine.instants import to_datetime, to_ns
from engine.messages import Quote
from engine.stores.ledger_reads import PoolSource

# A system that runs writes every symbol every hour, so nearly every search ends within the newest chunk. Two days are
# more than the hours that a short outage leaves out; only what is not found there is searched in the rest.
LOOK_BACK = timedelta(days=2)

_WRITE = """
    INSERT INTO price_close (symbol, at, price, ts_event, source, condition)
    SELECT symbol, $1, price, ts_event, source, condition
    FROM unnest($2::text[], $3::numeric[], $4::timestamptz[], $5::text[], $6::text[])
        AS quote (symbol, price, ts_event, source, condition)
    ON CONFLICT DO NOTHING
"""
_WRITE_FIRST = """
    INSERT INTO price_close (symbol, at, price, ts_event, source, condition)
    SELECT symbol, ts_event, price, ts_event, source, condition
    FROM unnest($1::text[], $2::numeric[], $3::timestamptz[], $4::text[], $5::text[])
        AS quote (symbol, price, ts_event, source, condition)
    WHERE NOT EXISTS (SELECT FROM price_close AS known WHERE known.symbol = quote.symbol)
    ON CONFLICT DO NOTHING
"""
_AT = """
    SELECT symbol, price, ts_event, source, condition
    FROM unnest($1::text[]) AS asked, LATERAL (
        SELECT symbol, price, ts_event, source, condition FROM price_close
        WHERE symbol = asked AND at <= $2 {bound} ORDER BY at DESC LIMIT 1
    ) AS close
"""
_AT_RECENT, _AT_ANY = _AT.format(bound="AND at > $3"), _AT.format(bound="")


class PriceCloses:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away."""

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool

    async def write(self, at: datetime, quotes: Sequence[Quote]) -> int:
        """Record the last `quotes`, one per symbol, as of the grid instant `at`; returns how many rows were new."""
        status = await self._pool().execute(_WRITE, at, *_columns(quotes))
        return int(status.rpartition(" ")[2])

    async def write_first(self, quotes: Sequence[Quote]) -> int:
        """Record quotes of symbols that have no row yet, each at its own instant; returns how many those were."""
        status = await self._pool().execute(_WRITE_FIRST, *_columns(quotes))
        return int(status.rpartition(" ")[2])

    async def closes_at(self, symbols: Collection[str], at: datetime) -> dict[str, Quote]:
        """The last recorded quote of each symbol at `at`; a symbol without one is absent."""
        pool = self._pool()
        rows = await pool.fetch(_AT_RECENT, list(symbols), at, at - LOOK_BACK)
        found = {row["symbol"]: _quote(row) for row in rows}
        missing = [symbol for symbol in symbols if symbol not in found]
        if missing:
            found |= {row["symbol"]: _quote(row) for row in await pool.fetch(_AT_ANY, missing, at)}
        return found


def _columns(quotes: Sequence[Quote]) -> tuple[list[object], ...]:
    return (
        [quote.symbol for quote in quotes],
        [Decimal(quote.price) for quote in quotes],
        [to_datetime(quote.ts_event_ns) for quote in quotes],
        [quote.source for quote in quotes],
        [quote.condition for quote in quotes],
    )


def _quote(row: asyncpg.Record) -> Quote:
    return Quote(
        symbol=row["symbol"],
        price=plain(row["price"]),
        ts_event_ns=to_ns(row["ts_event"]),
        source=row["source"],
        condition=row["condition"],
    )
