"""What `navstream ledger` does: write a portfolio's ledger to a file, and prove that nobody changed any.

A file is written beside its place and moved there when it is whole, so that one cut short is never taken for it. What
is there and no file (a pipe, a device) is written to.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from asyncpg.pool import PoolConnectionProxy

from engine.runtime.connections import connect_postgres
from engine.runtime.settings import Settings
from engine.stores.ledger_chain import Fault, Verified, verify_ledger
from engine.stores.ledger_export import ExportPlan, count_entries, export_ledger

STANDARD_OUTPUT = Path("-")
_PORTFOLIO = "SELECT EXISTS (SELECT FROM portfolio WHERE id = $1)"
_PORTFOLIOS = "SELECT count(*) FROM portfolio"

# How much is done, and of how much.
Progress = Callable[[int, int], None]


class OutputError(Exception):
    """The file can not be written; the message says why."""


async def export_file(settings: Settings, plan: ExportPlan, output: Path, progress: Progress) -> int:
    """Write the ledger to `output`, "-" being standard output; returns the number of entries.

    Raises KeyError for a portfolio that does not exist, OutputError, and what asyncpg raises when PostgreSQL is away.
    """
    async with _connection(settings, "ledger-export") as connection:
        if not await connection.fetchval(_PORTFOLIO, plan.portfolio_id):
            raise KeyError(plan.portfolio_id)
        total = await count_entries(connection, plan)
        progress(0, total)
        with _writing(output) as file:

            async def write(data: bytes) -> None:
                try:
                    # A full disk or a slow pipe must not stop the loop that PostgreSQL is read by.
                    await asyncio.to_thread(_write_all, file, data)
                except OSError as error:
                    raise OutputError(f"{output}: {error.strerror}") from error

            return await export_ledger(connection, plan, write, lambda rows: progress(rows, total))


def _write_all(file: BinaryIO | FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    file.flush()


@contextmanager
def _writing(output: Path) -> Iterator[BinaryIO | FileIO]:
    """A file that takes its place when it is whole. Raises OutputError."""
    if output == STANDARD_OUTPUT:
        yield sys.stdout.buffer
        return
    in_place = output.exists() and not output.is_file()
    partial = output if in_place else output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        # Unbuffered, so that what can not be written is said by the write and not by the end.
        with partial.open("wb", buffering=0) as file:
            yield file
        if not in_place:
            partial.replace(output)
    except OSError as error:
        if error.filename is None:
            raise  # not about the file
        raise OutputError(f"{output}: {error.strerror}") from error
    finally:
        if not in_place:
            partial.unlink(missing_ok=True)


async def verify_chains(
    settings: Settings, portfolio_id: str | None, report: Callable[[Fault], None], progress: Progress
) -> Verified:
    """Check the hash chain of one portfolio, or of all. Raises KeyError for one that does not exist."""
    async with _connection(settings, "ledger-verify") as connection:
        total = await connection.fetchval(_PORTFOLIOS) if portfolio_id is None else 1
        return await verify_ledger(
            connection, portfolio_id, report, lambda verified: progress(verified.portfolios_count, total)
        )


@asynccontextmanager
async def _connection(settings: Settings, role: str) -> AsyncIterator[PoolConnectionProxy]:
    pool = await connect_postgres(settings.model_copy(update={"postgres_pool_size": 1}), role)
    try:
        async with pool.acquire() as connection:
            yield connection
    finally:
        pool.terminate()
