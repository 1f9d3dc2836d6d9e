"""Asset files on their way into PostgreSQL and Redis, and the catalogue that ships with the program."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from engine.assets import (
    UNCLASSIFIED,
    AssetClass,
    AssetFileError,
    Classification,
    classification_decoder,
    load_catalogue,
)
from engine.instants import to_ns
from engine.runtime.connections import postgres_dsn
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.assets_postgres import Loaded, versions_after
from tests.running_program import RECORDING, navstream
from workers.catalogue import load_assets

HEADER = "symbol,name,asset_class,sector,industry\n"
RECORDED_ASSETS = RECORDING.with_name("assets.csv")
# The taxonomy of engine.assets; of equities it is GICS.
SECTORS = {
    AssetClass.EQUITY: {
        "Communication Services",
        "Consumer Discretionary",
        "Consumer Staples",
        "Energy",
        "Financials",
        "Health Care",
        "Industrials",
        "Information Technology",
        "Materials",
        "Real Estate",
        "Utilities",
    },
    AssetClass.CRYPTO: {
        "Layer 1 Crypto",
        "Layer 2 Crypto",
        "DeFi Crypto",
        "Oracle Crypto",
        "Payment Crypto",
        "Meme Crypto",
    },
    AssetClass.COMMODITY: {
        "Precious Metals",
        "Industrial Metals",
        "Energy Commodities",
        "Agricultural Commodities",
    },
}


@pytest.fixture
async def redis(redis_db: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_db) as client:
        yield client


@pytest.fixture
def settings(redis_db: str, fresh_database: str) -> Settings:
    return Settings(redis_url=redis_db, postgres_url=fresh_database)


async def told(redis: Redis) -> dict[str, Classification]:
    packed = await redis.hgetall(redis_keys.ASSETS)
    return {symbol.decode(): classification_decoder.decode(one) for symbol, one in packed.items()}


async def in_postgres(settings: Settings) -> dict[str, Classification]:
    """The newest version of each symbol, as Redis should have it."""
    connection = await asyncpg.connect(postgres_dsn(settings.postgres_url))
    try:
        versions = await versions_after(connection, 0)
    finally:
        await connection.close()
    newest: dict[str, Classification] = {}
    for one in versions:
        asset, before = one.asset, newest.get(one.asset.symbol)
        if before is None or before.version < one.version:
            newest[asset.symbol] = Classification(
                asset.name, asset.asset_class, asset.sector, asset.industry, one.version, to_ns(one.effective_at)
            )
    return newest


def test_the_shipped_catalogue_is_of_the_documented_taxonomy() -> None:
    catalogue = load_catalogue()
    for asset in catalogue.values():
        assert asset.sector in SECTORS[asset.asset_class], asset
    # Every sector of every class has somebody, so that the demo shows them.
    assert {asset.sector for asset in catalogue.values()} == set().union(*SECTORS.values())
    assert (catalogue["TSLA"].sector, catalogue["BTC-USD"].sector) == ("Consumer Discretionary", "Layer 1 Crypto")


async def test_redis_has_every_classification_in_force(settings: Settings, redis: Redis) -> None:
    assert await load_assets(settings) == Loaded(60, added=60, reclassified=0)
    assert {symbol: one.asset(symbol) for symbol, one in (await told(redis)).items()} == load_catalogue()
    before = datetime.now(UTC)
    text = f"{HEADER}TSLA,Tesla,EQUITY,Mine,\nNEW,,,,\nAAPL,Apple Computer,EQUITY,Information Technology,"
    text += f'"{load_catalogue()["AAPL"].industry}"\n'
    assert await load_assets(settings, text) == Loaded(3, added=1, reclassified=1)
    found = await told(redis)
    assert found == await in_postgres(settings)
    assert (found["TSLA"].sector, found["TSLA"].version) == ("Mine", 2)
    assert to_ns(before) <= found["TSLA"].effective_at_ns <= to_ns(datetime.now(UTC))
    assert (found["NEW"].sector, found["NEW"].version, found["NEW"].effective_at_ns) == (UNCLASSIFIED, 1, 0)
    assert (found["AAPL"].name, found["AAPL"].version) == ("Apple Computer", 1)


async def test_loading_the_same_file_again_changes_nothing(settings: Settings, redis: Redis) -> None:
    text = f"{HEADER}TSLA,Tesla,EQUITY,Mine,\n"
    await load_assets(settings, text)
    before = await told(redis)
    assert await load_assets(settings, text) == Loaded(1, 0, 0)
    assert await load_assets(settings) == Loaded(60, added=59, reclassified=0)
    assert (await told(redis))["TSLA"] == before["TSLA"]


async def test_a_redis_that_was_away_is_made_good_by_the_next_load(settings: Settings, redis: Redis) -> None:
    away = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with capture_logs() as logs:
        assert await load_assets(away, f"{HEADER}TSLA,,EQUITY,Mine,\n") == Loaded(1, added=1, reclassified=0)
    assert [line["event"] for line in logs] == ["assets_unwritten"]
    assert await told(redis) == {}
    await load_assets(settings, f"{HEADER}XOM,,EQUITY,Energy,\n")
    assert await told(redis) == await in_postgres(settings)
    assert set(await told(redis)) == {"TSLA", "XOM"}


async def test_without_redis_postgresql_alone_is_written(settings: Settings) -> None:
    alone = settings.model_copy(update={"redis_url": ""})
    assert await load_assets(alone, f"{HEADER}TSLA,,EQUITY,Mine,\n") == Loaded(1, added=1, reclassified=0)
    assert set(await in_postgres(settings)) == {"TSLA"}


async def test_a_file_is_taken_whole_or_not_at_all(settings: Settings, redis: Redis) -> None:
    with pytest.raises(AssetFileError, match="line 3"):
        await load_assets(settings, f"{HEADER}TSLA,,EQUITY,Mine,\nXOM,,STOCK,Energy,\n")
    assert (await told(redis), await in_postgres(settings)) == ({}, {})


@pytest.mark.skipif(not RECORDED_ASSETS.exists(), reason="the recorded market is not here")
def test_the_command_says_what_it_did(settings: Settings) -> None:
    environment = {"NAVSTREAM_POSTGRES_URL": settings.postgres_url, "NAVSTREAM_REDIS_URL": settings.redis_url}
    outputs = [navstream("assets", "load", str(RECORDED_ASSETS), **environment) for _ in range(2)]
    assert [output.returncode for output in outputs] == [0, 0], outputs
    assert [output.stdout.strip() for output in outputs] == [
        "598 assets: 598 added, 0 reclassified, 0 unchanged",
        "598 assets: 0 added, 0 reclassified, 598 unchanged",
    ]
