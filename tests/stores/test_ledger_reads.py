"""Reading the ledger, its portfolios and snapshots from a real server, exactly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
import pytest_asyncio

from engine.assets import Asset, AssetClass
from engine.equity_curve import Flow, Resolution
from engine.ledger import LedgerKind, Side
from engine.performance import Trades
from engine.runtime.clock import to_ns
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


async def test_flows_are_cut_by_sequence_and_carry_their_booking(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    await builder.portfolio("f-1")
    booked_at = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)
    await builder.flow("f-1", 2, "100.000001", "0", booked_at)
    await builder.fill("f-1", 3)
    await builder.flow("f-1", 4, "-40", "99.5", booked_at, "WITHDRAWAL")
    await builder.flow("f-1", 5, "7", "60", booked_at, "REWARD")
    await builder.flow("f-1", 6, "3", "67", booked_at, "INTEREST")
    at_ns = to_ns(booked_at)
    expected = [Flow(at_ns, 2, 100_000_001, 0), Flow(at_ns, 4, -40_000_000, 99_500_000)]
    assert await reads.flows("f-1", 0, 4) == expected
    assert [flow.ledger_sequence for flow in await reads.flows("f-1", 2, 99)] == [4, 5]
    assert await reads.flows("f-1", 5, 99) == await reads.flows("none", 0, 99) == []


async def test_trades_are_the_fills_that_realised_something(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    await builder.portfolio("g-1")
    for sequence, realized in enumerate(("0", "12.000001", "-3", "0.5", "-0.000001"), 1):
        await builder.fill("g-1", sequence, realized=realized)
    assert await reads.trades("g-1", 0, 9) == Trades(2, 2, 12_500_001, -3_000_001)
    assert await reads.trades("g-1", 2, 4) == Trades(1, 1, 500_000, -3_000_000)
    assert await reads.trades("g-1", 9, 9) == Trades(0, 0, 0, 0)


async def test_a_class_is_held_when_it_was_filled_in_the_span_or_is_held_now(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    await builder.portfolio("h-1")
    await builder.assets([Asset("H-BTC", "", AssetClass.CRYPTO, "", ""), Asset("H-EQ", "", AssetClass.EQUITY, "", "")])
    await builder.fill("h-1", 1, "H-BTC")
    await builder.fill("h-1", 2, "H-EQ")
    assert await reads.has_held("h-1", AssetClass.CRYPTO, 0, 2)
    assert not await reads.has_held("h-1", AssetClass.CRYPTO, 1, 2)
    assert not await reads.has_held("h-1", AssetClass.COMMODITY, 0, 2)
    await pool.execute("INSERT INTO position VALUES ('h-1', 'H-BTC', 1, 1, 0, now())")
    assert await reads.has_held("h-1", AssetClass.CRYPTO, 1, 2)


async def test_snapshots(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), SnapshotsReads(lambda: pool)
    midnight = datetime(2026, 11, 20, tzinfo=UTC)
    hours = (-1, 0, 5, 23, 24, 30)
    await builder.snapshots("c-1", {midnight + timedelta(hours=hour): f"{100 + hour}.000001" for hour in hours}, 42)
    hourly = await reads.points("c-1", midnight, Resolution.HOURLY)
    assert [one.nav for one in hourly] == [100_000_001, 105_000_001, 123_000_001, 124_000_001, 130_000_001]
    assert {one.ledger_sequence for one in hourly} == {42}
    daily = await reads.points("c-1", midnight - timedelta(days=9), Resolution.DAILY)
    assert [one.nav for one in daily] == [99_000_001, 123_000_001, 130_000_001]
    assert daily[1].at_ns == int((midnight + timedelta(hours=23)).timestamp()) * 10**9
    later = await reads.points("c-1", midnight + timedelta(hours=23, seconds=1), Resolution.DAILY)
    assert [one.nav for one in later] == [130_000_001]
    assert await reads.points("none", midnight, Resolution.DAILY) == []


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
async def test_days_are_utc_days_whatever_the_time_zone_of_the_session(database: str, zone: str) -> None:
    """Over the night of 8 March 2026, when New York has 23 hours."""
    begin, name = datetime(2026, 3, 7, tzinfo=UTC), f"d-{zone}"
    async with asyncpg.create_pool(database, min_size=1, max_size=1, server_settings={"timezone": zone}) as pool:
        navs = {begin + timedelta(hours=hour): str(hour) for hour in range(24 * 4)}
        await LedgerBuilder(pool).snapshots(name, navs)
        daily = await SnapshotsReads(lambda: pool).points(name, begin, Resolution.DAILY)
    assert [one.nav // 1_000_000 for one in daily] == [23, 47, 71, 95]
