"""Fills through the whole pipeline beside the seed's quotes: from Kafka to ledger, Book, hot state, badges and awards.

The whole system runs as `navstream up` starts it, with the simulated feed at QUOTES_PER_S. PORTFOLIOS_COUNT portfolios
are opened and funded; then fills in 15 symbols each are produced at FILLS_PER_S. They are encoded beforehand, but the
producer, and the broker that stands in for Kafka, run on the same cores. The embedded broker forgets what lies more
than about 5 MB per partition behind, so the producer waits while the ledger is LAG_COUNT_MAX events behind: where the
pace is not reached, what is booked is what the system sustains. CPU time is that of the time from the first fill to the
last one's commit, whatever else the machine does.

`NAVSTREAM_PIPELINE_FILLS_PER_S` (0: as fast as the lag allows), `NAVSTREAM_PIPELINE_S` and
`NAVSTREAM_PIPELINE_EVALUATORS` change the pace, its length and the number of evaluators.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Figure, Report, quantile
from engine.assets import load_catalogue
from engine.messages import CashEvent, FillEvent, OpenEvent, encode_event
from engine.runtime.connections import make_producer, postgres_dsn
from engine.runtime.embedded_start import free_port
from engine.runtime.settings import ReadyFile, Settings, read_ready_file
from workers.feeds.simulated import START_PRICES
from workers.producing import EventSender

FILLS_PER_S = int(os.environ.get("NAVSTREAM_PIPELINE_FILLS_PER_S", "5000"))
DURATION_S = int(os.environ.get("NAVSTREAM_PIPELINE_S", "30"))
EVALUATORS_COUNT = int(os.environ.get("NAVSTREAM_PIPELINE_EVALUATORS", "2"))
QUOTES_PER_S = 500
PORTFOLIOS_COUNT = 2_000
POSITIONS_COUNT = 15
LAG_COUNT_MAX = 20_000  # a fill takes about 300 bytes in the log, of which each of four partitions keeps 5 MB
# What is encoded beforehand where no pace is set: more than any system here books.
UNPACED_PER_S = 10_000
STEP_S = 0.01
LAG_INTERVAL_S = 0.1
START_TIMEOUT_S = 90
DRAIN_TIMEOUT_S = 120
FILLS_PER_S_MIN = 5_000

_BOOKED = "SELECT coalesce(sum(next_offset), 0)::bigint FROM shard"
_COUNTED = "SELECT count(*) FROM ledger_entry WHERE kind = 'FILL'"
_DELIVERED = "SELECT -count(*) FROM outbox"
_AWARDS = "SELECT count(*) FROM badge_award"


@dataclass(slots=True)
class Course:
    """What happened while the fills flowed; times are of the monotonic clock. `windows[s]`: how many of the evaluators'
    flush windows took at most so many seconds."""

    began_s: float = 0.0
    produced_s: float = 0.0
    booked_s: float = 0.0
    told_s: float = 0.0
    sent_count: int = 0
    held_s: float = 0.0
    lags: list[int] = field(default_factory=list)
    windows: dict[float, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)


def run() -> None:
    with tempfile.TemporaryDirectory() as directory:
        ready_file = Path(directory) / "ready.json"
        program = [sys.executable, "-m", "navstream", "up", "--port", str(free_port()), "--ready-file", str(ready_file)]
        program += ["--feed", f"simulated:{QUOTES_PER_S}", "--evaluators", str(EVALUATORS_COUNT)]
        system = subprocess.Popen(program, env=os.environ | {"NAVSTREAM_LOG_LEVEL": "WARNING"})
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not ready_file.exists():
                assert system.poll() is None and time.monotonic() < deadline_s, "the system did not start"
                time.sleep(0.1)
            uvloop.run(_run(read_ready_file(ready_file), ready_file))
        finally:
            system.terminate()
            system.wait()


async def _run(ready: ReadyFile, ready_file: Path) -> None:
    database = await asyncpg.connect(postgres_dsn(ready.postgres_url))
    producer = make_producer(Settings().using(ready), "bench")
    await producer.start()
    sender = EventSender(producer, ready.topic)
    names = [f"p-{number:04d}" for number in range(PORTFOLIOS_COUNT)]
    openings = _openings(names)
    for value in openings:
        await sender.send(value)
    await sender.drain()
    await _at_least(database, _BOOKED, len(openings))
    fills = _fills(names, (FILLS_PER_S or UNPACED_PER_S) * DURATION_S)
    await asyncio.sleep(2)  # the quotes' own course, and the end of what openings left to do
    course = await _flow(database, sender, ready, fills, len(openings))
    await producer.stop()
    report = Report("pipeline")
    assert sender.failed_count == 0
    _report_flow(report, course)
    await _report_end(report, course, database)
    await database.close()
    for command in (("ledger", "verify"), ("badges", "verify"), ("reconcile",)):
        status = await _status(*command, "--ready-file", str(ready_file))
        report.add(Figure(f"exit status of `{' '.join(command)}`", status, "", at_most=0))
    report.finish()


def _openings(names: Sequence[str]) -> list[bytes]:
    now = datetime.now(UTC)
    opened = [
        OpenEvent(event_id=f"{name}-o", portfolio_id=name, owner="bench", name=name, base_currency="USD", opened_at=now)
        for name in names
    ]
    funded = [
        CashEvent(
            event_id=f"{name}-d", portfolio_id=name, kind="DEPOSIT", amount="100000", currency="USD", effective_at=now
        )
        for name in names
    ]
    return [encode_event(event) for event in (*opened, *funded)]


def _fills(names: Sequence[str], count: int) -> list[bytes]:
    """Buys and sells at random, of each portfolio in its own symbols of the catalogue."""
    choices = random.Random(1)
    symbols = [symbol for symbol in load_catalogue() if symbol in START_PRICES]
    of = {name: choices.sample(symbols, POSITIONS_COUNT) for name in names}
    now = datetime.now(UTC)
    return [_fill(choices, name := choices.choice(names), choices.choice(of[name]), at, now) for at in range(count)]


def _fill(choices: random.Random, name: str, symbol: str, number: int, now: datetime) -> bytes:
    price = float(START_PRICES[symbol]) * choices.uniform(0.98, 1.02)
    event = FillEvent(
        event_id=f"{name}-f{number}",
        portfolio_id=name,
        symbol=symbol,
        side=choices.choice(("BUY", "SELL")),
        quantity=str(choices.randint(1, 100)),
        price=f"{price:.4f}",
        fee="0.50",
        currency="USD",
        executed_at=now,
        order_id=f"o-{number}",
    )
    return encode_event(event)


async def _flow(
    database: asyncpg.Connection, sender: EventSender, ready: ReadyFile, fills: Sequence[bytes], before_count: int
) -> Course:
    """Send the fills at their pace; returns when the last one is booked and everybody is told."""
    course = Course()
    cpu_before, windows_before = _cpu_s(ready), _windows(ready)
    course.began_s = time.monotonic()
    watching = asyncio.create_task(_watch(database, course, before_count))
    await _produce(sender, fills, course)
    course.produced_s = time.monotonic()
    await sender.drain()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await _at_least(database, _BOOKED, before_count + course.sent_count)
    course.booked_s = time.monotonic()
    course.cpu_s = {role: spent - cpu_before[role] for role, spent in _cpu_s(ready).items()}
    course.windows = {bound_s: count - windows_before[bound_s] for bound_s, count in _windows(ready).items()}
    await _at_least(database, _DELIVERED, 0)
    course.told_s = time.monotonic()
    return course


async def _produce(sender: EventSender, fills: Sequence[bytes], course: Course) -> None:
    while (running_s := time.monotonic() - course.began_s) < DURATION_S and course.sent_count < len(fills):
        if course.lags and course.lags[-1] > LAG_COUNT_MAX:
            await asyncio.sleep(STEP_S)
            course.held_s += STEP_S
            continue
        due_count = int(FILLS_PER_S * running_s) if FILLS_PER_S else course.sent_count + LAG_COUNT_MAX // 10
        # Little at a time, so that the lag is known in time.
        for value in fills[course.sent_count : min(due_count, course.sent_count + LAG_COUNT_MAX // 10)]:
            await sender.send(value)
            course.sent_count += 1
        await asyncio.sleep(STEP_S)


async def _watch(database: asyncpg.Connection, course: Course, before_count: int) -> None:
    """How many events the ledger is behind, looked at every LAG_INTERVAL_S."""
    while True:
        booked_count = await database.fetchval(_BOOKED) - before_count
        course.lags.append(course.sent_count - booked_count)
        await asyncio.sleep(LAG_INTERVAL_S)


async def _at_least(database: asyncpg.Connection, query: str, count: int) -> None:
    """Until the query's figure is this, or more."""
    async with asyncio.timeout(DRAIN_TIMEOUT_S):
        while True:
            if await database.fetchval(query) >= count:
                return
            await asyncio.sleep(STEP_S)


def _report_flow(report: Report, course: Course) -> None:
    elapsed_s = course.booked_s - course.began_s
    rate = course.sent_count / elapsed_s
    pace = f"produced at {FILLS_PER_S:,}/s" if FILLS_PER_S else "produced as fast as they were booked"
    # Produced at the pace that is asked for, a rate ends just below it: the last fills are booked after the last one.
    least = FILLS_PER_S_MIN * DURATION_S / (DURATION_S + 1)
    report.add(Figure("fills booked", rate, "/s", at_least=least, note=f"{pace} for {DURATION_S} s"))
    report.add(Figure("from the last fill produced to the last one booked", course.booked_s - course.produced_s, "s"))
    report.add(Figure("the producer waited for the ledger", course.held_s, "s"))
    report.add(Figure("fills that the ledger was behind, p50", quantile(course.lags, 0.5), ""))
    report.add(Figure("fills that the ledger was behind, at most", max(course.lags), ""))
    report.add(Figure("badge messages all delivered after the last fill", course.told_s - course.booked_s, "s"))
    windows = sorted(course.windows.items())
    for share in (0.5, 0.99, 1):
        bound_s = next(bound_s for bound_s, count in windows if count >= share * windows[-1][1])
        report.add(Figure(f"flush windows beside it, {share:.0%} at most", bound_s * 1e3, "ms", note="of 10 ms"))
    for role, spent_s in sorted(course.cpu_s.items(), key=lambda of: -of[1]):
        report.add(Figure(f"CPU per fill: {role}", spent_s / course.sent_count * 1e6, "µs"))
    total_s = sum(course.cpu_s.values())
    report.add(Figure("CPU per fill: all", total_s / course.sent_count * 1e6, "µs"))
    report.add(Figure("cores busy with all this", total_s / elapsed_s, "cores"))


async def _report_end(report: Report, course: Course, database: asyncpg.Connection) -> None:
    lost = course.sent_count - await database.fetchval(_COUNTED)
    report.add(Figure("fills produced", course.sent_count, ""))
    report.add(Figure("of them not in the ledger in the end", lost, "", at_most=0))
    report.add(Figure("awards", await database.fetchval(_AWARDS), ""))


async def _status(*command: str) -> int:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "navstream", *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    if process.returncode:
        sys.stderr.write(output.decode())
    return process.returncode or 0


def _windows(ready: ReadyFile) -> dict[float, float]:
    counts: dict[float, float] = {}
    for role, url in ready.metrics_urls.items():
        if role.startswith("evaluator"):
            with urllib.request.urlopen(url) as answer:
                families = text_string_to_metric_families(answer.read().decode())
            for sample in (sample for family in families for sample in family.samples):
                if sample.name == "navstream_flush_window_seconds_bucket":
                    bound_s = float(sample.labels["le"])
                    counts[bound_s] = counts.get(bound_s, 0) + sample.value
    return counts


def _cpu_s(ready: ReadyFile) -> dict[str, float]:
    """CPU seconds so far of every process of the system, PostgreSQL with all its backends, and of the producer."""
    spent = {role: _spent_s(psutil.Process(pid)) for role, pid in ready.pids.items()}
    return spent | {"producer (this benchmark)": _own_s(psutil.Process())}


def _spent_s(process: psutil.Process) -> float:
    """Of the process and, where it is a server that forks, of its children, those that have ended included."""
    if process.name().startswith("postgres"):
        times = process.cpu_times()
        gone_s: float = times.children_user + times.children_system
        return _own_s(process) + gone_s + sum(_own_s(child) for child in process.children())
    return _own_s(process)


def _own_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    run()
