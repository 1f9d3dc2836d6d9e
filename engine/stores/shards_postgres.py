"""Ownership of shards (leases, epochs, offsets) and what a new owner reads to go on.

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
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from engine.amounts import from_micro, to_micro
from engine.book import Account, Holding
from engine.ledger import EXTERNAL_FLOWS, LedgerKind
from engine.pnl import day_base_since
from engine.stores.ledger_postgres import Fenced, Lease
from engine.stores.tables import day_baseline, evaluator, ledger_entry, portfolio, position, shard


class ShardCountChanged(Exception):
    """The topic's partitions are not those that the ledger was built with; portfolios would change shards."""


@dataclass(frozen=True, slots=True)
class Tenure:
    """One renewal: shards still owned, shards just claimed, and how many to give back."""

    kept: frozenset[int]
    claimed: Sequence[Lease]
    surplus: int


@dataclass(frozen=True, slots=True)
class LoadedPortfolio:
    """A portfolio as the Book takes it in, and the day bases of positions closed since the cut."""

    portfolio_id: str
    account: Account
    holdings: Sequence[Holding]
    realized: dict[str, int]
    opened_at: dict[str, datetime]
    closed_day_bases: dict[str, int]


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """A shard as its owner takes it up. `cut_at` is the last day cut whose baselines are stored."""

    next_offset: int
    cut_at: datetime | None
    portfolios: Sequence[LoadedPortfolio]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a portfolio was worth at a cut; micro-units."""

    portfolio_id: str
    nav: int
    ledger_sequence: int
    values: dict[str, int]


@dataclass(slots=True)
class _Today:
    """Of one portfolio since the cut: its flows (NAV before, amount) and signed notionals per symbol."""

    flows: list[tuple[int, int]] = field(default_factory=list)
    traded: dict[str, int] = field(default_factory=dict)


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

    async def load(self, lease: Lease, cut_at: datetime) -> LoadedShard:
        """All of a shard at one instant; day bases count from `cut_at` when its baselines are stored.

        Raises Fenced when the shard has left the lease's epoch.
        """
        async with self._engine.connect() as connection:
            await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch)
            row = (await connection.execute(select(shard).where(mine))).one_or_none()
            if row is None:
                raise Fenced(f"shard {lease.shard} has left epoch {lease.epoch}")
            of_shard = portfolio.c.shard == lease.shard
            accounts = (await connection.execute(select(portfolio).where(of_shard))).all()
            held: dict[str, list[Any]] = {row.id: [] for row in accounts}
            for of in await connection.execute(select(position).join(portfolio).where(of_shard)):
                held[of.portfolio_id].append(of)
            known_cut = row.cut_at if row.cut_at == cut_at else None
            baselines = await _baselines(connection, lease.shard, known_cut)
            today = await _since(connection, lease.shard, known_cut)
        portfolios = [_loaded(of, held[of.id], baselines.get(of.id), today.get(of.id, _Today())) for of in accounts]
        return LoadedShard(row.next_offset, row.cut_at, portfolios)

    async def store_cut(self, lease: Lease, cut_at: datetime, baselines: Sequence[Baseline]) -> None:
        """Keep a cut's baselines, once. Raises Fenced."""
        rows = [
            {
                "portfolio_id": base.portfolio_id,
                "cut_at": cut_at,
                "nav": from_micro(base.nav),
                "ledger_sequence": base.ledger_sequence,
                "symbols": list(base.values),
                "position_values": [from_micro(value) for value in base.values.values()],
            }
            for base in baselines
        ]
        async with self._engine.begin() as connection:
            mine = (shard.c.id == lease.shard) & (shard.c.epoch == lease.epoch)
            moved = await connection.execute(update(shard).where(mine).values(cut_at=cut_at))
            if not moved.rowcount:
                raise Fenced(f"shard {lease.shard} has left epoch {lease.epoch}")
            if rows:
                await connection.execute(insert(day_baseline).on_conflict_do_nothing(), rows)


async def _baselines(connection: AsyncConnection, shard_id: int, cut_at: datetime | None) -> dict[str, Baseline]:
    if cut_at is None:
        return {}
    statement = (
        select(day_baseline).join(portfolio).where(portfolio.c.shard == shard_id, day_baseline.c.cut_at == cut_at)
    )
    return {row.portfolio_id: _baseline(row) for row in await connection.execute(statement)}


def _baseline(row: Any) -> Baseline:
    values = dict(zip(row.symbols, map(to_micro, row.position_values), strict=True))
    return Baseline(row.portfolio_id, to_micro(row.nav), row.ledger_sequence, values)


async def _since(connection: AsyncConnection, shard_id: int, cut_at: datetime | None) -> dict[str, _Today]:
    """What the ledger says since the cut: entries beyond the baseline's sequence, all of them without one."""
    if cut_at is None:
        return {}
    entry, base = ledger_entry.c, day_baseline.c
    same_cut = (base.portfolio_id == entry.portfolio_id) & (base.cut_at == cut_at)
    statement = (
        select(entry.portfolio_id, entry.kind, entry.symbol, entry.amount, entry.nav_before)
        .select_from(ledger_entry.join(portfolio).outerjoin(day_baseline, same_cut))
        .where(portfolio.c.shard == shard_id, entry.sequence > func.coalesce(base.ledger_sequence, 0))
        .order_by(entry.portfolio_id, entry.sequence)
    )
    today: dict[str, _Today] = {}
    for row in await connection.execute(statement):
        seen = today.setdefault(row.portfolio_id, _Today())
        amount = to_micro(row.amount)
        if row.kind == LedgerKind.FILL:
            seen.traded[row.symbol] = seen.traded.get(row.symbol, 0) - amount
        elif LedgerKind(row.kind) in EXTERNAL_FLOWS:
            seen.flows.append((to_micro(row.nav_before or Decimal(0)), amount))
    return today


def _loaded(row: Any, held: list[Any], baseline: Baseline | None, today: _Today) -> LoadedPortfolio:
    values = baseline.values if baseline else {}
    bases = {s: values.get(s, 0) + today.traded.get(s, 0) for s in values.keys() | today.traded.keys()}
    day = day_base_since(baseline.nav if baseline else 0, today.flows)
    account = Account(to_micro(row.cash), to_micro(row.realized), to_micro(row.fees), row.ledger_sequence, day)
    holdings = [Holding(of.symbol, of.quantity.normalize(), to_micro(of.cost), bases.pop(of.symbol, 0)) for of in held]
    return LoadedPortfolio(
        row.id,
        account,
        holdings,
        {of.symbol: to_micro(of.realized) for of in held},
        {of.symbol: of.opened_at for of in held},
        bases,
    )


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
