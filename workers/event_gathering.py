"""Gathering events: what one poll of an evaluator books.

A batch costs the evaluator and PostgreSQL about 2 ms each before its first event, and 0.2 ms for every event. So what
follows the first event within GATHER_MS is booked with it, which nobody sees beside the time that a mark may wait for
its flush. Partitions share a poll evenly: none crowds out the others while it is behind, and the server works for one
shard while the evaluator works for another.
"""

from __future__ import annotations

import time
from typing import Protocol

from aiokafka import TopicPartition
from aiokafka.structs import ConsumerRecord

GATHER_MS = 20

Gathered = dict[TopicPartition, list[ConsumerRecord]]


class Consumer(Protocol):
    """As much of AIOKafkaConsumer as is needed."""

    def assignment(self) -> set[TopicPartition]: ...

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int, max_records: int) -> Gathered: ...


async def gather_events(consumer: Consumer, patience_ms: int, share: int) -> Gathered:
    """Records by partition, each in its order, at most `share` of one; nothing when none came within `patience_ms`.

    Raises KafkaError.
    """
    partitions = consumer.assignment()
    gathered: Gathered = {}
    wait_ms, until_s = patience_ms, 0.0
    while asked := [one for one in partitions if len(gathered.get(one, ())) < share]:
        room = share - max(len(gathered.get(one, ())) for one in asked)
        more = await consumer.getmany(*asked, timeout_ms=wait_ms, max_records=room)
        if not more:
            break
        if not gathered:
            until_s = time.monotonic() + min(GATHER_MS, patience_ms) / 1_000
        for partition, records in more.items():
            gathered.setdefault(partition, []).extend(records)
        wait_ms = int((until_s - time.monotonic()) * 1_000)
        if wait_ms <= 0:
            break
    return gathered
