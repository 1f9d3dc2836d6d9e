"""Badges in PostgreSQL, from their prover's side: rules, what is proved, and the outbox.

A proof is written in the transaction that proves it: the state that it leads to, and its message in the outbox. Both
or neither, once: a state moves on by its `events_count` alone, so what is written twice, or by two at a time, counts
the first time. Whoever waits for the outbox is told by NOTIFY at the commit.

    with the batch that it follows from    the evaluator, in LedgerWriter.book and ActionsStore.book
    on its own, under the shard's lease    the evaluator: HELD by due date, NAV at flush, SECTORS after a
                                           reclassification (BadgesStore)
    on its own, without a lease            the daily job: rules that the evaluator does not look at (`prove`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.badge_book import BadgeTurn, OldestPosition
from engine.badges import BadgeState, BadRuleError, Predicate, Proof, Rarity, Rule, badge_message_encoder
from engine.portfolio import Booking, Portfolio
from engine.stores.ledger_postgres import Lease, assert_epoch
from engine.stores.ledger_rows import driver_of

Connection = asyncpg.Connection | PoolConnectionProxy

NOTIFY_CHANNEL = "outbox"

_RULE_COLUMNS = Rule.__struct_fields__
_ADD_RULES = f"""
    INSERT INTO badge_rule ({", ".join(_RULE_COLUMNS)}) SELECT * FROM unnest($1::text[], $2::integer[], $3::text[],
        $4::text[], $5::text[], $6::text[], $7::numeric[], $8::numeric[], $9::numeric[], $10::integer[])
    ON CONFLICT DO NOTHING RETURNING badge_id
"""  # noqa: S608 - the columns are ours
_RULES = f"SELECT {', '.join(_RULE_COLUMNS)} FROM badge_rule ORDER BY badge_id, version"  # noqa: S608
_STATES = """
    SELECT portfolio_id, badge_id, version, active, events_count FROM badge_state WHERE portfolio_id = ANY($1::text[])
"""
_STATES_OF_SHARD = """
    SELECT portfolio_id, badge_id, version, active, events_count
    FROM badge_state JOIN portfolio ON portfolio.id = portfolio_id WHERE shard = $1
"""
# The first event of a badge is its unlocking.
_WRITE_STATES = """
    INSERT INTO badge_state (portfolio_id, badge_id, version, active, unlocked_at, events_count)
    SELECT * FROM unnest($1::text[], $2::text[], $3::integer[], $4::boolean[], $5::timestamptz[], $6::integer[])
    ON CONFLICT (portfolio_id, badge_id, version) DO UPDATE
        SET active = excluded.active, events_count = excluded.events_count
        WHERE badge_state.events_count < excluded.events_count
    RETURNING portfolio_id, badge_id, version
"""
_WRITE_OUTBOX = """
    INSERT INTO outbox (event_id, topic, key, payload)
    SELECT event_id, $1, key, payload
    FROM unnest($2::text[], $3::text[], $4::bytea[]) WITH ORDINALITY AS of (event_id, key, payload, place)
    ORDER BY place ON CONFLICT DO NOTHING
"""
_CLASSIFIED = "SELECT classified_arrival FROM shard WHERE id = $1"
_NOTE_CLASSIFIED = "UPDATE shard SET classified_arrival = $2 WHERE id = $1 AND classified_arrival < $2"
_OLDEST = """
    SELECT DISTINCT ON (portfolio_id) portfolio_id, symbol, position.opened_at, held_since, ledger_sequence
    FROM position JOIN portfolio ON portfolio.id = portfolio_id
    WHERE portfolio_id = ANY($1::text[]) AND shard = $2
    ORDER BY portfolio_id, held_since, symbol
"""


@dataclass(frozen=True, slots=True)
class BatchProver:
    """Follows a batch as it is booked and writes what it proves in the batch's own transaction."""

    topic: str
    turn: BadgeTurn

    def booked(self, held: Portfolio, booking: Booking, price: Decimal | None) -> None:
        """See engine.booking.Watch."""
        self.turn.booked(held, booking, price)

    async def write(self, driver: Connection) -> None:
        """After the batch itself."""
        await write_proofs(driver, self.topic, self.turn.proofs)


async def sync_rules(connection: Connection, rules: Iterable[Rule]) -> int:
    """Add the rules that are not there yet; answers how many.

    Raises BadRuleError when one is there with other content: a changed rule is a new version.
    """
    rows = [tuple(getattr(rule, name) for name in _RULE_COLUMNS) for rule in rules]
    if not rows:
        return 0
    async with connection.transaction():
        added = await connection.fetch(_ADD_RULES, *(list(column) for column in zip(*rows, strict=True)))
        known = {(rule.badge_id, rule.version): rule for rule in await read_rules(connection)}
        for row in rows:
            wanted = Rule(**dict(zip(_RULE_COLUMNS, row, strict=True)))
            if known[wanted.badge_id, wanted.version] != wanted:
                raise BadRuleError(f"{wanted.badge_id}:{wanted.version} has changed: give it a new version")
    return len(added)


async def read_rules(connection: Connection) -> list[Rule]:
    """Every version of every rule."""
    return [_rule(row) for row in await connection.fetch(_RULES)]


def _rule(row: asyncpg.Record) -> Rule:
    fields: dict[str, Any] = dict(row)
    fields["rarity"], fields["predicate"] = Rarity(row["rarity"]), Predicate(row["predicate"])
    return Rule(**fields)


async def states_of(
    connection: Connection, portfolio_ids: Sequence[str], rules: Iterable[Rule]
) -> dict[str, dict[str, BadgeState]]:
    """What portfolios have met of these (current) rules, by portfolio and badge; one that has nothing is missing."""
    return _states(await connection.fetch(_STATES, list(portfolio_ids)), {r.badge_id: r.version for r in rules})


async def states_of_shard(
    connection: Connection, shard_id: int, rules: Iterable[Rule]
) -> dict[str, dict[str, BadgeState]]:
    """As `states_of`, of all portfolios of a shard."""
    return _states(await connection.fetch(_STATES_OF_SHARD, shard_id), {r.badge_id: r.version for r in rules})


def _states(rows: Iterable[asyncpg.Record], versions: Mapping[str, int]) -> dict[str, dict[str, BadgeState]]:
    # Most states are alike: they are shared.
    alike: dict[BadgeState, BadgeState] = {}
    found: dict[str, dict[str, BadgeState]] = {}
    for row in rows:
        if versions.get(row["badge_id"]) == row["version"]:
            state = BadgeState(row["active"], row["events_count"])
            found.setdefault(row["portfolio_id"], {})[row["badge_id"]] = alike.setdefault(state, state)
    return found


async def write_proofs(driver: Connection, topic: str, proofs: Sequence[Proof]) -> list[Proof]:
    """Write what is proved, in the transaction that the caller has begun; returns the proofs that were new.

    Several proofs of one rule come in the order of their events.
    """
    if not proofs:
        return []
    last = {_key(proof): proof for proof in proofs}
    states = [
        (
            proof.portfolio_id,
            proof.transition.rule.badge_id,
            proof.transition.rule.version,
            proof.transition.state.active,
            proof.transition.at,
            proof.transition.state.events_count,
        )
        # In one order, so that two who write the same take their row locks without a deadlock.
        for _, proof in sorted(last.items())
    ]
    moved = {tuple(row) for row in await driver.fetch(_WRITE_STATES, *_columns(states))}
    new = [proof for proof in proofs if _key(proof) in moved]
    messages = [
        (message.event_id, message.portfolio_id, badge_message_encoder.encode(message))
        for message in (proof.message for proof in new)
    ]
    if messages:
        await driver.execute(_WRITE_OUTBOX, topic, *_columns(messages))
        await driver.execute("SELECT pg_notify($1, '')", NOTIFY_CHANNEL)
    return new


async def prove(connection: Connection, topic: str, proofs: Sequence[Proof]) -> list[Proof]:
    """Write proofs in a transaction of their own, without a lease; returns those that were new."""
    async with connection.transaction():
        return await write_proofs(connection, topic, proofs)


def _key(proof: Proof) -> tuple[str, str, int]:
    return proof.portfolio_id, proof.transition.rule.badge_id, proof.transition.rule.version


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


class BadgesStore:
    """What the evaluator proves on its own. Raises Fenced; sqlalchemy.exc.DBAPIError, asyncpg.PostgresError or OSError
    when the database is not there."""

    def __init__(self, engine: AsyncEngine, topic: str) -> None:
        self._engine = engine
        self.topic = topic

    async def rules(self) -> list[Rule]:
        async with self._engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            return await read_rules(await driver_of(connection))

    async def prove(self, lease: Lease, proofs: Sequence[Proof]) -> None:
        """Write what was found of a shard's portfolios."""
        async with self._engine.begin() as connection:
            await assert_epoch(connection, lease)
            await write_proofs(await driver_of(connection), self.topic, proofs)

    async def classified_arrival(self, shard_id: int) -> int:
        """The newest version of an asset that a shard's badges were looked at with."""
        async with self._engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            return int(await (await driver_of(connection)).fetchval(_CLASSIFIED, shard_id))

    async def note_classified(self, lease: Lease, arrival: int) -> None:
        """All that a shard's badges prove with versions up to this one is written."""
        async with self._engine.begin() as connection:
            await assert_epoch(connection, lease)
            await (await driver_of(connection)).execute(_NOTE_CLASSIFIED, lease.shard, arrival)

    async def prove_held(
        self, lease: Lease, portfolio_ids: Sequence[str], prove: Callable[[OldestPosition], list[Proof]]
    ) -> tuple[list[OldestPosition], list[Proof]]:
        """Write what the oldest open position of each of these portfolios proves; returns both."""
        async with self._engine.begin() as connection:
            await assert_epoch(connection, lease)
            driver = await driver_of(connection)
            rows = await driver.fetch(_OLDEST, list(portfolio_ids), lease.shard)
            oldest = [OldestPosition(*row) for row in rows]
            proofs = [proof for one in oldest for proof in prove(one)]
            await write_proofs(driver, self.topic, proofs)
        return oldest, proofs
