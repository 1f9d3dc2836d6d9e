"""Badges that time or price bring about, proved by a real evaluator: at flush, by due date, also by the next owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from engine.badges import BadgeEventKind, BadgeMessage, Proof, badge_message_decoder, load_rules
from engine.runtime.settings import Settings
from engine.stores.badges_postgres import sync_rules
from engine.stores.ledger_postgres import Fenced, Lease
from tests.running_system import EarlierClock, System, connected, deposit, fill, opening, running, until, until_answered
from workers.catalogue import load_assets

MONTH = timedelta(days=30)
ALMOST_A_MONTH_AGO = EarlierClock(MONTH - timedelta(seconds=8))


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        flush_interval_ms=20,
    )
    async with connected(settings) as one:
        async with one.pool.acquire() as connection:
            await sync_rules(connection, load_rules())
        yield one


async def proved(system: System) -> dict[str, BadgeMessage]:
    """What the outbox holds, by event id; nothing is there twice."""
    rows = await system.pool.fetch("SELECT event_id, topic, payload FROM outbox")
    assert {row["topic"] for row in rows} <= {system.settings.badge_topic}
    return {row["event_id"]: badge_message_decoder.decode(row["payload"]) for row in rows}


async def when(system: System, event_id: str, timeout_s: float = 15) -> BadgeMessage:
    async def is_there() -> bool:
        return event_id in await proved(system)

    await until_answered(is_there, timeout_s)
    return (await proved(system))[event_id]


def bought(name: str, opened_at: datetime, event_id: str, quantity: str = "1") -> Any:
    return msgspec.structs.replace(fill(name, "BUY", quantity, "100", event_id), executed_at=opened_at)


async def booked_at(system: System, event_id: str) -> datetime:
    return await system.pool.fetchval("SELECT recorded_at FROM ledger_entry WHERE event_id = $1", event_id)


async def test_a_nav_is_proved_by_the_flush_that_reaches_it(system: System) -> None:
    async with running(system.settings) as evaluator:
        await system.quote("AAPL", "100")
        await system.send(opening("p-1"), deposit("p-1", "999000", "d"), fill("p-1", "BUY", "10", "100", "b"))
        await when(system, "first_fill:1#p-1#1")
        await system.quote("AAPL", "199")
        await system.mark_when("p-1", lambda mark: mark.nav == 999_990_000_000)
        assert "whale:1#p-1#1" not in await proved(system)
        await system.quote("AAPL", "200.5")
        whale = await when(system, "whale:1#p-1#1")
        await system.quote("AAPL", "150")
        await system.mark_when("p-1", lambda mark: mark.nav < 1_000_000_000_000)
        await system.quote("AAPL", "300")
        await system.mark_when("p-1", lambda mark: mark.nav == 1_001_000_000_000)
        await until(lambda: "whale" in evaluator.badges.book.states("p-1"))
    assert (whale.evidence.nav, whale.evidence.prices) == ("1000005", {"AAPL": "200.5"})
    assert (whale.evidence.figure, whale.evidence.ledger_sequence) == ("1000005", 3)
    assert sorted(await proved(system)) == ["first_fill:1#p-1#1", "whale:1#p-1#1"]


async def test_a_nav_with_an_unpriced_position_proves_nothing_yet(system: System) -> None:
    async with running(system.settings):
        await system.send(opening("p-1"), fill("p-1", "BUY", "10", "100", "b"), deposit("p-1", "2000000", "d"))
        await system.mark_when("p-1", lambda mark: mark.nav == 2_000_000_000_000)
        await asyncio.sleep(0.3)
        assert "whale:1#p-1#1" not in await proved(system)
        await system.quote("AAPL", "1")
        assert (await when(system, "whale:1#p-1#1")).evidence.nav == "1999010"


async def test_a_nav_that_its_finder_could_not_write_is_found_by_the_next_owner(system: System) -> None:
    async with running(system.settings) as first:

        async def fail(*_: object) -> None:
            raise Fenced("not any more")

        first.badges._store.prove = fail  # type: ignore[method-assign]
        await system.send(opening("p-1"), deposit("p-1", "1000000", "d"))
        await until(lambda: bool(first.badges._found) or not first.owned)
    assert "whale:1#p-1#1" not in await proved(system)
    async with running(system.settings):
        await when(system, "whale:1#p-1#1")


async def test_a_nav_that_fell_before_it_was_written_is_proved_all_the_same(system: System) -> None:
    async with running(system.settings) as evaluator:
        prove, is_away = evaluator.badges._store.prove, True

        async def sometimes(lease: Lease, proofs: Sequence[Proof]) -> None:
            if is_away:
                raise ConnectionError("PostgreSQL is away")
            await prove(lease, proofs)

        evaluator.badges._store.prove = sometimes  # type: ignore[method-assign]
        await system.quote("AAPL", "1000000")
        await system.send(opening("p-1"), deposit("p-1", "100", "d"), fill("p-1", "BUY", "1", "100", "b"))
        await until(lambda: any(evaluator.badges._found.values()))
        await system.quote("AAPL", "5")
        await system.mark_when("p-1", lambda mark: mark.nav == 5_000_000)
        before = evaluator.owned[await system.shard_of("p-1")]
        evaluator.load_again(before)
        await until(lambda: evaluator.owned[before.lease.shard] is not before)
        assert "whale:1#p-1#1" not in await proved(system)
        is_away = False
        assert (await when(system, "whale:1#p-1#1")).evidence.nav == "1000000"
        await until(lambda: not any(evaluator.badges._found.values()))


async def test_a_position_is_proved_when_it_is_old_enough(system: System) -> None:
    executed_at = datetime.now(UTC) - 2 * MONTH
    async with running(system.settings, ALMOST_A_MONTH_AGO):
        await system.send(opening("p-1"), bought("p-1", executed_at, "b1"), opening("p-2"))
        await system.send(bought("p-2", executed_at, "c1"))
        await when(system, "first_fill:1#p-1#1")
        await when(system, "first_fill:1#p-2#1")
    since = await booked_at(system, "b1")
    async with running(system.settings):
        await system.send(bought("p-1", executed_at, "b2"), fill("p-2", "SELL", "1", "100", "c2"))
        await system.mark_when("p-2", lambda mark: mark.ledger_sequence == 3)
        assert datetime.now(UTC) < since + MONTH, "the machine is too slow for this test"
        assert "diamond_hands:1#p-1#1" not in await proved(system)
        held = await when(system, "diamond_hands:1#p-1#1")
    assert since + MONTH <= held.at <= since + MONTH + timedelta(seconds=2)
    evidence = held.evidence
    assert (evidence.symbol, evidence.opened_at, evidence.since, evidence.figure) == ("AAPL", executed_at, since, "30")
    assert not [event_id for event_id in await proved(system) if event_id.startswith("diamond_hands:1#p-2")]


async def test_nobody_has_held_for_long_what_was_told_of_a_moment_ago(system: System) -> None:
    """A fill says itself when it was executed; what is said to be long ago, and closed at once, was not held."""
    async with running(system.settings) as evaluator:
        await system.send(opening("p-1"), bought("p-1", datetime.now(UTC) - 2 * MONTH, "b1"), opening("p-2"))
        await system.send(fill("p-1", "SELL", "1", "100", "s1"), bought("p-2", datetime.now(UTC) - 2 * MONTH, "b2"))
        await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 3)
        await system.mark_when("p-2", lambda mark: mark.ledger_sequence == 2)
        shard = await system.shard_of("p-2")
        due_at = evaluator.badges.book.next_due(shard)
        assert due_at is not None and abs(due_at - datetime.now(UTC) - MONTH) < timedelta(minutes=1)
    assert sorted(await proved(system)) == ["first_fill:1#p-1#1", "first_fill:1#p-2#1"]


async def test_a_due_date_survives_a_take_over(system: System) -> None:
    async with running(system.settings, ALMOST_A_MONTH_AGO):
        await system.send(opening("p-1"), bought("p-1", datetime.now(UTC) - 2 * MONTH, "b1"))
        await when(system, "first_fill:1#p-1#1")
    async with running(system.settings) as second:
        await when(system, "diamond_hands:1#p-1#1")
        await until(lambda: "diamond_hands" in second.badges.book.states("p-1"))
    async with running(system.settings) as third:
        await until(lambda: "diamond_hands" in third.badges.book.states("p-1"))
        assert third.badges.book.states("p-1").keys() == {"first_fill", "diamond_hands"}
        await system.send(fill("p-1", "BUY", "1", "100", "more"))
        await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 3)
    assert sorted(await proved(system)) == ["diamond_hands:1#p-1#1", "first_fill:1#p-1#1"]


SYMBOLS = ("AAPL", "XOM", "JPM", "PFE", "NEE")
FOUR = dict(zip(SYMBOLS, ("Tech", "Energy", "Banks", "Health", "Health"), strict=True))
FIVE = FOUR | {"NEE": "Utilities"}


async def classify(system: System, sectors: dict[str, str]) -> None:
    rows = "".join(f"{symbol},,EQUITY,{sector},\n" for symbol, sector in sectors.items())
    await load_assets(system.settings, f"symbol,name,asset_class,sector,industry\n{rows}")


async def buy_all(system: System) -> None:
    await system.send(opening("p-1"), *(fill("p-1", "BUY", "1", "100", f"b-{of}", of) for of in SYMBOLS))
    await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 6)


def check_diversified(found: BadgeMessage) -> None:
    assert (found.evidence.event_id, found.evidence.ledger_sequence, found.evidence.figure) == (None, 6, "5")
    assert {one.sector: Decimal(one.weight or 0) for one in found.evidence.sectors or ()} == dict.fromkeys(
        FIVE.values(), Decimal("0.2")
    )


async def test_a_reclassified_position_is_looked_at_again(system: System) -> None:
    """Five symbols in four sectors are not diversified, until one of them is said to be of a fifth."""
    await classify(system, FOUR)
    async with running(system.settings):
        await buy_all(system)
        assert "diversified:1#p-1#1" not in await proved(system)
        await classify(system, FIVE)
        check_diversified(await when(system, "diversified:1#p-1#1"))


async def test_what_was_loaded_while_nobody_was_there_is_looked_at_by_the_next_owner(system: System) -> None:
    await classify(system, FOUR)
    async with running(system.settings):
        await buy_all(system)
    await classify(system, FIVE)
    async with running(system.settings):
        check_diversified(await when(system, "diversified:1#p-1#1"))
    await classify(system, FOUR)
    async with running(system.settings) as third:
        assert (await when(system, "diversified:1#p-1#2")).kind is BadgeEventKind.LAPSED
        await until(lambda: not third.badges.book.states("p-1")["diversified"].active)
    assert len(await proved(system)) == 3


async def test_a_look_that_was_not_written_is_the_next_owner_s_and_what_was_looked_at_is_not_looked_at_again(
    system: System,
) -> None:
    await classify(system, FOUR)
    async with running(system.settings) as first:
        await buy_all(system)

        async def fail(*_: object) -> None:
            raise Fenced("not any more")

        first.badges._store.prove = fail  # type: ignore[method-assign]
        await classify(system, FIVE)
        await until(lambda: len(first.owned) < 4)
    assert "diversified:1#p-1#1" not in await proved(system)
    async with running(system.settings):
        await when(system, "diversified:1#p-1#1")
    newest = await system.pool.fetchval("SELECT max(arrival) FROM asset_version")
    looked_at = "SELECT classified_arrival FROM shard WHERE id = (SELECT shard FROM portfolio WHERE id = 'p-1')"

    async def is_noted() -> bool:
        return await system.pool.fetchval(looked_at) == newest

    await until_answered(is_noted)
    # A price alone lapses nothing, whoever comes to own the shard.
    async with running(system.settings) as third:
        await system.quote("AAPL", "1000000")
        await system.mark_when("p-1", lambda mark: mark.positions_value > 1_000_000_000_000)
        assert third.badges.book.states("p-1")["diversified"].active
    async with running(system.settings) as fourth:
        await until(lambda: len(fourth.badges._classified) == 4)
        assert fourth.badges.book.states("p-1")["diversified"].active
    assert "diversified:1#p-1#2" not in await proved(system)
