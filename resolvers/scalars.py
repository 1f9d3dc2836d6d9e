"""Decimal and DateTime as they travel: always text, so that no client's float or time zone can alter them.

Decimal   plain decimal text ("10297", "-0.5"): no exponent, no trailing zeros, no NaN. A JSON number is refused on
          the way in, because it has passed through somebody's double already.
DateTime  RFC 3339 in UTC with the suffix Z; on the way in any offset is taken, a missing one is refused.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

import strawberry
from graphql import GraphQLError
from strawberry.types.scalar import ScalarDefinition

from engine.amounts import TEXT_LENGTH_MAX, plain

INSTANTS_COUNT_MAX = 20_000
EXPONENT_MAX = 64  # "1e999999999" is short to send and takes gigabytes to write out


def write_decimal(value: object) -> str:
    if not isinstance(value, Decimal):
        raise TypeError(f"a Decimal is expected, not {type(value).__name__}")
    return plain(value)


class ScalarError(GraphQLError, ValueError):
    """Text that is no such scalar; in an operation it is an error of validation, also as a literal."""


def read_decimal(value: object) -> Decimal:
    """Raises ScalarError, which is reported as an error of the argument."""
    if not isinstance(value, str):
        raise ScalarError("a Decimal is sent as a string")
    if not value or len(value) > TEXT_LENGTH_MAX or not value.isascii() or "_" in value or value != value.strip():
        raise ScalarError("not a decimal number")
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise ScalarError("not a decimal number") from None
    if not number.is_finite() or abs(number.adjusted()) > EXPONENT_MAX:
        raise ScalarError("not a finite decimal number of usual size")
    return number


def write_instant(value: object) -> str:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise TypeError("an aware datetime is expected")
    return _instant_text(value)


# The hours of a curve are the same for every portfolio, and a mark's instant for every stream of its shard.
@lru_cache(maxsize=INSTANTS_COUNT_MAX)
def _instant_text(instant: datetime) -> str:
    text = instant.astimezone(UTC).isoformat()
    return text[:-6] + "Z"  # "+00:00" has six characters


def read_instant(value: object) -> datetime:
    """Raises ScalarError, which is reported as an error of the argument."""
    if not isinstance(value, str) or len(value) > TEXT_LENGTH_MAX:
        raise ScalarError("a DateTime is sent as a string")
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        raise ScalarError("not an RFC 3339 date and time") from None
    if instant.tzinfo is None:
        raise ScalarError("a DateTime needs an offset, for example Z")
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        raise ScalarError("a DateTime out of range") from None


SCALARS: dict[Any, ScalarDefinition] = {
    Decimal: strawberry.scalar(
        name="Decimal",
        description="An exact decimal number, as a string: plain digits, no exponent, never a JSON number.",
        serialize=write_decimal,
        parse_value=read_decimal,
    ),
    datetime: strawberry.scalar(
        name="DateTime",
        description="An instant as RFC 3339 text in UTC, for example 2026-11-22T10:15:30.123456Z.",
        specified_by_url="https://www.rfc-editor.org/rfc/rfc3339",
        serialize=write_instant,
        parse_value=read_instant,
    ),
}
