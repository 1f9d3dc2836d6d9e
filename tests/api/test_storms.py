"""Clients that mean no good, or whose machine died: bounded memory, a named close, nobody else disturbed, no rest."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from contextlib import suppress
from typing import Any

import pytest
import websockets

from api import app, close_codes, socket_protocol
from api.groups import Group, Member
from api.outlets import SocketOutlet
from api.socket_protocol import SocketProtocol
from tests.builders import MICRO, MarkRow
from tests.gateway import Gateway, gateway_of, make_settings

NAV = "subscription($id: String!) { navUpdates(portfolioId: $id, maxRateHz: 20) { kind nav conflated } }"
POSITIONS = "subscription($id: String!) { positionUpdates(portfolioId: $id, maxRateHz: 20) { kind } }"
LEFT_BEHIND_MAX_S = 5


async def begin(gateway: Gateway, shard: int, portfolio_id: str) -> MarkRow:
    row = MarkRow()
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: row})
    return row


async def nothing_is_left(gateway: Gateway, tasks_count: int) -> None:
    """All that a client had is gone: its socket, tasks, watches, and the objects themselves."""
    hub = gateway.application.hub
    async with asyncio.timeout(LEFT_BEHIND_MAX_S):
        while gateway.application.gateway.sockets.count or hub.watches_count or hub.shards():
            await asyncio.sleep(0.02)
        while len(asyncio.all_tasks()) > tasks_count or rests():
            await asyncio.sleep(0.02)
    assert not gateway.application.gateway.deliveries._groups
    assert len(gateway.application.gateway.deliveries._wheel) == 0


def rests() -> list[object]:
    gc.collect()
    kinds = (Member, Group, SocketOutlet, SocketProtocol)
    return [one for one in gc.get_objects() if type(one) in kinds]


async def small_socket(gateway: Gateway) -> websockets.ClientConnection:
    """A socket with small buffers, past connection_ack."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    host, port = gateway.url.removeprefix("http://").split(":")
    await asyncio.to_thread(raw.connect, (host, int(port)))
    client = await websockets.connect(
        f"ws://{host}:{port}/graphql", sock=raw, subprotocols=["graphql-transport-ws"], compression=None, max_queue=1
    )
    await client.send(json.dumps({"type": "connection_init", "payload": gateway.bearer()}))
    await client.recv()
    return client


async def unread_socket(gateway: Gateway, portfolio_id: str, query: str) -> websockets.ClientConnection:
    """A socket with small buffers that has subscribed, and reads nothing from then on."""
    client = await small_socket(gateway)
    for number in range(50):
        payload = {"query": query, "variables": {"id": portfolio_id}}
        await client.send(json.dumps({"type": "subscribe", "id": str(number), "payload": payload}))
    client.transport.pause_reading()
    return client


async def test_one_that_does_not_read_disturbs_nobody(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    tasks_count = len(asyncio.all_tasks())
    aliases = " ".join(f"{'n' * 200}{number}: nav" for number in range(25))
    closes = gateway.application.metrics.closes.labels(close_codes.TRY_LATER.name)
    closed_before = closes._value.get()
    async with gateway.socket() as one, gateway.socket() as two:
        stuck = await unread_socket(gateway, portfolio_id, NAV.replace("nav conflated", aliases))
        streams = [await reader.subscribe(NAV, {"id": portfolio_id}) for reader in (one, one, two)]
        for stream in streams:
            await stream.next()
        await gateway.watches(53)
        sequence, lateness_s, buffered_bytes_max = 1, [], 0
        while gateway.application.gateway.sockets.count == 3:
            sequence += 1
            begun = time.monotonic()
            await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row.at(sequence, nav=sequence * MICRO)})
            for stream in streams:
                update = await stream.next()
                assert (update["nav"], update["conflated"]) == (str(sequence), 1)
            lateness_s.append(time.monotonic() - begun)
            sizes = [one._socket.transport.get_write_buffer_size() for one in outlets()]  # type: ignore[attr-defined]
            buffered_bytes_max = max(buffered_bytes_max, *sizes)
            await asyncio.sleep(0.05)
        # Blocked for `send_timeout_s` (2 s), all that while and after it everyone else had every value at once.
        assert len(lateness_s) > 10 and sorted(lateness_s)[len(lateness_s) // 2] < 0.1
        # No more than one message of each subscription, however many values there were.
        assert 0 < buffered_bytes_max < 50 * 8_000
        assert closes._value.get() == closed_before + 1
    # Whoever reads on after all is told why.
    stuck.transport.resume_reading()
    with suppress(websockets.ConnectionClosed):
        async with asyncio.timeout(5):
            while True:
                await stuck.recv()
    assert stuck.close_code in (close_codes.TRY_LATER.code, 1006)
    await nothing_is_left(gateway, tasks_count)


def outlets() -> list[SocketOutlet]:
    return [one for one in gc.get_objects() if type(one) is SocketOutlet]


async def test_hundreds_that_vanish_leave_nothing(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    tasks_count = len(asyncio.all_tasks())

    async def vanish(number: int) -> None:
        """At whatever stage: connected, greeted, subscribing, subscribed."""
        async with gateway.raw_socket() as raw:
            if number % 4:
                await raw.send(json.dumps({"type": "connection_init", "payload": gateway.bearer()}))
                await raw.recv()
            for operation in range(number % 4):
                payload = {"query": NAV, "variables": {"id": portfolio_id}}
                await raw.send(json.dumps({"type": "subscribe", "id": str(operation), "payload": payload}))
            if number % 8 == 3:
                await raw.recv()
            raw.transport.abort()

    sequence = 1
    for _ in range(8):
        vanishing = asyncio.gather(*(vanish(number) for number in range(40)))
        while not vanishing.done():
            sequence += 1
            await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row.at(sequence, nav=sequence * MICRO)})
            await asyncio.sleep(0.01)
        await vanishing
    await nothing_is_left(gateway, tasks_count)


async def test_a_storm_of_subscribe_and_complete(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    tasks_count = len(asyncio.all_tasks())
    async with gateway.socket() as calm, gateway.socket() as stormy:
        stream = await calm.subscribe(NAV, {"id": portfolio_id})
        await stream.next()
        tasks_count_max = 0
        for number in range(600):
            payload = {"query": NAV, "variables": {"id": portfolio_id}}
            # The same id again and again: what is completed must be gone before its name is given anew.
            await stormy.send({"type": "subscribe", "id": "1", "payload": payload})
            await stormy.send({"type": "complete", "id": "1"})
            if number % 100 == 99:
                sequence = 2 + number
                await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row.at(sequence, nav=sequence * MICRO)})
                assert (await stream.next())["nav"] == str(sequence)
            tasks_count_max = max(tasks_count_max, len(asyncio.all_tasks()))
        assert tasks_count_max < tasks_count + 40
        await stormy.send({"type": "ping"})
        while (await stormy.receive())["type"] != "pong":
            pass
        await gateway.watches(1)
    await nothing_is_left(gateway, tasks_count)


@pytest.mark.parametrize("query", [NAV, POSITIONS], ids=["compiled", "executed"])
async def test_an_id_taken_anew_while_its_last_answer_is_stuck_leaves_nothing(
    gateway: Gateway, shard: int, portfolio_id: str, query: str
) -> None:
    """The first operation gave its id back, and fails when the socket ends; the second must end as well."""
    await begin(gateway, shard, portfolio_id)
    tasks_count = len(asyncio.all_tasks())
    client = await small_socket(gateway)
    client.transport.pause_reading()

    async def subscribe(operation_id: str, payload: dict[str, Any]) -> None:
        await client.send(json.dumps({"type": "subscribe", "id": operation_id, "payload": payload}))

    big = "{ __schema { types { name description fields { name description args { name } } } } }"
    for number in range(6):
        await subscribe(f"big-{number}", {"query": big})
    async with asyncio.timeout(LEFT_BEHIND_MAX_S):
        while all(outlet.is_writable for outlet in outlets()):
            await asyncio.sleep(0.01)
    await subscribe("same", {"query": "{ nothing }"})
    await asyncio.sleep(0.2)
    await subscribe("same", {"query": query, "variables": {"id": portfolio_id}})
    async with asyncio.timeout(LEFT_BEHIND_MAX_S):
        while not gateway.application.hub.watches_count:
            await asyncio.sleep(0.01)
    client.transport.abort()
    await nothing_is_left(gateway, tasks_count)


async def test_twenty_thousand_subscriptions_on_one_socket(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await begin(gateway, shard, portfolio_id)
    tasks_count = len(asyncio.all_tasks())
    async with gateway.socket() as greedy:
        payload = {"query": NAV, "variables": {"id": portfolio_id}}
        refused_count = 0

        async def count_refusals() -> None:
            nonlocal refused_count
            while refused_count < 19_950:
                message = await greedy.receive(wait_s=60)
                refused_count += message["type"] == "error"
                if message["type"] == "error":
                    assert message["payload"][0]["extensions"]["code"] == "TOO_MANY_OPERATIONS"

        counting = asyncio.create_task(count_refusals())
        for number in range(20_000):
            await greedy.send({"type": "subscribe", "id": str(number), "payload": payload})
            if not number % 50:
                assert len(asyncio.all_tasks()) < tasks_count + 80 and gateway.application.hub.watches_count <= 50
                await asyncio.sleep(0)
        await counting
        assert gateway.application.hub.watches_count == 50
    await nothing_is_left(gateway, tasks_count)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{" + " a" * 25_000 + "}", "TOO_MANY_TOKENS"),
        ("{ " + "a { " * 12_000, "QUERY_TOO_DEEP"),
        ('{ node(id: "' + "x" * 50_000 + '") { id } }', "NOT_FOUND"),
        ("{ viewer { subject } } #" + " comment" * 6_000, None),
        ("query($" + "v" * 50_000 + ": Int) { viewer { subject } }", "GRAPHQL_VALIDATION_FAILED"),
    ],
    ids=["fields", "depth", "text", "comment", "name"],
)
async def test_operations_of_fifty_kilobytes(gateway: Gateway, text: str, code: str | None) -> None:
    async with gateway.socket() as client:
        begun = time.monotonic()
        for _ in range(20):
            stream = await client.subscribe(text)
            message = await stream.message()
            errors = message["payload"] if message["type"] == "error" else message["payload"].get("errors")
            assert (errors[0]["extensions"]["code"] if errors else None) == code
        assert time.monotonic() - begun < 5


async def test_half_open_sockets_are_found_and_dropped(
    valkey_url: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "WS_PING_INTERVAL_S", 1)
    monkeypatch.setattr(socket_protocol, "REQUEST_TIMEOUT_S", 1)
    async with gateway_of(make_settings(valkey_url, database)) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        # Says nothing, half a head, a head without its body.
        post = b"POST /graphql HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        beginnings = [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", post]
        for beginning in beginnings:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(beginning)
            async with asyncio.timeout(LEFT_BEHIND_MAX_S):
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
            writer.close()
        # Greets, and answers no ping.
        async with gateway.socket() as client:
            client.raw.transport.pause_reading()
            async with asyncio.timeout(LEFT_BEHIND_MAX_S):
                while gateway.application.gateway.sockets.count:
                    await asyncio.sleep(0.02)
            client.raw.transport.resume_reading()
            assert await client.closed() == close_codes.TRY_LATER.code


async def test_pings_are_not_answered_to_who_does_not_read(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    """A flood of pings whose answers nobody takes must not heap them up."""
    host, port = gateway.url.removeprefix("http://").split(":")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    await asyncio.to_thread(raw.connect, (host, int(port)))
    head = f"""GET /graphql HTTP/1.1
Host: {host}:{port}
Upgrade: websocket
Connection: Upgrade
Sec-WebSocket-Version: 13
Sec-WebSocket-Protocol: graphql-transport-ws
Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==

"""
    await asyncio.to_thread(raw.sendall, head.replace("\n", "\r\n").encode())
    ping = bytes([0x89, 0x80 | 125]) + bytes(4) + b"x" * 125
    flood: asyncio.Task[Any] = asyncio.create_task(asyncio.to_thread(raw.sendall, ping * 16_000))
    buffered_bytes_max = 0
    for _ in range(100):
        await asyncio.sleep(0.02)
        sizes = [one.transport.get_write_buffer_size() for one in gc.get_objects() if type(one) is SocketProtocol]
        buffered_bytes_max = max([buffered_bytes_max, *sizes])
    raw.close()
    with suppress(OSError):
        await flood
    assert buffered_bytes_max < 512 * 1024  # what is answered of one read, which uvloop bounds by 256 KiB
