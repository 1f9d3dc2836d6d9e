"""Webhooks in PostgreSQL: endpoints, their secrets, and what is to be delivered to them.

`enqueue` and `record_threshold` belong to the transaction of whoever books an event: a delivery is there exactly if the
event is, and once per webhook and event however often they are called. Its last statement wakes the workers
(NOTIFY on CHANNEL) when the transaction commits. Instants are the database's: they are about this system, not about
its market.

Everything that a subject asks for names its owner, so that nobody reads or changes what is somebody else's.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg
import msgspec
import structlog
import uuid_utils
from asyncpg.pool import PoolConnectionProxy

from engine.runtime import telemetry
from engine.stores.ledger_reads import PoolSource
from engine.thresholds import threshold_message_decoder
from engine.webhooks import (
    SECRET_BYTES,
    SECRET_PREFIX,
    TEST_KIND,
    AttemptError,
    Body,
    DeliveryStatus,
    WebhookKind,
    encode_body,
)

Connection = asyncpg.Connection | PoolConnectionProxy
# An event to be told of: its id, its portfolio, its kind, and its JSON as its topic carries it.
Event = tuple[str, str, str, bytes]

CHANNEL = "webhook"
WAITING_COUNT_MAX = 10_000  # what waits for one endpoint; more is dropped and counted
ATTEMPTS_SHOWN_MAX = 10

_BADGE_KINDS = {name: f"BADGE_{name}" for name in ("UNLOCKED", "ACTIVATED", "LAPSED")}

# A webhook that is found here can not be deleted before its deliveries are written.
_TOLD = """
    SELECT event.place, w.id
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS event (portfolio_id, kind, place)
    JOIN portfolio AS p ON p.id = event.portfolio_id
    JOIN webhook AS w ON w.owner = p.owner AND w.active AND event.kind = ANY(w.kinds)
        AND (w.portfolio_ids IS NULL OR p.id = ANY(w.portfolio_ids))
    ORDER BY event.place, w.id FOR KEY SHARE OF w
"""
_WAITING = """
    SELECT w.id, count(*) FROM unnest($1::text[]) AS w (id)
    CROSS JOIN LATERAL (
        SELECT FROM webhook_delivery WHERE webhook_id = w.id AND status = 'PENDING' LIMIT $2
    ) AS waiting GROUP BY w.id
"""
_DELIVER = """
    INSERT INTO webhook_delivery (id, webhook_id, event_id, kind, portfolio_id, body, due_at)
    SELECT *, now() FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[])
    ON CONFLICT (webhook_id, event_id) DO NOTHING
"""
_NOTIFY = f"SELECT pg_notify('{CHANNEL}', '')"

_WEBHOOK = "id, owner, url, kinds, portfolio_ids, active, created_at"
_CREATE = f"""
    INSERT INTO webhook (id, owner, url, kinds, portfolio_ids, active) VALUES ($1, $2, $3, $4, $5, true)
    RETURNING {_WEBHOOK}
"""  # noqa: S608 -- constants of this module only
_UPDATE = f"""
    UPDATE webhook SET url = $3, kinds = $4, portfolio_ids = $5, active = $6 WHERE id = $1 AND owner = $2
    RETURNING {_WEBHOOK}
"""  # noqa: S608
_FIND = f"SELECT {_WEBHOOK} FROM webhook WHERE id = $1 AND owner = $2"  # noqa: S608
_LIST = f"SELECT {_WEBHOOK} FROM webhook WHERE owner = $1 AND id > $2 ORDER BY id LIMIT $3"  # noqa: S608
_DELETE = "DELETE FROM webhook WHERE id = $1 AND owner = $2 RETURNING id"
_COUNT = "SELECT count(*) FROM webhook WHERE owner = $1"
# Serialises what counts before it writes, per subject.
_LOCK_OWNER = "SELECT pg_advisory_xact_lock(hashtextextended('webhook ' || $1, 0))"
_OWNED = "SELECT count(*) FROM portfolio WHERE id = ANY($1::text[]) AND owner = $2"

_ADD_SECRET = "INSERT INTO webhook_secret (webhook_id, secret) VALUES ($1, $2)"  # noqa: S105 -- a statement
# Of the older ones only the one that was newest till now goes on, for the overlap.
_RETIRE_SECRETS = """
    WITH newest AS (SELECT max(id) AS id FROM webhook_secret WHERE webhook_id = $1)
    UPDATE webhook_secret SET expires_at = now() + $2 * interval '1 second'
    FROM newest WHERE webhook_secret.id = newest.id RETURNING expires_at
"""
_DROP_SECRETS = """
    DELETE FROM webhook_secret WHERE webhook_id = $1
        AND (id < (SELECT max(id) FROM webhook_secret WHERE webhook_id = $1) OR expires_at <= now())
"""
_LOCK = "SELECT id FROM webhook WHERE id = $1 AND owner = $2 FOR UPDATE"
# By owner: a webhook that was deleted and made anew is still the same subject's.
_TEST = """
    INSERT INTO webhook_test AS last (owner, tested_at) VALUES ($1, now()) ON CONFLICT (owner)
    DO UPDATE SET tested_at = now() WHERE last.tested_at <= now() - $2 * interval '1 second' RETURNING owner
"""

_LOGGED = """
    SELECT d.id, d.kind, d.event_id, d.portfolio_id, d.status, d.attempts_count, d.created_at, d.due_at, d.finished_at,
        ARRAY(SELECT (a.number, a.at, a.duration_ms, a.status_code, a.error) FROM webhook_attempt AS a
            WHERE a.delivery_id = d.id ORDER BY a.number DESC LIMIT $2)
    FROM webhook_delivery AS d
"""
_LOG = f"{_LOGGED} WHERE d.webhook_id = $1 AND ($3::text IS NULL OR d.id < $3) ORDER BY d.id DESC LIMIT $4"
_LOGGED_ONE = f"{_LOGGED} WHERE d.id = $1"

_log = structlog.get_logger(__name__)


class TooManyWebhooks(Exception):
    """The subject has as many webhooks as the settings allow."""


class TooManyTests(Exception):
    """The subject's last test was a moment ago, or more waits for this webhook than there is room for."""


class UnknownPortfolio(Exception):
    """A webhook names a portfolio that is not its owner's."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """`portfolio_ids` None is all of the owner's."""

    webhook_id: str
    owner: str
    url: str
    kinds: Sequence[WebhookKind]
    portfolio_ids: Sequence[str] | None
    active: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Attempt:
    number: int
    at: datetime
    duration_ms: int
    status_code: int | None
    error: AttemptError | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row of the log; `attempts` are the newest ATTEMPTS_SHOWN_MAX, newest first."""

    delivery_id: str
    kind: str
    event_id: str
    portfolio_id: str | None
    status: DeliveryStatus
    attempts_count: int
    created_at: datetime
    due_at: datetime | None
    finished_at: datetime | None
    attempts: Sequence[Attempt]


# -- what is to be delivered -------------------------------------------------------------------------------------


async def enqueue(connection: Connection, events: Sequence[Event], waiting_max: int = WAITING_COUNT_MAX) -> int:
    """Have every webhook that is told of these events told; in the caller's transaction. Returns how many deliveries.

    A badge event's kind is UNLOCKED, ACTIVATED or LAPSED; other kinds are WebhookKind's own. An event that nobody is
    told of, and one that was enqueued before, make none.
    """
    if not events:
        return 0
    kinds = [_BADGE_KINDS.get(kind, kind) for _, _, kind, _ in events]
    told = await connection.fetch(_TOLD, [event[1] for event in events], kinds)
    if not told:
        return 0
    names = sorted({row[1] for row in told})
    room = Counter(dict.fromkeys(names, waiting_max))
    room.subtract(dict(map(tuple, await connection.fetch(_WAITING, names, waiting_max))))
    rows = []
    for place, webhook_id in told:
        event_id, portfolio_id, _, payload = events[place - 1]
        if room[webhook_id] <= 0:
            telemetry.WEBHOOK_DELIVERIES.labels("dropped").inc()
            _log.warning("webhook_backlog_full", webhook=webhook_id, event_id=event_id)
            continue
        room[webhook_id] -= 1
        rows.append(_delivery_row(webhook_id, event_id, kinds[place - 1], portfolio_id, payload))
    return await _deliver(connection, rows)


async def record_threshold(connection: Connection, message: bytes, waiting_max: int = WAITING_COUNT_MAX) -> str:
    """Enqueue a crossing, as `threshold-events` carries it, in the caller's transaction; returns its event id.

    Raises msgspec.MsgspecError for what is no engine.thresholds.ThresholdMessage.
    """
    crossing = threshold_message_decoder.decode(message)
    event = (crossing.event_id, crossing.portfolio_id, WebhookKind.THRESHOLD_CROSSED.value, message)
    await enqueue(connection, [event], waiting_max)
    return crossing.event_id


def _delivery_row(
    webhook_id: str, event_id: str, kind: str, portfolio_id: str | None, payload: bytes
) -> tuple[str, str, str, str, str | None, bytes]:
    delivery_id = str(uuid_utils.uuid7())
    body = encode_body(
        Body(
            delivery_id=delivery_id,
            kind=kind,
            event_id=event_id,
            portfolio_id=portfolio_id,
            data=msgspec.Raw(payload),
        )
    )
    return (delivery_id, webhook_id, event_id, kind, portfolio_id, body)


async def _deliver(connection: Connection, rows: Sequence[tuple[str, str, str, str, str | None, bytes]]) -> int:
    if not rows:
        return 0
    written = await connection.execute(_DELIVER, *(list(column) for column in zip(*rows, strict=True)))
    count = int(written.rpartition(" ")[2])
    if count:
        await connection.execute(_NOTIFY)
        telemetry.WEBHOOK_DELIVERIES.labels("enqueued").inc(count)
    return count


# -- what a subject has ------------------------------------------------------------------------------------------


class Webhooks:
    """A subject's webhooks, as the API shows and changes them.

    Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away.
    """

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool

    async def create(
        self, owner: str, url: str, kinds: Sequence[WebhookKind], portfolio_ids: Sequence[str] | None, count_max: int
    ) -> tuple[Webhook, str]:
        """A new webhook and its secret, which is not told again. Raises TooManyWebhooks, UnknownPortfolio."""
        async with self._pool().acquire() as connection, connection.transaction():
            await connection.execute(_LOCK_OWNER, owner)
            if await connection.fetchval(_COUNT, owner) >= count_max:
                raise TooManyWebhooks
            await _check_owned(connection, owner, portfolio_ids)
            named = None if portfolio_ids is None else sorted(set(portfolio_ids))
            name = str(uuid_utils.uuid7())
            row = await connection.fetchrow(_CREATE, name, owner, url, _sorted(kinds), named)
            secret = make_secret()
            await connection.execute(_ADD_SECRET, name, secret)
        assert row is not None, "what was inserted is returned"
        return _webhook(row), secret

    async def update(self, changed: Webhook) -> Webhook | None:
        """Write all that can be changed; None when there is no such webhook of this owner. Raises UnknownPortfolio."""
        async with self._pool().acquire() as connection, connection.transaction():
            await _check_owned(connection, changed.owner, changed.portfolio_ids)
            named = None if changed.portfolio_ids is None else sorted(set(changed.portfolio_ids))
            values = changed.url, _sorted(changed.kinds), named, changed.active
            row = await connection.fetchrow(_UPDATE, changed.webhook_id, changed.owner, *values)
            await connection.execute(_NOTIFY)  # what waited while it was inactive is due
        return None if row is None else _webhook(row)

    async def delete(self, owner: str, webhook_id: str) -> bool:
        """Forget a webhook with its secrets, what waits for it, and its log; False when the owner has none such."""
        return await self._pool().fetchval(_DELETE, webhook_id, owner) is not None

    async def find(self, owner: str, webhook_id: str) -> Webhook | None:
        row = await self._pool().fetchrow(_FIND, webhook_id, owner)
        return None if row is None else _webhook(row)

    async def list(self, owner: str, count_max: int, after: str = "") -> Sequence[Webhook]:
        """At most `count_max` webhooks in the order of their ids, beginning after `after`."""
        return [_webhook(row) for row in await self._pool().fetch(_LIST, owner, after, count_max)]

    async def rotate(self, owner: str, webhook_id: str, overlap_s: int) -> tuple[str, datetime] | None:
        """A new secret, and until when the one before it signs too; None when the owner has no such webhook.

        Still older ones stop at once.
        """
        async with self._pool().acquire() as connection, connection.transaction():
            if await connection.fetchval(_LOCK, webhook_id, owner) is None:
                return None
            await connection.execute(_DROP_SECRETS, webhook_id)
            expires_at = await connection.fetchval(_RETIRE_SECRETS, webhook_id, overlap_s)
            secret = make_secret()
            await connection.execute(_ADD_SECRET, webhook_id, secret)
        return secret, expires_at

    async def test(
        self, owner: str, webhook_id: str, interval_s: int, waiting_max: int = WAITING_COUNT_MAX
    ) -> Delivery | None:
        """Have a test delivered; None when the owner has no such webhook. Raises TooManyTests."""
        async with self._pool().acquire() as connection, connection.transaction():
            if await connection.fetchval(_LOCK, webhook_id, owner) is None:
                return None
            waiting = await connection.fetch(_WAITING, [webhook_id], waiting_max)
            is_full = bool(waiting) and waiting[0][1] >= waiting_max
            if is_full or await connection.fetchval(_TEST, owner, interval_s) is None:
                raise TooManyTests
            row = _delivery_row(webhook_id, f"test/{uuid_utils.uuid7()}", TEST_KIND, None, b"null")
            await _deliver(connection, [row])
            logged = await connection.fetchrow(_LOGGED_ONE, row[0], ATTEMPTS_SHOWN_MAX)
        assert logged is not None, "it was inserted a moment ago"
        return _delivery(logged)

    async def deliveries(self, webhook_id: str, count_max: int, before: str | None = None) -> Sequence[Delivery]:
        """At most `count_max` deliveries with an id below `before`, newest first."""
        rows = await self._pool().fetch(_LOG, webhook_id, ATTEMPTS_SHOWN_MAX, before, count_max)
        return [_delivery(row) for row in rows]


def make_secret() -> str:
    return SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)


async def _check_owned(connection: Connection, owner: str, portfolio_ids: Sequence[str] | None) -> None:
    if portfolio_ids is not None:
        names = sorted(set(portfolio_ids))
        if await connection.fetchval(_OWNED, names, owner) != len(names):
            raise UnknownPortfolio


def _sorted(kinds: Sequence[WebhookKind]) -> Sequence[str]:
    return sorted({kind.value for kind in kinds})


def _webhook(row: asyncpg.Record) -> Webhook:
    webhook_id, owner, url, kinds, portfolio_ids, active, created_at = row
    return Webhook(webhook_id, owner, url, [WebhookKind(kind) for kind in kinds], portfolio_ids, active, created_at)


def _delivery(row: asyncpg.Record) -> Delivery:
    delivery_id, kind, event_id, portfolio_id, status, attempts_count, created_at, due_at, finished_at, attempts = row
    shown = [
        Attempt(number, at, duration_ms, status_code, None if error is None else AttemptError(error))
        for number, at, duration_ms, status_code, error in attempts
    ]
    return Delivery(
        delivery_id,
        kind,
        event_id,
        portfolio_id,
        DeliveryStatus(status),
        attempts_count,
        created_at,
        due_at,
        finished_at,
        shown,
    )
