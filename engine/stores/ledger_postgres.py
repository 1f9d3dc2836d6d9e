"""The ledger in PostgreSQL, written by the one evaluator that owns a shard.

`book` is the only way in: one transaction takes a batch of Kafka records and

    1. moves the shard's offset, asserting its epoch             a zombie's transaction ends here (Fenced)
    2. reads what the records refer to                           entries with their ids, portfolios, positions
    3. books them (engine.booking), each portfolio's in the log's order, in steps between which others have their turn
    4. writes entries, positions, portfolios, unheard-of assets  all or nothing
    5. writes what follows from them (`Prover`)

so each event has its effect exactly once however often it is delivered. Dead letters are handed to the caller,
who produces them before the transaction commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import asyncpg
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from engine.assets import UNCLASSIFIED
from engine.booking import AppliedSplit, Batch, Booked, DeadLetter, Known, Marks, Record, Watch
from engine.stores.ledger_reads import ENTRY_COLUMNS, read_entry
from engine.stores.ledger_rows import (
    driver_of,
    opened_row,
    read_portfolios,
    read_positions,
    write_closed,
    write_entries,
    write_portfolios,
    write_positions,
)
from engine.stores.tables import asset, asset_version, portfolio, shard

_HASHES = "SELECT event_id, content_hash FROM ledger_entry WHERE event_id = ANY($1::text[])"
_ORIGINALS = f"SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE event_id = ANY($1::text[])"  # noqa: S608
_REVERSED = "SELECT reverses FROM ledger_entry WHERE reverses = ANY($1::text[])"
_CLASSIFIED = "SELECT symbol FROM asset WHERE symbol = ANY($1::text[])"


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
            for _ in batch.steps(await _known(await driver_of(connection), batch, splits)):
                await asyncio.sleep(0)
            outcome = batch.outcome
            await write_booked(connection, lease.shard, outcome)
            if prover is not None:
                await prover.write(await driver_of(connection))
            if outcome.dead_letters:
                await bury(outcome.dead_letters)
        return outcome


async def _known(driver: asyncpg.Connection, batch: Batch, splits: Mapping[str, Sequence[AppliedSplit]]) -> Known:
    """Read what the batch refers to."""
    content_hashes = dict(map(tuple, await driver.fetch(_HASHES, sorted(batch.event_ids))))
    portfolios, shards = await read_portfolios(driver, batch.portfolio_ids)
    originals, reversed_ids = {}, frozenset[str]()
    if batch.reverses:
        named = sorted(batch.reverses)
        originals = {row["event_id"]: read_entry(row) for row in await driver.fetch(_ORIGINALS, named)}
        reversed_ids = frozenset(row[0] for row in await driver.fetch(_REVERSED, named))
    touched = batch.positions(originals)
    await read_positions(driver, portfolios, touched)
    symbols = sorted({symbol for _, symbol in touched})
    classified = frozenset(row[0] for row in await driver.fetch(_CLASSIFIED, symbols)) if symbols else frozenset()
    return Known(content_hashes, portfolios, shards, classified, originals, reversed_ids, splits)


async def _move_offset(connection: AsyncConnection, lease: Lease, from_offset: int, to_offset: int) -> None:
    mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch) & (shard.c.log_id == lease.log_id)
    expected = mine & (shard.c.next_offset == from_offset)
    moved = await connection.execute(update(shard).where(expected).values(next_offset=to_offset))
    if moved.rowcount == 1:
        return
    at = await connection.scalar(select(shard.c.next_offset).where(mine))
    if at is None:
        raise Fenced(f"shard {lease.shard} has left epoch {lease.epoch}")
    raise OffsetMoved(f"shard {lease.shard} is at offset {at}, not {from_offset}")


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
