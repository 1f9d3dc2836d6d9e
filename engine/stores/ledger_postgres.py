"""The ledger in PostgreSQL, written by the one evaluator that owns a shard.

`book` is the only way in: one transaction takes a batch of Kafka records and

    1. moves the shard's offset, asserting its epoch             a zombie's transaction ends here (Fenced)
    2. reads what the records refer to                           entries with their ids, portfolios, positions
    3. books them (engine.booking), in the log's order
    4. writes entries, positions, portfolios, unheard-of assets  all or nothing

so each event has its effect exactly once however often it is delivered. Dead letters are handed to the caller,
who produces them before the transaction commits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Text, any_, bindparam, delete, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from engine.amounts import from_micro, to_micro
from engine.assets import UNCLASSIFIED
from engine.booking import Batch, Booked, DeadLetter, Known, Marks, Record
from engine.ledger import LedgerEntry, LedgerKind, Side
from engine.messages import OpenEvent
from engine.portfolio import Portfolio, Position
from engine.stores.tables import asset, ledger_entry, portfolio, position, shard


class Fenced(Exception):
    """The shard has a newer epoch: this evaluator no longer owns it and must let go."""


class OffsetMoved(Exception):
    """The ledger is not where its owner left it (it was restored, or lost its last commits): load the shard anew."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What an owner shows to write: its shard, the epoch it took it under, and the log it reads."""

    shard: int
    epoch: int
    log_id: str


class LedgerWriter:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def book(
        self,
        lease: Lease,
        records: Sequence[Record],
        next_offset: int,
        marks: Marks,
        recorded_at: datetime,
        bury: Callable[[Sequence[DeadLetter]], Awaitable[None]],
    ) -> Booked:
        """Book `records` (ascending offsets of one partition) and commit; dead letters go through `bury` first.

        `next_offset` is where the caller believes the ledger to be. Raises Fenced; OffsetMoved;
        sqlalchemy.exc.DBAPIError or OSError when the database is not there (nothing happened).
        """
        batch = Batch(lease.shard, records, marks, recorded_at)
        async with self._engine.begin() as connection:
            await _move_offset(connection, lease, next_offset, records[-1].offset + 1)
            outcome = batch.book(await _known(connection, batch))
            await _write(connection, lease.shard, outcome)
            if outcome.dead_letters:
                await bury(outcome.dead_letters)
        return outcome


async def _known(connection: AsyncConnection, batch: Batch) -> Known:
    """Read what the batch refers to."""
    entry = ledger_entry.c
    hashes = select(entry.event_id, entry.content_hash).where(_among(entry.event_id, batch.event_ids))
    content_hashes = {row.event_id: row.content_hash for row in await connection.execute(hashes)}
    portfolios, shards = {}, {}
    for row in await connection.execute(select(portfolio).where(_among(portfolio.c.id, batch.portfolio_ids))):
        portfolios[row.id], shards[row.id] = portfolio_of(row), row.shard
    symbols = batch.symbols
    if not symbols:
        return Known(content_hashes, portfolios, shards, frozenset())
    of_batch = _among(position.c.portfolio_id, batch.portfolio_ids), _among(position.c.symbol, symbols)
    for row in await connection.execute(select(position).where(*of_batch)):
        portfolios[row.portfolio_id].positions[row.symbol] = position_of(row)
    classified = await connection.execute(select(asset.c.symbol).where(_among(asset.c.symbol, symbols)))
    return Known(content_hashes, portfolios, shards, frozenset(row.symbol for row in classified))


def _among(column: ColumnElement[str], values: set[str]) -> ColumnElement[bool]:
    """column = ANY(array): one prepared statement whatever the number of values."""
    return column == any_(literal(sorted(values), ARRAY(Text)))


async def _move_offset(connection: AsyncConnection, lease: Lease, from_offset: int, to_offset: int) -> None:
    mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch) & (shard.c.log_id == lease.log_id)
    at = await connection.scalar(select(shard.c.next_offset).where(mine).with_for_update())
    if at is None:
        raise Fenced(f"shard {lease.shard} has left epoch {lease.epoch}")
    if at != from_offset:
        raise OffsetMoved(f"shard {lease.shard} is at offset {at}, not {from_offset}")
    await connection.execute(update(shard).where(mine).values(next_offset=to_offset))


async def _write(connection: AsyncConnection, shard_id: int, outcome: Booked) -> None:
    if not outcome.entries:
        return
    if outcome.unclassified:
        rows = [
            {"symbol": s, "name": s, "asset_class": UNCLASSIFIED, "sector": UNCLASSIFIED, "industry": ""}
            for s in sorted(outcome.unclassified)
        ]
        await connection.execute(insert(asset).on_conflict_do_nothing(), rows)
    if outcome.opened:
        await connection.execute(insert(portfolio), [_opened_row(shard_id, e) for e in outcome.opened.values()])
    await connection.execute(insert(ledger_entry), [entry_row(entry) for entry in outcome.entries])
    await _write_portfolios(connection, [outcome.portfolios[name] for name in outcome.touched])
    await _write_positions(connection, outcome)


async def _write_portfolios(connection: AsyncConnection, changed: list[Portfolio]) -> None:
    statement = update(portfolio).where(portfolio.c.id == bindparam("of"))
    figures = ("cash", "realized", "fees", "income", "flows", "ledger_sequence")
    rows = [
        {"of": held.portfolio_id, **{f"new_{name}": _column_value(held, name) for name in figures}}
        for held in sorted(changed, key=lambda held: held.portfolio_id)
    ]
    await connection.execute(statement.values({name: bindparam(f"new_{name}") for name in figures}), rows)


async def _write_positions(connection: AsyncConnection, outcome: Booked) -> None:
    opened, closed = [], []
    for portfolio_id, symbols in sorted(outcome.touched.items()):
        for symbol in sorted(symbols):
            held = outcome.portfolios[portfolio_id].positions.get(symbol)
            key = {"portfolio_id": portfolio_id, "symbol": symbol}
            if held is None:
                closed.append({"of": portfolio_id, "in": symbol})
            else:
                opened.append(key | position_row(held))
    if opened:
        statement = insert(position)
        changed = {name: statement.excluded[name] for name in ("quantity", "cost", "realized", "opened_at")}
        key_columns = ["portfolio_id", "symbol"]
        await connection.execute(statement.on_conflict_do_update(index_elements=key_columns, set_=changed), opened)
    if closed:
        flat = (position.c.portfolio_id == bindparam("of")) & (position.c.symbol == bindparam("in"))
        await connection.execute(delete(position).where(flat), closed)


def _column_value(held: Portfolio, name: str) -> Any:
    figure = getattr(held, name)
    return figure if name == "ledger_sequence" else from_micro(figure)


def _opened_row(shard_id: int, event: OpenEvent) -> dict[str, Any]:
    zero = Decimal(0)
    return {
        "id": event.portfolio_id,
        "shard": shard_id,
        "owner": event.owner,
        "name": event.name,
        "base_currency": event.base_currency,
        "day_cut": event.day_cut,
        "opened_at": event.opened_at,
        "ledger_sequence": 0,
        **dict.fromkeys(("cash", "realized", "fees", "income", "flows"), zero),
    }


def position_row(held: Position) -> dict[str, Any]:
    return {
        "quantity": held.quantity,
        "cost": from_micro(held.cost),
        "realized": from_micro(held.realized),
        "opened_at": held.opened_at,
    }


def entry_row(entry: LedgerEntry) -> dict[str, Any]:
    """An entry as the columns of `ledger_entry`."""
    money = ("amount", "fee", "realized", "cash_after")
    row: dict[str, Any] = {name: getattr(entry, name) for name in LedgerEntry.__slots__}
    row |= {name: from_micro(getattr(entry, name)) for name in money}
    row["nav_before"] = None if entry.nav_before is None else from_micro(entry.nav_before)
    row["kind"] = entry.kind.value
    row["side"] = entry.side.value if entry.side else None
    return row


def entry_of(row: Any) -> LedgerEntry:
    """A `ledger_entry` row as an entry: the inverse of `entry_row`."""
    fields = {name: getattr(row, name) for name in LedgerEntry.__slots__}
    for name in ("amount", "fee", "realized", "cash_after", "nav_before"):
        fields[name] = None if fields[name] is None else to_micro(fields[name])
    fields["kind"] = LedgerKind(row.kind)
    fields["side"] = Side(row.side) if row.side else None
    return LedgerEntry(**fields)


def portfolio_of(row: Any) -> Portfolio:
    """A `portfolio` row as folded state, without positions."""
    figures = (to_micro(getattr(row, name)) for name in ("cash", "realized", "fees", "income", "flows"))
    cash, realized, fees, income, flows = figures
    return Portfolio(row.id, row.base_currency, cash, realized, fees, income, flows, row.ledger_sequence)


def position_of(row: Any) -> Position:
    return Position(row.quantity.normalize(), to_micro(row.cost), to_micro(row.realized), row.opened_at)
