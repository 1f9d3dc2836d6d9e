"""From the acknowledgement of a fill to UNLOCKED at a graphql-transport-ws client, at 200 fills a second.

Everything runs in this one process; the figure is printed (`-s`). The bound leaves room for a machine with other work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import asyncpg

from engine.badges import load_rules
from engine.messages import encode_event
from engine.runtime.clock import WallClock
from engine.runtime.connections import postgres_dsn
from engine.runtime.settings import Settings
from engine.stores.badges_postgres import sync_rules
from tests.gateway import SECRET, Stream, gateway_of
from tests.running_system import connected, fill, opening, running, until_answered
from workers.badges import run_badges

FILLS_PER_SECOND = 200
PORTFOLIOS_COUNT = 600
WATCHED_COUNT = 50  # what one socket carries
LATENCY_MAX_S = 3.0
QUERY = """subscription($id: String!) { badgeEvents(portfolioId: $id) {
    kind badge { badgeId } evidence { ledgerSequence eventId } } }"""


async def test_an_unlocked_badge_is_seen_within_a_second(
    redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str
) -> None:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        badge_topic=f"{topic}-badges",
        threshold_topic=f"{topic}-thresholds",
        jwt_secret=SECRET,  # type: ignore[arg-type]
    )
    connection = await asyncpg.connect(postgres_dsn(fresh_database))
    await sync_rules(connection, load_rules())
    await connection.close()
    names = [f"p-{number:04}" for number in range(PORTFOLIOS_COUNT)]
    watched = names[:: PORTFOLIOS_COUNT // WATCHED_COUNT]
    stop = asyncio.Event()
    awarding = asyncio.create_task(run_badges(settings, WallClock(), stop))
    try:
        async with connected(settings) as system, running(settings), gateway_of(settings) as gateway:
            await asyncio.gather(*[system.send(opening(name)) for name in names])

            async def all_open() -> bool:
                return bool(await system.pool.fetchval("SELECT count(*) FROM portfolio") == len(names))

            await until_answered(all_open)
            async with gateway.socket(gateway.token("user-1")) as socket:
                streams = {name: await socket.subscribe(QUERY, {"id": name}) for name in watched}
                await gateway.watches(len(watched))
                acknowledged: dict[str, float] = {}
                seen = asyncio.create_task(_see(socket.receive, streams))
                await _trade(system.producer, settings.topic, names, acknowledged)
                told = await asyncio.wait_for(seen, 20)
    finally:
        stop.set()
        await awarding
    latencies = sorted(at - acknowledged[name] for name, at in told.items())
    assert len(latencies) == len(watched)
    p50, p99 = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
    print(f"fill acknowledged → UNLOCKED: p50 {p50 * 1_000:.0f} ms, p99 {p99 * 1_000:.0f} ms")
    assert p99 < LATENCY_MAX_S


async def _trade(producer: Any, topic: str, names: list[str], acknowledged: dict[str, float]) -> None:
    """One fill for each portfolio, FILLS_PER_SECOND of them a second."""
    began_s, sent = time.monotonic(), []

    async def note(name: str, answer: Awaitable[object]) -> None:
        await answer
        acknowledged[name] = time.monotonic()

    for number, name in enumerate(names):
        await asyncio.sleep(max(0.0, began_s + number / FILLS_PER_SECOND - time.monotonic()))
        value = encode_event(fill(name, "BUY", "1", "100", f"first-{name}"))
        sent.append(asyncio.create_task(note(name, await producer.send(topic, value=value, key=name.encode()))))
    await asyncio.gather(*sent)


async def _see(receive: Any, streams: dict[str, Stream]) -> dict[str, float]:
    """When each stream's first message came; it is the First Fill."""
    names = {stream.operation_id: name for name, stream in streams.items()}
    told: dict[str, float] = {}
    while len(told) < len(streams):
        message = await receive(None, 20)
        told.setdefault(names[message["id"]], time.monotonic())
        event = message["payload"]["data"]["badgeEvents"]
        assert (event["kind"], event["badge"]["badgeId"]) == ("UNLOCKED", "first_fill")
        assert event["evidence"] == {"ledgerSequence": 2, "eventId": f"first-{names[message['id']]}"}
    return told
