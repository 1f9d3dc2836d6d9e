"""One message from one mark, without hub or socket: the projection's bytes beside what Strawberry and graphql-core take
for the same selection, encoded as the gateway encodes it. Both see the same marks, of which each is another message."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import orjson

from api.projection import Projection, compile_projection
from benchmarks.report import Figure, Report, median_s
from engine.marks import MARK, Mark, Row, mark_of
from engine.runtime.settings import Settings
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, Info
from resolvers.schema import make_schema
from resolvers.stream_kind import StreamKind

MARKS_COUNT = 2_000
ROUNDS = 15
STOCK_ROUNDS = 5
EPOCH = 1
RATE_HZ = 1e9  # no waiting between two messages
PORTFOLIO = PortfolioIdentity("p-000001", 0, "ann", "name", "USD", datetime(2026, 1, 1, tzinfo=UTC))
SELECTIONS = {
    "nav, 6 fields": ("navUpdates", "nav cash positionsValue quality asOf sequence", 3.0),
    "pnl, 6 fields": ("pnlUpdates", "kind dayPnl dayPnlRatio unrealizedPnl realizedPnl sequence", None),
    "pnl with change": (
        "pnlUpdates",
        "dayPnl sequence change { nav price trading fees income flows corporateActions }",
        None,
    ),
}
_SCHEMA = make_schema()


def run() -> None:
    report = Report("projection")
    rows = _rows()
    for name, (root, selection, encode_us_max) in SELECTIONS.items():
        query = f'subscription {{ {root}(portfolioId: "p-000001", maxRateHz: {RATE_HZ}) {{ {selection} }} }}'
        stock = [asyncio.run(_stock(query, rows)) for _ in range(STOCK_ROUNDS)]
        stock_us, projection = statistics.median(each_us for each_us, _ in stock), stock[0][1]
        encode_us = _each_us(lambda projection=projection: _encode_all(projection, rows))
        values_us = _each_us(lambda projection=projection: [projection.values(row) for row in rows])
        report.add(Figure(f"{name}: encode", encode_us, "µs CPU", at_most=encode_us_max))
        report.add(Figure(f"{name}: values", values_us, "µs CPU", at_most=0.3 if encode_us_max else None))
        report.add(Figure(f"{name}: Strawberry", stock_us, "µs CPU", note="its loop of messages and orjson included"))
        report.add(Figure(f"{name}: Strawberry / encode", stock_us / encode_us, "×"))
    report.finish()


def _rows() -> list[Row]:
    """Marks that follow each other every 10 ms, with amounts of a million or so."""
    chance, rows = random.Random(5), []
    for number in range(MARKS_COUNT):
        values = {name: chance.randint(-(10**11), 10**12) for name in MARK.names or ()}
        values["day_pnl_ratio_e12"] = chance.randint(-(10**11), 10**11)
        values["as_of_ns"] = 1_795_342_800_123_456_000 + number * 10_000_000
        values["day_cut_at_ns"] = 1_795_305_600_000_000_000
        values["sequence"], values["ledger_sequence"], values["quality"] = number + 1, 17, 0
        rows.append(tuple(values.values()))
    return rows


def _each_us(work: Any) -> float:
    return median_s(work, ROUNDS) / MARKS_COUNT * 1e6


def _encode_all(projection: Projection, rows: list[Row]) -> list[bytes]:
    payloads, before = [], rows[-1]
    for row in rows:
        payloads.append(projection.encode("p-000001", row, EPOCH, StreamKind.UPDATE, 1, None, before))
        before = row
    return payloads


async def _stock(query: str, rows: list[Row]) -> tuple[float, Projection]:
    """CPU per message by graphql-core, and the projection that it could have been."""
    capture = _Capture()
    results = cast(AsyncIterator[Any], await _SCHEMA.subscribe(query, context_value=_context(rows, capture)))
    sizes, start_s = [], time.process_time()
    async for result in results:
        assert not result.errors, result.errors
        sizes.append(len(orjson.dumps({"data": result.data})))
        if len(sizes) == len(rows):
            break
    spent_s = time.process_time() - start_s
    await cast(Any, results).aclose()
    assert capture.projection is not None
    return spent_s / len(rows) * 1e6, capture.projection


class _Capture:
    """Compiles and does not deliver: graphql-core goes on."""

    projection: Projection | None = None

    def compile(self, info: Info) -> object | None:
        self.projection = compile_projection(info)
        return None


class _Watch:
    """Has the next mark as soon as one was taken."""

    current = True

    def __init__(self, marks: list[Mark], signal: asyncio.Event) -> None:
        self._marks = iter(marks)
        self._signal = signal
        signal.set()

    def take(self) -> tuple[Mark, int]:
        self._signal.set()
        return next(self._marks), 1

    def latency_ms(self, now_ns: int) -> None:
        return None


def _context(rows: list[Row], capture: _Capture) -> Context:
    @contextmanager
    def watch_portfolio(shard: int, portfolio_id: str, signal: asyncio.Event) -> Iterator[_Watch]:
        yield _Watch([mark_of(row, EPOCH) for row in rows], signal)

    async def find(_: str) -> PortfolioIdentity:
        return PORTFOLIO

    services = SimpleNamespace(
        hub=SimpleNamespace(watch_portfolio=watch_portfolio),
        settings=Settings().model_copy(update={"rate_hz_max": RATE_HZ}),
        portfolios=SimpleNamespace(find=find),
    )
    access = SimpleNamespace(holds=lambda scope: True, may_see=lambda owner: True)
    nothing = cast(Any, None)
    return Context(
        cast(Any, services), nothing, nothing, cast(Any, access), "bench", streaming=True, live=cast(Any, capture)
    )
