"""From a fill to an unlocked badge on a client's socket, at 200 fills a second.

The whole system runs as `navstream up` starts it. Every portfolio has one `badgeEvents` subscription,
SUBSCRIPTIONS_PER_SOCKET on a socket of `graphql-transport-ws`; every fill is its portfolio's first, so each of them
unlocks one badge. Measured is the time from Kafka's acknowledgement of the fill to the arrival of UNLOCKED, by one
clock: producer and client are one process on the same cores.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

import orjson
import uvloop
from aiokafka import AIOKafkaProducer
from websockets.asyncio.client import ClientConnection, connect

from api.auth import issue_token
from benchmarks.report import Figure, Report, quantile
from engine.messages import CashEvent, FillEvent, OpenEvent, PortfolioEvent, encode_event
from engine.runtime.embedded_start import free_port
from engine.runtime.settings import ReadyFile, Settings, read_ready_file

PORTFOLIOS_COUNT = 2_000
FILLS_PER_S = 200
SUBSCRIPTIONS_PER_SOCKET = 50
START_TIMEOUT_S = 90
ARRIVAL_TIMEOUT_S = 30
BADGE_ID = "first_fill"

_SUBSCRIPTION = """subscription Badges($id: String!) {
  badgeEvents(portfolioId: $id) {
    kind cursor at portfolioId badge { badgeId name rarity } evidence { figure eventId } } }"""


def run() -> None:
    with tempfile.TemporaryDirectory() as directory:
        ready_file = Path(directory) / "ready.json"
        program = [sys.executable, "-m", "navstream", "up", "--port", str(free_port()), "--ready-file", str(ready_file)]
        system = subprocess.Popen(program, env=os.environ | {"NAVSTREAM_LOG_LEVEL": "WARNING"})
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not ready_file.exists():
                assert system.poll() is None and time.monotonic() < deadline_s, "the system did not start"
                time.sleep(0.1)
            uvloop.run(_run(read_ready_file(ready_file)))
        finally:
            system.terminate()
            system.wait()


async def _run(ready: ReadyFile) -> None:
    report = Report("badge_stream")
    names = [f"p-{number:04d}" for number in range(PORTFOLIOS_COUNT)]
    producer = AIOKafkaProducer(bootstrap_servers=ready.kafka_bootstrap, enable_idempotence=True, acks="all")
    await producer.start()
    await asyncio.gather(*(_open(producer, ready.topic, name) for name in names))
    unlocked: dict[str, float] = {}
    all_unlocked = asyncio.Event()
    async with AsyncExitStack() as sockets:
        listeners = []
        for first in range(0, PORTFOLIOS_COUNT, SUBSCRIPTIONS_PER_SOCKET):
            socket = await sockets.enter_async_context(_connect(ready))
            await _subscribe(socket, ready, names[first : first + SUBSCRIPTIONS_PER_SOCKET])
            listeners.append(asyncio.create_task(_listen(socket, unlocked, all_unlocked)))
        await asyncio.sleep(2)
        acknowledged = await _fill(producer, ready.topic, names)
        with suppress(TimeoutError):
            await asyncio.wait_for(all_unlocked.wait(), ARRIVAL_TIMEOUT_S)
        for listener in listeners:
            listener.cancel()
    await producer.stop()
    delays = [unlocked[name] - acknowledged[name] for name in names if name in unlocked]
    report.add(Figure("badges unlocked, of one a fill", len(delays), "", at_least=PORTFOLIOS_COUNT))
    report.add(Figure("fill acknowledged → UNLOCKED, p50", quantile(delays, 0.5) * 1e3, "ms"))
    report.add(Figure("fill acknowledged → UNLOCKED, p99", quantile(delays, 0.99) * 1e3, "ms", at_most=1_000))
    report.add(Figure("slowest", max(delays) * 1e3, "ms"))
    report.finish()


async def _open(producer: AIOKafkaProducer, topic: str, name: str) -> None:
    now = datetime.now(UTC)
    opening = OpenEvent(
        event_id=f"{name}-o", portfolio_id=name, owner="bench", name=name, base_currency="USD", opened_at=now
    )
    deposit = CashEvent(
        event_id=f"{name}-d", portfolio_id=name, kind="DEPOSIT", amount="1000", currency="USD", effective_at=now
    )
    for event in (opening, deposit):
        await _send(producer, topic, event)


async def _send(producer: AIOKafkaProducer, topic: str, event: PortfolioEvent) -> None:
    await producer.send_and_wait(topic, encode_event(event), key=event.portfolio_id.encode())


async def _fill(producer: AIOKafkaProducer, topic: str, names: list[str]) -> dict[str, float]:
    """One fill for each portfolio, FILLS_PER_S a second; when each was acknowledged."""
    acknowledged: dict[str, float] = {}

    async def fill(name: str) -> None:
        event = FillEvent(
            event_id=f"{name}-f",
            portfolio_id=name,
            symbol="AAPL",
            side="BUY",
            quantity="1",
            price="100",
            fee="0",
            currency="USD",
            executed_at=datetime.now(UTC),
        )
        await _send(producer, topic, event)
        acknowledged[name] = time.monotonic()

    due_s = time.monotonic()
    async with asyncio.TaskGroup() as fills:
        for name in names:
            due_s += 1 / FILLS_PER_S
            await asyncio.sleep(max(0, due_s - time.monotonic()))
            fills.create_task(fill(name))
    return acknowledged


def _connect(ready: ReadyFile) -> connect:
    return connect(ready.ws_url, subprotocols=["graphql-transport-ws"], compression=None)  # type: ignore[list-item]


async def _subscribe(socket: ClientConnection, ready: ReadyFile, names: list[str]) -> None:
    settings = Settings().using(ready)
    token = issue_token(settings, "bench", "portfolio:read ledger:read", 3_600, datetime.now(UTC))
    await _say(socket, {"type": "connection_init", "payload": {"authorization": f"Bearer {token}"}})
    assert orjson.loads(await socket.recv())["type"] == "connection_ack"
    for name in names:
        payload = {"query": _SUBSCRIPTION, "variables": {"id": name}}
        await _say(socket, {"id": name, "type": "subscribe", "payload": payload})


async def _say(socket: ClientConnection, message: object) -> None:
    await socket.send(orjson.dumps(message).decode())


async def _listen(socket: ClientConnection, unlocked: dict[str, float], all_unlocked: asyncio.Event) -> None:
    async for text in socket:
        message = orjson.loads(text)
        if message["type"] == "ping":
            await _say(socket, {"type": "pong"})
        elif message["type"] == "next":
            assert "errors" not in message["payload"], message
            event = message["payload"]["data"]["badgeEvents"]
            if event["kind"] == "UNLOCKED" and event["badge"]["badgeId"] == BADGE_ID:
                unlocked.setdefault(event["portfolioId"], time.monotonic())
                if len(unlocked) == PORTFOLIOS_COUNT:
                    all_unlocked.set()
        else:
            raise AssertionError(message)
