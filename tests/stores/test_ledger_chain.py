"""Changes made behind the program's back, by whoever may switch the guard off: each is found and named."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from msgspec import structs

from engine.ledger import CHAIN_START, chain_hash
from engine.stores.ledger_chain import ENTRIES_AT_ONCE, ChainCheck, Fault, Head, Verified, verify_ledger
from tests.builders import LedgerBuilder
from tests.scripted_ledger import ScriptedLedger


@pytest_asyncio.fixture
async def connection(fresh_database: str) -> AsyncIterator[asyncpg.Connection]:
    opened = await asyncpg.connect(fresh_database)
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def script(fresh_database: str) -> ScriptedLedger:
    """Two portfolios; the first has eight entries, and is what the tests change."""
    async with asyncpg.create_pool(fresh_database, min_size=1, max_size=1) as pool:
        scripts = [ScriptedLedger(name) for name in ("p-1", "p-2")]
        for one in scripts:
            await LedgerBuilder(pool).portfolio(one.portfolio_id)
            one.cash("DEPOSIT", "1000")
            one.fill("A", "BUY", "2", "100.5", "1")
            one.cash("FEE", "3")
            bought = one.fill("A", "BUY", "3", "100", "1")
            one.reverse(bought)
            one.fill("A", "SELL", "1", "90")
            one.cash("INTEREST", "0.000001")
            await one.write(pool)
    return scripts[0]


async def verify(connection: asyncpg.Connection, portfolio_id: str | None = None) -> list[tuple[str, int, str]]:
    faults: list[Fault] = []
    verified = await verify_ledger(connection, portfolio_id, faults.append, lambda _: None)
    assert verified.faults_count == len(faults)
    return [(fault.portfolio_id, fault.sequence, fault.kind.value) for fault in faults]


async def tamper(connection: asyncpg.Connection, *statements: str) -> None:
    """As a superuser who switches the guard off for a moment."""
    async with connection.transaction():
        await connection.execute("ALTER TABLE ledger_entry DISABLE TRIGGER ledger_entry_append_only")
        for statement in statements:
            await connection.execute(statement)
        await connection.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")


async def test_a_clean_ledger(connection: asyncpg.Connection, script: ScriptedLedger) -> None:
    seen: list[int] = []
    verified = await verify_ledger(connection, None, pytest.fail, lambda at: seen.append(at.entries_count))
    assert verified == Verified(portfolios_count=2, entries_count=16, faults_count=0)
    assert seen[-1] == 16
    assert await verify(connection, "p-1") == []
    with pytest.raises(KeyError):
        await verify(connection, "none")


@pytest.mark.parametrize(
    "change",
    [
        "event_id = 'forged'",
        "kind = 'REWARD'",
        "symbol = 'B'",
        "side = 'SELL'",
        "quantity = 2.000000000001",
        "price = 100",
        "scale = '2:1'",
        "receivable = 1",
        "realized = 0.000001",
        "cost = 0",
        "nav_effect = 0",
        "nav_before = 0",
        "effective_at = effective_at + interval '1 microsecond'",
        "recorded_at = recorded_at - interval '1 second'",
        "late = true",
        "reference = 'x'",
        "reverses = 'x'",
        "content_hash = '\\x00'",
        "hash = sha256('x')",
    ],
)
async def test_a_changed_column_is_found(connection: asyncpg.Connection, script: ScriptedLedger, change: str) -> None:
    await tamper(connection, f"UPDATE ledger_entry SET {change} WHERE portfolio_id = 'p-1' AND sequence = 3")
    assert await verify(connection) == [("p-1", 3, "HASH")]
    assert await verify(connection, "p-2") == []


@pytest.mark.parametrize("change", ["amount = amount + 1", "fee = fee + 1", "cash_after = cash_after - 1"])
async def test_a_changed_amount_does_not_add_up_either(
    connection: asyncpg.Connection, script: ScriptedLedger, change: str
) -> None:
    await tamper(connection, f"UPDATE ledger_entry SET {change} WHERE portfolio_id = 'p-1' AND sequence = 3")
    assert await verify(connection) == [("p-1", 3, "HASH"), ("p-1", 3, "CASH")]


@pytest.mark.parametrize("sequence", [1, 4, 7])
async def test_a_deleted_entry_is_found(connection: asyncpg.Connection, script: ScriptedLedger, sequence: int) -> None:
    await tamper(connection, f"DELETE FROM ledger_entry WHERE portfolio_id = 'p-1' AND sequence = {sequence}")
    assert await verify(connection) == [("p-1", sequence, "MISSING")]


async def test_entries_deleted_from_the_end_are_found(connection: asyncpg.Connection, script: ScriptedLedger) -> None:
    await tamper(connection, "DELETE FROM ledger_entry WHERE portfolio_id = 'p-1' AND sequence >= 7")
    assert await verify(connection) == [("p-1", 7, "MISSING")]
    await tamper(connection, "DELETE FROM ledger_entry WHERE portfolio_id = 'p-1'")
    assert await verify(connection) == [("p-1", 1, "MISSING")]


async def test_an_inserted_entry_is_found(connection: asyncpg.Connection, script: ScriptedLedger) -> None:
    columns = "event_id, kind, symbol, side, quantity, price, scale, amount, fee, receivable, realized, cost"
    rest = (
        "nav_effect, cash_after, nav_before, effective_at, recorded_at, late, reference, reverses, content_hash, hash"
    )
    copied = columns.replace("event_id", "'forged'"), rest.replace("reverses,", "NULL,")
    for sequence in (9, 0):
        await connection.execute(
            f"INSERT INTO ledger_entry (portfolio_id, sequence, {columns}, {rest})"
            f" SELECT portfolio_id, {sequence}, {', '.join(copied)} FROM ledger_entry"
            " WHERE portfolio_id = 'p-1' AND sequence = 2"
        )
        found = await verify(connection)
        await tamper(connection, f"DELETE FROM ledger_entry WHERE portfolio_id = 'p-1' AND sequence = {sequence}")
        assert ("p-1", sequence, "INSERTED") in found
        assert {at for _, at, _ in found} == {sequence}


async def test_swapped_entries_are_found_and_no_others(connection: asyncpg.Connection, script: ScriptedLedger) -> None:
    await tamper(
        connection,
        "UPDATE ledger_entry SET sequence = 99 WHERE portfolio_id = 'p-1' AND sequence = 3",
        "UPDATE ledger_entry SET sequence = 3 WHERE portfolio_id = 'p-1' AND sequence = 4",
        "UPDATE ledger_entry SET sequence = 4 WHERE portfolio_id = 'p-1' AND sequence = 99",
    )
    found = await verify(connection)
    assert {at for _, at, _ in found} == {3, 4}
    assert [kind for _, _, kind in found].count("HASH") == 2


async def test_every_one_of_several_is_named(connection: asyncpg.Connection, script: ScriptedLedger) -> None:
    await tamper(
        connection,
        "UPDATE ledger_entry SET reference = 'x' WHERE sequence IN (2, 3, 6)",
        "DELETE FROM ledger_entry WHERE portfolio_id = 'p-2' AND sequence = 4",
    )
    bad = [("p-1", 2, "HASH"), ("p-1", 3, "HASH"), ("p-1", 6, "HASH"), ("p-2", 2, "HASH"), ("p-2", 3, "HASH")]
    assert await verify(connection) == [*bad, ("p-2", 4, "MISSING"), ("p-2", 6, "HASH")]


async def test_an_entry_that_was_changed_and_hashed_anew_breaks_the_next(
    connection: asyncpg.Connection, script: ScriptedLedger
) -> None:
    await rehash(connection, script, 3)
    assert await verify(connection) == [("p-1", 4, "HASH")]


async def rehash(connection: asyncpg.Connection, script: ScriptedLedger, sequence: int) -> None:
    before = script.entries[sequence - 2].hash
    forged = chain_hash(before, structs.replace(script.entries[sequence - 1], reference="forged"))
    await tamper(
        connection,
        f"UPDATE ledger_entry SET reference = 'forged', hash = '\\x{forged.hex()}'"
        f" WHERE portfolio_id = 'p-1' AND sequence = {sequence}",
    )


async def test_the_last_entry_hashed_anew_is_not_what_the_portfolio_knows(
    connection: asyncpg.Connection, script: ScriptedLedger
) -> None:
    await rehash(connection, script, 8)
    assert await verify(connection) == [("p-1", 8, "HEAD")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("ledger_hash = sha256('x')", (8, "HEAD")),
        ("cash = cash + 0.000001", (8, "HEAD")),
        ("ledger_sequence = 7", (8, "INSERTED")),
        ("ledger_sequence = 10", (9, "MISSING")),
    ],
)
async def test_a_changed_portfolio_is_found(
    connection: asyncpg.Connection, script: ScriptedLedger, change: str, expected: tuple[int, str]
) -> None:
    await connection.execute(f"UPDATE portfolio SET {change} WHERE id = 'p-1'")
    assert await verify(connection) == [("p-1", *expected)]


async def test_what_the_program_never_writes_is_named_and_the_check_goes_on(
    connection: asyncpg.Connection, script: ScriptedLedger
) -> None:
    await connection.execute("ALTER TABLE ledger_entry DROP CONSTRAINT ledger_kind")
    await tamper(
        connection,
        "UPDATE ledger_entry SET cash_after = 'NaN' WHERE portfolio_id = 'p-1' AND sequence = 2",
        "UPDATE ledger_entry SET kind = 'GIFT', scale = 'x' WHERE portfolio_id = 'p-1' AND sequence = 5",
        "UPDATE ledger_entry SET reference = 'x' WHERE portfolio_id = 'p-1' AND sequence = 7",
    )
    assert await verify(connection) == [("p-1", 2, "UNREADABLE"), ("p-1", 5, "UNREADABLE"), ("p-1", 7, "HASH")]


async def test_entries_of_a_portfolio_that_was_deleted_are_found(
    connection: asyncpg.Connection, script: ScriptedLedger
) -> None:
    async with connection.transaction():
        await connection.execute("SET LOCAL session_replication_role = replica")  # no foreign keys
        await connection.execute("DELETE FROM portfolio WHERE id = 'p-1'")
    assert await verify(connection) == [("p-1", 0, "INSERTED")]


async def test_a_long_ledger_is_read_in_parts(fresh_database: str, connection: asyncpg.Connection) -> None:
    long = ScriptedLedger("p-9")
    for _ in range(ENTRIES_AT_ONCE + 10):
        long.cash("DEPOSIT", "1")
    async with asyncpg.create_pool(fresh_database, min_size=1, max_size=1) as pool:
        await LedgerBuilder(pool).portfolio("p-9")
        await long.write(pool)
    assert await verify(connection) == []
    at = ENTRIES_AT_ONCE + 1
    await tamper(connection, f"UPDATE ledger_entry SET late = true WHERE sequence = {at}")
    assert await verify(connection) == [("p-9", at, "HASH")]


def test_behind_a_gap_nothing_is_held_against_the_next_entry() -> None:
    script = ScriptedLedger()
    for _ in range(4):
        script.cash("DEPOSIT", "1")
    check, faults = ChainCheck("p-1"), []
    for entry in (script.entries[0], *script.entries[3:]):
        faults += check.take(entry)
    head = Head("p-1", 5, script.portfolio.ledger_hash, Decimal(4))
    assert [(fault.sequence, fault.detail) for fault in faults] == [(2, "entries 2 to 3 are missing")]
    assert check.end(head) == []


def test_a_portfolio_without_entries_is_in_order() -> None:
    assert ChainCheck("p").end(Head("p", 0, b"", Decimal(0))) == []
    assert ChainCheck("p").end(Head("p", 0, CHAIN_START, Decimal(1)))[0].kind == "HEAD"


def test_faults_read_like_sentences() -> None:
    script = ScriptedLedger()
    changed: Any = structs.replace(script.entries[0], cash_after=5)
    details = [fault.detail for fault in ChainCheck("p-1").take(changed)]
    assert details == [
        "its hash does not follow from its content and entry 0",
        "cash_after is 5 micro-units, 0 follow from the entry before",
    ]
