"""Checks of portfolios between a real PostgreSQL and a real Redis, whose states a test writes as an evaluator would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import asyncpg
import numpy as np
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.instants import to_ns
from engine.marks import MARK
from engine.messages import OpenEvent
from engine.portfolio import Portfolio, value_portfolio
from engine.posting import hot_position
from engine.reconciliation import SUMS
from engine.runtime.connections import connect_redis, make_engine, postgres_dsn
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.ledger_rows import opened_row
from engine.stores.shards_postgres import Shards
from engine.stores.tables import portfolio
from tests.builders import HotStateBuilder
from tests.scripted_ledger import BEGIN, ScriptedLedger
from workers import ledger_folds, portfolio_checks
from workers.portfolio_checks import Check, PortfolioChecks
from workers.quote_history import QuoteHistory

WAIT_S = 10
EPOCH = 1


@dataclass
class Stage:
    """The servers, and what an evaluator does on them."""

    engine: AsyncEngine
    pool: asyncpg.Pool
    hot: HotStateBuilder
    history: QuoteHistory
    checks: PortfolioChecks

    async def open(self, life: ScriptedLedger, shard: int = 0) -> None:
        name = life.portfolio_id
        event = OpenEvent(
            event_id=name, portfolio_id=name, owner="ann", name=name, base_currency="USD", opened_at=BEGIN
        )
        async with self.engine.begin() as connection:
            await connection.execute(insert(portfolio), [opened_row(shard, event)])
        await self.book(life)
        await self.publish(life, shard)

    async def book(self, life: ScriptedLedger) -> None:
        """Bring the permanent record to the life's present."""
        known = await self.pool.fetchval("SELECT count(*) FROM ledger_entry WHERE portfolio_id = $1", life.portfolio_id)
        await life.write(self.pool, life.entries[known:])

    async def publish(self, life: ScriptedLedger, shard: int = 0, epoch: int = EPOCH) -> None:
        """Bring quotes and hot state to the life's present."""
        await self.hot.quotes(list(life.quotes.values()))
        await self.positions(life, shard)
        await self.mark(life, shard, epoch)
        await self.hot.point(shard, epoch)
        await self.hot.redis.hset(redis_keys.shard(shard), "updated_at_ns", to_ns(life.at))

    async def mark(self, life: ScriptedLedger, shard: int = 0, epoch: int = EPOCH) -> None:
        now, row = life.portfolio, np.zeros(1, MARK)
        valued = value_portfolio(now, life.prices())
        row["nav"], row["positions_value"], row["unrealized"] = valued.nav, valued.positions_value, valued.unrealized
        row["sequence"], row["ledger_sequence"] = 7, now.ledger_sequence
        for name in SUMS:
            row[name] = getattr(now, name)
        await self.hot.redis.hset(redis_keys.marks(shard, epoch), now.portfolio_id, row.tobytes())

    async def positions(self, life: ScriptedLedger, shard: int = 0) -> None:
        held = life.portfolio.positions.items()
        packed = {symbol: hot_position(one, 5, life.splits.get(symbol, [])) for symbol, one in held}
        await self.hot.positions(shard, life.portfolio_id, packed)

    async def check(self, *names: str) -> dict[str, Check]:
        return {check.finding.portfolio_id: check for check in await self.checks.check(names)}

    async def figures(self, name: str) -> list[str]:
        return (await self.check(name))[name].finding.figures


@pytest.fixture
async def stage(fresh_database: str, redis_db: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    monkeypatch.setattr(portfolio_checks, "ATTEMPTS_MAX", 3)
    monkeypatch.setattr(portfolio_checks, "ATTEMPT_INTERVAL_S", 0.2)
    settings = Settings(postgres_url=fresh_database, redis_url=redis_db)
    engine, history = make_engine(settings, "test"), QuoteHistory()
    await Shards(engine, "setup", 1_000).ensure(4, "log")
    await Shards(engine, "m-1", 60_000).renew([], "log")

    async def no_pause() -> None:
        return

    async with (
        asyncpg.create_pool(postgres_dsn(fresh_database), min_size=1, max_size=2) as pool,
        connect_redis(settings, "test") as redis,
    ):
        checks = PortfolioChecks(engine, redis, history, no_pause)
        stage = Stage(engine, pool, HotStateBuilder(redis), history, checks)
        yield stage
    await engine.dispose()


def lived(name: str = "p-1") -> ScriptedLedger:
    life = ScriptedLedger(name)
    life.cash("DEPOSIT", "1000")
    life.quote("AAPL", "100")
    life.fill("AAPL", "BUY", "3", "99.5", fee="0.25")
    life.fill("MSFT", "SELL", "2", "51")
    life.wait()
    life.quote("AAPL", "101")
    return life


@pytest.fixture
async def life(stage: Stage) -> AsyncIterator[ScriptedLedger]:
    """A portfolio that everybody agrees about, and a watch of its quotes."""
    life = lived()
    await stage.open(life)
    watch = asyncio.create_task(stage.history.watch(stage.hot.redis))
    async with asyncio.timeout(WAIT_S):
        while stage.history.last("AAPL") is None:
            await asyncio.sleep(0.01)
    yield life
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch


async def test_agreement(stage: Stage, life: ScriptedLedger) -> None:
    await stage.open(lived("p-2"), shard=3)
    found = await stage.check("p-1", "p-2", "p-none")
    assert {name: check.finding.figures for name, check in found.items()} == {"p-1": [], "p-2": []}
    check = found["p-1"]
    assert (check.shard, check.shard_epoch, check.is_kept) == (0, EPOCH, True)
    assert (check.finding.epoch, check.finding.sequence, check.finding.ledger_sequence) == (EPOCH, 7, 4)


async def test_a_mark_that_follows_is_waited_for(stage: Stage, life: ScriptedLedger) -> None:
    """Booked, not yet in hot state: as between a transaction and the flush after it."""
    life.fill("AAPL", "BUY", "1", "100")
    await stage.book(life)
    checking = asyncio.create_task(stage.figures("p-1"))
    await asyncio.sleep(0.3)
    assert not checking.done()
    await stage.publish(life)
    assert await checking == []


async def test_a_portfolio_just_opened_is_waited_for(stage: Stage, life: ScriptedLedger) -> None:
    other = lived("p-2")
    await stage.open(other)
    await stage.hot.redis.hdel(redis_keys.marks(0, EPOCH), "p-2")
    checking = asyncio.create_task(stage.figures("p-2"))
    await asyncio.sleep(0.1)
    await stage.mark(other)
    assert await checking == []


async def test_a_split_is_in_the_ledger_before_it_is_in_hot_state(stage: Stage, life: ScriptedLedger) -> None:
    life.wait()
    life.split("AAPL", Fraction(4))
    await stage.book(life)
    checking = asyncio.create_task(stage.figures("p-1"))
    await asyncio.sleep(0.1)
    await stage.positions(life)
    await asyncio.sleep(0.2)
    await stage.mark(life)
    assert await checking == []


async def test_a_mark_may_be_ahead_of_what_was_read_before_it(stage: Stage, life: ScriptedLedger) -> None:
    """A busy portfolio: whenever it is read, it has moved on."""
    stop = asyncio.Event()

    async def trade() -> None:
        while not stop.is_set():
            life.fill("AAPL", "BUY", "1", "100")
            await stage.book(life)
            await stage.positions(life)
            await stage.mark(life)

    trading = asyncio.create_task(trade())
    checks_count = 0
    while checks_count < 5 or life.portfolio.ledger_sequence <= 20:
        assert await stage.figures("p-1") == []
        checks_count += 1
    stop.set()
    await trading


async def test_a_mark_that_stays_behind_is_found(stage: Stage, life: ScriptedLedger) -> None:
    life.cash("DEPOSIT", "5")
    await stage.book(life)
    finding = (await stage.check("p-1"))["p-1"].finding
    assert (finding.figures, finding.drift) == (["ledger_sequence"], 5_000_000)


@pytest.mark.parametrize("packed", [b"short", bytes(MARK.itemsize - 1) + b"\xff", None])
async def test_a_mark_that_can_not_be_read(stage: Stage, life: ScriptedLedger, packed: bytes | None) -> None:
    """Too short, of no quality there is, or absent."""
    key = redis_keys.marks(0, EPOCH)
    await (stage.hot.redis.hset(key, "p-1", packed) if packed else stage.hot.redis.hdel(key, "p-1"))
    finding = (await stage.check("p-1"))["p-1"].finding
    assert (finding.figures, finding.drift) == (["mark"], life.nav())


async def test_a_mark_of_zeros(stage: Stage, life: ScriptedLedger) -> None:
    await stage.hot.redis.hset(redis_keys.marks(0, EPOCH), "p-1", bytes(MARK.itemsize))
    assert await stage.figures("p-1") == ["ledger_sequence"]


async def test_hot_positions_that_can_not_be_read(stage: Stage, life: ScriptedLedger) -> None:
    key = redis_keys.positions(0, "p-1")
    await stage.hot.redis.hset(key, mapping={"AAPL": b"\xc1", b"\xff\xfe": b"\x00"})
    assert await stage.figures("p-1") == ["hot position AAPL", "hot position \ufffd\ufffd"]
    await stage.hot.redis.delete(key)
    await stage.hot.redis.set(key, "a text")
    assert await stage.figures("p-1") == ["hot position AAPL", "hot position MSFT"]


async def test_a_pointer_that_says_nothing(stage: Stage, life: ScriptedLedger) -> None:
    for pointer in (b"x", b"2"):
        await stage.hot.redis.hset(redis_keys.shard(0), "epoch", pointer)
        check = (await stage.check("p-1"))["p-1"]
        assert (check.finding.figures, check.is_kept) == (["mark"], False)
    await stage.hot.redis.delete(redis_keys.shard(0))
    assert not (await stage.check("p-1"))["p-1"].is_kept


async def test_a_shard_without_an_owner_is_not_kept(stage: Stage, life: ScriptedLedger) -> None:
    await stage.pool.execute("UPDATE shard SET owner = NULL")
    check = (await stage.check("p-1"))["p-1"]
    assert (check.finding.figures, check.is_kept) == ([], False)


async def test_a_shard_far_behind_the_quotes_is_not_kept(stage: Stage, life: ScriptedLedger) -> None:
    """Its evaluator is alive and behind: what its marks were made from is not known any more."""
    pointer, flushed_at_ns = redis_keys.shard(0), to_ns(life.at)
    await stage.hot.redis.hset(pointer, "updated_at_ns", flushed_at_ns - 1)
    assert not (await stage.check("p-1"))["p-1"].is_kept
    await stage.hot.redis.hdel(pointer, "updated_at_ns")
    assert not (await stage.check("p-1"))["p-1"].is_kept
    await stage.hot.redis.hset(pointer, "updated_at_ns", flushed_at_ns)
    assert (await stage.check("p-1"))["p-1"].is_kept


async def test_a_broken_ledger_is_told_from_hot_state_adrift(stage: Stage, life: ScriptedLedger) -> None:
    await stage.pool.execute("UPDATE position SET cost = cost + 1 WHERE symbol = 'AAPL'")
    finding = (await stage.check("p-1"))["p-1"].finding
    assert (finding.figures, finding.is_broken) == (["position row AAPL"], True)
    async with stage.pool.acquire() as connection, connection.transaction():
        await connection.execute("ALTER TABLE ledger_entry DISABLE TRIGGER ledger_entry_append_only")
        await connection.execute("UPDATE ledger_entry SET nav_effect = 0 WHERE sequence = 3")
        await connection.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")
    finding = (await stage.check("p-1"))["p-1"].finding
    assert (finding.figures, finding.is_broken) == (["ledger"], True)
    assert "p-1#3: hash" in finding.differences[0].found


async def test_a_ledger_restored_behind_a_kept_fold(
    stage: Stage, life: ScriptedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same portfolio, as long as before, with another past: what was kept of it is not held against it."""
    monkeypatch.setattr(ledger_folds, "KEPT_ENTRIES_MIN", 1)
    assert await stage.figures("p-1") == []
    other = lived()
    other.cash("DEPOSIT", "7")
    async with stage.pool.acquire() as connection, connection.transaction():
        await connection.execute("ALTER TABLE ledger_entry DISABLE TRIGGER ledger_entry_append_only")
        await connection.execute("DELETE FROM ledger_entry")
        await connection.execute("DELETE FROM position")
        await connection.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")
    other.entries[1:] = []
    other.portfolio = Portfolio("p-1", "USD")
    other.portfolio.replay(other.entries[0])
    other.cash("DEPOSIT", "20")
    other.cash("DEPOSIT", "30")
    other.cash("DEPOSIT", "40")
    other.cash("DEPOSIT", "50")
    await stage.book(other)
    await stage.publish(other)
    assert await stage.figures("p-1") == []


async def test_an_outage_is_no_difference(stage: Stage, life: ScriptedLedger) -> None:
    away = connect_redis(Settings(redis_url="redis://127.0.0.1:1"), "test")

    async def no_pause() -> None:
        return

    checks = PortfolioChecks(stage.engine, away, stage.history, no_pause)
    with pytest.raises(RedisConnectionError):
        await checks.check(["p-1"])
    await away.aclose()
