"""64 shards on a real Apache Kafka: evaluators that come and go, and a broker that is killed, under load.

A client watches every portfolio through the API all the while. In the end hot state, ledger and what the client saw
last are the oracle's, and no portfolio's (epoch, sequence) ever went backwards at the client.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
import websockets
from pydantic import SecretStr

from api.auth import issue_token
from engine.assets import Asset, AssetClass
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import upsert_assets
from tests.evaluator_processes import Evaluators, evaluators
from tests.gateway import SECRET, running
from tests.kafka.conftest import ApacheKafka
from tests.random_events import SECTORS, Stream
from tests.running_system import System, connected, eventually, read_all
from tests.whole_system import all_settled, assert_hot_state, assert_ledger, finish, produce

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

SHARDS = 64
STEP_EVENTS = 20
STEP_S = 0.05
BROKER_DOWN_S = 2.0

_SUBSCRIPTION = """subscription Nav($id: String!) {
  navUpdates(portfolioId: $id, maxRateHz: 20) { kind nav epoch sequence ledgerSequence } }"""


class Client:
    """What a subscriber of every portfolio has seen: the last message of each, and what broke the order."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, Any]] = {}
        self.backwards: list[tuple[str, Any, Any]] = []

    def take(self, message: dict[str, Any]) -> None:
        assert message["type"] == "next", message
        name, update = message["id"], message["payload"]["data"]["navUpdates"]
        before, order = self.last.get(name), (update["epoch"], update["sequence"])
        if before is not None:
            was = (before["epoch"], before["sequence"])
            if order < was or (order == was and update["kind"] != "HEARTBEAT"):
                self.backwards.append((name, was, order))
        self.last[name] = update


@asynccontextmanager
async def watching(settings: Settings, names: list[str]) -> AsyncIterator[Client]:
    """A client of an API node of its own, subscribed to each of these portfolios."""
    client = Client()
    token = issue_token(settings, "kafka", "portfolio:read admin", 600, datetime.now(UTC))

    async def listen(socket: Any) -> None:
        async for text in socket:
            client.take(json.loads(text))

    async with running(settings) as (_, url):
        address = url.replace("http", "ws") + "/graphql"
        async with websockets.connect(address, subprotocols=["graphql-transport-ws"], compression=None) as socket:  # type: ignore[list-item]
            init = {"type": "connection_init", "payload": {"authorization": f"Bearer {token}"}}
            await socket.send(json.dumps(init))
            assert json.loads(await socket.recv())["type"] == "connection_ack"
            for name in names:
                payload = {"query": _SUBSCRIPTION, "variables": {"id": name}}
                await socket.send(json.dumps({"type": "subscribe", "id": name, "payload": payload}))
            listening = asyncio.create_task(listen(socket))
            try:
                yield client
                assert not listening.done(), listening.result()
            finally:
                listening.cancel()


@pytest.fixture
async def system(apache_kafka: ApacheKafka, redis_db: str, fresh_database: str) -> AsyncIterator[System]:
    await apache_kafka.answers()
    topic = f"test-{uuid.uuid4().hex}"
    await apache_kafka.create_topic(topic, SHARDS)
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=apache_kafka.bootstrap,
        topic=topic,
        actions_topic=f"{topic}-actions",
        jwt_secret=SecretStr(SECRET),
        flush_interval_ms=20,
        lease_duration_ms=1_500,
        lease_renewal_interval_ms=200,
    )
    async with connected(settings) as one:
        assets = [Asset(symbol, symbol, AssetClass.EQUITY, sector, "") for symbol, sector in SECTORS.items()]
        known = [asset for asset in assets if asset.sector != "UNCLASSIFIED"]
        await upsert_assets(one.pool, known, datetime.now(UTC))
        yield one


async def flow(system: System, stream: Stream, steps: int) -> None:
    for _ in range(steps):
        await produce(system, [stream.next() for _ in range(STEP_EVENTS)])
        await system.quote(*stream.quote())
        await asyncio.sleep(STEP_S)


async def shares(system: System) -> list[int]:
    """How many shards each evaluator that owns some has, by leases that hold."""
    rows = await system.pool.fetch(
        "SELECT count(*) FROM shard WHERE lease_until > now() AND owner IS NOT NULL GROUP BY owner ORDER BY 1"
    )
    return [row["count"] for row in rows]


async def shared_by(system: System, count: int, stream: Stream) -> None:
    """Until so many evaluators share the shards evenly, while events flow."""

    async def even() -> bool | None:
        await flow(system, stream, 1)
        return await shares(system) == [SHARDS // count] * count or None

    await eventually(even, 30, lambda: shares(system))


async def opened(system: System, stream: Stream, processes: Evaluators) -> list[str]:
    processes.start("first")
    await produce(system, stream.openings())
    await all_settled(system, stream.oracle)
    return list(stream.oracle.portfolios)


async def settled(system: System, stream: Stream, client: Client) -> None:
    """Everything has arrived: hot state and the client agree with the oracle, and nothing went backwards."""
    await finish(system, stream)
    await assert_hot_state(system, stream.oracle)
    expected = {name: p.figures(stream.oracle.prices).ledger_sequence for name, p in stream.oracle.portfolios.items()}

    def seen() -> dict[str, int]:
        return {name: update["ledgerSequence"] for name, update in client.last.items()}

    async def agrees() -> bool | None:
        return seen() == expected or None

    async def last() -> object:
        return {name: (seen().get(name), count) for name, count in expected.items() if seen().get(name) != count}

    await eventually(agrees, 15, last)
    assert not client.backwards


async def booked_once(system: System, stream: Stream) -> None:
    await assert_ledger(system, stream.oracle, {})
    assert {value for value, _ in await read_all(system, f"{system.settings.topic}.dlq")} == stream.bad


async def test_evaluators_join_and_leave_under_load_and_nothing_is_lost_or_goes_backwards(
    system: System, children: ChildProcesses, seed: int
) -> None:
    stream = Stream(seed)
    async with evaluators(children, system.settings) as processes:
        names = await opened(system, stream, processes)
        assert await shares(system) == [SHARDS]
        async with watching(system.settings, names) as client:
            processes.start("second")
            await shared_by(system, 2, stream)
            processes.start("third")
            processes.start("fourth")
            await shared_by(system, 4, stream)
            processes.kill("first")
            processes.kill("third")
            await shared_by(system, 2, stream)
            await settled(system, stream, client)
        assert set((await processes.stop()).values()) == {0}
    await booked_once(system, stream)


async def test_a_broker_killed_and_restarted_in_mid_flow_loses_nothing(
    system: System, children: ChildProcesses, apache_kafka: ApacheKafka, seed: int
) -> None:
    stream = Stream(seed)
    async with evaluators(children, system.settings) as processes:
        names = await opened(system, stream, processes)
        processes.start("second")
        async with watching(system.settings, names) as client:
            await shared_by(system, 2, stream)
            flowing = asyncio.create_task(flow(system, stream, 40))
            await asyncio.sleep(10 * STEP_S)
            apache_kafka.kill()
            await asyncio.sleep(BROKER_DOWN_S)
            apache_kafka.start()
            await apache_kafka.answers()
            await flowing
            await settled(system, stream, client)
        assert set((await processes.stop()).values()) == {0}
    await booked_once(system, stream)
