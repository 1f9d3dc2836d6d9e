"""Rows by COPY against the same rows as objects, and what is not a record."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from engine.stores import copied_rows
from engine.stores.copied_rows import copy_rows

_ROWS = """
    SELECT n::integer, n * 10000000000000::bigint - 7, n::float8 / 3,
        timestamptz '2026-11-20T10:00:00.000001Z' + n * interval '1 s'
    FROM generate_series(-$1::integer, $1) AS n
"""
_COLUMNS = {"small": "i4", "large": "i8", "real": "f8", "at_us": "i8"}


@pytest.fixture
async def connection(fresh_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(fresh_database)
    yield connection
    await connection.close()


@pytest.mark.parametrize("parsed_bytes", [1, 19, 1_000, 4 * 1024 * 1024])
async def test_rows_are_those_of_the_query(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, parsed_bytes: int
) -> None:
    """However they are cut into pieces on the way."""
    monkeypatch.setattr(copied_rows, "PARSED_BYTES", parsed_bytes)
    expected = await connection.fetch(_ROWS, 3_000)
    rows = await copy_rows(connection, _ROWS, 3_000, columns=_COLUMNS)
    begin = datetime(2000, 1, 1, tzinfo=UTC)
    found = [(small, large, real, begin + timedelta(microseconds=at)) for small, large, real, at in rows.tolist()]
    assert found == [tuple(row) for row in expected]
    assert rows.dtype.names == tuple(_COLUMNS)


async def test_no_rows_are_an_empty_array_of_the_columns(connection: asyncpg.Connection) -> None:
    rows = await copy_rows(connection, "SELECT 1::integer WHERE false", columns={"one": "i4"})
    assert (len(rows), rows.dtype.names) == (0, ("one",))


async def test_arrays_are_taken_as_arguments(connection: asyncpg.Connection) -> None:
    query = "SELECT length(name)::integer FROM unnest($1::text[]) WITH ORDINALITY AS of (name, place) ORDER BY place"
    rows = await copy_rows(connection, query, ["a", "it's", 'say "x", {y}\\'], columns={"length": "i4"})
    assert rows["length"].tolist() == [1, 4, 13]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT NULL::integer, 1::bigint",
        "SELECT 1::bigint, 1::bigint",
        "SELECT 1::integer",
        "SELECT 1::integer, 1::bigint, 1::integer",
        "SELECT CASE WHEN n <> 7 THEN n::integer END, n::bigint FROM generate_series(1, 20) AS n",
    ],
)
async def test_what_is_not_a_record_of_the_columns_is_refused(connection: asyncpg.Connection, query: str) -> None:
    with pytest.raises(ValueError, match="copy"):
        await copy_rows(connection, query, columns={"small": "i4", "large": "i8"})
    assert await connection.fetchval("SELECT 1") == 1


async def test_rows_may_take_longer_than_anything_else(fresh_database: str) -> None:
    impatient = await asyncpg.connect(fresh_database, command_timeout=0.2)
    rows = await copy_rows(impatient, "SELECT 1::integer FROM pg_sleep($1)", 0.6, columns={"one": "i4"})
    assert rows["one"].tolist() == [1]
    await impatient.close()
