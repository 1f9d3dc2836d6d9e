"""What every HTTP request passes: an id for its log lines, and a limit to its body.

The limit counts bytes as they stream in, because a client may say nothing of the length, or something untrue.
"""

from __future__ import annotations

import orjson
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.connection import new_request_id


class _BodyTooLargeError(Exception):
    pass


class RequestIds:
    """Gives each request and socket an id, in the log context and in the answer's `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request_id = scope["request_id"] = new_request_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self._app(scope, receive, send_with_id if scope["type"] == "http" else send)


class BodyLimit:
    """Answers 413 to a request whose body has more than `bytes_max` bytes."""

    def __init__(self, app: ASGIApp, bytes_max: int) -> None:
        self._app = app
        self._bytes_max = bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received_bytes = 0
        started = False

        async def receive_counted() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._bytes_max:
                raise _BodyTooLargeError
            return message

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        if _declared_length(scope) > self._bytes_max:
            await self._refuse(send)
            return
        try:
            await self._app(scope, receive_counted, send_noting)
        except _BodyTooLargeError:
            if started:
                raise
            await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        message = f"a request body has at most {self._bytes_max} bytes"
        body = orjson.dumps({"errors": [{"message": message, "extensions": {"code": "BODY_TOO_LARGE"}}]})
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
