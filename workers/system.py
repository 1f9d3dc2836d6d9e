"""The whole system on one machine: servers, schema, catalogue, then every role as a supervised child process.

    1. start what the settings do not name (embedded), all at once
    2. migrate the database, load the shipped catalogue, announce a recording's splits and dividends
    3. start evaluators, API, snapshots, reconciler, badges, webhooks, and with a feed the quotes worker
    4. wait until the API is ready and every shard is owned, then write the ready file
    5. supervise until SIGINT or SIGTERM; then stop workers first, servers last

Children run this same program (`python -m navstream ROLE`) and get their settings by environment.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog
from pydantic import SecretStr

from engine.badges import load_rules
from engine.instants import SECOND_NS, to_datetime
from engine.runtime.clock import make_clock
from engine.runtime.connections import AWAY, connect_postgres
from engine.runtime.embedded import EmbeddedError, start_embedded
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import ReadyFile, Settings, read_ready_file
from engine.runtime.supervisor import ServerEnded, Supervisor
from engine.runtime.telemetry import start_telemetry
from engine.stores.badges_postgres import sync_rules
from engine.stores.migrate import upgrade
from workers.catalogue import load_assets
from workers.feeds.replay import bar_actions, parse_replay, plan_replay
from workers.producing import produce_actions

READY_TIMEOUT_S = 120
READY_POLL_INTERVAL_S = 0.1
# A recorded market opens this long after the plan is made, so that portfolios exist when it moves; on a slow machine
# so many times as long as servers and schema took to get there.
MARKET_OPENS_IN_S = 20
MARKET_OPENS_FACTOR = 3
JWT_SECRET_BYTES = 32
_UNABLE_TO_START: tuple[type[Exception], ...] = (EmbeddedError, ValueError, *AWAY)
# What two machines' clocks may differ by without anybody calling it another time.
CLOCK_SKEW_MAX = timedelta(minutes=1)

# The newest of what all portfolios' ledgers and day baselines say, each found at the end of its index.
_REACHED = """
SELECT max(greatest(
    (SELECT recorded_at FROM ledger_entry WHERE portfolio_id = portfolio.id ORDER BY sequence DESC LIMIT 1),
    (SELECT cut_at FROM day_baseline WHERE portfolio_id = portfolio.id ORDER BY cut_at DESC LIMIT 1)
)) FROM portfolio
"""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SystemOptions:
    """What to start. `demo_portfolios` > 0 adds the demo's traders, seeded with `seed`."""

    data_dir: Path | None
    evaluators: int
    feed: str
    ready_file: Path | None
    demo_portfolios: int = 0
    seed: int = 7


def run_system(
    settings: Settings,
    options: SystemOptions,
    fail: Callable[[str], NoReturn],
    on_ready: Callable[[ReadyFile, Settings], None],
) -> None:
    """Run the system until a signal. `fail` ends the program with one line; `on_ready` is told the addresses."""
    start_telemetry(settings, "system")
    if options.ready_file is not None:
        # What an earlier system left behind when it was killed is not this one's.
        options.ready_file.unlink(missing_ok=True)
    if not _is_free(settings.host, settings.port):
        fail(f"port {settings.port} on {settings.host} is taken: choose another one with --port")
    began_s = time.monotonic()
    with ChildProcesses() as children, ThreadPoolExecutor(1) as beside:
        try:
            settings, making_sessions = _make_sessions(settings, children, beside)
            settings, server_pids = _start_servers(settings, options, children)
            asyncio.run(prepare_database(settings, _assets_beside(recording_of(options.feed))))
            making_sessions.result()
            settings = _plan_clock(settings, options, time.monotonic() - began_s)
            asyncio.run(_announce(settings, options))
        except _UNABLE_TO_START as error:
            fail(str(error))
        supervisor = Supervisor(children)
        metrics_ports = _start_roles(supervisor, settings, options)
        _wait_until_ready(settings, options, supervisor, fail)
        ready = _ready_file(settings, {**server_pids, **supervisor.pids, "system": os.getpid()}, metrics_ports)
        if options.ready_file is not None:
            _write_ready_file(options.ready_file, ready)
        on_ready(ready, settings)
        try:
            supervisor.run_until_signal()
        except ServerEnded as error:
            fail(str(error))
        finally:
            if options.ready_file is not None:
                _remove_ready_file(options.ready_file, ready)


def _make_sessions(
    settings: Settings, children: ChildProcesses, beside: Executor
) -> tuple[Settings, Future[tuple[int, str]]]:
    """Begin to make the calendars' sessions once for all roles, beside the start of the servers."""
    file = children.temporary_directory("navstream-sessions-") / "sessions.json"
    exchanges = sorted({name for name in settings.calendars.values() if name})
    argv = [sys.executable, "-m", "engine.runtime.session_files", str(file), *exchanges]
    making = beside.submit(children.run, "sessions", argv, timeout_s=READY_TIMEOUT_S)
    return settings.model_copy(update={"sessions_file": str(file)}), making


def _start_servers(
    settings: Settings, options: SystemOptions, children: ChildProcesses
) -> tuple[Settings, dict[str, int]]:
    servers = start_embedded(
        children,
        options.data_dir,
        redis=not settings.redis_url,
        postgres=not settings.postgres_url,
        kafka=not settings.kafka_bootstrap,
    )
    secret = settings.jwt_secret.get_secret_value() or secrets.token_hex(JWT_SECRET_BYTES)
    update = {
        "redis_url": settings.redis_url or servers.redis_url,
        "postgres_url": settings.postgres_url or servers.postgres_url,
        "kafka_bootstrap": settings.kafka_bootstrap or servers.kafka_bootstrap,
        "jwt_secret": SecretStr(secret),
    }
    return settings.model_copy(update=update), servers.pids


def _plan_clock(settings: Settings, options: SystemOptions, started_in_s: float) -> Settings:
    """A replay makes the recorded market's time the program's. Raises OSError, ValueError."""
    kind, _, rest = options.feed.partition(":")
    if kind != "replay":
        return settings
    path, speed_milli = parse_replay(rest)
    opens_in_s = max(MARKET_OPENS_IN_S, int(MARKET_OPENS_FACTOR * started_in_s))
    plan = plan_replay(path, speed_milli, time.time_ns() + opens_in_s * SECOND_NS)
    return settings.model_copy(update={"market_clock": plan.plan_json})


def _assets_beside(recording: Path) -> str:
    """The asset file that lies beside a recording; empty without one."""
    file = recording.with_name("assets.csv") if recording.name else None
    return file.read_text() if file is not None and file.exists() else ""


async def prepare_database(settings: Settings, assets: str = "") -> None:
    """Bring the database to the newest schema, with all badge rules, these assets and those of the shipped catalogue.

    Raises ValueError, AWAY errors.
    """
    await upgrade(settings.postgres_url)
    if assets:
        await load_assets(settings, assets)
    await load_assets(settings)
    await _sync_badge_rules(settings)


async def _sync_badge_rules(settings: Settings) -> None:
    """Make the shipped rules known. Raises BadRuleError, a ValueError, when one has changed under its version."""
    pool = await connect_postgres(settings, "system")
    try:
        async with pool.acquire() as connection:
            await sync_rules(connection, load_rules())
    finally:
        await pool.close()


async def _announce(settings: Settings, options: SystemOptions) -> None:
    """Check that the clock fits the ledger, and make a recording's splits and dividends known before it begins."""
    await check_time(settings)
    recording = recording_of(options.feed)
    if recording.name:
        await produce_actions(settings, bar_actions(recording))


async def check_time(settings: Settings) -> None:
    """A ledger does not go back in time. Raises ValueError when it has been written later than the clock says."""
    pool = await connect_postgres(settings, "system")
    try:
        reached = await pool.fetchval(_REACHED)
    finally:
        await pool.close()
    now = to_datetime(make_clock(settings.market_clock).now_ns())
    if reached is not None and reached > now + CLOCK_SKEW_MAX:
        raise ValueError(
            f"this ledger has reached {reached:%Y-%m-%d %H:%M}, the clock says {now:%Y-%m-%d %H:%M}: use a new one"
        )


def recording_of(feed: str) -> Path:
    """The file a replay feed names; an empty path for other feeds."""
    kind, _, rest = feed.partition(":")
    return parse_replay(rest)[0] if kind == "replay" else Path()


def _start_roles(supervisor: Supervisor, settings: Settings, options: SystemOptions) -> dict[str, int]:
    """Start every role; returns the port of each one's metrics."""
    metrics_ports: dict[str, int] = {}
    environment = os.environ | settings.environment()

    def start(role: str, *arguments: str) -> None:
        port = str(metrics_ports.setdefault(role, free_port()))
        own = environment | {"NAVSTREAM_METRICS_PORT": port}
        supervisor.add(role, [sys.executable, "-m", "navstream", *arguments], own)

    for number in range(options.evaluators):
        start(f"evaluator-{number}", "evaluator")
    start("api", "api")
    start("snapshots", "snapshots")
    start("reconciler", "reconciler")
    start("badges", "badges")
    start("webhooks", "webhooks")
    if options.feed:
        start("quotes", "quotes", "--feed", options.feed, "--seed", str(options.seed))
    if options.demo_portfolios:
        recording = recording_of(options.feed)
        extra = ("--recording", str(recording)) if recording.name else ()
        start("traders", "traders", str(options.demo_portfolios), str(options.seed), *extra)
    return metrics_ports | {"api": settings.port}


def _wait_until_ready(
    settings: Settings, options: SystemOptions, supervisor: Supervisor, fail: Callable[[str], NoReturn]
) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    url = f"http://{settings.host}:{settings.port}/readyz"
    while not (_answers(url) and asyncio.run(_is_complete(settings, options))):
        if time.monotonic() > deadline_s:
            fail(f"not ready within {READY_TIMEOUT_S} s: see the log above and {url}")
        time.sleep(READY_POLL_INTERVAL_S)
        supervisor.tick(time.monotonic())


def _ready_file(settings: Settings, pids: dict[str, int], metrics_ports: dict[str, int]) -> ReadyFile:
    address = f"{settings.host}:{settings.port}"
    return ReadyFile(
        graphql_url=f"http://{address}/graphql",
        ws_url=f"ws://{address}/graphql",
        redis_url=settings.redis_url,
        postgres_url=settings.postgres_url,
        kafka_bootstrap=settings.kafka_bootstrap,
        topic=settings.topic,
        actions_topic=settings.actions_topic,
        jwt_secret=settings.jwt_secret.get_secret_value(),
        market_clock=settings.market_clock,
        pids=pids,
        metrics_urls={role: f"http://{settings.host}:{port}/metrics" for role, port in metrics_ports.items()},
    )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own loopback address
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


async def _is_complete(settings: Settings, options: SystemOptions) -> bool:
    """Every shard has an owner, and the demo's portfolios are there to be looked at."""
    pool = await connect_postgres(settings, "system")
    try:
        owned = await pool.fetchval("SELECT bool_and(coalesce(lease_until > now(), false)) FROM shard")
        count = await pool.fetchval("SELECT count(*) FROM portfolio WHERE ledger_sequence > 1")
    finally:
        await pool.close()
    return bool(owned) and count >= options.demo_portfolios


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _remove_ready_file(path: Path, ready: ReadyFile) -> None:
    """Remove the file unless it tells of another system by now."""
    with suppress(OSError, msgspec.MsgspecError):
        if read_ready_file(path).pids["system"] == ready.pids["system"]:
            path.unlink()


def _write_ready_file(path: Path, ready: ReadyFile) -> None:
    """Appear whole or not at all; for this user's eyes only, because it holds passwords and the secret."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        partial.unlink()
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(ready)))
    partial.replace(path)
