"""Reading the ledger, its portfolios and snapshots from a real server, exactly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from engine.amounts import from_micro
from engine.assets import Asset, AssetClass
from engine.equity_curve import Flow, Resolution
from engine.instants import to_ns
from engine.ledger import LedgerEntry, LedgerKind, Side
from engine.performance import Trades
from engine.stores.ledger_reads import HeldCycle, LedgerReads, ShownEntry
from engine.stores.ledger_selection import LedgerSelection, SelectionError, check_selection, conditions
from engine.stores.snapshots_reads import SnapshotsReads
from tests.builders import OPENED_AT, LedgerBuilder
from tests.scripted_ledger import BEGIN, HOUR, ScriptedLedger


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(database, min_size=1, max_size=2) as made:
        yield made


async def test_portfolios(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    for name, owner, shard in (("a-1", "eve", 1), ("a-2", "bob", 2), ("a-3", "eve", 3), ("a-4", "eve", 1)):
        await builder.portfolio(name, owner, shard)
    found = await reads.portfolio("a-3")
    assert found is not None
    assert (found.owner, found.shard, found.base_currency, found.opened_at) == ("eve", 3, "USD", OPENED_AT)
    assert await reads.portfolio("none") is None

    async def ids(owner: str | None, count_max: int, after: str = "") -> list[str]:
        return [row.portfolio_id for row in await reads.portfolios(owner, count_max, after)]

    assert await ids("eve", 2) == ["a-1", "a-3"]
    assert await ids("eve", 2, "a-3") == ["a-4"]
    assert await ids(None, 3, "a-1") == ["a-2", "a-3", "a-4"]
    assert await ids("nobody", 9) == []


async def test_ledger(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    await builder.portfolio("b-1")
    await builder.deposit("b-1", 1, "12345678901234567890.123456")
    await builder.fill("b-1", 2, "AAPL", "BUY", "0.000000000001")
    await builder.fill("b-1", 3, "AAPL", "SELL", "2")
    newest, middle, oldest = [shown.entry for shown in await reads.page("b-1", 9)]
    assert [newest.sequence, middle.sequence, oldest.sequence] == [3, 2, 1]
    assert oldest.amount == 12345678901234567890123456
    assert (oldest.kind, oldest.symbol, oldest.side, oldest.quantity) == (LedgerKind.DEPOSIT, None, None, None)
    assert str(middle.quantity) == "1E-12"
    assert (newest.side, newest.fee, newest.nav_before) == (Side.SELL, 1_000_000, None)
    assert newest.recorded_at == OPENED_AT + timedelta(minutes=3, seconds=1)
    assert sequences(await reads.page("b-1", 1, before=3)) == [2]
    assert sequences(await reads.after("b-1", 1, 1)) == [2]
    assert sequences(await reads.after("b-1", 3, 9)) == []
    sells = LedgerSelection(kinds=[LedgerKind.FILL], side=Side.SELL)
    assert sequences(await reads.page("b-1", 9, selection=sells)) == [3]
    assert (await reads.last_sequence("b-1"), await reads.last_sequence("none")) == (3, 0)


def sequences(page: Iterable[ShownEntry]) -> list[int]:
    return [shown.entry.sequence for shown in page]


async def written(pool: asyncpg.Pool, script: ScriptedLedger) -> ScriptedLedger:
    await LedgerBuilder(pool).portfolio(script.portfolio_id, opened_at=BEGIN)
    await script.write(pool)
    return script


async def test_entries_come_back_as_they_were_booked(pool: asyncpg.Pool) -> None:
    """Of every kind, with every column: the hash over all of them says so."""
    script = ScriptedLedger("e-1")
    script.quote("E", "100")
    for kind in ("DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND"):
        script.cash(kind, "10.000001")
    bought = script.fill("E", "BUY", "10", "100.5", "1")
    script.wait()
    script.split("E", Fraction(3, 2))
    script.fill("E", "BUY", "2", "90", "1", scale=Fraction(3, 2))
    script.accrue("E", "0.25")
    script.pay()
    reversal = script.reverse(bought)
    assert reversal is not None
    await written(pool, script)
    reads = LedgerReads(lambda: pool)
    shown = await reads.after("e-1", 0, 99)
    assert [one.entry for one in shown] == script.entries
    assert {one.entry.kind for one in shown} == set(LedgerKind)
    assert [one.entry for one in await reads.page("e-1", 99)] == script.entries[::-1]
    assert {one.entry.event_id: one.reversed_by for one in shown if one.reversed_by} == {
        bought.event_id: reversal.event_id
    }
    found = await reads.event(bought.event_id)
    assert found == (bought, reversal.event_id)
    assert await reads.event("nothing") is None


async def test_flows_are_cut_by_sequence_and_carry_their_booking(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    await builder.portfolio("f-1")
    booked_at = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)
    await builder.flow("f-1", 2, "100.000001", "0", booked_at)
    await builder.fill("f-1", 3)
    await builder.flow("f-1", 4, "-40", "99.5", booked_at, "WITHDRAWAL")
    await builder.flow("f-1", 5, "7", "60", booked_at, "REWARD")
    await builder.flow("f-1", 6, "3", "67", booked_at, "INTEREST")
    at_ns = to_ns(booked_at)
    expected = [Flow(at_ns, 2, 100_000_001, 0), Flow(at_ns, 4, -40_000_000, 99_500_000)]
    assert await reads.flows("f-1", 0, 4) == expected
    assert [flow.ledger_sequence for flow in await reads.flows("f-1", 2, 99)] == [4, 5]
    assert await reads.flows("f-1", 5, 99) == await reads.flows("none", 0, 99) == []


async def test_trades_are_the_fills_that_realised_something(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    await builder.portfolio("g-1")
    for sequence, realized in enumerate(("0", "12.000001", "-3", "0.5", "-0.000001"), 1):
        await builder.fill("g-1", sequence, realized=realized)
    assert await reads.trades("g-1", 0, 9) == Trades(2, 2, 12_500_001, -3_000_001)
    assert await reads.trades("g-1", 2, 4) == Trades(1, 1, 500_000, -3_000_000)
    assert await reads.trades("g-1", 9, 9) == Trades(0, 0, 0, 0)


async def test_a_trade_that_was_reversed_in_the_span_was_none(pool: asyncpg.Pool) -> None:
    script = ScriptedLedger("g-2")
    script.fill("G", "BUY", "10", "100")
    gain = script.fill("G", "SELL", "1", "110")
    loss = script.fill("G", "SELL", "1", "99")
    script.reverse(gain)
    script.reverse(loss)
    await written(pool, script)
    reads = LedgerReads(lambda: pool)
    assert await reads.trades("g-2", 0, 4) == Trades(1, 1, 10_000_000, -1_000_000)
    assert await reads.trades("g-2", 0, 5) == Trades(0, 1, 0, -1_000_000)
    assert await reads.trades("g-2", 0, 6) == Trades(0, 0, 0, 0)


# -- filters --------------------------------------------------------------------------------------------------

KINDS = (None, [LedgerKind.FILL], [LedgerKind.DEPOSIT, LedgerKind.FEE], [LedgerKind.SPLIT, LedgerKind.FILL])
SELECTIONS = st.builds(
    LedgerSelection,
    kinds=st.sampled_from(KINDS),
    symbol=st.sampled_from([None, "P", "Q", "none", "P\0"]),
    side=st.sampled_from([None, *Side]),
    effective_from=st.one_of(st.none(), st.integers(0, 60).map(lambda hours: BEGIN + hours * HOUR)),
    effective_to=st.one_of(st.none(), st.integers(0, 60).map(lambda hours: BEGIN + hours * HOUR)),
    recorded_from=st.one_of(st.none(), st.integers(0, 60).map(lambda hours: BEGIN + hours * HOUR)),
    recorded_to=st.one_of(st.none(), st.integers(0, 60).map(lambda hours: BEGIN + hours * HOUR)),
    amount_min=st.sampled_from([None, Decimal(0), Decimal("99.999999"), Decimal(100), Decimal(10**9)]),
    amount_max=st.sampled_from([None, Decimal(0), Decimal(100), Decimal("100.0000001"), Decimal(10**9)]),
    reversals=st.sampled_from([None, True, False]),
)


def takes(chosen: LedgerSelection, entry: LedgerEntry) -> bool:
    """The filter, said once more."""
    amount = abs(from_micro(entry.amount))
    return not (
        (chosen.kinds is not None and entry.kind not in chosen.kinds)
        or (chosen.symbol is not None and entry.symbol != chosen.symbol)
        or (chosen.side is not None and entry.side is not chosen.side)
        or (chosen.effective_from is not None and entry.effective_at < chosen.effective_from)
        or (chosen.effective_to is not None and entry.effective_at >= chosen.effective_to)
        or (chosen.recorded_from is not None and entry.recorded_at < chosen.recorded_from)
        or (chosen.recorded_to is not None and entry.recorded_at >= chosen.recorded_to)
        or (chosen.amount_min is not None and amount < chosen.amount_min)
        or (chosen.amount_max is not None and amount > chosen.amount_max)
        or (chosen.reversals is not None and (entry.reverses is not None) is not chosen.reversals)
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mixed(pool: asyncpg.Pool) -> ScriptedLedger:
    """Sixty steps of all sorts, an hour apart."""
    script, random = ScriptedLedger("m-1"), Random(3)
    for number in range(60):
        script.at += HOUR
        symbol = random.choice("PQ")
        if number % 10 == 9:
            script.split(symbol, Fraction(2))
        elif number % 7 == 6:
            script.reverse(random.choice(script.entries))
        elif number % 5 == 4:
            script.cash(random.choice(["DEPOSIT", "WITHDRAWAL", "FEE"]), "100")
        else:
            late = script.fill(symbol, random.choice(["BUY", "SELL"]), str(random.randrange(1, 9)), "25")
            script.entries[-1] = structs.replace(late, effective_at=late.effective_at - random.randrange(5) * HOUR)
    return await written(pool, script)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(chosen=SELECTIONS, before=st.integers(0, 70), count=st.integers(1, 70))
async def test_a_page_is_what_the_filter_says(
    pool: asyncpg.Pool, mixed: ScriptedLedger, chosen: LedgerSelection, before: int, count: int
) -> None:
    expected = [entry.sequence for entry in mixed.entries[::-1] if entry.sequence < before and takes(chosen, entry)]
    found = await LedgerReads(lambda: pool).page("m-1", count, before, chosen)
    assert sequences(found) == expected[:count]


async def test_pages_with_a_filter_do_not_move_when_entries_are_added(pool: asyncpg.Pool) -> None:
    script = ScriptedLedger("m-2")
    for number in range(20):
        script.cash("DEPOSIT" if number % 2 else "FEE", "5")
    await written(pool, script)
    reads, fees, seen, before = LedgerReads(lambda: pool), LedgerSelection(kinds=[LedgerKind.FEE]), [], 99
    while page := await reads.page("m-2", 3, before, fees):
        seen += sequences(page)
        before = seen[-1]
        added = script.cash("FEE", "5")
        await script.write(pool, [added])
    assert seen == list(range(20, 1, -2))


async def test_a_filter_without_matches_reads_no_row_of_the_table(pool: asyncpg.Pool, mixed: ScriptedLedger) -> None:
    """The index has every column that is asked about, whatever is asked."""
    await pool.execute("VACUUM ANALYZE ledger_entry")
    chosen = LedgerSelection(
        side=Side.BUY,
        effective_from=BEGIN,
        effective_to=BEGIN + HOUR,
        recorded_to=BEGIN,
        amount_min=Decimal(10**9),
        reversals=False,
    )
    text, arguments = conditions(chosen, first=2)
    query = f"SELECT sequence FROM ledger_entry WHERE portfolio_id = $1{text} ORDER BY sequence DESC LIMIT 50"
    async with pool.acquire() as connection, connection.transaction():
        for node in ("bitmapscan", "seqscan", "sort"):
            await connection.execute(f"SET LOCAL enable_{node} = off")
        plan = await connection.fetch(f"EXPLAIN {query}", "m-1", *arguments)
    assert "Index Only Scan Backward using ledger_entry_pkey" in "\n".join(row[0] for row in plan)


@pytest.mark.parametrize(
    "changes",
    [
        {"kinds": []},
        {"effective_from": BEGIN, "effective_to": BEGIN},
        {"recorded_from": BEGIN + HOUR, "recorded_to": BEGIN},
        {"amount_min": Decimal(2), "amount_max": Decimal(1)},
        {"amount_min": Decimal(-1)},
        {"amount_max": Decimal("NaN")},
        {"amount_min": Decimal("Infinity")},
        {"amount_min": Decimal("sNaN"), "amount_max": Decimal(1)},
        {"amount_max": Decimal("1e99")},
    ],
)
def test_a_selection_that_contradicts_itself_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SelectionError) as refused:
        check_selection(LedgerSelection(**changes))
    assert refused.value.code == "BAD_FILTER"


def test_what_is_possible_is_taken() -> None:
    check_selection(LedgerSelection())
    check_selection(LedgerSelection(amount_min=Decimal(0), amount_max=Decimal(0), effective_from=BEGIN))
    check_selection(LedgerSelection(recorded_from=BEGIN, recorded_to=BEGIN + timedelta(microseconds=1)))


# -- positions ------------------------------------------------------------------------------------------------


async def test_cycles_are_read_together_with_the_position_they_lead_to(pool: asyncpg.Pool) -> None:
    script = ScriptedLedger("c-1")
    script.fill("C", "BUY", "1", "10")
    script.fill("C", "SELL", "1", "11")
    opened = script.fill("C", "BUY", "5", "10")
    script.fill("D", "SELL", "2", "10")
    script.accrue("C", "1")
    script.wait()
    script.split("C", Fraction(2))
    await written(pool, script)
    reads = LedgerReads(lambda: pool)
    asked = [HeldCycle("c-1", "D", 5), HeldCycle("c-1", "C", opened.sequence), HeldCycle("none", "C", 1)]
    second, first, nothing = await reads.cycles(asked, 9)
    assert [entry.sequence for entry in first.entries] == [4, 7]
    assert (first.head, second.head) == (Decimal(10), Decimal(-2))
    assert first.entries == [script.entries[3], script.entries[6]]
    assert nothing == ([], None)
    # The position is of another cycle by now, so its quantity is not where these entries lead.
    (past,) = await reads.cycles([HeldCycle("c-1", "C", 2)], 2)
    assert ([entry.sequence for entry in past.entries], past.head) == ([2, 3], None)


async def test_closed_positions_are_pages_of_cycles(pool: asyncpg.Pool) -> None:
    script = ScriptedLedger("x-1")
    for symbol, side, other in (("X", "BUY", "SELL"), ("Y", "SELL", "BUY"), ("X", "BUY", "SELL")):
        script.fill(symbol, side, "2", "10", "0.5")
        script.at += HOUR
        script.fill(symbol, other, "2", "12", "0.25")
    await written(pool, script)
    reads = LedgerReads(lambda: pool)
    rows = await reads.closed_positions("x-1", 9, 99)
    assert rows == script.closed[::-1]
    assert [(row.symbol, row.is_long, row.realized, row.fees) for row in rows] == [
        ("X", True, 4_000_000, 750_000), ("Y", False, -4_000_000, 750_000), ("X", True, 4_000_000, 750_000),
    ]  # fmt: skip
    assert await reads.closed_positions("x-1", 1, rows[0].closed_sequence) == [rows[1]]
    assert await reads.closed_positions("none", 1, 99) == []


async def test_a_class_is_held_when_it_was_filled_in_the_span_or_is_held_now(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), LedgerReads(lambda: pool)
    await builder.portfolio("h-1")
    await builder.assets([Asset("H-BTC", "", AssetClass.CRYPTO, "", ""), Asset("H-EQ", "", AssetClass.EQUITY, "", "")])
    await builder.fill("h-1", 1, "H-BTC")
    await builder.fill("h-1", 2, "H-EQ")
    assert await reads.has_held("h-1", AssetClass.CRYPTO, 0, 2)
    assert not await reads.has_held("h-1", AssetClass.CRYPTO, 1, 2)
    assert not await reads.has_held("h-1", AssetClass.COMMODITY, 0, 2)
    await pool.execute("INSERT INTO position VALUES ('h-1', 'H-BTC', 1, 1, 0, 0, now(), 1, now())")
    assert await reads.has_held("h-1", AssetClass.CRYPTO, 1, 2)


async def test_snapshots(pool: asyncpg.Pool) -> None:
    builder, reads = LedgerBuilder(pool), SnapshotsReads(lambda: pool)
    midnight = datetime(2026, 11, 20, tzinfo=UTC)
    hours = (-1, 0, 5, 23, 24, 30)
    await builder.snapshots("c-1", {midnight + timedelta(hours=hour): f"{100 + hour}.000001" for hour in hours}, 42)
    hourly = await reads.points("c-1", midnight, Resolution.HOURLY)
    assert [one.nav for one in hourly] == [100_000_001, 105_000_001, 123_000_001, 124_000_001, 130_000_001]
    assert {one.ledger_sequence for one in hourly} == {42}
    daily = await reads.points("c-1", midnight - timedelta(days=9), Resolution.DAILY)
    assert [one.nav for one in daily] == [99_000_001, 123_000_001, 130_000_001]
    assert daily[1].at_ns == int((midnight + timedelta(hours=23)).timestamp()) * 10**9
    later = await reads.points("c-1", midnight + timedelta(hours=23, seconds=1), Resolution.DAILY)
    assert [one.nav for one in later] == [130_000_001]
    assert await reads.points("none", midnight, Resolution.DAILY) == []


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
async def test_days_are_utc_days_whatever_the_time_zone_of_the_session(database: str, zone: str) -> None:
    """Over the night of 8 March 2026, when New York has 23 hours."""
    begin, name = datetime(2026, 3, 7, tzinfo=UTC), f"d-{zone}"
    async with asyncpg.create_pool(database, min_size=1, max_size=1, server_settings={"timezone": zone}) as pool:
        navs = {begin + timedelta(hours=hour): str(hour) for hour in range(24 * 4)}
        await LedgerBuilder(pool).snapshots(name, navs)
        daily = await SnapshotsReads(lambda: pool).points(name, begin, Resolution.DAILY)
    assert [one.nav // 1_000_000 for one in daily] == [23, 47, 71, 95]
