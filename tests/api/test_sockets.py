"""WebSockets: odd messages, caps, expiry, and that a client who left or stopped reading leaves nothing."""

from __future__ import annotations

import asyncio
import json
import socket as sockets
import time
from typing import Any

import pytest
import websockets

from api.sockets import shape_problem
from tests.builders import MarkRow
from tests.gateway import Gateway, gateway_of, make_settings

NAV = "subscription($id: String!) { navUpdates(portfolioId: $id, maxRateHz: 20) { kind nav } }"
VIEWER = "{ viewer { subject } }"

ODD_MESSAGES: list[Any] = [
    [],
    None,
    1,
    "x",
    {},
    {"type": None},
    {"type": 1},
    {"type": {}},
    {"type": []},
    {"type": "start", "id": "1"},
    {"type": "subscribe"},
    {"type": "subscribe", "id": None, "payload": {"query": VIEWER}},
    {"type": "subscribe", "id": 1, "payload": {"query": VIEWER}},
    {"type": "subscribe", "id": {}, "payload": {"query": VIEWER}},
    {"type": "subscribe", "id": "", "payload": {"query": VIEWER}},
    {"type": "subscribe", "id": "x" * 129, "payload": {"query": VIEWER}},
    {"type": "subscribe", "id": "1"},
    {"type": "subscribe", "id": "1", "payload": None},
    {"type": "subscribe", "id": "1", "payload": []},
    {"type": "subscribe", "id": "1", "payload": "x"},
    {"type": "subscribe", "id": "1", "payload": {}},
    {"type": "subscribe", "id": "1", "payload": {"query": None}},
    {"type": "subscribe", "id": "1", "payload": {"query": {}}},
    {"type": "subscribe", "id": "1", "payload": {"query": VIEWER, "variables": []}},
    {"type": "subscribe", "id": "1", "payload": {"query": VIEWER, "variables": "{}"}},
    {"type": "subscribe", "id": "1", "payload": {"query": VIEWER, "operationName": 1}},
    {"type": "subscribe", "id": "1", "payload": {"query": VIEWER, "extensions": []}},
    {"type": "complete"},
    {"type": "complete", "id": {}},
    {"type": "complete", "id": 7},
    {"type": "ping", "payload": 1},
    {"type": "pong", "payload": []},
    {"type": "connection_init", "payload": "x"},
    {"type": "connection_init", "payload": [1]},
]
ODD_TEXTS = ["", "{", "null", "NaN", '"', "[" * 5_000, '{"a":' * 3_000, "[" * 200 + "]" * 200, '{"type":"ping"}x']


@pytest.mark.parametrize("text", [json.dumps(message) for message in ODD_MESSAGES] + ODD_TEXTS)
async def test_odd_messages_close_with_4400(gateway: Gateway, text: str) -> None:
    async with gateway.socket() as socket:
        await socket.raw.send(text)
        assert await socket.closed() == 4400


async def test_binary_closes_with_4400(gateway: Gateway) -> None:
    async with gateway.socket() as socket:
        await socket.raw.send(b"\x00\xff")
        assert await socket.closed() == 4400


def test_shape_of_good_messages() -> None:
    for message in (
        {"type": "ping"},
        {"type": "pong", "payload": None},
        {"type": "connection_init", "payload": {}},
        {"type": "complete", "id": "1"},
        {"type": "subscribe", "id": "1", "payload": {"query": "{ a }", "variables": None, "operationName": None}},
    ):
        assert shape_problem(message) is None


async def test_ping_is_answered(gateway: Gateway) -> None:
    async with gateway.socket() as socket:
        await socket.send({"type": "ping"})
        assert (await socket.receive())["type"] == "pong"


async def test_a_message_too_large_closes_with_1009(gateway: Gateway) -> None:
    async with gateway.socket() as socket:
        await socket.raw.send("x" * (64 * 1024 + 1))
        assert await socket.closed() == 1009


@pytest.mark.parametrize(
    "payload", [{}, {"authorization": "Bearer x.y.z"}, {"authorization": 7}, {"Authorization": ""}]
)
async def test_init_without_a_good_token_closes_with_4403(gateway: Gateway, payload: dict[str, Any]) -> None:
    async with gateway.raw_socket() as raw:
        await raw.send(json.dumps({"type": "connection_init", "payload": payload}))
        await raw.wait_closed()
        assert raw.close_code == 4403


async def test_token_of_the_handshake_header_is_taken(gateway: Gateway) -> None:
    async with gateway.raw_socket(additional_headers=gateway.bearer(gateway.token("zoe"))) as raw:
        await raw.send(json.dumps({"type": "connection_init"}))
        assert json.loads(await raw.recv())["type"] == "connection_ack"
        await raw.send(json.dumps({"type": "subscribe", "id": "1", "payload": {"query": VIEWER}}))
        assert json.loads(await raw.recv())["payload"]["data"] == {"viewer": {"subject": "zoe"}}


async def test_operation_before_ack_closes_with_4401(gateway: Gateway) -> None:
    async with gateway.raw_socket() as raw:
        await raw.send(json.dumps({"type": "subscribe", "id": "1", "payload": {"query": VIEWER}}))
        await raw.wait_closed()
        assert raw.close_code == 4401


async def test_init_twice_closes_with_4429_and_a_duplicate_id_with_4409(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    async with gateway.socket() as socket:
        await socket.send({"type": "connection_init", "payload": {}})
        assert await socket.closed() == 4429
    async with gateway.socket() as socket:
        for _ in range(2):
            payload = {"query": NAV, "variables": {"id": portfolio_id}}
            await socket.send({"type": "subscribe", "id": "same", "payload": payload})
        assert await socket.closed() == 4409
    await gateway.watches(0)


@pytest.mark.parametrize("protocols", [["graphql-ws"], None])
async def test_other_protocols_close_with_4406(gateway: Gateway, protocols: list[str] | None) -> None:
    async with gateway.raw_socket(subprotocols=protocols) as raw:
        await raw.wait_closed()
        assert raw.close_code == 4406


async def test_foreign_origins_are_refused(gateway: Gateway) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with gateway.raw_socket(origin="https://evil.example"):
            pass
    assert refused.value.response.status_code == 403
    async with gateway.raw_socket(origin=gateway.url) as raw:
        assert raw.subprotocol == "graphql-transport-ws"


async def test_subscription_to_nothing_is_an_error_with_a_code(gateway: Gateway) -> None:
    for query in (
        "subscription { nothing }",
        "subscription { __typename }",
        "subscription { a: quotes(symbols: []) { kind } b: viewer }",
    ):
        async with gateway.socket() as socket:
            assert await (await socket.subscribe(query)).code() == "GRAPHQL_VALIDATION_FAILED"


async def test_queries_and_limits_apply_over_sockets(gateway: Gateway) -> None:
    async with gateway.socket() as socket:
        assert await (await socket.subscribe(VIEWER)).next() == {"subject": "ann"}
        aliases = "{" + " ".join(f"a{n}: viewer {{ subject }}" for n in range(60)) + "}"
        assert await (await socket.subscribe(aliases)).code() == "TOO_MANY_ALIASES"


async def test_disconnect_leaves_nothing(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: MarkRow()})
    tasks_before = len(asyncio.all_tasks())
    queries = [NAV, NAV.replace("nav }", "nav conflated }")]
    queries.append("subscription($id: String!) { positionUpdates(portfolioId: $id) { kind } }")
    queries.append("subscription($id: String!) { ledgerEvents(portfolioId: $id) { cursor } }")
    for how in ("close", "abort"):
        async with gateway.socket() as socket:
            for query in queries:
                await socket.subscribe(query, {"id": portfolio_id})
            await gateway.watches(5)  # positionUpdates has two
            if how == "abort":
                socket.raw.transport.abort()
        await gateway.watches(0)
        async with asyncio.timeout(5):
            while gateway.application.gateway.sockets.count or gateway.application.feed._subscribed:
                await asyncio.sleep(0.02)
            while len(asyncio.all_tasks()) > tasks_before:
                await asyncio.sleep(0.02)


async def test_a_reader_that_stops_is_freed(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = MarkRow()
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: row})
    # A large answer each time fills the buffers of a client that does not read: 1 MiB in all, then it is stuck.
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    host, port = gateway.url.removeprefix("http://").split(":")
    await asyncio.to_thread(raw.connect, (host, int(port)))
    async with websockets.connect(
        f"ws://{host}:{port}/graphql", sock=raw, subprotocols=["graphql-transport-ws"], compression=None, max_queue=1
    ) as stuck:
        await stuck.send(json.dumps({"type": "connection_init", "payload": gateway.bearer()}))
        assert json.loads(await stuck.recv())["type"] == "connection_ack"
        payload: dict[str, Any] = {"query": NAV, "variables": {"id": portfolio_id}}
        await stuck.send(json.dumps({"type": "subscribe", "id": "1", "payload": payload}))
        await gateway.watches(1)
        stuck.transport.pause_reading()
        big = {"query": "{ __schema { types { name description fields { name description args { name } } } } }"}
        for number in range(40):
            await stuck.send(json.dumps({"type": "subscribe", "id": f"b{number}", "payload": big}))
        begun = time.monotonic()
        async with asyncio.timeout(12):
            while gateway.application.gateway.sockets.count or gateway.application.hub.watches_count:
                await asyncio.sleep(0.05)
        assert time.monotonic() - begun < 8
        stuck.transport.abort()


async def test_caps_and_expiry(valkey_url: str, database: str) -> None:
    settings = make_settings(
        valkey_url, database, sockets_per_subject_max=2, operations_per_socket_max=1, connection_init_timeout_s=1
    )
    async with gateway_of(settings) as gateway:
        await gateway.ledger.portfolio("p-caps", "ann", 90)
        bob = gateway.token("bob")
        async with gateway.socket(), gateway.socket(), gateway.socket(bob), gateway.raw_socket() as raw:
            await raw.send(json.dumps({"type": "connection_init", "payload": gateway.bearer()}))
            await raw.wait_closed()
            assert raw.close_code == 4429
        async with gateway.raw_socket() as raw:
            await raw.wait_closed()
            assert raw.close_code == 4408
        async with gateway.socket(gateway.token("ann", ttl_s=2)) as socket:
            await socket.subscribe(NAV, {"id": "p-caps"})
            await gateway.watches(1)
            assert await (await socket.subscribe(NAV, {"id": "p-caps"})).code() == "TOO_MANY_OPERATIONS"
            assert await socket.closed() == 4403
        await gateway.watches(0)


async def test_shutdown_closes_with_1012(valkey_url: str, database: str) -> None:
    async with gateway_of(make_settings(valkey_url, database)) as gateway:
        context = gateway.socket()
        socket = await context.__aenter__()
    assert await socket.closed() == 1012
