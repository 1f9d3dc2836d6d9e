"""Events and corporate actions into Kafka, many at once, each counted when Kafka has acknowledged it.

    topic               what                        key
    portfolio-events    portfolio events            portfolio_id
    corporate-actions   splits and cash dividends   symbol

The key keeps what belongs together in the order in which it was sent. The producer is idempotent, and at most
IN_FLIGHT_COUNT_MAX messages are unacknowledged. Lines that are no events are sent as they are, because judging them is
the evaluator's task. Whoever sends something again under the same id changes nothing by it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError
from prometheus_client import Counter

from engine.corporate_actions import CorporateAction, encode_action
from engine.messages import PortfolioEvent, encode_event
from engine.runtime.connections import AWAY, Outage, make_producer, stopped_within
from engine.runtime.settings import Settings

IN_FLIGHT_COUNT_MAX = 2_000  # bounds memory; enough to keep every partition's next batch full

EVENTS = Counter("navstream_produced_events_total", "Messages sent to Kafka, by outcome", ["outcome"])

Key = Callable[[bytes], bytes | None]
OnAcknowledged = Callable[[int], None]

_log = structlog.get_logger(__name__)


class _OfPortfolio(msgspec.Struct):
    """As much of an event as its key needs."""

    portfolio_id: str


class _OfSymbol(msgspec.Struct):
    """As much of a corporate action as its key needs."""

    symbol: str


_of_portfolio_decoder = msgspec.json.Decoder(_OfPortfolio)
_of_symbol_decoder = msgspec.json.Decoder(_OfSymbol)


def event_key(value: bytes) -> bytes | None:
    """The Kafka key of an event: its portfolio id, None where there is none to be read."""
    try:
        return _of_portfolio_decoder.decode(value).portfolio_id.encode() or None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def action_key(value: bytes) -> bytes | None:
    """The Kafka key of a corporate action: its symbol, None where there is none to be read."""
    try:
        return _of_symbol_decoder.decode(value).symbol.encode() or None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


class EventSender:
    """Sends messages with a bounded number in flight and counts what became of them."""

    def __init__(
        self,
        producer: AIOKafkaProducer,
        topic: str,
        on_acknowledged: OnAcknowledged | None = None,
        key: Key = event_key,
    ) -> None:
        self._producer = producer
        self._topic = topic
        self._on_acknowledged = on_acknowledged
        self._key = key
        self._room = asyncio.Semaphore(IN_FLIGHT_COUNT_MAX)
        self.acknowledged_count = 0
        self.failed_count = 0

    async def send(self, value: bytes) -> None:
        """Hand one message over; waits while too many are in flight. Raises KafkaError when Kafka is gone."""
        await self._room.acquire()
        try:
            answer = await self._producer.send(self._topic, value=value, key=self._key(value))
        except MessageSizeTooLargeError:
            self._room.release()
            self._fail("too_large")
        except BaseException:
            self._room.release()
            raise
        else:
            answer.add_done_callback(self._answered)

    async def drain(self) -> None:
        """Wait until everything in flight is acknowledged or has failed."""
        for _ in range(IN_FLIGHT_COUNT_MAX):
            await self._room.acquire()
        for _ in range(IN_FLIGHT_COUNT_MAX):
            self._room.release()

    def _answered(self, answer: asyncio.Future[object]) -> None:
        self._room.release()
        if answer.cancelled() or answer.exception() is not None:
            self._fail("cancelled" if answer.cancelled() else type(answer.exception()).__name__)
            return
        self.acknowledged_count += 1
        EVENTS.labels("acknowledged").inc()
        if self._on_acknowledged is not None:
            self._on_acknowledged(self.acknowledged_count)

    def _fail(self, reason: str) -> None:
        if not self.failed_count:
            _log.warning("event_not_acknowledged", reason=reason)
        self.failed_count += 1
        EVENTS.labels("failed").inc()


async def produce_events(
    settings: Settings, events: Iterable[bytes | PortfolioEvent], on_acknowledged: OnAcknowledged | None = None
) -> int:
    """Send events in their order; answers how many Kafka acknowledged. Blank lines are passed over.

    `on_acknowledged` is told the count so far after each one. Raises KafkaError when Kafka is away.
    """
    values = (event.strip() if isinstance(event, bytes) else encode_event(event) for event in events)
    return await _produce(settings, settings.topic, values, event_key, on_acknowledged)


async def produce_actions(
    settings: Settings, actions: Iterable[bytes | CorporateAction], on_acknowledged: OnAcknowledged | None = None
) -> int:
    """The same for corporate actions, whose topic is `actions_topic`."""
    values = (action.strip() if isinstance(action, bytes) else encode_action(action) for action in actions)
    return await _produce(settings, settings.actions_topic, values, action_key, on_acknowledged)


async def announce_actions(
    settings: Settings, actions: Callable[[], Iterable[CorporateAction]], stop: asyncio.Event
) -> int:
    """Produce all of `actions()`, however long Kafka is away; answers how many. 0 when `stop` came first."""
    outage = Outage("kafka")
    while not stop.is_set():
        expected = list(actions())
        try:
            if await produce_actions(settings, expected) == len(expected):
                outage.end()
                return len(expected)
            raise TimeoutError("not all corporate actions were acknowledged")
        except AWAY as error:
            await stopped_within(stop, outage.begin_or_continue(error))
    return 0


async def _produce(
    settings: Settings, topic: str, values: Iterable[bytes], key: Key, on_acknowledged: OnAcknowledged | None
) -> int:
    producer = make_producer(settings, "events")
    sender = EventSender(producer, topic, on_acknowledged, key)
    try:
        await producer.start()
        for value in values:
            if value:
                await sender.send(value)
        await sender.drain()
    finally:
        with suppress(*AWAY):
            await producer.stop()
    return sender.acknowledged_count
