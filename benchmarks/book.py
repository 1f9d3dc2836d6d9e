"""Revaluing holders on a tick: the Book's column against a Python loop and the two-line mat-vec, on one core.

Every tick is applied by itself; nothing is conflated. The mat-vec revalues the whole book at once, so it is given
its positions per second for a window in which every asset ticked, and so is the Book.
"""

from __future__ import annotations

import resource
from decimal import Decimal

import numpy as np

from benchmarks.report import Figure, Report, median_s
from benchmarks.seed_load import ASSETS_COUNT, make_book, make_load

ROUNDS = 7
LOOP_ASSETS_COUNT = 5


def run() -> None:
    report = Report("book")
    load = make_load()
    book = make_book(load)
    positions = book.positions_count
    state = {"step": 0}

    def all_assets_tick() -> None:
        state["step"] += 1
        for asset, price in enumerate(load.prices):
            book.tick(load.symbol(asset), price + Decimal(state["step"]) / 100, state["step"])

    book_s = median_s(all_assets_tick, ROUNDS)
    quantity = load.quantities.astype(np.float64)
    prices = np.array([float(price) for price in load.prices])

    def mat_vec() -> None:
        np.rint((quantity * prices[load.held]) * 1e6).astype(np.int64).sum(axis=1)

    mat_vec_s = median_s(mat_vec, ROUNDS)
    holders: dict[int, list[tuple[int, float]]] = {}
    for number in range(len(load.held)):
        for asset, held in zip(load.held[number].tolist(), load.quantities[number].tolist(), strict=True):
            holders.setdefault(asset, []).append((number, float(held)))
    nav = [0.0] * len(load.held)
    looped = sum(len(holders[asset]) for asset in range(LOOP_ASSETS_COUNT))

    def python_loop() -> None:
        for asset in range(LOOP_ASSETS_COUNT):
            for number, held in holders[asset]:
                nav[number] += held * 0.01

    loop_s = median_s(python_loop, ROUNDS)
    report.add(Figure("Book, positions revalued per core-second", positions / book_s, "/s", at_least=40e6))
    report.add(Figure("Python loop over holders", looped / loop_s, "/s"))
    report.add(
        Figure("numpy gather mat-vec of the whole book", positions / mat_vec_s, "/s", note="floats rounded once")
    )
    report.add(Figure("Book, one tick on average", book_s / ASSETS_COUNT * 1e6, "µs", note="not conflated"))
    report.add(Figure("holders of the most popular asset", max(map(len, holders.values())), ""))
    report.add(Figure("Book against the Python loop", (positions / book_s) / (looped / loop_s), "×"))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report.add(Figure("memory of this process at its peak", peak_mb, "MB", note="the load's own arrays included"))
    report.finish()
