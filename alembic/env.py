"""Alembic's environment: one connection, handed over by engine.stores.migrate or made from the settings."""

from __future__ import annotations

import asyncio

from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from alembic import context
from engine.runtime.settings import Settings
from engine.stores import badge_tables as badge_tables  # its tables join the metadata
from engine.stores import webhook_tables as webhook_tables
from engine.stores.migrate import async_url
from engine.stores.tables import metadata


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


async def run_from_settings() -> None:
    engine = create_async_engine(async_url(Settings().postgres_url))
    async with engine.connect() as connection:
        await connection.run_sync(run)
        await connection.commit()
    await engine.dispose()


handed_over = context.config.attributes.get("connection")
if handed_over is not None:
    run(handed_over)
else:
    asyncio.run(run_from_settings())
