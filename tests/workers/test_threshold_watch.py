"""Thresholds through a real evaluator: seen at the flush, told once, found again by the next owner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest

from engine.marks import MarkQuality
from engine.runtime.settings import Settings
from engine.stores.thresholds_postgres import PortfolioThresholds
from engine.thresholds import Threshold, ThresholdFigure, ThresholdSide
from tests.running_system import MICRO, System, connected, deposit, fill, opening, running

NAV, ABOVE, BELOW = ThresholdFigure.NAV, ThresholdSide.ABOVE, ThresholdSide.BELOW


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        flush_interval_ms=20,
        threshold_poll_interval_ms=100,
    )
    async with connected(settings) as one:
        yield one


async def begin(system: System, *names: str) -> None:
    """Portfolios with 1,000 in cash and one AAPL bought at 100."""
    for name in names:
        await system.send(opening(name), deposit(name, "1000", f"d-{name}"), fill(name, "BUY", "1", "100", f"b-{name}"))
    await system.quote("AAPL", "100")
    for name in names:
        await system.mark_when(name, lambda mark: mark.ledger_sequence == 3 and mark.quality is MarkQuality.LIVE)


async def create(system: System, name: str, side: ThresholdSide, bound: str, hysteresis: str = "0") -> Threshold:
    thresholds = PortfolioThresholds(lambda: system.pool)
    return (await thresholds.create(name, NAV, side, Decimal(bound), Decimal(hysteresis), 50)).threshold


async def price(system: System, text: str, name: str) -> None:
    """A price, and its mark in hot state."""
    await system.quote("AAPL", text)
    await system.mark_when(name, lambda mark: mark.nav == int((900 + Decimal(text)) * MICRO))


async def told(system: System, count: int, timeout_s: float = 10) -> list[dict[str, Any]]:
    """The messages, once there are so many."""
    async with asyncio.timeout(timeout_s):
        while len(rows := await system.pool.fetch("SELECT payload FROM outbox ORDER BY id")) < count:
            await asyncio.sleep(0.02)
    return [json.loads(row[0]) for row in rows]


async def armed(system: System, threshold: Threshold, wanted: bool) -> None:
    async with asyncio.timeout(10):
        statement = "SELECT armed FROM threshold WHERE id = $1"
        while await system.pool.fetchval(statement, threshold.threshold_id) is not wanted:
            await asyncio.sleep(0.02)


async def watched(evaluator: Any, count: int) -> None:
    async with asyncio.timeout(10):
        while sum(len(one.thresholds) for one in evaluator.thresholds._watched.values()) != count:
            await asyncio.sleep(0.02)


async def test_a_price_that_reaches_the_bound_is_told_once(system: System) -> None:
    async with running(system.settings) as evaluator:
        await begin(system, "p-1", "p-2")
        one = await create(system, "p-1", ABOVE, "1010", "5")
        await watched(evaluator, 1)
        for text in ("109.5", "110", "111", "106", "110", "105"):
            await price(system, text, "p-1")
        (message,) = await told(system, 1)
        await asyncio.sleep(0.3)
        assert len(await told(system, 1)) == 1
        await price(system, "104.5", "p-1")
        await armed(system, one, True)
        await price(system, "112", "p-1")
        again = (await told(system, 2))[1]
    assert (message["event_id"], message["portfolio_id"], message["value"]) == (f"{one.threshold_id}#1", "p-1", "1010")
    assert (again["event_id"], again["value"], again["bound"]) == (f"{one.threshold_id}#2", "1012", "1010")
    assert {row[0] for row in await system.pool.fetch("SELECT topic FROM outbox")} == {system.settings.threshold_topic}


async def test_one_that_is_crossed_already_is_told_at_once(system: System) -> None:
    """Nothing moves: only the arrival has the portfolio compared."""
    async with running(system.settings):
        await begin(system, "p-1")
        one = await create(system, "p-1", BELOW, "1000")
        (message,) = await told(system, 1)
        assert (message["threshold_id"], message["value"]) == (one.threshold_id, "1000")


async def test_a_deleted_one_is_not_watched_any_more(system: System) -> None:
    async with running(system.settings) as evaluator:
        await begin(system, "p-1")
        one = await create(system, "p-1", ABOVE, "1010")
        await watched(evaluator, 1)
        assert await PortfolioThresholds(lambda: system.pool).delete("user-1", one.threshold_id)
        await watched(evaluator, 0)


async def test_the_next_owner_knows_what_was_told_and_what_was_not(system: System) -> None:
    async with running(system.settings) as evaluator:
        await begin(system, "p-1")
        first = await create(system, "p-1", ABOVE, "1010", "5")
        await price(system, "111", "p-1")
        await told(system, 1)
        await create(system, "p-1", ABOVE, "1020", "5")
        await watched(evaluator, 2)
    await system.quote("AAPL", "121")  # while nobody evaluates
    async with running(system.settings):
        messages = await told(system, 2)
        assert [message["bound"] for message in messages] == ["1010", "1020"]
        await price(system, "100", "p-1")
        await armed(system, first, True)
        await price(system, "110", "p-1")
        assert (await told(system, 3))[2]["event_id"] == f"{first.threshold_id}#2"


async def test_what_is_seen_while_postgresql_refuses_is_told_later(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(system.settings) as evaluator:
        await begin(system, "p-1")
        await create(system, "p-1", ABOVE, "1010", "5")
        await watched(evaluator, 1)
        store, write = evaluator.thresholds._store, evaluator.thresholds._store.write_crossings
        refused = 0

        async def refuse(*arguments: Any) -> int:
            nonlocal refused
            refused += 1
            if refused < 4:
                raise ConnectionError("away")
            return await write(*arguments)

        monkeypatch.setattr(store, "write_crossings", refuse)
        await price(system, "110", "p-1")
        await price(system, "100", "p-1")  # it is over before anybody could be told
        (message,) = await told(system, 1)
        assert message["value"] == "1010" and refused >= 4


async def test_what_waits_is_bounded_and_what_is_beyond_its_bound_is_found_again(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = system.settings.model_copy(update={"threshold_crossings_waiting_max": 1})
    async with running(settings) as evaluator:
        await begin(system, "p-1")
        for bound in ("1010", "1011"):
            await create(system, "p-1", ABOVE, bound)
        await watched(evaluator, 2)
        store, write = evaluator.thresholds._store, evaluator.thresholds._store.write_crossings

        async def refuse(*arguments: Any) -> int:
            monkeypatch.setattr(store, "write_crossings", write)
            raise ConnectionError("away")

        monkeypatch.setattr(store, "write_crossings", refuse)
        await price(system, "115", "p-1")
        assert {message["bound"] for message in await told(system, 2)} == {"1010", "1011"}
