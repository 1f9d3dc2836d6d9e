"""The ledger of a portfolio as a file: `GET /portfolios/<portfolioId>/ledger.csv` and `…/ledger.parquet`.

Whoever may read the ledger over GraphQL may: the same bearer token in `Authorization`, scope ledger:read, the owner or
admin. Query parameters are the fields of GraphQL's LedgerFilter, `kind` as often as kinds are wanted:

    ?kind=FILL&kind=FEE&symbol=AAPL&side=BUY&from=2026-01-01T00:00:00Z&to=…&recordedFrom=…&recordedTo=…
    &minAmount=100&maxAmount=1000&reversals=false

One that is not known is refused, because a misspelt one would give everything.

    200   the file, chunked; it is the ledger of one instant (engine.stores.ledger_export)
    400   BAD_FILTER       401   UNAUTHENTICATED       403   FORBIDDEN
    404   NOT_FOUND, also when the portfolio is somebody else's          405   METHOD_NOT_ALLOWED
    503   UNAVAILABLE: PostgreSQL is away; TOO_MANY_EXPORTS: so many run already as the setting `exports_count_max` says

Errors are JSON like GraphQL's. What goes wrong behind the first byte cuts the connection without the last chunk, so
that no client takes a part for the whole. A client that goes away, or takes nothing for STALL_TIMEOUT_S, ends its
export at once and frees its connection to PostgreSQL.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal

import asyncpg
import orjson
import structlog
from fastapi import APIRouter
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from api.auth import Authenticator, TokenRefusedError
from api.connection import Connection, new_request_id
from api.metrics import Metrics
from engine.ledger import LedgerKind, Side
from engine.runtime.settings import Settings
from engine.stores.ledger_export import ExportFormat, ExportPlan, export_ledger
from engine.stores.ledger_reads import PoolSource
from engine.stores.ledger_selection import LedgerSelection, SelectionError, check_selection
from resolvers.context import SCOPE_LEDGER_READ, Services
from resolvers.errors import AWAY, ErrorCode, PublicError
from resolvers.scalars import read_decimal, read_instant

STALL_TIMEOUT_S = 30
RETRY_AFTER_S = 10
KINDS_COUNT_MAX = 32
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
_MEDIA = {
    ExportFormat.CSV: "text/csv; charset=utf-8; header=present",
    ExportFormat.PARQUET: "application/vnd.apache.parquet",
}
_STATUS = {
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.TOO_MANY_EXPORTS: 503,
}
_HEADERS = {401: {"www-authenticate": "Bearer"}, 405: {"allow": "GET"}, 503: {"retry-after": str(RETRY_AFTER_S)}}

_log = structlog.get_logger(__name__)


class Exports:
    """The route, and how many exports run."""

    def __init__(
        self, settings: Settings, services: Services, authenticator: Authenticator, pool: PoolSource, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.metrics = metrics
        self.running = 0
        self._services = services
        self._authenticator = authenticator

    def make_router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)
        for file_format in ExportFormat:
            path = f"/portfolios/{{portfolio_id:path}}/ledger.{file_format.value}"
            router.add_api_route(path, self._endpoint(file_format), methods=_METHODS, response_model=None)
        return router

    def _endpoint(self, file_format: ExportFormat) -> Callable[[Request], object]:
        async def export(request: Request) -> Response:
            try:
                return _Download(self, await self._plan(request, file_format))
            except PublicError as error:
                return self.refusal(error)

        return export

    def refusal(self, error: PublicError) -> Response:
        self.metrics.errors.labels(error.code).inc()
        status = _STATUS.get(ErrorCode(error.code), 400)
        body = {"errors": [{"message": str(error), "extensions": error.extensions}]}
        return Response(orjson.dumps(body), status, _HEADERS.get(status), "application/json")

    async def _plan(self, request: Request, file_format: ExportFormat) -> ExportPlan:
        """Raises PublicError."""
        if request.method != "GET":
            raise PublicError(ErrorCode.METHOD_NOT_ALLOWED, "a ledger is fetched by GET")
        caller = Connection(self._services, request.scope.get("request_id") or new_request_id())
        try:
            caller.subject = await self._authenticator.authenticate(request.headers.get("authorization"))
        except TokenRefusedError as error:
            raise PublicError(ErrorCode.UNAUTHENTICATED, str(error)) from None
        try:
            portfolio = await caller.operation().portfolio(request.path_params["portfolio_id"], SCOPE_LEDGER_READ)
        except AWAY as error:
            raise _unavailable() from error
        return ExportPlan(portfolio.portfolio_id, read_selection(request.query_params), file_format)


class _Download(Response):
    """Writes the file as it is made, and stops when nobody takes it."""

    def __init__(self, exports: Exports, plan: ExportPlan) -> None:
        super().__init__()
        self._exports = exports
        self._plan = plan
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exports = self._exports
        if exports.running >= exports.settings.exports_count_max:
            refusal = PublicError(ErrorCode.TOO_MANY_EXPORTS, "as many exports as may run are running; try again")
            await exports.refusal(refusal)(scope, receive, send)
            return
        exports.running += 1
        writing = asyncio.create_task(self._write_all(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            outcome = await self._outcome(writing)
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            exports.running -= 1
        exports.metrics.exports.labels(self._plan.file_format.value, outcome).inc()
        if outcome == "done":
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        elif outcome == "unavailable" and not self._started:
            await exports.refusal(_unavailable())(scope, receive, send)

    async def _outcome(self, writing: asyncio.Task[int]) -> str:
        """How it ended: done, abandoned, stalled or unavailable. Raises what is a defect."""
        if not writing.done():
            return "abandoned"
        try:
            await writing
        except _StalledError:
            return "stalled"
        except AWAY as error:
            _log.warning("export_failed", portfolio=self._plan.portfolio_id, reason=type(error).__name__)
            return "unavailable"
        return "done"

    async def _write_all(self, send: Send) -> int:
        async def write(data: bytes) -> None:
            try:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    if not self._started:
                        self._started = True
                        await send(self._head())
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except TimeoutError:
                raise _StalledError from None

        pool: asyncpg.Pool = self._exports.pool()
        async with pool.acquire(timeout=self._exports.settings.postgres_timeout_s) as connection:
            return await export_ledger(connection, self._plan, write)

    def _head(self) -> Message:
        # An id may hold what no file's name does.
        name = re.sub(r"[^A-Za-z0-9._-]", "_", self._plan.portfolio_id)
        file_format = self._plan.file_format
        headers = {
            "content-type": _MEDIA[file_format],
            "content-disposition": f'attachment; filename="ledger-{name}.{file_format.value}"',
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
        }
        encoded = [(key.encode(), value.encode()) for key, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": encoded}


class _StalledError(Exception):
    """The client has taken nothing for STALL_TIMEOUT_S."""


async def _gone(receive: Receive) -> None:
    """Until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _unavailable() -> PublicError:
    return PublicError(ErrorCode.UNAVAILABLE, "the ledger can not be read at present; try again")


def read_selection(parameters: QueryParams) -> LedgerSelection:
    """Raises PublicError BAD_FILTER."""
    kinds = parameters.getlist("kind")
    try:
        once = {name: value for name, value in parameters.multi_items() if name != "kind"}
        if len(once) + len(kinds) < len(parameters.multi_items()):
            raise ValueError("only kind is given more than once")
        if len(kinds) > KINDS_COUNT_MAX:
            raise ValueError("more kinds than there are")
        chosen = {_PARAMETERS[name][0]: _PARAMETERS[name][1](value) for name, value in once.items()}
        selection = LedgerSelection(kinds=[LedgerKind(kind) for kind in kinds] or None, **chosen)  # type: ignore[arg-type]
        check_selection(selection)
    except KeyError as error:
        raise PublicError(ErrorCode.BAD_FILTER, f"there is no parameter {str(error)[:80]}") from None
    except (SelectionError, ValueError) as error:
        raise PublicError(ErrorCode.BAD_FILTER, str(error)[:200]) from None
    return selection


def _yes_or_no(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("reversals is true or false")
    return text == "true"


_Read = Callable[[str], str | Side | datetime | Decimal | bool]
_PARAMETERS: dict[str, tuple[str, _Read]] = {
    "symbol": ("symbol", str),
    "side": ("side", Side),
    "from": ("effective_from", read_instant),
    "to": ("effective_to", read_instant),
    "recordedFrom": ("recorded_from", read_instant),
    "recordedTo": ("recorded_to", read_instant),
    "minAmount": ("amount_min", read_decimal),
    "maxAmount": ("amount_max", read_decimal),
    "reversals": ("reversals", _yes_or_no),
}
