"""What one poll books: what comes shortly after the first event, an even share of each partition, nothing twice."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from workers.event_gathering import GATHER_MS, Gathered, gather_events

ONE, TWO = TopicPartition("t", 0), TopicPartition("t", 1)


class Partitions:
    """A consumer of partitions that hand out `per_fetch` records at a time, as a broker may."""

    def __init__(self, waiting: dict[TopicPartition, int], per_fetch: int = 1_000) -> None:
        self.waiting = {one: list(range(count)) for one, count in waiting.items()}
        self.per_fetch = per_fetch
        self.asked: list[int] = []

    def assignment(self) -> set[TopicPartition]:
        return set(self.waiting)

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int, max_records: int) -> Gathered:
        self.asked.append(timeout_ms)
        found: dict[TopicPartition, Any] = {}
        for one in sorted(partitions):
            count = min(self.per_fetch, max_records - sum(map(len, found.values())))
            taken, self.waiting[one] = self.waiting[one][:count], self.waiting[one][count:]
            if taken:
                found[one] = taken
        return found


async def test_a_partition_that_is_behind_leaves_the_others_their_share() -> None:
    consumer = Partitions({ONE: 10_000, TWO: 70})
    gathered = await gather_events(consumer, 100, 50)
    assert gathered == {ONE: list(range(50)), TWO: list(range(50))}
    assert await gather_events(consumer, 100, 50) == {ONE: list(range(50, 100)), TWO: list(range(50, 70))}


async def test_small_answers_of_the_broker_are_booked_together() -> None:
    consumer = Partitions({ONE: 40, TWO: 10}, per_fetch=7)
    assert await gather_events(consumer, 100, 30) == {ONE: list(range(30)), TWO: list(range(10))}


async def test_without_events_nobody_waits_longer_than_the_patience() -> None:
    consumer = Partitions({ONE: 0})
    assert await gather_events(consumer, 70, 50) == {}
    assert consumer.asked == [70]


async def test_who_has_no_patience_does_not_gather_for_long() -> None:
    """A step may become due meanwhile."""
    consumer = Partitions({ONE: 1})
    assert await gather_events(consumer, 3, 50) == {ONE: [0]}
    assert consumer.asked[0] == 3 and all(asked <= 3 for asked in consumer.asked)


async def test_an_endless_stream_is_gathered_for_a_moment_only() -> None:
    consumer: Any = SimpleNamespace(assignment=lambda: {ONE}, getmany=slow_record)
    began_s = time.monotonic()
    gathered = await gather_events(consumer, 100, 10**6)
    assert len(gathered[ONE]) > 1
    assert time.monotonic() - began_s < 10 * GATHER_MS / 1_000


async def slow_record(*_: TopicPartition, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[int]]:
    time.sleep(0.001)
    return {ONE: [0]}


async def test_a_real_log_is_gathered_whole_and_in_order(kafka_bootstrap: str, topic: str) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=kafka_bootstrap)
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka_bootstrap, fetch_max_wait_ms=50)
    await producer.start()
    await consumer.start()
    try:
        for number in range(31):
            await producer.send_and_wait(topic, b"%d" % number, key=b"p-1")
        consumer.assign([TopicPartition(topic, number) for number in await producer.partitions_for(topic)])
        await consumer.seek_to_beginning()
        offsets: list[int] = []
        while len(offsets) < 31:
            for records in (await gather_events(consumer, 500, 8)).values():
                assert len(records) <= 8
                offsets += [record.offset for record in records]
    finally:
        await consumer.stop()
        await producer.stop()
    assert offsets == list(range(31))
