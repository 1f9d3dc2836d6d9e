"""Equity snapshots: writing the hot marks of all portfolios at one grid instant.

`equity_snapshot` is a hypertable where TimescaleDB is installed and a plain table otherwise; nothing here differs.
A snapshot is idempotent: (portfolio, instant) is its key and the first one stays. Rows travel by COPY into a
temporary table, which is how 20,000 of them take a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from engine.amounts import from_micro
from engine.marks import Mark
from engine.runtime.clock import to_datetime

_COLUMNS = (
    "portfolio_id",
    "at",
    "nav",
    "cash",
    "positions_value",
    "quality",
    "marked_at",
    "epoch",
    "sequence",
    "ledger_sequence",
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One portfolio's mark, taken for the grid instant `at`."""

    portfolio_id: str
    at: datetime
    mark: Mark


class SnapshotStore:
    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def write(self, snapshots: Sequence[Snapshot]) -> int:
        """Write snapshots; returns how many were new. Raises asyncpg.PostgresError, OSError."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("CREATE TEMPORARY TABLE incoming (LIKE equity_snapshot) ON COMMIT DROP")
            await connection.copy_records_to_table(
                "incoming", records=[_record(snapshot) for snapshot in snapshots], columns=list(_COLUMNS)
            )
            status = await connection.execute(
                f"INSERT INTO equity_snapshot ({', '.join(_COLUMNS)}) "  # noqa: S608 - the columns are ours
                f"SELECT {', '.join(_COLUMNS)} FROM incoming ON CONFLICT DO NOTHING"
            )
        return int(status.rpartition(" ")[2])


def _record(snapshot: Snapshot) -> tuple[object, ...]:
    mark = snapshot.mark
    return (
        snapshot.portfolio_id,
        snapshot.at,
        from_micro(mark.nav),
        from_micro(mark.cash),
        from_micro(mark.positions_value),
        int(mark.quality),
        to_datetime(mark.as_of_ns),
        mark.epoch,
        mark.sequence,
        mark.ledger_sequence,
    )
