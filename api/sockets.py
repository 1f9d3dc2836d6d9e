"""The handler of one WebSocket: graphql-transport-ws, with what Strawberry's leaves open closed.

shape       every message is checked before it is looked into; anything odd closes with 4400, not a traceback
identity    checked at connection_init; a refused or missing token closes with 4403, as does expiry later on
caps        sockets per subject (4429), operations per socket (an error of the operation)
slow reader a message that can not be sent within `send_timeout_s` ends the socket with 1013; TCP_USER_TIMEOUT on the
            listening socket frees what the kernel still holds of it
gone        all operations of a socket that has ended are cancelled, and with them their watches; also one whose id was
            that of an operation which fails only then, and takes the id with it
compiled    a subscription whose selection can be compiled is sent past Strawberry (api/delivery.py), where the server
            lets the gateway write to its sockets (api/socket_protocol.py)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any, cast

import structlog
from graphql import GraphQLError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState
from strawberry.http.async_base_view import AsyncWebSocketAdapter
from strawberry.http.exceptions import NonJsonMessageReceived, NonTextMessageReceived, WebSocketDisconnected
from strawberry.subscriptions.protocols.graphql_transport_ws.handlers import BaseGraphQLTransportWSHandler
from strawberry.types import ExecutionResult

from api import close_codes
from api.auth import Authenticator, Subject, TokenRefusedError, expired
from api.close_codes import CloseCode
from api.connection import Connection, live_delivery
from api.delivery import Deliveries, LiveOperation
from api.metrics import Metrics
from api.operations import published
from api.outlets import Outlet, SocketOutlet, next_prefix
from api.socket_protocol import DIRECT_WRITES, DirectSocket
from api.socket_registry import SocketRegistry
from engine.runtime.settings import Settings

OPERATION_ID_LENGTH_MAX = 128
CLOSE_REASON_BYTES_MAX = 120  # a close frame holds 123

_log = structlog.get_logger(__name__)


class SocketAdapter(AsyncWebSocketAdapter):
    """Strawberry's way to a WebSocket, with a limit to how long a message may take to be sent."""

    def __init__(self, view: Any, request: WebSocket, response: WebSocket) -> None:
        super().__init__(view)
        self._socket = response
        self._send_timeout_s: float = view.settings.send_timeout_s
        self._metrics: Metrics = view.metrics
        self._stuck = asyncio.Event()
        direct = request.scope.get("extensions", {}).get(DIRECT_WRITES)
        self.direct: DirectSocket | None = None if direct is None else direct["socket"]

    async def iter_json(self, *, ignore_parsing_errors: bool = False) -> AsyncGenerator[object, None]:
        while self._socket.application_state is not WebSocketState.DISCONNECTED:
            try:
                text = await self._receive()
            except KeyError:
                raise NonTextMessageReceived from None
            except (WebSocketDisconnect, RuntimeError):
                return
            try:
                message: object = self.view.decode_json(text)
            except ValueError:
                raise NonJsonMessageReceived from None
            yield message

    async def send_json(self, message: Mapping[str, object]) -> None:
        if self._stuck.is_set():
            raise WebSocketDisconnected
        text = cast(str, self.view.encode_json(message))
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._socket.send_text(text)
        except TimeoutError:
            self.give_up()
            raise WebSocketDisconnected from None
        except (WebSocketDisconnect, RuntimeError):
            # Starlette's RuntimeError: the socket was closed by another operation's task meanwhile.
            raise WebSocketDisconnected from None

    def give_up(self) -> None:
        """The client does not read: the socket ends here, and whoever waits for it."""
        if not self._stuck.is_set():
            self._metrics.closes.labels(close_codes.TRY_LATER.name).inc()
            self._stuck.set()
            if self.direct is not None:
                self.direct.give_up(close_codes.TRY_LATER.code, "messages are not read")

    async def close(self, code: int, reason: str) -> None:
        text = reason.encode()[:CLOSE_REASON_BYTES_MAX].decode(errors="ignore")
        name = next((known.name for known in close_codes.CLOSE_CODES if known.code == code), "OTHER")
        self._metrics.closes.labels(name).inc()
        # A socket that ended meanwhile, or whose reader is stuck, needs no close frame.
        with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            async with asyncio.timeout(self._send_timeout_s):
                await self._socket.close(code=code, reason=text)

    async def _receive(self) -> str:
        """The next message; WebSocketDisconnect when a send got stuck, because then no close will ever arrive."""
        receiving = asyncio.ensure_future(self._socket.receive_text())
        stuck = asyncio.ensure_future(self._stuck.wait())
        try:
            await asyncio.wait({receiving, stuck}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                raise WebSocketDisconnect(close_codes.TRY_LATER.code)
            return receiving.result()
        finally:
            receiving.cancel()
            stuck.cancel()


class SocketHandler(BaseGraphQLTransportWSHandler[Connection, None]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._authenticator: Authenticator = self.view.authenticator  # type: ignore[attr-defined]
        self._registry: SocketRegistry = self.view.sockets  # type: ignore[attr-defined]
        self._settings: Settings = self.view.settings  # type: ignore[attr-defined]
        self._deliveries: Deliveries = self.view.deliveries  # type: ignore[attr-defined]
        self._expiry: asyncio.Task[None] | None = None
        self._entered: str | None = None
        self._live: dict[str, LiveOperation] = {}
        self._running: set[asyncio.Task[Any]] = set()
        adapter = cast(SocketAdapter, self.websocket)
        self._outlet: Outlet | None = None
        if adapter.direct is not None:
            self._outlet = SocketOutlet(self._deliveries, adapter.direct, adapter.give_up)

    async def shutdown(self) -> None:
        try:
            if self._expiry is not None:
                self._expiry.cancel()
            await super().shutdown()
            await self._end_operations()
        finally:
            if self._outlet is not None:
                self._outlet.close()
            if self._entered is not None:
                self._registry.leave(self._entered)

    async def handle_message(self, message: Any) -> None:
        problem = shape_problem(message)
        if problem is not None:
            await self.handle_invalid_message(problem)
        else:
            await super().handle_message(message)

    async def handle_connection_init(self, message: Any) -> None:
        if self.connection_init_received:
            await self._close(close_codes.TOO_MANY, "connection_init was sent twice")
            return
        if self.connection_timed_out:
            return
        params = message.get("payload") or {}
        try:
            subject = await self._authenticator.authenticate(self._authorization(params))
        except TokenRefusedError as error:
            self.connection_init_received = True
            await self._close(close_codes.FORBIDDEN, str(error))
            return
        if subject is None:
            self.connection_init_received = True
            await self._close(close_codes.FORBIDDEN, "a token is needed")
        elif not self._registry.enter(subject.subject):
            self.connection_init_received = True
            await self._close(close_codes.TOO_MANY, "too many sockets of this subject")
        else:
            self._entered = subject.subject
            self.context.subject = subject
            self._expiry = asyncio.create_task(self._expire(subject))
            await super().handle_connection_init({"type": "connection_init", "payload": params})

    async def handle_subscribe(self, message: Any) -> None:
        if len(self.operations) >= self._settings.operations_per_socket_max and message["id"] not in self.operations:
            text = f"a socket has at most {self._settings.operations_per_socket_max} operations"
            payload = [{"message": text, "extensions": {"code": "TOO_MANY_OPERATIONS"}}]
            await self.websocket.send_json({"id": message["id"], "type": "error", "payload": payload})
            return
        await super().handle_subscribe(message)

    async def run_operation(self, operation: Any) -> None:
        task = cast(asyncio.Task[Any], asyncio.current_task())
        self._running.add(task)
        try:
            await self._run_operation(operation)
        finally:
            self._running.discard(task)

    async def _run_operation(self, operation: Any) -> None:
        if self._outlet is None:
            await super().run_operation(operation)
            return
        live = self._live[operation.id] = LiveOperation(self._deliveries, self._outlet, next_prefix(operation.id))
        live_delivery.set(live)
        try:
            await super().run_operation(operation)
        finally:
            live.end()
            if self._live.get(operation.id) is live:
                del self._live[operation.id]

    async def cleanup_operation(self, operation_id: str) -> None:
        live = self._live.pop(operation_id, None)
        if live is not None:
            live.end()
        await super().cleanup_operation(operation_id)

    async def _end_operations(self) -> None:
        """End those that are known by no id any more."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def handle_task_exception(self, error: Exception) -> None:
        # A client that left while something was sent to it is no fault.
        if not isinstance(error, WebSocketDisconnected):
            _log.error("socket_task_failed", request_id=self.context.request_id, exc_info=error)

    async def _send_result_stream(self, operation: Any, result_source: Any) -> None:
        """As Strawberry's, but a stream that fails before its first value ends in `error`, not in a `next`.

        One whose results have ended because they are delivered otherwise goes on.
        """
        first = True
        async for result in result_source:
            if first and isinstance(result, ExecutionResult) and _failed_at_once(result):
                await operation.send_initial_errors(self._public(result.errors or []))
                return
            first = False
            result.errors = self._public(result.errors) if result.errors else None
            await operation.send_next(result)
        live = live_delivery.get()
        if isinstance(live, LiveOperation):
            operation.query, operation.variables = "", None  # 64 KiB of each may have been sent
            await live.ended()

    def _public(self, errors: list[GraphQLError]) -> list[GraphQLError]:
        return [published(error, self.context.request_id) for error in errors]

    def _authorization(self, params: dict[str, Any]) -> str | None:
        """What connection_init says, else the header of the handshake."""
        for name, value in params.items():
            if name.lower() == "authorization":
                if not isinstance(value, str):
                    raise TokenRefusedError("authorization is not a text")
                return value
        request = self.context.request
        return None if request is None else request.headers.get("authorization")

    async def _expire(self, subject: Subject) -> None:
        await expired(subject)
        for operation_id in list(self.operations):
            await self.cleanup_operation(operation_id)
        await self._close(close_codes.FORBIDDEN, "the token has expired")

    async def _close(self, code: CloseCode, reason: str) -> None:
        await self.websocket.close(code=code.code, reason=reason)


def _failed_at_once(result: ExecutionResult) -> bool:
    errors = result.errors or []
    return result.data is None and bool(errors) and all(error.path is None for error in errors)


def shape_problem(message: object) -> str | None:
    """What is wrong with the shape of a message; None when it is one of the protocol's."""
    if not isinstance(message, dict):
        return "a message is an object"
    kind = message.get("type")
    if kind in ("connection_init", "ping", "pong"):
        payload = message.get("payload")
        return None if payload is None or isinstance(payload, dict) else "payload is an object"
    if kind not in ("subscribe", "complete"):
        return "a message has one of the protocol's types"
    operation_id = message.get("id")
    if not isinstance(operation_id, str) or not 0 < len(operation_id) <= OPERATION_ID_LENGTH_MAX:
        return f"id is a text of 1 to {OPERATION_ID_LENGTH_MAX} characters"
    return _operation_problem(message.get("payload")) if kind == "subscribe" else None


def _operation_problem(payload: object) -> str | None:
    if not isinstance(payload, dict):
        return "payload is an object"
    if not isinstance(payload.get("query"), str):
        return "query is a text"
    for name, kind, shape in (
        ("variables", dict, "an object"),
        ("extensions", dict, "an object"),
        ("operationName", str, "a text"),
    ):
        value = payload.get(name)
        if value is not None and not isinstance(value, kind):
            return f"{name} is {shape}"
    return None
