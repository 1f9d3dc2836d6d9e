"""One of several equal workers does the work, the others stand by: an advisory lock of PostgreSQL decides.

The lock belongs to a connection, and what must be done by one worker alone is written over that very connection: who
has lost the one has lost the other, so that there is nothing to fence. A worker that was paused keeps its connection;
the server ends it after SILENCE_MAX_S without a statement, and another worker takes the lock. Whoever holds the
connection therefore asks something of it more often than that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from engine.runtime.connections import postgres_dsn, stopped_within
from engine.runtime.settings import Settings

SILENCE_MAX_S = 10
STANDBY_INTERVAL_S = 0.5  # how soon another worker takes over from one that has died

# Locks of one name are one lock, per database.
_TRY_LOCK = "SELECT pg_try_advisory_lock(hashtextextended($1, 0))"


@asynccontextmanager
async def alone(settings: Settings, work: str, stop: asyncio.Event) -> AsyncIterator[asyncpg.Connection | None]:
    """The connection that holds the lock of `work`, as soon as nobody else does; None when `stop` was set before.

    Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away.
    """
    connection = await _connect(settings, work)
    try:
        held = await connection.fetchval(_TRY_LOCK, f"navstream {work}")
        while not held and not await stopped_within(stop, STANDBY_INTERVAL_S):
            held = await connection.fetchval(_TRY_LOCK, f"navstream {work}")
        yield connection if held else None
    finally:
        # The server frees the lock with the connection.
        connection.terminate()


async def _connect(settings: Settings, work: str) -> asyncpg.Connection:
    timeout_ms = str(settings.postgres_timeout_s * 1_000)
    return await asyncpg.connect(
        postgres_dsn(settings.postgres_url),
        timeout=settings.postgres_timeout_s,
        command_timeout=settings.postgres_timeout_s,
        server_settings={
            "application_name": f"navstream-{work}",
            "statement_timeout": timeout_ms,
            "lock_timeout": timeout_ms,
            "idle_in_transaction_session_timeout": timeout_ms,
            "idle_session_timeout": str(SILENCE_MAX_S * 1_000),
        },
    )
