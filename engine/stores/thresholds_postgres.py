"""Thresholds in PostgreSQL: what subjects have, what evaluators watch, and what came of it.

An evaluator writes a crossing, the threshold's new state and the message in the outbox in one transaction that asserts
its lease (`write_crossings`). PostgreSQL's `armed` decides: a crossing of a threshold that is not armed there changes
nothing, so that the same one is told once, whoever sees it and however often it is written.

`arrival` numbers creations and deletions in the order in which they commit (they wait for each other), so that
whoever has seen one has seen all before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from typing import Any

import asyncpg
import uuid_utils
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.instants import to_datetime
from engine.stores.ledger_postgres import Fenced, Lease
from engine.stores.ledger_reads import PoolSource
from engine.stores.ledger_rows import driver_of
from engine.stores.tables import shard
from engine.thresholds import (
    Crossing,
    Threshold,
    ThresholdFigure,
    ThresholdSide,
    encode_threshold_message,
    message_of,
)

ARRIVAL_LOCK = 7_210_514_241  # any constant that no other program on the database uses

_COLUMNS = "id, portfolio_id, figure, side, bound, hysteresis, armed"
_SHOWN = f"{_COLUMNS}, crossings_count, crossed_at, created_at"
_LOCK = f"SELECT pg_advisory_xact_lock({ARRIVAL_LOCK})"
_NEXT = "(SELECT coalesce(max(arrival), 0) + 1 FROM threshold)"
_COUNT = "SELECT count(*) FROM threshold WHERE portfolio_id = $1 AND deleted_at IS NULL"
_CREATE = f"""
    INSERT INTO threshold (id, portfolio_id, figure, side, bound, hysteresis, arrival)
    VALUES ($1, $2, $3, $4, $5, $6, {_NEXT}) RETURNING {_SHOWN}
"""  # noqa: S608 -- constants of this module only
_DELETE = f"""
    UPDATE threshold SET deleted_at = now(), arrival = {_NEXT} FROM portfolio
    WHERE threshold.id = $1 AND deleted_at IS NULL AND portfolio.id = portfolio_id AND portfolio.owner = $2
    RETURNING threshold.id
"""  # noqa: S608
_OF_PORTFOLIO = f"SELECT {_SHOWN} FROM threshold WHERE portfolio_id = $1 AND deleted_at IS NULL ORDER BY id"  # noqa: S608
_ARRIVED = """
    SELECT DISTINCT portfolio.shard FROM threshold JOIN portfolio ON portfolio.id = portfolio_id WHERE arrival > $1
"""
_NEWEST = "SELECT coalesce(max(arrival), 0) FROM threshold"
_OF_SHARD = f"""
    SELECT threshold.id, {_COLUMNS.partition(", ")[2]} FROM threshold JOIN portfolio ON portfolio.id = portfolio_id
    WHERE portfolio.shard = $1 AND deleted_at IS NULL
"""  # noqa: S608
_FIRE = """
    UPDATE threshold SET armed = false, crossings_count = crossings_count + 1, crossed_at = crossing.at
    FROM unnest($1::text[], $2::timestamptz[]) AS crossing (id, at)
    WHERE threshold.id = crossing.id AND armed AND deleted_at IS NULL RETURNING threshold.id, crossings_count
"""
_ARM = "UPDATE threshold SET armed = true WHERE id = ANY($1::text[])"
_OUTBOX = """
    INSERT INTO outbox (event_id, topic, key, payload)
    SELECT event_id, $1, key, payload FROM unnest($2::text[], $3::text[], $4::bytea[]) AS one (event_id, key, payload)
    ON CONFLICT (event_id) DO NOTHING
"""
_NOTIFY = "SELECT pg_notify('outbox', '')"


class TooManyThresholds(Exception):
    """The portfolio has as many thresholds as the settings allow."""


@dataclass(frozen=True, slots=True)
class ShownThreshold:
    threshold: Threshold
    crossings_count: int
    crossed_at: datetime | None
    created_at: datetime


class PortfolioThresholds:
    """Thresholds as the API shows and changes them.

    Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away.
    """

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool

    async def create(
        self,
        portfolio_id: str,
        figure: ThresholdFigure,
        side: ThresholdSide,
        bound: Decimal,
        hysteresis: Decimal,
        count_max: int,
    ) -> ShownThreshold:
        """Watch for a bound from now on. Raises TooManyThresholds."""
        async with self._pool().acquire() as connection, connection.transaction():
            await connection.execute(_LOCK)
            if await connection.fetchval(_COUNT, portfolio_id) >= count_max:
                raise TooManyThresholds
            name = str(uuid_utils.uuid7())
            values = name, portfolio_id, figure.value, side.value, bound, hysteresis
            row = await connection.fetchrow(_CREATE, *values)
        assert row is not None, "what was inserted is returned"
        return _shown(row)

    async def delete(self, owner: str, threshold_id: str) -> bool:
        """Watch for it no more; False when the owner has none such."""
        async with self._pool().acquire() as connection, connection.transaction():
            await connection.execute(_LOCK)
            return await connection.fetchval(_DELETE, threshold_id, owner) is not None

    async def list(self, portfolio_id: str) -> Sequence[ShownThreshold]:
        """All of a portfolio's, oldest first."""
        return [_shown(row) for row in await self._pool().fetch(_OF_PORTFOLIO, portfolio_id)]


class WatchedThresholds:
    """Thresholds as an evaluator watches them. Raises AWAY errors of the ledger when PostgreSQL is away."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def arrived(self, after: int) -> tuple[int, frozenset[int]]:
        """The newest arrival, and the shards in which something arrived after `after`."""
        async with self._engine.connect() as connection:
            await connection.execute(select(1))
            driver = await driver_of(connection)
            newest = await driver.fetchval(_NEWEST)
            # What commits in between is of these shards' next time too, which does no harm.
            shards = await driver.fetch(_ARRIVED, after) if newest > after else []
        return newest, frozenset(row[0] for row in shards)

    async def of_shard(self, shard_id: int) -> list[Threshold]:
        async with self._engine.connect() as connection:
            await connection.execute(select(1))
            return [_threshold(row) for row in await (await driver_of(connection)).fetch(_OF_SHARD, shard_id)]

    async def write_crossings(self, lease: Lease, topic: str, crossings: Sequence[Crossing]) -> int:
        """Write what happened, in order; returns how many fired. Raises Fenced."""
        async with self._engine.begin() as connection:
            mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch)
            if await connection.scalar(select(shard.c.id).where(mine).with_for_update(read=True)) is None:
                raise Fenced(f"shard {lease.shard} has left epoch {lease.epoch}")
            driver, fired = await driver_of(connection), 0
            for is_fired, group in groupby(crossings, lambda crossing: crossing.fired):
                if is_fired:
                    fired += await _fire(driver, topic, group)
                else:
                    await driver.execute(_ARM, sorted({one.threshold.threshold_id for one in group}))
            if fired:
                await driver.execute(_NOTIFY)
        return fired


async def _fire(driver: asyncpg.Connection, topic: str, crossings: Iterable[Crossing]) -> int:
    # Within a group a threshold has not been armed again: the first one counts.
    named: dict[str, Crossing] = {}
    for crossing in crossings:
        named.setdefault(crossing.threshold.threshold_id, crossing)
    at = {name: to_datetime(crossing.as_of_ns) for name, crossing in named.items()}
    counted = await driver.fetch(_FIRE, list(at), list(at.values()))
    messages = [message_of(named[name], count, at[name]) for name, count in counted]
    if messages:
        columns = zip(
            *((one.event_id, one.portfolio_id, encode_threshold_message(one)) for one in messages), strict=True
        )
        await driver.execute(_OUTBOX, topic, *(list(column) for column in columns))
    return len(messages)


def _threshold(row: Sequence[Any] | asyncpg.Record) -> Threshold:
    name, portfolio_id, figure, side, bound, hysteresis, armed = row
    return Threshold(
        name,
        portfolio_id,
        ThresholdFigure(figure),
        ThresholdSide(side),
        bound.normalize(),
        hysteresis.normalize(),
        armed,
    )


def _shown(row: asyncpg.Record) -> ShownThreshold:
    *threshold, crossings_count, crossed_at, created_at = row
    return ShownThreshold(_threshold(threshold), crossings_count, crossed_at, created_at)
