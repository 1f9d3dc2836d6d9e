"""`badges verify`: awards made by the real pipeline come out again; a forged, a changed and a missing one are named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from engine.assets import Asset, AssetClass
from engine.badge_proofs import BadgeFault, FaultKind
from engine.badges import load_rules
from engine.messages import FillEvent
from engine.runtime.clock import WallClock
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import upsert_assets
from engine.stores.badges_postgres import sync_rules
from tests.running_system import AT, EarlierClock, System, connected, deposit, fill, opening, running, until_answered
from workers.badge_commands import verify_badges
from workers.badges import run_badges

SECTORS = ("Energy", "Materials", "Industrials", "Utilities", "Financials")


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        badge_topic=f"{topic}-badges",
        threshold_topic=f"{topic}-thresholds",
        flush_interval_ms=20,
    )
    async with connected(settings) as one:
        async with one.pool.acquire() as connection:
            await sync_rules(connection, load_rules())
        assets = [Asset(f"S{n}", sector, AssetClass.EQUITY, sector, "") for n, sector in enumerate(SECTORS)]
        await upsert_assets(one.pool, assets, AT)
        yield one


@asynccontextmanager
async def awarding(system: System) -> AsyncIterator[None]:
    """Portfolio p-3 has bought something 40 days ago."""
    settings = system.settings
    stop = asyncio.Event()
    task = asyncio.create_task(run_badges(settings, WallClock(), stop))
    try:
        async with running(settings, EarlierClock(timedelta(days=40))):
            await system.send(opening("p-3"), held_long("p-3"))
            await until_answered(lambda: system.pool.fetchval("SELECT count(*) FROM position"))
        async with running(settings):
            yield
    finally:
        stop.set()
        await task


async def awards(system: System) -> set[tuple[str, str, bool]]:
    rows = await system.pool.fetch("SELECT portfolio_id, badge_id, active FROM badge_award")
    return {tuple(row) for row in rows}


async def verify(system: System, portfolio_id: str | None = None) -> list[BadgeFault]:
    faults: list[BadgeFault] = []
    verified = await verify_badges(system.settings, portfolio_id, faults.append, lambda *_: None)
    assert verified.faults_count == len(faults)
    return faults


def held_long(name: str) -> FillEvent:
    event = fill(name, "BUY", "1", "10", f"{name}-old", symbol="S0")
    return FillEvent(**{field: getattr(event, field) for field in event.__struct_fields__} | _LONG_AGO)


_LONG_AGO = {"executed_at": AT - timedelta(days=40)}


async def trade(system: System) -> set[tuple[str, str, bool]]:
    """Three portfolios whose fills, sectors, streak, NAV and time prove badges; answers which."""
    await system.send(opening("p-1"), deposit("p-1", "10000", "d1"))
    for number in range(5):
        await system.send(fill("p-1", "BUY", "10", "100", f"b{number}", symbol=f"S{number}", fee="1"))
    for number in range(5):
        await system.send(
            fill("p-1", "SELL", "5", "110", f"s{number}", symbol=f"S{number}"),
            fill("p-1", "BUY", "1", "100", f"x{number}", symbol="X"),
            fill("p-1", "SELL", "1", "101", f"y{number}", symbol="X"),
        )
    # Two sectors are left: it lapses.
    await system.send(*[fill("p-1", "SELL", "5", "90", f"z{number}", symbol=f"S{number}") for number in range(3)])
    await system.send(opening("p-2"), deposit("p-2", "2000000", "d2"), fill("p-2", "BUY", "1", "10", "w", symbol="S1"))
    return {
        ("p-1", "first_fill", True),
        ("p-1", "diversified", False),
        ("p-1", "hot_streak", True),
        ("p-2", "first_fill", True),
        ("p-2", "whale", True),
        ("p-3", "first_fill", True),
        ("p-3", "diamond_hands", True),
    }


async def test_what_the_pipeline_awards_comes_out_again(system: System) -> None:
    async with awarding(system):
        for number in range(5):
            await system.quote(f"S{number}", "105")
        expected = await trade(system)

        async def awarded() -> bool:
            return await awards(system) == expected

        await until_answered(awarded)
    assert await verify(system) == []
    with pytest.raises(KeyError):
        await verify(system, "nobody")


async def test_a_forged_a_changed_and_a_missing_award_are_named(system: System) -> None:
    async with awarding(system):
        expected = await trade(system)
        assert expected

        async def awarded() -> bool:
            return {(name, badge) for name, badge, _ in await awards(system)} >= {
                ("p-1", "hot_streak"),
                ("p-2", "first_fill"),
                ("p-3", "diamond_hands"),
            }

        await until_answered(awarded)
    assert await verify(system) == []
    pool = system.pool
    await pool.execute(
        "INSERT INTO badge_award SELECT 'p-3', 'centurion', 1, now(), true, evidence FROM badge_award LIMIT 1"
    )
    assert [(one.portfolio_id, one.badge_id, one.kind) for one in await verify(system)] == [
        ("p-3", "centurion", FaultKind.FORGED)
    ]
    await pool.execute("DELETE FROM badge_award WHERE badge_id = 'centurion'")
    # All of a proof's traces are gone: only the ledger still says that it is deserved.
    for table in ("badge_award", "badge_event", "badge_state"):
        await pool.execute(f"DELETE FROM {table} WHERE portfolio_id = 'p-3' AND badge_id = 'diamond_hands'")
    assert [(one.badge_id, one.kind) for one in await verify(system, "p-3")] == [("diamond_hands", FaultKind.MISSING)]
    # An award is taken away behind the program's back, another is switched off.
    await pool.execute("DELETE FROM badge_award WHERE portfolio_id = 'p-2' AND badge_id = 'first_fill'")
    await pool.execute("UPDATE badge_award SET active = false WHERE portfolio_id = 'p-1' AND badge_id = 'hot_streak'")
    found = {(one.portfolio_id, one.badge_id, one.kind) for one in await verify(system)}
    assert {("p-2", "first_fill", FaultKind.DIFFERS), ("p-1", "hot_streak", FaultKind.DIFFERS)} <= found
    await pool.execute("DELETE FROM badge_event WHERE portfolio_id = 'p-2' AND badge_id = 'first_fill'")
    faults = {(one.badge_id, one.kind) for one in await verify(system, "p-2")}
    assert ("first_fill", FaultKind.LOST) in faults


@pytest.mark.parametrize(
    ("badge", "old", "new"),
    [
        ("first_fill", '"figure":"1"', '"figure":"2"'),
        ("hot_streak", '"ledger_sequence":', '"ledger_sequence":1'),
        ("diversified", '"S1":"', '"S1":"9'),
        ("diversified", '"sector":"Energy"', '"sector":"Energie"'),
        ("whale", '"nav":"', '"nav":"9'),
        ("diamond_hands", '"opened_at":"2026', '"opened_at":"2025'),
        ("first_fill", '"threshold":"1"', '"threshold":"0"'),
    ],
)
async def test_a_proof_that_was_changed_does_not_come_out(system: System, badge: str, old: str, new: str) -> None:
    async with awarding(system):
        for number in range(5):
            await system.quote(f"S{number}", "105")
        expected = await trade(system)

        async def awarded() -> bool:
            return await awards(system) == expected

        await until_answered(awarded)
    for table in ("badge_award", "badge_event"):
        status = await system.pool.execute(
            f"UPDATE {table} SET evidence = replace(evidence, $1, $2)"
            " WHERE badge_id = $3 AND position($1 in evidence) > 0",
            old,
            new,
            badge,
        )
        assert status != "UPDATE 0"
    faults = await verify(system)
    assert {(one.badge_id, one.kind) for one in faults} == {(badge, FaultKind.WRONG)}
