"""graphql-sse, distinct connections: one operation for each request, its results as server-sent events.

    POST /graphql with Accept: text/event-stream, answered 200 whatever becomes of the operation:

    event: next          data: an execution result
    event: complete      data:                          the last
    :                    a comment after `heartbeat_interval_s` without an event, so that proxies keep the connection

Who lists text/event-stream beside JSON gets what it prefers, by q-values; where they are equal, JSON.

Streams are those of the WebSocket: the same hub and checks, compiled where the selection can be (api/delivery.py). A
stream counts as one of the subject's sockets; one too many is refused with 429. A token that expires ends it with an
error UNAUTHENTICATED. A server that ends, and a defect, end streams without `complete`, which clients take for a lost
connection and come back. A client that does not take an event within `send_timeout_s` is dropped: HTTP has no close
code. A compiled stream holds back what the client has not taken; of the others one result waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from strawberry.http.streaming import SSETransport
from strawberry.types.graphql import OperationType

from api import close_codes
from api.accept import media_ranges
from api.auth import Subject, expired
from api.connection import live_delivery
from api.delivery import Deliveries, LiveOperation
from api.metrics import Metrics
from api.outlets import Outlet
from api.socket_protocol import STREAMING
from api.socket_registry import SocketRegistry
from engine.runtime.settings import Settings

EVENT_STREAM = "text/event-stream"
_JSON_KINDS = frozenset({"application/json", "application/graphql-response+json", "application/graphql+json"})
_NEXT = b"event: next\ndata: "
_COMPLETE = b"event: complete\ndata: \n\n"
_COMMENT = b":\n\n"

Encode = Callable[[Any], Awaitable[Mapping[str, Any]]]


class EventTransport(SSETransport):
    """What Strawberry asks about server-sent events; the answer is an `EventStream`."""

    def accepts(self, accept: str) -> bool:
        return prefers_events(accept)

    def allowed_operation_types(self, allowed_operation_types: set[OperationType]) -> set[OperationType]:
        """GET runs queries only, here too."""
        if OperationType.MUTATION in allowed_operation_types:
            return allowed_operation_types
        return allowed_operation_types - {OperationType.SUBSCRIPTION}


class EventOutlet(Outlet):
    """A stream's way out: `chunks` hands what is written to whoever sends it, and is writable when that is done."""

    def __init__(self, deliveries: Deliveries) -> None:
        super().__init__(deliveries)
        self._frames: list[bytes] = []
        self._filled = asyncio.Event()
        self._taken = asyncio.Event()
        self._ended = False
        self.given_up = asyncio.Event()

    def add(self, prefix: bytes, payload: bytes) -> None:
        self.parts += (prefix, payload, b"\n\n")

    def write(self, frames: bytes) -> None:
        if self._ended:
            return
        self._frames.append(frames)
        self._filled.set()
        self._taken.clear()
        self.turn_writable(False)

    def give_up(self) -> None:
        self.given_up.set()

    async def put(self, payload: bytes) -> None:
        """Write one result and wait until it is taken."""
        self.add(_NEXT, payload)
        self.flush()
        await self._taken.wait()

    def end(self, frames: bytes) -> None:
        """These are the last, behind what was added before."""
        self.flush()
        self.write(frames)
        self._ended = True

    async def chunks(self, silence_max_s: float) -> AsyncIterator[bytes]:
        while not self._ended or self._frames:
            try:
                async with asyncio.timeout(silence_max_s):
                    await self._filled.wait()
            except TimeoutError:
                self._frames.append(_COMMENT)
            chunk = b"".join(self._frames)
            self._frames.clear()
            self._filled.clear()
            yield chunk
            if not self._frames:
                self._taken.set()
                self.turn_writable(True)


class EventStream(Response):
    """The answer to one operation, whose results are `encode`d to what JSON is made of."""

    media_type = EVENT_STREAM

    def __init__(
        self,
        results: AsyncGenerator[Any, None],
        encode: Encode,
        subject: Subject | None,
        settings: Settings,
        deliveries: Deliveries,
        registry: SocketRegistry,
        metrics: Metrics,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._results = results
        self._encode = encode
        self._subject = subject
        self._settings = settings
        self._deliveries = deliveries
        self._registry = registry
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._subject is None:
            await self._serve(scope, receive, send)
        elif not self._registry.enter(self._subject.subject):
            await _refusal()(scope, receive, send)
        else:
            try:
                await self._serve(scope, receive, send)
            finally:
                self._registry.leave(self._subject.subject)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        outlet = EventOutlet(self._deliveries)
        operation = asyncio.create_task(self._run(outlet))
        sending = asyncio.create_task(self._send(outlet, send))
        leaving = asyncio.create_task(_left(receive))
        sticking = asyncio.create_task(outlet.given_up.wait())
        expiry = asyncio.create_task(expired(self._subject))
        streaming = scope["extensions"][STREAMING]
        shutdown = asyncio.create_task(streaming["shutdown"].wait())
        tasks: list[asyncio.Task[Any]] = [operation, sending, leaving, sticking, expiry, shutdown]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if expiry.done():
                operation.cancel()
                outlet.end(_event(_error("UNAUTHENTICATED", "the token has expired")) + _COMPLETE)
            elif operation.done():
                outlet.end(_COMPLETE if operation.exception() is None else b"")
            elif shutdown.done():
                outlet.end(b"")
            if expiry.done() or operation.done() or shutdown.done():
                await asyncio.wait([sending, leaving, sticking], return_when=asyncio.FIRST_COMPLETED)
            if sticking.done():
                self._metrics.closes.labels(close_codes.TRY_LATER.name).inc()
                streaming["drop"]()
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            outlet.close()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    async def _run(self, outlet: EventOutlet) -> None:
        """Run the operation; returns when it has no more results."""
        live = LiveOperation(self._deliveries, outlet, _NEXT)
        live_delivery.set(live)
        try:
            async with aclosing(self._results):
                async for result in self._results:
                    await outlet.put(orjson.dumps(await self._encode(result)))
            await live.ended()
        finally:
            live.end()

    async def _send(self, outlet: EventOutlet, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in outlet.chunks(self._settings.heartbeat_interval_s):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(result: dict[str, Any]) -> bytes:
    return _NEXT + orjson.dumps(result) + b"\n\n"


def _error(code: str, message: str) -> dict[str, Any]:
    return {"errors": [{"message": message, "extensions": {"code": code}}]}


def _refusal() -> Response:
    body = orjson.dumps(_error(close_codes.TOO_MANY.name, "too many sockets and streams of this subject"))
    return Response(body, 429, media_type="application/json")


def prefers_events(accept: str) -> bool:
    """Whether the client would rather have events than JSON: with equal q-values it gets JSON, wherever it names it."""
    events = json = 0.0
    for kind, quality in media_ranges(accept):
        if kind == EVENT_STREAM:
            events = max(events, quality)
        elif kind in _JSON_KINDS:
            json = max(json, quality)
    return events > json
