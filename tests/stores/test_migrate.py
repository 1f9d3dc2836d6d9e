"""Migrations: N processes that start together, a schema from zero that is the one the program writes to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from engine.runtime.connections import postgres_dsn
from engine.stores import badge_tables as badge_tables
from engine.stores import webhook_tables as webhook_tables
from engine.stores.migrate import async_url, upgrade
from engine.stores.tables import metadata
from tests.conftest import create_database, drop_database

TIMESCALE_URL = os.environ.get("NAVSTREAM_TEST_TIMESCALE_URL", "")


@pytest.fixture
def new_database(postgres_url: str) -> Iterator[str]:
    url = create_database(postgres_url)
    yield url
    drop_database(postgres_url, url)


async def test_processes_that_start_together_migrate_once_and_none_fails(new_database: str) -> None:
    await asyncio.gather(*(upgrade(new_database) for _ in range(6)))
    connection = await asyncpg.connect(postgres_dsn(new_database))
    assert len(await connection.fetch("SELECT version_num FROM alembic_version")) == 1
    assert await connection.fetchval("SELECT count(*) FROM ledger_entry") == 0
    await connection.close()


async def test_a_database_that_is_up_to_date_is_left_alone(database: str) -> None:
    connection = await asyncpg.connect(postgres_dsn(database))
    await connection.execute("INSERT INTO asset VALUES ('A', 'A', 'EQUITY', 'S', '')")
    await upgrade(database)
    assert await connection.fetchval("SELECT count(*) FROM asset") == 1
    await connection.execute("DELETE FROM asset")
    await connection.close()


async def test_the_schema_from_zero_is_the_one_that_the_tables_module_says(database: str) -> None:
    differences, constraints = await on(database, compare)
    assert differences == []
    assert constraints == {
        (table.name, constraint.name)
        for table in metadata.tables.values()
        for constraint in table.constraints
        if type(constraint).__name__ == "CheckConstraint"
    }


def compare(connection: Connection) -> tuple[list[object], set[tuple[str, str]]]:
    """Alembic's own comparison, and the check constraints, which it leaves out."""
    options = {"compare_type": True, "compare_server_default": True}
    differences = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    inspector = inspect(connection)
    checks = {
        (table, str(check["name"])) for table in metadata.tables for check in inspector.get_check_constraints(table)
    }
    return differences, checks


async def on(url: str, work):  # type: ignore[no-untyped-def]
    engine = create_async_engine(async_url(url), poolclass=NullPool)
    async with engine.connect() as connection:
        answer = await connection.run_sync(work)
    await engine.dispose()
    return answer


@pytest.mark.parametrize("url", ["", "mysql://host/db", "postgresql"])
def test_a_url_that_is_not_postgresqls_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="begins with postgresql://"):
        async_url(url)


@pytest.mark.timescale
async def test_with_timescaledb_equity_snapshots_are_a_hypertable() -> None:
    if not TIMESCALE_URL:
        pytest.skip("NAVSTREAM_TEST_TIMESCALE_URL names no PostgreSQL server with the timescaledb extension")
    url = create_database(TIMESCALE_URL)
    try:
        await upgrade(url)
        connection = await asyncpg.connect(postgres_dsn(url))
        names = await connection.fetch("SELECT hypertable_name FROM timescaledb_information.hypertables")
        await connection.close()
    finally:
        drop_database(TIMESCALE_URL, url)
    assert sorted(row["hypertable_name"] for row in names) == ["equity_snapshot", "price_close"]


async def test_without_timescaledb_equity_snapshots_are_a_plain_table_of_the_same_name(database: str) -> None:
    connection = await asyncpg.connect(postgres_dsn(database))
    if await connection.fetchval("SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb'"):
        pytest.skip("this server has the timescaledb extension")
    kind = await connection.fetchval("SELECT relkind::text FROM pg_class WHERE relname = 'equity_snapshot'")
    await connection.close()
    assert kind == "r"
