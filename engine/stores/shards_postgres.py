"""Ownership of shards: leases, epochs, offsets; and the baselines of their day cuts.

A shard's row holds owner, lease end, epoch and next offset. An evaluator renews its leases every second, claims
free or expired ones up to its fair share and gives back what is over it. With `total` shards and `live`
evaluators:

    floor = total // live      ceiling = ⌈total / live⌉
    claim      while below floor; up to the ceiling once every evaluator has its floor
    give back  what is over the ceiling, and one over the floor while somebody is below it

so shares differ by at most one and nothing flaps. Leases are judged by the database's clock alone. Claiming
increments the epoch: whatever the former owner still sends is refused (`Fenced`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from engine.badges import Rule
from engine.baselines import Baseline
from engine.portfolio import Position
from engine.stores.ledger_postgres import Fenced, Lease
from engine.stores.ledger_rows import driver_of
from engine.stores.shard_loading import LastCut, LoadedShard, QuoteOf, load_shard
from engine.stores.tables import evaluator, portfolio, shard


class ShardCountChanged(Exception):
    """The topic's partitions are not those that the ledger was built with; portfolios would change shards."""


@dataclass(frozen=True, slots=True)
class Tenure:
    """One renewal: shards still owned, shards just claimed, and how many to give back."""

    kept: frozenset[int]
    claimed: Sequence[Lease]
    surplus: int


class Shards:
    def __init__(self, engine: AsyncEngine, owner: str, lease_duration_ms: int) -> None:
        self._engine = engine
        self.owner = owner
        self._lease = {"lease_ms": lease_duration_ms}

    async def ensure(self, count: int, log_id: str) -> None:
        """Make a row for each of the topic's partitions. Raises ShardCountChanged."""
        async with self._engine.begin() as connection:
            await connection.execute(text("LOCK TABLE shard IN SHARE ROW EXCLUSIVE MODE"))
            await connection.execute(text("DELETE FROM evaluator WHERE seen_at < now() - interval '1 hour'"))
            known = await connection.scalar(select(func.count()).select_from(shard))
            if known == count:
                return
            if await connection.scalar(select(func.count()).select_from(portfolio)):
                raise ShardCountChanged(
                    f"the topic has {count} partitions, the ledger was built with {known}; "
                    "use a topic with as many, or a new database"
                )
            # An empty ledger takes the shape of any topic; a shard too many would be owned and never read.
            await connection.execute(shard.delete().where(shard.c.id >= count))
            rows = [{"id": n, "log_id": log_id, "next_offset": 0, "epoch": 0} for n in range(count)]
            await connection.execute(insert(shard).on_conflict_do_nothing(), rows)

    async def renew(self, owned: Iterable[Lease], log_id: str) -> Tenure:
        """Renew, then claim or report a surplus. Raises DBAPIError, OSError when the database is not there."""
        mine = {lease.shard: lease.epoch for lease in owned}
        async with self._engine.begin() as connection:
            await connection.execute(_SEEN, {"owner": self.owner})
            kept = await connection.execute(
                _RENEW, {"owner": self.owner, "ids": list(mine), "epochs": list(mine.values())} | self._lease
            )
            still = frozenset(row.id for row in kept)
            counts = (await connection.execute(_COUNTS, {"owner": self.owner} | self._lease)).one()
            floor, over = divmod(counts.total, counts.live)
            ceiling = floor + bool(over)
            limit = ceiling if counts.fewest >= floor else floor
            claimed = await self._claim(connection, limit - len(still), log_id)
        return Tenure(still, claimed, max(0, len(still) - limit))

    async def _claim(self, connection: AsyncConnection, count: int, log_id: str) -> list[Lease]:
        if count <= 0:
            return []
        rows = await connection.execute(_CLAIM, {"owner": self.owner, "count": count, "log_id": log_id} | self._lease)
        return [Lease(row.id, row.epoch, log_id) for row in rows]

    async def release(self, lease: Lease) -> None:
        """Give a shard back; without effect when it is not ours any more."""
        mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch) & (shard.c.owner == self.owner)
        async with self._engine.begin() as connection:
            await connection.execute(update(shard).where(mine).values(owner=None, lease_until=None))

    async def leave(self) -> None:
        """Stop counting as an evaluator, so that the others' shares grow at once."""
        async with self._engine.begin() as connection:
            await connection.execute(evaluator.delete().where(evaluator.c.owner == self.owner))

    async def load(self, lease: Lease, last_cut: LastCut, quote_of: QuoteOf, rules: Sequence[Rule] = ()) -> LoadedShard:
        """All of a shard at one instant (engine.stores.shard_loading). Raises Fenced when it is not the lease's."""
        async with self._engine.connect() as connection:
            await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            # What is read becomes arrays between two statements, which takes long for a million portfolios.
            await connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch)
            # Not locked: renewals of the lease go on meanwhile, and a new owner's state is written under a new epoch.
            next_offset = await connection.scalar(select(shard.c.next_offset).where(mine))
            if next_offset is None:
                raise Fenced(f"shard {lease.shard} has left epoch {lease.epoch}")
            return await load_shard(connection, lease.shard, next_offset, last_cut, quote_of, rules)

    async def positions(self, portfolio_ids: Sequence[str]) -> dict[str, dict[str, Position]]:
        """The open positions of some portfolios, by symbol."""
        found: dict[str, dict[str, Position]] = {name: {} for name in portfolio_ids}
        async with self._engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            for row in await (await driver_of(connection)).fetch(_POSITIONS, list(portfolio_ids)):
                name, symbol, quantity, *rest = row
                found[name][symbol] = Position(quantity.normalize(), *rest)
        return found

    async def store_cut(self, lease: Lease, cut_at: datetime, baselines: Sequence[Baseline]) -> None:
        """Keep what portfolios were worth at a cut, each once. Raises Fenced."""
        rows = [
            (
                base.portfolio_id,
                cut_at,
                base.nav,
                base.ledger_sequence,
                list(base.values),
                list(base.values.values()),
                base.estimated,
            )
            for base in baselines
        ]
        async with self._engine.begin() as connection:
            mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch)
            if await connection.scalar(select(shard.c.id).where(mine).with_for_update(read=True)) is None:
                raise Fenced(f"shard {lease.shard} has left epoch {lease.epoch}")
            await (await driver_of(connection)).executemany(_STORE_CUT, rows)


_POSITIONS = """
    SELECT portfolio_id, symbol, quantity, (cost * 1000000)::bigint, (realized * 1000000)::bigint,
        (fees * 1000000)::bigint, opened_at, opened_sequence, held_since
    FROM position WHERE portfolio_id = ANY($1::text[])
"""
# Values cross as micro-units: PostgreSQL makes decimals of them at a fraction of what it costs here.
_STORE_CUT = """
    INSERT INTO day_baseline (portfolio_id, cut_at, nav, ledger_sequence, symbols, position_values, estimated)
    VALUES ($1, $2, $3::bigint * 0.000001, $4, $5,
        ARRAY(SELECT value * 0.000001 FROM unnest($6::bigint[]) WITH ORDINALITY AS of (value, place) ORDER BY place),
        $7)
    ON CONFLICT DO NOTHING
"""
_SEEN = text(
    "INSERT INTO evaluator (owner, seen_at) VALUES (:owner, now()) "
    "ON CONFLICT (owner) DO UPDATE SET seen_at = excluded.seen_at"
)
_RENEW = text(
    "UPDATE shard SET lease_until = now() + :lease_ms * interval '1 millisecond' "
    "FROM unnest(CAST(:ids AS integer[]), CAST(:epochs AS bigint[])) AS mine (id, epoch) "
    "WHERE shard.id = mine.id AND shard.epoch = mine.epoch AND shard.owner = :owner RETURNING shard.id"
)
# Evaluators not seen for a lease's length are dead; `fewest` is what the poorest living one owns.
_COUNTS = text(
    "WITH live AS (SELECT owner FROM evaluator WHERE seen_at > now() - :lease_ms * interval '1 millisecond' "
    "UNION SELECT :owner), "
    "owned AS (SELECT live.owner, count(shard.id) AS shards FROM live LEFT JOIN shard "
    "ON shard.owner = live.owner AND shard.lease_until > now() GROUP BY live.owner) "
    "SELECT (SELECT count(*) FROM shard) AS total, count(*) AS live, min(shards) AS fewest FROM owned"
)
_CLAIM = text(
    "UPDATE shard SET owner = :owner, epoch = epoch + 1, "
    "lease_until = now() + :lease_ms * interval '1 millisecond', "
    "next_offset = CASE WHEN log_id = :log_id THEN next_offset ELSE 0 END, log_id = :log_id "
    "WHERE id IN (SELECT id FROM shard WHERE owner IS NULL OR lease_until < now() "
    "ORDER BY id LIMIT :count FOR UPDATE SKIP LOCKED) "
    "RETURNING id, epoch"
)
