"""The whole system at the seed load: 20,000 portfolios × 15 positions, 2,000 quotes a second, 2,000 live subscriptions.

Every subscription asks for 4 messages a second. Two ages are measured at the client: of the mark (`asOf` until the
client has it) and of the news (`ts_event` of the oldest quote behind the mark's flush until the message was written,
which it says itself as `latencyMs`); quotes of one asset within one flush window are conflated, and so are marks within
a subscription's interval. A message shows the newest mark there is when the interval is over; its age is the time since
a quote last moved the portfolio and what the system took. The first of them is the market's: quotes of random assets
move a portfolio so many times a second that it is exponential, and is reported beside it. Dashboard queries go over
HTTP meanwhile, one after another, to random portfolios.
"""

from __future__ import annotations

import asyncio
import math
import sys

import orjson
import uvloop

from benchmarks.delivery import begin_count
from benchmarks.report import Figure, Report, quantile
from benchmarks.running_seed import RunningSeed, running_seed, servers
from benchmarks.seed_load import ASSETS_COUNT, POSITIONS_COUNT, make_load, portfolio_id
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings

QUOTES_PER_S = 2_000
SUBSCRIPTIONS = 2_000
PER_SOCKET = 4
RATE_HZ = 4.0
WARM_UP_S = 5
MEASURE_S = 20.0


def run() -> None:
    with servers() as (children, settings):
        uvloop.run(_run(children, settings))


async def _run(children: ChildProcesses, settings: Settings) -> None:
    report = Report("seed_system")
    async with running_seed(children, settings, make_load(), QUOTES_PER_S) as system:
        report.add(Figure("start of an evaluator with 300,000 positions to marks", system.start_s, "s"))
        await asyncio.sleep(WARM_UP_S)
        names = [portfolio_id(number) for number in range(SUBSCRIPTIONS)]
        counting = await begin_count(system.task(names, PER_SOCKET, RATE_HZ, MEASURE_S), system.pids["api"])
        before = system.cpu_s()
        latencies = await _dashboards(system)
        used = {role: (after - before[role]) / MEASURE_S for role, after in system.cpu_s().items()}
        tally, _ = await counting
        memory = system.rss_mb()
    assert not tally.failures, tally.failures
    for name, ages in (("mark", tally.as_of_ages_s), ("news", tally.latencies_s)):
        report.add(Figure(f"age of the {name} at the client, p50", quantile(ages, 0.5) * 1e3, "ms", at_most=25))
        report.add(Figure(f"age of the {name} at the client, p99", quantile(ages, 0.99) * 1e3, "ms", at_most=80))
    moves_per_s = QUOTES_PER_S * POSITIONS_COUNT / ASSETS_COUNT
    for share in (0.5, 0.99):
        name = f"time since a quote moved the portfolio, p{share * 100:.0f}"
        report.add(Figure(name, -math.log(1 - share) / moves_per_s * 1e3, "ms", note="of that age; the market's"))
    report.add(Figure("messages per subscription and second", tally.deliveries / tally.seconds / SUBSCRIPTIONS, "/s"))
    report.add(Figure("dashboard query, p50", quantile(latencies, 0.5) * 1e3, "ms", at_most=5))
    report.add(Figure("dashboard query, p99", quantile(latencies, 0.99) * 1e3, "ms", at_most=15))
    report.add(Figure("dashboard queries measured", len(latencies), ""))
    for role, share in used.items():
        report.add(Figure(f"CPU of {role}", share, "cores"))
    report.add(Figure("evaluator memory (RSS)", memory["evaluator"], "MB", at_most=400))
    report.add(Figure("API memory (RSS)", memory["api"], "MB"))
    report.finish()


async def _dashboards(system: RunningSeed) -> list[float]:
    """Seconds per query, measured in a process of its own: this one is busy being the market."""
    arguments = ["-m", "benchmarks.dashboard", str(system.settings.port), str(MEASURE_S)]
    client = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await client.communicate(system.token().encode())
    latencies: list[float] = orjson.loads(answer)
    return latencies
