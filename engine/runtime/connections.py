"""Connections that carry their process's name, give up in time, and are retried where it can be seen.

Every client is made here, from settings, by the composition root or worker that owns it and closes it. No
client waits for ever: a frozen server costs at most the named timeout plus one retry, and what happens next
is decided by the caller, not hidden in a library.

`Backoff`, `Outage` and `wait_until` are our own few lines rather than a retry library's: a wait has to end at
once when the process is asked to stop, and a dependency that stays away has to cost one log line, not one per
attempt.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import asyncpg
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from redis.asyncio import Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisClusterException, RedisError
from redis.maint_notifications import MaintNotificationsConfig
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from engine.runtime.redis_cluster import ClusterClient, is_cluster
from engine.runtime.settings import Settings

# What a dependency that is away, starting or restarting raises. Anything else is a defect and is not retried.
AWAY: tuple[type[Exception], ...] = (
    OSError,
    TimeoutError,
    RedisError,
    RedisClusterException,
    KafkaError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    SQLAlchemyError,
)

# A server's client or a cluster's: the same commands, of keys that share a slot.
RedisClient = Redis | ClusterClient

CHECK_TIMEOUT_S = 10  # one attempt of `wait_until`: longer than any healthy server takes to answer a ping
CLOSE_TIMEOUT_S = 1
REDIS_RETRIES_COUNT_MAX = 1  # covers the connection that an idle server closed; more would hide an outage
REDIS_RETRY_DELAY_MS = 50
# What comes between two turns of a busy loop is read at once: frames that wait for their turn one by one grow old, and
# asyncio's own limit is a twentieth of a second of them. Answers are shorter.
READ_AHEAD_BYTES = 16 * 1024 * 1024
KAFKA_LINGER_MS = 5  # a batch waits this long for company; unseen beside the acknowledgement's own latency
KAFKA_TIMEOUT_MS = 10_000

_log = structlog.get_logger(__name__)


class Backoff:
    """Delays that double from `first_ms` up to `longest_ms`, each shortened at random by up to a half.

    The jitter keeps N processes that lost the same server from coming back in step.
    """

    def __init__(self, first_ms: int = 100, longest_ms: int = 5_000) -> None:
        self._first_ms = first_ms
        self._longest_ms = longest_ms
        self._next_ms = first_ms

    def next_s(self) -> float:
        delay_ms = random.uniform(self._next_ms / 2, self._next_ms)
        self._next_ms = min(self._longest_ms, self._next_ms * 2)
        return delay_ms / 1_000

    def reset(self) -> None:
        self._next_ms = self._first_ms


class Outage:
    """One dependency's absences: a line in the log when one begins, one when it ends, delays in between."""

    def __init__(self, dependency: str) -> None:
        self._dependency = dependency
        self._backoff = Backoff()
        self._reason = ""

    def begin_or_continue(self, error: Exception) -> float:
        """Note a failed attempt; answers how many seconds to wait before the next one."""
        reason = type(error).__name__
        if self._reason != reason:
            _log.warning("dependency_away", dependency=self._dependency, reason=reason, detail=str(error)[:200])
        self._reason = reason
        return self._backoff.next_s()

    def end(self) -> None:
        """Note a success; costs nothing where there was no outage."""
        if self._reason:
            _log.info("dependency_back", dependency=self._dependency)
            self._reason = ""
            self._backoff.reset()


async def stopped_within(stop: asyncio.Event, delay_s: float) -> bool:
    """Wait `delay_s` or until `stop` is set, whichever is first; True when it is set."""
    try:
        async with asyncio.timeout(delay_s):
            await stop.wait()
    except TimeoutError:
        return stop.is_set()
    return True


async def wait_until(dependency: str, check: Callable[[], Awaitable[object]], stop: asyncio.Event) -> bool:
    """Call `check` until it raises none of AWAY; True then, False when `stop` was set before.

    Every attempt has CHECK_TIMEOUT_S. What else `check` raises is raised.
    """
    outage = Outage(dependency)
    while not stop.is_set():
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await check()
        except AWAY as error:
            await stopped_within(stop, outage.begin_or_continue(error))
        else:
            outage.end()
            return True
    return False


class _Cancellable(AbstractConnection):
    """A connection in whose commands a cancellation is never lost.

    redis-py sends through `asyncio.wait_for`, and that of Python 3.11 drops a cancellation that comes when the
    send has just finished: the task would go on as if nobody had asked it to end. The task's own count of
    requests tells. The command's answer is then still to come, so the connection can not be used again.
    """

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        task = asyncio.current_task()
        requests_count = task.cancelling() if task else 0
        await super().send_packed_command(command, check_health)
        if task is not None and task.cancelling() > requests_count:
            await self.disconnect(nowait=True)
            raise asyncio.CancelledError


class _TcpConnection(_Cancellable, Connection):
    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "limit": READ_AHEAD_BYTES}


class _TlsConnection(_Cancellable, SSLConnection):
    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "limit": READ_AHEAD_BYTES}


class _UnixConnection(_Cancellable, UnixDomainSocketConnection):
    pass


_CANCELLABLE: dict[type[AbstractConnection], type[AbstractConnection]] = {
    Connection: _TcpConnection,
    SSLConnection: _TlsConnection,
    UnixDomainSocketConnection: _UnixConnection,
}


def connect_redis(settings: Settings, role: str) -> RedisClient:
    """A client named `navstream-<role>`, answering bytes. Connects on first use; close it with `aclose()`.

    Of a server, or of a cluster where the URL says redis+cluster:// and names any of its nodes. Raises ValueError for
    a bad URL. Who listens to channels takes an engine.runtime.subscriber.
    """
    options: dict[str, Any] = {
        "protocol": 3,
        "client_name": f"navstream-{role}",
        "socket_timeout": settings.redis_timeout_s,
        "socket_connect_timeout": settings.redis_timeout_s,
        "retry": Retry(ConstantBackoff(REDIS_RETRY_DELAY_MS / 1_000), REDIS_RETRIES_COUNT_MAX),
        # These notifications stretch timeouts during a managed server's maintenance; ours are to hold always.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    if is_cluster(settings.redis_url):
        return ClusterClient(settings.redis_url, _CANCELLABLE, **options)
    client = Redis.from_url(settings.redis_url, **options)
    pool = client.connection_pool
    pool.connection_class = _CANCELLABLE[pool.connection_class]
    return client


async def close_in_time(client: RedisClient) -> None:
    """Close, unless that takes too long: a frozen server must not hold its client up."""
    with suppress(*AWAY):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await client.aclose()


async def run_script(redis: RedisClient, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
    """Sent whole, not by its hash: a node that does not know one would have to be taught together with all others, also
    those that are away."""
    answer = redis.execute_command("EVAL", script, len(keys), *keys, *arguments)  # type: ignore[no-untyped-call]
    return await answer


def node_name(redis: RedisClient, key: str) -> str:
    """The name of the node that has the key, as far as is known; on a single server always the same."""
    return redis.node_name(key) if isinstance(redis, ClusterClient) else ""


async def connect_postgres(settings: Settings, role: str, stateless: bool = False) -> asyncpg.Pool:
    """A pool of at most `postgres_pool_size` connections. Raises OSError, asyncpg.PostgresError when it is
    away.

    `command_timeout` ends the wait on our side; `statement_timeout` and its siblings end the work on the
    server's, so that a vanished process does not leave a lock behind. `stateless`: nobody changes a connection's
    session (settings, locks beyond a transaction, LISTEN), so it is given back without a round trip to reset it.
    """
    timeout_ms = str(settings.postgres_timeout_s * 1_000)
    return await asyncpg.create_pool(
        postgres_dsn(settings.postgres_url),
        min_size=1,
        max_size=settings.postgres_pool_size,
        timeout=settings.postgres_timeout_s,
        command_timeout=settings.postgres_timeout_s,
        reset=_nothing_to_reset if stateless else None,
        server_settings={
            "application_name": f"navstream-{role}",
            "statement_timeout": timeout_ms,
            "lock_timeout": timeout_ms,
            "idle_in_transaction_session_timeout": timeout_ms,
        },
    )


async def _nothing_to_reset(_: asyncpg.Connection) -> None:
    """asyncpg has rolled back what was left open."""


def make_engine(settings: Settings, role: str, idle_timeout_ms: int | None = None) -> AsyncEngine:
    """A SQLAlchemy engine over asyncpg with the same limits as `connect_postgres`; connects on first use.

    `idle_timeout_ms`: how long a transaction may wait for its process, if that is to be shorter.
    """
    timeout_ms = str(settings.postgres_timeout_s * 1_000)
    return create_async_engine(
        postgres_dsn(settings.postgres_url).replace("postgresql://", "postgresql+asyncpg://", 1),
        pool_size=settings.postgres_pool_size,
        max_overflow=0,
        pool_timeout=settings.postgres_timeout_s,
        pool_pre_ping=True,
        connect_args={
            "timeout": settings.postgres_timeout_s,
            "command_timeout": settings.postgres_timeout_s,
            "server_settings": {
                "application_name": f"navstream-{role}",
                "lock_timeout": timeout_ms,
                "idle_in_transaction_session_timeout": str(idle_timeout_ms or timeout_ms),
            },
        },
    )


def postgres_dsn(postgres_url: str) -> str:
    """asyncpg's spelling of a PostgreSQL URL, which knows no SQLAlchemy driver suffix."""
    scheme, separator, rest = postgres_url.partition("://")
    if not separator or scheme not in ("postgresql", "postgres", "postgresql+asyncpg"):
        raise ValueError("a PostgreSQL URL begins with postgresql://")
    return f"postgresql://{rest}"


def make_producer(settings: Settings, role: str) -> AIOKafkaProducer:
    """An idempotent producer, not started: a retry inside it never duplicates or reorders an event.

    Its default partitioner is Kafka's murmur2, which places portfolios on shards. Needs a running loop.
    """
    return AIOKafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap,
        client_id=f"navstream-{role}",
        enable_idempotence=True,
        acks="all",
        linger_ms=KAFKA_LINGER_MS,
        request_timeout_ms=KAFKA_TIMEOUT_MS,
    )
