"""The whole system on a Redis Cluster of three masters ends where the oracle's fold of the events sent ends.

Two evaluators as processes, the quotes worker and two API nodes with subscriptions on every master's shards. While
events and quotes flow a shard's slot moves to another master, a master is killed and comes back empty while the others'
streams go on, and so does the master of `prices`. At the end hot state equals the oracle's, the ledger has each event
once, the streams show the last values, and `navstream reconcile` finds no difference.

`NAVSTREAM_SIMULATION_SEED` repeats a run's input.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from engine.amounts import from_micro
from engine.assets import Asset, AssetClass
from engine.quotes import RawQuote
from engine.runtime.clock import WallClock
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.assets_postgres import upsert_assets
from tests.bookkeeping import fill
from tests.evaluator_processes import evaluators
from tests.gateway import SECRET, Gateway, Stream, gateway_of
from tests.random_events import SECTORS
from tests.random_events import Stream as Events
from tests.redis_cluster import Master, RedisClusterServers
from tests.running_system import System, connected
from tests.whole_system import all_settled, assert_hot_state, assert_ledger, produce
from tests.workers.test_quotes import HandFeed
from workers.quotes import run_quotes
from workers.reconciler import reconcile_once

STEP_S = 0.05
EVENTS_PER_STEP = 20
SHARDS = range(4)
NAV = "subscription($id: String!) { navUpdates(portfolioId: $id, maxRateHz: 20) { kind nav } }"
FILL = "mutation($in: RecordFillInput!) { recordFill(input: $in) { eventId } }"
CENTS_FROM = 20_000  # prices move by less than what a quote is believed at once


@dataclass
class Watched:
    """A stream that is read all the time: the values shown, and when the last of each kind came."""

    name: str
    stream: Stream
    nav: str = ""
    seen_at_s: dict[str, float] = field(default_factory=dict)

    async def read(self) -> None:
        while True:
            shown = await self.stream.next(wait_s=60)
            self.nav = shown["nav"] or self.nav
            self.seen_at_s[shown["kind"]] = time.monotonic()


class Stage:
    gateway: Gateway

    def __init__(self, system: System, events: Events, cluster: RedisClusterServers) -> None:
        self.system, self.events, self.cluster = system, events, cluster
        self.feed = HandFeed()
        self.watched: dict[int, list[Watched]] = {shard: [] for shard in SHARDS}
        self._sequence = 0

    def quote(self, symbol: str, price: str) -> None:
        self._sequence += 1
        self.feed.say(RawQuote(symbol, price, time.time_ns(), "hand", self._sequence))

    async def flow(self, steps: int) -> None:
        for _ in range(steps):
            await produce(self.system, [self.events.next() for _ in range(EVENTS_PER_STEP)])
            for _ in range(3):
                self.quote(*self.events.quote())
            await asyncio.sleep(STEP_S)

    async def flow_during(self, work: asyncio.Task[None]) -> None:
        while not work.done():
            await self.flow(1)
        await work

    async def settle(self) -> None:
        """The last quotes of all symbols have reached all marks."""
        for symbol, cents in self.events.prices.items():
            price = f"{cents / 100:.2f}"
            self.quote(symbol, price)
            self.events.oracle.tick(symbol, price)
        await all_settled(self.system, self.events.oracle)

    def shards_of(self, master: Master) -> list[int]:
        return [shard for shard in SHARDS if self.cluster.owner(redis_keys.shard(shard)) is master]

    async def shown(self) -> None:
        """Every stream shows its portfolio's NAV as the oracle has it."""
        oracle = self.events.oracle
        for watched in [one for shard in SHARDS for one in self.watched[shard]]:
            figures = oracle.portfolios[watched.name].figures(oracle.prices)
            async with asyncio.timeout(10):
                while Decimal(watched.nav) != from_micro(figures.nav):
                    await asyncio.sleep(0.02)


@pytest.fixture
async def system(
    cluster_db: RedisClusterServers, fresh_database: str, kafka_bootstrap: str, topic: str
) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=cluster_db.url,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        actions_topic=f"{topic}-actions",
        flush_interval_ms=20,
        lease_renewal_interval_ms=200,
        jwt_secret=SECRET,  # type: ignore[arg-type]
    )
    async with connected(settings) as one:
        known = {symbol: sector for symbol, sector in SECTORS.items() if sector != "UNCLASSIFIED"}
        assets = [Asset(symbol, symbol, AssetClass.EQUITY, sector, "") for symbol, sector in known.items()]
        await upsert_assets(one.pool, assets, datetime.now(UTC))
        yield one


@asynccontextmanager
async def stage(
    system: System, children: ChildProcesses, cluster: RedisClusterServers, seed: int
) -> AsyncIterator[Stage]:
    """All of it running, everybody's portfolio open, and a stream of each shard on each of two API nodes."""
    events = Events(seed)
    events.prices = {symbol: cents + CENTS_FROM for symbol, cents in events.prices.items()}
    made, stop = Stage(system, events, cluster), asyncio.Event()
    quoting = asyncio.create_task(run_quotes(system.settings, made.feed, WallClock(), stop))
    async with AsyncExitStack() as running, evaluators(children, system.settings) as processes:
        processes.start("first")
        processes.start("second")
        await produce(system, events.openings())
        await made.settle()
        readers = []
        for _ in range(2):
            gateway = await running.enter_async_context(gateway_of(system.settings))
            for shard in SHARDS:
                socket = await running.enter_async_context(gateway.socket(gateway.token("user-1")))
                name = await system.pool.fetchval("SELECT min(id) FROM portfolio WHERE shard = $1", shard)
                watched = Watched(name, await socket.subscribe(NAV, {"id": name}))
                made.watched[shard].append(watched)
                readers.append(asyncio.create_task(watched.read()))
            made.gateway = gateway
        try:
            yield made
            assert [reader.exception() for reader in readers if reader.done()] == []
            stop.set()
            await quoting
            assert await processes.stop() == {"first": 0, "second": 0}
        finally:
            stop.set()
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, quoting, return_exceptions=True)


async def test_slots_that_move_and_masters_that_die_end_as_the_oracle_says(
    system: System, children: ChildProcesses, cluster_db: RedisClusterServers, seed: int
) -> None:
    async with stage(system, children, cluster_db, seed) as running:
        await running.flow(10)
        await record_a_fill(running, running.gateway)
        await move_a_shard(running)
        await kill_a_master(running)
        await kill_the_master_of_prices(running)
        await running.flow(10)
        await running.settle()
        for name in running.events.names:
            last = fill(name, "BUY", "1", "10", running.events.fresh_id() + name, "SIM1")
            await produce(system, [running.events.good_or_refused(last)])
        await running.settle()
        running.events.oracle.check()
        await assert_hot_state(system, running.events.oracle)
        await running.shown()
        report = await reconcile_once(system.settings)
        assert (report.portfolios_count, report.differences) == (len(running.events.names), [])
    await assert_ledger(system, running.events.oracle, {})


async def record_a_fill(running: Stage, gateway: Gateway) -> None:
    name = running.watched[0][0].name
    event = fill(name, "BUY", "3", "250", "", "SIM2")
    asked = {key: event[key] for key in ("symbol", "side", "quantity", "price", "fee")} | {
        "portfolioId": name,
        "executedAt": event["executed_at"],
    }
    token = gateway.token("user-1")
    receipt = (await gateway.ask(FILL, {"in": asked}, token))["recordFill"]
    running.events.good_or_refused(event | {"event_id": receipt["eventId"]})


async def move_a_shard(running: Stage) -> None:
    """Its slot is on its way for a while, then another master's."""
    key = redis_keys.shard(2)
    target = next(master for master in running.cluster.masters if master is not running.cluster.owner(key))
    await running.flow_during(asyncio.create_task(asyncio.to_thread(running.cluster.move, key, target, 10)))
    assert running.cluster.owner(key) is target
    await running.flow(5)


async def kill_a_master(running: Stage) -> None:
    """One that has shards but not the prices: the others' streams go on, and its own come back."""
    prices = running.cluster.owner(redis_keys.PRICES)
    dead = next(master for master in running.cluster.masters if master is not prices and running.shards_of(master))
    lost = running.shards_of(dead)
    dead.kill()
    await running.flow(10)
    for _ in range(2):
        since_s = time.monotonic()
        await running.flow(10)
        living = [one for shard in SHARDS if shard not in lost for one in running.watched[shard]]
        assert living
        assert [one for one in living if one.seen_at_s.get("UPDATE", 0) < since_s] == []
    dead.start()
    back_s = time.monotonic()
    async with asyncio.timeout(15):
        while any(one.seen_at_s.get("UPDATE", 0) < back_s for shard in lost for one in running.watched[shard]):
            await running.flow(1)


async def kill_the_master_of_prices(running: Stage) -> None:
    dead = running.cluster.owner(redis_keys.PRICES)
    dead.kill()
    dead.start()
    await running.flow(10)
    await asyncio.to_thread(running.cluster.wait_until_whole)
