"""Whether the process lives, whether it can serve, and what it counts.

    /healthz   200 as long as the event loop turns: a restart would not help against a dependency that is away
    /readyz    200 when Redis, PostgreSQL and Kafka answer and every shard has a living evaluator; otherwise 503,
               naming each that is missing, and why; at most CHECK_TIMEOUT_S later
    /metrics   Prometheus text

None of them needs a token: they say nothing about portfolios.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from api.metrics import Metrics

CHECK_TIMEOUT_S = 2

Check = Callable[[], Awaitable[object]]


def make_health_router(checks: Mapping[str, Check], metrics: Metrics) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        reasons = await asyncio.gather(*(_reason(check) for check in checks.values()))
        missing = {name: reason for name, reason in zip(checks, reasons, strict=True) if reason is not None}
        if missing:
            return JSONResponse({"status": "not ready", "missing": missing}, status_code=503)
        return JSONResponse({"status": "ready"})

    @router.get("/metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


async def _reason(check: Check) -> str | None:
    """Why a dependency can not be used; None when it answers. The text names no address and no secret."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await check()
    except TimeoutError:
        return "no answer in time"
    except Exception as error:
        return type(error).__name__
    return None
