"""From the outbox to awards: each once in the end, whoever dies at whichever step, however often a message comes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer

from engine.badges import (
    BadgeEventKind,
    BadgeMessage,
    Evidence,
    Predicate,
    badge_message_encoder,
)
from engine.runtime.clock import WallClock
from engine.runtime.connections import connect_redis, postgres_dsn
from engine.runtime.embedded import start_broker
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores import badge_awards, outbox, redis_keys, sole_worker
from engine.stores.outbox import Connection, OutboxRow
from engine.stores.webhooks_postgres import Webhooks
from engine.thresholds import ThresholdMessage, encode_threshold_message
from engine.webhooks import WebhookKind
from tests.builders import LedgerBuilder
from tests.running_system import until_answered
from tests.topics import read_topic
from workers import badges
from workers.badges import run_badges

AT = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
UNLOCKED, LAPSED, ACTIVATED = BadgeEventKind.UNLOCKED, BadgeEventKind.LAPSED, BadgeEventKind.ACTIVATED


class Killed(Exception):
    """What ends a worker in the middle of a step, as kill -9 would: it is none of AWAY, and nobody handles it."""


class Proofs:
    """What the evaluator leaves behind: states and outbox rows, committed together."""

    def __init__(self, settings: Settings, pool: asyncpg.Pool) -> None:
        self.settings = settings
        self.pool = pool
        self.ledger = LedgerBuilder(pool)

    async def portfolio(self) -> str:
        name = f"p-{uuid.uuid4().hex[:8]}"
        await self.ledger.portfolio(name)
        return name

    async def prove(self, message: BadgeMessage) -> None:
        async with self.pool.acquire() as connection, connection.transaction():
            number = int(message.event_id.rpartition("#")[2])
            await connection.execute(
                "INSERT INTO badge_state VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (portfolio_id, badge_id, version)"
                " DO UPDATE SET active = excluded.active, events_count = excluded.events_count",
                message.portfolio_id,
                message.badge_id,
                message.version,
                message.kind is not LAPSED,
                message.at,
                number,
            )
            await self.put(message.event_id, badge_message_encoder.encode(message), message.portfolio_id, connection)

    async def put(
        self, event_id: str, payload: bytes, key: str, connection: Connection | None = None, topic: str = ""
    ) -> None:
        await (connection or self.pool).execute(
            "INSERT INTO outbox (event_id, topic, key, payload) VALUES ($1, $2, $3, $4)",
            event_id,
            topic or self.settings.badge_topic,
            key,
            payload,
        )
        await (connection or self.pool).execute("SELECT pg_notify('outbox', '')")

    async def awards(self, portfolio_id: str) -> list[tuple[str, bool]]:
        rows = await self.pool.fetch(
            "SELECT badge_id, active FROM badge_award WHERE portfolio_id = $1 ORDER BY badge_id", portfolio_id
        )
        return [tuple(row) for row in rows]

    async def events(self, portfolio_id: str) -> list[tuple[int, str, str]]:
        rows = await self.pool.fetch(
            "SELECT sequence, kind, badge_id FROM badge_event WHERE portfolio_id = $1 ORDER BY sequence", portfolio_id
        )
        return [tuple(row) for row in rows]

    async def delivered(self) -> bool:
        return not await self.pool.fetchval("SELECT count(*) FROM outbox")


def message(
    portfolio_id: str, badge_id: str = "first_fill", kind: BadgeEventKind = UNLOCKED, number: int = 1
) -> BadgeMessage:
    return BadgeMessage(
        event_id=f"{badge_id}:1#{portfolio_id}#{number}",
        kind=kind,
        portfolio_id=portfolio_id,
        badge_id=badge_id,
        version=1,
        at=AT,
        evidence=Evidence(figure="1", threshold="1", predicate=Predicate.FILLS, event_id="e1", ledger_sequence=2),
    )


def told(*messages: BadgeMessage) -> list[tuple[BadgeMessage, bytes]]:
    return [(one, badge_message_encoder.encode(one)) for one in messages]


@asynccontextmanager
async def producing(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def proofs(redis_db: str, database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[Proofs]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=database,
        kafka_bootstrap=kafka_bootstrap,
        badge_topic=f"{topic}-badges",
        threshold_topic=f"{topic}-thresholds",
    )
    async with asyncpg.create_pool(postgres_dsn(database), min_size=1, max_size=4) as pool:
        await pool.execute("TRUNCATE outbox")
        yield Proofs(settings, pool)


@asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_badges(settings, WallClock(), stop))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_proof_becomes_one_award_and_one_event(proofs: Proofs) -> None:
    name = await proofs.portfolio()
    redis = connect_redis(proofs.settings, "test")
    listener = redis.pubsub()
    await listener.ssubscribe(redis_keys.BADGES_CHANNEL)
    async with working(proofs.settings):
        await proofs.prove(message(name))
        await until_answered(proofs.delivered)
        assert await proofs.awards(name) == [("first_fill", True)]
        assert await proofs.events(name) == [(1, "UNLOCKED", "first_fill")]
        told = None
        async with asyncio.timeout(5):
            while told is None or told["type"] != "smessage":
                told = await listener.get_message(timeout=1)
        assert msgspec.msgpack.decode(told["data"]) == [name]
    await listener.aclose()  # type: ignore[no-untyped-call]
    await redis.aclose()
    kept = await proofs.pool.fetchval("SELECT evidence FROM badge_award WHERE portfolio_id = $1", name)
    assert msgspec.json.decode(kept, type=Evidence) == message(name).evidence


async def test_a_badge_that_lapses_and_comes_back_is_the_same_award(proofs: Proofs) -> None:
    name = await proofs.portfolio()
    async with working(proofs.settings):
        await proofs.prove(message(name, "diversified"))
        await proofs.prove(message(name, "diversified", LAPSED, 2))
        await until_answered(proofs.delivered)
        assert await proofs.awards(name) == [("diversified", False)]
        await proofs.prove(message(name, "diversified", ACTIVATED, 3))
        await until_answered(proofs.delivered)
    assert await proofs.awards(name) == [("diversified", True)]
    assert [kind for _, kind, _ in await proofs.events(name)] == ["UNLOCKED", "LAPSED", "ACTIVATED"]


@pytest.mark.parametrize("step", ["before marking", "before commit", "after commit"])
async def test_a_worker_that_dies_at_any_step_loses_and_doubles_nothing(
    proofs: Proofs, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    names = [await proofs.portfolio() for _ in range(5)]
    dying = asyncio.Event()

    async def die(*_: Any) -> Any:
        dying.set()
        raise Killed

    with monkeypatch.context() as dead:
        if step == "before marking":  # Kafka has it, the outbox does not know
            dead.setattr(outbox, "mark_produced", die)
        elif step == "before commit":
            dead.setattr(outbox, "remove", die)
        else:
            dead.setattr(badges.Consumer, "_tell", die)
        async with working(proofs.settings):
            for name in names:
                await proofs.prove(message(name))
            async with asyncio.timeout(15):
                await dying.wait()
    # One that was produced is due again at once when nobody noted it, or else after a while.
    await proofs.pool.execute("UPDATE outbox SET produced_at = produced_at - interval '1 hour'")
    async with working(proofs.settings):
        await until_answered(proofs.delivered)
        for name in names:
            await proofs.prove(message(name, "centurion"))
        await until_answered(proofs.delivered)
    for name in names:
        assert await proofs.awards(name) == [("centurion", True), ("first_fill", True)]
        assert await proofs.events(name) == [(1, "UNLOCKED", "first_fill"), (2, "UNLOCKED", "centurion")]
    if step == "before marking":
        # Both workers produced at least one of them: 10 events are more than 10 records.
        assert await read_topic(proofs.settings.kafka_bootstrap, proofs.settings.badge_topic, 11)


async def test_duplicates_change_nothing(proofs: Proofs, monkeypatch: pytest.MonkeyPatch) -> None:
    name = await proofs.portfolio()
    sent = badges.Relay._send

    async def twice(self: badges.Relay, row: OutboxRow) -> Any:
        await sent(self, row)
        return await sent(self, row)

    monkeypatch.setattr(badges.Relay, "_send", twice)
    async with working(proofs.settings):
        for number, kind in enumerate((UNLOCKED, LAPSED, ACTIVATED, LAPSED), 1):
            await proofs.prove(message(name, "diversified", kind, number))
        await until_answered(proofs.delivered)
        # The first is told again, long after the last.
        await proofs.put(message(name).event_id + "-again", b"", name)
        await proofs.put(
            message(name, "diversified").event_id, badge_message_encoder.encode(message(name, "diversified")), name
        )
        await until_answered(proofs.delivered)
    assert await proofs.awards(name) == [("diversified", False)]
    assert [kind for _, kind, _ in await proofs.events(name)] == ["UNLOCKED", "LAPSED", "ACTIVATED", "LAPSED"]


async def test_an_event_that_overtook_the_one_before_waits_for_it(proofs: Proofs) -> None:
    name = await proofs.portfolio()
    for number, kind in enumerate((UNLOCKED, LAPSED), 1):
        await proofs.prove(message(name, "diversified", kind, number))
    async with proofs.pool.acquire() as connection, connection.transaction():
        early = await badge_awards.judge(connection, told(message(name, "diversified", LAPSED, 2)))
        assert early.early and not early.booked
        in_order = await badge_awards.judge(
            connection, told(message(name, "diversified"), message(name, "diversified", LAPSED, 2))
        )
        assert len(in_order.booked) == 2
    async with working(proofs.settings):
        await until_answered(proofs.delivered)
    assert [kind for _, kind, _ in await proofs.events(name)] == ["UNLOCKED", "LAPSED"]


async def test_a_new_log_gets_what_the_old_one_lost(
    proofs: Proofs, children: ChildProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedded broker keeps nothing: what it had and nobody had booked is produced into the next one's log."""
    name = await proofs.portfolio()
    await proofs.prove(message(name))
    read = asyncio.Event()

    async def never(self: badges.Consumer) -> int:
        read.set()
        await asyncio.sleep(3600)
        return 0

    async def produced() -> bool:
        return bool(await proofs.pool.fetchval("SELECT bool_and(produced_log IS NOT NULL) FROM outbox"))

    with monkeypatch.context() as deaf:
        deaf.setattr(badges.Consumer, "poll", never)
        stop = asyncio.Event()
        task = asyncio.create_task(run_badges(proofs.settings, WallClock(), stop))
        await until_answered(produced)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    second = proofs.settings.model_copy(update={"kafka_bootstrap": start_broker(children)[0], "kafka_log_id": "second"})
    async with working(second):
        await until_answered(proofs.delivered)
        await proofs.prove(message(name, "centurion"))
        await until_answered(proofs.delivered)
    assert await proofs.events(name) == [(1, "UNLOCKED", "first_fill"), (2, "UNLOCKED", "centurion")]


async def test_two_workers_do_the_work_of_one(proofs: Proofs) -> None:
    names = [await proofs.portfolio() for _ in range(40)]
    async with working(proofs.settings) as first, working(proofs.settings):
        for at, name in enumerate(names):
            await proofs.prove(message(name))
            if at == 20:
                first.cancel()
        await until_answered(proofs.delivered)
        for name in names:
            assert await proofs.events(name) == [(1, "UNLOCKED", "first_fill")]


async def test_a_worker_that_is_frozen_is_replaced(proofs: Proofs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection lives, its statements do not come: the server ends the one, and with it the lock."""
    monkeypatch.setattr(sole_worker, "SILENCE_MAX_S", 1)
    stop = asyncio.Event()
    async with sole_worker.alone(proofs.settings, "test", stop) as frozen:
        assert frozen is not None
        async with asyncio.timeout(10), sole_worker.alone(proofs.settings, "test", stop) as second:
            assert second is not None
            with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
                await frozen.execute("SELECT 1")


async def test_what_nobody_proved_and_what_is_none_are_dead_letters(proofs: Proofs) -> None:
    name = await proofs.portfolio()
    forged = message(name, "whale")
    bad: Sequence[bytes] = [
        b"not json",
        badge_message_encoder.encode(forged),
        badge_message_encoder.encode(message("nobody")),
        badge_message_encoder.encode(message(name)).replace(b"first_fill", b"first\\u0000fill"),
        badge_message_encoder.encode(message(name)).replace(b"00Z", b"00"),
    ]
    async with working(proofs.settings):
        for number, payload in enumerate(bad):
            await proofs.put(f"bad-{name}-{number}", payload, name)
        await proofs.prove(message(name))
        await until_answered(proofs.delivered)
    assert await proofs.awards(name) == [("first_fill", True)]
    letters = await read_topic(proofs.settings.kafka_bootstrap, f"{proofs.settings.badge_topic}.dlq", len(bad))
    assert {letter.value for letter in letters} == set(bad)
    codes = [dict(letter.headers)["code"] for letter in letters]
    assert sorted(codes) == [b"MALFORMED"] * 3 + [b"UNPROVED"] * 2


async def test_what_is_booked_is_what_was_proved_whoever_uses_its_id_first(proofs: Proofs) -> None:
    """One writes to the topic what looks like the proof, before the proof; another what is no message, in its name."""
    name = await proofs.portfolio()
    genuine = message(name)
    greater = msgspec.structs.replace(genuine, evidence=msgspec.structs.replace(genuine.evidence, figure="1000"))
    forged = [
        badge_message_encoder.encode(greater),
        badge_message_encoder.encode(msgspec.structs.replace(genuine, at=AT - timedelta(days=300))),
        badge_message_encoder.encode(genuine)[:-1] + b',"more":"for webhooks"}',
        b"not json",
    ]
    await proofs.prove(genuine)
    topic, headers = proofs.settings.badge_topic, [("event_id", genuine.event_id.encode())]
    async with producing(proofs.settings) as producer:
        for payload in forged:
            await producer.send_and_wait(topic, payload, key=name.encode(), headers=headers)
    async with working(proofs.settings):
        await until_answered(proofs.delivered)
    row = await proofs.pool.fetchrow("SELECT awarded_at, evidence FROM badge_award WHERE portfolio_id = $1", name)
    assert row["awarded_at"] == AT and msgspec.json.decode(row["evidence"], type=Evidence) == genuine.evidence
    assert await proofs.events(name) == [(1, "UNLOCKED", "first_fill")]
    letters = await read_topic(proofs.settings.kafka_bootstrap, f"{topic}.dlq", len(forged))
    assert {letter.value for letter in letters} == set(forged)


async def test_a_crossing_that_was_changed_on_its_way_is_told_as_it_was(proofs: Proofs) -> None:
    name = await proofs.portfolio()
    await Webhooks(lambda: proofs.pool).create(
        "ann", url="https://example.com/", kinds=list(WebhookKind), portfolio_ids=[name], count_max=50
    )
    genuine = ThresholdMessage(
        event_id=f"t-{name}#1",
        threshold_id="t",
        portfolio_id=name,
        figure="NAV",
        side="ABOVE",
        bound="1",
        hysteresis="0",
        value="2",
        at=AT,
        ledger_sequence=1,
    )
    topic, payload = proofs.settings.threshold_topic, encode_threshold_message(genuine)
    await proofs.put(genuine.event_id, payload, name, topic=topic)
    async with producing(proofs.settings) as producer:
        forged = encode_threshold_message(msgspec.structs.replace(genuine, value="3"))
        await producer.send_and_wait(topic, forged, key=name.encode())
    async with working(proofs.settings):
        await until_answered(proofs.delivered)
    bodies = await proofs.pool.fetch("SELECT body FROM webhook_delivery WHERE event_id = $1", genuine.event_id)
    assert bodies and all(payload in body for (body,) in bodies)


async def test_a_crossing_leaves_the_outbox_and_a_bad_one_too(proofs: Proofs) -> None:
    name = await proofs.portfolio()
    crossing = ThresholdMessage(
        event_id="t-1#1",
        threshold_id="t-1",
        portfolio_id=name,
        figure="NAV",
        side="ABOVE",
        bound="100",
        hysteresis="0",
        value="101",
        at=AT,
        ledger_sequence=1,
    )
    bad = [b"{}", b'{"event_id":"\xff"}', b"[" * 2_000]
    async with working(proofs.settings):
        topic = proofs.settings.threshold_topic
        await proofs.put(crossing.event_id, encode_threshold_message(crossing), name, topic=topic)
        for number, payload in enumerate(bad):
            await proofs.put(f"bad-{name}-{number}", payload, name, topic=topic)
        await until_answered(proofs.delivered)
    letters = await read_topic(proofs.settings.kafka_bootstrap, f"{topic}.dlq", len(bad))
    assert {letter.value for letter in letters} == set(bad)


async def test_a_crossing_that_no_evaluator_wrote_is_told_to_nobody(proofs: Proofs) -> None:
    """Nor does one stop the others that is longer than anything."""
    name = await proofs.portfolio()
    await Webhooks(lambda: proofs.pool).create(
        "ann", url="https://example.com/", kinds=list(WebhookKind), portfolio_ids=None, count_max=5
    )
    producer = AIOKafkaProducer(bootstrap_servers=proofs.settings.kafka_bootstrap)
    await producer.start()
    async with working(proofs.settings):
        for event_id in ("forged#1", "x" * 16_000):
            forged = ThresholdMessage(
                event_id=event_id,
                threshold_id="forged",
                portfolio_id=name,
                figure="NAV",
                side="ABOVE",
                bound="1",
                hysteresis="0",
                value="2",
                at=AT,
                ledger_sequence=1,
            )
            payload = encode_threshold_message(forged)
            await producer.send_and_wait(proofs.settings.threshold_topic, payload, key=name.encode())
        await proofs.prove(message(name))
        await until_answered(proofs.delivered)
    await producer.stop()
    assert await proofs.awards(name) == [("first_fill", True)]
    assert await proofs.pool.fetchval("SELECT count(*) FROM webhook_delivery WHERE event_id LIKE 'forged%'") == 0


async def test_one_message_that_kafka_takes_for_too_large_holds_up_no_other(proofs: Proofs) -> None:
    name = await proofs.portfolio()
    await proofs.put(f"large-{name}", b"x" * 2_000_000, name)
    await proofs.prove(message(name))
    async with working(proofs.settings):

        async def awarded() -> bool:
            return bool(await proofs.awards(name))

        await until_answered(awarded)
    await proofs.pool.execute("DELETE FROM outbox WHERE event_id = $1", f"large-{name}")


async def test_what_lies_in_the_topic_already_is_read_by_the_first_worker(proofs: Proofs) -> None:
    """A log that no offset is known of is read from its beginning."""
    name = await proofs.portfolio()
    await proofs.prove(message(name))
    producer = AIOKafkaProducer(bootstrap_servers=proofs.settings.kafka_bootstrap)
    await producer.start()
    payload = badge_message_encoder.encode(message(name))
    for _ in range(3):
        await producer.send_and_wait(proofs.settings.badge_topic, payload, key=name.encode())
    await producer.stop()
    async with working(proofs.settings):
        await until_answered(proofs.delivered)
    assert await proofs.events(name) == [(1, "UNLOCKED", "first_fill")]
