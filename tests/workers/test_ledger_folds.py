"""Folds of ledgers from a real PostgreSQL: in pieces, kept where they are dear, never trusted for ever."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.messages import OpenEvent
from engine.portfolio import Portfolio
from engine.runtime.connections import make_engine, postgres_dsn
from engine.runtime.settings import Settings
from engine.stores.ledger_rows import opened_row
from engine.stores.shards_postgres import Shards
from engine.stores.tables import portfolio
from tests.scripted_ledger import BEGIN, ScriptedLedger
from workers import ledger_folds
from workers.ledger_folds import LedgerFolds


class Counted:
    """Counts the reads of the ledger by the pauses after them."""

    def __init__(self) -> None:
        self.reads_count = 0

    async def __call__(self) -> None:
        self.reads_count += 1


@pytest.fixture
async def pool(fresh_database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(postgres_dsn(fresh_database), min_size=1, max_size=2) as made:
        yield made


@pytest.fixture
async def engine(fresh_database: str) -> AsyncIterator[AsyncEngine]:
    made = make_engine(Settings(postgres_url=fresh_database), "test")
    await Shards(made, "setup", 1_000).ensure(4, "log")
    yield made
    await made.dispose()


@pytest.fixture
def reads() -> Counted:
    return Counted()


@pytest.fixture
def folds(engine: AsyncEngine, reads: Counted) -> LedgerFolds:
    return LedgerFolds(engine, reads)


async def written(engine: AsyncEngine, pool: asyncpg.Pool, name: str, entries_count: int) -> ScriptedLedger:
    """A portfolio with so many entries in the database."""
    event = OpenEvent(event_id=name, portfolio_id=name, owner="ann", name=name, base_currency="USD", opened_at=BEGIN)
    async with engine.begin() as connection:
        await connection.execute(insert(portfolio), [opened_row(0, event)])
    life = ScriptedLedger(name)
    await grow(pool, life, entries_count - 1)
    return life


async def grow(pool: asyncpg.Pool, life: ScriptedLedger, count: int) -> None:
    """`count` entries more; the first time, what there is goes with them."""
    known = 0 if life.portfolio.ledger_sequence == 1 else len(life.entries)
    for number in range(count):
        life.fill("AAPL", "SELL" if number % 3 == 2 else "BUY", "2", str(100 + number % 7), fee="0.5")
    await life.write(pool, life.entries[known:])


async def change(pool: asyncpg.Pool, statement: str) -> None:
    """Change the ledger behind the program's back."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("ALTER TABLE ledger_entry DISABLE TRIGGER ledger_entry_append_only")
        await connection.execute(statement)
        await connection.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")


@pytest.mark.parametrize("piece", [1, 4, 7, 1_000])
async def test_ledgers_are_folded_in_pieces_of_any_size(
    engine: AsyncEngine, pool: asyncpg.Pool, folds: LedgerFolds, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(ledger_folds, "ENTRIES_PER_READ", piece)
    lives = [await written(engine, pool, f"p-{count}", count) for count in (1, 5, 13)]
    found = await folds.fold([life.portfolio_id for life in lives] + ["p-none"])
    assert {name: fold.portfolio for name, fold in found.items()} == {
        life.portfolio_id: life.portfolio for life in lives
    }
    assert {fold.mismatch for fold in found.values()} == {""}


async def test_a_long_ledger_is_not_folded_twice(
    engine: AsyncEngine, pool: asyncpg.Pool, folds: LedgerFolds, reads: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_folds, "KEPT_ENTRIES_MIN", 10)
    monkeypatch.setattr(ledger_folds, "ENTRIES_PER_READ", 5)
    long, short = await written(engine, pool, "p-long", 20), await written(engine, pool, "p-short", 9)
    for fold in (await folds.fold(["p-long", "p-short"])).values():
        folds.keep(fold)
    assert reads.reads_count == 6
    await grow(pool, long, 3)
    reads.reads_count = 0
    assert (await folds.fold(["p-long"]))["p-long"].portfolio == long.portfolio
    assert reads.reads_count == 1
    assert (await folds.fold(["p-short"]))["p-short"].portfolio == short.portfolio
    assert reads.reads_count == 3


async def test_a_kept_fold_is_given_up_in_time(
    engine: AsyncEngine, pool: asyncpg.Pool, folds: LedgerFolds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that also what was folded long ago is read again, and found changed."""
    monkeypatch.setattr(ledger_folds, "KEPT_ENTRIES_MIN", 10)
    await written(engine, pool, "p-1", 20)
    folds.keep((await folds.fold(["p-1"]))["p-1"])
    await change(pool, "UPDATE ledger_entry SET reference = 'other' WHERE sequence = 3")
    kept = (await folds.fold(["p-1"]))["p-1"]
    assert kept.mismatch == ""
    folds.keep(kept)
    monkeypatch.setattr(ledger_folds, "REFOLD_INTERVAL_S", 0)
    assert "p-1#3: hash" in (await folds.fold(["p-1"]))["p-1"].mismatch


async def test_a_ledger_set_back_is_folded_from_its_beginning(
    engine: AsyncEngine, pool: asyncpg.Pool, folds: LedgerFolds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_folds, "KEPT_ENTRIES_MIN", 10)
    life = await written(engine, pool, "p-1", 20)
    folds.keep((await folds.fold(["p-1"]))["p-1"])
    await change(pool, "DELETE FROM ledger_entry WHERE sequence > 15")
    await pool.execute("UPDATE portfolio SET ledger_sequence = 15")
    before = Portfolio("p-1", "USD")
    for entry in life.entries[:15]:
        before.replay(entry)
    found = (await folds.fold(["p-1"]))["p-1"]
    assert (found.portfolio, found.mismatch) == (before, "")


async def test_only_the_longest_are_kept(
    engine: AsyncEngine, pool: asyncpg.Pool, folds: LedgerFolds, reads: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_folds, "KEPT_ENTRIES_MIN", 5)
    monkeypatch.setattr(ledger_folds, "FOLDS_COUNT_MAX", 2)
    names = []
    for count in (8, 12, 10):
        names.append((await written(engine, pool, f"p-{count}", count)).portfolio_id)
    for name in names:
        folds.keep((await folds.fold([name]))[name])
    began = {name: (await folds.fold([name]))[name].begun_at_s for name in names}
    assert began["p-12"] < began["p-10"] < began["p-8"], "the shortest was folded anew"


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE ledger_entry SET amount = amount + 1 WHERE sequence = 4", "p-1#4: amount"),
        ("UPDATE ledger_entry SET nav_effect = 1 WHERE sequence = 4", "p-1#4: hash"),
        ("UPDATE ledger_entry SET content_hash = '' WHERE sequence = 4", "p-1#4: hash"),
        ("DELETE FROM ledger_entry WHERE sequence = 4", "p-1: entry 5 follows entry 3"),
        ("DELETE FROM ledger_entry WHERE sequence >= 4", "p-1: no entry 4"),
    ],
)
async def test_a_ledger_that_does_not_fold_says_where(
    engine: AsyncEngine, pool: asyncpg.Pool, folds: LedgerFolds, statement: str, said: str
) -> None:
    await written(engine, pool, "p-1", 9)
    other = await written(engine, pool, "p-2", 9)
    await change(pool, f"{statement} AND portfolio_id = 'p-1'")
    found = await folds.fold(["p-1", "p-2"])
    assert said in found["p-1"].mismatch
    assert found["p-2"].portfolio == other.portfolio
    folds.keep(found["p-1"])
    assert not folds._kept


async def test_an_account_far_beyond_its_ledger_is_soon_told(
    engine: AsyncEngine, pool: asyncpg.Pool, folds: LedgerFolds, reads: Counted
) -> None:
    await written(engine, pool, "p-1", 9)
    await pool.execute("UPDATE portfolio SET ledger_sequence = 1000000000000")
    assert (await folds.fold(["p-1"]))["p-1"].mismatch == "p-1: no entry 10"
    assert reads.reads_count == 1


async def test_entries_after_a_fold(engine: AsyncEngine, pool: asyncpg.Pool, folds: LedgerFolds) -> None:
    lives = {name: await written(engine, pool, name, 9) for name in ("p-1", "p-2", "p-3")}
    found = await folds.entries({"p-1": 7, "p-2": 3, "p-3": 9})
    assert found == {"p-1": lives["p-1"].entries[7:], "p-2": lives["p-2"].entries[3:]}
    assert await folds.entries({}) == {}
