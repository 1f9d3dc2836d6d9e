"""Portfolio events into Kafka, topic `portfolio-events`, on behalf of the API's mutations.

The key is the portfolio id in UTF-8, so that Kafka's default partitioner (murmur2) puts an event on the shard
that owns the portfolio. The producer is idempotent and waits for all in-sync replicas: an event that was
acknowledged is neither lost nor doubled. One that was not acknowledged in time may still arrive; whoever sends it
again under the same event id changes nothing by it, because the ledger takes an event id once.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from engine.messages import PortfolioEvent, encode_event

# A probe's answer serves whoever asks within the interval, so that many monitors cost the broker no more than one.
REACH_INTERVAL_MS = 1_000
REACH_TIMEOUT_MS = 1_500


class ProducerAwayError(ConnectionError):
    """Kafka did not acknowledge in time, or was not reached yet."""


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """Where in the log the event stands: its shard is `partition`."""

    partition: int
    offset: int


class EventProducer:
    def __init__(self, topic: str, acknowledge_timeout_s: float) -> None:
        self._topic = topic
        self._acknowledge_timeout_s = acknowledge_timeout_s
        self._producer: AIOKafkaProducer | None = None
        self._reaching = asyncio.Lock()
        self._reached_at_s = -math.inf
        self._unreached = ""

    async def start(self, producer: AIOKafkaProducer) -> None:
        """Take a producer into use. Raises KafkaError, OSError when no broker is reached; may be tried again."""
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        self._producer = producer

    @property
    def started(self) -> bool:
        return self._producer is not None

    async def reach(self) -> None:
        """Ask the broker about the topic, at most once in REACH_INTERVAL_MS. Raises ProducerAwayError when it gave
        no answer within REACH_TIMEOUT_MS."""
        if self._producer is None:
            raise ProducerAwayError("Kafka was not reached yet")
        async with self._reaching:
            if asyncio.get_running_loop().time() - self._reached_at_s >= REACH_INTERVAL_MS / 1_000:
                self._unreached = await self._ask(self._producer)
                self._reached_at_s = asyncio.get_running_loop().time()
        if self._unreached:
            raise ProducerAwayError(self._unreached)

    async def _ask(self, producer: AIOKafkaProducer) -> str:
        """Why the topic can not be written to; empty when it can."""
        try:
            async with asyncio.timeout(REACH_TIMEOUT_MS / 1_000):
                # What is known of the topic outlives its broker: only this answer says that somebody is there.
                if not await producer.client.force_metadata_update():
                    return "no broker answers"
                partitions = await producer.partitions_for(self._topic)
        except (KafkaError, OSError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"
        return "" if partitions else f"topic {self._topic} has no partitions"

    async def produce(self, event: PortfolioEvent) -> Acknowledgement:
        """Send one event and wait for its acknowledgement. Raises ProducerAwayError."""
        if self._producer is None:
            raise ProducerAwayError("Kafka was not reached yet")
        try:
            async with asyncio.timeout(self._acknowledge_timeout_s):
                metadata = await self._producer.send_and_wait(
                    self._topic, encode_event(event), key=event.portfolio_id.encode()
                )
        except (KafkaError, OSError, TimeoutError) as error:
            raise ProducerAwayError(f"not acknowledged within {self._acknowledge_timeout_s} s") from error
        return Acknowledgement(metadata.partition, metadata.offset)

    async def stop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.stop()
