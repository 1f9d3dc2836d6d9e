"""The outbox as its relay sees it: messages on their way from the transaction that proved them to Kafka.

A row comes with the transaction that proves something, and goes with the transaction of the consumer that has booked
it. Between the two the relay produces it, and writes down into which log (cluster/topic): a row is due again when

    it is in another log than the present one     a new log has lost it, or the topic is another one
    it was produced REPRODUCE_AFTER_S ago         and is still here: produced and lost, or its consumer is behind

so that a message is never lost, and may come twice, which its consumer knows by its event id. Rows of one key are
due in the order in which they were committed: their portfolio has one writer at a time. A row is also what a message
is compared with before it is booked: anybody who can write to a topic can use an id, but not the row's.

`produced_at` is by the database's clock, which all relays share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import asyncpg
from asyncpg.pool import PoolConnectionProxy

# Long enough for a healthy consumer to have booked a message, so that a busy one is not sent everything twice.
REPRODUCE_AFTER_S = 30

# An event's id and its bytes, as a topic brought them.
Told = tuple[str, bytes]

Connection = asyncpg.Connection | PoolConnectionProxy

# Topic by topic, because each has a log of its own.
_DUE = """
    SELECT o.id, o.event_id, o.topic, o.key, o.payload
    FROM outbox AS o JOIN unnest($1::text[], $2::text[]) AS present (topic, log_id) USING (topic)
    WHERE o.produced_log IS DISTINCT FROM present.log_id
        OR o.produced_at < clock_timestamp() - $3 * interval '1 second'
    ORDER BY o.id LIMIT $4
"""
_PRODUCED = """
    UPDATE outbox SET produced_log = produced.log_id, produced_at = clock_timestamp()
    FROM unnest($1::bigint[], $2::text[]) AS produced (id, log_id) WHERE outbox.id = produced.id
"""
_WAITING = "SELECT event_id FROM outbox WHERE event_id = ANY($1::text[])"
_GENUINE = """
    SELECT event_id, payload FROM outbox JOIN unnest($1::text[], $2::bytea[]) AS told (event_id, payload)
        USING (event_id, payload)
"""
_DELETE = "DELETE FROM outbox WHERE event_id = ANY($1::text[])"
_DELETE_GENUINE = """
    DELETE FROM outbox USING unnest($1::text[], $2::bytea[]) AS told (event_id, payload)
    WHERE outbox.event_id = told.event_id AND outbox.payload = told.payload
"""
_COUNT = "SELECT count(*) FROM outbox"


@dataclass(frozen=True, slots=True)
class OutboxRow:
    id: int
    event_id: str
    topic: str
    key: str
    payload: bytes


async def due(
    connection: Connection, logs: Mapping[str, str], count_max: int, reproduce_after_s: float = REPRODUCE_AFTER_S
) -> list[OutboxRow]:
    """At most `count_max` rows that are to be produced now, oldest first; `logs` is the present log of each topic."""
    rows = await connection.fetch(_DUE, list(logs), list(logs.values()), reproduce_after_s, count_max)
    return [OutboxRow(*row) for row in rows]


async def mark_produced(connection: Connection, rows: Sequence[OutboxRow], logs: Mapping[str, str]) -> None:
    """Kafka has acknowledged these rows, in these logs."""
    if rows:
        await connection.execute(_PRODUCED, [row.id for row in rows], [logs[row.topic] for row in rows])


async def still_waiting(connection: Connection, event_ids: Sequence[str]) -> frozenset[str]:
    """Those of `event_ids` that no consumer has booked yet."""
    return frozenset(row[0] for row in await connection.fetch(_WAITING, event_ids)) if event_ids else frozenset()


async def genuine(connection: Connection, told: Collection[Told]) -> frozenset[Told]:
    """Those that wait here and are, byte for byte, what was proved."""
    if not told:
        return frozenset()
    return frozenset((row[0], row[1]) for row in await connection.fetch(_GENUINE, *_columns(told)))


async def remove(connection: Connection, event_ids: Sequence[str]) -> None:
    """These are booked; in the transaction that says so."""
    if event_ids:
        await connection.execute(_DELETE, event_ids)


async def remove_genuine(connection: Connection, told: Collection[Told]) -> None:
    """These will never be booked; what has their ids and is something else stays."""
    if told:
        await connection.execute(_DELETE_GENUINE, *_columns(told))


def _columns(told: Collection[Told]) -> list[list[object]]:
    return [list(column) for column in zip(*told, strict=True)]


async def waiting_count(connection: Connection) -> int:
    return int(await connection.fetchval(_COUNT))
