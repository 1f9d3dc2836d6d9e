"""A portfolio's past from PostgreSQL, against what a scripted life really was at each step."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from engine.as_of import Cycle, LedgerState, effects_of
from engine.instants import to_ns
from engine.stores import as_of_reads
from engine.stores.as_of_reads import AsOfReads, Baseline
from engine.stores.ledger_rows import write_entries
from tests.builders import MICRO, LedgerBuilder
from tests.scripted_ledger import BEGIN, HOUR, ScriptedLedger, lived


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(database, min_size=1, max_size=4) as pool:
        yield pool


@pytest.fixture
def reads(pool: asyncpg.Pool) -> AsOfReads:
    return AsOfReads(lambda: pool)


async def booked(pool: asyncpg.Pool, script: ScriptedLedger, day_cut: str = "00:00 UTC") -> None:
    await LedgerBuilder(pool).portfolio(script.portfolio_id, opened_at=BEGIN)
    await pool.execute("UPDATE portfolio SET day_cut = $2 WHERE id = $1", script.portfolio_id, day_cut)
    await script.write(pool)


def figures(state: LedgerState) -> dict[str, int]:
    names = ("cash", "receivables", "realized", "fees", "income", "flows", "trading", "corporate")
    return {name: getattr(state, name) for name in names}


@pytest.mark.parametrize("seed", range(3))
async def test_every_past_position_is_what_it_was(pool: asyncpg.Pool, reads: AsOfReads, seed: int) -> None:
    """Both ways there: forward over the first half, unrolled over the second."""
    script, moments = lived(f"p-lived-{seed}", seed)
    await booked(pool, script)
    for moment in moments:
        state = await reads.state(script.portfolio_id, moment.ledger_sequence)
        assert state.ledger_sequence == moment.ledger_sequence
        assert figures(state) == moment.figures
        held = {symbol: (one.quantity, one.cost) for symbol, one in state.positions.items()}
        assert held == {symbol: (one.quantity, one.cost) for symbol, one in moment.positions.items()}
        cycles = await reads.cycles(script.portfolio_id, moment.ledger_sequence, list(held))
        assert cycles == {
            symbol: Cycle(one.realized, one.fees, to_ns(one.opened_at), one.opened_sequence)
            for symbol, one in moment.positions.items()
        }
    kinds = {(entry.kind, entry.reverses is None, entry.scale is None) for entry in script.entries}
    assert len(kinds) >= 12
    assert script.closed


async def test_the_sums_of_sql_are_those_of_the_entries(pool: asyncpg.Pool, reads: AsOfReads) -> None:
    script, _ = lived("p-sums", 9)
    await booked(pool, script)
    last = len(script.entries)
    for after, until in ((0, last), (0, 1), (3, 90), (100, last), (last, last), (50, 20)):
        expected = effects_of(script.entries[after:until])
        assert await reads.effects(script.portfolio_id, after, until) == expected


async def test_where_the_ledger_was_at_each_instant(pool: asyncpg.Pool, reads: AsOfReads) -> None:
    script, _ = lived("p-instants", 4, steps=60)
    await booked(pool, script)
    for entry in script.entries:
        for at in (entry.recorded_at - timedelta(microseconds=1), entry.recorded_at):
            expected = sum(one.recorded_at <= at for one in script.entries)
            assert (await reads.ledger_at(script.portfolio_id, at)).ledger_sequence == expected
    far = await reads.ledger_at(script.portfolio_id, BEGIN + timedelta(days=9_000))
    assert (far.ledger_sequence, far.day_cut) == (60, "00:00 UTC")
    assert (await reads.ledger_at(script.portfolio_id, BEGIN - HOUR)).ledger_sequence == 0
    with pytest.raises(KeyError):
        await reads.ledger_at("p-nobody", BEGIN)
    with pytest.raises(KeyError):
        await reads.state("p-nobody", 1)


async def test_at_a_snapshot_the_ledger_is_where_the_snapshot_was(pool: asyncpg.Pool, reads: AsOfReads) -> None:
    """An entry may be recorded a moment before or after the instant that it was left out of or taken into."""
    script = ScriptedLedger("p-grid")
    for minute in range(1, 9):
        script.at = BEGIN + timedelta(minutes=minute)
        script.cash("DEPOSIT", "1")
    await booked(pool, script)
    builder, minute = LedgerBuilder(pool), timedelta(minutes=1)

    async def ledger_at(minutes: float) -> int:
        return (await reads.ledger_at("p-grid", BEGIN + minutes * minute)).ledger_sequence

    assert [await ledger_at(minutes) for minutes in (2, 4, 6)] == [3, 5, 7]
    await builder.snapshots("p-grid", {BEGIN + 4 * minute: "1"}, ledger_sequence=4)
    assert [await ledger_at(minutes) for minutes in (3, 3.9, 4, 4.01, 6)] == [4, 4, 4, 5, 7]
    await builder.snapshots("p-grid", {BEGIN + 6 * minute: "1"}, ledger_sequence=8)
    assert [await ledger_at(minutes) for minutes in (5, 5.9, 6, 6.5, 7)] == [6, 6, 8, 8, 8]
    await builder.snapshots("p-grid", {BEGIN + 20 * minute: "1"}, ledger_sequence=99)
    assert await ledger_at(20) == 9


async def test_the_day_begins_at_the_stored_baseline(pool: asyncpg.Pool, reads: AsOfReads) -> None:
    script = ScriptedLedger("p-day")
    script.cash("DEPOSIT", "1000")
    script.quote("KO", "50")
    script.fill("KO", "BUY", "10", "50")
    cut_at = BEGIN + timedelta(hours=14, minutes=30)
    await booked(pool, script)
    assert await reads.baseline("p-day", cut_at) is None
    await pool.execute(
        "INSERT INTO day_baseline VALUES ('p-day', $1, 1001.5, 3, '{KO,TSLA}', '{501.5,-7}', false)", cut_at
    )
    start = await reads.baseline("p-day", cut_at)
    assert start == Baseline(1_001_500_000, 3, {"KO": 501_500_000, "TSLA": -7 * MICRO})
    script.at = cut_at + HOUR
    script.cash("WITHDRAWAL", "100")
    script.fill("KO", "SELL", "4", "52")
    async with pool.acquire() as connection:
        await write_entries(connection, script.entries[3:])
    day = await reads.since("p-day", start, cut_at, 5)
    assert (day.cut_at_ns, day.nav) == (to_ns(cut_at), 1_001_500_000)
    assert day.flows == [(1_000 * MICRO, -100 * MICRO)]
    assert [day.base(symbol) for symbol in ("KO", "TSLA", "AAPL")] == [501_500_000 - 208 * MICRO, -7 * MICRO, 0]
    before = await reads.since("p-day", start, cut_at, 3)
    assert (before.flows, before.effects) == ([], {})


async def test_a_split_counts_from_when_the_ledger_has_it(pool: asyncpg.Pool, reads: AsOfReads) -> None:
    """By the holder's own entry; for whoever held nothing, by when the shard took it."""
    script = ScriptedLedger("p-split")
    script.cash("DEPOSIT", "1000")
    script.quote("XOM", "50")
    script.fill("XOM", "BUY", "10", "50")
    script.wait()
    script.split("XOM", Fraction(2), late_by=timedelta(minutes=20))
    took_at, effective_at = script.at, script.at - timedelta(minutes=20)
    script.wait()
    await booked(pool, script)
    bystander = "p-split-bystander"
    await LedgerBuilder(pool).portfolio(bystander, opened_at=BEGIN)
    known = {"XOM": ((to_ns(effective_at), "2:1"),)}
    symbols = ["XOM", "CVX"]
    assert await reads.splits("p-split", symbols, 3, took_at + HOUR) == {}
    assert await reads.splits("p-split", symbols, 4, took_at - HOUR) == known
    assert await reads.splits(bystander, symbols, 0, took_at - timedelta(microseconds=1)) == {}
    assert await reads.splits(bystander, symbols, 0, took_at) == known
    assert await reads.splits(bystander, ["CVX"], 0, took_at) == {}


async def test_a_long_ledger_is_not_folded_for_yesterday(
    pool: asyncpg.Pool, reads: AsOfReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30,000 entries, asked for ten entries ago: PostgreSQL touches those and little more."""
    read_effects, spans = as_of_reads._read_effects, []

    async def spy(connection: Any, portfolio_id: str, after: int, last: int) -> Any:
        spans.append((after, last))
        return await read_effects(connection, portfolio_id, after, last)

    monkeypatch.setattr(as_of_reads, "_read_effects", spy)
    script = ScriptedLedger("p-long")
    script.cash("DEPOSIT", "1000000")
    script.quote("KO", "50")
    script.fill("KO", "BUY", "100", "50")
    await booked(pool, script)
    await _lengthen(pool, "p-long", 30_000)
    state = await reads.state("p-long", 29_990)
    assert (state.positions["KO"].quantity, state.cash) == (Decimal(100 + 29_987), 995_000 * MICRO)
    assert await _rows_read(pool, "p-long", 29_990) < 100
    assert (await reads.state("p-long", 12)).positions["KO"].quantity == 109
    assert spans == [(29_990, 30_000), (0, 12)]


async def _lengthen(pool: asyncpg.Pool, portfolio_id: str, last: int) -> None:
    """Continue a ledger of three entries with buys of 1 for nothing, a second apart."""
    await pool.execute(
        "INSERT INTO ledger_entry SELECT portfolio_id, s, event_id || s, kind, symbol, side, 1, price, scale, 0, 0, 0,"
        " 0, 0, 0, cash_after, NULL, effective_at, recorded_at + s * interval '1 second', false, NULL, NULL,"
        " content_hash, hash FROM ledger_entry, generate_series(4, $2::bigint) AS s WHERE portfolio_id = $1"
        " AND sequence = 3",
        portfolio_id,
        last,
    )
    await pool.execute("UPDATE portfolio SET ledger_sequence = $2 WHERE id = $1", portfolio_id, last)
    await pool.execute(
        "UPDATE position SET quantity = 100 + $2::bigint - 3 WHERE portfolio_id = $1", portfolio_id, last
    )
    await pool.execute("ANALYZE ledger_entry")


async def _rows_read(pool: asyncpg.Pool, portfolio_id: str, sequence: int) -> int:
    """How many ledger rows the statement behind `state` takes from the table."""
    plan = await pool.fetch(f"EXPLAIN (ANALYZE) {as_of_reads._EFFECTS}", portfolio_id, sequence, 2**62)
    (scan,) = [row[0] for row in plan if " on ledger_entry" in row[0]]
    return int(float(re.findall(r"rows=([0-9.]+)", scan)[-1]))
