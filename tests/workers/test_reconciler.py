"""Reconciliation: silent when all agrees, also while prices move; loud about every figure that does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from engine.positions import hot_position_decoder, hot_position_encoder
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from tests.running_system import System, connected, deposit, fill, opening, running
from workers import reconciler
from workers.reconciler import reconcile_once


@pytest.fixture
async def system(
    redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[System]:
    monkeypatch.setattr(reconciler, "ATTEMPTS_MAX", 3)
    monkeypatch.setattr(reconciler, "HISTORY_LEAD_S", 0.5)
    settings = Settings(redis_url=redis_db, postgres_url=fresh_database, kafka_bootstrap=kafka_bootstrap, topic=topic)
    async with connected(settings) as one:
        yield one


async def trade(system: System) -> None:
    """Two portfolios with a few entries each."""
    await system.quote("AAPL", "100")
    await system.quote("MSFT", "50")
    for name in ("p-1", "p-2"):
        await system.send(
            opening(name),
            deposit(name, "1000", f"d-{name}"),
            fill(name, "BUY", "3", "99.5", f"b-{name}", fee="0.25"),
            fill(name, "SELL", "1.5", "101", f"s-{name}"),
            fill(name, "SELL", "2", "51", f"m-{name}", symbol="MSFT"),
        )
        await system.mark_when(name, lambda mark: mark.ledger_sequence == 5)


async def figures(system: System) -> set[tuple[str, str]]:
    report = await reconcile_once(system.settings)
    return {(difference.portfolio_id, difference.figure) for difference in report.differences}


async def test_agreement_while_prices_move(system: System) -> None:
    async with running(system.settings):
        await trade(system)

        async def move() -> None:
            for cents in range(10_000):
                await system.quote("AAPL", f"{100 + cents / 100:.2f}")
                await asyncio.sleep(0.005)

        moving = asyncio.create_task(move())
        report = await reconcile_once(system.settings)
        moving.cancel()
    assert (report.portfolios_count, report.entries_count, list(report.differences)) == (2, 10, [])


async def test_each_changed_figure_is_found_and_named(system: System) -> None:
    async with running(system.settings):
        await trade(system)
        await asyncio.sleep(0.3)
    shard = await system.shard_of("p-1")
    key = redis_keys.positions(shard, "p-1")
    held = hot_position_decoder.decode(await system.redis.hget(key, "AAPL"))
    await system.redis.hset(key, "AAPL", hot_position_encoder.encode((held.quantity, held.cost + 1, *(0, 0, 0))))
    assert ("p-1", "hot position AAPL") in await figures(system)
    await system.redis.hset(key, "AAPL", hot_position_encoder.encode(held))
    await system.redis.hset(key, "TSLA", hot_position_encoder.encode(held))
    assert ("p-1", "hot position TSLA") in await figures(system)
    await system.redis.hdel(key, "TSLA")
    await system.pool.execute(
        "UPDATE position SET cost = cost + 0.000001 WHERE portfolio_id = 'p-2' AND symbol = 'AAPL'"
    )
    assert await figures(system) == {("p-2", "position row AAPL")}


async def test_a_mark_at_a_price_that_never_was_is_found(system: System) -> None:
    async with running(system.settings):
        await trade(system)
    await system.quote("AAPL", "101")
    assert await figures(system) == {("p-1", "positions value"), ("p-2", "positions value")}


async def test_a_ledger_changed_behind_the_program_is_found(system: System) -> None:
    async with running(system.settings):
        await trade(system)
    async with system.pool.acquire() as connection, connection.transaction():
        await connection.execute("ALTER TABLE ledger_entry DISABLE TRIGGER ledger_entry_append_only")
        await connection.execute("UPDATE ledger_entry SET amount = amount + 1 WHERE event_id = 'b-p-1'")
        await connection.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")
    assert await figures(system) == {("p-1", "ledger")}


async def test_a_missing_mark_is_found(system: System) -> None:
    async with running(system.settings):
        await trade(system)
    shard = await system.shard_of("p-2")
    epoch = int(await system.redis.hget(redis_keys.shard(shard), "epoch"))
    await system.redis.hdel(redis_keys.marks(shard, epoch), "p-2")
    assert ("p-2", "mark") in await figures(system)
