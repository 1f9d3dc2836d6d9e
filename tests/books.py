"""A ledger in a real PostgreSQL with the leases on its shards: what tests of the writing stores begin with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.booking import AppliedSplit, Booked, DeadLetter, Record
from engine.runtime.connections import make_engine, postgres_dsn
from engine.runtime.settings import Settings
from engine.stores.ledger_postgres import Lease, LedgerWriter
from engine.stores.shards_postgres import Shards
from tests.bookkeeping import AT, record

LOG = "cluster/topic"


class NoMarks:
    """No prices yet; every NAV is 0."""

    def nav(self, portfolio_id: str) -> int:
        return 0

    def price(self, symbol: str) -> Decimal | None:
        return None

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        return 0, 0

    def position_day_base(self, portfolio_id: str, symbol: str) -> int:
        return 0


@dataclass
class Books:
    """A ledger, the leases on its four shards, and a connection of the superuser's."""

    engine: AsyncEngine
    writer: LedgerWriter
    shards: Shards
    leases: dict[int, Lease]
    admin: asyncpg.Connection
    buried: list[DeadLetter]

    async def book(
        self,
        *records: Record,
        shard: int = 0,
        splits: Mapping[str, Sequence[AppliedSplit]] | None = None,
        at: datetime = AT,
    ) -> Booked:
        return await self.writer.book(
            self.leases[shard], records, await self.next_offset(shard), NoMarks(), at, self.bury, splits or {}
        )

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        self.buried += letters

    async def entries(self) -> list[tuple[str, int, str]]:
        rows = await self.admin.fetch("SELECT portfolio_id, sequence, event_id FROM ledger_entry ORDER BY 1, 2")
        return [tuple(row) for row in rows]

    async def next_offset(self, shard: int = 0) -> int:
        return await self.admin.fetchval("SELECT next_offset FROM shard WHERE id = $1", shard)


@asynccontextmanager
async def open_books(database_url: str) -> AsyncIterator[Books]:
    engine = make_engine(Settings(postgres_url=database_url), "test-ledger")
    shards = Shards(engine, "me", 60_000)
    await shards.ensure(4, LOG)
    leases = {lease.shard: lease for lease in (await shards.renew([], LOG)).claimed}
    admin = await asyncpg.connect(postgres_dsn(database_url))
    try:
        yield Books(engine, LedgerWriter(engine), shards, leases, admin, [])
    finally:
        await admin.close()
        await engine.dispose()


def numbered(*events: dict[str, Any], first: int = 0) -> list[Record]:
    return [record(event, first + at) for at, event in enumerate(events)]
