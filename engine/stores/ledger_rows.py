"""How portfolios, positions and ledger entries lie in PostgreSQL's rows, and the bulk statements that write them.

Entries travel by COPY, states by one statement over arrays, so that a batch costs a handful of round trips however
many events it has. Everything runs in the transaction of the SQLAlchemy connection that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.amounts import from_micro, to_micro
from engine.ledger import LedgerEntry, LedgerKind, Side, write_scale
from engine.messages import OpenEvent
from engine.portfolio import ClosedPosition, Portfolio, Position

ENTRY_COLUMNS = LedgerEntry.__slots__
_ENTRY_MONEY = frozenset({"amount", "fee", "receivable", "realized", "cost", "nav_effect", "cash_after", "nav_before"})
_SUMS = ("cash", "receivables", "realized", "fees", "income", "flows", "trading", "corporate")
_COUNTS = ("fills", "streak")
_POSITION = ("quantity", "cost", "realized", "fees", "opened_at", "opened_sequence", "held_since")

_WRITE_PORTFOLIOS = (
    "UPDATE portfolio SET "  # noqa: S608 - the columns are ours
    + ", ".join(f"{name} = new.{name}" for name in (*_SUMS, *_COUNTS, "ledger_sequence", "ledger_hash"))
    + " FROM unnest($1::text[], "
    + ", ".join(f"${at}::numeric[]" for at in range(2, 2 + len(_SUMS)))
    + "".join(f", ${at}::bigint[]" for at in range(2 + len(_SUMS), 5 + len(_SUMS)))
    + f", ${5 + len(_SUMS)}::bytea[]) AS new (id, "
    + ", ".join((*_SUMS, *_COUNTS, "ledger_sequence", "ledger_hash"))
    + ") WHERE portfolio.id = new.id"
)
_WRITE_POSITIONS = """
    INSERT INTO position (portfolio_id, symbol, quantity, cost, realized, fees, opened_at, opened_sequence,
        held_since)
    SELECT * FROM unnest($1::text[], $2::text[], $3::numeric[], $4::numeric[], $5::numeric[], $6::numeric[],
        $7::timestamptz[], $8::bigint[], $9::timestamptz[])
    ON CONFLICT (portfolio_id, symbol) DO UPDATE SET quantity = excluded.quantity, cost = excluded.cost,
        realized = excluded.realized, fees = excluded.fees, opened_at = excluded.opened_at,
        opened_sequence = excluded.opened_sequence, held_since = excluded.held_since
"""
_CLOSE_POSITIONS = """
    DELETE FROM position USING unnest($1::text[], $2::text[]) AS flat (portfolio_id, symbol)
    WHERE position.portfolio_id = flat.portfolio_id AND position.symbol = flat.symbol
"""
_CLOSED_COLUMNS = (
    "portfolio_id",
    "closed_sequence",
    "symbol",
    "side",
    "realized",
    "fees",
    "opened_at",
    "closed_at",
    "opened_sequence",
)


async def driver_of(connection: AsyncConnection) -> asyncpg.Connection:
    """The asyncpg connection beneath, inside the same transaction once a statement has begun it."""
    raw = await connection.get_raw_connection()
    assert isinstance(raw.driver_connection, asyncpg.Connection)
    return raw.driver_connection


async def write_entries(driver: asyncpg.Connection, entries: Iterable[LedgerEntry]) -> None:
    records = [tuple(entry_row(entry).values()) for entry in entries]
    await driver.copy_records_to_table("ledger_entry", records=records, columns=list(ENTRY_COLUMNS))


async def write_portfolios(driver: asyncpg.Connection, changed: Iterable[Portfolio]) -> None:
    rows = [
        (
            held.portfolio_id,
            *(from_micro(getattr(held, name)) for name in _SUMS),
            *(getattr(held, name) for name in _COUNTS),
            held.ledger_sequence,
            held.ledger_hash,
        )
        for held in sorted(changed, key=lambda held: held.portfolio_id)
    ]
    if rows:
        await driver.execute(_WRITE_PORTFOLIOS, *(list(column) for column in zip(*rows, strict=True)))


async def write_positions(
    driver: asyncpg.Connection, portfolios: Mapping[str, Portfolio], touched: Mapping[str, Iterable[str]]
) -> None:
    """Bring the rows of the touched positions to the portfolios' state."""
    opened: list[tuple[Any, ...]] = []
    flat: list[tuple[str, str]] = []
    for portfolio_id, symbols in sorted(touched.items()):
        for symbol in sorted(symbols):
            held = portfolios[portfolio_id].positions.get(symbol)
            if held is None:
                flat.append((portfolio_id, symbol))
            else:
                opened.append((portfolio_id, symbol, *position_row(held).values()))
    if opened:
        await driver.execute(_WRITE_POSITIONS, *(list(column) for column in zip(*opened, strict=True)))
    if flat:
        await driver.execute(_CLOSE_POSITIONS, *(list(column) for column in zip(*flat, strict=True)))


async def write_closed(driver: asyncpg.Connection, closed: Iterable[tuple[str, ClosedPosition]]) -> None:
    records = [
        (
            portfolio_id,
            cycle.closed_sequence,
            cycle.symbol,
            "LONG" if cycle.is_long else "SHORT",
            from_micro(cycle.realized),
            from_micro(cycle.fees),
            cycle.opened_at,
            cycle.closed_at,
            cycle.opened_sequence,
        )
        for portfolio_id, cycle in closed
    ]
    if records:
        await driver.copy_records_to_table("closed_position", records=records, columns=list(_CLOSED_COLUMNS))


def opened_row(shard_id: int, event: OpenEvent) -> dict[str, Any]:
    """A portfolio before its first entry, as the columns of `portfolio`."""
    return {
        "id": event.portfolio_id,
        "shard": shard_id,
        "owner": event.owner,
        "name": event.name,
        "base_currency": event.base_currency,
        "day_cut": event.day_cut,
        "opened_at": event.opened_at,
        "ledger_sequence": 0,
        "ledger_hash": b"",
        **dict.fromkeys(_SUMS, Decimal(0)),
        **dict.fromkeys(_COUNTS, 0),
    }


def position_row(held: Position) -> dict[str, Any]:
    money = ("cost", "realized", "fees")
    return {name: from_micro(getattr(held, name)) if name in money else getattr(held, name) for name in _POSITION}


def entry_row(entry: LedgerEntry) -> dict[str, Any]:
    """An entry as the columns of `ledger_entry`, in the order of ENTRY_COLUMNS."""
    row: dict[str, Any] = {}
    for name in ENTRY_COLUMNS:
        value = getattr(entry, name)
        row[name] = from_micro(value) if value is not None and name in _ENTRY_MONEY else value
    row["kind"] = entry.kind.value
    row["side"] = entry.side.value if entry.side else None
    row["scale"] = write_scale(entry.scale) if entry.scale else None
    return row


def entry_of(row: Any) -> LedgerEntry:
    """A `ledger_entry` row as an entry: the inverse of `entry_row`."""
    fields = {name: getattr(row, name) for name in ENTRY_COLUMNS}
    for name in _ENTRY_MONEY:
        fields[name] = None if fields[name] is None else to_micro(fields[name])
    fields["kind"] = LedgerKind(row.kind)
    fields["side"] = Side(row.side) if row.side else None
    fields["scale"] = read_scale(row.scale)
    return LedgerEntry(**fields)


def read_scale(text: str | None) -> Fraction | None:
    """The inverse of engine.ledger.write_scale."""
    if text is None:
        return None
    new, _, old = text.partition(":")
    return Fraction(int(new), int(old))


def portfolio_of(row: Any) -> Portfolio:
    """A `portfolio` row as folded state, without positions."""
    portfolio = Portfolio(row.id, row.base_currency, ledger_sequence=row.ledger_sequence)
    portfolio.ledger_hash = bytes(row.ledger_hash)
    for name in _SUMS:
        setattr(portfolio, name, to_micro(getattr(row, name)))
    for name in _COUNTS:
        setattr(portfolio, name, getattr(row, name))
    return portfolio


def position_of(row: Any) -> Position:
    return Position(
        row.quantity.normalize(),
        to_micro(row.cost),
        to_micro(row.realized),
        to_micro(row.fees),
        row.opened_at,
        row.opened_sequence,
        row.held_since,
    )
