"""Corporate actions in PostgreSQL: what arrived, and which steps each shard has booked.

`corporate_action` is written by the owner of shard 0 alone, under its epoch and together with the offset that it read
up to, and read by every evaluator. A step of an action is booked once per shard: its row in `shard_action` and the
ledger entries of all holders are one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from math import prod
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from engine.amounts import from_micro, scale_number, to_micro
from engine.booking import AppliedSplit, Booked, DueStep, Holder, book_step
from engine.corporate_actions import (
    CorporateAction,
    DividendAction,
    Split,
    SplitAction,
    Step,
    action_hash,
    opens_at,
    parse_scale,
    scale_since,
)
from engine.instants import to_ns
from engine.ledger import LedgerEntry, LedgerKind, write_scale
from engine.portfolio import Portfolio
from engine.stores.ledger_postgres import Lease, Prover, assert_epoch, write_booked
from engine.stores.ledger_rows import driver_of, portfolio_of, position_of, read_scale
from engine.stores.tables import corporate_action, portfolio, position, receivable, shard_action, topic_offset

_ZERO = Decimal(0)
_ORDER = (LedgerKind.SPLIT, LedgerKind.DIVIDEND_ACCRUED, LedgerKind.DIVIDEND_PAID)


@dataclass(frozen=True, slots=True)
class KnownAction:
    """An action as it was recorded, with its steps."""

    action_id: str
    arrival: int
    recorded_at: datetime
    content_hash: bytes
    steps: tuple[Step, ...]


def step_order(step: Step) -> tuple[datetime, int, int]:
    """Steps are booked in this order."""
    return step.at, step.arrival, _ORDER.index(step.kind)


class ActionsStore:
    """Raises Fenced; sqlalchemy.exc.DBAPIError, asyncpg.PostgresError or OSError when the database is not there."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def offsets(self, log_id: str) -> dict[int, int]:
        """Where to read on, by partition; those never read are missing."""
        statement = select(topic_offset.c.partition, topic_offset.c.next_offset).where(topic_offset.c.log_id == log_id)
        async with self._engine.connect() as connection:
            return {row.partition: row.next_offset for row in await connection.execute(statement)}

    async def record(
        self,
        lease: Lease,
        log_id: str,
        next_offsets: Mapping[int, int],
        actions: Sequence[CorporateAction],
        recorded_at: datetime,
    ) -> tuple[int, list[CorporateAction]]:
        """Keep new actions and the offsets behind them; how many were new, and those whose id has other content.

        `lease` is that of shard 0, whose owner alone records, so that arrivals are numbered as they commit.
        """
        rows = {action.action_id: _action_row(action, recorded_at) for action in reversed(actions)}
        async with self._engine.begin() as connection:
            await assert_epoch(connection, lease)
            columns = corporate_action.c.action_id, corporate_action.c.content_hash
            among = select(*columns).where(corporate_action.c.action_id.in_(list(rows)))
            known = {row.action_id: row.content_hash for row in await connection.execute(among)}
            new = [row for action_id, row in reversed(rows.items()) if action_id not in known]
            if new:
                await connection.execute(insert(corporate_action), new)
            moved = insert(topic_offset)
            moved = moved.on_conflict_do_update(
                index_elements=["log_id", "partition"], set_={"next_offset": moved.excluded.next_offset}
            )
            offsets = [{"log_id": log_id, "partition": p, "next_offset": o} for p, o in next_offsets.items()]
            await connection.execute(moved, offsets)
        hashes = known | {row["action_id"]: row["content_hash"] for row in new}
        return len(new), [action for action in actions if hashes[action.action_id] != action_hash(action)]

    async def known(self, after: int) -> list[KnownAction]:
        """The actions that arrived after `after`, in that order."""
        statement = select(corporate_action).where(corporate_action.c.arrival > after)
        async with self._engine.connect() as connection:
            rows = await connection.execute(statement.order_by(corporate_action.c.arrival))
            return [_known(row) for row in rows]

    async def applied(self, shard_id: int) -> dict[tuple[str, LedgerKind], datetime]:
        """The steps that a shard has booked, and when."""
        async with self._engine.connect() as connection:
            rows = await connection.execute(select(shard_action).where(shard_action.c.shard == shard_id))
            return {(row.action_id, LedgerKind(row.step)): row.applied_at for row in rows}

    async def book(
        self,
        lease: Lease,
        due: Sequence[DueStep],
        recorded_at: datetime,
        splits: Mapping[str, Sequence[AppliedSplit]],
        prover: Prover | None = None,
    ) -> tuple[Booked, list[Step]]:
        """Book steps, in their order, for all holders of a shard, in one transaction.

        `splits` are those that the shard has booked already, by symbol; what follows from the entries is the
        `prover`'s to say.

        Returns what was booked and the steps that were new to the shard.
        """
        booked = Booked()
        async with self._engine.begin() as connection:
            await assert_epoch(connection, lease)
            rows = [
                {
                    "shard": lease.shard,
                    "action_id": one.step.action_id,
                    "step": one.step.kind.value,
                    "applied_at": recorded_at,
                    "late": one.late,
                }
                for one in due
            ]
            statement = insert(shard_action).on_conflict_do_nothing()
            returning = statement.returning(shard_action.c.action_id, shard_action.c.step)
            inserted = {(row.action_id, row.step) for row in await connection.execute(returning, rows)}
            new = [one for one in due if (one.step.action_id, one.step.kind.value) in inserted]
            if new:
                booked_splits = {symbol: [one.split for one in of] for symbol, of in splits.items()}
                holders = await _Holders.read(connection, lease.shard, [one.step for one in new], booked_splits)
                for at, one in enumerate(new):
                    holders.note(one.step, book_step(booked, one, holders.of(at, one.step), recorded_at, prover))
                await write_booked(connection, lease.shard, booked)
                await holders.write_receivables(connection)
                if prover is not None:
                    await prover.write(await driver_of(connection))
        return booked, [one.step for one in new]


def applied_splits(
    actions: Iterable[KnownAction], applied: Mapping[tuple[str, LedgerKind], datetime]
) -> dict[str, list[AppliedSplit]]:
    """The splits that a shard has booked, by symbol, in the order in which they took effect."""
    found: dict[str, list[AppliedSplit]] = {}
    steps = (step for action in actions for step in action.steps if step.scale is not None)
    for step in sorted(steps, key=step_order):
        applied_at = applied.get((step.action_id, step.kind))
        if applied_at is not None and step.scale is not None:
            found.setdefault(step.symbol, []).append(AppliedSplit(Split(step.at, step.scale), applied_at))
    return found


@dataclass(slots=True)
class _Holders:
    """Whom steps concern: portfolios with their positions in the steps' symbols, what was traded since each step's
    instant, and what is owed by action. It follows the steps as they are booked, without asking again."""

    portfolios: dict[str, Portfolio]
    splits: Mapping[str, Sequence[Split]]
    since: dict[int, dict[str, Decimal]]
    owed: dict[str, dict[str, int]]
    accrued: list[dict[str, Any]] = field(default_factory=list)
    paid: list[str] = field(default_factory=list)

    @classmethod
    async def read(
        cls, connection: AsyncConnection, shard_id: int, steps: Sequence[Step], splits: Mapping[str, Sequence[Split]]
    ) -> _Holders:
        moving = [(at, step) for at, step in enumerate(steps) if step.kind is not LedgerKind.DIVIDEND_PAID]
        since: dict[int, dict[str, Decimal]] = {}
        if moving:
            asked = {
                "shard": shard_id,
                "places": [at for at, _ in moving],
                "symbols": [step.symbol for _, step in moving],
                "instants": [step.at for _, step in moving],
                "from": min(step.at for _, step in moving),
                "split_symbols": [symbol for symbol, of in splits.items() for _ in of],
                "split_instants": [one.effective_at for of in splits.values() for one in of],
            }
            for row in await connection.execute(_FILLED_SINCE, asked):
                scale = _last(splits.get(row.symbol, ()), row.splits_after)
                bought = since.setdefault(row.place, {})
                shares = scale_number(row.bought, scale, "quantity")
                bought[row.portfolio_id] = bought.get(row.portfolio_id, _ZERO) + shares
        owed: dict[str, dict[str, int]] = {}
        of_action = receivable.c.action_id.in_([step.action_id for step in steps])
        statement = select(receivable).join(portfolio).where(portfolio.c.shard == shard_id, of_action)
        for row in await connection.execute(statement):
            owed.setdefault(row.action_id, {})[row.portfolio_id] = to_micro(row.amount)
        symbols = {step.symbol for _, step in moving}
        in_symbols = select(position).join(portfolio).where(portfolio.c.shard == shard_id)
        held = (await connection.execute(in_symbols.where(position.c.symbol.in_(symbols)))).all() if symbols else []
        names = {row.portfolio_id for row in held}.union(*since.values(), *owed.values())
        rows = await connection.execute(select(portfolio).where(portfolio.c.id.in_(names)).order_by(portfolio.c.id))
        portfolios = {row.id: portfolio_of(row) for row in rows}
        for row in held:
            portfolios[row.portfolio_id].positions[row.symbol] = position_of(row)
        return cls(portfolios, splits, since, owed)

    def of(self, at: int, step: Step) -> list[Holder]:
        """The holders that the step at this place concerns."""
        if step.kind is LedgerKind.DIVIDEND_PAID:
            owed = self.owed.get(step.action_id, {})
            return [Holder(self.portfolios[name], owed=amount) for name, amount in sorted(owed.items())]
        since = self.since.get(at, {})
        scale = scale_since(to_ns(step.at), self.splits.get(step.symbol, ()))
        return [
            Holder(of, since.get(name, _ZERO), scale)
            for name, of in self.portfolios.items()
            if step.symbol in of.positions or name in since
        ]

    def note(self, step: Step, entries: Sequence[LedgerEntry]) -> None:
        """Remember what a step has left owed, or paid."""
        if step.kind is LedgerKind.DIVIDEND_ACCRUED:
            self.owed[step.action_id] = {of.portfolio_id: of.receivable for of in entries}
            self.accrued += (
                {"portfolio_id": of.portfolio_id, "action_id": step.action_id, "amount": from_micro(of.receivable)}
                for of in entries
            )
        elif step.kind is LedgerKind.DIVIDEND_PAID:
            self.owed.pop(step.action_id, None)
            self.paid += (f"{step.action_id}#{of.portfolio_id}" for of in entries)

    async def write_receivables(self, connection: AsyncConnection) -> None:
        if self.accrued:
            await connection.execute(insert(receivable), self.accrued)
        if self.paid:
            key = receivable.c.action_id + "#" + receivable.c.portfolio_id
            actions = {name.partition("#")[0] for name in self.paid}
            paid = receivable.c.action_id.in_(actions) & key.in_(self.paid)
            await connection.execute(receivable.delete().where(paid))


def _last(splits: Sequence[Split], count: int) -> Fraction:
    """The product of the last `count` splits, by their instants."""
    ordered = sorted(splits, key=lambda split: split.effective_at)
    return prod((split.scale for split in ordered[len(ordered) - count :]), start=Fraction(1))


def _action_row(action: CorporateAction, at: datetime) -> dict[str, Any]:
    row = {"action_id": action.action_id, "symbol": action.symbol, "recorded_at": at, "currency": None, "paid_at": None}
    row["content_hash"] = action_hash(action)
    if isinstance(action, SplitAction):
        row |= {"kind": "SPLIT", "terms": write_scale(parse_scale(action.ratio)), "effective_at": action.effective_at}
        return row
    assert isinstance(action, DividendAction)
    return row | {
        "kind": "DIVIDEND",
        "terms": action.amount,
        "currency": action.currency,
        "effective_at": opens_at(action.ex_date),
        "paid_at": opens_at(action.pay_date),
    }


def _known(row: Any) -> KnownAction:
    of = {"action_id": row.action_id, "symbol": row.symbol, "arrival": row.arrival, "currency": row.currency}
    steps: tuple[Step, ...]
    if row.kind == "SPLIT":
        steps = (Step(kind=LedgerKind.SPLIT, at=row.effective_at, scale=read_scale(row.terms), **of),)
    else:
        per_share = Decimal(row.terms)
        steps = (
            Step(kind=LedgerKind.DIVIDEND_ACCRUED, at=row.effective_at, per_share=per_share, **of),
            Step(kind=LedgerKind.DIVIDEND_PAID, at=row.paid_at, per_share=per_share, **of),
        )
    return KnownAction(row.action_id, row.arrival, row.recorded_at, row.content_hash, steps)


# Fills that took place at the step's instant or later and are booked already; `from` is the first of these instants.
_FILLED_SINCE = text(
    "SELECT place, portfolio_id, symbol, splits_after, sum(bought) AS bought FROM ("
    "SELECT asked.place, portfolio_id, ledger_entry.symbol, "
    "CASE side WHEN 'BUY' THEN quantity ELSE -quantity END AS bought, "
    "(SELECT count(*) FROM unnest(CAST(:split_symbols AS text[]), CAST(:split_instants AS timestamptz[])) "
    "AS split (symbol, at) WHERE split.symbol = ledger_entry.symbol AND split.at > effective_at) AS splits_after "
    "FROM ledger_entry JOIN portfolio ON portfolio.id = portfolio_id "
    "JOIN unnest(CAST(:places AS integer[]), CAST(:symbols AS text[]), CAST(:instants AS timestamptz[])) "
    "AS asked (place, symbol, at) ON asked.symbol = ledger_entry.symbol AND effective_at >= asked.at "
    "WHERE ledger_entry.effective_at >= :from AND portfolio.shard = :shard AND kind = 'FILL' AND reverses IS NULL "
    "AND NOT EXISTS (SELECT FROM ledger_entry AS back WHERE back.reverses = ledger_entry.event_id) "
    ") AS filled GROUP BY place, portfolio_id, symbol, splits_after"
)
