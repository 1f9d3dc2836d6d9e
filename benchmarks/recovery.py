"""Recovery: an evaluator with 300,000 positions dies by kill -9; how long until its successor shows fresh marks.

Two evaluators share 40,000 portfolios × 15 positions on 4 shards, 300,000 positions each, with 500 quotes a second. One
is killed; the other, which goes on with its own, takes over what it had:

    claimed    until the dead one's leases have expired and are claimed (by default 3 s, looked at every 1 s)
    marks      until each of its shards has marks of all portfolios under a new epoch, of an instant after the kill

The parts come from the successor's own histogram `navstream_take_over_seconds`, summed over the shards. Afterwards the
dead one is started again, and the same is done the other way round.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import psutil
import redis.asyncio
import uvloop

from benchmarks.report import Figure, Report, quantile
from benchmarks.running_seed import LOG_ID, SHARDS, market, prepare, servers
from benchmarks.seed_load import PORTFOLIOS_COUNT, make_load
from engine.marks import decode_mark
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores import redis_keys

QUOTES_PER_S = 500
ROUNDS = 3
TIMEOUT_S = 180
LOOK_INTERVAL_S = 0.02
STAGES = ("read", "build", "write")


def run() -> None:
    with servers() as (children, settings):
        uvloop.run(_run(children, settings))


@dataclass(slots=True)
class _Evaluator:
    process: subprocess.Popen[bytes]
    metrics_port: int

    async def stages_s(self) -> dict[str, float]:
        """Seconds that take-overs took so far, by stage."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        answer = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        lines = (line.rpartition(" ") for line in answer.splitlines())
        sums = {name: float(value) for name, _, value in lines if name.startswith("navstream_take_over_seconds_sum")}
        return {stage: sums.get(f'navstream_take_over_seconds_sum{{stage="{stage}"}}', 0.0) for stage in STAGES}

    @property
    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1_024

    @property
    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


@dataclass(slots=True)
class _Recovery:
    """One take-over: seconds since the kill, seconds of each stage, CPU seconds of the successor."""

    claimed_s: float = 0.0
    marks_s: float = 0.0
    cpu_s: float = 0.0
    stages_s: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _System:
    children: ChildProcesses
    settings: Settings
    connection: asyncpg.Connection
    redis: redis.asyncio.Redis

    def evaluator(self) -> _Evaluator:
        port = free_port()
        named = {"NAVSTREAM_KAFKA_LOG_ID": LOG_ID, "NAVSTREAM_METRICS_PORT": str(port)}
        argv = [sys.executable, "-m", "navstream", "evaluator"]
        environment = os.environ | self.settings.environment() | named
        return _Evaluator(self.children.spawn("evaluator", argv, env=environment), port)

    async def owners(self) -> dict[int, tuple[str, int]]:
        """Of each shard that readers see: its owner and epoch."""
        found = {}
        for shard in range(SHARDS):
            owner, epoch = await self.redis.hmget(redis_keys.shard(shard), ["owner", "epoch"])
            if owner is not None:
                found[shard] = owner.decode(), int(epoch)
        return found

    async def until_shared(self, shares: list[int]) -> dict[int, tuple[str, int]]:
        """Until so many evaluators have so many shards each, and readers follow them."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                owners = await self.owners()
                names = [owner for owner, _ in owners.values()]
                if sorted(names.count(name) for name in set(names)) == shares:
                    return owners
                await asyncio.sleep(LOOK_INTERVAL_S)

    async def kill(self, victim: _Evaluator, shards: dict[int, int], successor: _Evaluator) -> _Recovery:
        """Kill an evaluator that has these shards under these epochs; returns when all have fresh marks again."""
        sizes = dict(await self.connection.fetch("SELECT shard, count(*) FROM portfolio GROUP BY shard"))
        recovery, before, cpu_s = _Recovery(), await successor.stages_s(), successor.cpu_s
        killed_ns, killed_s = time.time_ns(), time.monotonic()
        victim.process.send_signal(signal.SIGKILL)
        waiting, unclaimed = dict(shards), dict(shards)
        async with asyncio.timeout(TIMEOUT_S):
            while waiting:
                await asyncio.sleep(LOOK_INTERVAL_S)
                if unclaimed:
                    rows = await self.connection.fetch("SELECT id, epoch FROM shard")
                    unclaimed = {row["id"]: row["epoch"] for row in rows if row["epoch"] == unclaimed.get(row["id"])}
                    recovery.claimed_s = time.monotonic() - killed_s
                owners = await self.owners()
                for shard, epoch in list(waiting.items()):
                    if owners[shard][1] > epoch and await self._is_fresh(
                        shard, owners[shard][1], sizes[shard], killed_ns
                    ):
                        del waiting[shard]
        recovery.marks_s, recovery.cpu_s = time.monotonic() - killed_s, successor.cpu_s - cpu_s
        after = await successor.stages_s()
        recovery.stages_s = {stage: after[stage] - before[stage] for stage in STAGES}
        victim.process.wait()
        self.children.forget(victim.process)
        return recovery

    async def _is_fresh(self, shard: int, epoch: int, size: int, since_ns: int) -> bool:
        key = redis_keys.marks(shard, epoch)
        if await self.redis.hlen(key) < size:
            return False
        packed = await self.redis.hrandfield(key, 1, withvalues=True)
        return decode_mark(packed[0][1], epoch).as_of_ns > since_ns


async def _run(children: ChildProcesses, settings: Settings) -> None:
    load = make_load(2 * PORTFOLIOS_COUNT)
    await prepare(settings, load, with_snapshots=False)
    system = _System(
        children,
        settings,
        await asyncpg.connect(settings.postgres_url),
        redis.asyncio.Redis.from_url(settings.redis_url, protocol=3),
    )
    recoveries = []
    async with market(load, QUOTES_PER_S) as url:
        environment = os.environ | settings.environment() | {"NAVSTREAM_KAFKA_LOG_ID": LOG_ID}
        children.spawn("quotes", [sys.executable, "-m", "navstream", "quotes", "--feed", f"ws:{url}"], env=environment)
        victim = system.evaluator()
        first = await system.until_shared([SHARDS])
        named, successor = first[0][0], system.evaluator()
        for _ in range(ROUNDS):
            owners = await system.until_shared([SHARDS // 2, SHARDS // 2])
            await asyncio.sleep(5)  # positions are brought up to date, connections are warm
            shards = {shard: epoch for shard, (owner, epoch) in owners.items() if owner == named}
            recoveries.append(await system.kill(victim, shards, successor))
            named = (await system.until_shared([SHARDS]))[0][0]
            victim, successor = successor, system.evaluator()
        peak_mb = victim.peak_mb
    await system.connection.close()
    await system.redis.aclose()
    _report(recoveries, peak_mb)


def _report(recoveries: list[_Recovery], peak_mb: float) -> None:
    report, note = Report("recovery"), f"median of {len(recoveries)}"

    def median(values: list[float]) -> float:
        return quantile(values, 0.5)

    report.add(Figure("kill -9 → fresh marks of 300,000 positions", median([of.marks_s for of in recoveries]), "s",
                      at_most=8, note=note))  # fmt: skip
    report.add(Figure("the slowest", max(of.marks_s for of in recoveries), "s", at_most=8))
    report.add(Figure("of which until the leases are claimed", median([of.claimed_s for of in recoveries]), "s"))
    for stage, at_most in (("read", 2), ("build", None), ("write", None)):
        value = median([of.stages_s[stage] for of in recoveries])
        report.add(Figure(f"of which {stage}", value, "s", at_most=at_most, note="all shards"))
    report.add(Figure("CPU of the successor meanwhile", median([of.cpu_s for of in recoveries]), "s", note=note))
    report.add(Figure("memory of the successor, peak, 600,000 positions in the end", peak_mb, "MB"))
    report.finish()
