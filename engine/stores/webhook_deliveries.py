"""Deliveries as the webhooks worker sees them: taken, tried, settled.

A delivery is taken by one statement that moves its `due_at` beyond the time an attempt may last (`take`), counts the
attempt, and commits. So two workers never take the same one (FOR UPDATE SKIP LOCKED), no transaction is open while an
endpoint is waited for, and what a dead worker had taken is due again by itself: at least once, under the same id.
An attempt that was counted and is not in the log is one whose worker died.

Instants are the database's, which all workers share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from engine.webhooks import LIFETIME, AttemptError, DeliveryStatus

PRUNE_COUNT_MAX = 1_000  # rows of one statement; bounds its locks
DELETED_THRESHOLDS_KEPT = timedelta(days=1)  # longer than any evaluator takes to see that one is gone

# Of every endpoint that nothing is under way to, the oldest due ones; of each owner not more than its share, counting
# what is under way; of all these first the first of every owner, so that nobody's backlog holds up the others.
_TAKE = """
    WITH busy AS MATERIALIZED (
        SELECT owner, count(*) AS count FROM unnest($3::text[]) AS under_way (id) JOIN webhook USING (id) GROUP BY owner
    ), due AS MATERIALIZED (
        SELECT id FROM (
            SELECT d.id, d.due_at, coalesce(busy.count, 0)
                + row_number() OVER (PARTITION BY w.owner ORDER BY d.due_at) AS place
            FROM webhook AS w LEFT JOIN busy USING (owner) CROSS JOIN LATERAL (
                SELECT id, due_at FROM webhook_delivery
                WHERE webhook_id = w.id AND status = 'PENDING' AND due_at <= now() ORDER BY due_at LIMIT $2
            ) AS d WHERE w.active AND w.id <> ALL($3::text[])
        ) AS ranked WHERE place <= $5 ORDER BY place, due_at LIMIT $1
    ), taken AS MATERIALIZED (
        SELECT id FROM webhook_delivery WHERE id IN (SELECT id FROM due) AND status = 'PENDING' AND due_at <= now()
        FOR UPDATE SKIP LOCKED
    )
    UPDATE webhook_delivery AS d
    SET due_at = now() + $4 * interval '1 second', attempts_count = d.attempts_count + 1
    FROM taken, webhook AS w WHERE d.id = taken.id AND w.id = d.webhook_id
    RETURNING d.id, w.id, w.url, ARRAY(
        SELECT secret FROM webhook_secret AS s
        WHERE s.webhook_id = w.id AND (s.expires_at IS NULL OR s.expires_at > now()) ORDER BY s.id DESC
    ), d.body, d.created_at, d.attempts_count, now()
"""
# A failure is outdated when somebody has taken the delivery since; a success never is.
_SETTLE = """
    WITH kept AS (SELECT id FROM webhook_delivery WHERE id = $1 FOR UPDATE),
    logged AS (
        INSERT INTO webhook_attempt (delivery_id, number, at, duration_ms, status_code, error)
        SELECT id, $2, $3, $4, $5, $6 FROM kept ON CONFLICT DO NOTHING
    )
    UPDATE webhook_delivery AS d
    SET status = $7, due_at = $8, finished_at = CASE WHEN $7 = 'PENDING' THEN NULL ELSE now() END
    FROM kept WHERE d.id = kept.id AND d.status = 'PENDING' AND ($7 = 'DELIVERED' OR d.attempts_count = $2)
    RETURNING d.id
"""
# What is held for a webhook that is not active is given up when its day is over.
_EXPIRE = """
    UPDATE webhook_delivery AS d SET status = 'DEAD', due_at = NULL, finished_at = now() FROM webhook AS w
    WHERE w.id = d.webhook_id AND NOT w.active AND d.status = 'PENDING' AND d.created_at <= now() - $1::interval
"""
_PRUNE = """
    DELETE FROM webhook_delivery WHERE id IN (
        SELECT id FROM webhook_delivery WHERE created_at < now() - $1 * interval '1 day' LIMIT $2
    )
"""
_PRUNE_SECRETS = "DELETE FROM webhook_secret WHERE expires_at <= now()"
# The newest arrival stays, so that numbers are never given twice.
_PRUNE_THRESHOLDS = """
    DELETE FROM threshold WHERE deleted_at < now() - $1::interval AND arrival < (SELECT max(arrival) FROM threshold)
"""


@dataclass(frozen=True, slots=True)
class TakenDelivery:
    """A delivery to be attempted now, for the `number`-th time; `secrets` are the valid ones, newest first."""

    delivery_id: str
    webhook_id: str
    url: str
    secrets: Sequence[str]
    body: bytes
    created_at: datetime
    number: int
    taken_at: datetime


@dataclass(frozen=True, slots=True)
class AttemptOutcome:
    """What came of an attempt; `error` None is success. `status_code` is None when nothing was answered."""

    duration_ms: int
    status_code: int | None
    error: AttemptError | None


class WebhookDeliveries:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def take(
        self, count_max: int, endpoint_count_max: int, owner_count_max: int, busy: Iterable[str], lease_s: int
    ) -> Sequence[TakenDelivery]:
        """Take at most `count_max` due deliveries for `lease_s`: of each webhook that is not `busy`, and of each owner,
        so many. `busy` names a webhook once for each delivery that is under way to it."""
        rows = await self._pool.fetch(_TAKE, count_max, endpoint_count_max, list(busy), lease_s, owner_count_max)
        return [TakenDelivery(*row) for row in rows]

    async def settle(self, taken: TakenDelivery, outcome: AttemptOutcome, retry_at: datetime | None) -> DeliveryStatus:
        """Log an attempt and say what becomes of the delivery: DELIVERED, PENDING until `retry_at`, or DEAD."""
        status = DeliveryStatus.DELIVERED
        if outcome.error is not None:
            status = DeliveryStatus.DEAD if retry_at is None else DeliveryStatus.PENDING
        await self._pool.fetchval(
            _SETTLE,
            taken.delivery_id,
            taken.number,
            taken.taken_at,
            outcome.duration_ms,
            outcome.status_code,
            None if outcome.error is None else outcome.error.value,
            status.value,
            retry_at if status is DeliveryStatus.PENDING else None,
        )
        return status

    async def expire(self) -> int:
        """Give up what was held for too long; returns how many deliveries."""
        status = await self._pool.execute(_EXPIRE, LIFETIME)
        return int(status.rpartition(" ")[2])

    async def prune(self, retention_days: int) -> int:
        """Drop what is older than the log reaches back, and what has expired; returns how many deliveries."""
        total, count = 0, PRUNE_COUNT_MAX
        while count == PRUNE_COUNT_MAX:
            status = await self._pool.execute(_PRUNE, retention_days, PRUNE_COUNT_MAX)
            count = int(status.rpartition(" ")[2])
            total += count
        await self._pool.execute(_PRUNE_SECRETS)
        await self._pool.execute(_PRUNE_THRESHOLDS, DELETED_THRESHOLDS_KEPT)
        return total
