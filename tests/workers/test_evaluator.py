"""The evaluator against real servers: events in, ledger and hot state out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal

import pytest

from engine.marks import MarkQuality
from engine.messages import encode_event
from engine.positions import hot_position_decoder
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from tests.running_system import MICRO, System, connected, deposit, fill, opening, read_all, running, until


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
        yield one


async def test_golden_vector_1_end_to_end(system: System) -> None:
    async with running(system.settings):
        await system.send(
            opening("p-1"),
            deposit("p-1", "10000", "d"),
            fill("p-1", "BUY", "10", "100", "b1", fee="1"),
            fill("p-1", "BUY", "10", "110", "b2", fee="1"),
            fill("p-1", "SELL", "5", "120", "s1", fee="1"),
        )
        unpriced = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 5)
        assert unpriced.quality is MarkQuality.MISSING
        await system.quote("AAPL", "120")
        mark = await system.mark_when("p-1", lambda mark: mark.quality is MarkQuality.LIVE)
    assert (mark.cash, mark.nav) == (8497 * MICRO, 10297 * MICRO)
    assert (mark.realized, mark.unrealized, mark.fees) == (75 * MICRO, 225 * MICRO, 3 * MICRO)
    shard = await system.shard_of("p-1")
    packed = await system.redis.hget(redis_keys.positions(shard, "p-1"), "AAPL")
    position = hot_position_decoder.decode(packed)
    assert (position.quantity, position.cost, position.realized) == ("15", 1575 * MICRO, 75 * MICRO)


async def test_a_redelivered_event_has_no_second_effect(system: System) -> None:
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "100", "d"), deposit("p-1", "100", "d"))
        await system.send(deposit("p-1", "7", "last"))
        mark = await system.mark_when("p-1", lambda mark: mark.cash in (107 * MICRO, 207 * MICRO))
    assert (mark.cash, mark.ledger_sequence) == (107 * MICRO, 3)


async def test_bad_events_become_dead_letters_and_the_partition_goes_on(system: System) -> None:
    bad = [
        (b"not json", "MALFORMED"),
        (encode_event(deposit("p-1", "-5", "x1")), "NOT_POSITIVE"),
        (encode_event(deposit("p-1", "NaN", "x2")), "NOT_FINITE"),
        (encode_event(fill("p-1", "BUY", "1", "0", "x3")), "NOT_POSITIVE"),
        (encode_event(deposit("p-1", "5", "d")), "EVENT_ID_REUSED"),
        (encode_event(opening("p-1", "again")), "ALREADY_OPEN"),
        (encode_event(fill("p-2", "BUY", "1", "1", "x4")), "WRONG_KEY"),
        (b"{" * 70_000, "TOO_LONG"),
    ]
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "100", "d"))
        for value, _ in bad:
            await system.send_bytes("p-1", value)
        await system.send(deposit("p-1", "1", "last"))
        mark = await system.mark_when("p-1", lambda mark: mark.cash == 101 * MICRO)
    assert mark.ledger_sequence == 3
    letters = await read_all(system, f"{system.settings.topic}.dlq")
    assert sorted((value, code) for value, code in letters) == sorted((value, code.encode()) for value, code in bad)


async def test_a_tick_moves_only_holders(system: System) -> None:
    async with running(system.settings):
        for name in ("p-1", "p-2"):
            await system.send(opening(name), deposit(name, "1000", f"d-{name}"))
        await system.send(fill("p-1", "BUY", "2", "100", "b1"), fill("p-2", "BUY", "1", "50", "b2", symbol="MSFT"))
        await system.quote("AAPL", "100")
        await system.quote("MSFT", "50")
        live = lambda mark: mark.quality is MarkQuality.LIVE and mark.ledger_sequence == 3  # noqa: E731
        before = await system.mark_when("p-2", live)
        await system.mark_when("p-1", live)
        await system.quote("AAPL", "101.5")
        moved = await system.mark_when("p-1", lambda mark: mark.nav == 1003 * MICRO)
        assert moved.day_pnl == 3 * MICRO
        assert await system.mark("p-2") == before


async def test_hot_state_comes_back_after_redis_lost_everything(system: System) -> None:
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "10", "d"), fill("p-1", "BUY", "2", "1.5", "b"))
        await system.quote("AAPL", "2")
        before = await system.mark_when("p-1", lambda mark: mark.nav == 11 * MICRO)
        await system.redis.flushall()
        after = await system.mark_when("p-1", lambda mark: True)
        shard = await system.shard_of("p-1")
        assert await system.redis.hgetall(redis_keys.positions(shard, "p-1"))
        assert await system.redis.zrange(redis_keys.sectors(shard, "p-1"), 0, -1)
    assert (after.nav, after.day_pnl) == (before.nav, before.day_pnl)


async def test_hot_state_comes_back_after_redis_returned_with_an_older_copy(system: System) -> None:
    """Nothing moves the portfolio again, and another node wrote nothing of it: only its owner knows that it is old."""
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "10", "d"), fill("p-1", "BUY", "2", "1.5", "b"))
        await system.quote("AAPL", "2")
        await system.mark_when("p-1", lambda mark: mark.nav == 11 * MICRO)
        copies = {key: await system.redis.dump(key) for key in await system.redis.keys("*{*}*")}
        await system.send(fill("p-1", "SELL", "1", "2.5", "s"))
        await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
        for key, copy in copies.items():
            await system.redis.restore(key, 0, copy, replace=True)
        assert (await system.mark("p-1")).ledger_sequence == 3
        after = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
        assert after.nav == 11_500_000
        shard = await system.shard_of("p-1")
        packed = await system.redis.hget(redis_keys.positions(shard, "p-1"), "AAPL")
        assert hot_position_decoder.decode(packed).quantity == "1"


async def test_a_second_evaluator_takes_half_and_a_dead_one_is_replaced(system: System) -> None:
    names = [f"p-{n}" for n in range(16)]
    settings = system.settings.model_copy(update={"lease_duration_ms": 1_000, "lease_renewal_interval_ms": 200})
    async with running(settings) as first:
        await system.send(*(opening(name) for name in names))
        await system.send(*(deposit(name, "1", f"a-{name}") for name in names))
        async with running(settings) as second:
            await until(lambda: len(first.owned) == len(second.owned) == 2)
            await system.send(*(deposit(name, "1", f"b-{name}") for name in names))
            for name in names:
                await system.mark_when(name, lambda mark: mark.cash == 2 * MICRO)
        await until(lambda: len(first.owned) == 4)
        await system.send(*(deposit(name, "1", f"c-{name}") for name in names))
        for name in names:
            await system.mark_when(name, lambda mark: mark.cash == 3 * MICRO)


async def test_day_base_and_ratio_survive_a_take_over(system: System) -> None:
    """Golden vector 3 in shape: a gain, then a deposit, then a gain; recovered from the ledger alone."""
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "10000", "d1"), fill("p-1", "BUY", "100", "100", "b"))
        await system.quote("AAPL", "101")
        await system.mark_when("p-1", lambda mark: mark.nav == 10_100 * MICRO)
        await system.send(deposit("p-1", "5000", "d2"))
        await system.mark_when("p-1", lambda mark: mark.nav == 15_100 * MICRO)
        await system.quote("AAPL", "102")
        before = await system.mark_when("p-1", lambda mark: mark.nav == 15_200 * MICRO)
    assert before.day_pnl == 200 * MICRO
    assert before.day_pnl_ratio_e12 == round((Decimal("1.01") * 15_200 / 15_100 - 1) * 10**12)
    async with running(system.settings):
        after = await system.mark_when("p-1", lambda mark: mark.epoch > before.epoch)
    assert (after.nav, after.day_pnl, after.day_pnl_ratio_e12) == (
        before.nav,
        before.day_pnl,
        before.day_pnl_ratio_e12,
    )


async def test_a_ledger_set_back_behind_the_evaluator_is_read_again(system: System) -> None:
    """As after a failover to a copy that lacks the last commits: the log still has the events."""
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "5", "d1"), deposit("p-1", "6", "d2"))
        await system.mark_when("p-1", lambda mark: mark.cash == 11 * MICRO)
        shard = await system.shard_of("p-1")
        async with system.pool.acquire() as connection, connection.transaction():
            await connection.execute("ALTER TABLE ledger_entry DISABLE TRIGGER ledger_entry_append_only")
            await connection.execute("DELETE FROM ledger_entry WHERE event_id = 'd2'")
            await connection.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")
            await connection.execute("UPDATE portfolio SET cash = 5, flows = 5, ledger_sequence = 2 WHERE id = 'p-1'")
            await connection.execute("UPDATE shard SET next_offset = next_offset - 1 WHERE id = $1", shard)
        await system.send(deposit("p-1", "7", "d3"))
        mark = await system.mark_when("p-1", lambda mark: mark.cash == 18 * MICRO)
    assert mark.ledger_sequence == 4
