"""The ledger of a portfolio as a file, oldest entry first, streamed in constant memory.

    CSV      RFC 4180 with a header; decimals plain and exact, instants RFC 3339 in UTC with six decimals, absent values
             empty, hashes in hexadecimal. A spreadsheet takes a text that begins with = + - or @ for a formula, so such
             a `reference` gets a ' before it; so does one that begins with ', and taking one ' off gives the original
    Parquet  the same columns: decimal128(38, 6) for money, decimal128(38, 12) for quantities and prices, timestamps in
             microseconds UTC, texts as they are; zstd

Every column that an entry's hash is made of is there, so a file can be verified by itself (engine.ledger.chain_hash),
as long as it has all entries. An export is one statement, so it is the ledger of one instant however long it takes.
PostgreSQL writes rows no faster than they are taken: what waits in between is a few hundred KiB, for Parquet a row
group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from typing import Any

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from engine.ledger import LedgerEntry
from engine.stores.ledger_selection import LedgerSelection, conditions

# Whoever takes longer is cut off: its snapshot keeps PostgreSQL from cleaning up.
EXPORT_DURATION_MAX_S = 3_600
CHUNK_BYTES = 128 * 1024
# Of CSV: about 25,000 entries, which as a row group take some tens of MiB to make.
ROW_GROUP_BYTES = 8 * 1024 * 1024

_MONEY = frozenset({"amount", "fee", "receivable", "realized", "cost", "nav_effect", "cash_after", "nav_before"})
_NUMBERS = frozenset({"quantity", "price"})
_INSTANTS = frozenset({"effective_at", "recorded_at"})
_HASHES = frozenset({"content_hash", "hash"})

Write = Callable[[bytes], Awaitable[None]]
Connection = asyncpg.Connection | PoolConnectionProxy


class ExportFormat(StrEnum):
    CSV = "csv"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What to export, and how."""

    portfolio_id: str
    selection: LedgerSelection
    file_format: ExportFormat


async def count_entries(connection: Connection, plan: ExportPlan) -> int:
    """How many entries the export will have, as of now."""
    chosen, arguments = conditions(plan.selection, first=2)
    query = f"SELECT count(*) FROM ledger_entry WHERE portfolio_id = $1{chosen}"  # noqa: S608
    return int(await connection.fetchval(query, plan.portfolio_id, *arguments))


async def export_ledger(
    connection: Connection, plan: ExportPlan, write: Write, progress: Callable[[int], None] | None = None
) -> int:
    """Hand the file to `write` piece by piece, how many entries are done to `progress`; returns their number.

    The connection is busy meanwhile, and free again when this ends, also by cancellation or by an error of `write`.
    Raises what asyncpg raises when PostgreSQL is away, TimeoutError after EXPORT_DURATION_MAX_S.
    """
    is_csv = plan.file_format is ExportFormat.CSV
    sink = _Chunks(write) if is_csv else _RowGroups(write)
    lines_count = 0

    async def take(data: bytes) -> None:
        nonlocal lines_count
        await sink.take(data)
        lines_count += data.count(b"\n")
        if progress is not None:
            progress(lines_count - 1)

    chosen, arguments = conditions(plan.selection, first=2)
    query = f"""
        SELECT {", ".join(_column(name, guarded=is_csv) for name in LedgerEntry.__struct_fields__)}
        FROM ledger_entry WHERE portfolio_id = $1{chosen} ORDER BY sequence
    """  # noqa: S608
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute(f"SET LOCAL statement_timeout = '{EXPORT_DURATION_MAX_S}s'")
        status = await connection.copy_from_query(
            query,
            plan.portfolio_id,
            *arguments,
            output=take,
            timeout=EXPORT_DURATION_MAX_S,
            format="csv",
            header=True,
        )
    await sink.finish()
    return int(status.split()[-1])


class _Chunks:
    """CSV as it comes, in pieces of a size worth sending."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    async def take(self, data: bytes) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= CHUNK_BYTES:
            await self.finish()

    async def finish(self) -> None:
        data, self._waiting, self._waiting_bytes = b"".join(self._waiting), [], 0
        if data:
            await self._write(data)


class _RowGroups:
    """Parquet from CSV, a row group at a time; the work is done in a thread, because it takes the loop's time."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._waiting = bytearray()
        self._parquet: _Parquet | None = None

    async def take(self, data: bytes) -> None:
        self._waiting += data
        if len(self._waiting) >= ROW_GROUP_BYTES:
            end = self._waiting.rindex(b"\n") + 1  # no text of the ledger contains one
            rows, self._waiting = bytes(self._waiting[:end]), self._waiting[end:]
            await self._add(rows)

    async def finish(self) -> None:
        await self._add(bytes(self._waiting))
        self._waiting.clear()
        assert self._parquet is not None
        await self._write(await asyncio.to_thread(self._parquet.close))

    async def _add(self, rows: bytes) -> None:
        if self._parquet is None:
            self._parquet = await asyncio.to_thread(_Parquet)
        await self._write(await asyncio.to_thread(self._parquet.add, rows))


class _Outlet(BytesIO):
    """A file that forgets what was taken from it: Parquet is written from its beginning to its end."""

    def __init__(self) -> None:
        super().__init__()
        self._taken_bytes = 0

    def tell(self) -> int:
        return self._taken_bytes + super().tell()

    def drain(self) -> bytes:
        data = self.getvalue()
        self._taken_bytes += len(data)
        self.seek(0)
        self.truncate()
        return data


class _Parquet:
    """The first rows begin with the CSV header."""

    def __init__(self) -> None:
        # Half a second and 60 MiB that only an export is to pay.
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        self._csv = pyarrow.csv
        self._types = {name: _parquet_type(pyarrow, name) for name in LedgerEntry.__struct_fields__}
        self._outlet = _Outlet()
        schema = pyarrow.schema(list(self._types.items()))
        self._writer = pyarrow.parquet.ParquetWriter(self._outlet, schema, compression="zstd")
        self._header = True

    def add(self, rows: bytes) -> bytes:
        """The bytes of a row group of these rows; none, perhaps, of no rows."""
        names = None if self._header else list(self._types)
        self._header = False
        if rows:
            table = self._csv.read_csv(
                BytesIO(rows),
                read_options=self._csv.ReadOptions(column_names=names, block_size=2 * ROW_GROUP_BYTES),
                convert_options=self._csv.ConvertOptions(
                    column_types=self._types,
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                    null_values=[""],
                ),
            )
            if table.num_rows:
                self._writer.write_table(table)
        return self._outlet.drain()

    def close(self) -> bytes:
        """The bytes that end the file."""
        self._writer.close()
        return self._outlet.drain()


def _column(name: str, guarded: bool) -> str:
    """An SQL expression whose text is the column's in CSV."""
    if name in _MONEY or name in _NUMBERS:
        return f"trim_scale({name}) AS {name}"
    if name in _INSTANTS:
        return f"""to_char({name} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS {name}"""
    if name in _HASHES:
        return f"encode({name}, 'hex') AS {name}"
    if name == "late":
        return "late::text AS late"
    if name == "reference" and guarded:
        return "CASE WHEN reference ~ '^[=+@''-]' THEN '''' || reference ELSE reference END AS reference"
    return name


def _parquet_type(pyarrow: Any, name: str) -> Any:
    if name in _MONEY:
        return pyarrow.decimal128(38, 6)
    if name in _NUMBERS:
        return pyarrow.decimal128(38, 12)
    if name in _INSTANTS:
        return pyarrow.timestamp("us", tz="UTC")
    if name == "sequence":
        return pyarrow.int64()
    return pyarrow.bool_() if name == "late" else pyarrow.string()
