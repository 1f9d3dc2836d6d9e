"""A load changes the allocations of holders within seconds, and nothing else: a real evaluator on real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.assets import UNCLASSIFIED
from engine.runtime import telemetry
from engine.runtime.settings import Settings
from engine.sectors import SectorValue, sector_value_decoder
from engine.stores import redis_keys
from tests.running_system import MICRO, System, connected, deposit, fill, opening, running, until_answered
from workers.catalogue import load_assets
from workers.reclassification import CHECK_INTERVAL_S

HEADER = "symbol,name,asset_class,sector,industry\n"
SOON_S = CHECK_INTERVAL_S + 5


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        flush_interval_ms=20,
    )
    await load_assets(settings, f"{HEADER}AAPL,,EQUITY,Tech,\nXOM,,EQUITY,Energy,\n")
    async with connected(settings) as one:
        yield one


async def allocation(system: System, name: str) -> tuple[dict[str, float], dict[str, SectorValue]]:
    """The sorted set and the hash."""
    shard = await system.shard_of(name)
    ranked = await system.redis.zrange(redis_keys.sectors(shard, name), 0, -1, withscores=True)
    values = await system.redis.hgetall(redis_keys.sector_values(shard, name))
    decoded = {sector.decode(): sector_value_decoder.decode(value) for sector, value in values.items()}
    return {sector.decode(): weight for sector, weight in ranked}, decoded


async def all_of(system: System, name: str) -> dict[str, Any]:
    """Everything that Redis and PostgreSQL have of a portfolio, its allocation left out; the mark without its time."""
    shard = await system.shard_of(name)
    mark = await system.mark(name)
    assert mark is not None
    return {
        "positions": await system.redis.hgetall(redis_keys.positions(shard, name)),
        "mark": (mark.nav, mark.cash, mark.positions_value, mark.day_pnl, mark.ledger_sequence, mark.quality),
        "portfolio": await system.pool.fetchrow("SELECT * FROM portfolio WHERE id = $1", name),
        "entries": await system.pool.fetch("SELECT * FROM ledger_entry WHERE portfolio_id = $1", name),
    }


async def until_allocated(system: System, name: str, sectors: set[str]) -> None:
    async def is_so() -> bool:
        return set((await allocation(system, name))[0]) == sectors

    await until_answered(is_so, SOON_S)


async def test_holders_are_allocated_anew_and_nothing_else_moves(system: System) -> None:
    async with running(system.settings):
        for name in ("p-1", "p-2", "p-3"):
            await system.send(opening(name), deposit(name, "1000", f"d-{name}"))
        await system.send(fill("p-1", "BUY", "3", "100", "a"), fill("p-1", "BUY", "1", "100", "b", symbol="XOM"))
        await system.send(fill("p-2", "SELL", "2", "100", "c"), fill("p-3", "BUY", "1", "100", "d", symbol="XOM"))
        for symbol in ("AAPL", "XOM"):
            await system.quote(symbol, "100")
        await system.mark_when("p-1", lambda mark: mark.positions_value == 400 * MICRO and mark.ledger_sequence == 4)
        await system.mark_when("p-2", lambda mark: mark.positions_value == -200 * MICRO)
        await system.mark_when("p-3", lambda mark: mark.positions_value == 100 * MICRO)
        await until_allocated(system, "p-1", {"Tech", "Energy"})
        names = ("p-1", "p-2", "p-3")
        before = {name: await all_of(system, name) for name in names}
        untouched = await allocation(system, "p-3")
        counted = telemetry.RECLASSIFIED._value.get()

        await load_assets(system.settings, f"{HEADER}AAPL,,EQUITY,Industrials,\nNEW,,EQUITY,Energy,\n")
        await until_allocated(system, "p-1", {"Industrials", "Energy"})
        await until_allocated(system, "p-2", {"Industrials"})
        assert await allocation(system, "p-1") == (
            {"Industrials": 0.75, "Energy": 0.25},
            {"Industrials": SectorValue(300 * MICRO, 300 * MICRO), "Energy": SectorValue(100 * MICRO, 100 * MICRO)},
        )
        assert await allocation(system, "p-2") == (
            {"Industrials": 1.0},
            {"Industrials": SectorValue(-200 * MICRO, 200 * MICRO)},
        )
        assert await allocation(system, "p-3") == untouched
        assert {name: await all_of(system, name) for name in names} == before
        assert telemetry.RECLASSIFIED._value.get() - counted == 2

        await load_assets(system.settings, f"{HEADER}AAPL,Apple Inc.,EQUITY,Industrials,\n")
        await asyncio.sleep(CHECK_INTERVAL_S + 0.5)
        assert telemetry.RECLASSIFIED._value.get() - counted == 2


async def test_an_unknown_asset_is_held_unclassified_counted_and_classified_later(system: System) -> None:
    counted = telemetry.UNCLASSIFIED._value.get()
    async with running(system.settings):
        await system.send(opening("p-1"), fill("p-1", "BUY", "2", "10", "a", symbol="WHO"))
        await until_allocated(system, "p-1", {UNCLASSIFIED})
        await system.send(fill("p-1", "BUY", "2", "10", "b", symbol="WHO"))
        await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 3)
        assert telemetry.UNCLASSIFIED._value.get() - counted == 1
        await load_assets(system.settings, f"{HEADER}WHO,,COMMODITY,Precious Metals,\n")
        await until_allocated(system, "p-1", {"Precious Metals"})
        assert (await allocation(system, "p-1"))[1] == {"Precious Metals": SectorValue(40 * MICRO, 40 * MICRO)}
        assert await system.pool.fetchval("SELECT count(*) FROM asset_version WHERE symbol = 'WHO'") == 2


async def test_a_load_while_redis_forgot_everything_is_in_what_is_written_again(system: System) -> None:
    async with running(system.settings):
        await system.send(opening("p-1"), fill("p-1", "BUY", "2", "10", "a"))
        await until_allocated(system, "p-1", {"Tech"})
        await system.redis.flushall()
        await load_assets(system.settings, f"{HEADER}AAPL,,EQUITY,Industrials,\n")
        await until_allocated(system, "p-1", {"Industrials"})


async def test_a_new_owner_knows_what_was_loaded_while_nobody_was_there(system: System) -> None:
    async with running(system.settings):
        await system.send(opening("p-1"), fill("p-1", "BUY", "2", "10", "a"))
        await until_allocated(system, "p-1", {"Tech"})
    await load_assets(system.settings, f"{HEADER}AAPL,,EQUITY,Industrials,\n")
    async with running(system.settings):
        await until_allocated(system, "p-1", {"Industrials"})
