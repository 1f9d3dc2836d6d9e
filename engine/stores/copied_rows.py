"""Rows of a query as one numpy record array: COPY in binary, without an object per row or value.

    signature (11) | flags int32 | extension length int32, extension
    each row: fields int16, then each field: length int32, bytes        big-endian
    trailer: int16 −1                                                    (PostgreSQL manual, COPY, Binary Format)

Columns have a fixed width (int4, int8, float8, timestamptz as int8 microseconds since 2000) and no NULL, so that a row
is a record; whatever is not laid out like that raises ValueError. What has arrived is parsed every PARSED_BYTES, so
that memory holds the arrays and little else.
"""

from __future__ import annotations

from collections.abc import Mapping

import asyncpg
import numpy as np
from asyncpg.pool import PoolConnectionProxy
from numpy.typing import NDArray

Connection = asyncpg.Connection | PoolConnectionProxy
Rows = NDArray[np.void]

# A shard of a million portfolios is read in one piece: longer than anything else may wait for an answer.
READ_TIMEOUT_S = 120.0
PARSED_BYTES = 4 * 1024 * 1024  # some 70,000 rows of a position
_SIGNATURE = b"PGCOPY\n\xff\r\n\x00"
_HEADER_BYTES = len(_SIGNATURE) + 8
_TRAILER = b"\xff\xff"


async def copy_rows(driver: Connection, query: str, *arguments: object, columns: Mapping[str, str]) -> Rows:
    """The rows of a query in the transaction that is under way; `columns` names the fields, in order, with their numpy
    types (i4, i8, f8)."""
    taken = _Taken(columns)
    await driver.copy_from_query(query, *arguments, output=taken.add, format="binary", timeout=READ_TIMEOUT_S)
    return taken.end()


class _Taken:
    """What has arrived so far."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._row = np.dtype(
            [("fields", ">i2")]
            + [field for name, kind in columns.items() for field in ((f"{name} bytes", ">i4"), (name, f">{kind}"))]
        )
        self._columns = tuple(columns)
        self._kept = np.dtype(list(columns.items()))
        self._parts: list[Rows] = []
        self._waiting = bytearray()
        self._has_begun = False

    async def add(self, data: bytes) -> None:
        self._waiting += data
        if len(self._waiting) >= PARSED_BYTES:
            self._parse(len(self._waiting) - len(_TRAILER))

    def end(self) -> Rows:
        if self._waiting[-len(_TRAILER) :] != _TRAILER:
            raise ValueError("the copy ended without its trailer")
        left = self._parse(len(self._waiting) - len(_TRAILER))
        if left != len(_TRAILER):
            raise ValueError("a row of the copy is not as wide as its columns are")
        return np.concatenate(self._parts) if self._parts else np.zeros(0, self._kept)

    def _parse(self, end: int) -> int:
        """Take the whole rows up to a place; returns how much is left, the rest behind it included."""
        if not self._has_begun:
            extension = int.from_bytes(self._waiting[_HEADER_BYTES - 4 : _HEADER_BYTES], "big")
            if self._waiting[: len(_SIGNATURE)] != _SIGNATURE or extension:
                raise ValueError("not a binary copy")
            del self._waiting[:_HEADER_BYTES]
            self._has_begun, end = True, end - _HEADER_BYTES
        count = end // self._row.itemsize
        if count:
            rows = np.frombuffer(bytes(self._waiting[: count * self._row.itemsize]), self._row)
            self._parts.append(self._checked(rows))
            del self._waiting[: count * self._row.itemsize]
        return len(self._waiting)

    def _checked(self, rows: Rows) -> Rows:
        kept = np.empty(len(rows), self._kept)
        wrong = np.count_nonzero(rows["fields"] != len(self._columns))
        for name in self._columns:
            wrong += np.count_nonzero(rows[f"{name} bytes"] != self._kept[name].itemsize)
            kept[name] = rows[name]
        if wrong:
            raise ValueError("a row of the copy has a NULL or another width than its columns say")
        return kept
