"""The reconciler: hot state against a Decimal fold of the ledger, for every portfolio, over and over.

All portfolios are checked in rotation (workers.portfolio_checks), those first whose check is longest ago: once in
`reconcile_interval_s`, or less often where that would take more than `reconcile_cpu_share_max` of a core. Each check is
kept (table `reconciliation`) and is one of

    AGREED          every figure is the ledger's
    DRIFTED         hot state is not; a repair was asked for, or was made before and did not help
    REPAIRED        it agrees, for the first time since its shard was repaired
    BROKEN_LEDGER   the ledger does not fold, or the record that hot state is made of is not its fold

A repair lets the shard be published anew, under a new epoch (engine.stores.reconciliations): everything hot is written
again from the record, subscribers get RESET. Its portfolios are checked again as soon as readers are pointed at the new
epoch. What drifts again then is an error in the program or somebody writing behind its back: it stays DRIFTED and asks
for no further repair until it agreed once. A shard is repaired once in `repair_interval_s` at most. A broken ledger is
not repaired: what would be published is as wrong.

A shard that nobody keeps at the moment, or that is being repaired, is checked later: nothing is said about it now.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.amounts import MICRO
from engine.instants import to_datetime
from engine.reconciliation import Difference, Finding, ReconciliationStatus
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from engine.runtime.connections import AWAY, Outage, RedisClient, connect_redis, make_engine
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.reconciliations import OpenRepair, Reconciliations
from workers.portfolio_checks import Check, PortfolioChecks
from workers.quote_history import QuoteHistory

PORTFOLIOS_PER_STEP_MAX = 100
PORTFOLIOS_PER_READ_MAX = 500  # of a single rotation at full speed
CATCH_UP_TIMEOUT_S = 60.0
HISTORY_LEAD_S = 2.0  # far longer than a flush takes
STEP_INTERVAL_S = 1.0  # also how soon the end of a repair is noticed
FIGURES_LOGGED_MAX = 10

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    portfolios_count: int
    entries_count: int
    differences: Sequence[Difference]


async def reconcile_once(settings: Settings) -> Report:
    """Compare every portfolio of a running system once, from a process of its own.

    Raises DBAPIError, RedisError, OSError when a server is not there.
    """
    async with _connected(settings) as (engine, redis):
        history = QuoteHistory()
        watch = asyncio.create_task(history.watch(redis))
        try:
            # Marks read from here on were made from prices that the history has.
            await asyncio.sleep(HISTORY_LEAD_S)
            names = sorted(await Reconciliations(engine).portfolios())
            checks = PortfolioChecks(engine, redis, history, pause=_no_pause)
            findings: list[Finding] = []
            for start in range(0, len(names), PORTFOLIOS_PER_READ_MAX):
                findings += await _check_when_kept(checks, names[start : start + PORTFOLIOS_PER_READ_MAX])
        finally:
            await _ended(watch)
        differences = [difference for finding in findings for difference in finding.differences]
        return Report(len(findings), sum(finding.ledger_sequence for finding in findings), differences)


async def _check_when_kept(checks: PortfolioChecks, names: Sequence[str]) -> list[Finding]:
    """What is found of portfolios, once their evaluator keeps up with the quotes: one that is behind has not drifted.

    After CATCH_UP_TIMEOUT_S it is said as it is.
    """
    ends_at_s = time.monotonic() + CATCH_UP_TIMEOUT_S
    found = {check.finding.portfolio_id: check for check in await checks.check(names)}
    while behind := [name for name, check in found.items() if check.finding.differences and check.is_behind]:
        if time.monotonic() > ends_at_s:
            break
        await asyncio.sleep(STEP_INTERVAL_S)
        found |= {check.finding.portfolio_id: check for check in await checks.check(behind)}
    return [check.finding for check in found.values()]


class Reconciler:
    """One process's rotation. At most one is needed; a second one does no harm."""

    def __init__(self, settings: Settings, clock: Clock, engine: AsyncEngine, redis: RedisClient) -> None:
        self._settings = settings
        self._clock = clock
        self._redis = redis
        self._history = QuoteHistory()
        self._store = Reconciliations(engine)
        self._pace = _Pace(settings.reconcile_cpu_share_max)
        self._checks = PortfolioChecks(engine, redis, self._history, self._pace.pause)
        # When each portfolio was checked last, oldest first; those never checked since they were first seen.
        self._checked_at_s: dict[str, float] = {}
        self._drifts: dict[str, int] = {}
        self._broken: set[str] = set()
        # Portfolios of repairs that are done and not checked since; those that a repair did not help.
        self._repaired: set[str] = set()
        self._incurable: set[str] = set()

    async def watch(self) -> None:
        """Keep the history of quotes, whatever becomes of the connection, until cancelled."""
        outage = Outage("redis")
        while True:
            try:
                await self._history.watch(self._redis)
            except AWAY as error:
                await asyncio.sleep(outage.begin_or_continue(error))

    async def rotate(self) -> None:
        """Check portfolios until cancelled."""
        outage = Outage("redis or postgresql")
        await asyncio.sleep(HISTORY_LEAD_S)
        while True:
            try:
                await self._rotation()
                outage.end()
            except AWAY as error:
                await asyncio.sleep(outage.begin_or_continue(error))

    async def _rotation(self) -> None:
        """Check every portfolio once, or wait a moment when there is none."""
        names = await self._store.portfolios()
        for name in names:
            self._checked_at_s.setdefault(name, time.monotonic())
        if not names:
            await asyncio.sleep(STEP_INTERVAL_S)
            return
        # Steps of about STEP_INTERVAL_S, unless that makes them too large.
        interval_s = self._settings.reconcile_interval_s
        per_step = min(PORTFOLIOS_PER_STEP_MAX, math.ceil(len(names) * STEP_INTERVAL_S / interval_s))
        for start in range(0, len(names), per_step):
            ends_at_s = time.monotonic() + interval_s * per_step / len(names)
            await self.step(names[start : start + per_step])
            await self._pace.pause()
            while (left_s := ends_at_s - time.monotonic()) > 0:
                await asyncio.sleep(min(left_s, STEP_INTERVAL_S))
                await self._follow_repairs()

    async def step(self, names: Sequence[str]) -> None:
        """Check some portfolios. Raises DBAPIError, RedisError, OSError when a server is away."""
        await self._follow_repairs()
        await self._judge(await self._checks.check(names) if names else [])
        if self._checked_at_s:
            telemetry.OLDEST_CHECK_AGE.set(time.monotonic() - next(iter(self._checked_at_s.values())))

    async def _judge(self, checks: Sequence[Check]) -> None:
        """Note, repair and keep what was found."""
        under_repair = {repair.shard for repair in await self._store.open_repairs()}
        kept: list[tuple[Finding, ReconciliationStatus]] = []
        curable: dict[tuple[int, int], list[Finding]] = {}
        for check in checks:
            finding = check.finding
            differs = bool(finding.differences)
            if differs and not finding.is_broken and (not check.is_kept or check.shard in under_repair):
                telemetry.RECONCILED.labels("UNSETTLED").inc()
                continue
            status = self._status(finding)
            kept.append((finding, status))
            if status is ReconciliationStatus.DRIFTED and finding.portfolio_id not in self._incurable:
                curable.setdefault((check.shard, check.shard_epoch), []).append(finding)
        for (shard, epoch), findings in curable.items():
            await self._repair(shard, epoch, findings)
        for finding, status in kept:
            self._note(finding, status)
        now = to_datetime(self._clock.now_ns())
        await self._store.write([finding for finding, _ in kept], [status for _, status in kept], now)
        telemetry.DRIFT.set(sum(self._drifts.values()) / MICRO)
        telemetry.DRIFT_PORTFOLIOS.set(len(self._drifts))
        telemetry.BROKEN_LEDGERS.set(len(self._broken))

    def _status(self, finding: Finding) -> ReconciliationStatus:
        name = finding.portfolio_id
        if finding.is_broken:
            return ReconciliationStatus.BROKEN_LEDGER
        was_repaired = name in self._repaired
        self._repaired.discard(name)
        if finding.differences:
            if was_repaired:
                self._incurable.add(name)
            return ReconciliationStatus.DRIFTED
        self._incurable.discard(name)
        return ReconciliationStatus.REPAIRED if was_repaired else ReconciliationStatus.AGREED

    def _note(self, finding: Finding, status: ReconciliationStatus) -> None:
        name = finding.portfolio_id
        telemetry.RECONCILED.labels(status.value).inc()
        self._checked_at_s.pop(name, None)
        self._checked_at_s[name] = time.monotonic()
        self._drifts.pop(name, None)
        self._broken.discard(name)
        if status is ReconciliationStatus.DRIFTED:
            self._drifts[name] = finding.drift
        elif status is ReconciliationStatus.BROKEN_LEDGER:
            self._broken.add(name)
        if finding.differences:
            found = [f"{d.figure}: {d.found}, not {d.expected}" for d in finding.differences[:FIGURES_LOGGED_MAX]]
            is_incurable = name in self._incurable
            _log.error(status.value.lower(), portfolio=name, drift=finding.drift, found=found, incurable=is_incurable)

    async def _repair(self, shard: int, epoch: int, findings: Sequence[Finding]) -> None:
        names = [finding.portfolio_id for finding in findings]
        figures = {figure for finding in findings for figure in finding.figures}
        asked = await self._store.ask_repair(shard, epoch, names, figures, self._settings.repair_interval_s)
        if asked is not None:
            telemetry.REPAIRS.inc()
            _log.warning("repair_asked", repair=asked, shard=shard, epoch=epoch, portfolios=len(names))

    async def _follow_repairs(self) -> None:
        """Finish the repairs whose shard is published anew, and check their portfolios."""
        repairs = await self._store.open_repairs()
        if not repairs:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            for repair in repairs:
                pipe.hget(redis_keys.shard(repair.shard), "epoch")
            epochs = [int(epoch or 0) for epoch in await pipe.execute()]
        for repair, epoch in zip(repairs, epochs, strict=True):
            if epoch > repair.from_epoch:
                await self._finish(repair, epoch)

    async def _finish(self, repair: OpenRepair, epoch: int) -> None:
        await self._store.finish_repair(repair.repair_id, epoch)
        _log.warning("repair_done", repair=repair.repair_id, shard=repair.shard, epoch=epoch)
        self._repaired |= set(repair.portfolios)
        for start in range(0, len(repair.portfolios), PORTFOLIOS_PER_STEP_MAX):
            await self._judge(await self._checks.check(repair.portfolios[start : start + PORTFOLIOS_PER_STEP_MAX]))


class _Pace:
    """Pauses that keep this process at or below a share of one core, as it goes."""

    def __init__(self, cpu_share_max: float) -> None:
        self._share = cpu_share_max
        self._cpu_s = time.process_time()
        self._wall_s = time.monotonic()

    async def pause(self) -> None:
        """Wait until what was spent since the last pause is within the share."""
        spent_s = time.process_time() - self._cpu_s
        passed_s = time.monotonic() - self._wall_s
        await asyncio.sleep(max(0, spent_s / self._share - passed_s))
        self._cpu_s, self._wall_s = time.process_time(), time.monotonic()


async def run_reconciler(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
    """Reconcile until `stop` is set."""
    async with _connected(settings) as (engine, redis):
        reconciler = Reconciler(settings, clock, engine, redis)
        tasks = [asyncio.create_task(work) for work in (reconciler.watch(), reconciler.rotate(), _wait(stop))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # what ends by itself is a defect, but for the last
        finally:
            for task in tasks:
                await _ended(task)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def _no_pause() -> None:
    return


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; what it raises has been seen or does not matter any more."""
    task.cancel()
    with suppress(asyncio.CancelledError, *AWAY):
        await task


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[tuple[AsyncEngine, RedisClient]]:
    engine, redis = make_engine(settings, "reconciler"), connect_redis(settings, "reconciler")
    try:
        yield engine, redis
    finally:
        await redis.aclose()
        await engine.dispose()
