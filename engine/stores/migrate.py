"""Bring a database to the newest schema. N processes may start together: one migrates, the others wait.

The wait is a PostgreSQL advisory lock held by the migrating connection, so it ends with it.
"""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from alembic import command

MIGRATION_LOCK = 7_210_514_239  # any constant that no other program on the database uses
_ROOT = Path(__file__).resolve().parents[2]


def async_url(postgres_url: str) -> str:
    """SQLAlchemy's spelling of a postgresql:// URL, with asyncpg as the driver."""
    scheme, separator, rest = postgres_url.partition("://")
    if not separator or scheme not in ("postgresql", "postgres", "postgresql+asyncpg"):
        raise ValueError("a PostgreSQL URL begins with postgresql://")
    return f"postgresql+asyncpg://{rest}"


async def upgrade(postgres_url: str) -> None:
    """Run all missing migrations. Raises sqlalchemy.exc.DBAPIError, OSError when the server is not there."""
    engine = create_async_engine(async_url(postgres_url), poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
            await connection.run_sync(_upgrade)
            await connection.commit()
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(_ROOT / "alembic"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
