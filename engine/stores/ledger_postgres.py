"""The ledger in PostgreSQL, written by the one evaluator that owns a shard.

`book` is the only way in: one transaction takes a batch of Kafka records and

    1. moves the shard's offset, asserting its epoch             a zombie's transaction ends here (Fenced)
    2. reads what the records refer to                           entries with their ids, portfolios, positions
    3. books them (engine.booking), in the log's order
    4. writes entries, positions, portfolios, unheard-of assets  all or nothing
    5. writes what follows from them (`Prover`)

so each event has its effect exactly once however often it is delivered. Dead letters are handed to the caller,
who produces them before the transaction commits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

import asyncpg
from sqlalchemy import ARRAY, ColumnElement, Text, any_, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from engine.assets import UNCLASSIFIED
from engine.booking import AppliedSplit, Batch, Booked, DeadLetter, Known, Marks, Record, Watch
from engine.stores.ledger_rows import (
    driver_of,
    entry_of,
    opened_row,
    portfolio_of,
    position_of,
    write_closed,
    write_entries,
    write_portfolios,
    write_positions,
)
from engine.stores.tables import asset, asset_version, ledger_entry, portfolio, position, shard


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


class Prover(Watch, Protocol):
    """Follows a batch as it is booked, and then writes what it proves in the same transaction."""

    async def write(self, driver: asyncpg.Connection) -> None: ...


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
        splits: Mapping[str, Sequence[AppliedSplit]],
        prover: Prover | None = None,
    ) -> Booked:
        """Book `records` (ascending offsets of one partition) and commit; dead letters go through `bury` first.

        `next_offset` is where the caller believes the ledger to be, `splits` those that the shard has, by symbol.
        Raises Fenced; OffsetMoved; sqlalchemy.exc.DBAPIError, asyncpg.PostgresError or OSError when the database is
        not there (nothing happened).
        """
        batch = Batch(lease.shard, records, marks, recorded_at, prover)
        async with self._engine.begin() as connection:
            await _move_offset(connection, lease, next_offset, records[-1].offset + 1)
            outcome = batch.book(await _known(connection, batch, splits))
            await write_booked(connection, lease.shard, outcome)
            if prover is not None:
                await prover.write(await driver_of(connection))
            if outcome.dead_letters:
                await bury(outcome.dead_letters)
        return outcome


async def _known(connection: AsyncConnection, batch: Batch, splits: Mapping[str, Sequence[AppliedSplit]]) -> Known:
    """Read what the batch refers to."""
    entry = ledger_entry.c
    hashes = select(entry.event_id, entry.content_hash).where(_among(entry.event_id, batch.event_ids))
    content_hashes = {row.event_id: row.content_hash for row in await connection.execute(hashes)}
    portfolios, shards = {}, {}
    for row in await connection.execute(select(portfolio).where(_among(portfolio.c.id, batch.portfolio_ids))):
        portfolios[row.id], shards[row.id] = portfolio_of(row), row.shard
    originals, reversed_ids = {}, frozenset[str]()
    if batch.reverses:
        named = select(ledger_entry).where(_among(entry.event_id, batch.reverses))
        originals = {row.event_id: entry_of(row) for row in await connection.execute(named)}
        reversals = select(entry.reverses).where(_among(entry.reverses, batch.reverses))
        reversed_ids = frozenset(await connection.scalars(reversals))
    known = Known(content_hashes, portfolios, shards, frozenset(), originals, reversed_ids, splits)
    symbols = batch.symbols(originals.values())
    if not symbols:
        return known
    of_batch = _among(position.c.portfolio_id, batch.portfolio_ids), _among(position.c.symbol, symbols)
    for row in await connection.execute(select(position).where(*of_batch)):
        portfolios[row.portfolio_id].positions[row.symbol] = position_of(row)
    classified = await connection.execute(select(asset.c.symbol).where(_among(asset.c.symbol, symbols)))
    return replace(known, classified=frozenset(row.symbol for row in classified))


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


async def assert_epoch(connection: AsyncConnection, lease: Lease) -> None:
    """Hold the shard until the transaction ends. Raises Fenced when it is not the lease's any more."""
    mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch)
    if await connection.scalar(select(shard.c.id).where(mine).with_for_update()) is None:
        raise Fenced(f"shard {lease.shard} has left epoch {lease.epoch}")


async def write_booked(connection: AsyncConnection, shard_id: int, outcome: Booked) -> None:
    """Write entries and the states they lead to, in the transaction that `connection` has begun."""
    if not outcome.entries:
        return
    if outcome.unclassified:
        rows = [
            {"symbol": s, "name": s, "asset_class": UNCLASSIFIED, "sector": UNCLASSIFIED, "industry": ""}
            for s in sorted(outcome.unclassified)
        ]
        statement = insert(asset).on_conflict_do_nothing().returning(asset.c.symbol)
        created = {row.symbol for row in await connection.execute(statement, rows)}
        always = {"version": 1, "effective_at": datetime.fromtimestamp(0, UTC)}
        versions = [row | always for row in rows if row["symbol"] in created]
        if versions:
            await connection.execute(insert(asset_version), versions)
    if outcome.opened:
        await connection.execute(insert(portfolio), [opened_row(shard_id, e) for e in outcome.opened.values()])
    driver = await driver_of(connection)
    await write_entries(driver, outcome.entries)
    await write_portfolios(driver, [outcome.portfolios[name] for name in outcome.touched])
    await write_positions(driver, outcome.portfolios, outcome.touched)
    await write_closed(driver, outcome.closed)
