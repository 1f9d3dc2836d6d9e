"""Dead letters: records that will never be booked go to `<topic>.dlq`, with their bytes, the reason and their place."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from aiokafka import AIOKafkaProducer

from engine.booking import DeadLetter
from engine.runtime import telemetry

# A record as large as the broker takes would not fit with the headers of a dead letter; the rest is cut off.
DEAD_LETTER_BYTES_MAX = 900_000
DEAD_LETTER_KEY_BYTES_MAX = 1_000

_log = structlog.get_logger(__name__)


async def bury(producer: AIOKafkaProducer, topic: str, partition: int, letters: Sequence[DeadLetter]) -> None:
    """Count, log and produce dead letters of one partition; returns when Kafka has them. Raises KafkaError."""
    for letter in letters:
        telemetry.EVENTS.labels("dead_letter").inc()
        telemetry.DEAD_LETTERS.labels(letter.code).inc()
        place = {"topic": topic, "partition": partition, "offset": letter.record.offset}
        _log.warning("dead_letter", code=letter.code, reason=letter.reason, **place)
    await asyncio.gather(*(_produce(producer, topic, partition, letter) for letter in letters))


async def _produce(producer: AIOKafkaProducer, topic: str, partition: int, letter: DeadLetter) -> None:
    headers = [
        ("code", letter.code.encode()),
        ("reason", letter.reason.encode()),
        ("topic", topic.encode()),
        ("partition", b"%d" % partition),
        ("offset", b"%d" % letter.record.offset),
    ]
    value, key = letter.record.value or b"", letter.record.key
    if len(value) > DEAD_LETTER_BYTES_MAX:
        headers.append(("full_length", b"%d" % len(value)))
    await producer.send_and_wait(
        f"{topic}.dlq",
        value[:DEAD_LETTER_BYTES_MAX],
        key=None if key is None else key[:DEAD_LETTER_KEY_BYTES_MAX],
        headers=headers,
    )
