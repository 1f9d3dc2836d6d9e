"""Figures of a run: a table on the terminal and `benchmarks/results/<name>.json`."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure; `at_least` or `at_most` is the target, `beside` what stands next to it in this run."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass(slots=True)
class Report:
    name: str
    figures: list[Figure] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)

    def finish(self) -> None:
        table = Table(title=self.name)
        for column in ("figure", "value", "target", "", "note"):
            table.add_column(column, justify="right" if column in ("value", "target") else "left")
        for figure in self.figures:
            target = ""
            if figure.at_least is not None:
                target = f"≥ {figure.at_least:,.6g}"
            elif figure.at_most is not None:
                target = f"≤ {figure.at_most:,.6g}"
            verdict = {True: "met", False: "[red]missed[/red]", None: ""}[figure.met]
            table.add_row(figure.name, f"{figure.value:,.6g} {figure.unit}", target, verdict, figure.note)
        Console(width=150).print(table)
        RESULTS.mkdir(exist_ok=True)
        machine = {"cpu_count": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        body = {
            "name": self.name,
            "at": datetime.now(UTC).isoformat(),
            "machine": machine,
            "figures": [asdict(figure) for figure in self.figures],
        }
        (RESULTS / f"{self.name}.json").write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2))


def median_s(work: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds of this process for one call."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
