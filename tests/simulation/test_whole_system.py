"""The whole system under random events, quotes and faults ends where the oracle's fold of the events sent ends.

Evaluators are processes of their own on real servers. While events (duplicates and bad ones among them) and quotes
flow, a third evaluator joins, Redis stands still, one evaluator is killed -9, Redis loses everything (twice), and one
evaluator is stopped until others have taken its shards, then let go on as a zombie. Half-way, while no events flow, two
splits (one of them late) and a dividend come, and an evaluator is killed while they are being booked; afterwards there
are fills and reversals of before and after them. At the end, for every portfolio:
marks, positions and sectors in hot state equal the oracle's, the ledger has each event once and in gap-free sequence,
the dead letters are the bad events and nothing else, and no process is left.

`NAVSTREAM_SIMULATION_SEED` repeats a run's input, `NAVSTREAM_SIMULATION_EVENTS` sets its size.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.assets import Asset, AssetClass
from engine.corporate_actions import CorporateAction, DividendAction, SplitAction, encode_action, opens_at
from engine.marks import Mark, MarkQuality
from engine.positions import hot_position_decoder
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.sectors import sector_value_decoder
from engine.stores import redis_keys
from engine.stores.assets_postgres import upsert_assets
from tests.bookkeeping import MARK_FIELDS, cash, dividend, fill, opening, reversal, split
from tests.oracle import Oracle
from tests.running_system import System, connected, eventually, read_all

PORTFOLIOS_COUNT = 24
EVENTS_COUNT = int(os.environ.get("NAVSTREAM_SIMULATION_EVENTS", "2400"))
STEPS_COUNT = 120
STEP_S = 0.06
ACTIONS_STEP = 60
SETTLE_TIMEOUT_S = 30
# A split that is announced takes effect so much later; by then everybody knows of it.
ANNOUNCED_S = 3
LEASE_DURATION_MS = 1_000
REDIS_PAUSE_MS = 1_500
# Known sectors and one symbol that nobody knows.
SECTORS = {"SIM1": "Tech", "SIM2": "Tech", "SIM3": "Energy", "SIM4": "Metals", "SIM5": "UNCLASSIFIED"}


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get("NAVSTREAM_SIMULATION_SEED", random.SystemRandom().randrange(2**32)))
    print(f"NAVSTREAM_SIMULATION_SEED={seed}")
    return seed


class Stream:
    """Random events, and what becomes of them by the oracle."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.oracle = Oracle()
        self.names = [f"p-{number}" * (1 + number % 3) for number in range(PORTFOLIOS_COUNT)]
        self.sent: list[dict[str, Any]] = []
        self.bad: set[bytes] = set()
        self.prices = {symbol: self.random.randint(100, 90_000) for symbol in SECTORS}
        now = datetime.now(UTC)
        # Executions are of three days ago, before all corporate actions; from half-way on some are of today.
        self.executions = [now - timedelta(days=3)]
        # Nobody's day ends while the test runs, also when it runs at midnight.
        self.day_cut = f"{(now.hour + 12) % 24:02}:00 UTC"

    def good_or_refused(self, event: dict[str, Any]) -> tuple[str, bytes]:
        value = json.dumps(event).encode()
        if self.oracle.take(event) not in ("BOOKED", "DUPLICATE"):
            self.bad.add(value)
        self.sent.append(event)
        return event["portfolio_id"], value

    def malformed(self, key: str, value: bytes) -> tuple[str, bytes]:
        self.bad.add(value)
        return key, value

    def openings(self) -> list[tuple[str, bytes]]:
        return [self.good_or_refused(opening(name) | {"day_cut": self.day_cut}) for name in self.names]

    def next(self) -> tuple[str, bytes]:
        kind = self.random.random()
        if kind < 0.03:
            return self.bad_one()
        if kind < 0.10:
            return self.good_or_refused(self.random.choice(self.sent[-400:]))
        if kind < 0.13:
            again = self.random.choice(self.sent)
            return self.good_or_refused({**again, "portfolio_id": again["portfolio_id"], **self.changed(again)})
        if kind < 0.17:
            return self.good_or_refused(self.taking_back())
        return self.good_or_refused(self.trade() if kind < 0.75 else self.movement())

    def changed(self, event: dict[str, Any]) -> dict[str, str]:
        """Other content under the same id."""
        number = str(self.random.randint(1, 999))
        changing = {"open": "name", "fill": "fee", "cash": "amount", "reversal": "reference"}
        return {changing[event["type"]]: number}

    def taking_back(self) -> dict[str, Any]:
        """Now and then of what can not be taken back, or in another portfolio."""
        event = self.random.choice(self.sent)
        name = event["portfolio_id"] if self.random.random() < 0.95 else self.random.choice(self.names)
        return reversal(name, event["event_id"], self.fresh_id())

    def trade(self) -> dict[str, Any]:
        chosen, name = self.random, self.random.choice(self.names)
        symbol = chosen.choice(list(SECTORS))
        held = self.oracle.portfolios[name].positions.get(symbol)
        quantity, side = f"{chosen.randint(1, 10**6)}e-{chosen.choice((0, 2, 4))}", chosen.choice(("BUY", "SELL"))
        if held and chosen.random() < 0.3:
            exact = abs(held.quantity) * chosen.choice((1, 1, 2))
            quantity, side = f"{int(exact * 10**12)}e-12", "SELL" if held.quantity > 0 else "BUY"
        price = f"{self.prices[symbol] + chosen.randint(-99, 99) + 100}e-2"
        at = chosen.choice(self.executions).isoformat()
        return fill(name, side, quantity, price, self.fresh_id(), symbol, f"{chosen.randint(0, 500)}e-2", at)

    def movement(self) -> dict[str, Any]:
        kinds = ("DEPOSIT", "DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND")
        amount = f"{self.random.randint(1, 10**12)}e-6"
        return cash(self.random.choice(self.names), self.random.choice(kinds), amount, self.fresh_id())

    def bad_one(self) -> tuple[str, bytes]:
        name = self.random.choice(self.names)
        deposit = cash(name, "DEPOSIT", "1", self.fresh_id())
        broken = (
            b"{not json %d" % len(self.sent),
            json.dumps({**deposit, "amount": "-5"}).encode(),
            json.dumps({**deposit, "amount": "1e999999999"}).encode(),
            json.dumps({**deposit, "effective_at": "0001-01-01T00:00:00+14:00"}).encode(),
            json.dumps({**deposit, "unheard_of": 1}).encode(),
            json.dumps({**deposit, "portfolio_id": "nobody"}).encode(),
        )
        self.sent.append(deposit)
        return self.malformed(name, self.random.choice(broken))

    def fresh_id(self) -> str:
        return f"e-{len(self.sent)}-{self.random.randrange(10**9)}"

    def actions(self) -> list[CorporateAction]:
        """A split that comes two days late, one that is announced, a dividend of yesterday: the oracle takes them."""
        now = datetime.now(UTC)
        late_at, soon_at = now - timedelta(days=2), now + timedelta(seconds=ANNOUNCED_S)
        day = (now - timedelta(days=1)).date()
        self.oracle.split(split("SIM1", "3:2", late_at, "late"))
        self.oracle.accrue(dividend("SIM3", "0.37", "yesterday"), opens_at(day))
        self.oracle.pay(dividend("SIM3", "0.37", "yesterday"))
        self.oracle.priced_at["SIM2"] = now
        self.oracle.split(split("SIM2", "4", soon_at, "soon"))
        self.executions.append(soon_at)
        return [
            SplitAction(action_id="late", symbol="SIM1", ratio="3:2", effective_at=late_at),
            SplitAction(action_id="soon", symbol="SIM2", ratio="4", effective_at=soon_at),
            DividendAction(action_id="yesterday", symbol="SIM3", amount="0.37", ex_date=day, pay_date=day),
        ]

    def quote(self) -> tuple[str, str]:
        symbol = self.random.choice(list(SECTORS))
        self.prices[symbol] = max(100, self.prices[symbol] + self.random.randint(-200, 210))
        price = f"{self.prices[symbol] / 100:.2f}"
        self.oracle.prices.pop(symbol, None)
        self.oracle.tick(symbol, price)
        return symbol, price


class Evaluators:
    """Evaluator processes by name; all are gone when this ends."""

    def __init__(self, children: ChildProcesses, settings: Settings) -> None:
        self._children = children
        self._environment = dict(os.environ) | settings.environment()
        self._environment["NAVSTREAM_LEASE_DURATION_MS"] = str(settings.lease_duration_ms)
        self._environment["NAVSTREAM_LEASE_RENEWAL_INTERVAL_MS"] = str(settings.lease_renewal_interval_ms)
        self._environment["NAVSTREAM_FLUSH_INTERVAL_MS"] = str(settings.flush_interval_ms)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        program = str(Path(__file__).with_name("run_evaluator.py"))
        self.running[name] = self._children.spawn(name, [sys.executable, program], env=self._environment)

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        self._children.forget(process)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.running[name].send_signal(number)

    async def stop(self) -> dict[str, int]:
        """Exit statuses after SIGTERM."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        statuses = {}
        for name, process in self.running.items():
            statuses[name] = await asyncio.to_thread(process.wait, 15)
            self._children.forget(process)
        self.running.clear()
        return statuses

    def destroy(self) -> None:
        for name in list(self.running):
            self.signal(name, signal.SIGCONT)
            self.kill(name)


@asynccontextmanager
async def evaluators(children: ChildProcesses, settings: Settings) -> AsyncIterator[Evaluators]:
    started = Evaluators(children, settings)
    try:
        yield started
    finally:
        started.destroy()


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        actions_topic=f"{topic}-actions",
        flush_interval_ms=20,
        lease_duration_ms=LEASE_DURATION_MS,
        lease_renewal_interval_ms=200,
    )
    async with connected(settings) as one:
        classified = [
            Asset(symbol, symbol, AssetClass.EQUITY, sector, "")
            for symbol, sector in SECTORS.items()
            if sector != "UNCLASSIFIED"
        ]
        await upsert_assets(one.pool, classified, datetime.now(UTC))
        yield one


async def test_random_events_quotes_and_faults_end_as_the_oracle_says(
    system: System, children: ChildProcesses, seed: int
) -> None:
    stream = Stream(seed)
    async with evaluators(children, system.settings) as processes:
        for name in ("first", "second"):
            processes.start(name)
        await flow(system, stream, processes)
        await finish(system, stream)
        await assert_hot_state(system, stream.oracle)
        statuses = await processes.stop()
    assert statuses == {"second": 0, "third": 0, "fifth": 0}
    await assert_ledger(system, stream.oracle)
    assert {value for value, _ in await read_all(system, f"{system.settings.topic}.dlq")} == stream.bad
    assert not [p for p in psutil.Process().children(recursive=True) if "run_evaluator.py" in " ".join(p.cmdline())]


async def flow(system: System, stream: Stream, processes: Evaluators) -> None:
    """Events and quotes in steps, the faults between them."""
    await produce(system, stream.openings())
    faults = {
        20: lambda: join(processes, "third"),
        35: lambda: pause_redis(system),
        45: lambda: kill_and_replace(processes),
        ACTIONS_STEP: lambda: act(system, stream, processes),
        65: lambda: lose_redis(system),
        80: lambda: freeze(system, processes, "second"),
        100: lambda: thaw(system, processes, "second"),
        116: lambda: lose_redis(system),
    }
    for step in range(STEPS_COUNT):
        if step in faults:
            await faults[step]()
        await produce(system, [stream.next() for _ in range(EVENTS_COUNT // STEPS_COUNT)])
        for _ in range(3):
            await system.quote(*stream.quote())
        await asyncio.sleep(STEP_S)


async def produce(system: System, records: list[tuple[str, bytes]]) -> None:
    topic = system.settings.topic
    waiting = [await system.producer.send(topic, value, key=key.encode()) for key, value in records]
    await asyncio.gather(*waiting)


async def join(processes: Evaluators, name: str) -> None:
    processes.start(name)


async def kill_and_replace(processes: Evaluators) -> None:
    processes.kill("first")
    processes.start("fourth")


async def act(system: System, stream: Stream, processes: Evaluators) -> None:
    """Corporate actions while no events flow, so that it is known what they meet; and a crash among them."""
    await all_settled(system, stream.oracle)
    actions = stream.actions()
    for action in [*actions, *actions]:
        key = action.symbol.encode()
        await system.producer.send_and_wait(system.settings.actions_topic, encode_action(action), key=key)
    processes.kill("fourth")
    processes.start("fifth")
    await all_settled(system, stream.oracle)


async def pause_redis(system: System) -> None:
    """Longer than anybody waits for an answer."""
    await system.redis.execute_command("CLIENT", "PAUSE", REDIS_PAUSE_MS, "ALL")


async def lose_redis(system: System) -> None:
    await system.redis.flushall()


async def epochs(system: System) -> dict[str, int]:
    """Owner → the sum of its shards' epochs, of leases that still hold."""
    rows = await system.pool.fetch("SELECT owner, epoch FROM shard WHERE lease_until > now()")
    return {row["owner"]: row["epoch"] for row in rows}


async def freeze(system: System, processes: Evaluators, name: str) -> None:
    """Stop a process that owns something; who it is shows by its connections' pids only, so wait for all to own."""

    async def all_own() -> bool | None:
        return len(await epochs(system)) >= 3 or None

    await eventually(all_own, 15, lambda: epochs(system))
    processes.signal(name, signal.SIGSTOP)


async def thaw(system: System, processes: Evaluators, name: str) -> None:
    """Let the zombie go on once every shard belongs to somebody else."""

    async def others_own_all() -> bool | None:
        owners = await system.pool.fetch("SELECT owner, lease_until > now() AS holds FROM shard")
        return (all(row["holds"] for row in owners) and len({row["owner"] for row in owners}) == 2) or None

    await eventually(others_own_all, 15, lambda: epochs(system))
    processes.signal(name, signal.SIGCONT)


async def finish(system: System, stream: Stream) -> None:
    """Last quotes for every symbol, then a last fill for everyone, so that sectors stand at the last prices."""
    for symbol in SECTORS:
        await system.quote(symbol, f"{stream.prices[symbol] / 100:.2f}")
        stream.oracle.tick(symbol, f"{stream.prices[symbol] / 100:.2f}")
    await all_settled(system, stream.oracle)
    for name in stream.names:
        event = fill(name, "BUY", "1", "10", stream.fresh_id() + name, "SIM1")
        await produce(system, [stream.good_or_refused(event)])
    await all_settled(system, stream.oracle)
    stream.oracle.check()


async def all_settled(system: System, oracle: Oracle) -> None:
    """Every portfolio's mark includes all its entries and the last prices; fails with what is left to wait for."""

    async def ready() -> bool | None:
        return not await unsettled(system, oracle) or None

    await eventually(ready, SETTLE_TIMEOUT_S, lambda: unsettled(system, oracle))


async def unsettled(system: System, oracle: Oracle) -> list[tuple[str, Any, Any]]:
    left = []
    for name, portfolio in oracle.portfolios.items():
        mark, figures = await system.mark(name), portfolio.figures(oracle.prices)
        if mark is None or (mark.ledger_sequence, mark.nav) != (figures.ledger_sequence, figures.nav):
            left.append((name, mark and (mark.ledger_sequence, mark.nav), (figures.ledger_sequence, figures.nav)))
    return left


async def assert_hot_state(system: System, oracle: Oracle) -> None:
    # Positions and sectors are written just after the Book has changed: give the last ones a moment.
    await asyncio.sleep(1)
    for name, portfolio in oracle.portfolios.items():
        mark = await system.mark(name)
        assert mark is not None
        assert_mark(mark, portfolio.figures(oracle.prices))
        # What fills did depends on the prices that each of them met, which the ledger alone knows.
        traded = await system.pool.fetchval(
            "SELECT sum(nav_effect + fee) FROM ledger_entry WHERE portfolio_id = $1 AND kind = 'FILL'", name
        )
        assert mark.trading == (traded or 0) * 10**6
        shard = await system.shard_of(name)
        packed = await system.redis.hgetall(redis_keys.positions(shard, name))
        positions = {symbol.decode(): hot_position_decoder.decode(value) for symbol, value in packed.items()}
        found = {
            s: (p.quantity, p.cost, p.realized, p.day_base, p.fees, p.opened_sequence) for s, p in positions.items()
        }
        assert found == {
            s: (plain_text(p.quantity), p.cost, p.realized, portfolio.day.traded[s], p.fees, p.opened_sequence)
            for s, p in portfolio.positions.items()
        }
        await assert_sectors(system, shard, name, portfolio.sectors(oracle.prices, SECTORS))


def assert_mark(mark: Mark, figures: Any) -> None:
    for name in {*MARK_FIELDS, "ledger_sequence"} - {"trading"}:
        assert getattr(mark, name) == getattr(figures, name), name
    assert mark.quality is MarkQuality.LIVE


async def assert_sectors(system: System, shard: int, name: str, expected: dict[str, tuple[int, int]]) -> None:
    packed = await system.redis.hgetall(redis_keys.sector_values(shard, name))
    values = {sector.decode(): sector_value_decoder.decode(value) for sector, value in packed.items()}
    assert {sector: (value.value, value.gross) for sector, value in values.items()} == expected
    weights = dict(await system.redis.zrange(redis_keys.sectors(shard, name), 0, -1, withscores=True))
    whole = sum(gross for _, gross in expected.values())
    assert {sector.decode(): weight for sector, weight in weights.items()} == {
        sector: pytest.approx(gross / whole) for sector, (_, gross) in expected.items()
    }


async def assert_ledger(system: System, oracle: Oracle) -> None:
    """Each booked event once, and every portfolio's sequence without a gap."""
    rows = await system.pool.fetch("SELECT portfolio_id, sequence, event_id, late FROM ledger_entry ORDER BY 1, 2")
    assert sorted(row["event_id"] for row in rows if "#" not in row["event_id"]) == sorted(oracle.recorded)
    of_actions = {row["event_id"].partition("#")[0]: row["late"] for row in rows if "#" in row["event_id"]}
    assert of_actions == {"late": True, "soon": False, "yesterday": True}
    sequences: dict[str, list[int]] = {}
    for row in rows:
        sequences.setdefault(row["portfolio_id"], []).append(row["sequence"])
    assert sequences == {name: list(range(1, p.entries + 1)) for name, p in oracle.portfolios.items()}


def plain_text(exact: Any) -> str:
    """The shortest plain decimal of an exact number with at most 12 decimals."""
    sign, scaled = ("-" if exact < 0 else ""), abs(int(exact * 10**12))
    whole, rest = divmod(scaled, 10**12)
    return f"{sign}{whole}.{rest:012}".rstrip("0").rstrip(".")
