"""Revaluing the Book: tick by tick, and all at once for a window in which every asset ticked, on one core.

Tick by tick nothing is conflated: each asset's holders are valued by themselves, beside a Python loop over holders.

A window has one quote for each of the 500 assets: what came before within it is conflated, for everybody here alike.

    the Book            the quotes (symbol, Decimal, instant, condition) → every portfolio's positions_value, whole
                        micro-units, bit for bit; what changed; each asset's price, instant and quality
    mat-vec             the same quotes → a float vector, then scipy's sparse product of the whole book, floats as they
                        are: two lines, without what changed and without what is known of each price
    numpy               the same vector, gathered and multiplied
    Python loop         the same quotes, position by position, floats
    PostgreSQL          UPDATE of all prices and SUM(quantity * price) by portfolio, NUMERIC; CPU of its backend

The product alone is the Book's arithmetic without the quotes: the change of every portfolio's value from a vector,
added to its whole micro-units, beside the bare mat-vec.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import asyncpg
import numpy as np
import psutil
from scipy.sparse import csr_array

from benchmarks.report import Figure, Report, median_s
from benchmarks.seed_load import ASSETS_COUNT, POSITIONS_COUNT, Load, make_book, make_load
from engine.book import Book, Holding
from engine.book_window import PriceQuote, Way
from engine.runtime.connections import postgres_dsn
from engine.runtime.embedded import start_embedded
from engine.runtime.reaper import ChildProcesses

ROUNDS = 21
SQL_ROUNDS = 5
LOOP_ROUNDS = 5
LOOP_ASSETS_COUNT = 5
FILLS_COUNT = 2_000
WINDOWS_COUNT = 40


def run() -> None:
    report = Report("book")
    load = make_load()
    before = psutil.Process().memory_info().rss
    book = make_book(load)
    positions, bytes_held = book.positions_count, psutil.Process().memory_info().rss - before
    _tick_by_tick(report, load, book)
    _windows(report, load, book)
    _fills(report, load, book)
    report.add(Figure("memory, bytes per position", bytes_held / positions, "B", note="all of the Book; with scipy"))
    assert all(total == book.positions_value[book.slot(name)] for name, total in book.revalued())
    report.finish()


def _tick_by_tick(report: Report, load: Load, book: Book) -> None:
    steps = count(1)

    def all_assets_tick() -> None:
        step = next(steps)
        for asset, price in enumerate(load.prices):
            book.tick(load.symbol(asset), price + Decimal(step) / 100, step)

    book_s, positions = median_s(all_assets_tick, ROUNDS), book.positions_count
    holders = _holders(load)
    nav = [0.0] * len(load.held)
    looped = sum(len(holders[asset]) for asset in range(LOOP_ASSETS_COUNT))

    def python_loop() -> None:
        for asset in range(LOOP_ASSETS_COUNT):
            for number, held in holders[asset]:
                nav[number] += held * 0.01

    loop_s = median_s(python_loop, ROUNDS)
    note = "tick by tick, not conflated"
    report.add(Figure("Book, positions revalued per core-second", positions / book_s, "/s", at_least=80e6, note=note))
    report.add(Figure("Python loop over holders", looped / loop_s, "/s", note=note))
    report.add(Figure("Book, one tick on average", book_s / ASSETS_COUNT * 1e6, "µs", note=note))
    report.add(Figure("holders of the most popular asset", max(map(len, holders)), ""))


def _holders(load: Load) -> list[list[tuple[int, float]]]:
    holders: list[list[tuple[int, float]]] = [[] for _ in load.prices]
    for number in range(len(load.held)):
        for asset, held in zip(load.held[number].tolist(), load.quantities[number].tolist(), strict=True):
            holders[asset].append((number, float(held)))
    return holders


def _windows(report: Report, load: Load, book: Book) -> None:
    windows: list[list[PriceQuote]] = [
        [(load.symbol(asset), price + Decimal(step) / 100, step, "") for asset, price in enumerate(load.prices)]
        for step in range(1, WINDOWS_COUNT + 1)
    ]
    steps = count()

    def over_windows(work: Callable[[list[PriceQuote]], object], rounds: int = ROUNDS) -> float:
        return median_s(lambda: work(windows[next(steps) % WINDOWS_COUNT]), rounds)

    assets = {load.symbol(asset): asset for asset in range(len(load.prices))}
    ends = np.arange(0, load.held.size + 1, POSITIONS_COUNT)
    quantities = load.quantities.astype(np.float64)
    matrix = csr_array((quantities.ravel(), load.held.ravel(), ends), shape=(len(load.held), len(load.prices)))
    vector = np.zeros(len(load.prices))

    def read(window: list[PriceQuote]) -> None:
        for symbol, price, _, _ in window:
            vector[assets[symbol]] = float(price)

    def mat_vec(window: list[PriceQuote]) -> None:
        read(window)
        matrix @ vector

    def gather(window: list[PriceQuote]) -> None:
        read(window)
        (quantities * vector[load.held]).sum(axis=1)

    holders = _holders(load)

    def python_loop(window: list[PriceQuote]) -> None:
        nav = [0.0] * len(load.held)
        for symbol, price, _, _ in window:
            of = float(price)
            for number, held in holders[assets[symbol]]:
                nav[number] += held * of

    chosen_s, slices_s = over_windows(book.tick_all), over_windows(lambda window: book.tick_all(window, Way.SLICES))
    mat_vec_s, bare_s = over_windows(mat_vec), median_s(lambda: matrix @ vector, ROUNDS)
    product_s = _product_s(book)
    note = "500 quotes, every asset"
    report.add(Figure("window, the Book", chosen_s * 1e3, "ms", note=f"{note}: the product"))
    report.add(Figure("window, the Book by slices", slices_s * 1e3, "ms", note=note))
    report.add(Figure("window, scipy mat-vec", mat_vec_s * 1e3, "ms", note=f"{note}: floats"))
    report.add(Figure("window, numpy gather", over_windows(gather) * 1e3, "ms", note=f"{note}: floats"))
    report.add(
        Figure("window, Python loop", over_windows(python_loop, LOOP_ROUNDS) * 1e3, "ms", note=f"{note}: floats")
    )
    report.add(Figure("window, PostgreSQL", _sql_s(load) * 1e3, "ms", note=f"{note}: UPDATE and SUM, backend's CPU"))
    report.add(Figure("window: the Book against the mat-vec", chosen_s / mat_vec_s, "×", at_most=1.5))
    report.add(Figure("bare mat-vec", bare_s * 1e3, "ms", note="from a vector"))
    report.add(Figure("product into whole micro-units", product_s * 1e3, "ms", note="from a vector"))
    report.add(Figure("product against the bare mat-vec", product_s / bare_s, "×", at_most=1.5))


def _product_s(book: Book) -> float:
    columns = book._columns
    numbers, scales = np.arange(len(columns)), columns.scale[: len(columns)].copy()
    steps = count(1)
    product_s = median_s(lambda: book._move_all(numbers, scales + 10_000 * (next(steps) % 2)), ROUNDS)
    book._move_all(numbers, scales)
    return product_s


def _fills(report: Report, load: Load, book: Book) -> None:
    """What a fill does to the Book: of a position that is there, and one that opens and closes."""
    random = np.random.default_rng(1)
    numbers = random.integers(0, len(load.held), FILLS_COUNT).tolist()
    names = [load.portfolio_id(number) for number in numbers]
    held = [load.symbol(int(load.held[number, at % POSITIONS_COUNT])) for at, number in enumerate(numbers)]
    fills = [Holding(symbol, Decimal(at % 400 + 1), 5, 5) for at, symbol in enumerate(held)]

    def change() -> None:
        for name, holding in zip(names, fills, strict=True):
            book.set_position(name, holding)

    def open_and_close() -> None:
        for name in names:
            book.set_position(name, Holding("NEW", Decimal(3), 5, 5))
        for name in names:
            book.set_position(name, Holding("NEW", Decimal(0), 0, 5))

    report.add(Figure("fill of a position, in the Book", median_s(change, ROUNDS) / FILLS_COUNT * 1e6, "µs"))
    both_s = median_s(open_and_close, ROUNDS) / FILLS_COUNT
    report.add(Figure("a position opened and closed, in the Book", both_s * 1e6, "µs"))


def _sql_s(load: Load) -> float:
    with TemporaryDirectory() as directory, ChildProcesses() as children:
        Path(directory).chmod(0o755)  # as root, PostgreSQL runs as another account
        servers = start_embedded(children, None, redis=False, postgres=True, kafka=False)
        return asyncio.run(_sum_in_sql(postgres_dsn(servers.postgres_url), load))


async def _sum_in_sql(url: str, load: Load) -> float:
    connection = await asyncpg.connect(url)
    await connection.execute("SET max_parallel_workers_per_gather = 0")
    await connection.execute("CREATE UNLOGGED TABLE held (portfolio int, asset int, quantity numeric)")
    await connection.execute("CREATE UNLOGGED TABLE price (asset int PRIMARY KEY, price numeric)")
    rows = [
        (number, asset, Decimal(quantity))
        for number in range(len(load.held))
        for asset, quantity in zip(load.held[number].tolist(), load.quantities[number].tolist(), strict=True)
    ]
    await connection.copy_records_to_table("held", records=rows)
    await connection.copy_records_to_table("price", records=list(enumerate(load.prices)))
    await connection.execute("ANALYZE")
    backend = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()"))
    times = []
    for step in range(SQL_ROUNDS):
        start = sum(backend.cpu_times()[:2])
        prices = [price + Decimal(step) / 100 for price in load.prices]
        await connection.execute(
            "UPDATE price SET price = new.price FROM unnest($1::int[], $2::numeric[]) AS new (asset, price) "
            "WHERE price.asset = new.asset",
            list(range(len(prices))),
            prices,
        )
        await connection.fetch("SELECT portfolio, sum(quantity * price) FROM held JOIN price USING (asset) GROUP BY 1")
        times.append(sum(backend.cpu_times()[:2]) - start)
    await connection.close()
    return median(times)
