"""Reading the ledger, its portfolios and snapshots from a real server, exactly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest_asyncio

from engine.equity_curve import Resolution
from engine.ledger import LedgerKind, Side
from engine.stores.ledger_reads import LedgerReads, LedgerSelection
from engine.stores.snapshots_reads import SnapshotsReads
from tests.builders import OPENED_AT, LedgerBuilder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(database, min_size=1, max_size=2) as made:
        yield made


async def test_portfolios(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    for name, owner, shard in (("a-1", "eve", 1), ("a-2", "bob", 2), ("a-3", "eve", 3), ("a-4", "eve", 1)):
        await builder.portfolio(name, owner, shard)
    found = await reads.portfolio("a-3")
    assert found is not None
    assert (found.owner, found.shard, found.base_currency, found.opened_at) == ("eve", 3, "USD", OPENED_AT)
    assert await reads.portfolio("none") is None

    async def ids(owner: str | None, count_max: int, after: str = "") -> list[str]:
        return [row.portfolio_id for row in await reads.portfolios(owner, count_max, after)]

    assert await ids("eve", 2) == ["a-1", "a-3"]
    assert await ids("eve", 2, "a-3") == ["a-4"]
    assert await ids(None, 3, "a-1") == ["a-2", "a-3", "a-4"]
    assert await ids("nobody", 9) == []


async def test_ledger(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    await builder.portfolio("b-1")
    await builder.deposit("b-1", 1, "12345678901234567890.123456")
    await builder.fill("b-1", 2, "AAPL", "BUY", "0.000000000001")
    await builder.fill("b-1", 3, "AAPL", "SELL", "2")
    newest, middle, oldest = await reads.page("b-1", 9)
    assert [newest.sequence, middle.sequence, oldest.sequence] == [3, 2, 1]
    assert oldest.amount == 12345678901234567890123456
    assert (oldest.kind, oldest.symbol, oldest.side, oldest.quantity) == (LedgerKind.DEPOSIT, None, None, None)
    assert str(middle.quantity) == "1E-12"
    assert (newest.side, newest.fee, newest.nav_before) == (Side.SELL, 1_000_000, None)
    assert newest.recorded_at == OPENED_AT + timedelta(minutes=3, seconds=1)
    assert [entry.sequence for entry in await reads.page("b-1", 1, before=3)] == [2]
    assert [entry.sequence for entry in await reads.after("b-1", 1, 1)] == [2]
    assert [entry.sequence for entry in await reads.after("b-1", 3, 9)] == []
    sells = LedgerSelection(kind=LedgerKind.FILL, side=Side.SELL)
    assert [entry.sequence for entry in await reads.page("b-1", 9, selection=sells)] == [3]
    assert (await reads.last_sequence("b-1"), await reads.last_sequence("none")) == (3, 0)


async def test_snapshots(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), SnapshotsReads(lambda: pool)
    midnight = datetime(2026, 11, 20, tzinfo=UTC)
    hours = (-1, 0, 5, 23, 24, 30)
    await builder.snapshots("c-1", {midnight + timedelta(hours=hour): f"{100 + hour}.000001" for hour in hours})
    hourly = await reads.points("c-1", midnight, Resolution.HOURLY)
    assert [one.nav for one in hourly] == [100_000_001, 105_000_001, 123_000_001, 124_000_001, 130_000_001]
    daily = await reads.points("c-1", midnight - timedelta(days=9), Resolution.DAILY)
    assert [one.nav for one in daily] == [99_000_001, 123_000_001, 130_000_001]
    assert daily[1].at_ns == int((midnight + timedelta(hours=23)).timestamp()) * 10**9
