"""The outbox as its relay sees it: what is due, in which order, and when it is due again."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest_asyncio

from engine.runtime.connections import postgres_dsn
from engine.stores import outbox

LOGS = {"badge-events": "one/badge-events"}


@pytest_asyncio.fixture(loop_scope="session")
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    opened = await asyncpg.connect(postgres_dsn(database))
    await opened.execute("TRUNCATE outbox")
    for number in range(5):
        topic = "badge-events" if number < 4 else "another-topic"
        await opened.execute(
            "INSERT INTO outbox (event_id, topic, key, payload) VALUES ($1, $2, 'p-1', $3)",
            f"e{number}",
            topic,
            b"%d" % number,
        )
    yield opened
    await opened.close()


async def names(connection: asyncpg.Connection, logs: dict[str, str] | None = None, count_max: int = 10) -> list[str]:
    return [row.event_id for row in await outbox.due(connection, logs or LOGS, count_max)]


async def test_what_is_new_is_due_oldest_first(connection: asyncpg.Connection) -> None:
    assert await names(connection) == ["e0", "e1", "e2", "e3"]
    assert await names(connection, count_max=2) == ["e0", "e1"]
    both = LOGS | {"another-topic": "one/another-topic"}
    assert await names(connection, both) == ["e0", "e1", "e2", "e3", "e4"]
    (row, *_) = await outbox.due(connection, LOGS, 1)
    assert (row.topic, row.key, row.payload) == ("badge-events", "p-1", b"0")


async def test_what_was_produced_is_due_again_in_another_log_or_after_a_while(connection: asyncpg.Connection) -> None:
    rows = await outbox.due(connection, LOGS, 10)
    await outbox.mark_produced(connection, rows[1:3], LOGS)
    assert await names(connection) == ["e0", "e3"]
    assert await names(connection, {"badge-events": "two/badge-events"}) == ["e0", "e1", "e2", "e3"]
    await connection.execute("UPDATE outbox SET produced_at = now() - interval '29 seconds' WHERE event_id = 'e1'")
    assert await names(connection) == ["e0", "e3"]
    await connection.execute("UPDATE outbox SET produced_at = now() - interval '31 seconds' WHERE event_id = 'e1'")
    assert await names(connection) == ["e0", "e1", "e3"]


async def test_what_is_booked_is_gone(connection: asyncpg.Connection) -> None:
    await outbox.remove(connection, ["e0", "e2", "unknown"])
    assert await names(connection) == ["e1", "e3"]
    assert await outbox.still_waiting(connection, ["e0", "e1", "unknown"]) == {"e1"}
    assert await outbox.still_waiting(connection, []) == frozenset()
    assert await outbox.waiting_count(connection) == 3


async def test_what_only_has_the_id_of_a_row_is_not_the_row(connection: asyncpg.Connection) -> None:
    told = [("e0", b"0"), ("e1", b"other"), ("unknown", b"2")]
    assert await outbox.genuine(connection, told) == {("e0", b"0")}
    assert await outbox.genuine(connection, []) == frozenset()
    await outbox.remove_genuine(connection, told)
    await outbox.remove_genuine(connection, [])
    assert await names(connection) == ["e1", "e2", "e3"]
