from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from engine.assets import Asset, AssetClass, load_catalogue, unclassified
from engine.runtime.connections import connect_postgres
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import get_assets, get_classes, list_assets, upsert_assets


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    async with await connect_postgres(Settings(postgres_url=database), "test") as opened:
        await opened.execute("TRUNCATE asset CASCADE")
        yield opened


async def test_the_catalogue_goes_in_and_comes_out_unchanged(pool: asyncpg.Pool) -> None:
    catalogue = load_catalogue()
    assert await upsert_assets(pool, catalogue.values()) == 60
    assert await get_assets(pool, [*catalogue, "ABSENT"]) == catalogue


async def test_a_later_load_wins_and_the_last_of_a_repeated_symbol(pool: asyncpg.Pool) -> None:
    old, new = (
        Asset("A", "old", AssetClass.EQUITY, "Energy", "x"),
        Asset("A", "new", AssetClass.CRYPTO, "DeFi Crypto", ""),
    )
    await upsert_assets(pool, [old])
    assert await upsert_assets(pool, [old, new]) == 1
    assert await get_assets(pool, ["A"]) == {"A": new}


async def test_nothing_to_load_is_nothing_loaded(pool: asyncpg.Pool) -> None:
    assert await upsert_assets(pool, []) == 0
    assert await get_assets(pool, []) == {}
    assert await list_assets(pool, 10) == []


async def test_more_than_one_statement_s_worth_goes_in(pool: asyncpg.Pool) -> None:
    assert await upsert_assets(pool, (unclassified(f"S{n}") for n in range(2_500))) == 2_500
    assert await pool.fetchval("SELECT count(*) FROM asset") == 2_500


async def test_pages_by_keyset_neither_repeat_nor_miss_a_symbol(pool: asyncpg.Pool) -> None:
    symbols = ["A", "B", "BRK.B", "BTC-USD", "a", "b", "Z", "0", "A.B", "A-B", "AB"]
    await upsert_assets(pool, [unclassified(symbol) for symbol in symbols])
    seen: list[str] = []
    while page := await list_assets(pool, 3, after=seen[-1] if seen else ""):
        assert len(page) <= 3
        seen += [asset.symbol for asset in page]
    assert seen == sorted(symbols)


async def test_every_asset_s_class_is_known(pool: asyncpg.Pool) -> None:
    assert await get_classes(pool) == {}
    await upsert_assets(pool, [*load_catalogue().values(), unclassified("MINE")])
    classes = {asset.symbol: asset.asset_class for asset in load_catalogue().values()}
    assert await get_classes(pool) == classes | {"MINE": AssetClass.UNCLASSIFIED}


async def test_a_listing_is_narrowed_by_class_and_sector(pool: asyncpg.Pool) -> None:
    catalogue = load_catalogue()
    await upsert_assets(pool, catalogue.values())
    crypto = await list_assets(pool, 100, asset_class=AssetClass.CRYPTO)
    assert {asset.symbol for asset in crypto} == {s for s, a in catalogue.items() if a.asset_class is AssetClass.CRYPTO}
    metals = await list_assets(pool, 100, sector="Precious Metals")
    assert [asset.symbol for asset in metals] == ["XAG-USD", "XAU-USD", "XPT-USD"]
    assert await list_assets(pool, 100, asset_class=AssetClass.EQUITY, sector="Precious Metals") == []
