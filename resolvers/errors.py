"""Errors that a client may see. Each carries `extensions.code`; anything else is masked before it leaves.

A portfolio that is somebody else's is NOT_FOUND exactly like one that does not exist: an error must not tell which
ids are taken. The rules that an event breaks keep the code of engine.messages.EventRejected.
"""

from __future__ import annotations

from enum import StrEnum

import asyncpg
from aiokafka.errors import KafkaError
from redis.exceptions import AskError, ClusterError, RedisClusterException, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError


class ErrorCode(StrEnum):
    UNAUTHENTICATED = "UNAUTHENTICATED"  # no token where one is needed
    FORBIDDEN = "FORBIDDEN"  # the token lacks the scope
    NOT_FOUND = "NOT_FOUND"  # does not exist, or is somebody else's
    NOT_READY = "NOT_READY"  # the portfolio is booked, its first mark is not there yet
    ALREADY_EXISTS = "ALREADY_EXISTS"  # the portfolio id is taken
    PAGE_SIZE = "PAGE_SIZE"  # `first` is out of range
    BAD_CURSOR = "BAD_CURSOR"  # `after` is not a cursor of this field
    BAD_RATE = "BAD_RATE"  # `maxRateHz` is out of range
    BAD_POINTS = "BAD_POINTS"  # `maxPoints` is out of range
    BAD_FILTER = "BAD_FILTER"  # a filter of the ledger that contradicts itself, or has what can not be read
    LOTS_TOO_LONG = "LOTS_TOO_LONG"  # a position has more entries than its lots are made from
    TOO_MANY_EXPORTS = "TOO_MANY_EXPORTS"  # worth another try
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    BAD_SPAN = "BAD_SPAN"  # `from` is not before `to`
    AS_OF_BEFORE_OPENING = "AS_OF_BEFORE_OPENING"  # the instant is before the portfolio's openedAt
    AS_OF_IN_FUTURE = "AS_OF_IN_FUTURE"
    AS_OF_UNSUPPORTED = "AS_OF_UNSUPPORTED"  # the field has no past state of its own
    TOO_MANY_SYMBOLS = "TOO_MANY_SYMBOLS"
    BAD_IDENTIFIER = "BAD_IDENTIFIER"
    BAD_URL = "BAD_URL"  # none that a webhook may have, or its host is not public
    NO_KINDS = "NO_KINDS"  # a webhook that would be told of nothing
    BAD_OVERLAP = "BAD_OVERLAP"  # `overlapS` is out of range
    TOO_MANY_WEBHOOKS = "TOO_MANY_WEBHOOKS"
    TOO_MANY_PORTFOLIOS = "TOO_MANY_PORTFOLIOS"
    TOO_MANY_THRESHOLDS = "TOO_MANY_THRESHOLDS"
    TOO_MANY_TESTS = "TOO_MANY_TESTS"  # of one webhook, at short intervals; worth another try
    UNAVAILABLE = "UNAVAILABLE"  # Redis, PostgreSQL or Kafka is away or too slow; worth another try
    INTERNAL = "INTERNAL"  # a defect; the log has it under the request id


class PublicError(Exception):
    """An error whose message and code are meant for the client."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        # graphql-core copies this attribute of an original error into the answer.
        self.extensions = {"code": str(code)}


# What a dependency that is away, starting, restarting or overloaded raises. Everything else is a defect.
AWAY: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    RedisConnectionError,
    RedisTimeoutError,
    RedisClusterException,
    ClusterError,
    AskError,
    TryAgainError,
    KafkaError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.QueryCanceledError,
)


def not_found(what: str) -> PublicError:
    return PublicError(ErrorCode.NOT_FOUND, f"no such {what}")
