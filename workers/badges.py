"""The badges worker, the gamification processor: from the outbox to Kafka, and from Kafka to awards.

    relay      outbox → `badge-events`, `threshold-events`   woken by NOTIFY, and looking every RELAY_INTERVAL_S besides
    consumer   these topics → awards, badge events and webhook deliveries, offsets and the outbox, in one transaction
               per batch; then the channel `badges`, which wakes the streams of the API
    daily      at each session close: the badges that a day's figures prove (workers.daily_badges)

Each may fail between any two steps, and begins again at the last commit. The relay marks a row when Kafka has it, the
consumer removes it when its award is booked: a message may come twice and changes nothing then, and none is lost, also
when the Kafka log is a new one. Each of the three runs in one worker at a time (engine.stores.sole_worker); more
workers stand by.

Offsets are kept per log (cluster/topic) in `topic_offset`. Where a log has lost what lies at an offset, reading goes
on at its beginning, because what was booked already is known by its id. What is booked is what was proved, byte for
byte as the outbox has it; what can not be read, and what nobody has proved, goes to `<topic>.dlq`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress

import asyncpg
import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.structs import ConsumerRecord

from engine.badges import BadgeMessage
from engine.booking import DeadLetter, Record
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from engine.runtime.connections import AWAY, Outage, RedisClient, connect_redis, make_producer, stopped_within
from engine.runtime.settings import Settings
from engine.stores import badge_awards, outbox, redis_keys
from engine.stores.badge_awards import BadMessageError, read_message
from engine.stores.outbox import REPRODUCE_AFTER_S, OutboxRow, Told
from engine.stores.sole_worker import alone
from engine.stores.webhooks_postgres import enqueue, record_threshold
from engine.thresholds import threshold_message_decoder
from workers.daily_badges import DailyBadges
from workers.dead_letters import bury
from workers.lifecycle import run_together

OUTBOX_CHANNEL = "outbox"
RELAY_INTERVAL_S = 1.0
# Rows and records of one round: one statement each, and a lost round is cheap.
BATCH_COUNT_MAX = 500
# Kafka answers a fetch as soon as there are records; the embedded broker always lets it wait this long.
FETCH_WAIT_MS = 20
POLL_TIMEOUT_MS = 500
EVENT_ID_HEADER = "event_id"

_OFFSETS = "SELECT partition, next_offset FROM topic_offset WHERE log_id = $1"
_MOVE = """
    INSERT INTO topic_offset (log_id, partition, next_offset)
    SELECT * FROM unnest($1::text[], $2::integer[], $3::bigint[])
    ON CONFLICT (log_id, partition) DO UPDATE SET next_offset = excluded.next_offset
"""

_log = structlog.get_logger(__name__)

Fetched = Mapping[TopicPartition, Sequence[ConsumerRecord]]


class Relay:
    """Produces what waits in the outbox. `connection` holds the relay's lock."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        producer: AIOKafkaProducer,
        logs: Mapping[str, str],
        reproduce_after_s: float = REPRODUCE_AFTER_S,
    ) -> None:
        self._connection = connection
        self._producer = producer
        self._logs = logs
        self._reproduce_after_s = reproduce_after_s
        self._woken = asyncio.Event()

    async def run(self, stop: asyncio.Event, succeeded: Callable[[], None]) -> None:
        """Relay until `stop` is set. Raises AWAY errors."""
        await self._connection.add_listener(OUTBOX_CHANNEL, lambda *_: self._woken.set())
        while not stop.is_set():
            self._woken.clear()
            count = await self.relay()
            succeeded()
            if count < BATCH_COUNT_MAX:
                with suppress(TimeoutError):
                    async with asyncio.timeout(RELAY_INTERVAL_S):
                        await self._woken.wait()

    async def relay(self) -> int:
        """Produce what is due; returns how many rows that were. Raises AWAY errors when some could not be."""
        rows = await outbox.due(self._connection, self._logs, BATCH_COUNT_MAX, self._reproduce_after_s)
        if not rows:
            telemetry.OUTBOX_WAITING.set(await outbox.waiting_count(self._connection))
            return 0
        answers = await asyncio.gather(*[await self._send(row) for row in rows], return_exceptions=True)
        produced = [row for row, answer in zip(rows, answers, strict=True) if not isinstance(answer, BaseException)]
        await outbox.mark_produced(self._connection, produced, self._logs)
        for row in produced:
            telemetry.OUTBOX_PRODUCED.labels(row.topic).inc()
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return len(rows)

    async def _send(self, row: OutboxRow) -> Awaitable[object]:
        headers = [(EVENT_ID_HEADER, row.event_id.encode())]
        try:
            answer: Awaitable[object] = await self._producer.send(
                row.topic, row.payload, key=row.key.encode(), headers=headers
            )
        except MessageSizeTooLargeError as error:
            # Evidence is bounded, so nothing is. One that is all the same must not hold up the others; it stays where
            # it can be found, and is tried again with what nobody has consumed.
            telemetry.OUTBOX_TOO_LARGE.inc()
            _log.error("outbox_message_too_large", event_id=row.event_id, reason=str(error))
            return asyncio.sleep(0)
        return answer


class Batch:
    """The records of one fetch, decoded: `messages` with where each came from, crossings, and what is none."""

    def __init__(self, fetched: Fetched, badge_topic: str) -> None:
        self.messages: list[BadgeMessage] = []
        self.crossings: list[tuple[TopicPartition, ConsumerRecord]] = []
        self.buried: list[Told] = []
        self.letters: dict[TopicPartition, list[DeadLetter]] = {}
        self._origin: dict[int, tuple[TopicPartition, ConsumerRecord]] = {}
        for partition, records in fetched.items():
            for record in records:
                if partition.topic != badge_topic:
                    self.crossings.append((partition, record))
                    continue
                try:
                    message = read_message(record.value)
                except BadMessageError as error:
                    self.bury(partition, record, "MALFORMED", str(error))
                else:
                    self.messages.append(message)
                    self._origin[id(message)] = (partition, record)

    def payload_of(self, message: BadgeMessage) -> bytes:
        return bytes(self._origin[id(message)][1].value)

    def refuse(self, message: BadgeMessage, code: str, reason: str) -> None:
        self.bury(*self._origin[id(message)], code, reason)

    def bury(self, partition: TopicPartition, record: ConsumerRecord, code: str, reason: str) -> None:
        """Nothing that will ever be booked: a dead letter, which the outbox need not keep if it came from there."""
        letter = DeadLetter(Record(record.offset, record.key, record.value), code, reason)
        self.letters.setdefault(partition, []).append(letter)
        event_id = dict(record.headers).get(EVENT_ID_HEADER)
        if event_id is not None and b"\0" not in event_id and record.value is not None:
            self.buried.append((event_id.decode(errors="replace"), bytes(record.value)))


class Consumer:
    """Books what the topics bring. `connection` holds the consumer's lock."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        consumer: AIOKafkaConsumer,
        producer: AIOKafkaProducer,
        redis: RedisClient,
        settings: Settings,
        logs: Mapping[str, str],
    ) -> None:
        self._connection = connection
        self._consumer = consumer
        self._producer = producer
        self._redis = redis
        self._badge_topic = settings.badge_topic
        self._webhooks_waiting_max = settings.webhook_waiting_count_max
        self._logs = logs
        self._telling = Outage("redis")

    async def open(self) -> None:
        """Read on where the last commit left off. Raises AWAY errors."""
        offsets: dict[TopicPartition, int] = {}
        for topic, log_id in self._logs.items():
            partitions = [TopicPartition(topic, number) for number in await self._producer.partitions_for(topic)]
            known = dict(map(tuple, await self._connection.fetch(_OFFSETS, log_id)))
            first = await self._consumer.beginning_offsets(partitions)
            offsets |= {one: max(first[one], known.get(one.partition, 0)) for one in partitions}
        self._consumer.assign(list(offsets))
        for partition, offset in offsets.items():
            self._consumer.seek(partition, offset)

    async def run(self, stop: asyncio.Event, succeeded: Callable[[], None]) -> None:
        """Consume until `stop` is set. Raises AWAY errors: then what was fetched is to be read again by `open`."""
        while not stop.is_set():
            await self.poll()
            succeeded()

    async def poll(self) -> int:
        """Book what there is; returns how many records that were."""
        fetched: Fetched = await self._consumer.getmany(timeout_ms=POLL_TIMEOUT_MS, max_records=BATCH_COUNT_MAX)
        if not fetched:
            # Whoever is silent for too long is taken for dead.
            await self._connection.execute("SELECT 1")
            return 0
        await self._tell(await self._book(fetched))
        return sum(map(len, fetched.values()))

    async def _book(self, fetched: Fetched) -> set[str]:
        """Everything about a batch in one transaction; returns the portfolios that have new badge events."""
        batch = Batch(fetched, self._badge_topic)
        async with self._connection.transaction():
            told = [(message, batch.payload_of(message)) for message in batch.messages]
            judged = await badge_awards.judge(self._connection, told)
            for message in judged.refused:
                batch.refuse(message, "UNPROVED", f"nobody has proved {message.event_id}")
            await badge_awards.book(self._connection, judged.booked)
            await enqueue(
                self._connection,
                [
                    (message.event_id, message.portfolio_id, message.kind.value, batch.payload_of(message))
                    for message in judged.booked
                ],
                self._webhooks_waiting_max,
            )
            crossed = await self._book_crossings(batch)
            done = [message.event_id for message in (*judged.booked, *judged.duplicates)]
            await outbox.remove(self._connection, [*done, *crossed])
            await outbox.remove_genuine(self._connection, batch.buried)
            await self._move(fetched)
            for partition, letters in batch.letters.items():
                await bury(self._producer, partition.topic, partition.partition, letters)
        for outcome, count in badge_awards.count_outcomes(judged).items():
            telemetry.BADGE_MESSAGES.labels(outcome).inc(count)
        telemetry.BADGE_MESSAGES.labels("crossing").inc(len(crossed))
        return {message.portfolio_id for message in judged.booked}

    async def _book_crossings(self, batch: Batch) -> list[str]:
        """Have webhooks told of crossings that an evaluator wrote and nobody has booked; others change nothing."""
        crossings: set[Told] = set()
        for partition, record in batch.crossings:
            try:
                crossing = threshold_message_decoder.decode(record.value or b"")
                if "\0" in crossing.event_id:
                    raise msgspec.ValidationError("the event's id contains NUL")
                crossings.add((crossing.event_id, bytes(record.value)))
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                batch.bury(partition, record, "MALFORMED", str(error))
        proved = sorted(await outbox.genuine(self._connection, crossings))
        for _, payload in proved:
            await record_threshold(self._connection, payload, self._webhooks_waiting_max)
        return [event_id for event_id, _ in proved]

    async def _move(self, fetched: Fetched) -> None:
        places = [(self._logs[of.topic], of.partition, records[-1].offset + 1) for of, records in fetched.items()]
        await self._connection.execute(_MOVE, *map(list, zip(*places, strict=True)))

    async def _tell(self, portfolio_ids: Iterable[str]) -> None:
        """Wake who waits for these portfolios' events; they look from time to time anyway."""
        ids = sorted(portfolio_ids)
        if not ids:
            return
        try:
            await self._redis.spublish(redis_keys.BADGES_CHANNEL, msgspec.msgpack.encode(ids))
            self._telling.end()
        except AWAY as error:
            self._telling.begin_or_continue(error)


async def identify_logs(settings: Settings) -> dict[str, str]:
    """The log (cluster/topic) that each topic of the worker's is at present. Raises AWAY errors."""
    cluster_id = settings.kafka_log_id
    if not cluster_id:
        admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
        await admin.start()
        try:
            cluster_id = (await admin.describe_cluster())["cluster_id"]
        finally:
            await admin.close()
    return {topic: f"{cluster_id}/{topic}" for topic in (settings.badge_topic, settings.threshold_topic)}


async def relay_alone(settings: Settings, stop: asyncio.Event, succeeded: Callable[[], None]) -> None:
    """Stand by, then relay until `stop` is set. Raises AWAY errors."""
    async with alone(settings, "badges-relay", stop) as connection, AsyncExitStack() as clients:
        if connection is not None:
            producer = await _started(clients, make_producer(settings, "badges"))
            await Relay(connection, producer, await identify_logs(settings)).run(stop, succeeded)


async def consume_alone(
    settings: Settings, redis: RedisClient, stop: asyncio.Event, succeeded: Callable[[], None]
) -> None:
    """Stand by, then consume until `stop` is set. Raises AWAY errors."""
    async with alone(settings, "badges-consumer", stop) as connection, AsyncExitStack() as clients:
        if connection is None:
            return
        producer = await _started(clients, make_producer(settings, "badges"))
        reader = AIOKafkaConsumer(
            bootstrap_servers=settings.kafka_bootstrap,
            client_id="navstream-badges",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            fetch_max_wait_ms=FETCH_WAIT_MS,
        )
        logs = await identify_logs(settings)
        consumer = Consumer(connection, await _started(clients, reader), producer, redis, settings, logs)
        await consumer.open()
        await consumer.run(stop, succeeded)


async def run_badges(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
    """Run one badges worker until `stop` is set."""
    redis = connect_redis(settings, "badges")

    async def daily(stop: asyncio.Event, succeeded: Callable[[], None]) -> None:
        async with alone(settings, "badges-daily", stop) as connection:
            if connection is not None:
                await DailyBadges(settings, clock, connection).run(stop, succeeded)

    try:
        await run_together(
            _keep(lambda succeeded: relay_alone(settings, stop, succeeded), stop),
            _keep(lambda succeeded: consume_alone(settings, redis, stop, succeeded), stop),
            _keep(lambda succeeded: daily(stop, succeeded), stop),
        )
    finally:
        await redis.aclose()


async def _keep(work: Callable[[Callable[[], None]], Awaitable[None]], stop: asyncio.Event) -> None:
    """Begin `work` anew whenever what it needs was away, until `stop` is set."""
    outage = Outage("kafka or postgresql")
    while not stop.is_set():
        try:
            await work(outage.end)
        except AWAY as error:
            await stopped_within(stop, outage.begin_or_continue(error))


async def _started(clients: AsyncExitStack, client: AIOKafkaProducer | AIOKafkaConsumer) -> object:
    """Start a client of Kafka, to be stopped with `clients`."""

    async def close() -> None:
        with suppress(*AWAY):
            await client.stop()

    clients.push_async_callback(close)
    await client.start()
    return client
