"""Readiness: every dependency is really asked, and each that is missing is named."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import pytest
from aiokafka.errors import KafkaError

from engine.runtime.connections import make_producer
from engine.runtime.embedded import start_broker
from engine.runtime.reaper import ChildProcesses
from engine.stores import events_kafka
from engine.stores.events_kafka import EventProducer, ProducerAwayError
from tests.gateway import WAIT_S, Gateway, make_settings


async def missing(gateway: Gateway) -> set[str]:
    async with gateway.client() as client:
        ready = await client.get("/readyz")
    found = set(ready.json().get("missing", {}))
    assert ready.status_code == (503 if found else 200)
    return found


async def test_not_ready_before_there_is_a_shard(gateway: Gateway) -> None:
    await gateway.ledger.pool.execute("DELETE FROM portfolio")
    await gateway.ledger.pool.execute("DELETE FROM shard")
    assert await missing(gateway) == {"evaluators", "kafka"}


async def test_ready_once_every_shard_has_an_evaluator(gateway: Gateway) -> None:
    for shard in (1, 2):
        await gateway.ledger.portfolio(f"p-{uuid.uuid4().hex[:8]}", "ann", shard)
    assert await missing(gateway) == {"evaluators", "kafka"}
    await gateway.ledger.leases(60)
    assert await missing(gateway) == {"kafka"}
    # Given back, as an evaluator does that stops.
    await gateway.ledger.pool.execute("UPDATE shard SET lease_until = NULL WHERE id = 2")
    assert await missing(gateway) == {"evaluators", "kafka"}
    await gateway.ledger.leases(-1)
    assert await missing(gateway) == {"evaluators", "kafka"}


async def test_a_broker_that_has_died_is_not_reached(topic: str) -> None:
    with ChildProcesses() as children:
        bootstrap, _ = start_broker(children)
        producer = EventProducer(topic, acknowledge_timeout_s=5)
        await producer.start(make_producer(make_settings("", "", kafka_bootstrap=bootstrap, topic=topic), "test"))
        await producer.reach()
    try:
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(ProducerAwayError):
                while True:
                    await producer.reach()
                    await asyncio.sleep(0.1)
    finally:
        await producer.stop()


class SlowProducer:
    """A producer whose broker takes connections and never answers."""

    def __init__(self) -> None:
        self.client = self
        self.asked_count = 0

    async def start(self) -> None: ...

    async def force_metadata_update(self) -> bool:
        self.asked_count += 1
        await asyncio.sleep(60)
        return True

    async def partitions_for(self, topic: str) -> set[int]:
        return {0}


async def test_a_broker_that_never_answers_is_asked_shortly_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_kafka, "REACH_TIMEOUT_MS", 100)
    slow: Any = SlowProducer()
    producer = EventProducer("topic", acknowledge_timeout_s=5)
    await producer.start(slow)
    begun_s = time.monotonic()
    answers = await asyncio.gather(*(producer.reach() for _ in range(20)), return_exceptions=True)
    assert time.monotonic() - begun_s < 0.9
    assert {type(answer) for answer in answers} == {ProducerAwayError}
    assert slow.asked_count == 1


class BrokenProducer(SlowProducer):
    async def force_metadata_update(self) -> bool:
        raise KafkaError("broken")


async def test_what_the_client_raises_is_no_answer_either() -> None:
    broken: Any = BrokenProducer()
    producer = EventProducer("topic", acknowledge_timeout_s=5)
    with pytest.raises(ProducerAwayError):
        await producer.reach()
    await producer.start(broken)
    for _ in range(2):
        with pytest.raises(ProducerAwayError):
            await producer.reach()
