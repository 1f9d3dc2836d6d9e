"""Thresholds in PostgreSQL: what arrives is seen, a crossing is told once, under the lease or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal

import pytest

from engine.instants import to_datetime
from engine.stores.ledger_postgres import Fenced
from engine.stores.thresholds_postgres import PortfolioThresholds, TooManyThresholds, WatchedThresholds
from engine.stores.webhook_deliveries import WebhookDeliveries
from engine.thresholds import Crossing, Threshold, ThresholdFigure, ThresholdSide
from tests.bookkeeping import opening
from tests.shard_ledger import ShardLedger, shard_ledger

TOPIC = "threshold-events"
AT_NS = 1_795_000_000_000_000_000


@pytest.fixture
async def ledger(fresh_database: str) -> AsyncIterator[ShardLedger]:
    async with shard_ledger(fresh_database) as one:
        await one.book(opening("p-1"), opening("p-2"))
        yield one


def shown(ledger: ShardLedger) -> PortfolioThresholds:
    return PortfolioThresholds(lambda: Pool(ledger))  # type: ignore[arg-type, return-value]


class Pool:
    """The test's one connection, as a pool."""

    def __init__(self, ledger: ShardLedger) -> None:
        self._admin = ledger.admin
        self.fetch = ledger.admin.fetch

    def acquire(self) -> Pool:
        return self

    async def __aenter__(self) -> object:
        return self._admin

    async def __aexit__(self, *_: object) -> None:
        pass


async def create(
    ledger: ShardLedger, portfolio_id: str = "p-1", bound: str = "100.5", count_max: int = 50
) -> Threshold:
    figure, side = ThresholdFigure.NAV, ThresholdSide.ABOVE
    return (
        await shown(ledger).create(portfolio_id, figure, side, Decimal(bound), Decimal("0.25"), count_max)
    ).threshold


def crossing(threshold: Threshold, fired: bool = True, value: int = 101_000_000) -> Crossing:
    return Crossing(threshold, fired, value, AT_NS, 17)


async def outbox(ledger: ShardLedger) -> list[tuple[str, str, str]]:
    rows = await ledger.admin.fetch("SELECT event_id, topic, key FROM outbox ORDER BY id")
    return [tuple(row) for row in rows]


async def test_what_was_created_is_what_is_watched(ledger: ShardLedger) -> None:
    watched = WatchedThresholds(ledger.engine)
    assert await watched.arrived(0) == (0, frozenset())
    one = await create(ledger)
    assert one.armed and (one.bound, one.hysteresis) == (Decimal("100.5"), Decimal("0.25"))
    assert await watched.of_shard(0) == [one]
    assert await watched.of_shard(1) == []
    assert await watched.arrived(0) == (1, frozenset({0}))
    assert await watched.arrived(1) == (1, frozenset())


async def test_a_deletion_arrives_too(ledger: ShardLedger) -> None:
    watched, api = WatchedThresholds(ledger.engine), shown(ledger)
    one = await create(ledger)
    (owner,) = [row[0] for row in await ledger.admin.fetch("SELECT owner FROM portfolio WHERE id = 'p-1'")]
    assert await api.delete("somebody else", one.threshold_id) is False
    assert await api.delete(owner, one.threshold_id) is True
    assert await api.delete(owner, one.threshold_id) is False
    assert (await watched.of_shard(0), await api.list("p-1")) == ([], [])
    assert await watched.arrived(1) == (2, frozenset({0}))


async def test_numbers_of_arrivals_are_never_given_twice(ledger: ShardLedger) -> None:
    one = await create(ledger)
    await ledger.admin.execute("UPDATE threshold SET deleted_at = now() - interval '2 days'")
    await WebhookDeliveries(ledger.admin).prune(30)  # type: ignore[arg-type]
    assert await ledger.admin.fetchval("SELECT id FROM threshold") == one.threshold_id  # it has the newest number
    await create(ledger)
    await WebhookDeliveries(ledger.admin).prune(30)  # type: ignore[arg-type]
    assert [row[0] for row in await ledger.admin.fetch("SELECT arrival FROM threshold")] == [2]


async def test_a_portfolio_has_so_many(ledger: ShardLedger) -> None:
    await create(ledger, count_max=1)
    await create(ledger, "p-2", count_max=1)
    with pytest.raises(TooManyThresholds):
        await create(ledger, count_max=1)


async def test_a_crossing_its_state_and_its_message_are_one_transaction(ledger: ShardLedger) -> None:
    one = await create(ledger)
    watched = WatchedThresholds(ledger.engine)
    assert await watched.write_crossings(ledger.lease, TOPIC, [crossing(one)]) == 1
    assert await outbox(ledger) == [(f"{one.threshold_id}#1", TOPIC, "p-1")]
    payload = json.loads(await ledger.admin.fetchval("SELECT payload FROM outbox"))
    assert (payload["value"], payload["bound"], payload["ledger_sequence"]) == ("101", "100.5", 17)
    (row,) = await shown(ledger).list("p-1")
    assert (row.threshold.armed, row.crossings_count, row.crossed_at) == (False, 1, to_datetime(AT_NS))


async def test_the_same_crossing_is_told_once_however_often_it_is_written(ledger: ShardLedger) -> None:
    one = await create(ledger)
    watched = WatchedThresholds(ledger.engine)
    assert await watched.write_crossings(ledger.lease, TOPIC, [crossing(one), crossing(one)]) == 1
    assert await watched.write_crossings(ledger.lease, TOPIC, [crossing(one)]) == 0
    both_ways = [crossing(one, False), crossing(one), crossing(one, False)]
    assert await watched.write_crossings(ledger.lease, TOPIC, both_ways) == 1
    assert [event_id for event_id, *_ in await outbox(ledger)] == [f"{one.threshold_id}#{n}" for n in (1, 2)]
    assert (await watched.of_shard(0))[0].armed


async def test_a_former_owner_tells_nothing(ledger: ShardLedger) -> None:
    one = await create(ledger)
    watched = WatchedThresholds(ledger.engine)
    former = replace(ledger.lease, epoch=ledger.lease.epoch - 1)
    with pytest.raises(Fenced):
        await watched.write_crossings(former, TOPIC, [crossing(one)])
    assert await outbox(ledger) == []
    assert (await watched.of_shard(0))[0].armed


async def test_a_deleted_threshold_tells_nothing(ledger: ShardLedger) -> None:
    one = await create(ledger)
    await ledger.admin.execute("UPDATE threshold SET deleted_at = now()")
    assert await WatchedThresholds(ledger.engine).write_crossings(ledger.lease, TOPIC, [crossing(one)]) == 0
    assert await outbox(ledger) == []


async def test_a_commit_wakes_the_relay(ledger: ShardLedger) -> None:
    one, woken = await create(ledger), asyncio.Event()
    await ledger.admin.add_listener("outbox", lambda *_: woken.set())
    await WatchedThresholds(ledger.engine).write_crossings(ledger.lease, TOPIC, [crossing(one)])
    await asyncio.wait_for(woken.wait(), 5)
