"""The gateway as clients meet it: a real uvicorn on a free port, and clients of it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import asyncpg
import httpx
import uvicorn
import websockets
from pydantic import SecretStr

from api.app import Application, create_app, listening_socket, server_config
from api.auth import issue_token
from engine.runtime.clock import WallClock
from engine.runtime.connections import connect_postgres, connect_redis
from engine.runtime.settings import Settings
from tests.builders import HotStateBuilder, LedgerBuilder

SECRET = "a test's own secret, long enough for HS256"
ALL_SCOPES = "portfolio:read ledger:read ledger:write"
WAIT_S = 5


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the test run's own signal handlers alone."""
        yield


@dataclass
class Gateway:
    settings: Settings
    application: Application
    url: str
    redis: HotStateBuilder
    ledger: LedgerBuilder

    def token(self, subject: str = "ann", scope: str = ALL_SCOPES, ttl_s: int = 600) -> str:
        return issue_token(self.settings, subject, scope, ttl_s, datetime.now(UTC))

    async def post(
        self, query: str, variables: dict[str, Any] | None = None, token: str | None = "", **headers: str
    ) -> httpx.Response:
        """Send an operation; as ann unless a token is given, without any when it is None."""
        async with self.client() as client:
            return await client.post(
                "/graphql",
                json={"query": query, "variables": variables},
                headers={**self.bearer(token), **headers},
            )

    async def ask(self, query: str, variables: dict[str, Any] | None = None, token: str = "") -> Any:
        """The data of an operation that must not fail."""
        answer = (await self.post(query, variables, token)).json()
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    async def codes(self, query: str, variables: dict[str, Any] | None = None, token: str | None = "") -> list[str]:
        """The codes of an operation that must fail."""
        answer = (await self.post(query, variables, token)).json()
        return [error["extensions"]["code"] for error in answer["errors"]]

    def bearer(self, token: str | None = "") -> dict[str, str]:
        return {} if token is None else {"authorization": f"Bearer {token or self.token()}"}

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=WAIT_S * 4)

    @asynccontextmanager
    async def socket(self, token: str | None = "", **options: Any) -> AsyncIterator[Socket]:
        """A socket past connection_ack."""
        async with self.raw_socket(**options) as raw:
            await raw.send(json.dumps({"type": "connection_init", "payload": self.bearer(token)}))
            socket = Socket(raw)
            assert (await socket.receive())["type"] == "connection_ack"
            yield socket

    def raw_socket(self, **options: Any) -> Any:
        options.setdefault("subprotocols", ["graphql-transport-ws"])
        options.setdefault("max_queue", None)  # closing must not wait for what a test left unread
        return websockets.connect(self.url.replace("http", "ws") + "/graphql", compression=None, **options)

    async def watches(self, count: int) -> None:
        """Wait until the hub has so many watches."""
        async with asyncio.timeout(WAIT_S):
            while self.application.hub.watches_count != count:
                await asyncio.sleep(0.01)

    async def listening(self, *shards: int) -> None:
        """Wait until the feed has read what is watched on these shards, and goes on listening."""
        async with asyncio.timeout(WAIT_S):
            while not set(shards) <= self.application.hub._live_shards or self.application.hub.unread_signal.is_set():
                await asyncio.sleep(0.01)


class Stream:
    """One subscription of a socket."""

    def __init__(self, socket: Socket, operation_id: str) -> None:
        self.socket = socket
        self.operation_id = operation_id

    async def next(self, wait_s: float = WAIT_S) -> Any:
        """The next message's payload: the only field of its data. Fails on an error."""
        message = await self.message(wait_s)
        assert message["type"] == "next", message
        assert "errors" not in message["payload"], message
        (value,) = message["payload"]["data"].values()
        return value

    async def code(self) -> str:
        """The code of the error that the subscription ends in."""
        message = await self.message()
        assert message["type"] == "error", message
        return str(message["payload"][0]["extensions"]["code"])

    async def message(self, wait_s: float = WAIT_S) -> Any:
        return await self.socket.receive(self.operation_id, wait_s)

    async def silent(self, wait_s: float) -> bool:
        """Whether nothing comes for so long."""
        try:
            await self.message(wait_s)
        except TimeoutError:
            return True
        return False

    async def stop(self) -> None:
        await self.socket.send({"type": "complete", "id": self.operation_id})


class Socket:
    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self._ids = itertools.count(1)
        self._waiting: list[dict[str, Any]] = []

    async def subscribe(self, query: str, variables: dict[str, Any] | None = None) -> Stream:
        operation_id = str(next(self._ids))
        payload = {"query": query, "variables": variables}
        await self.send({"type": "subscribe", "id": operation_id, "payload": payload})
        return Stream(self, operation_id)

    async def send(self, message: Any) -> None:
        await self.raw.send(json.dumps(message))

    async def receive(self, operation_id: str | None = None, wait_s: float = WAIT_S) -> Any:
        """The next message, of this operation when one is named."""
        for message in self._waiting:
            if operation_id is None or message.get("id") == operation_id:
                self._waiting.remove(message)
                return message
        async with asyncio.timeout(wait_s):
            while True:
                message = json.loads(await self.raw.recv())
                if operation_id is None or message.get("id") == operation_id:
                    return message
                self._waiting.append(message)

    async def closed(self) -> int:
        """The code that the server closes the socket with."""
        async with asyncio.timeout(WAIT_S * 2):
            await self.raw.wait_closed()
        return int(self.raw.close_code)

    async def __aenter__(self) -> Self:
        return self


def make_settings(redis_url: str, postgres_url: str, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "redis_url": redis_url,
        "postgres_url": postgres_url,
        "kafka_bootstrap": "127.0.0.1:1",
        "jwt_secret": SecretStr(SECRET),
        "feed_silence_max_ms": 60_000,
    }
    return Settings(**{**values, **changes})


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[tuple[Application, str]]:
    """The application behind a real uvicorn."""
    app = create_app(settings, WallClock())
    with listening_socket("127.0.0.1", 0) as listener:
        server = _Server(server_config(app, settings))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started:
                assert not serving.done(), serving.result()
                await asyncio.sleep(0.01)
            yield app.state.application, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def gateway_of(settings: Settings) -> AsyncIterator[Gateway]:
    """A gateway that has reached PostgreSQL, with builders for the state behind it."""
    redis = connect_redis(settings, "test")
    pool: asyncpg.Pool = await connect_postgres(settings, "test")
    try:
        async with running(settings) as (application, url):
            async with asyncio.timeout(WAIT_S):
                while application.database._pool is None:
                    await asyncio.sleep(0.01)
            yield Gateway(settings, application, url, HotStateBuilder(redis), LedgerBuilder(pool))
    finally:
        await redis.aclose()
        await pool.close()
