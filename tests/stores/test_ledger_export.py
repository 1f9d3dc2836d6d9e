"""Files that hold the ledger exactly, of one instant, whatever becomes of who writes them."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal
from fractions import Fraction

import asyncpg
import pyarrow
import pyarrow.parquet
import pytest
import pytest_asyncio

from engine.ledger import CHAIN_START, LedgerEntry, LedgerKind, Side, chain_hash
from engine.stores import ledger_export
from engine.stores.ledger_export import ExportFormat, ExportPlan, count_entries, export_ledger
from engine.stores.ledger_rows import read_scale
from engine.stores.ledger_selection import EVERYTHING, LedgerSelection
from tests.builders import LedgerBuilder
from tests.scripted_ledger import BEGIN, HOUR, ScriptedLedger

CSV, PARQUET = ExportFormat


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(database, min_size=1, max_size=3) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def script(pool: asyncpg.Pool) -> ScriptedLedger:
    """Every kind of entry, and texts that a spreadsheet or a parser may take for something else."""
    script = ScriptedLedger("p/1")
    script.quote("A", "100")
    for kind in ("DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND"):
        script.cash(kind, "576000000000.000001" if kind == "DEPOSIT" else "0.000001")
    bought = script.fill("A", "BUY", "0.000000000001", "99999.999999", "1")
    script.fill("A", "BUY", "10", "100.5")
    script.wait()
    script.split("A", Fraction(3, 2))
    script.fill("A", "BUY", "2", "90", "1", scale=Fraction(3, 2))
    script.accrue("A", "0.25")
    script.pay()
    script.reverse(bought)
    for text in ("=1+1", "+1", "-1", "@x", "'quoted", 'a,b;"c"', "", "null", "ümlaut …", "1.50"):
        script.at += HOUR
        script.noted(text)
    await LedgerBuilder(pool).portfolio(script.portfolio_id, opened_at=BEGIN)
    await script.write(pool)
    return script


async def exported(
    pool: asyncpg.Pool, file_format: ExportFormat, selection: LedgerSelection = EVERYTHING, of: str = "p/1"
) -> bytes:
    parts: list[bytes] = []
    plan = ExportPlan(of, selection, file_format)

    async def write(data: bytes) -> None:
        parts.append(data)

    async with pool.acquire() as connection:
        count = await export_ledger(connection, plan, write)
        assert count == await count_entries(connection, plan)
    data = b"".join(parts)
    assert count == len(rows_of(data) if file_format is CSV else table_of(data))
    return data


def rows_of(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


def table_of(data: bytes) -> pyarrow.Table:
    return pyarrow.parquet.read_table(io.BytesIO(data))


def micro(text: str) -> int:
    amount = Decimal(text) * 1_000_000
    assert amount == int(amount)
    return int(amount)


def entry_of(row: dict[str, str]) -> LedgerEntry:
    """What a reader makes of a row by the documentation alone."""
    money = ("amount", "fee", "receivable", "realized", "cost", "nav_effect", "cash_after")
    reference = row["reference"]
    return LedgerEntry(
        portfolio_id=row["portfolio_id"],
        sequence=int(row["sequence"]),
        event_id=row["event_id"],
        kind=LedgerKind(row["kind"]),
        symbol=row["symbol"] or None,
        side=Side(row["side"]) if row["side"] else None,
        quantity=Decimal(row["quantity"]) if row["quantity"] else None,
        price=Decimal(row["price"]) if row["price"] else None,
        scale=read_scale(row["scale"] or None),
        **{name: micro(row[name]) for name in money},
        nav_before=micro(row["nav_before"]) if row["nav_before"] else None,
        effective_at=datetime.fromisoformat(row["effective_at"]),
        recorded_at=datetime.fromisoformat(row["recorded_at"]),
        late={"true": True, "false": False}[row["late"]],
        reference=(reference[1:] if reference.startswith("'") else reference) or None,
        reverses=row["reverses"] or None,
        content_hash=bytes.fromhex(row["content_hash"]),
        hash=bytes.fromhex(row["hash"]),
    )


async def test_csv_has_every_entry_so_that_its_chain_can_be_verified(
    pool: asyncpg.Pool, script: ScriptedLedger
) -> None:
    entries = [entry_of(row) for row in rows_of(await exported(pool, CSV))]
    assert len(entries) == len(script.entries)
    assert {entry.kind for entry in entries} == set(LedgerKind)
    before = CHAIN_START
    for entry, booked in zip(entries, script.entries, strict=True):
        assert entry == booked or (booked.reference == "" and entry.reference is None)
        assert chain_hash(before, booked) == entry.hash
        before = entry.hash


async def test_csv_is_plain(pool: asyncpg.Pool, script: ScriptedLedger) -> None:
    text = (await exported(pool, CSV)).decode()
    first, second, *_ = text.splitlines()
    assert first == ",".join(LedgerEntry.__struct_fields__)
    assert second.startswith("p/1,1,p/1-e1,OPEN,,,,,,0,0,0,0,0,0,0,,2026-03-02T09:30:00.000000Z,2026-03-02T09:30")
    assert "E-" not in text and "E+" not in text
    assert ",0.000000000001,99999.999999," in text
    assert ",576000000000.000001," in text


async def test_no_reference_is_taken_for_a_formula(pool: asyncpg.Pool, script: ScriptedLedger) -> None:
    texts = [row["reference"] for row in rows_of(await exported(pool, CSV))][-10:]
    assert texts == ["'=1+1", "'+1", "'-1", "'@x", "''quoted", 'a,b;"c"', "", "null", "ümlaut …", "1.50"]
    assert (await exported(pool, CSV)).decode().count('"a,b;""c"""') == 1


async def test_parquet_has_the_same_exactly(pool: asyncpg.Pool, script: ScriptedLedger) -> None:
    table = table_of(await exported(pool, PARQUET))
    assert table.column_names == list(LedgerEntry.__struct_fields__)
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types["amount"] == types["nav_before"] == "decimal128(38, 6)"
    assert types["quantity"] == types["price"] == "decimal128(38, 12)"
    assert types["recorded_at"] == "timestamp[us, tz=UTC]"
    for row, booked in zip(table.to_pylist(), script.entries, strict=True):
        for name in ("quantity", "price", "effective_at", "recorded_at", "late", "reference", "reverses", "symbol"):
            assert row[name] == getattr(booked, name), name
        for name in ("amount", "fee", "receivable", "realized", "cost", "nav_effect", "cash_after"):
            assert row[name] * 1_000_000 == getattr(booked, name), name
        assert row["hash"] == booked.hash.hex()
        assert (row["nav_before"] is None) == (booked.nav_before is None)


async def test_row_groups_follow_each_other(
    pool: asyncpg.Pool, script: ScriptedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = table_of(await exported(pool, PARQUET))
    # Whatever PostgreSQL sends at once becomes a group.
    monkeypatch.setattr(ledger_export, "ROW_GROUP_BYTES", 500)
    data = await exported(pool, PARQUET)
    assert pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata.num_row_groups >= 1
    assert table_of(data).equals(whole)


@pytest.mark.parametrize("file_format", ExportFormat)
async def test_filters_are_those_of_the_pages(
    pool: asyncpg.Pool, script: ScriptedLedger, file_format: ExportFormat
) -> None:
    async def found(selection: LedgerSelection) -> list[int]:
        data = await exported(pool, file_format, selection)
        if file_format is CSV:
            return [int(row["sequence"]) for row in rows_of(data)]
        return list(table_of(data).column("sequence").to_pylist())

    fills = [entry.sequence for entry in script.entries if entry.kind is LedgerKind.FILL]
    assert await found(LedgerSelection(kinds=[LedgerKind.FILL], symbol="A")) == fills
    assert await found(LedgerSelection(symbol="'; DROP TABLE ledger_entry --")) == []
    late = LedgerSelection(recorded_from=BEGIN + 3 * HOUR, recorded_to=BEGIN + 5 * HOUR, amount_max=Decimal(1))
    assert len(await found(late)) == 2


@pytest.mark.parametrize("file_format", ExportFormat)
async def test_a_ledger_without_entries_is_a_file_all_the_same(pool: asyncpg.Pool, file_format: ExportFormat) -> None:
    assert await exported(pool, file_format, of="nobody")


# -- while it runs --------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def long(pool: asyncpg.Pool) -> ScriptedLedger:
    """More than sockets hold by themselves."""
    await LedgerBuilder(pool).portfolio("long")
    await pool.execute(
        """
        INSERT INTO ledger_entry SELECT 'long', n, 'long-' || n, 'DEPOSIT', NULL, NULL, NULL, NULL, NULL, n, 0, 0, 0, 0,
            0, n, NULL, now(), now(), false, repeat('x', 150), NULL, sha256('x'), sha256('y')
        FROM generate_series(1, 60000) AS n
        """
    )
    return ScriptedLedger("long")


async def busy(pool: asyncpg.Pool) -> int:
    return int(
        await pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'COPY%'"
            " AND state = 'active'"
        )
    )


async def test_the_file_is_of_one_instant(pool: asyncpg.Pool, long: ScriptedLedger) -> None:
    added = False
    lines = 0

    async def write(data: bytes) -> None:
        nonlocal added, lines
        lines += data.count(b"\n")
        if not added:
            added = True
            await LedgerBuilder(pool).deposit("long", 70_000)

    seen: list[int] = []
    async with pool.acquire() as connection:
        count = await export_ledger(connection, ExportPlan("long", EVERYTHING, CSV), write, seen.append)
    assert (count, lines, seen[-1]) == (60_000, 60_001, 60_000)
    assert seen == sorted(seen) and len(seen) > 10


@pytest.mark.parametrize("file_format", ExportFormat)
async def test_whoever_stops_taking_frees_the_connection(
    pool: asyncpg.Pool, long: ScriptedLedger, file_format: ExportFormat
) -> None:
    started = asyncio.Event()

    async def write(_: bytes) -> None:
        started.set()
        await asyncio.sleep(3_600)

    async def export() -> None:
        async with pool.acquire() as connection:
            await export_ledger(connection, ExportPlan("long", EVERYTHING, file_format), write)

    running = asyncio.create_task(export())
    await asyncio.wait_for(started.wait(), 20)
    assert await busy(pool) == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await busy(pool) == 0
    assert [await pool.fetchval("SELECT 1") for _ in range(4)] == [1] * 4


async def test_an_error_of_the_writer_is_its_own(pool: asyncpg.Pool, long: ScriptedLedger) -> None:
    async def write(_: bytes) -> None:
        raise BrokenPipeError("gone")

    async with pool.acquire() as connection:
        with pytest.raises(BrokenPipeError):
            await export_ledger(connection, ExportPlan("long", EVERYTHING, CSV), write)
        assert await connection.fetchval("SELECT 1") == 1
    assert await busy(pool) == 0


async def test_it_may_take_longer_than_other_statements_but_not_for_ever(
    pool: asyncpg.Pool, long: ScriptedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write(_: bytes) -> None:
        await asyncio.sleep(0.02)

    async with pool.acquire() as connection:
        await connection.execute("SET statement_timeout = '50ms'")
        plan = ExportPlan("long", EVERYTHING, CSV)
        assert await export_ledger(connection, plan, write) >= 60_000
        monkeypatch.setattr(ledger_export, "EXPORT_DURATION_MAX_S", 1)

        async def stuck(_: bytes) -> None:
            await asyncio.sleep(60)

        with pytest.raises(TimeoutError):
            await export_ledger(connection, plan, stuck)
        await connection.execute("RESET statement_timeout")
