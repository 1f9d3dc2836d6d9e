"""How the API learns of assets: what it remembers, where it looks, and how soon a load shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from redis.asyncio import Redis

from engine.assets import UNCLASSIFIED, Asset, AssetClass, load_catalogue, unclassified
from engine.markets import Markets
from engine.runtime.connections import connect_postgres
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import upsert_assets
from engine.stores.hot_state_reads import HotStateReads
from resolvers.loaders import CATALOGUE_REFRESH_INTERVAL_S, AssetCatalogue
from workers.catalogue import load_assets

AT = datetime(2026, 11, 20, 15, tzinfo=UTC)
HEADER = "symbol,name,asset_class,sector,industry\n"


def equity(symbol: str, sector: str, name: str = "") -> Asset:
    return Asset(symbol, name or symbol, AssetClass.EQUITY, sector, "")


@pytest.fixture
def settings(redis_db: str, fresh_database: str) -> Settings:
    return Settings(redis_url=redis_db, postgres_url=fresh_database)


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[asyncpg.Pool]:
    async with await connect_postgres(settings, "test") as opened:
        yield opened


@pytest.fixture
async def redis(redis_db: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_db) as client:
        yield client


def no_pool() -> asyncpg.Pool:
    raise ConnectionError("PostgreSQL is away")


async def test_a_refresh_learns_what_was_loaded_since(pool: asyncpg.Pool, redis: Redis) -> None:
    assets = AssetCatalogue(lambda: pool, HotStateReads(redis, 1), Markets({}))
    assert assets.get("TSLA") == load_catalogue()["TSLA"]
    await upsert_assets(pool, [equity("TSLA", "Mine"), equity("NEW", "Energy")], AT)
    signal = asyncio.Event()
    with assets.watch(signal):
        await assets.refresh()
        assert (assets.get("TSLA").sector, assets.get("NEW").sector, signal.is_set()) == ("Mine", "Energy", True)
        signal.clear()
        arrival = assets.arrival
        await assets.refresh()
        assert (assets.arrival, signal.is_set()) == (arrival, False)
    await upsert_assets(pool, [equity("NEW", "Energy", "Newcomer"), equity("TSLA", "Yours")], AT)
    await assets.refresh()
    assert (assets.get("NEW").name, assets.get("TSLA").sector) == ("Newcomer", "Yours")
    assert assets.arrival > arrival
    assert not signal.is_set()


def test_a_load_shows_within_5_s() -> None:
    assert CATALOGUE_REFRESH_INTERVAL_S < 5


async def test_an_unknown_symbol_is_looked_up_in_redis_and_then_in_postgresql(
    settings: Settings, pool: asyncpg.Pool, redis: Redis
) -> None:
    await load_assets(settings, f"{HEADER}IN-REDIS,,EQUITY,Energy,\n")
    await upsert_assets(pool, [equity("IN-POSTGRES", "Energy")], AT)
    away = AssetCatalogue(no_pool, HotStateReads(redis, 1), Markets({}))
    assert await away.find("IN-REDIS") == equity("IN-REDIS", "Energy")
    with pytest.raises(ConnectionError):
        await away.find("IN-POSTGRES")
    assets = AssetCatalogue(lambda: pool, HotStateReads(redis, 1), Markets({}))
    await assets.ensure(["IN-REDIS", "IN-POSTGRES", "NOWHERE"])
    known = [assets.get(symbol) for symbol in ("IN-REDIS", "IN-POSTGRES", "NOWHERE")]
    assert known == [equity("IN-REDIS", "Energy"), equity("IN-POSTGRES", "Energy"), unclassified("NOWHERE")]
    assert await assets.find("NOWHERE") is None


async def test_redis_away_is_no_reason_not_to_know(pool: asyncpg.Pool) -> None:
    await upsert_assets(pool, [equity("NEW", "Energy")], AT)
    async with Redis.from_url("redis://127.0.0.1:1/0") as away:
        assets = AssetCatalogue(lambda: pool, HotStateReads(away, 1), Markets({}))
        assert await assets.find("NEW") == equity("NEW", "Energy")


async def test_an_old_classification_in_redis_gives_way_to_what_was_loaded(
    settings: Settings, pool: asyncpg.Pool, redis: Redis
) -> None:
    """Redis was away at the second load."""
    await load_assets(settings, f"{HEADER}NEW,,EQUITY,Old,\n")
    await upsert_assets(pool, [equity("NEW", "Young")], AT)
    assets = AssetCatalogue(lambda: pool, HotStateReads(redis, 1), Markets({}))
    await assets.find("NEW")
    await assets.refresh()
    assert assets.get("NEW").sector == "Young"


async def test_what_was_in_force_at_an_instant(pool: asyncpg.Pool, redis: Redis) -> None:
    await upsert_assets(pool, [equity("A", "One")], AT)
    await upsert_assets(pool, [equity("A", "Two")], AT + timedelta(days=1))
    assets = AssetCatalogue(lambda: pool, HotStateReads(redis, 1), Markets({}))
    await assets.refresh()
    then = await assets.in_force(["A", "TSLA", "NOWHERE"], AT + timedelta(hours=23))
    assert {symbol: asset.sector for symbol, asset in then.items()} == {
        "A": "One",
        "TSLA": "Consumer Discretionary",
        "NOWHERE": UNCLASSIFIED,
    }
    assert (await assets.in_force(["A"], AT + timedelta(days=1)))["A"].sector == "Two"
    assert await assets.in_force([], AT) == {}
