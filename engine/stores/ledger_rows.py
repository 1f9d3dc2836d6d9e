"""How portfolios, positions and ledger entries lie in PostgreSQL's rows, and the bulk statements that move them.

A batch costs a handful of round trips however many events it has: all rows of a table travel in one statement, as one
JSON text, with amounts as whole micro-units and bytes in base64. PostgreSQL makes its types of that, as it makes whole
micro-units of what is read, at a fraction of what the driver takes to do it value by value. Everything runs in the
transaction of the connection that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import asyncpg
import msgspec
from msgspec import structs
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.amounts import from_micro, to_micro
from engine.ledger import LedgerEntry, LedgerKind, Side, write_scale
from engine.messages import OpenEvent
from engine.portfolio import ClosedPosition, Portfolio, Position

ENTRY_COLUMNS = LedgerEntry.__struct_fields__
_ENTRY_MONEY = frozenset({"amount", "fee", "receivable", "realized", "cost", "nav_effect", "cash_after", "nav_before"})
_SUMS = ("cash", "receivables", "realized", "fees", "income", "flows", "trading", "corporate")
_COUNTS = ("fills", "streak")

# What each field travels as, where that is not text.
_TYPES = {
    **dict.fromkeys(("sequence", "ledger_sequence", *_ENTRY_MONEY, *_SUMS, *_COUNTS), "bigint"),
    **dict.fromkeys(("quantity", "price"), "numeric"),
    **dict.fromkeys(("effective_at", "recorded_at"), "timestamptz"),
    "late": "boolean",
}


def _typed(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {_TYPES.get(name, 'text')}" for name in names)


def _made(name: str) -> str:
    """A field as its column has it."""
    if name in _ENTRY_MONEY or name in _SUMS:
        return f"{name} * 0.000001"
    return f"decode({name}, 'base64')" if name.endswith("hash") else name


def _to_micro(name: str) -> str:
    return f"({name} * 1000000)::bigint"


_WRITE_ENTRIES = f"""
    INSERT INTO ledger_entry ({", ".join(ENTRY_COLUMNS)})
    SELECT {", ".join(map(_made, ENTRY_COLUMNS))} FROM json_to_recordset($1) AS new ({_typed(ENTRY_COLUMNS)})
"""  # noqa: S608 - the columns are ours
# In the order of Portfolio's fields, before the shard.
_READ_PORTFOLIOS = f"""
    SELECT id, base_currency, {", ".join(map(_to_micro, _SUMS))}, ledger_sequence, ledger_hash, {", ".join(_COUNTS)},
        shard
    FROM portfolio WHERE id = ANY($1::text[])
"""  # noqa: S608
# In the order of Position's fields, behind whose and which it is. One probe of the index for each, whatever the planner
# thinks of the table: it may have been empty when it last looked.
_READ_POSITIONS = """
    SELECT asked.portfolio_id, asked.symbol, held.* FROM unnest($1::text[], $2::text[]) AS asked (portfolio_id, symbol)
    CROSS JOIN LATERAL (
        SELECT trim_scale(quantity), (cost * 1000000)::bigint, (realized * 1000000)::bigint, (fees * 1000000)::bigint,
            opened_at, opened_sequence, held_since
        FROM position WHERE position.portfolio_id = asked.portfolio_id AND position.symbol = asked.symbol LIMIT 1
    ) AS held
"""
_STATE = (*_SUMS, *_COUNTS, "ledger_sequence", "ledger_hash")
_WRITE_PORTFOLIOS = f"""
    UPDATE portfolio SET {", ".join(f"{name} = new.{name}" for name in _STATE)}
    FROM (
        SELECT portfolio_id, {", ".join(f"{_made(name)} AS {name}" for name in _STATE)}
        FROM json_to_recordset($1) AS travelling (portfolio_id text, {_typed(_STATE)})
    ) AS new WHERE portfolio.id = new.portfolio_id
"""  # noqa: S608
_WRITE_POSITIONS = """
    INSERT INTO position (portfolio_id, symbol, quantity, cost, realized, fees, opened_at, opened_sequence,
        held_since)
    SELECT portfolio_id, symbol, quantity, cost * 0.000001, realized * 0.000001, fees * 0.000001, opened_at,
        opened_sequence, held_since
    FROM json_to_recordset($1) AS new (portfolio_id text, symbol text, quantity numeric, cost bigint, realized bigint,
        fees bigint, opened_at timestamptz, opened_sequence bigint, held_since timestamptz)
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


async def read_portfolios(
    driver: asyncpg.Connection, portfolio_ids: Iterable[str]
) -> tuple[dict[str, Portfolio], dict[str, int]]:
    """These portfolios, without positions, and the shard of each."""
    portfolios, shards = {}, {}
    for *fields, shard_id in await driver.fetch(_READ_PORTFOLIOS, sorted(portfolio_ids)):
        held = Portfolio(*fields)
        portfolios[held.portfolio_id], shards[held.portfolio_id] = held, shard_id
    return portfolios, shards


async def read_positions(
    driver: asyncpg.Connection, portfolios: Mapping[str, Portfolio], asked: Iterable[tuple[str, str]]
) -> None:
    """Give portfolios their positions in these symbols; who has none in one is left without."""
    pairs = sorted(asked)
    if pairs:
        for name, symbol, *fields in await driver.fetch(_READ_POSITIONS, *_columns(pairs)):
            portfolios[name].positions[symbol] = Position(*fields)


async def write_entries(driver: asyncpg.Connection, entries: Sequence[LedgerEntry]) -> None:
    if entries:
        await driver.execute(_WRITE_ENTRIES, _travelling(entries))


async def write_portfolios(driver: asyncpg.Connection, changed: Iterable[Portfolio]) -> None:
    # In one order, as everywhere that several rows are locked.
    held = sorted(changed, key=lambda one: one.portfolio_id)
    if held:
        await driver.execute(_WRITE_PORTFOLIOS, _travelling(held))


async def write_positions(
    driver: asyncpg.Connection, portfolios: Mapping[str, Portfolio], touched: Mapping[str, Iterable[str]]
) -> None:
    """Bring the rows of the touched positions to the portfolios' state."""
    opened: list[dict[str, Any]] = []
    flat: list[tuple[str, str]] = []
    for portfolio_id, symbols in sorted(touched.items()):
        for symbol in sorted(symbols):
            held = portfolios[portfolio_id].positions.get(symbol)
            if held is None:
                flat.append((portfolio_id, symbol))
            else:
                opened.append({"portfolio_id": portfolio_id, "symbol": symbol, **structs.asdict(held)})
    if opened:
        await driver.execute(_WRITE_POSITIONS, _travelling(opened))
    if flat:
        await driver.execute(_CLOSE_POSITIONS, *_columns(flat))


def _scale_text(scale: object) -> str:
    assert isinstance(scale, Fraction)
    return write_scale(scale)


_encoder = msgspec.json.Encoder(enc_hook=_scale_text)


def _travelling(rows: Sequence[object]) -> str:
    return _encoder.encode(rows).decode()


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


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


def entry_of(row: Any) -> LedgerEntry:
    """A `ledger_entry` row as an entry."""
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
