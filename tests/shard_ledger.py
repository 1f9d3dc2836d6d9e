"""A shard's ledger in PostgreSQL, booked at instants of the test's choosing, and what a new owner loads of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.baselines import Baseline
from engine.booking import DueStep, StepPrices
from engine.corporate_actions import SplitAction
from engine.instants import to_ns
from engine.runtime.connections import make_engine, postgres_dsn
from engine.runtime.settings import Settings
from engine.stores.actions_postgres import ActionsStore
from engine.stores.ledger_postgres import Lease, LedgerWriter
from engine.stores.shard_loading import LoadedShard
from engine.stores.shards_postgres import Shards
from tests.bookkeeping import record
from tests.slow_loading import LoadedPortfolio, load_slowly, portfolios_of

CUT_AT = datetime(2026, 11, 20, tzinfo=UTC)
BEFORE, AFTER = CUT_AT - timedelta(hours=5), CUT_AT + timedelta(hours=5)
MICRO = 1_000_000


@dataclass
class Marks:
    prices: dict[str, Decimal] = field(default_factory=dict)

    def nav(self, portfolio_id: str) -> int:
        return 1_500_000

    def price(self, symbol: str) -> Decimal | None:
        return self.prices.get(symbol)

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        return 0, 0

    def position_day_base(self, portfolio_id: str, symbol: str) -> int:
        return 0


@dataclass
class ShardLedger:
    engine: AsyncEngine
    admin: asyncpg.Connection
    shards: Shards
    lease: Lease
    cuts: dict[str, datetime] = field(default_factory=dict)
    quotes: dict[str, tuple[Decimal, datetime]] = field(default_factory=dict)
    offset: int = 0

    async def book(self, *events: dict[str, Any], at: datetime = BEFORE) -> None:
        """Book events that took place `at`."""

        async def bury(letters: object) -> None:
            raise AssertionError(letters)

        took_place = [
            event | {key: at.isoformat() for key in ("executed_at", "effective_at", "opened_at") if key in event}
            for event in events
        ]
        records = [record(event, self.offset + n) for n, event in enumerate(took_place)]
        await LedgerWriter(self.engine).book(self.lease, records, self.offset, Marks(), at, bury, {})
        self.offset += len(events)

    async def split(self, symbol: str, ratio: str, effective_at: datetime, at: datetime) -> None:
        store = ActionsStore(self.engine)
        action = SplitAction(action_id=f"split-{symbol}", symbol=symbol, ratio=ratio, effective_at=effective_at)
        await store.record(self.lease, "log", {0: 1}, [action], at)
        (known,) = await store.known(0)
        due = DueStep(known.steps[0], StepPrices(None, None), at > effective_at, known.content_hash)
        await store.book(self.lease, [due], at, {})

    async def close(self, symbol: str, price: str, at: datetime, ts_event: datetime) -> None:
        await self.admin.execute(
            "INSERT INTO price_close VALUES ($1, $2, $3, $4, 'feed', '')", symbol, at, Decimal(price), ts_event
        )

    def quote_of(self, symbol: str) -> tuple[Decimal, int] | None:
        found = self.quotes.get(symbol)
        return None if found is None else (found[0], to_ns(found[1]))

    def last_cut(self, day_cut: str) -> int:
        return to_ns(self.cuts.get(day_cut, CUT_AT))

    async def load(self) -> LoadedShard:
        return await self.shards.load(self.lease, self.last_cut, self.quote_of)

    async def load_slowly(self) -> tuple[list[LoadedPortfolio], list[tuple[int, list[Baseline]]]]:
        """What `load` is to find, read portfolio by portfolio."""
        async with self.engine.connect() as connection:
            return await load_slowly(connection, self.lease.shard, self.last_cut, self.quote_of)

    async def one(self) -> LoadedPortfolio:
        (loaded,) = portfolios_of(await self.load())
        return loaded

    async def estimated(self) -> Baseline:
        ((cut_at_ns, (baseline,)),) = (await self.load()).estimated
        assert cut_at_ns == to_ns(CUT_AT)
        return baseline


@asynccontextmanager
async def shard_ledger(database_url: str) -> AsyncIterator[ShardLedger]:
    """Shard 0 of an empty database, owned."""
    engine = make_engine(Settings(postgres_url=database_url), "test-ledger")
    admin = await asyncpg.connect(postgres_dsn(database_url))
    shards = Shards(engine, "me", 60_000)
    await shards.ensure(1, "cluster/topic")
    tenure = await shards.renew([], "cluster/topic")
    try:
        yield ShardLedger(engine, admin, shards, tenure.claimed[0])
    finally:
        await admin.close()
        await engine.dispose()
