"""Take-over with a real ledger and a real Redis: what of hot state is written again, and what is left as it is.

A `Life` is an owner from its claim until it dies. After each the positions in Redis are compared with those that
writing all of them gives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from engine.instants import to_ns
from engine.positions import hot_position_decoder
from engine.posting import PositionsChange
from engine.stores import redis_keys
from engine.stores.hot_state_former import FormerHotState
from engine.stores.hot_state_reads import HotStateReads
from engine.stores.hot_state_redis import HotStateWriter
from engine.stores.reconciliations import Reconciliations
from tests.book_time import MICRO, Stage
from tests.bookkeeping import cash, fill, opening
from tests.shard_ledger import CUT_AT, ShardLedger, shard_ledger
from workers import hot_positions
from workers.flusher import Flusher
from workers.hot_positions import HotPositions
from workers.owned_shard import OwnedShard
from workers.take_over import TakeOver

HOUR = timedelta(hours=1)
NAMES = ("p-1", "p-2", "p-3")


class Life(Stage):
    """An owner of shard 0 that remembers whose positions it wrote, and where the pointer stood then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger, redis: Redis, now: Any) -> None:
        super().__init__(monkeypatch, now)
        self.redis, self.ledger, self.shards = redis, ledger, ledger.shards
        self.hot, self.former = HotStateWriter(redis), FormerHotState(redis)
        self.owned = {}
        self.written: list[tuple[str, int]] = []
        self._write_positions = self.hot.write_positions
        self.hot.write_positions = self.write_and_note  # type: ignore[method-assign]
        self.flusher = Flusher(self.settings, self.clocks, self)  # type: ignore[arg-type]
        self.positions = HotPositions(self.clocks, self)  # type: ignore[arg-type]
        self.take_over = TakeOver(self, self.positions, self.flusher.time)  # type: ignore[arg-type]

    async def write_and_note(self, shard: int, epoch: int, changes: Any) -> bool:
        pointer = int(await self.redis.hget(redis_keys.shard(0), "epoch") or 0)
        self.written += [(change.portfolio_id, pointer) for change in changes]
        return await self._write_positions(shard, epoch, changes)

    async def begin(self) -> OwnedShard:
        """Claim the shard under the next epoch, and load it."""
        await self.ledger.admin.execute("UPDATE shard SET owner = NULL")
        (self.lease,) = (await self.shards.renew([], "cluster/topic")).claimed
        self.ledger.lease = self.lease
        self.owned[0] = await self.take_over.take(self.lease)
        return self.owned[0]

    async def live(self) -> OwnedShard:
        owned = await self.begin()
        await self.settle_all()
        return owned

    async def settle_all(self) -> None:
        owned = self.owned[0]
        for _ in range(20):
            await self.take_over.settle(owned)
        assert (owned.published, owned.positions_due, owned.rewriting) == (True, False, None)

    async def state(self) -> dict[str, Any]:
        """All positions and sectors of the shard, as they are in Redis."""
        found = {}
        for name in NAMES:
            packed = await self.redis.hgetall(redis_keys.positions(0, name))
            held = {symbol.decode(): hot_position_decoder.decode(value) for symbol, value in packed.items()}
            found[name] = held, await self.redis.hgetall(redis_keys.sector_values(0, name))
        return found

    async def check(self) -> None:
        """Nothing would be another if all of it were written again, and marks are of this epoch."""
        before = await self.state()
        assert await self.positions.write_again(self.owned[0], NAMES)
        assert await self.state() == before
        marks = await HotStateReads(self.redis, 5).marks(0, list(NAMES))
        sequences = [mark and (mark.epoch, mark.ledger_sequence) for mark in marks.values()]
        ledger = await self.ledger.admin.fetch("SELECT ledger_sequence FROM portfolio ORDER BY id")
        assert sequences == [(self.lease.epoch, row["ledger_sequence"]) for row in ledger]

    def who(self) -> list[str]:
        names, self.written = [name for name, _ in self.written], []
        return names


@asynccontextmanager
async def started(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger, redis: Redis, now: Any = CUT_AT + HOUR
) -> AsyncIterator[Life]:
    life = Life(monkeypatch, ledger, redis, now)
    life.quote("11", CUT_AT - HOUR)
    life.advance(now)
    yield life


@pytest.fixture
async def redis(redis_db: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_db, protocol=3)
    yield client
    await client.aclose()


@pytest.fixture
async def ledger(fresh_database: str) -> AsyncIterator[ShardLedger]:
    """Three portfolios with 1,000 in cash and some AAPL, booked before the cut."""
    async with shard_ledger(fresh_database) as one:
        for number, name in enumerate(NAMES, 1):
            await one.book(
                opening(name),
                cash(name, "DEPOSIT", "1000", f"d-{name}"),
                fill(name, "BUY", str(number), "10", f"b-{name}"),
            )
        yield one


@pytest.fixture
async def life(monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger, redis: Redis) -> AsyncIterator[Life]:
    """The owner after a first one, which published everything and died."""
    async with started(monkeypatch, ledger, redis) as first:
        await first.live()
        assert first.written == [(name, 0) for name in NAMES]
        await first.check()
    async with started(monkeypatch, ledger, redis) as second:
        yield second


async def forget(life: Life, *fields: str) -> None:
    await life.redis.hdel(redis_keys.shard(0), *fields)


# -- which positions are written ---------------------------------------------------------------------------------


async def test_positions_that_stand_where_the_ledger_stands_are_left(life: Life) -> None:
    await life.live()
    assert life.who() == []
    await life.check()


async def test_what_was_committed_and_not_written_is_written_before_the_pointer_moves(life: Life) -> None:
    await life.ledger.book(fill("p-2", "BUY", "3", "12", "b9", symbol="XOM"), at=CUT_AT + HOUR)
    await life.live()
    assert life.written == [("p-2", 2)]
    assert life.lease.epoch == 3
    await life.check()
    assert (await life.state())["p-2"][0]["XOM"].day_base == 36 * MICRO


async def test_a_nav_that_may_not_be_shown_is_not_written(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life.book, "out_of_range", lambda slots: slots == life.book.slot("p-3"))
    await life.live()
    marks = await HotStateReads(life.redis, 5).marks(0, list(NAMES))
    assert [mark is not None for mark in marks.values()] == [True, True, False]


async def test_a_ledger_that_was_set_back_is_written(life: Life) -> None:
    await life.ledger.admin.execute("UPDATE portfolio SET ledger_sequence = ledger_sequence - 1 WHERE id = 'p-3'")
    await life.live()
    assert life.who() == ["p-3"]


@pytest.mark.parametrize("lost", ["all", "pointer", "marks", "basis"])
async def test_what_redis_can_not_vouch_for_is_written_in_full_and_first(life: Life, lost: str) -> None:
    match lost:
        case "all":
            await life.redis.flushall()
        case "pointer":
            await life.redis.delete(redis_keys.shard(0))
        case "marks":
            await life.redis.delete(redis_keys.marks(0, 2))
        case _:
            await forget(life, "positions_basis")
    await life.live()
    pointer = 0 if lost in ("all", "pointer") else 2
    assert life.written == [(name, pointer) for name in NAMES]
    await life.check()


async def test_under_repair_nothing_in_hot_state_counts(life: Life) -> None:
    await life.redis.hdel(redis_keys.positions(0, "p-2"), "AAPL")
    repair = await Reconciliations(life.ledger.engine).ask_repair(0, 2, ["p-2"], ["positions"], 60)
    assert repair is not None
    await life.live()
    assert life.written == [(name, 2) for name in NAMES]
    await life.check()
    assert "AAPL" in (await life.state())["p-2"][0]


async def test_a_shard_loaded_again_under_its_own_lease_is_compared_with_its_own_marks(life: Life) -> None:
    owned = await life.live()
    await life.ledger.book(cash("p-1", "DEPOSIT", "5", "d9"), at=CUT_AT + HOUR)
    again = await life.take_over.take(life.lease)
    again.sequence = owned.sequence
    life.owned[0] = again
    await life.settle_all()
    assert life.who() == ["p-1"]
    await life.check()


async def test_a_shard_that_has_no_position_is_taken_over(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger, redis: Redis
) -> None:
    await ledger.admin.execute("DELETE FROM position")
    async with started(monkeypatch, ledger, redis) as life:
        await life.live()
        await life.check()
        assert (await life.state())["p-1"][0] == {}


# -- what else is in them ------------------------------------------------------------------------------------------


async def test_a_cut_that_nobody_took_rewrites_all_of_them_after_the_marks(life: Life) -> None:
    life.clocks.now = CUT_AT + 25 * HOUR
    life.flusher = Flusher(life.settings, life.clocks, life)  # type: ignore[arg-type]
    life.take_over = TakeOver(life, life.positions, life.flusher.time)  # type: ignore[arg-type]
    owned = await life.begin()
    await life.take_over.settle(owned)
    assert (owned.published, owned.positions_due, life.who()) == (True, True, [])
    await life.settle_all()
    assert sorted(life.written) == [(name, 3) for name in NAMES]
    assert (await life.state())["p-3"][0]["AAPL"].day_base == 33 * MICRO
    await life.check()
    assert owned.basis.startswith(f"{to_ns(CUT_AT + 24 * HOUR)}/")


@pytest.mark.parametrize("changed", ["splits", "classifications"])
async def test_other_splits_or_sectors_rewrite_all_of_them_after_the_marks(life: Life, changed: str) -> None:
    if changed == "splits":
        life.actions.splits_digest = lambda: "other"  # type: ignore[method-assign]
    else:
        life.sectors.arrival = 4
    await life.live()
    assert sorted(life.written) == [(name, 3) for name in NAMES]
    assert (await life.redis.hget(redis_keys.shard(0), "positions_basis")).decode() == life.owned[0].basis


async def test_classifications_that_were_followed_are_told_of_and_cost_the_next_owner_nothing(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    await life.live()
    life.sectors.arrival = 4
    await life.take_over.settle(life.owned[0])
    assert life.owned[0].basis.endswith("/3")
    life.clocks.wall_s += hot_positions.BASIS_CHECK_INTERVAL_S
    await life.take_over.settle(life.owned[0])
    async with started(monkeypatch, life.ledger, life.redis) as third:
        third.sectors.arrival = 4
        await third.live()
        assert third.written == []


async def test_all_of_them_are_written_in_steps_and_a_cut_in_between_makes_them_due_again(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_positions, "PORTFOLIOS_PER_STEP", 1)
    owned = await life.live()
    owned.positions_due = True
    for left in (2, 1):
        await life.take_over.settle(owned)
        assert owned.rewriting is not None
        assert len(owned.rewriting.left) == left
    basis = owned.basis
    life.book.cut(life.book.slots_of(0), to_ns(CUT_AT + HOUR))
    owned.positions_due = True
    await life.take_over.settle(owned)
    assert (sorted(life.who()), owned.rewriting, owned.basis) == (sorted(NAMES), None, basis)
    await life.settle_all()
    assert sorted(life.who()) == sorted(NAMES)
    assert owned.basis != basis
    await life.check()


async def test_a_step_that_redis_did_not_take_is_taken_again(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_positions, "PORTFOLIOS_PER_STEP", 2)
    owned = await life.live()
    owned.positions_due = True

    async def fail(*_: object) -> bool:
        raise RedisConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(life.hot, "write_positions", fail)
        with pytest.raises(RedisConnectionError):
            await life.take_over.settle(owned)
    await life.settle_all()
    assert sorted(life.who()) == sorted(NAMES)


# -- two owners ------------------------------------------------------------------------------------------------------


async def test_from_the_claim_on_the_former_owner_writes_no_positions_and_no_marks_that_say_so(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paused between its commit and its positions."""
    former = await life.live()
    async with started(monkeypatch, life.ledger, life.redis) as new:
        await new.begin()
        assert await new.former.claim(0, new.lease.epoch) is not None
        await life.positions.write(former, [PositionsChange("p-1", True, (), {}, {})])
        assert (former.published, life.lost) == (False, [0])
        await new.settle_all()
        await new.check()
        await life.take_over.publish(former)
        assert not former.published
        await new.check()
