"""Every process on a badge's way is killed -9 at every step of it, and in the end everybody has each badge once.

    evaluator    in the transaction that proves, just after its commit, after the Book has it, after hot state has it;
                 likewise where a flush proves a NAV
    relay        before it produces, after Kafka has a message and before that is written down, and after that
    consumer     before its transaction, in it, after its commit and before anybody is told, after that
    API          with events in hand that a subscriber is about to get
    broker       with messages in its log that nobody has consumed: the next one has another log

Processes kill themselves exactly there (tests.run_dying). Meanwhile portfolios are opened and trade. In the end awards
and events equal those of tests.badge_scan, `badges verify` finds nothing, and the subscriber that resumed at its last
cursor has had every event once, in order.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from websockets.exceptions import ConnectionClosed

from engine.assets import Asset, AssetClass
from engine.badge_proofs import BadgeFault
from engine.badges import Predicate, Rule, load_rules
from engine.ledger import LedgerEntry
from engine.messages import PortfolioEvent, encode_event
from engine.runtime.embedded import start_broker
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import upsert_assets
from engine.stores.badges_postgres import sync_rules
from engine.stores.ledger_reads import ENTRY_COLUMNS, read_entry
from resolvers.pages import write_cursor
from tests.badge_scan import Moment, Wanted, scan
from tests.gateway import SECRET, Gateway
from tests.running_system import AT, System, connected, deposit, eventually, fill, opening
from workers.badge_commands import verify_badges

SYMBOLS = ("S0", "S1", "S2", "S3", "S4")
SECTOR_OF = {symbol: f"Sector {symbol}" for symbol in SYMBOLS} | {"X": "UNCLASSIFIED"}
PRICES = {symbol: Fraction(100) for symbol in SYMBOLS}
WATCHED = "watched"
ROOT = Path(__file__).parents[2]
DEATH_TIMEOUT_S = 40
SETTLE_TIMEOUT_S = 40
BUNCH_INTERVAL_S = 0.4

PROVING = [
    ("engine.stores.badges_postgres:write_proofs", "after", "1"),
    ("engine.stores.ledger_postgres:LedgerWriter.book", "after", "1"),
    ("workers.evaluator:post_in_steps", "after", "1"),
    ("engine.stores.hot_state_redis:HotStateWriter.write_positions", "after", "1"),
    ("engine.stores.badges_postgres:BadgesStore.prove", "before", "1"),
    ("engine.stores.badges_postgres:BadgesStore.prove", "after", "1"),
]
AWARDING = [
    ("engine.stores.outbox:due", "after", "1"),
    ("engine.stores.outbox:mark_produced", "before", "1"),
    ("engine.stores.outbox:mark_produced", "after", "1"),
    ("workers.badges:Consumer._book", "before", "1"),
    ("engine.stores.outbox:remove", "after", "1"),
    ("workers.badges:Consumer._tell", "before", "1"),
    ("workers.badges:Consumer._tell", "after", "1"),
]
SHOWING = ("engine.stores.badge_reads:BadgeReads.after", "after", "2")
MARKED_AND_NOT_CONSUMED = (
    ("engine.stores.outbox:mark_produced", "after", "1"),
    ("workers.badges:Consumer.poll", "never", "1"),
)
_OPEN = "SELECT true FROM portfolio WHERE id = $1"
_NEWEST = "SELECT max(sequence) FROM badge_event WHERE portfolio_id = $1"
QUERY = """subscription($id: String!, $after: String) { badgeEvents(portfolioId: $id, after: $after) {
    kind cursor badge { badgeId } } }"""


class Processes:
    """The program's own processes; those that are to die kill themselves."""

    def __init__(self, children: ChildProcesses, settings: Settings) -> None:
        self.children = children
        self.settings = settings
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, role: str, *steps: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        own = {
            "NAVSTREAM_LEASE_DURATION_MS": str(self.settings.lease_duration_ms),
            "NAVSTREAM_LEASE_RENEWAL_INTERVAL_MS": str(self.settings.lease_renewal_interval_ms),
            "NAVSTREAM_FLUSH_INTERVAL_MS": str(self.settings.flush_interval_ms),
            "NAVSTREAM_CALENDAR_EQUITY": "",
            "NAVSTREAM_CALENDAR_COMMODITY": "",
        }
        argv = [sys.executable, "-m", "tests.run_dying", *itertools.chain(*steps), "--", role]
        process = self.children.spawn(
            role, argv, env=os.environ | self.settings.environment() | own | environment, cwd=ROOT
        )
        self.running.append(process)
        return process

    async def die(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until it is dead, by its own hand."""
        status = await asyncio.to_thread(process.wait, DEATH_TIMEOUT_S)
        self.running.remove(process)
        self.children.forget(process)
        assert status == -signal.SIGKILL

    async def stop(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        for process in self.running:
            # The API ends by the signal that it was sent.
            assert await asyncio.to_thread(process.wait, 15) in (0, -signal.SIGTERM)
            self.children.forget(process)
        self.running.clear()

    def destroy(self) -> None:
        for process in self.running:
            process.kill()
            self.children.forget(process)


class Market:
    """Bunches of events of new portfolios, and of one that goes in and out of being diversified."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._number = 0
        self._bunch = 0
        self.sent: list[PortfolioEvent] = []

    def bunch(self) -> list[PortfolioEvent]:
        self._bunch += 1
        events: list[PortfolioEvent] = []
        for number in range(5):
            name = f"p-{self._bunch}-{number}"
            rich = number == 0
            events += [opening(name), deposit(name, "2000000" if rich else "100000", f"{name}-d")]
            events += self._trades(name)
        if self._bunch == 1:
            events += [opening(WATCHED), deposit(WATCHED, "100000", "watched-d")]
        side = "BUY" if self._bunch % 2 else "SELL"
        events += [self._fill(WATCHED, side, "10", symbol) for symbol in SYMBOLS]
        self.sent += events
        return events

    def _trades(self, name: str) -> list[PortfolioEvent]:
        """All sectors, some of them left again, and closes with a profit or a loss."""
        trades: list[PortfolioEvent] = [self._fill(name, "BUY", "10", symbol) for symbol in SYMBOLS]
        for _ in range(self._random.randint(0, 9)):
            trades.append(self._fill(name, "BUY", "1", "X"))
            trades.append(self._fill(name, "SELL", "1", "X", self._random.choice(("99", "101", "101", "101"))))
        for symbol in self._random.sample(SYMBOLS, self._random.randint(0, 3)):
            trades.append(self._fill(name, "SELL", "10", symbol))
        return trades

    def _fill(self, name: str, side: str, quantity: str, symbol: str, price: str = "100") -> PortfolioEvent:
        self._number += 1
        return fill(name, side, quantity, price, f"f-{self._number}", symbol=symbol)


async def send(system: System, events: Sequence[PortfolioEvent]) -> None:
    topic = system.settings.topic
    waiting = [
        await system.producer.send(topic, encode_event(event), key=event.portfolio_id.encode()) for event in events
    ]
    await asyncio.gather(*waiting)


@pytest.fixture
async def system(
    redis_db: str, fresh_database: str, children: ChildProcesses, topic: str
) -> AsyncIterator[tuple[System, int]]:
    """On a broker of its own, with that broker's pid."""
    bootstrap, broker_pid = start_broker(children)
    settings = settings_on(bootstrap, redis_db, fresh_database, topic)
    async with connected(settings) as one:
        async with one.pool.acquire() as connection:
            await sync_rules(connection, load_rules())
        assets = [Asset(symbol, symbol, AssetClass.EQUITY, SECTOR_OF[symbol], "") for symbol in SYMBOLS]
        await upsert_assets(one.pool, assets, AT)
        for symbol in SYMBOLS:
            await one.quote(symbol, "100")
        yield one, broker_pid


def settings_on(bootstrap: str, redis_url: str, postgres_url: str, topic: str) -> Settings:
    return Settings(
        redis_url=redis_url,
        postgres_url=postgres_url,
        kafka_bootstrap=bootstrap,
        topic=topic,
        actions_topic=f"{topic}-actions",
        badge_topic=f"{topic}-badges",
        threshold_topic=f"{topic}-thresholds",
        jwt_secret=SecretStr(SECRET),
        flush_interval_ms=20,
        lease_duration_ms=1_000,
        lease_renewal_interval_ms=200,
        log_level="ERROR",
        calendar_equity="",
        calendar_commodity="",
    )


async def test_whoever_is_killed_wherever_each_badge_is_awarded_once(
    system: tuple[System, int], children: ChildProcesses, seed: int
) -> None:
    one, broker_pid = system
    processes, market, enough = Processes(children, one.settings), Market(seed), asyncio.Event()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(trade(one, market, enough))
            evaluator = tasks.create_task(die_in_turn(processes, "evaluator", PROVING))
            badges = tasks.create_task(die_in_turn(processes, "badges", AWARDING))
            listener = tasks.create_task(listen_to_the_dying(processes, one))
            await asyncio.wait([evaluator, badges, listener])
            enough.set()
        heard = listener.result()
        await settled(one, market)
        await processes.stop()
        bootstrap = await lose_the_broker(one, processes, market, broker_pid)
        settings = one.settings
        moved = settings_on(bootstrap, settings.redis_url, settings.postgres_url, settings.topic)
        processes.settings = moved
        async with connected(moved) as other:
            for role in ("evaluator", "badges"):
                processes.start(role)
            await send(other, market.bunch())
            await settled(other, market)
            heard += await listen_to_the_end(processes, other, heard[-1])
        await processes.stop()
    finally:
        processes.destroy()
    await assert_as_scanned(one, market, heard)


async def trade(system: System, market: Market, enough: asyncio.Event) -> None:
    while not enough.is_set():
        await send(system, market.bunch())
        await asyncio.sleep(BUNCH_INTERVAL_S)


async def die_in_turn(processes: Processes, role: str, steps: Sequence[Sequence[str]]) -> None:
    """One process after the other, each killed at its step; the last one stays."""
    for step in steps:
        await processes.die(processes.start(role, step))
    processes.start(role)


async def lose_the_broker(system: System, processes: Processes, market: Market, broker_pid: int) -> str:
    """Kill it while its log holds what nobody has consumed; the address of the next one."""
    processes.start("evaluator")
    dying = processes.start("badges", *MARKED_AND_NOT_CONSUMED)
    await send(system, market.bunch())
    await processes.die(dying)
    await booked(system, market)
    await processes.stop()
    assert await system.pool.fetchval("SELECT count(*) FROM outbox WHERE produced_log IS NOT NULL")
    os.kill(broker_pid, signal.SIGKILL)
    return start_broker(processes.children)[0]


# -- the subscriber ------------------------------------------------------------------------------------------


async def listen_to_the_dying(processes: Processes, system: System) -> list[tuple[str, str]]:
    """All that a subscriber hears of WATCHED before its API dies: cursors, with kind and badge."""
    await eventually(lambda: system.pool.fetchval(_OPEN, WATCHED), DEATH_TIMEOUT_S, none)
    heard: list[tuple[str, str]] = []
    port = str(free_port())
    process = processes.start("api", SHOWING, NAVSTREAM_PORT=port)
    with suppress(ConnectionClosed):
        await listen(processes.settings, port, write_cursor("badges", 0), heard, lambda: False)
    await processes.die(process)
    assert heard, "it has shown something before"
    return heard


async def listen_to_the_end(processes: Processes, system: System, last: tuple[str, str]) -> list[tuple[str, str]]:
    """What another API shows to the subscriber that resumes behind the last thing that it has heard."""
    port, heard = str(free_port()), list[tuple[str, str]]()
    newest = write_cursor("badges", await system.pool.fetchval(_NEWEST, WATCHED))
    processes.start("api", NAVSTREAM_PORT=port)
    await listen(processes.settings, port, last[0], heard, lambda: bool(heard) and heard[-1][0] == newest)
    return heard


async def listen(
    settings: Settings, port: str, after: str, heard: list[tuple[str, str]], is_over: Callable[[], bool]
) -> None:
    gateway = Gateway(settings, None, f"http://127.0.0.1:{port}", None, None)  # type: ignore[arg-type]
    await eventually(lambda: answers(gateway), DEATH_TIMEOUT_S, none)
    async with gateway.socket(gateway.token("user-1", "portfolio:read ledger:read")) as socket:
        stream = await socket.subscribe(QUERY, {"id": WATCHED, "after": after})
        while not is_over():
            event = await stream.next(DEATH_TIMEOUT_S)
            heard.append((event["cursor"], f"{event['badge']['badgeId']} {event['kind']}"))


async def answers(gateway: Gateway) -> bool | None:
    with suppress(httpx.TransportError):
        async with gateway.client() as client:
            return (await client.get("/healthz")).status_code == 200 or None
    return None


async def none() -> None:
    return None


# -- the end -------------------------------------------------------------------------------------------------


async def booked(system: System, market: Market) -> None:
    """Until the ledger has every event."""

    async def missing() -> int:
        return len(market.sent) - int(await system.pool.fetchval("SELECT count(*) FROM ledger_entry"))

    async def ready() -> bool | None:
        return not await missing() or None

    await eventually(ready, SETTLE_TIMEOUT_S, missing)


async def settled(system: System, market: Market) -> None:
    """Until as many badge events are there as there should be, and nothing is on its way."""
    await booked(system, market)
    expected = sum(len(kinds) for of in (await scanned(system)).values() for kinds in of.values())

    async def missing() -> tuple[int, int]:
        counts = await system.pool.fetchrow("SELECT (SELECT count(*) FROM badge_event), (SELECT count(*) FROM outbox)")
        return expected - counts[0], counts[1]

    async def ready() -> bool | None:
        return await missing() == (0, 0) or None

    await eventually(ready, SETTLE_TIMEOUT_S, missing)


async def scanned(system: System) -> dict[str, dict[str, list[str]]]:
    """By portfolio and badge: what should have happened, by the ledger alone."""
    ledger: dict[str, list[LedgerEntry]] = defaultdict(list)
    for row in await system.pool.fetch(f"SELECT {ENTRY_COLUMNS} FROM ledger_entry ORDER BY portfolio_id, sequence"):
        entry = read_entry(row)
        ledger[entry.portfolio_id].append(entry)
    prices = defaultdict(lambda: PRICES)  # type: ignore[var-annotated]
    now, wanted = datetime.now(UTC), [wanted_of(rule) for rule in load_rules() if rule.predicate in COUNTS]
    return {
        name: scan(name, entries, prices, [Moment(now, PRICES, {name: len(entries)})], wanted, SECTOR_OF)
        for name, entries in ledger.items()
    }


COUNTS = {
    Predicate.FILLS: "fills",
    Predicate.STREAK: "streak",
    Predicate.SECTORS: "sectors",
    Predicate.HELD: "held days",
    Predicate.NAV: "nav",
}


def wanted_of(rule: Rule) -> Wanted:
    minimum, hysteresis = Fraction(rule.minimum), Fraction(rule.hysteresis)
    return Wanted(rule.badge_id, COUNTS[rule.predicate], Fraction(rule.threshold), minimum, minimum - hysteresis)


async def assert_as_scanned(system: System, market: Market, heard: list[tuple[str, str]]) -> None:
    expected = await scanned(system)
    assert len(expected) == len({event.portfolio_id for event in market.sent})
    found: dict[str, dict[str, list[str]]] = {name: {} for name in expected}
    events = await system.pool.fetch("SELECT * FROM badge_event ORDER BY portfolio_id, sequence")
    for row in events:
        found[row["portfolio_id"]].setdefault(row["badge_id"], []).append(row["kind"])
    assert found == expected
    awards = await system.pool.fetch("SELECT portfolio_id, badge_id, active FROM badge_award")
    assert sorted(map(tuple, awards)) == sorted(
        (name, badge_id, kinds[-1] != "LAPSED") for name, of in expected.items() for badge_id, kinds in of.items()
    )
    of_watched = [row for row in events if row["portfolio_id"] == WATCHED]
    assert heard == [
        (write_cursor("badges", row["sequence"]), f"{row['badge_id']} {row['kind']}") for row in of_watched
    ]
    faults: list[BadgeFault] = []
    await verify_badges(system.settings, None, faults.append, lambda *_: None)
    assert faults == []
