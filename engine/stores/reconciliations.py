"""What the reconciler found, and the repairs that it asked for, in PostgreSQL.

A repair takes a shard from its owner: the row loses its `owner` and keeps everything else, so whoever claims it next
(the former owner, at its next renewal, as well as any other) does so under the next epoch, loads it from the permanent
record and publishes all of it anew. The lease's end stays as it is: the shard is kept all the while, and its former
owner may book until it notices. A shard is not repaired again while a repair is open, nor within `interval_s` of the
last one's beginning. Instants of repairs are the database's: they are about this system, not about its market.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from engine.amounts import from_micro, to_micro
from engine.corporate_actions import Split
from engine.ledger import LedgerKind
from engine.reconciliation import Finding, ReconciliationStatus, Record
from engine.stores.ledger_rows import portfolio_of, position_of, read_scale
from engine.stores.tables import (
    corporate_action,
    portfolio,
    position,
    receivable,
    reconciliation,
    repair,
    shard,
    shard_action,
)


@dataclass(frozen=True, slots=True)
class ShardTenure:
    """A shard's epoch, and whether somebody's lease of it holds."""

    epoch: int
    is_owned: bool


@dataclass(frozen=True, slots=True)
class Records:
    """The permanent record of some portfolios at one instant; `splits` are by shard and symbol."""

    shard_of: Mapping[str, int]
    portfolios: Mapping[str, Record]
    splits: Mapping[int, Mapping[str, Sequence[Split]]]
    tenures: Mapping[int, ShardTenure]


@dataclass(frozen=True, slots=True)
class OpenRepair:
    repair_id: int
    shard: int
    from_epoch: int
    portfolios: Sequence[str]


class Reconciliations:
    """Raises sqlalchemy.exc.DBAPIError or OSError when the database is not there."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def portfolios(self) -> list[str]:
        """All portfolios, never checked ones first, then those whose check is longest ago."""
        checked = portfolio.outerjoin(reconciliation, reconciliation.c.portfolio_id == portfolio.c.id)
        statement = select(portfolio.c.id).select_from(checked)
        async with self._engine.connect() as connection:
            ordered = statement.order_by(reconciliation.c.checked_at.nulls_first(), portfolio.c.id)
            return list(await connection.scalars(ordered))

    async def records(self, names: Sequence[str]) -> Records:
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            rows = (await connection.execute(select(portfolio).where(portfolio.c.id.in_(names)))).all()
            found = {row.id: portfolio_of(row) for row in rows}
            shards = {row.id: row.shard for row in rows}
            held = await connection.execute(select(position).where(position.c.portfolio_id.in_(names)))
            for row in held:
                found[row.portfolio_id].positions[row.symbol] = position_of(row)
            owed = await _receivables(connection, names)
            symbols = {symbol for of in found.values() for symbol in of.positions}
            splits = await _splits(connection, set(shards.values()), symbols)
            is_owned = func.coalesce(shard.c.owner.is_not(None) & (shard.c.lease_until > func.now()), False)
            tenures = await connection.execute(
                select(shard.c.id, shard.c.epoch, is_owned).where(shard.c.id.in_(set(shards.values())))
            )
            return Records(
                shards,
                {name: Record(of, owed.get(name, 0)) for name, of in found.items()},
                splits,
                {number: ShardTenure(epoch, owned) for number, epoch, owned in tenures},
            )

    async def write(
        self, findings: Sequence[Finding], statuses: Sequence[ReconciliationStatus], checked_at: datetime
    ) -> None:
        """Keep what a step found, in place of what was found before."""
        rows = [
            {
                "portfolio_id": finding.portfolio_id,
                "checked_at": checked_at,
                "epoch": finding.epoch,
                "sequence": finding.sequence,
                "ledger_sequence": finding.ledger_sequence,
                "drift_abs": from_micro(finding.drift),
                "status": status.value,
                "figures": finding.figures,
            }
            for finding, status in zip(findings, statuses, strict=True)
        ]
        if not rows:
            return
        statement = insert(reconciliation)
        changed = {name: statement.excluded[name] for name in rows[0] if name != "portfolio_id"}
        async with self._engine.begin() as connection:
            # In order of the key, so that two reconcilers never wait for each other.
            rows.sort(key=lambda row: str(row["portfolio_id"]))
            await connection.execute(
                statement.on_conflict_do_update(index_elements=["portfolio_id"], set_=changed), rows
            )

    async def ask_repair(
        self, shard_id: int, epoch: int, portfolios: Iterable[str], figures: Iterable[str], interval_s: int
    ) -> int | None:
        """Let a shard be published anew; None when it has left `epoch` or had its repair."""
        values = {
            "shard": shard_id,
            "epoch": epoch,
            "portfolios": sorted(portfolios),
            "figures": sorted(figures),
            "interval_s": interval_s,
        }
        async with self._engine.begin() as connection:
            asked: int | None = await connection.scalar(_ASK_REPAIR, values)
            return asked

    async def open_repairs(self) -> list[OpenRepair]:
        """The repairs that nobody has finished, oldest first."""
        columns = repair.c.id, repair.c.shard, repair.c.from_epoch, repair.c.portfolios
        statement = select(*columns).where(repair.c.done_at.is_(None)).order_by(repair.c.id)
        async with self._engine.connect() as connection:
            return [OpenRepair(*row) for row in await connection.execute(statement)]

    async def finish_repair(self, repair_id: int, to_epoch: int) -> None:
        """The shard has been published under `to_epoch`."""
        unfinished = (repair.c.id == repair_id) & repair.c.done_at.is_(None)
        async with self._engine.begin() as connection:
            await connection.execute(
                repair.update().where(unfinished).values(to_epoch=to_epoch, done_at=func.clock_timestamp())
            )


async def _receivables(connection: AsyncConnection, names: Sequence[str]) -> dict[str, int]:
    owed = select(receivable.c.portfolio_id, func.sum(receivable.c.amount)).group_by(receivable.c.portfolio_id)
    rows = await connection.execute(owed.where(receivable.c.portfolio_id.in_(names)))
    return {name: to_micro(amount) for name, amount in rows}


async def _splits(
    connection: AsyncConnection, shards: set[int], symbols: set[str]
) -> dict[int, dict[str, list[Split]]]:
    """The splits of `symbols` that are in the ledgers of `shards`, as they took effect."""
    taken = shard_action.join(corporate_action)
    columns = (
        shard_action.c.shard,
        corporate_action.c.symbol,
        corporate_action.c.effective_at,
        corporate_action.c.terms,
    )
    statement = (
        select(*columns)
        .select_from(taken)
        .where(corporate_action.c.symbol.in_(symbols), corporate_action.c.kind == "SPLIT")
        .where(shard_action.c.step == LedgerKind.SPLIT.value, shard_action.c.shard.in_(shards))
        .order_by(corporate_action.c.effective_at, corporate_action.c.arrival)
    )
    found: dict[int, dict[str, list[Split]]] = {number: {} for number in shards}
    for number, symbol, effective_at, terms in await connection.execute(statement):
        scale: Any = read_scale(terms)
        found[number].setdefault(symbol, []).append(Split(effective_at, scale))
    return found


_ASK_REPAIR = text(
    "WITH taken AS (UPDATE shard SET owner = NULL WHERE id = :shard AND epoch = :epoch AND owner IS NOT NULL "
    "AND NOT EXISTS (SELECT FROM repair WHERE repair.shard = :shard AND (done_at IS NULL "
    "OR asked_at > now() - :interval_s * interval '1 second')) RETURNING epoch) "
    "INSERT INTO repair (shard, asked_at, portfolios, figures, from_epoch) "
    "SELECT CAST(:shard AS integer), now(), CAST(:portfolios AS text[]), CAST(:figures AS text[]), epoch FROM taken "
    "RETURNING id"
)
