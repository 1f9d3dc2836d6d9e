"""The ledger at 10 million entries: `ledger(first: 50)` anywhere in it, with and without filters.

20,000 portfolios have 451 entries each, one of them a million; entries lie in the table as they were booked, those of
all portfolios mixed. Queries go over HTTP to one API process, one after another, at random depths; the client runs
on the same cores. The figures of the large portfolio stand apart: a filter that matches nothing in it is the worst
there is, because no page ends the search early.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import orjson
import uvloop

from api.auth import issue_token
from benchmarks.dashboard import post
from benchmarks.history import LOG_ID, until_listening
from benchmarks.report import Figure, Report, quantile
from benchmarks.seed_load import ASSET_COLUMNS
from engine.runtime.connections import make_engine
from engine.runtime.embedded import start_embedded
from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores.migrate import upgrade
from engine.stores.shards_postgres import Shards
from resolvers.pages import write_cursor

PORTFOLIOS_COUNT = 20_000
ROUNDS_COUNT = 451
ROUNDS_AT_ONCE = 11
# p-0 books so many entries while everybody else books one.
LARGE_PER_ROUND = 2_218
LARGE_COUNT = ROUNDS_COUNT * LARGE_PER_ROUND
SHARDS = 4
QUERIES_COUNT = 400
WARM_UP_COUNT = 40
OPENED_AT = datetime(2025, 1, 1, tzinfo=UTC)
SPAN = timedelta(days=600)

PAGE = """query Page($id: String!, $after: String, $filter: LedgerFilter) { portfolio(portfolioId: $id) {
  ledger(first: 50, after: $after, filter: $filter) { pageInfo { hasNextPage endCursor } edges { cursor node {
    id sequence kind symbol side quantity price scale amount fee receivable realizedPnl navEffect cashAfter effectiveAt
    recordedAt late eventId reference reverses reversedBy hash } } } } }"""

_PORTFOLIOS = """
    INSERT INTO portfolio (id, shard, owner, name, base_currency, day_cut, opened_at, cash, realized, fees, income,
        flows, receivables, trading, corporate, ledger_sequence, ledger_hash)
    SELECT 'p-' || n, n % $2, 'owner', 'p-' || n, 'USD', '00:00 UTC', $3, 0, 0, 0, 0, 0, 0, 0, 0,
        CASE n WHEN 0 THEN $5::int ELSE $4::int END, '\\x00'
    FROM generate_series(0, $1 - 1) AS n
"""
# Of a portfolio's entries most are fills in 15 symbols; the numbers are made so that each filter of the benchmark
# has matches all over the ledger, or none.
_ENTRIES = """
    INSERT INTO ledger_entry (portfolio_id, sequence, event_id, kind, symbol, side, quantity, price, scale, amount, fee,
        receivable, realized, cost, nav_effect, cash_after, nav_before, effective_at, recorded_at, late, reference,
        reverses, content_hash, hash)
    SELECT 'p-' || p, n, p || '-' || n, kind,
        CASE kind WHEN 'FILL' THEN 'A' || (p + n) % 15 END,
        CASE kind WHEN 'FILL' THEN CASE n % 3 WHEN 0 THEN 'SELL' ELSE 'BUY' END END,
        CASE kind WHEN 'FILL' THEN 1 + n % 90 END, CASE kind WHEN 'FILL' THEN 100.25 END, NULL,
        CASE kind WHEN 'OPEN' THEN 0 WHEN 'FILL' THEN (1 + n % 90) * CASE n % 3 WHEN 0 THEN 100.25 ELSE -100.25 END
            ELSE 10 + n % 7 END,
        CASE kind WHEN 'FILL' THEN 1 ELSE 0 END, 0, n % 5, n % 7, -1, n, NULL,
        at, at + interval '1 second', false, CASE n % 4 WHEN 0 THEN 'order-' || n END, NULL,
        sha256(int8send(n)), sha256(int8send(p::bigint * 10000000 + n))
    FROM (
        SELECT p, round AS n, $3::timestamptz + round * $4::interval + p * $4::interval / $6 AS at
        FROM generate_series($1::bigint, $2::bigint) AS round, generate_series(1, $6 - 1) AS p
        UNION ALL
        SELECT 0, (round - 1) * $5 + part, $3::timestamptz + round * $4::interval + part * $4::interval / $5
        FROM generate_series($1::bigint, $2::bigint) AS round, generate_series(1, $5) AS part
    ) AS booked, LATERAL (
        SELECT CASE WHEN n = 1 THEN 'OPEN' WHEN n = 2 THEN 'DEPOSIT' WHEN n % 50 = 0 THEN 'INTEREST' ELSE 'FILL' END
    ) AS chosen (kind)
    ORDER BY at
"""


def run() -> None:
    with ChildProcesses() as children:
        servers = start_embedded(children)
        settings = Settings(
            redis_url=servers.redis_url,
            postgres_url=servers.postgres_url,
            kafka_bootstrap=servers.kafka_bootstrap,
            kafka_log_id=LOG_ID,
            jwt_secret="benchmarks only, nothing is behind this",  # type: ignore[arg-type]
            port=free_port(),
            log_level="WARNING",
        )
        uvloop.run(_run(children, settings))


async def _run(children: ChildProcesses, settings: Settings) -> None:
    report = Report("ledger")
    report.add(Figure("entries", await fill_database(settings), "rows"))
    environment = os.environ | settings.environment() | {"NAVSTREAM_KAFKA_LOG_ID": LOG_ID}
    children.spawn("api", [sys.executable, "-m", "navstream", "api"], env=environment)
    await until_listening(settings)
    await measure(settings, report)
    report.finish()


async def fill_database(settings: Settings) -> int:
    """Everybody's entries; returns how many there are."""
    await upgrade(settings.postgres_url)
    engine = make_engine(settings, "bench")
    await Shards(engine, "bench", 1_000).ensure(SHARDS, LOG_ID)
    await engine.dispose()
    connection = await asyncpg.connect(settings.postgres_url)
    assets = [(f"A{number}", f"A{number}", "EQUITY", "Sector", "") for number in range(15)]
    await connection.copy_records_to_table("asset", records=assets, columns=ASSET_COLUMNS)
    await connection.execute(_PORTFOLIOS, PORTFOLIOS_COUNT, SHARDS, OPENED_AT, ROUNDS_COUNT, LARGE_COUNT)
    step = SPAN / ROUNDS_COUNT
    for first in range(1, ROUNDS_COUNT + 1, ROUNDS_AT_ONCE):
        last = first + ROUNDS_AT_ONCE - 1
        await connection.execute(_ENTRIES, first, last, OPENED_AT, step, LARGE_PER_ROUND, PORTFOLIOS_COUNT)
    await connection.execute("VACUUM ANALYZE")
    count: int = await connection.fetchval("SELECT count(*) FROM ledger_entry")
    await connection.close()
    return count


async def measure(settings: Settings, report: Report) -> None:
    random_ = random.Random(1)
    for name, queries, at_most in _plans(random_):
        latencies, found = await _latencies(settings, queries)
        note = f"{found:.1f} entries a page"
        report.add(Figure(f"{name}, p50", quantile(latencies, 0.5) * 1e3, "ms", note=note))
        report.add(Figure(f"{name}, p99", quantile(latencies, 0.99) * 1e3, "ms", at_most=at_most))


Query = dict[str, Any]


def _plans(random_: random.Random) -> Iterator[tuple[str, Iterator[Query], float | None]]:
    """What is measured: its name, its queries' variables, and the target for p99 in ms."""

    def anywhere(chosen: Callable[[int, int], dict[str, Any] | None], large: bool = False) -> Iterator[Query]:
        while True:
            number = 0 if large else random_.randrange(1, PORTFOLIOS_COUNT)
            last = LARGE_COUNT if large else ROUNDS_COUNT
            depth = random_.randrange(1, last + 2)
            after = None if depth > last else write_cursor("ledger", depth)
            yield {"id": f"p-{number}", "after": after, "filter": chosen(number, depth)}

    def first_page(chosen: dict[str, Any]) -> Iterator[Query]:
        while True:
            yield {"id": "p-0", "after": None, "filter": chosen}

    def month(_number: int, _depth: int) -> dict[str, Any]:
        begin = OPENED_AT + random_.random() * (SPAN - timedelta(days=30))
        return {"from": begin.isoformat(), "to": (begin + timedelta(days=30)).isoformat()}

    yield "any page", anywhere(lambda *_: None), 10
    yield "any page of 1M", anywhere(lambda *_: None, large=True), 10
    yield "any page of 1M, a symbol", anywhere(lambda *_: {"symbol": "A3"}, large=True), 10
    yield "any page of 1M, a rare kind", anywhere(lambda *_: {"kinds": ["INTEREST"]}, large=True), 10
    yield "any page of 1M, a side", anywhere(lambda *_: {"side": "SELL"}, large=True), 10
    yield "any page of 1M, an amount", anywhere(lambda *_: {"minAmount": "8900"}, large=True), 10
    yield "any page, effective within a month", anywhere(month), 10
    yield "any page, an amount that nothing has", anywhere(lambda *_: {"minAmount": "10000"}), 10
    yield "any page, a symbol and a month", anywhere(lambda *of: {"symbol": "A3", **month(*of)}), 10
    for name, chosen in {
        "a symbol": {"symbol": "NONE"},
        "a kind": {"kinds": ["WITHDRAWAL", "REWARD"]},
        "a day recorded": {"recordedFrom": "2024-01-01T00:00:00Z", "recordedTo": "2024-01-02T00:00:00Z"},
        "a day effective": {"from": "2024-01-01T00:00:00Z", "to": "2024-01-02T00:00:00Z"},
        "an amount": {"minAmount": "10000"},
        "reversals": {"reversals": True},
    }.items():
        yield f"nothing in 1M matches {name}", first_page(chosen), None
    yield "1M, oldest month effective", first_page({"to": (OPENED_AT + timedelta(days=30)).isoformat()}), None


async def _latencies(settings: Settings, queries: Iterator[Query]) -> tuple[list[float], float]:
    """Seconds of each query once the process is warm, and how many entries a page had on average."""
    token = issue_token(settings, "bench", "admin", 3_600, datetime.now(UTC))
    reader, writer = await asyncio.open_connection("127.0.0.1", settings.port)
    latencies: list[float] = []
    found = 0
    budget_ends_s = time.monotonic() + 30
    while len(latencies) < WARM_UP_COUNT + QUERIES_COUNT and time.monotonic() < budget_ends_s:
        variables = next(queries)
        start_s = time.perf_counter()
        body = await post(reader, writer, token, {"query": PAGE, "variables": variables})
        latencies.append(time.perf_counter() - start_s)
        answer = orjson.loads(body)
        assert "errors" not in answer, answer
        found += len(answer["data"]["portfolio"]["ledger"]["edges"])
    writer.close()
    return latencies[min(WARM_UP_COUNT, len(latencies) // 2) :], found / len(latencies)
