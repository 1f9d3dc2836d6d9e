"""The allocation stream over a real socket: snapshot, fills, quotes, a reclassification, heartbeat, reset."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from engine.assets import Asset, AssetClass
from engine.messages import Quote
from engine.sectors import SectorValue
from resolvers import position_streams
from tests.builders import MICRO, MarkRow, frame, held
from tests.gateway import Gateway, Stream
from tests.resolvers.test_allocation_queries import ALLOCATION

QUERY = f"""subscription($id: String!, $rate: Float) {{ allocationUpdates(portfolioId: $id, maxRateHz: $rate) {{
    kind portfolioId epoch sequence conflated {ALLOCATION} }} }}"""
FAST_HZ = 20


async def begin(gateway: Gateway, shard: int, portfolio_id: str) -> tuple[MarkRow, str, str]:
    """Ten of one asset and ten of another, each at 10."""
    row, one, two = MarkRow(), f"{portfolio_id}.A", f"{portfolio_id}.B"
    await gateway.ledger.assets([tech(one), Asset(two, two, AssetClass.EQUITY, "Energy", "")])
    await gateway.application.services.assets.refresh()
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: row})
    await gateway.redis.positions(shard, portfolio_id, {one: held("10", 100), two: held("10", 100)})
    await gateway.redis.quotes([Quote(symbol, "10", time.time_ns(), "SIM", 1) for symbol in (one, two)])
    values = {"Tech": SectorValue(3 * MICRO, 3 * MICRO), "Energy": SectorValue(MICRO, MICRO)}
    await gateway.redis.sectors(shard, portfolio_id, values)
    return row, one, two


def tech(symbol: str) -> Asset:
    return Asset(symbol, symbol, AssetClass.EQUITY, "Tech", "Chips")


async def sectors_of(stream: Stream, *passing: str) -> tuple[str, dict[str, tuple[str, str | None]]]:
    """The next message's kind, and its sectors' weights now and at the last fill; those of kind `passing` pass."""
    update = await stream.next()
    while update["kind"] in passing:
        update = await stream.next()
    slices = update["allocation"]["bySector"]
    return update["kind"], {part["name"]: (part["weight"], part["weightAtLastFill"]) for part in slices}


async def test_fills_and_quotes_move_it(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row, one, two = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id, "rate": FAST_HZ})
        snapshot = await stream.next()
        assert (snapshot["kind"], snapshot["portfolioId"], snapshot["epoch"]) == ("SNAPSHOT", portfolio_id, 1)
        allocation = snapshot["allocation"]
        assert [(part["name"], part["weight"], part["weightAtLastFill"]) for part in allocation["bySector"]] == [
            ("Energy", "0.5", "0.25"),
            ("Tech", "0.5", "0.75"),
        ]
        assert (allocation["grossExposure"], allocation["concentration"]) == ("200", "0.5")
        await gateway.redis.quote("feed", 1, [Quote(one, "30", time.time_ns(), "SIM", 2)])
        assert await sectors_of(stream, "HEARTBEAT") == (
            "UPDATE",
            {"Tech": ("0.75", "0.75"), "Energy": ("0.25", "0.25")},
        )
        # A fill: one is closed, and the sector values are those of now.
        await gateway.redis.positions(shard, portfolio_id, {two: held("-4", -40)})
        await gateway.redis.redis.delete(f"sector_values:{{{shard}}}:{portfolio_id}")
        await gateway.redis.sectors(shard, portfolio_id, {"Energy": SectorValue(-40 * MICRO, 40 * MICRO)})
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, ledger_sequence=2)})
        assert await sectors_of(stream, "HEARTBEAT") == ("UPDATE", {"Energy": ("1", "1")})
        await gateway.redis.marks(shard, 2, {portfolio_id: row})
        await gateway.redis.point(shard, 2)
        await gateway.redis.publish(shard, frame(shard, 2, 1, {portfolio_id: row}))
        assert await sectors_of(stream, "HEARTBEAT") == ("RESET", {"Energy": ("1", "1")})
    await gateway.watches(0)
    assert not gateway.application.services.assets._watching


async def test_what_moves_no_allocation_sends_none(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    """A mark alone, or the same price again; a heartbeat says that it still holds, though quotes go on and on."""
    row, one, _ = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id, "rate": FAST_HZ})
        await stream.next()
        await gateway.listening(shard)
        await asyncio.sleep(0.6)  # the positions have been read once more
        for number in range(2, 30):
            await gateway.redis.flush(shard, 1, number, {portfolio_id: row.at(number)})
            await gateway.redis.quote("same", number, [Quote(one, "10", time.time_ns(), "SIM", number)])
            await asyncio.sleep(0.05)
        kinds = []
        with suppress(TimeoutError):
            while True:
                kinds.append((await stream.next(wait_s=0.3))["kind"])
    assert set(kinds) == {"HEARTBEAT"}
    assert len(kinds) <= 3


async def test_a_reclassification_shows_without_a_quote(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    _, one, _ = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id, "rate": FAST_HZ})
        while (await stream.next())["kind"] != "HEARTBEAT":
            pass
        await gateway.ledger.assets([replace(tech(one), sector="Industrials")])
        await gateway.application.services.assets.refresh()
        update = await stream.next(wait_s=0.6)  # before the next heartbeat
        assert update["kind"] == "UPDATE"
        assert {part["name"] for part in update["allocation"]["bySector"]} == {"Industrials", "Energy"}


async def test_what_an_evaluator_makes_of_a_reclassification_later_shows_too(
    gateway: Gateway, shard: int, portfolio_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API may know of a load before the evaluator has written the weights at the last fill anew."""
    monkeypatch.setattr(position_streams, "RECLASSIFIED_INTERVAL_S", 1.5)
    _, one, _ = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id, "rate": FAST_HZ})
        while (await stream.next())["kind"] != "HEARTBEAT":
            pass
        await gateway.ledger.assets([replace(tech(one), sector="Industrials")])
        await gateway.application.services.assets.refresh()
        _, weights = await sectors_of(stream, "HEARTBEAT")
        assert weights == {"Industrials": ("0.5", None), "Energy": ("0.5", "0.25")}
        await asyncio.sleep(position_streams.SETTLE_INTERVAL_S + 0.3)
        values = {"Industrials": SectorValue(3 * MICRO, 3 * MICRO), "Energy": SectorValue(MICRO, MICRO)}
        await gateway.redis.redis.delete(f"sector_values:{{{shard}}}:{portfolio_id}")
        await gateway.redis.sectors(shard, portfolio_id, values)
        _, weights = await sectors_of(stream, "HEARTBEAT")
        assert weights == {"Industrials": ("0.5", "0.75"), "Energy": ("0.5", "0.25")}


async def test_whose_portfolio_and_how_often(gateway: Gateway, portfolio_id: str) -> None:
    async with gateway.socket(gateway.token("bob")) as socket:
        assert await (await socket.subscribe(QUERY, {"id": portfolio_id})).code() == "NOT_FOUND"
    async with gateway.socket() as socket:
        assert await (await socket.subscribe(QUERY, {"id": portfolio_id, "rate": 0})).code() == "BAD_RATE"
