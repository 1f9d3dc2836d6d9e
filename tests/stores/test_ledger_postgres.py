"""The ledger in a real PostgreSQL: append-only for everyone, each event once, all of a batch or nothing, fenced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.booking import Booked, DeadLetter, Record
from engine.messages import content_hash, decode_event
from engine.runtime.connections import AWAY, make_engine, postgres_dsn
from engine.runtime.settings import Settings
from engine.stores.ledger_postgres import Fenced, Lease, LedgerWriter, OffsetMoved
from engine.stores.ledger_reads import LedgerReads
from engine.stores.shards_postgres import Shards
from tests.bookkeeping import AT, cash, fill, opening, record

LOG = "cluster/topic"


class NoMarks:
    """No prices yet; every NAV is 0."""

    def nav(self, portfolio_id: str) -> int:
        return 0

    def price(self, symbol: str) -> Decimal | None:
        return None

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        return 0, 0

    def position_day_base(self, portfolio_id: str, symbol: str) -> int:
        return 0


@dataclass
class Books:
    """A ledger, the leases on its four shards, and a connection of the superuser's."""

    engine: AsyncEngine
    writer: LedgerWriter
    shards: Shards
    leases: dict[int, Lease]
    admin: asyncpg.Connection
    buried: list[DeadLetter]

    async def book(self, *records: Record, shard: int = 0) -> Booked:
        return await self.writer.book(
            self.leases[shard], records, await self.next_offset(shard), NoMarks(), AT, self.bury
        )

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        self.buried += letters

    async def entries(self) -> list[tuple[str, int, str]]:
        rows = await self.admin.fetch("SELECT portfolio_id, sequence, event_id FROM ledger_entry ORDER BY 1, 2")
        return [tuple(row) for row in rows]

    async def next_offset(self, shard: int = 0) -> int:
        return await self.admin.fetchval("SELECT next_offset FROM shard WHERE id = $1", shard)


@pytest.fixture
async def books(fresh_database: str) -> AsyncIterator[Books]:
    engine = make_engine(Settings(postgres_url=fresh_database), "test-ledger")
    shards = Shards(engine, "me", 60_000)
    await shards.ensure(4, LOG)
    leases = {lease.shard: lease for lease in (await shards.renew([], LOG)).claimed}
    admin = await asyncpg.connect(postgres_dsn(fresh_database))
    yield Books(engine, LedgerWriter(engine), shards, leases, admin, [])
    await admin.close()
    await engine.dispose()


def numbered(*events: dict[str, Any], first: int = 0) -> list[Record]:
    return [record(event, first + at) for at, event in enumerate(events)]


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
        await books.writer.book(books.leases[0], records, await books.next_offset(), NoMarks(), AT, fail)
    assert await whole(books) == before


async def test_a_connection_lost_before_the_commit_leaves_nothing(books: Books) -> None:
    before = await whole(books)

    async def lose_the_connection(_: Sequence[DeadLetter]) -> None:
        terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%test-ledger'"
        await books.admin.execute(terminate)

    records = [*numbered(opening("p-1"), fill("p-1", "BUY", "1", "2", "b", symbol="NEW")), record(b"{", 2, "p-1")]
    with pytest.raises(AWAY):
        await books.writer.book(books.leases[0], records, await books.next_offset(), NoMarks(), AT, lose_the_connection)
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
    stored = await LedgerReads(lambda: books.admin).after("p-1", 0, 100)
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
        await books.writer.book(books.leases[0], records, 2, NoMarks(), AT, books.bury)
    assert await books.next_offset() == 1
    assert await books.admin.fetchval("SELECT count(*) FROM ledger_entry") == 2
