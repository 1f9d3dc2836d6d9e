"""Corporate actions through the evaluator on real servers: topic in, ledger, Book and hot state out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from engine.corporate_actions import CorporateAction, DividendAction, SplitAction, encode_action
from engine.instants import to_ns
from engine.messages import ReversalEvent
from engine.positions import HotPosition, hot_position_decoder
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from tests.running_system import (
    MICRO,
    System,
    connected,
    deposit,
    fill,
    opening,
    read_all,
    running,
    until,
    until_answered,
)


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        actions_topic=f"{topic}-actions",
        flush_interval_ms=20,
    )
    async with connected(settings) as one:
        yield one


def now() -> datetime:
    return datetime.now(UTC)


def split(action_id: str, at: datetime, ratio: str = "4") -> SplitAction:
    return SplitAction(action_id=action_id, symbol="AAPL", ratio=ratio, effective_at=at)


async def announce(system: System, *actions: CorporateAction) -> None:
    for action in actions:
        value = encode_action(action)
        await system.producer.send_and_wait(system.settings.actions_topic, value, key=action.symbol.encode())


async def bought(system: System, *names: str) -> None:
    for name in names:
        await system.send(
            opening(name), deposit(name, "10000", f"d-{name}"), fill(name, "BUY", "10", "100", f"b-{name}")
        )
    await system.quote("AAPL", "120")
    for name in names:
        await system.mark_when(name, lambda mark: mark.nav == 10_200 * MICRO)


async def position(system: System, name: str) -> HotPosition:
    packed = await system.redis.hget(redis_keys.positions(await system.shard_of(name), name), "AAPL")
    return hot_position_decoder.decode(packed)


async def kinds(system: System, name: str) -> list[str]:
    rows = await system.pool.fetch("SELECT kind FROM ledger_entry WHERE portfolio_id = $1 ORDER BY sequence", name)
    return [row["kind"] for row in rows]


async def test_an_announced_split_comes_between_the_last_old_quote_and_the_first_new_one(system: System) -> None:
    """Marks of all holders, on all shards, are watched throughout: NAV never leaves what it is worth."""
    names = [f"p-{n}" for n in range(8)]
    async with running(system.settings) as evaluator:
        await bought(system, *names)
        at = now() + timedelta(seconds=1.5)
        await announce(system, split("s-1", at))
        await until(lambda: evaluator.actions.next_pending_ns is not None)
        seen: set[int] = set()

        async def done() -> bool:
            marks = [await system.mark(name) for name in names]
            seen.update(mark.nav for mark in marks if mark)
            return all(mark and mark.ledger_sequence == 4 for mark in marks)

        # Stamped after the split and sent before it: in its own shares it is the same value.
        await system.quote("AAPL", "30", to_ns(at) + 1)
        await until_answered(done)
        assert now() >= at
        assert seen == {10_200 * MICRO}
        mark = await system.mark_when(names[0], lambda mark: mark.ledger_sequence == 4)
        assert (mark.day_pnl, mark.corporate, mark.unrealized) == (200 * MICRO, 0, 200 * MICRO)
        await system.quote("AAPL", "31")
        await system.mark_when(names[0], lambda mark: mark.nav == (9_000 + 40 * 31) * MICRO)
        # In old shares, late: not to be believed.
        await system.quote("AAPL", "500", to_ns(at) - 1)
        await system.quote("MSFT", "1")
        held = await position(system, names[0])
    assert (held.quantity, held.cost, held.splits) == ("40", 1_000 * MICRO, ((to_ns(at), "4:1"),))
    after = await system.mark(names[0])
    assert after is not None and after.nav == (9_000 + 40 * 31) * MICRO
    assert [await kinds(system, name) for name in names] == [["OPEN", "DEPOSIT", "FILL", "SPLIT"]] * len(names)
    assert await system.pool.fetchval("SELECT bool_or(late) FROM ledger_entry") is False


async def test_a_fill_in_new_shares_waits_for_the_split_and_moves_nav_by_nothing(system: System) -> None:
    """It is there at the very instant of the split, before the boundary's grace is over."""
    async with running(system.settings):
        await bought(system, "p-1")
        at = now() + timedelta(seconds=1)
        await announce(system, split("s-1", at))
        await until_answered(lambda: system.pool.fetchval("SELECT count(*) FROM corporate_action"))
        await asyncio.sleep((at - now()).total_seconds() + 0.01)
        executed = msgspec.structs.replace(fill("p-1", "BUY", "4", "30", "b-new"), executed_at=at)
        await system.send(executed)
        await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 5)
    rows = await system.pool.fetch("SELECT kind, quantity, nav_effect FROM ledger_entry ORDER BY sequence OFFSET 3")
    assert [tuple(row) for row in rows] == [("SPLIT", 30, 0), ("FILL", 4, 0)]


async def test_until_a_new_quote_comes_the_old_price_counts_in_new_shares(system: System) -> None:
    async with running(system.settings):
        await bought(system, "p-1")
        await announce(system, split("s-1", now() + timedelta(seconds=1)))
        mark = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
        assert (mark.nav, mark.positions_value) == (10_200 * MICRO, 1_200 * MICRO)
        await system.send(msgspec.structs.replace(fill("p-1", "SELL", "20", "30", "s"), executed_at=now()))
        mark = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 5)
    assert (mark.nav, mark.realized) == (10_200 * MICRO, 100 * MICRO)


async def test_a_shard_taken_over_after_a_split_reads_the_old_price_in_new_shares(system: System) -> None:
    async with running(system.settings):
        await bought(system, "p-1")
        await announce(system, split("s-1", now() + timedelta(seconds=1)))
        await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
    before = await system.mark("p-1")
    async with running(system.settings):
        mark = await system.mark_when("p-1", lambda mark: before is not None and mark.epoch > before.epoch)
    assert mark.nav == 10_200 * MICRO


async def test_a_split_that_came_while_nobody_evaluated_is_booked_before_anything_is_shown(system: System) -> None:
    async with running(system.settings):
        await bought(system, "p-1")
        at = now() + timedelta(seconds=1.5)
        await announce(system, split("s-1", at))
        await until_answered(lambda: system.pool.fetchval("SELECT count(*) FROM corporate_action"))
    await until_answered(lambda: passed(at))
    await system.quote("AAPL", "30")
    async with running(system.settings):
        mark = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
    assert (mark.nav, (await position(system, "p-1")).quantity) == (10_200 * MICRO, "40")


async def passed(at: datetime) -> bool:
    return now() > at


async def test_a_late_split_counts_from_its_arrival_and_says_so(system: System) -> None:
    async with running(system.settings):
        await bought(system, "p-1")
        at = now()
        await system.quote("AAPL", "30")
        await system.mark_when("p-1", lambda mark: mark.nav == 9_300 * MICRO)
        await announce(system, split("s-1", at))
        mark = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
    assert (mark.nav, mark.corporate, mark.day_pnl) == (10_200 * MICRO, 900 * MICRO, 200 * MICRO)
    row = await system.pool.fetchrow("SELECT late, nav_effect FROM ledger_entry WHERE kind = 'SPLIT'")
    assert tuple(row) == (True, 900)


async def test_a_dividend_whose_dates_are_past_is_owed_and_paid_at_once_in_this_order(system: System) -> None:
    today = now().date()
    action = DividendAction(
        action_id="dv", symbol="AAPL", amount="0.5", ex_date=today - timedelta(9), pay_date=today - timedelta(2)
    )
    async with running(system.settings):
        early = msgspec.structs.replace(fill("p-1", "SELL", "10", "100", "s"), executed_at=now() - timedelta(days=30))
        await system.send(opening("p-1"), early)
        await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 2)
        await announce(system, action)
        mark = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
        assert (mark.cash, mark.receivables, mark.income) == (995 * MICRO, 0, -5 * MICRO)
    assert await kinds(system, "p-1") == ["OPEN", "FILL", "DIVIDEND_ACCRUED", "DIVIDEND_PAID"]
    assert await system.pool.fetchval("SELECT count(*) FROM ledger_entry WHERE late") == 2
    assert await system.pool.fetchval("SELECT count(*) FROM shard_action WHERE late") == 8


async def test_a_dividend_moves_nav_only_by_what_it_pays(system: System) -> None:
    ex_date = (now() - timedelta(days=1)).date()
    pay_date = ex_date + timedelta(days=400)
    action = DividendAction(action_id="dv", symbol="AAPL", amount="0.5", ex_date=ex_date, pay_date=pay_date)
    async with running(system.settings):
        old = fill("p-1", "BUY", "10", "100", "b")
        early = type(old)(
            **{f: getattr(old, f) for f in old.__struct_fields__} | {"executed_at": now() - timedelta(30)}
        )
        await system.send(opening("p-1"), deposit("p-1", "10000", "d"), early)
        await system.quote("AAPL", "120")
        await system.mark_when("p-1", lambda mark: mark.nav == 10_200 * MICRO)
        await announce(system, action)
        mark = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
    assert (mark.nav, mark.receivables, mark.income, mark.cash) == (10_205 * MICRO, 5 * MICRO, 5 * MICRO, 9_000 * MICRO)


async def test_bad_actions_are_dead_letters_and_the_topic_goes_on(system: System) -> None:
    at = now() + timedelta(days=30)
    bad = {
        b'{"type":"split","action_id":"z","symbol":"AAPL","ratio":"0",'
        b'"effective_at":"2026-11-20T15:00:00Z"}': b"BAD_RATIO",
        b'{"type":"dividend","action_id":"z","symbol":"AAPL","amount":"1","ex_date":"2026-11-20",'
        b'"pay_date":"2026-11-19"}': b"PAID_BEFORE_EX",
        b"{": b"MALFORMED",
        encode_action(split("s-1", at, "5")): b"ACTION_ID_REUSED",
    }
    async with running(system.settings):
        await announce(system, split("s-1", at), split("s-1", at))
        for value in bad:
            await system.producer.send_and_wait(system.settings.actions_topic, value, key=b"AAPL")
        await announce(system, split("s-2", at))
        await until_answered(lambda: recorded(system, 2))
    letters = await read_all(system, f"{system.settings.actions_topic}.dlq")
    assert dict(letters) == bad


async def recorded(system: System, count: int) -> bool:
    return await system.pool.fetchval("SELECT count(*) FROM corporate_action") == count


async def test_actions_read_once_are_not_read_again_after_a_restart(system: System) -> None:
    at = now() + timedelta(days=30)
    async with running(system.settings):
        await announce(system, split("s-1", at))
        await until_answered(lambda: recorded(system, 1))
    before = await system.pool.fetch("SELECT * FROM topic_offset ORDER BY partition")
    async with running(system.settings):
        await announce(system, split("s-2", at))
        await until_answered(lambda: recorded(system, 2))
    after = await system.pool.fetch("SELECT * FROM topic_offset ORDER BY partition")
    assert sum(row["next_offset"] for row in after) == sum(row["next_offset"] for row in before) + 1


async def test_a_reversal_takes_a_fill_out_of_every_figure(system: System) -> None:
    async with running(system.settings):
        await bought(system, "p-1")
        first = await system.mark_when("p-1", lambda mark: mark.nav == 10_200 * MICRO)
        await system.send(fill("p-1", "BUY", "5", "200", "wrong", fee="2"))
        wrong = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
        back = ReversalEvent(event_id="r", portfolio_id="p-1", reverses="wrong", effective_at=now())
        await system.send(back)
        mark = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 5)
    # 5 at 200 lose 80 each against 120.
    assert (wrong.nav, wrong.fees, wrong.trading - first.trading) == (9_798 * MICRO, 2 * MICRO, -400 * MICRO)
    assert (mark.nav, mark.fees, mark.realized, mark.cash) == (10_200 * MICRO, 0, 0, 9_000 * MICRO)
    assert mark.trading == first.trading
    assert (await position(system, "p-1")).cost == 1_000 * MICRO
    assert mark.day_pnl_ratio_e12 == 20_000_000_000
