"""GraphQL over HTTP and WebSocket at one path.

HTTP follows the GraphQL-over-HTTP draft: POST with a JSON body, GET for queries only, and a request that is not
GraphQL at all is 400 with a code in a GraphQL error, never a 500. An operation that can not be run (parse,
validation, variables) is 400 without `data` for a client that accepts `application/graphql-response+json`, and 200
for one that only knows `application/json`. A missing or refused token is 401 either way.

A client that prefers `text/event-stream` is answered in events (api/sse.py), which is how subscriptions are had over
HTTP. WebSocket speaks graphql-transport-ws and nothing older. A browser's page may only come from this origin or from
the allow-list, for HTTP as for WebSocket.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, cast

import orjson
from cross_web import HTTPException
from fastapi import Request, Response, WebSocket
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse
from strawberry.fastapi import GraphQLRouter
from strawberry.http import GraphQLHTTPResponse
from strawberry.http.websocket_origin import is_same_origin, normalize_origin
from strawberry.subscriptions import GRAPHQL_SSE_PROTOCOL, GRAPHQL_TRANSPORT_WS_PROTOCOL
from strawberry.types import ExecutionResult

from api.accept import media_ranges
from api.auth import Authenticator, TokenRefusedError
from api.connection import Connection, new_request_id
from api.delivery import Deliveries
from api.graphiql import GraphiqlPage
from api.metrics import Metrics
from api.operations import make_extension, published
from api.socket_registry import SocketRegistry
from api.sockets import SocketAdapter, SocketHandler
from api.sse import EventStream, EventTransport, prefers_events
from engine.runtime.settings import Settings
from resolvers.context import Services
from resolvers.schema import make_schema

GRAPHQL_PATH = "/graphql"
JSON_DEPTH_MAX = 64  # variables of real operations nest a few levels
_JSON = "application/json"
_GRAPHQL_JSON = "application/graphql-response+json"
_STATUS_CODES = {
    400: "BAD_REQUEST",
    403: "ORIGIN_NOT_ALLOWED",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    415: "UNSUPPORTED_MEDIA_TYPE",
}


class Answer(Response):
    """Carries what was negotiated from the request to where Strawberry makes the response."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.media = _GRAPHQL_JSON if accepts_graphql_json(request.headers.get("accept", "")) else _JSON
        self.request_error = False
        self.unauthenticated = False


class Gateway(GraphQLRouter[Connection, None]):
    websocket_adapter_class = SocketAdapter  # type: ignore[assignment]
    graphql_transport_ws_handler_class = SocketHandler
    stream_transport_classes_by_protocol = MappingProxyType({GRAPHQL_SSE_PROTOCOL: EventTransport})

    def __init__(
        self,
        settings: Settings,
        services: Services,
        authenticator: Authenticator,
        metrics: Metrics,
        page: GraphiqlPage,
        deliveries: Deliveries,
    ) -> None:
        self.settings = settings
        self.authenticator = authenticator
        self.metrics = metrics
        self.deliveries = deliveries
        self.sockets = SocketRegistry(settings.sockets_per_subject_max, metrics)
        self._page = page

        async def connect(connection: HTTPConnection) -> Connection:
            return Connection(services, connection.scope.get("request_id") or new_request_id())

        super().__init__(
            make_schema([make_extension(settings, metrics)]),
            path=GRAPHQL_PATH,
            context_getter=connect,
            subscription_protocols=(GRAPHQL_TRANSPORT_WS_PROTOCOL, GRAPHQL_SSE_PROTOCOL),
            connection_init_wait_timeout=timedelta(seconds=settings.connection_init_timeout_s),
            max_subscriptions_per_connection=settings.operations_per_socket_max,
            allowed_origins=settings.allowed_origins,
            multipart_uploads_enabled=False,
            include_in_schema=False,
        )

    async def run(self, request: Any, context: Any = None, root_value: Any = None) -> Any:
        if isinstance(request, WebSocket):
            return await super().run(request, context=context, root_value=root_value)
        try:
            self._check_origin(request)
            if not self.should_render_graphql_ide(request):
                context.subject = await self.authenticator.authenticate(request.headers.get("authorization"))
                request.state.subject = context.subject
            context.in_events = prefers_events(request.headers.get("accept", ""))
            return await super().run(request, context=context, root_value=root_value)
        except TokenRefusedError as error:
            return self._refuse(request, 401, "UNAUTHENTICATED", str(error))
        except HTTPException as error:
            status = _status(error)
            return self._refuse(request, status, _STATUS_CODES.get(status, "BAD_REQUEST"), error.reason or "")

    def decode_json(self, data: str | bytes) -> object:
        """Raises json.JSONDecodeError for what is not JSON, is nested too deeply, or is not UTF-8."""
        value = orjson.loads(data)
        if _depth_exceeds(value, JSON_DEPTH_MAX):
            raise json.JSONDecodeError(f"nested more than {JSON_DEPTH_MAX} levels", "", 0)
        return cast(object, value)

    def encode_json(self, data: object) -> str:
        # Text, because Strawberry would send bytes as a binary frame. Non-text keys do not occur.
        return orjson.dumps(data).decode()

    async def parse_http_body(self, request: Any) -> Any:
        if request.method == "POST":
            media = (request.content_type or "").partition(";")[0].strip().lower()
            if media != _JSON:
                raise HTTPException(415, f"the body is sent as {_JSON}")
            body = self.parse_json(await request.get_body())
            if not isinstance(body, dict):
                raise HTTPException(400, "a request is a JSON object; batches are not taken")
            _check_request(body)
        else:
            _check_request(self.parse_query_params(request.query_params))
        return await super().parse_http_body(request)

    async def get_sub_response(self, request: Request) -> Response:
        return Answer(request)

    async def process_result(self, request: Request, result: ExecutionResult) -> GraphQLHTTPResponse:
        errors = [published(error, request.scope.get("request_id", "")) for error in result.errors or ()]
        response: dict[str, Any] = {}
        if errors:
            response["errors"] = [error.formatted for error in errors]
        if result.data is not None or not errors or any(error.path for error in errors):
            response["data"] = result.data
        return cast(GraphQLHTTPResponse, response)

    def create_response(self, response_data: Any, sub_response: Response) -> Response:
        answer = cast(Answer, sub_response)
        request_error = "data" not in response_data
        codes = {error.get("extensions", {}).get("code") for error in response_data.get("errors", ())}
        status = 200
        if request_error and "UNAUTHENTICATED" in codes:
            status = 401
        elif request_error and answer.media == _GRAPHQL_JSON:
            status = 400
        return Response(orjson.dumps(response_data), status, media_type=answer.media)

    # Strawberry's own name; its public counterpart is handed a generator that wakes two tasks for each message.
    async def _create_streaming_response(
        self, request: Request, result: Any, protocol: Any, sub_response: Response
    ) -> Response:
        async def encode(one: ExecutionResult) -> Mapping[str, Any]:
            return cast(Mapping[str, Any], await self.process_result(request, one))

        subject = request.state.subject
        return EventStream(result, encode, subject, self.settings, self.deliveries, self.sockets, self.metrics)

    async def render_graphql_ide(self, request: Request) -> HTMLResponse:
        return HTMLResponse(self._page.html, headers=dict(self._page.headers))

    def should_render_graphql_ide(self, request: Any) -> bool:
        """A browser opening GraphiQL; not whoever takes just anything, which is how programs ask."""
        accept = request.headers.get("accept", "")
        return request.method == "GET" and "query" not in request.query_params and "text/html" in accept

    def _check_origin(self, request: Request) -> None:
        origin = request.headers.get("origin")
        if origin is None or is_same_origin(origin, request.headers.get("host")):
            return
        if "*" not in self.allowed_origins and normalize_origin(origin) not in self.allowed_origins:
            raise HTTPException(403, "this origin is not on the allow-list")

    def _refuse(self, request: Request, status: int, code: str, message: str) -> Response:
        self.metrics.errors.labels(code).inc()
        answer = Answer(request)
        body = {"errors": [{"message": message, "extensions": {"code": code}}]}
        headers: Mapping[str, str] = {"allow": "GET, POST"} if status == 405 else {}
        return Response(orjson.dumps(body), status, headers=dict(headers), media_type=answer.media)


def accepts_graphql_json(accept: str) -> bool:
    """Whether the client takes application/graphql-response+json at least as gladly as application/json."""
    qualities = {_GRAPHQL_JSON: 0.0, _JSON: 0.0}
    for media, quality in media_ranges(accept):
        if media in qualities:
            qualities[media] = max(qualities[media], quality)
    return 0 < qualities[_GRAPHQL_JSON] >= qualities[_JSON]


def _check_request(body: Mapping[str, Any]) -> None:
    """Raises HTTPException 400 when a part of the request has the wrong type."""
    for name, kinds, shape in (
        ("query", (str,), "a text"),
        ("operationName", (str, type(None)), "a text"),
        ("variables", (dict, type(None)), "an object"),
        ("extensions", (dict, type(None)), "an object"),
    ):
        value = body.get(name)
        # An empty `variables=` in a URL means none.
        if not isinstance(value, kinds) and not (name != "query" and value == ""):
            raise HTTPException(400, f"{name} is {shape}")


def _status(error: HTTPException) -> int:
    # A mutation over GET: Strawberry says 400, HTTP has a word for it.
    if error.status_code == 400 and "are not allowed when using GET" in (error.reason or ""):
        return 405
    return error.status_code


def _depth_exceeds(value: object, depth_max: int) -> bool:
    level = [value]
    for _ in range(depth_max):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
