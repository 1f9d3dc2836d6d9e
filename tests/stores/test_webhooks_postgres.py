"""Webhooks in PostgreSQL: who is told of what, once; secrets and their rotation; deliveries taken and settled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from engine.stores.webhook_deliveries import AttemptOutcome, TakenDelivery, WebhookDeliveries
from engine.stores.webhooks_postgres import (
    CHANNEL,
    TooManyTests,
    TooManyWebhooks,
    UnknownPortfolio,
    Webhook,
    Webhooks,
    enqueue,
    record_threshold,
)
from engine.thresholds import ThresholdMessage, encode_threshold_message
from engine.webhooks import SECRET_PREFIX, AttemptError, DeliveryStatus, WebhookKind
from tests.builders import LedgerBuilder

UNLOCKED, CROSSED = WebhookKind.BADGE_UNLOCKED, WebhookKind.THRESHOLD_CROSSED
URL = "https://hooks.example.com/x"
OK = AttemptOutcome(12, 200, None)
FAILED = AttemptOutcome(7, 500, AttemptError.STATUS)


@pytest.fixture
async def pool(fresh_database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(fresh_database, min_size=1, max_size=4) as one:
        ledger = LedgerBuilder(one)
        for name, owner in (("a-1", "ann"), ("a-2", "ann"), ("b-1", "bob")):
            await ledger.portfolio(name, owner)
        yield one


async def create(pool: asyncpg.Pool, owner: str = "ann", **changes: Any) -> tuple[Webhook, str]:
    values = {"url": URL, "kinds": [UNLOCKED], "portfolio_ids": None, "count_max": 20} | changes
    return await Webhooks(lambda: pool).create(owner, **values)


async def tell(pool: asyncpg.Pool, *events: tuple[str, str, str], waiting_max: int = 100) -> int:
    async with pool.acquire() as connection, connection.transaction():
        rows = [(event_id, name, kind, b'{"figure":"1.50"}') for event_id, name, kind in events]
        return await enqueue(connection, rows, waiting_max)


async def bodies(pool: asyncpg.Pool) -> list[dict[str, Any]]:
    rows = await pool.fetch("SELECT body FROM webhook_delivery ORDER BY webhook_id, event_id")
    return [json.loads(row[0]) for row in rows]


async def take(pool: asyncpg.Pool, count: int = 10, of_each: int = 10, lease_s: int = 30) -> list[TakenDelivery]:
    return list(await WebhookDeliveries(pool).take(count, of_each, 100, (), lease_s))


# -- who is told -------------------------------------------------------------------------------------------------


async def test_an_event_goes_to_the_owners_webhooks_that_are_told_of_its_kind(pool: asyncpg.Pool) -> None:
    everything, _ = await create(pool, kinds=list(WebhookKind))
    one, _ = await create(pool, portfolio_ids=["a-2"])
    await create(pool, kinds=[CROSSED])
    await create(pool, "bob")
    assert await tell(pool, ("e1", "a-1", "UNLOCKED"), ("e2", "a-2", "UNLOCKED"), ("e3", "a-1", "LAPSED")) == 4
    rows = await pool.fetch("SELECT webhook_id, event_id FROM webhook_delivery ORDER BY event_id, webhook_id")
    told = [(everything.webhook_id, "e1"), (everything.webhook_id, "e2"), (one.webhook_id, "e2")]
    assert [tuple(row) for row in rows] == [*told, (everything.webhook_id, "e3")]
    (body,) = [body for body in await bodies(pool) if body["event_id"] == "e3"]
    assert (body["kind"], body["portfolio_id"], body["data"]) == ("BADGE_LAPSED", "a-1", {"figure": "1.50"})
    assert await pool.fetchval("SELECT id FROM webhook_delivery WHERE event_id = 'e3'") == body["delivery_id"]


async def test_the_same_event_makes_one_delivery_however_often_it_comes(pool: asyncpg.Pool) -> None:
    await create(pool)
    assert [await tell(pool, ("e1", "a-1", "UNLOCKED")) for _ in range(3)] == [1, 0, 0]
    assert await tell(pool, ("e1", "a-1", "UNLOCKED"), ("e2", "a-1", "UNLOCKED"), ("e2", "a-1", "UNLOCKED")) == 1
    assert await pool.fetchval("SELECT count(*) FROM webhook_delivery") == 2


async def test_nobody_is_told_of_what_was_rolled_back(pool: asyncpg.Pool) -> None:
    await create(pool)
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        assert await enqueue(connection, [("e1", "a-1", "UNLOCKED", b"{}")]) == 1
        await transaction.rollback()
    assert await bodies(pool) == []
    assert await tell(pool) == 0
    assert await tell(pool, ("e1", "unknown", "UNLOCKED")) == 0


async def test_a_commit_wakes_whoever_listens(pool: asyncpg.Pool) -> None:
    await create(pool)
    woken = asyncio.Event()
    async with pool.acquire() as connection:
        await connection.add_listener(CHANNEL, lambda *_: woken.set())
        await tell(pool, ("e1", "a-1", "UNLOCKED"))
        await asyncio.wait_for(woken.wait(), 5)
        await connection.reset()


async def test_an_inactive_webhook_is_not_told_and_nothing_of_it_is_taken(pool: asyncpg.Pool) -> None:
    webhook, _ = await create(pool)
    await tell(pool, ("e1", "a-1", "UNLOCKED"))
    await pool.execute("UPDATE webhook SET active = false")
    assert await tell(pool, ("e2", "a-1", "UNLOCKED")) == 0
    assert await take(pool) == []
    await pool.execute("UPDATE webhook SET active = true")
    assert [(one.webhook_id, json.loads(one.body)["event_id"]) for one in await take(pool)] == [
        (webhook.webhook_id, "e1")
    ]


async def test_what_waits_for_one_endpoint_is_bounded(pool: asyncpg.Pool) -> None:
    await create(pool)
    await create(pool, "bob")
    assert await tell(pool, *((f"e{n}", "a-1", "UNLOCKED") for n in range(5)), waiting_max=3) == 3
    assert await tell(pool, ("e9", "a-1", "UNLOCKED"), ("e9", "b-1", "UNLOCKED"), waiting_max=3) == 1
    await pool.execute("UPDATE webhook_delivery SET status = 'DELIVERED', due_at = NULL")
    assert await tell(pool, ("e9", "a-1", "UNLOCKED"), waiting_max=3) == 1


async def test_a_crossing_is_recorded_as_its_topic_carries_it(pool: asyncpg.Pool) -> None:
    await create(pool, kinds=[CROSSED])
    message = encode_threshold_message(
        ThresholdMessage(
            event_id="t#1",
            threshold_id="t",
            portfolio_id="a-1",
            figure="NAV",
            side="ABOVE",
            bound="100",
            hysteresis="0",
            value="100.5",
            at=datetime(2026, 11, 20, tzinfo=UTC),
            ledger_sequence=3,
        )
    )
    for _ in range(2):
        async with pool.acquire() as connection, connection.transaction():
            assert await record_threshold(connection, message) == "t#1"
    (body,) = await bodies(pool)
    assert (body["kind"], body["data"]) == ("THRESHOLD_CROSSED", json.loads(message))
    async with pool.acquire() as connection:
        with pytest.raises(msgspec.MsgspecError):
            await record_threshold(connection, b'{"event_id":"x"}')


# -- what a subject has ------------------------------------------------------------------------------------------


async def test_a_webhook_belongs_to_its_owner(pool: asyncpg.Pool) -> None:
    webhook, secret = await create(pool, portfolio_ids=["a-2", "a-1", "a-2"])
    assert (webhook.owner, webhook.portfolio_ids, webhook.active) == ("ann", ["a-1", "a-2"], True)
    assert secret.startswith(SECRET_PREFIX) and len(secret) > 40
    webhooks = Webhooks(lambda: pool)
    assert await webhooks.find("ann", webhook.webhook_id) == webhook
    assert await webhooks.list("ann", 10) == [webhook]
    assert await webhooks.list("ann", 10, webhook.webhook_id) == []
    assert (await webhooks.find("bob", webhook.webhook_id), await webhooks.list("bob", 10)) == (None, [])
    assert await webhooks.rotate("bob", webhook.webhook_id, 10) is None
    assert await webhooks.test("bob", webhook.webhook_id, 0) is None
    assert await webhooks.delete("bob", webhook.webhook_id) is False
    assert await webhooks.delete("ann", webhook.webhook_id) is True
    assert await pool.fetchval("SELECT count(*) FROM webhook_secret") == 0


@pytest.mark.parametrize("named", [["b-1"], ["a-1", "b-1"], ["nobody's"]])
async def test_it_is_told_of_its_owners_portfolios_only(pool: asyncpg.Pool, named: list[str]) -> None:
    with pytest.raises(UnknownPortfolio):
        await create(pool, portfolio_ids=named)
    webhook, _ = await create(pool)
    with pytest.raises(UnknownPortfolio):
        await Webhooks(lambda: pool).update(replace(webhook, portfolio_ids=named))


async def test_a_subject_has_so_many_webhooks_also_when_they_are_made_at_once(pool: asyncpg.Pool) -> None:
    made = await asyncio.gather(*(create(pool, count_max=3) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(one, TooManyWebhooks) for one in made) == 5
    assert len(await Webhooks(lambda: pool).list("ann", 10)) == 3


async def test_a_rotation_leaves_the_former_secret_for_a_while(pool: asyncpg.Pool) -> None:
    webhook, first = await create(pool)
    webhooks = Webhooks(lambda: pool)

    async def valid() -> list[str]:
        await pool.execute("DELETE FROM webhook_delivery")
        await tell(pool, ("e", "a-1", "UNLOCKED"))
        ((taken,)) = await take(pool)
        return list(taken.secrets)

    assert await valid() == [first]
    second, expires_at = await webhooks.rotate("ann", webhook.webhook_id, 3_600)  # type: ignore[misc]
    assert timedelta(minutes=59) < expires_at - datetime.now(UTC) < timedelta(minutes=61)
    assert await valid() == [second, first]
    third, _ = await webhooks.rotate("ann", webhook.webhook_id, 3_600)  # type: ignore[misc]
    assert await valid() == [third, second]
    await pool.execute("UPDATE webhook_secret SET expires_at = now() - interval '1 second' WHERE expires_at > now()")
    assert await valid() == [third]
    fourth, _ = await webhooks.rotate("ann", webhook.webhook_id, 0)  # type: ignore[misc]
    assert await valid() == [fourth]
    await WebhookDeliveries(pool).prune(30)
    assert await pool.fetchval("SELECT count(*) FROM webhook_secret") == 1


async def test_a_test_is_a_delivery_and_not_to_be_had_at_will(pool: asyncpg.Pool) -> None:
    webhook, _ = await create(pool, kinds=[CROSSED])
    webhooks = Webhooks(lambda: pool)
    sent = await webhooks.test("ann", webhook.webhook_id, 10)
    assert sent is not None
    assert (sent.kind, sent.portfolio_id, sent.status, sent.attempts) == ("TEST", None, DeliveryStatus.PENDING, [])
    with pytest.raises(TooManyTests):
        await webhooks.test("ann", webhook.webhook_id, 10)
    # Nor by another webhook of the subject's, or the same one made anew; another subject's is none of its business.
    other, _ = await create(pool, kinds=[CROSSED])
    with pytest.raises(TooManyTests):
        await webhooks.test("ann", other.webhook_id, 10)
    await webhooks.delete("ann", other.webhook_id)
    bobs, _ = await create(pool, owner="bob", kinds=[CROSSED])
    assert await webhooks.test("bob", bobs.webhook_id, 10) is not None
    await webhooks.delete("bob", bobs.webhook_id)
    await pool.execute("UPDATE webhook_test SET tested_at = tested_at - interval '11 seconds'")
    again = await webhooks.test("ann", webhook.webhook_id, 10)
    assert again is not None and again.delivery_id != sent.delivery_id
    with pytest.raises(TooManyTests):
        await webhooks.test("ann", webhook.webhook_id, 0, waiting_max=2)
    assert [body["data"] for body in await bodies(pool)] == [None, None]


# -- deliveries --------------------------------------------------------------------------------------------------


async def test_what_is_held_for_an_inactive_webhook_is_given_up_after_a_day(pool: asyncpg.Pool) -> None:
    webhook, _ = await create(pool)
    resting, _ = await create(pool)
    await tell(pool, ("e1", "a-1", "UNLOCKED"), ("e2", "a-1", "UNLOCKED"))
    await pool.execute("UPDATE webhook SET active = false WHERE id = $1", resting.webhook_id)
    await pool.execute("UPDATE webhook_delivery SET created_at = now() - interval '23 hours'")
    assert await WebhookDeliveries(pool).expire() == 0
    await pool.execute("UPDATE webhook_delivery SET created_at = now() - interval '25 hours' WHERE event_id = 'e1'")
    assert await WebhookDeliveries(pool).expire() == 1
    logged = {one.event_id: one for one in await Webhooks(lambda: pool).deliveries(resting.webhook_id, 10)}
    assert (logged["e1"].status, logged["e1"].due_at, logged["e1"].attempts) == (DeliveryStatus.DEAD, None, [])
    assert logged["e1"].finished_at is not None and logged["e2"].status is DeliveryStatus.PENDING
    others = await Webhooks(lambda: pool).deliveries(webhook.webhook_id, 10)
    assert [one.status for one in others] == [DeliveryStatus.PENDING] * 2


async def test_what_is_taken_is_taken_once_until_its_time_is_over(pool: asyncpg.Pool) -> None:
    await create(pool)
    await tell(pool, *((f"e{n:02}", "a-1", "UNLOCKED") for n in range(20)))
    parts = await asyncio.gather(*(take(pool, 7, 20) for _ in range(4)))
    ids = [one.delivery_id for part in parts for one in part]
    assert len(ids) == len(set(ids)) and {one.number for part in parts for one in part} == {1}
    rest = await take(pool, 30, 30)
    assert len(ids) + len(rest) == 20
    assert await take(pool) == []
    await pool.execute("UPDATE webhook_delivery SET due_at = now() WHERE id = $1", ids[0])
    (again,) = await take(pool)
    assert (again.delivery_id, again.number) == (ids[0], 2)


async def test_no_endpoint_takes_all_the_room(pool: asyncpg.Pool) -> None:
    webhook, _ = await create(pool)
    await create(pool, "bob")
    await tell(pool, *((f"e{n}", "a-1", "UNLOCKED") for n in range(9)), ("e", "b-1", "UNLOCKED"))
    taken = await take(pool, 8, 2)
    assert [one.webhook_id == webhook.webhook_id for one in taken].count(True) == 2 and len(taken) == 3
    assert await WebhookDeliveries(pool).take(8, 2, 8, [webhook.webhook_id], 30) == []
    assert len(await take(pool, 8, 2)) == 2


async def test_no_owner_takes_all_the_room_and_nobody_waits_for_anothers_backlog(pool: asyncpg.Pool) -> None:
    """Also not one with many endpoints; what is under way to them counts."""
    many = [(await create(pool))[0] for _ in range(4)]
    await create(pool, "bob")
    await tell(pool, *((f"e{n}", "a-1", "UNLOCKED") for n in range(9)), ("e", "b-1", "UNLOCKED"))
    deliveries = WebhookDeliveries(pool)
    first = await deliveries.take(2, 4, 3, (), 30)
    assert {one.webhook_id in {of.webhook_id for of in many} for one in first} == {True, False}
    under_way = [one.webhook_id for one in first if one.webhook_id in {of.webhook_id for of in many}]
    assert len(await deliveries.take(20, 4, 3, under_way, 30)) == 2
    assert await deliveries.take(20, 4, 3, [many[0].webhook_id] * 3, 30) == []


async def test_the_log_has_every_attempt(pool: asyncpg.Pool) -> None:
    webhook, _ = await create(pool)
    await tell(pool, ("e1", "a-1", "UNLOCKED"))
    deliveries, webhooks = WebhookDeliveries(pool), Webhooks(lambda: pool)
    (first,) = await take(pool)
    assert await deliveries.settle(first, FAILED, first.taken_at) is DeliveryStatus.PENDING
    (second,) = await take(pool)
    assert (second.delivery_id, second.body, second.number) == (first.delivery_id, first.body, 2)
    assert await deliveries.settle(second, OK, None) is DeliveryStatus.DELIVERED
    assert await take(pool) == []
    (shown,) = await webhooks.deliveries(webhook.webhook_id, 10)
    assert (shown.status, shown.attempts_count, shown.due_at) == (DeliveryStatus.DELIVERED, 2, None)
    assert shown.finished_at is not None
    logged = [(one.number, one.duration_ms, one.status_code, one.error) for one in shown.attempts]
    assert logged == [(2, 12, 200, None), (1, 7, 500, AttemptError.STATUS)]


async def test_a_delivery_without_another_attempt_is_dead(pool: asyncpg.Pool) -> None:
    webhook, _ = await create(pool)
    await tell(pool, ("e1", "a-1", "UNLOCKED"))
    (taken,) = await take(pool)
    timed_out = AttemptOutcome(10_000, None, AttemptError.TIMEOUT)
    assert await WebhookDeliveries(pool).settle(taken, timed_out, None) is DeliveryStatus.DEAD
    assert await take(pool) == []
    (shown,) = await Webhooks(lambda: pool).deliveries(webhook.webhook_id, 10)
    assert (shown.status, shown.attempts[0].error) == (DeliveryStatus.DEAD, AttemptError.TIMEOUT)


async def test_a_late_failure_does_not_undo_what_somebody_else_has_done_since(pool: asyncpg.Pool) -> None:
    await create(pool)
    await tell(pool, ("e1", "a-1", "UNLOCKED"))
    deliveries = WebhookDeliveries(pool)
    (late,) = await take(pool)
    await pool.execute("UPDATE webhook_delivery SET due_at = now()")
    (other,) = await take(pool)
    await deliveries.settle(late, FAILED, late.taken_at)
    assert await take(pool) == []  # it is the other's still
    await deliveries.settle(other, OK, None)
    await deliveries.settle(late, FAILED, None)
    assert await pool.fetchval("SELECT status FROM webhook_delivery") == "DELIVERED"
    await pool.execute("DELETE FROM webhook")
    await deliveries.settle(other, OK, None)  # deleted meanwhile: nothing to say it of
    assert await pool.fetchval("SELECT count(*) FROM webhook_attempt") == 0


async def test_the_log_is_read_in_pages_newest_first(pool: asyncpg.Pool) -> None:
    webhook, _ = await create(pool)
    for number in range(5):
        await tell(pool, (f"e{number}", "a-1", "UNLOCKED"))
    webhooks = Webhooks(lambda: pool)
    first = await webhooks.deliveries(webhook.webhook_id, 3)
    rest = await webhooks.deliveries(webhook.webhook_id, 3, first[-1].delivery_id)
    assert [one.event_id for one in (*first, *rest)] == ["e4", "e3", "e2", "e1", "e0"]


async def test_the_log_reaches_back_so_far(pool: asyncpg.Pool) -> None:
    await create(pool)
    await tell(pool, ("old", "a-1", "UNLOCKED"), ("new", "a-1", "UNLOCKED"))
    await take(pool)
    await pool.execute("UPDATE webhook_delivery SET created_at = now() - interval '31 days' WHERE event_id = 'old'")
    assert await WebhookDeliveries(pool).prune(30) == 1
    assert [body["event_id"] for body in await bodies(pool)] == ["new"]
