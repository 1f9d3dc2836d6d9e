"""The daily job of the badges worker: the badges that a day's figures prove (SHARPE, SECTOR_PROFITS).

It judges each session close of the equities' exchange (each midnight, UTC, where there is none) once the snapshots of
the close are written: a portfolio of each shard is looked at, because a shard's snapshots are written together, and
the prices of the instant. After SNAPSHOTS_WAIT_S it goes on with those that are there. It judges close after close as
they were, also late: `daily_close` says which one was the last, and when the job begins, that one or an older one is
judged again, which changes nothing. When more than CLOSES_BEHIND_MAX are due the oldest are passed over, counted.

Only portfolios that lack a badge are looked at, in chunks, and after each chunk the job rests as long as the chunk
took, so that it takes no more than half of a core. Each chunk's proofs are one transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime

import asyncpg
import structlog

from engine.assets import AssetClass
from engine.badges import DAILY, Rule, current_rules
from engine.instants import DAY_NS, to_datetime, to_ns
from engine.markets import Markets
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from engine.runtime.connections import stopped_within
from engine.runtime.settings import Settings
from engine.sessions import Sessions
from engine.stores.badges_postgres import prove, read_rules
from engine.stores.daily_figures import CHUNK_COUNT, last_close_ns
from engine.stores.daily_proofs import daily_proofs
from engine.stores.outbox import Connection

POLL_INTERVAL_S = 0.2
CLOSES_BEHIND_MAX = 20
SNAPSHOTS_WAIT_S = 30.0

# Of every shard that had a portfolio by then, whether its first one has a snapshot.
_SNAPSHOTS = """
    SELECT coalesce(bool_and(EXISTS (
        SELECT FROM equity_snapshot WHERE portfolio_id = first.id AND at = $1
    )), true) AND EXISTS (SELECT FROM price_close WHERE at = $1)
    FROM shard CROSS JOIN LATERAL (
        SELECT id FROM portfolio WHERE shard = shard.id AND opened_at < $1 ORDER BY opened_at, id LIMIT 1
    ) AS first
"""
_LAST_JUDGED = "SELECT judged_at FROM daily_close"
_JUDGED = "INSERT INTO daily_close (judged_at) VALUES ($1) ON CONFLICT (is_last) DO UPDATE SET judged_at = $1"
_LACKING = """
    SELECT p.id FROM portfolio AS p
    WHERE p.id > $1 AND EXISTS (SELECT FROM equity_snapshot WHERE portfolio_id = p.id AND at = $2)
        AND NOT EXISTS (
            SELECT FROM badge_state WHERE portfolio_id = p.id AND badge_id = $3 AND version = $4
        )
    ORDER BY p.id LIMIT $5
"""

_log = structlog.get_logger(__name__)


class DailyBadges:
    """`connection` holds the daily job's lock."""

    def __init__(self, settings: Settings, clock: Clock, connection: asyncpg.Connection) -> None:
        self._topic = settings.badge_topic
        self._clock = clock
        self._connection = connection
        self._sessions = Markets(settings.calendars).sessions(AssetClass.EQUITY)

    async def run(self, stop: asyncio.Event, succeeded: Callable[[], None]) -> None:
        """Judge every close until `stop` is set. Raises AWAY errors."""
        judged_ns = await self._judged_ns()
        waiting_since_s = time.monotonic()
        while not stop.is_set():
            last_ns = last_close_ns(self._sessions, self._clock.now_ns())
            # Whoever is silent for too long is taken for dead.
            await self._connection.execute("SELECT 1")
            while judged_ns < last_ns and not stop.is_set():
                passed = max(0, closes_between(self._sessions, judged_ns, last_ns) + 1 - CLOSES_BEHIND_MAX)
                for _ in range(passed):
                    judged_ns = next_close_ns(self._sessions, judged_ns)
                telemetry.DAILY_BADGES_SKIPPED.inc(passed)
                close_ns = next_close_ns(self._sessions, judged_ns)
                if not await self._is_due(close_ns, last_ns, time.monotonic() - waiting_since_s):
                    break
                await self._judge(to_datetime(close_ns))
                judged_ns, waiting_since_s = close_ns, time.monotonic()
            if judged_ns >= last_ns:
                waiting_since_s = time.monotonic()
            succeeded()
            await stopped_within(stop, POLL_INTERVAL_S)

    async def _judged_ns(self) -> int:
        """The close to go on after: the last but one, or an older one if that is as far as anybody came."""
        before_ns = last_close_ns(self._sessions, last_close_ns(self._sessions, self._clock.now_ns()) - 1)
        judged_at = await self._connection.fetchval(_LAST_JUDGED)
        return before_ns if judged_at is None else min(before_ns, to_ns(judged_at))

    async def _judge(self, closed_at: datetime) -> None:
        with telemetry.DAILY_BADGES.time():
            count = await judge_close(self._connection, self._topic, closed_at, self._sessions, rest_between_chunks)
        await self._connection.execute(_JUDGED, closed_at)
        _log.info("close_judged", closed_at=closed_at.isoformat(), proofs=count)

    async def _is_due(self, close_ns: int, last_ns: int, waited_s: float) -> bool:
        """Whether the snapshots of a close are there, or will not come."""
        if waited_s > SNAPSHOTS_WAIT_S or await self._is_snapped(to_datetime(close_ns)):
            return True
        return close_ns < last_ns and await self._is_snapped(to_datetime(last_ns))

    async def _is_snapped(self, closed_at: datetime) -> bool:
        return bool(await self._connection.fetchval(_SNAPSHOTS, closed_at))


def next_close_ns(sessions: Sessions | None, after_ns: int) -> int:
    """The first session close, or midnight, after an instant."""
    return (after_ns // DAY_NS + 1) * DAY_NS if sessions is None else sessions.next_close(after_ns)


def closes_between(sessions: Sessions | None, after_ns: int, before_ns: int) -> int:
    """How many closes lie strictly between two closes, as far as it is worth counting."""
    count = 0
    at_ns = last_close_ns(sessions, before_ns - 1)
    while at_ns > after_ns and count < 1_000:
        count, at_ns = count + 1, last_close_ns(sessions, at_ns - 1)
    return count


async def judge_close(
    connection: Connection,
    topic: str,
    closed_at: datetime,
    sessions: Sessions | None,
    rest: Callable[[float], Awaitable[None]] | None = None,
) -> int:
    """Prove what the figures of a close prove; returns how many proofs were new.

    `rest` is told how long each chunk took, in seconds.
    """
    proved = 0
    for rule in current_rules(await read_rules(connection)):
        if rule.predicate not in DAILY:
            continue
        after = ""
        while ids := await _lacking(connection, rule, after, closed_at):
            began_s, after = time.monotonic(), ids[-1]
            proofs = await daily_proofs(connection, rule, ids, closed_at, sessions)
            proved += len(await prove(connection, topic, proofs))
            if rest is not None:
                await rest(time.monotonic() - began_s)
    return proved


async def _lacking(connection: Connection, rule: Rule, after: str, closed_at: datetime) -> list[str]:
    rows = await connection.fetch(_LACKING, after, closed_at, rule.badge_id, rule.version, CHUNK_COUNT)
    return [row[0] for row in rows]


async def rest_between_chunks(took_s: float) -> None:
    await asyncio.sleep(min(took_s, 1.0))
