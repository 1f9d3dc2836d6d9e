"""Server-sent events: framing, negotiation, the same checks and limits as a socket, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from api.sse import EventOutlet, prefers_events
from tests.builders import MICRO, MarkRow
from tests.gateway import WAIT_S, Gateway, gateway_of, make_settings

NAV = "subscription($id: String!) { navUpdates(portfolioId: $id, maxRateHz: 20) { kind nav conflated } }"
VIEWER = "{ viewer { subject } }"
JSON = "application/graphql-response+json, application/json"


class Events:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._text = ""
        self.chunks = response.aiter_text()

    async def block(self, wait_s: float = WAIT_S) -> str:
        """What comes up to the next empty line."""
        async with asyncio.timeout(wait_s):
            while "\n\n" not in self._text:
                self._text += await anext(self.chunks)
        block, _, self._text = self._text.partition("\n\n")
        return block

    async def next(self) -> Any:
        block = await self.block()
        assert block.startswith("event: next\ndata: "), block
        return json.loads(block.removeprefix("event: next\ndata: "))

    async def ends(self) -> None:
        assert await self.block() == "event: complete\ndata: "
        with pytest.raises(StopAsyncIteration):
            await anext(self.chunks)
        assert self._text == ""


@asynccontextmanager
async def events(
    gateway: Gateway, query: str, token: str | None = "", accept: str = "text/event-stream", **variables: Any
) -> AsyncIterator[Events]:
    body = {"query": query, "variables": variables}
    async with (
        gateway.client() as client,
        client.stream("POST", "/graphql", json=body, headers={"accept": accept, **gateway.bearer(token)}) as response,
    ):
        yield Events(response)


async def stream_by_hand(gateway: Gateway, query: str, **variables: Any) -> socket.socket:
    """A connection with a stream that has begun, and with small buffers."""
    host, port = gateway.url.removeprefix("http://").split(":")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    await asyncio.to_thread(raw.connect, (host, int(port)))
    body = json.dumps({"query": query, "variables": variables}).encode()
    head = f"""POST /graphql HTTP/1.1
Host: {host}:{port}
Accept: text/event-stream
Content-Type: application/json
Content-Length: {len(body)}
Authorization: {gateway.bearer()["authorization"]}

""".replace("\n", "\r\n")
    await asyncio.to_thread(raw.sendall, head.encode() + body)
    begun = b""
    while b"event: next" not in begun:
        begun += await asyncio.to_thread(raw.recv, 1_000)
    return raw


async def begin(gateway: Gateway, shard: int, portfolio_id: str, **fields: int) -> MarkRow:
    row = MarkRow(**fields)
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: row})
    return row


async def gone(gateway: Gateway) -> None:
    await gateway.watches(0)
    async with asyncio.timeout(WAIT_S):
        while gateway.application.gateway.sockets.count:
            await asyncio.sleep(0.01)


async def test_a_subscription_is_a_stream_of_events(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id, nav=5 * MICRO)
    async with events(gateway, NAV, id=portfolio_id) as stream:
        assert stream.response.status_code == 200
        assert stream.response.headers["content-type"].partition(";")[0] == "text/event-stream"
        assert "no-transform" in stream.response.headers["cache-control"]
        assert (await stream.next())["data"]["navUpdates"] == {"kind": "SNAPSHOT", "nav": "5", "conflated": 1}
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, nav=6 * MICRO)})
        assert (await stream.next())["data"]["navUpdates"] == {"kind": "UPDATE", "nav": "6", "conflated": 1}
        assert gateway.application.gateway.sockets.count == 1
    await gone(gateway)


async def test_what_can_not_be_compiled_is_streamed_too(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await begin(gateway, shard, portfolio_id)
    query = "subscription($id: String!) { positionUpdates(portfolioId: $id) { kind } }"
    async with events(gateway, query, id=portfolio_id) as stream:
        assert (await stream.next())["data"]["positionUpdates"] == {"kind": "SNAPSHOT"}
        assert (await stream.next())["data"]["positionUpdates"] == {"kind": "HEARTBEAT"}
    await gone(gateway)


async def test_a_query_is_one_event(gateway: Gateway) -> None:
    async with events(gateway, VIEWER) as stream:
        assert await stream.next() == {"data": {"viewer": {"subject": "ann"}}}
        await stream.ends()
    await gone(gateway)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("{ nothing }", "GRAPHQL_VALIDATION_FAILED"),
        ("{", "GRAPHQL_PARSE_FAILED"),
        ('subscription { navUpdates(portfolioId: "none") { kind } }', "NOT_FOUND"),
        ('subscription { navUpdates(portfolioId: "none", maxRateHz: 99) { kind } }', "NOT_FOUND"),
    ],
)
async def test_an_operation_that_fails_is_one_event_with_its_errors(gateway: Gateway, query: str, code: str) -> None:
    async with events(gateway, query) as stream:
        assert [error["extensions"]["code"] for error in (await stream.next())["errors"]] == [code]
        await stream.ends()


async def test_somebody_else_s_portfolio_is_not_found(gateway: Gateway, portfolio_id: str) -> None:
    async with events(gateway, NAV, token=gateway.token("bob"), id=portfolio_id) as stream:
        assert (await stream.next())["errors"][0]["extensions"]["code"] == "NOT_FOUND"


async def test_no_token_and_a_wrong_one(gateway: Gateway, portfolio_id: str) -> None:
    async with events(gateway, NAV, token=None, id=portfolio_id) as stream:
        assert (await stream.next())["errors"][0]["extensions"]["code"] == "UNAUTHENTICATED"
    async with events(gateway, NAV, token="x.y.z", id=portfolio_id) as stream:
        assert stream.response.status_code == 401


@pytest.mark.parametrize(
    ("accept", "preferred"),
    [
        ("text/event-stream", True),
        ("text/event-stream, */*", True),
        ("application/json;q=0.5, text/event-stream", True),
        ("text/event-stream, application/json", False),
        ("text/event-stream, application/json;q=0.9", True),
        ("Text/Event-Stream;Q=0.9, application/json;q=0.8", True),
        ("application/graphql-response+json, application/json, text/event-stream, multipart/mixed", False),
        ("application/json, text/event-stream;q=0.9", False),
        ("text/event-stream;q=0, */*", False),
        ("text/event-stream;q=nonsense", False),
        ("application/json", False),
        ("*/*", False),
        ("", False),
        (";;,,", False),
    ],
)
def test_what_the_client_prefers(accept: str, preferred: bool) -> None:
    assert prefers_events(accept) is preferred


async def test_who_prefers_json_gets_json(gateway: Gateway, portfolio_id: str) -> None:
    answer = await gateway.post(VIEWER, accept=f"{JSON}, text/event-stream;q=0.5")
    assert answer.headers["content-type"].startswith("application/graphql-response+json")
    answer = await gateway.post(NAV, {"id": portfolio_id}, accept=JSON)
    assert answer.json()["errors"][0]["extensions"]["code"] == "NEEDS_WEBSOCKET"


async def test_get_runs_queries_only(gateway: Gateway) -> None:
    headers = {"accept": "text/event-stream", **gateway.bearer()}
    async with gateway.client() as client:
        answer = await client.get("/graphql", params={"query": VIEWER}, headers=headers)
        assert '"subject":"ann"' in answer.text
        query = 'subscription { navUpdates(portfolioId: "p") { kind } }'
        answer = await client.get("/graphql", params={"query": query}, headers=headers)
        assert "errors" in answer.text and answer.text.endswith("event: complete\ndata: \n\n")


async def test_streams_count_as_sockets_and_expiry_ends_them(valkey_url: str, database: str) -> None:
    settings = make_settings(valkey_url, database, sockets_per_subject_max=1, heartbeat_interval_s=1)
    async with gateway_of(settings) as gateway:
        await gateway.ledger.portfolio("p-sse", "ann", 91)
        begun = time.monotonic()
        async with events(gateway, NAV, token=gateway.token(ttl_s=3), id="p-sse") as stream:
            await gateway.watches(1)
            async with events(gateway, NAV, id="p-sse") as another:
                assert another.response.status_code == 429
                body = json.loads(await another.response.aread())
                assert body["errors"][0]["extensions"]["code"] == "TOO_MANY"
            # Nothing to tell: comments keep the connection.
            assert await stream.block() == ":"
            while (block := await stream.block()) == ":":
                pass
            assert json.loads(block.partition("data: ")[2])["errors"][0]["extensions"]["code"] == "UNAUTHENTICATED"
            await stream.ends()
            assert time.monotonic() - begun < 4
        await gone(gateway)


async def test_a_client_that_does_not_read_is_dropped(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    """One that asks for much and takes nothing: the socket's buffers fill up, then it is given `send_timeout_s`."""
    aliases = " ".join(f"a{'n' * 400}{number}: nav" for number in range(25))
    query = f"subscription($id: String!) {{ navUpdates(portfolioId: $id, maxRateHz: 20) {{ {aliases} }} }}"
    row = await begin(gateway, shard, portfolio_id)
    raw = await stream_by_hand(gateway, query, id=portfolio_id)
    closes = gateway.application.metrics.closes.labels("TRY_LATER")
    closed_before = closes._value.get()
    async with asyncio.timeout(60):
        sequence = 1
        while gateway.application.gateway.sockets.count:
            sequence += 1
            await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row.at(sequence, nav=10**15 + sequence)})
            await asyncio.sleep(0.051)
    await gone(gateway)
    assert closes._value.get() == closed_before + 1
    raw.close()


async def test_a_defect_ends_the_stream_without_saying_complete(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def defective(*_: object) -> Any:
        raise ValueError("a defect")

    monkeypatch.setattr(gateway.application.gateway, "process_result", defective)
    async with events(gateway, VIEWER) as stream, asyncio.timeout(WAIT_S):
        rest = ""
        with suppress(httpx.RemoteProtocolError):
            async for chunk in stream.chunks:
                rest += chunk
        assert rest.strip(":\n") == ""
    await gone(gateway)


async def test_nothing_follows_the_last_event(gateway: Gateway) -> None:
    """However slowly it is taken: what was made before comes before it, what is made after it not at all."""
    outlet = EventOutlet(gateway.application.gateway.deliveries)
    chunks = outlet.chunks(WAIT_S)
    outlet.add(b"data: ", b"1")
    outlet.end(b"last\n\n")
    outlet.add(b"data: ", b"2")
    outlet.flush()
    first = await anext(chunks)
    outlet.add(b"data: ", b"3")
    outlet.flush()
    assert first == b"data: 1\n\nlast\n\n"
    assert [chunk async for chunk in chunks] == []
    outlet.close()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_leaves_nothing(gateway: Gateway, shard: int, portfolio_id: str, how: str) -> None:
    await begin(gateway, shard, portfolio_id)
    tasks_count = len(asyncio.all_tasks())
    for query in (NAV, "subscription($id: String!) { positionUpdates(portfolioId: $id) { kind } }"):
        raw = await stream_by_hand(gateway, query, id=portfolio_id)
        if how == "reset":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
        await gone(gateway)
    async with asyncio.timeout(WAIT_S):
        while len(asyncio.all_tasks()) > tasks_count:
            await asyncio.sleep(0.01)


async def test_a_server_that_ends_ends_its_streams_without_saying_complete(valkey_url: str, database: str) -> None:
    async with gateway_of(make_settings(valkey_url, database)) as gateway:
        await gateway.ledger.portfolio("p-end", "ann", 92)
        await begin(gateway, 92, "p-end")
        raw = await stream_by_hand(gateway, NAV, id="p-end")
    rest = b""
    while chunk := await asyncio.to_thread(raw.recv, 1_000):
        rest += chunk
    assert rest.endswith(b"0\r\n\r\n") and b"complete" not in rest
    raw.close()
