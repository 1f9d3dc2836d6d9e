"""Allocation over the real gateway: by sector, class and industry, exposure and concentration, now and in the past."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from engine.amounts import from_micro, plain
from engine.assets import Asset, AssetClass
from engine.messages import Quote
from engine.sectors import SectorValue
from engine.stores.assets_postgres import upsert_assets
from tests.builders import MICRO, MarkRow, held
from tests.gateway import Gateway
from tests.scripted_ledger import ScriptedLedger

SLICE = "{ name value gross weight weightAtLastFill }"
ALLOCATION = f"""allocation {{ bySector {SLICE} byAssetClass {SLICE} byIndustry {SLICE}
    longExposure shortExposure grossExposure netExposure concentration }}"""
QUERY = f"""query($id: String!, $at: DateTime) {{ portfolio(portfolioId: $id, asOf: $at) {{
    {ALLOCATION} sectorAllocation {{ sector weight }} }} }}"""
HOUR = timedelta(hours=1)


async def ask(gateway: Gateway, portfolio_id: str, at: datetime | None = None) -> Any:
    variables = {"id": portfolio_id, "at": at and at.isoformat()}
    return (await gateway.ask(QUERY, variables))["portfolio"]


def one(name: str, value: str, gross: str, weight: str, at_last_fill: str | None = None) -> dict[str, str | None]:
    return {"name": name, "value": value, "gross": gross, "weight": weight, "weightAtLastFill": at_last_fill}


async def test_positions_are_grouped_in_every_way(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    a, b, c, d = (f"{portfolio_id}.{letter}" for letter in "ABCD")
    await gateway.ledger.assets(
        [
            Asset(a, "A", AssetClass.EQUITY, "Tech", "Chips"),
            Asset(b, "B", AssetClass.EQUITY, "Tech", "Software"),
            Asset(c, "C", AssetClass.CRYPTO, "Layer 1 Crypto", ""),
        ]
    )
    await gateway.application.services.assets.refresh()
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: MarkRow()})
    positions = {a: held("10", 1_000), b: held("-5", -500), c: held("3", 300), d: held("2", 200)}
    await gateway.redis.positions(shard, portfolio_id, positions)
    await gateway.redis.quotes([Quote(symbol, "100", time.time_ns(), "SIM", 1) for symbol in positions])
    values = {"Tech": SectorValue(4 * MICRO, 6 * MICRO), "Gone": SectorValue(-2 * MICRO, 2 * MICRO)}
    await gateway.redis.sectors(shard, portfolio_id, values)
    found = (await ask(gateway, portfolio_id))["allocation"]
    assert found == {
        "bySector": [
            one("Tech", "500", "1500", "0.75", "0.75"),
            one("Layer 1 Crypto", "300", "300", "0.15"),
            one("UNCLASSIFIED", "200", "200", "0.1"),
        ],
        "byAssetClass": [
            one("EQUITY", "500", "1500", "0.75"),
            one("CRYPTO", "300", "300", "0.15"),
            one("UNCLASSIFIED", "200", "200", "0.1"),
        ],
        "byIndustry": [
            one("Chips", "1000", "1000", "0.5"),
            one("Software", "-500", "500", "0.25"),
            one("UNCLASSIFIED", "500", "500", "0.25"),
        ],
        "longExposure": "1500",
        "shortExposure": "-500",
        "grossExposure": "2000",
        "netExposure": "1000",
        "concentration": "0.345",
    }


async def test_without_positions_there_is_nothing_to_spread(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: MarkRow()})
    found = (await ask(gateway, portfolio_id))["allocation"]
    assert (found["bySector"], found["byAssetClass"], found["byIndustry"]) == ([], [], [])
    assert {found[f"{name}Exposure"] for name in ("long", "short", "gross", "net")} == {"0"}
    assert found["concentration"] is None


async def test_without_a_mark_it_is_not_ready(gateway: Gateway, portfolio_id: str) -> None:
    codes = await gateway.codes(QUERY, {"id": portfolio_id})
    assert set(codes) == {"NOT_READY"}


async def test_the_past_has_the_classification_of_its_time(gateway: Gateway) -> None:
    """Two days of life; between them an asset is reclassified, after a while in which nobody had classified it."""
    name = f"p-{uuid.uuid4().hex[:8]}"
    begin = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=3)
    script, long, short = ScriptedLedger(name, begin), f"{name}.L", f"{name}.S"
    script.cash("DEPOSIT", "10000")
    script.quote(long, "100")
    script.quote(short, "50")
    script.fill(long, "BUY", "6", "100")
    script.fill(short, "SELL", "8", "50")
    for day in (1, 2):
        script.at = begin + timedelta(days=day)
        script.record()
    await gateway.ledger.portfolio(name, "ann", opened_at=begin)
    await script.write(gateway.ledger.pool)
    known = Asset(long, "L", AssetClass.EQUITY, "Tech", "Chips")
    pool = gateway.ledger.pool
    await upsert_assets(pool, [replace(known, sector="UNCLASSIFIED", asset_class=AssetClass.UNCLASSIFIED)], begin)
    await upsert_assets(pool, [known], begin + 30 * HOUR)
    await upsert_assets(pool, [replace(known, sector="Energy", industry="Oil")], begin + 40 * HOUR)

    for hours, sector, asset_class in ((29, "UNCLASSIFIED", "UNCLASSIFIED"), (39, "Tech", "EQUITY")):
        found = await ask(gateway, name, begin + hours * HOUR)
        by_sector = {part["name"]: Decimal(part["gross"]) for part in found["allocation"]["bySector"]}
        assert by_sector.get(sector) == (1_000 if sector == "UNCLASSIFIED" else 600)
        assert asset_class in {part["name"] for part in found["allocation"]["byAssetClass"]}
        assert sector in {part["sector"] for part in found["sectorAllocation"]}
        assert "Energy" not in str(found)
    found = (await ask(gateway, name, begin + 48 * HOUR))["allocation"]
    assert found["bySector"] == [one("Energy", "600", "600", "0.6"), one("UNCLASSIFIED", "-400", "400", "0.4")]
    assert [part["name"] for part in found["byIndustry"]] == ["Oil", "UNCLASSIFIED"]
    assert (found["longExposure"], found["shortExposure"], found["concentration"]) == ("600", "-400", "0.52")
    assert plain(from_micro(script.portfolio.cash)) == "9800"
