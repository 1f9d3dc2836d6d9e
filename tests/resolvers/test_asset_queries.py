"""What the API says of an asset's classification: the query, the list, an instant of before, and what Redis keeps."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from engine.assets import Asset, AssetClass, Classification
from engine.instants import to_ns
from engine.stores.assets_postgres import upsert_assets
from tests.gateway import Gateway


async def test_an_asset_says_which_classification_it_is_and_since_when(gateway: Gateway) -> None:
    first = Asset("ZY", "Zy", AssetClass.EQUITY, "One", "")
    await gateway.ledger.assets([first])
    fields = "symbol sector version classifiedAt"
    both = 'asset(symbol: "ZY") { # } assets(first: 5, sector: "%s") { edges { node { # } } }'
    query = f"{{ {both.replace('#', fields)} }}"
    expected = {"symbol": "ZY", "sector": "One", "version": 1, "classifiedAt": None}
    shown = await gateway.ask(query % "One")
    assert shown == {"asset": expected, "assets": {"edges": [{"node": expected}]}}
    at = datetime(2026, 11, 20, 15, 0, 0, 250_000, tzinfo=UTC)
    pool, assets = gateway.ledger.pool, gateway.application.services.assets
    await upsert_assets(pool, [replace(first, sector="Two")], at)
    await assets.refresh()
    expected |= {"sector": "Two", "version": 2, "classifiedAt": "2026-11-20T15:00:00.250000Z"}
    shown = await gateway.ask(query % "Two")
    assert shown == {"asset": expected, "assets": {"edges": [{"node": expected}]}}
    for instant, version in ((at - timedelta(seconds=1), 1), (at, 2)):
        found = (await assets.in_force(["ZY"], instant))["ZY"]
        assert (found.version, found.classified_at) == (version, at if version == 2 else None)
    packed = Classification("Zy", AssetClass.EQUITY, "Two", "", 2, to_ns(at)).asset("ZY")
    assert (packed.version, packed.classified_at) == (2, at)
    assert Classification("Zy", AssetClass.EQUITY, "One", "", 1, 0).asset("ZY").classified_at is None
