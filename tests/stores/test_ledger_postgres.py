"""The ledger in a real PostgreSQL: append-only for everyone, each event once, all of a batch or nothing, fenced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from engine.booking import DeadLetter
from engine.ledger import CHAIN_START, chain_hash
from engine.messages import content_hash, decode_event
from engine.runtime.connections import AWAY
from engine.stores.ledger_postgres import Fenced, OffsetMoved
from engine.stores.ledger_reads import LedgerReads
from tests.bookkeeping import AT, cash, fill, opening, record
from tests.books import Books, NoMarks, numbered, open_books


@pytest.fixture
async def books(fresh_database: str) -> AsyncIterator[Books]:
    async with open_books(fresh_database) as books:
        yield books


# -- append-only -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_entry SET amount = 0",
        "UPDATE ledger_entry SET amount = 0 WHERE false",
        "DELETE FROM ledger_entry",
        "TRUNCATE ledger_entry",
        "TRUNCATE portfolio CASCADE",
        "INSERT INTO ledger_entry SELECT * FROM ledger_entry ON CONFLICT (event_id) DO UPDATE SET amount = 1",
    ],
)
async def test_nobody_changes_an_entry_not_even_the_superuser(books: Books, statement: str) -> None:
    await books.book(*numbered(opening("p-1"), cash("p-1", "DEPOSIT", "5", "d")))
    assert await books.admin.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
    for role in ("origin", "replica", "local"):
        await books.admin.execute(f"SET session_replication_role = {role}")
        with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
            await books.admin.execute(statement)
    assert await books.entries() == [("p-1", 1, "open-p-1"), ("p-1", 2, "d")]


@pytest.mark.parametrize(
    ("table", "column"), [("ledger_entry", "amount"), ("portfolio", "cash"), ("position", "quantity")]
)
async def test_what_is_no_finite_number_is_refused(books: Books, table: str, column: str) -> None:
    await books.book(*numbered(opening("p-1"), fill("p-1", "BUY", "1", "2", "b")))
    columns = [
        row["attname"]
        for row in await books.admin.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 ORDER BY attnum", table
        )
    ]
    await books.admin.execute("INSERT INTO asset VALUES ('NEW', 'NEW', 'EQUITY', 'S', '')")
    # Infinity may already be more than the column's precision holds.
    refusals = (asyncpg.CheckViolationError, asyncpg.NumericValueOutOfRangeError)
    for value in ("NaN", "Infinity", "-Infinity"):
        fresh = {column: f"'{value}'::numeric", "sequence": "99", "event_id": "'x'", "id": "'p-2'", "symbol": "'NEW'"}
        chosen = ", ".join(fresh.get(name, name) for name in columns)
        with pytest.raises(refusals) as refused:
            await books.admin.execute(f"INSERT INTO {table} SELECT {chosen} FROM {table} LIMIT 1")
        assert value != "NaN" or refused.value.constraint_name == f"{column}_finite"


# -- once --------------------------------------------------------------------------------------------------


async def test_a_duplicate_within_a_batch_and_across_batches_has_no_effect(books: Books) -> None:
    deposit = cash("p-1", "DEPOSIT", "5", "d")
    first = await books.book(*numbered(opening("p-1"), deposit, deposit))
    assert (len(first.entries), first.duplicates) == (2, 1)
    again = await books.book(*numbered(deposit, opening("p-1"), first=3))
    assert (again.entries, again.duplicates) == ([], 2)
    assert await books.entries() == [("p-1", 1, "open-p-1"), ("p-1", 2, "d")]
    assert await books.admin.fetchval("SELECT cash FROM portfolio") == 5
    assert (await books.next_offset(), books.buried) == (5, [])


async def test_an_event_id_with_other_content_is_a_dead_letter(books: Books) -> None:
    await books.book(*numbered(opening("p-1"), cash("p-1", "DEPOSIT", "5", "d")))
    await books.book(*numbered(cash("p-1", "DEPOSIT", "6", "d"), cash("p-1", "DEPOSIT", "7", "e"), first=2))
    assert [(letter.code, letter.record.offset) for letter in books.buried] == [("EVENT_ID_REUSED", 2)]
    assert await books.admin.fetchval("SELECT cash FROM portfolio") == 12


async def test_the_same_event_id_in_two_shards_is_booked_in_one_of_them(books: Books) -> None:
    await books.book(*numbered(opening("p-1")), shard=0)
    await books.book(*numbered(opening("p-2")), shard=1)
    outcomes = await asyncio.gather(
        books.book(*numbered(cash("p-1", "DEPOSIT", "5", "d"), first=1), shard=0),
        books.book(*numbered(cash("p-2", "DEPOSIT", "5", "d"), first=1), shard=1),
        return_exceptions=True,
    )
    # Side by side the later insert meets the unique index; what evaluators do then is book the records again.
    for shard, outcome in enumerate(outcomes):
        if isinstance(outcome, AWAY):
            await books.book(*numbered(cash(f"p-{shard + 1}", "DEPOSIT", "5", "d"), first=1), shard=shard)
    assert await books.admin.fetchval("SELECT count(*) FROM ledger_entry WHERE event_id = 'd'") == 1
    assert await books.admin.fetchval("SELECT sum(cash) FROM portfolio") == 5
    assert {letter.code for letter in books.buried} == {"EVENT_ID_REUSED"}


async def test_a_portfolio_of_another_shard_is_refused(books: Books) -> None:
    await books.book(*numbered(opening("p-1")), shard=0)
    await books.book(*numbered(cash("p-1", "DEPOSIT", "5", "d"), opening("p-1", "again")), shard=1)
    assert [letter.code for letter in books.buried] == ["WRONG_PARTITION", "WRONG_PARTITION"]
    assert await books.entries() == [("p-1", 1, "open-p-1")]


async def test_records_booked_again_after_a_commit_whose_answer_was_lost_change_nothing(books: Books) -> None:
    records = numbered(opening("p-1"), fill("p-1", "BUY", "2", "3", "b", fee="1"), cash("p-1", "FEE", "-1", "x"))
    await books.book(*records)
    before = await whole(books)
    again = await books.book(*records)
    assert (again.entries, again.duplicates, len(again.dead_letters)) == ([], 2, 1)
    assert await whole(books) == before


async def whole(books: Books) -> list[Any]:
    """Everything that booking writes."""
    tables = ("ledger_entry", "portfolio", "position", "asset", "shard")
    return [
        sorted(map(str, await books.admin.fetch(f"SELECT (row_to_json(t))::text FROM {table} t"))) for table in tables
    ]


# -- all or nothing, fenced --------------------------------------------------------------------------------


async def test_a_batch_whose_dead_letters_can_not_be_produced_is_not_booked_at_all(books: Books) -> None:
    before = await whole(books)

    async def fail(_: Sequence[DeadLetter]) -> None:
        raise OSError("Kafka is away")

    records = [*numbered(opening("p-1"), fill("p-1", "BUY", "1", "2", "b", symbol="NEW")), record(b"{", 2, "p-1")]
    with pytest.raises(OSError, match="Kafka"):
        await books.writer.book(books.leases[0], records, await books.next_offset(), NoMarks(), AT, fail, {})
    assert await whole(books) == before


async def test_a_connection_lost_before_the_commit_leaves_nothing(books: Books) -> None:
    before = await whole(books)

    async def lose_the_connection(_: Sequence[DeadLetter]) -> None:
        terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%test-ledger'"
        await books.admin.execute(terminate)

    records = [*numbered(opening("p-1"), fill("p-1", "BUY", "1", "2", "b", symbol="NEW")), record(b"{", 2, "p-1")]
    with pytest.raises(AWAY):
        await books.writer.book(
            books.leases[0], records, await books.next_offset(), NoMarks(), AT, lose_the_connection, {}
        )
    assert await whole(books) == before
    assert len((await books.book(*records)).entries) == 2


@pytest.mark.parametrize("stale", ["epoch", "log"])
async def test_a_former_owner_books_nothing(books: Books, stale: str) -> None:
    change = "epoch = epoch + 1" if stale == "epoch" else "log_id = 'another'"
    await books.admin.execute(f"UPDATE shard SET {change} WHERE id = 0")
    before = await whole(books)
    with pytest.raises(Fenced):
        await books.book(*numbered(opening("p-1")))
    assert await whole(books) == before
    await books.book(*numbered(opening("p-2")), shard=1)


# -- what is written ---------------------------------------------------------------------------------------


async def test_entries_positions_and_portfolios_come_back_as_they_were_booked(books: Books) -> None:
    events = [
        opening("p-1"),
        cash("p-1", "DEPOSIT", "1000.000001", "d"),
        fill("p-1", "BUY", "0.000000000001", "999999.999999", "b1", symbol="DUST", fee="0.01"),
        fill("p-1", "SELL", "123456789.123456", "0.5", "b2", symbol="XOM"),
        fill("p-1", "BUY", "3", "7", "b3"),
        fill("p-1", "SELL", "3", "8", "b4"),
    ]
    outcome = await books.book(*numbered(*events))
    shown = await LedgerReads(lambda: books.admin).after("p-1", 0, 100)
    stored = [one.entry for one in shown]
    assert stored == outcome.entries
    assert [entry.content_hash for entry in stored] == [
        content_hash(decode_event(record(event).value)) for event in events
    ]
    held = await books.admin.fetch("SELECT symbol, quantity, cost, realized FROM position ORDER BY symbol")
    assert [tuple(row) for row in held] == [
        ("DUST", Decimal("0.000000000001"), Decimal("0.000001"), 0),
        ("XOM", Decimal("-123456789.123456"), Decimal("-61728394.561728"), 0),
    ]
    portfolio = await books.admin.fetchrow("SELECT cash, realized, fees, flows, ledger_sequence FROM portfolio")
    expected_cash = Decimal("1000.000001") - Decimal("0.010001") + Decimal("61728394.561728") + 3
    assert tuple(portfolio) == (expected_cash, 3, Decimal("0.01"), Decimal("1000.000001"), 6)


async def test_an_unheard_of_symbol_becomes_an_unclassified_asset_once(books: Books) -> None:
    await books.admin.execute("INSERT INTO asset VALUES ('AAPL', 'Apple', 'EQUITY', 'Information Technology', '')")
    fills = [fill("p-1", "BUY", "1", "2", f"b-{n}", symbol=symbol) for n, symbol in enumerate(("AAPL", "NEW", "NEW"))]
    outcome = await books.book(*numbered(opening("p-1"), *fills))
    assert outcome.unclassified == {"NEW"}
    sectors = await books.admin.fetch("SELECT symbol, sector FROM asset ORDER BY symbol")
    assert [tuple(row) for row in sectors] == [("AAPL", "Information Technology"), ("NEW", "UNCLASSIFIED")]
    assert not (await books.book(*numbered(fill("p-1", "BUY", "1", "2", "c", symbol="NEW"), first=4))).unclassified


async def test_a_ledger_that_was_set_back_is_noticed_before_anything_is_booked(books: Books) -> None:
    await books.book(*numbered(opening("p-1"), cash("p-1", "DEPOSIT", "5", "d")))
    await books.admin.execute("UPDATE shard SET next_offset = 1 WHERE id = 0")
    records = numbered(cash("p-1", "DEPOSIT", "7", "e"), first=2)
    with pytest.raises(OffsetMoved):
        await books.writer.book(books.leases[0], records, 2, NoMarks(), AT, books.bury, {})
    assert await books.next_offset() == 1
    assert await books.admin.fetchval("SELECT count(*) FROM ledger_entry") == 2


# -- reversals -------------------------------------------------------------------------------------------------------


def reversal(reverses: str, event_id: str = "", name: str = "p-1") -> dict[str, Any]:
    return {
        "type": "reversal",
        "event_id": event_id or f"r-{reverses}",
        "portfolio_id": name,
        "reverses": reverses,
        "effective_at": "2026-11-20T16:00:00Z",
    }


async def test_a_reversal_is_an_entry_of_its_own_and_both_stay(books: Books) -> None:
    await books.book(*numbered(opening("p-1"), cash("p-1", "DEPOSIT", "100", "d"), fill("p-1", "BUY", "2", "10", "b")))
    (entry,) = (await books.book(*numbered(reversal("b"), first=3))).entries
    assert (entry.kind, entry.reverses, entry.amount, entry.quantity) == ("FILL", "b", 20_000_000, 2)
    assert await books.entries() == [("p-1", 1, "open-p-1"), ("p-1", 2, "d"), ("p-1", 3, "b"), ("p-1", 4, "r-b")]
    assert await books.admin.fetchval("SELECT count(*) FROM position") == 0
    assert await books.admin.fetchval("SELECT cash FROM portfolio") == 100
    (cycle,) = await books.admin.fetch("SELECT symbol, side, realized, opened_sequence FROM closed_position")
    assert tuple(cycle) == ("AAPL", "LONG", 0, 3)


async def test_what_can_not_be_reversed_is_a_dead_letter_with_its_code(books: Books) -> None:
    await books.book(*numbered(opening("p-1"), opening("p-2"), cash("p-1", "DEPOSIT", "100", "d")))
    await books.book(*numbered(reversal("d"), first=3))
    refused = [
        reversal("nothing"),
        reversal("d", "again"),
        reversal("r-d"),
        reversal("open-p-1"),
        reversal("d", "others", name="p-2"),
    ]
    outcome = await books.book(*numbered(*refused, first=4))
    assert [letter.code for letter in outcome.dead_letters] == [
        "UNKNOWN_EVENT",
        "ALREADY_REVERSED",
        "NOT_REVERSIBLE",
        "NOT_REVERSIBLE",
        "UNKNOWN_EVENT",
    ]
    assert await books.admin.fetchval("SELECT max(cash) FROM portfolio") == 0


async def test_event_and_reversal_twice_within_one_batch(books: Books) -> None:
    deposit, back = cash("p-1", "DEPOSIT", "100", "d"), reversal("d")
    outcome = await books.book(*numbered(opening("p-1"), deposit, back, back, reversal("d", "again")))
    assert (len(outcome.entries), outcome.duplicates) == (3, 1)
    assert [letter.code for letter in outcome.dead_letters] == ["ALREADY_REVERSED"]


async def test_the_chain_goes_on_from_batch_to_batch_and_the_portfolio_knows_its_head(books: Books) -> None:
    first = await books.book(*numbered(opening("p-1"), cash("p-1", "DEPOSIT", "100", "d1")))
    second = await books.book(*numbered(cash("p-1", "DEPOSIT", "100", "d2"), first=2))
    entries = first.entries + second.entries
    for before, entry in zip([None, *entries], entries, strict=False):
        assert entry.hash == chain_hash(before.hash if before else CHAIN_START, entry)
    assert await books.admin.fetchval("SELECT ledger_hash FROM portfolio") == entries[-1].hash
    rows = await books.admin.fetch("SELECT hash FROM ledger_entry ORDER BY sequence")
    assert [row["hash"] for row in rows] == [entry.hash for entry in entries]
