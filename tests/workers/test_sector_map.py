"""What a process knows about assets, and how it learns of what was loaded since."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from engine.assets import UNCLASSIFIED, Asset, AssetClass
from engine.runtime.connections import connect_postgres, make_engine
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import upsert_assets
from workers.sector_map import SectorMap

AT = datetime(2026, 11, 20, 15, tzinfo=UTC)


def equity(symbol: str, sector: str, industry: str = "", name: str = "") -> Asset:
    return Asset(symbol, name or symbol, AssetClass.EQUITY, sector, industry)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    async with await connect_postgres(Settings(postgres_url=database), "test") as opened:
        await opened.execute("TRUNCATE asset CASCADE")
        yield opened


@pytest.fixture
async def sectors(database: str) -> AsyncIterator[SectorMap]:
    engine = make_engine(Settings(postgres_url=database), "test")
    yield SectorMap(engine)
    await engine.dispose()


async def test_what_was_loaded_is_known_and_the_rest_is_unclassified(pool: asyncpg.Pool, sectors: SectorMap) -> None:
    await upsert_assets(pool, [equity("XOM", "Energy")], AT)
    await sectors.load()
    assert (sectors.sector_of("XOM"), sectors.class_of("XOM")) == ("Energy", AssetClass.EQUITY)
    assert (sectors.sector_of("ELSE"), sectors.class_of("ELSE")) == (UNCLASSIFIED, AssetClass.UNCLASSIFIED)


async def test_a_refresh_names_what_is_another_now(pool: asyncpg.Pool, sectors: SectorMap) -> None:
    await upsert_assets(pool, [equity("A", "One"), equity("B", "One"), equity("C", "One"), equity("D", "One")], AT)
    await sectors.load()
    assert await sectors.refresh() == set()
    later = AT + timedelta(days=1)
    await upsert_assets(pool, [equity("A", "Two"), equity("B", "One", "i"), equity("C", "One", name="Sea")], later)
    await upsert_assets(pool, [Asset("D", "D", AssetClass.CRYPTO, "One", ""), equity("E", "Two")], later)
    assert await sectors.refresh() == {"A", "B", "D", "E"}
    assert [sectors.sector_of(symbol) for symbol in "ABCDE"] == ["Two", "One", "One", "One", "Two"]
    assert sectors.class_of("D") is AssetClass.CRYPTO
    assert await sectors.refresh() == set()


async def test_who_comes_later_knows_what_moved_to_another_sector_since(pool: asyncpg.Pool, sectors: SectorMap) -> None:
    await upsert_assets(pool, [equity("A", "One"), equity("B", "One"), equity("C", "One")], AT)
    await sectors.load()
    before = sectors.arrival
    later = AT + timedelta(days=1)
    await upsert_assets(pool, [equity("A", "Two"), equity("B", "One", "i"), equity("C", "One", name="Sea")], later)
    await sectors.load()
    assert sectors.reclassified_since(before) == {"A"}
    assert sectors.reclassified_since(sectors.arrival) == set()
    assert sectors.reclassified_since(0) == {"A", "B", "C"}


async def test_what_changed_and_changed_back_between_two_refreshes_ends_as_it_is(
    pool: asyncpg.Pool, sectors: SectorMap
) -> None:
    await upsert_assets(pool, [equity("A", "One")], AT)
    await sectors.load()
    await upsert_assets(pool, [equity("A", "Two")], AT)
    await upsert_assets(pool, [equity("A", "One")], AT)
    await sectors.refresh()
    assert sectors.sector_of("A") == "One"


async def test_an_asset_of_a_fill_is_unclassified_until_it_is_loaded(pool: asyncpg.Pool, sectors: SectorMap) -> None:
    await sectors.load()
    sectors.learn(["NEW"])
    assert sectors.sector_of("NEW") == UNCLASSIFIED
    await upsert_assets(pool, [Asset("NEW", "NEW", AssetClass.UNCLASSIFIED, UNCLASSIFIED, "")], AT)
    assert await sectors.refresh() == set()
    await upsert_assets(pool, [equity("NEW", "Energy")], AT)
    assert await sectors.refresh() == {"NEW"}
    sectors.learn(["NEW"])
    assert sectors.sector_of("NEW") == "Energy"


async def test_postgresql_away_loses_nothing_of_what_is_known(pool: asyncpg.Pool, sectors: SectorMap) -> None:
    await upsert_assets(pool, [equity("A", "One")], AT)
    await sectors.load()
    reachable = sectors._engine
    sectors._engine = make_engine(Settings(postgres_url="postgresql://nobody@127.0.0.1:1/none"), "test")
    with pytest.raises((DBAPIError, OSError)):
        await sectors.refresh()
    await sectors._engine.dispose()
    sectors._engine = reachable
    await upsert_assets(pool, [equity("A", "Two")], AT)
    assert await sectors.refresh() == {"A"}
