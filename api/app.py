"""The API process: builds everything once, here, and serves it.

It starts whether or not its dependencies are there, answers UNAVAILABLE for what needs one that is away, and uses
each as soon as it is back, without a restart. `/readyz` says what is missing meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import asyncpg
import structlog
import uvicorn
from fastapi import FastAPI
from redis.exceptions import RedisError
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from api.auth import Authenticator
from api.delivery import Deliveries
from api.exports import Exports
from api.graphiql import STATIC_DIRECTORY, STATIC_PATH, make_page
from api.graphql import Gateway
from api.health import make_health_router
from api.hub import Hub
from api.interest import InterestTeller
from api.live_feed import LiveFeed
from api.metrics import Metrics
from api.middleware import BodyLimit, RequestIds
from api.projection import compile_projection
from api.socket_protocol import HttpProtocol, SocketProtocol
from engine.assets import AssetClass
from engine.markets import Markets
from engine.runtime.addresses import HostNames
from engine.runtime.clock import Clock, WallClock
from engine.runtime.connections import RedisClient, connect_postgres, connect_redis, make_producer, wait_until
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.as_of_reads import AsOfReads
from engine.stores.badge_reads import BadgeReads
from engine.stores.daily_figures import DailyFigureReads
from engine.stores.events_kafka import EventProducer
from engine.stores.hot_state_reads import HotStateReads
from engine.stores.ledger_reads import LedgerReads
from engine.stores.price_closes import PriceCloses
from engine.stores.reconciliation_reads import ReconciliationReads
from engine.stores.snapshots_reads import SnapshotsReads
from engine.stores.thresholds_postgres import PortfolioThresholds
from engine.stores.webhooks_postgres import Webhooks
from resolvers.as_of import PastReads
from resolvers.context import Services
from resolvers.errors import AWAY
from resolvers.loaders import CATALOGUE_REFRESH_INTERVAL_S, AssetCatalogue, PortfolioDirectory

WS_QUEUE_COUNT_MAX = 32
WS_PING_INTERVAL_S = 10  # finds a client that vanished without a word
GRACEFUL_SHUTDOWN_TIMEOUT_S = 10
# A client that stops reading holds at most this much in the kernel, and is dropped when nothing of it moves for 5 s.
SEND_BUFFER_BYTES = 64 * 1024
TCP_USER_TIMEOUT_MS = 5_000
TASK_RESTART_DELAY_S = 1
CLOSE_TIMEOUT_S = 5
# Looking for cycles after every 700 new objects, as Python does by itself, takes a part of each query's time.
COLLECT_AFTER_COUNT = 20_000

_log = structlog.get_logger(__name__)


class NoEvaluatorError(ConnectionError):
    """Marks are not kept: nobody holds the lease of some shard, or there is no shard yet."""


class Database:
    """The PostgreSQL pool, once there is one."""

    def __init__(self) -> None:
        self._pool: asyncpg.Pool | None = None

    def pool(self) -> asyncpg.Pool:
        """Raises ConnectionError as long as PostgreSQL was not reached."""
        if self._pool is None:
            raise ConnectionError("PostgreSQL was not reached yet")
        return self._pool

    async def connect(self, settings: Settings) -> None:
        self._pool = await connect_postgres(settings, "api", stateless=True)

    async def check(self) -> None:
        await self.pool().fetchval("SELECT 1")

    async def check_evaluators(self) -> None:
        """Raises NoEvaluatorError unless there are shards and every one's lease holds."""
        # A shard that was given back has no lease, which `bool_and` alone would leave out of account.
        owned = await self.pool().fetchval("SELECT bool_and(coalesce(lease_until > now(), false)) FROM shard")
        if not owned:
            raise NoEvaluatorError("a shard has no living evaluator")

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()


@dataclass(frozen=True, slots=True)
class Application:
    """What the process has one of; `app.state.application` for whoever needs to look inside."""

    settings: Settings
    metrics: Metrics
    redis: RedisClient
    database: Database
    services: Services
    hub: Hub
    feed: LiveFeed
    interest: InterestTeller
    gateway: Gateway
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Everything in the background, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_keep_running("feed", self.feed.run))
            tasks.create_task(_keep_running("interest", self.interest.run))
            tasks.create_task(_keep_running("postgres", self._connect_postgres))
            tasks.create_task(_keep_running("kafka", self._connect_kafka))

    async def check_redis(self) -> None:
        """Raises when the node that has the prices does not answer; in a cluster others may be away."""
        await self.redis.exists(redis_keys.PRICES)

    async def close(self) -> None:
        self.stop.set()
        for closing in (self.services.events.stop, self.redis.aclose, self.database.close):
            with suppress(RedisError, *AWAY):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await closing()

    async def _connect_postgres(self) -> None:
        await wait_until("postgres", lambda: self.database.connect(self.settings), self.stop)
        with suppress(*AWAY):
            await self.services.portfolios.fill()
        while True:
            with suppress(*AWAY):
                await self.services.assets.refresh()
            await asyncio.sleep(CATALOGUE_REFRESH_INTERVAL_S)

    async def _connect_kafka(self) -> None:
        events = self.services.events
        await wait_until("kafka", lambda: events.start(make_producer(self.settings, "api")), self.stop)
        await self.stop.wait()


def make_application(settings: Settings, clock: Clock) -> Application:
    """Build everything without reaching for anything. Raises ValueError when the settings can not be served."""
    metrics, hub, database = Metrics(), Hub(), Database()
    redis = connect_redis(settings, "api")
    hot_state = HotStateReads(redis, settings.redis_timeout_s)
    ledger = LedgerReads(database.pool)
    markets = Markets(settings.calendars)
    assets = AssetCatalogue(database.pool, hot_state, markets)
    services = Services(
        settings=settings,
        clock=clock,
        hot_state=hot_state,
        ledger=ledger,
        snapshots=SnapshotsReads(database.pool),
        assets=assets,
        portfolios=PortfolioDirectory(ledger),
        events=EventProducer(settings.topic, settings.acknowledge_timeout_s),
        hub=hub,
        reconciliations=ReconciliationReads(database.pool),
        badges=BadgeReads(database.pool),
        daily_figures=DailyFigureReads(database.pool, markets.sessions(AssetClass.EQUITY)),
        webhooks=Webhooks(database.pool),
        host_names=HostNames(settings.webhook_private_addresses, settings.webhook_lookups_count_max),
        thresholds=PortfolioThresholds(database.pool),
        past=PastReads(
            AsOfReads(database.pool),
            PriceCloses(database.pool),
            hot_state,
            assets,
            clock,
            settings.stale_after_s,
        ),
    )
    feed = LiveFeed(
        lambda: connect_redis(settings, "api-feed"),
        hot_state,
        hub,
        metrics,
        settings.feed_silence_max_ms,
        in_wall_time=isinstance(clock, WallClock),
    )
    deliveries = Deliveries(hub, metrics, compile_projection, settings.heartbeat_interval_s, settings.send_timeout_s)
    gateway = Gateway(settings, services, Authenticator(settings), metrics, make_page(), deliveries)
    metrics.watches.set_function(lambda: hub.watches_count)
    interest = InterestTeller(redis, hub, settings)
    return Application(settings, metrics, redis, database, services, hub, feed, interest, gateway)


def create_app(settings: Settings, clock: Clock) -> FastAPI:
    """The ASGI application. Raises ValueError when the settings can not be served (a weak secret, a bad URL)."""
    application = make_application(settings, clock)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(application.run())
        try:
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await application.close()

    app = FastAPI(title="navstream", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.application = application
    app.include_router(application.gateway)
    gateway, database = application.gateway, application.database
    exports = Exports(settings, application.services, gateway.authenticator, database.pool, application.metrics)
    app.include_router(exports.make_router())
    checks = {
        "redis": application.check_redis,
        "postgres": application.database.check,
        "evaluators": application.database.check_evaluators,
        "kafka": application.services.events.reach,
    }
    app.include_router(make_health_router(checks, application.metrics))
    app.mount(STATIC_PATH, StaticFiles(directory=STATIC_DIRECTORY))
    app.add_middleware(BodyLimit, bytes_max=settings.body_bytes_max)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestIds)
    return app


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=HttpProtocol,
        ws=SocketProtocol,
        ws_max_size=settings.ws_message_bytes_max,
        ws_max_queue=WS_QUEUE_COUNT_MAX,
        ws_ping_interval=WS_PING_INTERVAL_S,
        ws_ping_timeout=WS_PING_INTERVAL_S,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_TIMEOUT_S,
        access_log=False,
        server_header=False,
        log_config=None,
    )


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket whose connections do not outlive a client that stopped reading. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if sys.platform == "linux":
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        listener.bind((host, port))
        listener.set_inheritable(True)
    except OSError:
        listener.close()
        raise
    return listener


def serve(settings: Settings, clock: Clock) -> None:
    """Serve until SIGINT or SIGTERM. Raises ValueError for bad settings, OSError when the port is taken."""
    app = create_app(settings, clock)
    # The schema and all modules stay for good: to look through them for cycles would hold every message up for a fifth
    # of a second.
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_COUNT)
    with listening_socket(settings.host, settings.port) as listener:
        uvicorn.Server(server_config(app, settings)).run(sockets=[listener])


async def _keep_running(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` for good: what ends it is a defect, reported, and must not end the process's service."""
    while True:
        try:
            await work()
        except Exception as error:
            _log.error("background_task_failed", task=name, exc_info=error)
        await asyncio.sleep(TASK_RESTART_DELAY_S)
