from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from engine.assets import Asset, AssetClass, load_catalogue, parse_assets, unclassified
from engine.runtime.connections import connect_postgres
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import (
    Loaded,
    classified_at,
    get_assets,
    get_classes,
    list_assets,
    upsert_assets,
    versions_after,
)
from tests.bookkeeping import fill, opening
from tests.books import numbered, open_books
from tests.running_program import RECORDING

RECORDED_ASSETS = RECORDING.with_name("assets.csv")
AT = datetime(2026, 11, 20, 15, tzinfo=UTC)
TESLA = Asset("TSLA", "Tesla", AssetClass.EQUITY, "Consumer Discretionary", "Automobile Manufacturers")


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    async with await connect_postgres(Settings(postgres_url=database), "test") as opened:
        await opened.execute("TRUNCATE asset CASCADE")
        yield opened


async def test_the_catalogue_goes_in_and_comes_out_unchanged(pool: asyncpg.Pool) -> None:
    catalogue = load_catalogue()
    assert await upsert_assets(pool, catalogue.values(), AT) == Loaded(60, added=60, reclassified=0)
    assert await get_assets(pool, [*catalogue, "ABSENT"]) == catalogue


async def test_a_later_load_wins_and_the_last_of_a_repeated_symbol(pool: asyncpg.Pool) -> None:
    old, new = (
        Asset("A", "old", AssetClass.EQUITY, "Energy", "x"),
        Asset("A", "new", AssetClass.CRYPTO, "DeFi Crypto", ""),
    )
    await upsert_assets(pool, [old], AT)
    assert await upsert_assets(pool, [old, new], AT) == Loaded(1, added=0, reclassified=1)
    assert await get_assets(pool, ["A"]) == {"A": new}


async def test_nothing_to_load_is_nothing_loaded(pool: asyncpg.Pool) -> None:
    assert await upsert_assets(pool, [], AT) == Loaded(0, 0, 0)
    assert await get_assets(pool, []) == {}
    assert await list_assets(pool, 10) == []


async def test_more_than_one_statement_s_worth_goes_in(pool: asyncpg.Pool) -> None:
    assert await upsert_assets(pool, (unclassified(f"S{n}") for n in range(2_500)), AT) == Loaded(2_500, 2_500, 0)
    assert await pool.fetchval("SELECT count(*) FROM asset") == 2_500


async def test_pages_by_keyset_neither_repeat_nor_miss_a_symbol(pool: asyncpg.Pool) -> None:
    symbols = ["A", "B", "BRK.B", "BTC-USD", "a", "b", "Z", "0", "A.B", "A-B", "AB"]
    await upsert_assets(pool, [unclassified(symbol) for symbol in symbols], AT)
    seen: list[str] = []
    while page := await list_assets(pool, 3, after=seen[-1] if seen else ""):
        assert len(page) <= 3
        seen += [asset.symbol for asset in page]
    assert seen == sorted(symbols)


async def test_every_asset_s_class_is_known(pool: asyncpg.Pool) -> None:
    assert await get_classes(pool) == {}
    await upsert_assets(pool, [*load_catalogue().values(), unclassified("MINE")], AT)
    classes = {asset.symbol: asset.asset_class for asset in load_catalogue().values()}
    assert await get_classes(pool) == classes | {"MINE": AssetClass.UNCLASSIFIED}


async def test_a_listing_is_narrowed_by_class_and_sector(pool: asyncpg.Pool) -> None:
    catalogue = load_catalogue()
    await upsert_assets(pool, catalogue.values(), AT)
    crypto = await list_assets(pool, 100, asset_class=AssetClass.CRYPTO)
    assert {asset.symbol for asset in crypto} == {s for s, a in catalogue.items() if a.asset_class is AssetClass.CRYPTO}
    metals = await list_assets(pool, 100, sector="Precious Metals")
    assert [asset.symbol for asset in metals] == ["XAG-USD", "XAU-USD", "XPT-USD"]
    assert await list_assets(pool, 100, asset_class=AssetClass.EQUITY, sector="Precious Metals") == []


async def test_loading_the_same_again_changes_nothing(pool: asyncpg.Pool) -> None:
    await upsert_assets(pool, load_catalogue().values(), AT)
    before = await versions_after(pool, 0)
    assert await upsert_assets(pool, load_catalogue().values(), AT + timedelta(days=1)) == Loaded(60, 0, 0)
    assert await versions_after(pool, 0) == before


async def test_a_reclassification_counts_from_its_instant_on_and_not_before(pool: asyncpg.Pool) -> None:
    moved = replace(TESLA, sector="Industrials", industry="")
    await upsert_assets(pool, [TESLA], AT)
    assert await upsert_assets(pool, [moved], AT + timedelta(days=1)) == Loaded(1, added=0, reclassified=1)
    first, second = await versions_after(pool, 0)
    assert (first.version, first.effective_at, second.version) == (1, datetime(1970, 1, 1, tzinfo=UTC), 2)
    assert second.effective_at == AT + timedelta(days=1)
    assert await versions_after(pool, first.arrival) == [second]
    just_before = AT + timedelta(days=1, microseconds=-1)
    assert await classified_at(pool, ["TSLA", "ABSENT"], just_before) == {"TSLA": TESLA}
    assert await classified_at(pool, ["TSLA"], AT + timedelta(days=1)) == {"TSLA": moved}


async def test_a_clock_that_goes_back_does_not_put_a_version_before_another(pool: asyncpg.Pool) -> None:
    moved = replace(TESLA, sector="Industrials")
    await upsert_assets(pool, [TESLA], AT)
    await upsert_assets(pool, [moved], AT)
    await upsert_assets(pool, [TESLA], AT - timedelta(days=1))
    _, second, third = await versions_after(pool, 0)
    assert second.effective_at < third.effective_at
    assert await classified_at(pool, ["TSLA"], AT + timedelta(days=1)) == {"TSLA": TESLA}


async def test_a_better_name_is_no_new_version(pool: asyncpg.Pool) -> None:
    await upsert_assets(pool, [TESLA], AT)
    renamed = replace(TESLA, name="Tesla, Inc.")
    assert await upsert_assets(pool, [renamed], AT) == Loaded(1, 0, 0)
    assert await get_assets(pool, ["TSLA"]) == {"TSLA": renamed}
    assert [(one.version, one.asset) for one in await versions_after(pool, 0)] == [(1, renamed)]


async def test_a_better_name_arrives_like_a_version_and_leaves_those_of_before_alone(pool: asyncpg.Pool) -> None:
    moved = replace(TESLA, sector="Industrials")
    await upsert_assets(pool, [TESLA], AT)
    await upsert_assets(pool, [moved], AT)
    first, second = await versions_after(pool, 0)
    renamed = replace(moved, name="Tesla, Inc.")
    await upsert_assets(pool, [renamed], AT + timedelta(days=1))
    (arrived,) = await versions_after(pool, second.arrival)
    assert (arrived.version, arrived.effective_at, arrived.asset) == (2, second.effective_at, renamed)
    assert await versions_after(pool, 0) == [first, arrived]


async def test_the_shipped_catalogue_classifies_only_what_nobody_has_classified(pool: asyncpg.Pool) -> None:
    mine = replace(TESLA, sector="Mine")
    await upsert_assets(pool, [mine, unclassified("AAPL")], AT)
    loaded = await upsert_assets(pool, [TESLA, load_catalogue()["AAPL"]], AT + timedelta(days=1), reclassify=False)
    assert loaded == Loaded(2, added=0, reclassified=1)
    assert await get_assets(pool, ["TSLA", "AAPL"]) == {"TSLA": mine, "AAPL": load_catalogue()["AAPL"]}


async def test_two_loads_at_the_same_time_come_one_after_another(pool: asyncpg.Pool) -> None:
    """Neither is half there, and both see the other's versions or none of them."""
    names = [f"S{number}" for number in range(1_500)]
    one, other = (
        [Asset(name, name, AssetClass.EQUITY, sector, "") for name in order]
        for sector, order in (("One", names), ("Other", names[::-1]))
    )
    loaded = await asyncio.gather(upsert_assets(pool, one, AT), upsert_assets(pool, other, AT))
    assert sorted((part.added, part.reclassified) for part in loaded) == [(0, 1_500), (1_500, 0)]
    assert len({asset.sector for asset in (await get_assets(pool, names)).values()}) == 1
    versions = await versions_after(pool, 0)
    assert [part.version for part in versions] == [1] * 1_500 + [2] * 1_500
    assert len({part.asset.sector for part in versions[:1_500]}) == 1


async def test_an_asset_that_a_fill_brings_into_being_is_reclassified_by_a_load(
    pool: asyncpg.Pool, database: str
) -> None:
    async with open_books(database) as kept:
        booked = await kept.book(*numbered(opening("p-1"), fill("p-1", "BUY", "1", "5", "b", "TSLA")))
    assert booked.unclassified == {"TSLA"}
    (created,) = await versions_after(pool, 0)
    assert (created.version, created.asset) == (1, unclassified("TSLA"))
    assert await upsert_assets(pool, [TESLA], AT) == Loaded(1, added=0, reclassified=1)
    before, after = AT - timedelta(microseconds=1), AT
    assert await classified_at(pool, ["TSLA"], before) == {"TSLA": unclassified("TSLA")}
    assert await classified_at(pool, ["TSLA"], after) == {"TSLA": TESLA}


@pytest.mark.skipif(not RECORDED_ASSETS.exists(), reason="the recorded market is not here")
async def test_the_recorded_markets_assets_are_loaded_once(pool: asyncpg.Pool) -> None:
    assets = parse_assets(RECORDED_ASSETS.read_text().splitlines(keepends=True))
    assert len(assets) > 500
    assert await upsert_assets(pool, assets, AT) == Loaded(len(assets), added=len(assets), reclassified=0)
    assert await upsert_assets(pool, assets, AT + timedelta(days=1)) == Loaded(len(assets), 0, 0)
    assert await get_assets(pool, [asset.symbol for asset in assets]) == {asset.symbol: asset for asset in assets}
    assert (await upsert_assets(pool, load_catalogue().values(), AT, reclassify=False)).reclassified == 0
