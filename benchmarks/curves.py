"""How cost grows as work grows: one curve for each thing there can be more of, printed, and plotted to PNG.

    holders of an asset        CPU of the Book for one tick of it                            in this process
    quotes a second            CPU of the evaluator, age of the news at the client           the whole system
    subscribers                CPU of the API for a delivery, age of the mark at the client  the whole system
    portfolios                 CPU of the evaluator, age of the news at the client           the whole system

The plots go to `benchmarks/results/curves.png` where matplotlib is installed; without it they are left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import uvloop

from benchmarks.delivery import begin_count
from benchmarks.report import RESULTS, Figure, Report, median_s, quantile
from benchmarks.running_seed import RunningSeed, running_seed, servers
from benchmarks.seed_load import Load, make_book, make_load, portfolio_id
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings

HOLDERS = (100, 300, 1_000, 3_000, 10_000, 14_000)
QUOTES_PER_S = (250, 500, 1_000, 2_000)
SUBSCRIBERS = (500, 1_000, 2_000, 4_000)
PORTFOLIOS = (5_000, 10_000, 20_000, 40_000)
SEED_PORTFOLIOS = 20_000
SEED_QUOTES_PER_S = 500
SEED_SUBSCRIBERS = 1_000
PER_SOCKET = 4
RATE_HZ = 4.0
ROUNDS = 21
WARM_UP_S = 3
MEASURE_S = 8.0


@dataclass(slots=True)
class Curve:
    """`lines`: what was measured at each `x`, by name and unit."""

    name: str
    xs: list[int] = field(default_factory=list)
    lines: dict[str, list[float]] = field(default_factory=dict)

    def add(self, x: int, **measured: float) -> None:
        self.xs.append(x)
        for name, value in measured.items():
            self.lines.setdefault(name, []).append(value)


def run() -> None:
    report = Report("curves")
    load = make_load()
    curves = [_holders(load)]
    quotes, subscribers, portfolios = (Curve(name) for name in ("quotes a second", "subscribers", "portfolios"))
    with servers() as (children, settings):
        for number, rate in enumerate(QUOTES_PER_S):
            measured = _system(children, settings, load, rate, SEED_SUBSCRIBERS, prepared=number > 0)
            quotes.add(rate, **measured)
        for watching in SUBSCRIBERS:
            subscribers.add(watching, **_system(children, settings, load, SEED_QUOTES_PER_S, watching, prepared=True))
    for size in PORTFOLIOS:
        with servers() as (children, settings):
            sized = make_load(size)
            portfolios.add(size, **_system(children, settings, sized, SEED_QUOTES_PER_S, SEED_SUBSCRIBERS))
    curves += [quotes, subscribers, portfolios]
    for curve in curves:
        for line, values in curve.lines.items():
            for x, value in zip(curve.xs, values, strict=True):
                label, _, unit = line.rpartition("_")
                report.add(Figure(f"{x:,} {curve.name}: {label.replace('_', ' ')}", value, unit))
    report.finish()
    _plot(curves)


def _holders(load: Load) -> Curve:
    book, curve = make_book(load), Curve("holders of the ticked asset")
    sizes = {len(book.holders(load.symbol(asset))): asset for asset in range(len(load.prices))}
    step = [0]
    for wanted in HOLDERS:
        size = min(sizes, key=lambda count: abs(count - wanted))
        symbol, price = load.symbol(sizes[size]), load.prices[sizes[size]]

        def tick(symbol: str = symbol, price: Decimal = price) -> None:
            step[0] += 1
            book.tick(symbol, price + Decimal(step[0]) / 100, step[0])

        curve.add(size, CPU_of_a_tick_µs=median_s(tick, ROUNDS) * 1e6)
    return curve


def _system(
    children: ChildProcesses, settings: Settings, load: Load, quotes_per_s: int, watching: int, prepared: bool = False
) -> dict[str, float]:
    return uvloop.run(_measured(children, settings, load, quotes_per_s, watching, prepared))


async def _measured(
    children: ChildProcesses, settings: Settings, load: Load, quotes_per_s: int, watching: int, prepared: bool
) -> dict[str, float]:
    async with running_seed(children, settings, load, quotes_per_s, prepared) as system:
        await asyncio.sleep(WARM_UP_S)
        return await _watched(system, [portfolio_id(number) for number in range(watching)])


async def _watched(system: RunningSeed, names: Sequence[str]) -> dict[str, float]:
    counting = await begin_count(system.task(names, PER_SOCKET, RATE_HZ, MEASURE_S), system.pids["api"])
    before = system.cpu_s()
    tally, api_s = await counting
    after = system.cpu_s()
    assert not tally.failures, tally.failures
    return {
        "CPU_of_the_evaluator_% of a core": (after["evaluator"] - before["evaluator"]) / MEASURE_S * 100,
        "CPU_of_the_API_for_a_delivery_µs": api_s / tally.deliveries * 1e6,
        "age_of_the_mark_p50_ms": quantile(tally.as_of_ages_s, 0.5) * 1e3,
        "age_of_the_mark_p99_ms": quantile(tally.as_of_ages_s, 0.99) * 1e3,
        "age_of_the_news_p99_ms": quantile(tally.latencies_s, 0.99) * 1e3,
    }


def _plot(curves: Sequence[Curve]) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("not plotted: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for curve, axis in zip(curves, axes.flat, strict=True):
        axis.set_xlabel(curve.name)
        for line, values in curve.lines.items():
            label, _, unit = line.rpartition("_")
            axis.plot(curve.xs, values, marker="o", label=f"{label.replace('_', ' ')} [{unit}]")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle("navstream: how cost grows as work grows")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "curves.png", dpi=110)
    print(f"plotted to {RESULTS / 'curves.png'}")
