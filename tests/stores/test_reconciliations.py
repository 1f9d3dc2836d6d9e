"""What the reconciler reads and keeps in a real PostgreSQL, and what a repair does to a shard's ownership."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import asyncpg
import pytest
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.corporate_actions import Split
from engine.messages import OpenEvent
from engine.reconciliation import Difference, Finding, ReconciliationStatus
from engine.runtime.connections import make_engine, postgres_dsn
from engine.runtime.settings import Settings
from engine.stores.ledger_rows import opened_row
from engine.stores.reconciliation_reads import LastCheck, ReconciliationReads
from engine.stores.reconciliations import Reconciliations, ShardTenure
from engine.stores.shards_postgres import Shards
from engine.stores.tables import portfolio
from tests.scripted_ledger import BEGIN, ScriptedLedger

LOG = "cluster/topic"
LEASE_MS = 60_000
AT = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
MICRO = 1_000_000


@pytest.fixture
async def engine(fresh_database: str) -> AsyncIterator[AsyncEngine]:
    made = make_engine(Settings(postgres_url=fresh_database), "test")
    yield made
    await made.dispose()


@pytest.fixture
async def pool(fresh_database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(postgres_dsn(fresh_database), min_size=1, max_size=2) as made:
        yield made


@pytest.fixture
async def store(engine: AsyncEngine, pool: asyncpg.Pool) -> Reconciliations:
    await Shards(engine, "setup", LEASE_MS).ensure(4, LOG)
    return Reconciliations(engine)


async def opened(engine: AsyncEngine, name: str, shard: int = 0) -> None:
    event = OpenEvent(
        event_id=f"open-{name}", portfolio_id=name, owner="ann", name=name, base_currency="USD", opened_at=BEGIN
    )
    async with engine.begin() as connection:
        await connection.execute(insert(portfolio), [opened_row(shard, event)])


def finding(name: str, drift: int = 0, *figures: str) -> Finding:
    return Finding(name, 3, 7, 12, drift, [Difference(name, figure, "1", "2") for figure in figures])


# -- what was found -----------------------------------------------------------------------------------------------


async def test_the_last_check_is_kept(engine: AsyncEngine, pool: asyncpg.Pool, store: Reconciliations) -> None:
    reads = ReconciliationReads(lambda: pool)
    for name in ("p-1", "p-2"):
        await opened(engine, name)
    assert await reads.last("p-1") is None
    found = [finding("p-2"), finding("p-1", 1_500_000, "nav", "cash", "nav")]
    await store.write(found, [ReconciliationStatus.AGREED, ReconciliationStatus.DRIFTED], AT)
    drifted = LastCheck(AT, 12, Decimal("1.5"), ReconciliationStatus.DRIFTED, ["cash", "nav"])
    assert await reads.last("p-1") == drifted
    assert await reads.last("p-2") == LastCheck(AT, 12, Decimal(0), ReconciliationStatus.AGREED, [])
    await store.write([replace(finding("p-1"), ledger_sequence=13)], [ReconciliationStatus.REPAIRED], AT)
    assert await reads.last("p-1") == LastCheck(AT, 13, Decimal(0), ReconciliationStatus.REPAIRED, [])
    await store.write([], [], AT)


async def test_those_never_checked_come_first_then_the_longest_ago(engine: AsyncEngine, store: Reconciliations) -> None:
    for name in ("p-1", "p-2", "p-3", "p-4"):
        await opened(engine, name)
    for name, hours in (("p-2", 3), ("p-1", 5), ("p-4", 4)):
        await store.write([finding(name)], [ReconciliationStatus.AGREED], AT + timedelta(hours=hours))
    assert await store.portfolios() == ["p-3", "p-2", "p-4", "p-1"]


# -- what is compared ---------------------------------------------------------------------------------------------


async def test_records_are_what_the_evaluator_wrote(
    engine: AsyncEngine, pool: asyncpg.Pool, store: Reconciliations
) -> None:
    lives = {name: ScriptedLedger(name) for name in ("p-1", "p-2")}
    for shard, life in enumerate(lives.values()):
        life.cash("DEPOSIT", "1000")
        life.fill("AAPL", "BUY", "4", "100", fee="1")
        life.fill("MSFT", "SELL", "2.5", "50")
        await opened(engine, life.portfolio_id, shard)
    lives["p-1"].wait()
    lives["p-1"].split("AAPL", Fraction(4))
    lives["p-1"].split("AAPL", Fraction(1, 2), late_by=timedelta(minutes=30))
    lives["p-1"].split("TSLA", Fraction(5))
    for life in lives.values():
        await life.write(pool)
    records = await store.records(["p-1", "p-2", "p-9"])
    assert records.shard_of == {"p-1": 0, "p-2": 1}
    for name, life in lives.items():
        assert records.portfolios[name].portfolio == life.portfolio
        assert records.portfolios[name].receivables == 0
    instant = lives["p-1"].at
    late_first = [Split(instant - timedelta(minutes=30), Fraction(1, 2)), Split(instant, Fraction(4))]
    assert records.splits == {0: {"AAPL": late_first}, 1: {}}, "those of held symbols, in each shard's own ledger"
    assert records.tenures == {0: ShardTenure(0, False), 1: ShardTenure(0, False)}


async def test_receivables_are_summed(engine: AsyncEngine, pool: asyncpg.Pool, store: Reconciliations) -> None:
    await opened(engine, "p-1")
    for number, amount in enumerate(("1.25", "-0.5")):
        await pool.execute(
            "INSERT INTO corporate_action (action_id, kind, symbol, terms, effective_at, recorded_at, content_hash)"
            " VALUES ($1, 'DIVIDEND', 'AAPL', '1', $2, $2, '')",
            f"a-{number}",
            AT,
        )
        await pool.execute("INSERT INTO receivable VALUES ('p-1', $1, $2)", f"a-{number}", Decimal(amount))
    assert (await store.records(["p-1"])).portfolios["p-1"].receivables == 750_000


async def test_whose_a_shard_is(pool: asyncpg.Pool, engine: AsyncEngine, store: Reconciliations) -> None:
    await opened(engine, "p-1", 2)
    await Shards(engine, "m-1", LEASE_MS).renew([], LOG)
    assert (await store.records(["p-1"])).tenures == {2: ShardTenure(1, True)}
    await pool.execute("UPDATE shard SET lease_until = now() - interval '1 second'")
    assert (await store.records(["p-1"])).tenures == {2: ShardTenure(1, False)}


# -- repairs ------------------------------------------------------------------------------------------------------


async def test_a_repair_moves_the_shard_to_the_next_epoch_and_nothing_else(
    engine: AsyncEngine, pool: asyncpg.Pool, store: Reconciliations
) -> None:
    """The former owner notices at its next renewal, and takes the shard again within the same one."""
    owner = Shards(engine, "m-1", LEASE_MS)
    owned = (await owner.renew([], LOG)).claimed
    assert [(lease.shard, lease.epoch) for lease in owned] == [(n, 1) for n in range(4)]
    await pool.execute("UPDATE shard SET next_offset = 40 + id")
    repair = await store.ask_repair(2, 1, ["p-2", "p-1"], {"nav", "cash"}, 600)
    (opened_repair,) = await store.open_repairs()
    assert (opened_repair.repair_id, opened_repair.shard, opened_repair.from_epoch) == (repair, 2, 1)
    assert opened_repair.portfolios == ["p-1", "p-2"]
    row = await pool.fetchrow("SELECT epoch, owner, next_offset, lease_until > now() AS lasts FROM shard WHERE id = 2")
    assert tuple(row) == (1, None, 42, True), "whoever asks whether every shard is kept is not alarmed"
    tenure = await owner.renew(owned, LOG)
    assert (tenure.kept, tenure.surplus) == ({0, 1, 3}, 0)
    assert [(lease.shard, lease.epoch) for lease in tenure.claimed] == [(2, 2)]
    row = await pool.fetchrow("SELECT epoch, owner, next_offset FROM shard WHERE id = 2")
    assert tuple(row) == (2, "m-1", 42)


async def test_one_repair_at_a_time_and_one_in_an_interval(
    engine: AsyncEngine, pool: asyncpg.Pool, store: Reconciliations
) -> None:
    owner = Shards(engine, "m-1", LEASE_MS)
    owned = list((await owner.renew([], LOG)).claimed)
    first = await store.ask_repair(2, 1, ["p-1"], ["nav"], 600)
    assert first is not None
    owned = [lease for lease in owned if lease.shard != 2] + list((await owner.renew(owned, LOG)).claimed)
    assert await store.ask_repair(2, 2, ["p-1"], ["nav"], 0) is None, "the first one is not done"
    await store.finish_repair(first, 2)
    assert await store.open_repairs() == []
    assert await store.ask_repair(2, 2, ["p-1"], ["nav"], 600) is None, "the first one was a moment ago"
    assert await store.ask_repair(1, 1, ["p-3"], ["nav"], 600) is not None, "another shard has its own"
    await pool.execute("UPDATE repair SET asked_at = asked_at - interval '601 seconds'")
    assert await store.ask_repair(2, 2, ["p-1"], ["nav"], 600) is not None
    done = await pool.fetchrow("SELECT to_epoch, done_at > asked_at AS later FROM repair WHERE id = $1", first)
    assert tuple(done) == (2, True)


async def test_a_shard_that_moved_or_that_nobody_has_is_not_repaired(
    engine: AsyncEngine, store: Reconciliations
) -> None:
    assert await store.ask_repair(2, 0, ["p-1"], ["nav"], 600) is None
    await Shards(engine, "m-1", LEASE_MS).renew([], LOG)
    assert await store.ask_repair(2, 0, ["p-1"], ["nav"], 600) is None
    assert await store.open_repairs() == []


async def test_of_two_that_ask_at_once_one_is_heard(engine: AsyncEngine, store: Reconciliations) -> None:
    await Shards(engine, "m-1", LEASE_MS).renew([], LOG)
    asked = await asyncio.gather(*(store.ask_repair(2, 1, [f"p-{n}"], ["nav"], 600) for n in range(6)))
    assert sum(repair is not None for repair in asked) == 1
    assert len(await store.open_repairs()) == 1
