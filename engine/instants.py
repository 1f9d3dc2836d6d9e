"""Instants as nanoseconds since 1970, UTC, and as aware datetimes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

SECOND_NS = 1_000_000_000
HOUR_NS = 3_600 * SECOND_NS
DAY_NS = 24 * HOUR_NS

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_datetime(ns: int) -> datetime:
    """In UTC, whole microseconds downwards."""
    return _EPOCH + timedelta(microseconds=ns // 1_000)


def to_ns(instant: datetime) -> int:
    """Of an aware datetime, exactly."""
    delta = instant - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * SECOND_NS + delta.microseconds * 1_000
