"""What goes wrong around an evaluator, and that it ends where it would have ended without.

The interleavings that real servers show once in a thousand runs are made here on purpose: a commit whose answer is
lost, a day cut while positions are written, a shard that leaves while it is flushed, a renewal before the last surplus
is gone.
"""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import AsyncIterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition

from engine.baselines import Baseline
from engine.book import Account, Holding
from engine.booking import Booked
from engine.entries import draft_event
from engine.instants import HOUR_NS
from engine.marks import MarkQuality
from engine.messages import Quote, quote_encoder
from engine.pnl import DayBase
from engine.portfolio import Portfolio, Present
from engine.posting import PositionsChange
from engine.runtime.clock import WallClock
from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.hot_state_redis import FlushOutcome
from engine.stores.ledger_postgres import Fenced, Lease
from engine.stores.shards_postgres import Tenure
from tests.evaluator_processes import evaluators
from tests.running_system import (
    AT,
    MICRO,
    System,
    connected,
    deposit,
    eventually,
    fill,
    opening,
    read_all,
    running,
    until_answered,
)
from workers.batch_posting import post_in_steps
from workers.corporate_actions import ActionSchedule
from workers.dead_letters import DEAD_LETTER_BYTES_MAX
from workers.evaluator import Evaluator
from workers.flusher import OwnedShard


@pytest.fixture
async def system(redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str) -> AsyncIterator[System]:
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        flush_interval_ms=20,
    )
    async with connected(settings) as one:
        yield one


@pytest.fixture
async def alone() -> AsyncIterator[Evaluator]:
    """An evaluator that is connected to nothing; its parts are replaced by the test."""
    settings = Settings(redis_url="redis://127.0.0.1:1", postgres_url="postgresql://127.0.0.1:1/x")
    evaluator = Evaluator(settings, WallClock())

    async def nothing(*_: object) -> Any:
        return {}

    evaluator.actions = ActionSchedule(SimpleNamespace(known=nothing, applied=nothing))  # type: ignore[arg-type]
    yield evaluator
    await evaluator._redis.aclose()
    await evaluator._engine.dispose()


def lease(shard: int, epoch: int = 1) -> Lease:
    return Lease(shard, epoch, "log")


def own(evaluator: Evaluator, *shards: int) -> None:
    """Give the evaluator shards with one portfolio each, holding one AAPL."""
    for shard in shards:
        evaluator.owned[shard] = OwnedShard(lease(shard), 0, published=True)
        account = Account(0, 0, 0, 0, 0, 0, 0, 0, 1, DayBase(0, 1, 0))
        evaluator.book.open(f"p-{shard}", shard, account, [Holding("AAPL", Decimal(1), 7, 0)])
        evaluator.flusher.place(f"p-{shard}", "00:00 UTC")


# -- with real servers ---------------------------------------------------------------------------------------


async def test_a_commit_whose_answer_was_lost_counts_once_and_marks_stay_in_order(system: System) -> None:
    async with running(system.settings) as evaluator:
        await system.send(opening("p-1"), deposit("p-1", "5", "d1"), fill("p-1", "BUY", "2", "1", "b1"))
        await system.quote("AAPL", "1.5")
        before = await system.mark_when("p-1", lambda mark: mark.nav == 6 * MICRO)
        for _ in range(5):
            await system.quote("AAPL", "1.5")
            await system.quote("AAPL", "1.6")
        before = await system.mark_when("p-1", lambda mark: mark.nav == 6_200_000)
        book, lost = evaluator._ledger.book, []

        async def book_and_lose_the_answer(*arguments: Any) -> Any:
            booked = await book(*arguments)
            if len(lost) < 2:
                lost.append(booked)
                raise ConnectionResetError
            return booked

        evaluator._ledger.book = book_and_lose_the_answer  # type: ignore[method-assign]
        await system.send(deposit("p-1", "7", "d2"))
        after = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 4)
        await system.send(fill("p-1", "SELL", "1", "2", "s1"))
        last = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 5)
    assert len(lost) == 2
    assert (after.nav, last.nav) == (13_200_000, 13_600_000)
    assert before.epoch == after.epoch == last.epoch
    assert before.sequence < after.sequence < last.sequence


async def test_a_process_that_stands_still_inside_transactions_loses_its_shards(
    system: System, children: ChildProcesses
) -> None:
    """Batches of it wait for a row that the test holds, renewals for the batches; then it stands still."""
    settings = system.settings.model_copy(update={"lease_duration_ms": 1_000, "lease_renewal_interval_ms": 200})

    async def waiting_count() -> int:
        return await system.pool.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

    async def batch_and_renewal_wait() -> bool:
        return await waiting_count() >= 2

    async def is_booked() -> bool | None:
        return await system.pool.fetchval("SELECT true FROM ledger_entry WHERE event_id = 'd1'")

    async with evaluators(children, settings) as processes, system.pool.acquire() as holder:
        processes.start("frozen")
        await system.send(opening("p-1"))
        await system.mark_when("p-1", lambda mark: True)
        async with holder.transaction():
            await holder.execute("SELECT FROM portfolio FOR UPDATE")
            await system.send(deposit("p-1", "5", "d1"))
            await until_answered(batch_and_renewal_wait, 5)
            processes.signal("frozen", signal.SIGSTOP)
        async with running(settings):
            await eventually(is_booked, 6, waiting_count)


async def test_a_message_larger_than_a_dead_letter_may_be_does_not_stop_the_partition(system: System) -> None:
    settings = system.settings
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap, max_request_size=4 * 1024 * 1024)
    await producer.start()
    async with running(settings):
        await system.send(opening("p-1"))
        await producer.send_and_wait(settings.topic, b"x" * 1_200_000, key=b"p-1")
        await system.send(deposit("p-1", "5", "d1"))
        await system.mark_when("p-1", lambda mark: mark.cash == 5 * MICRO)
    await producer.stop()
    letters = await read_all(system, f"{settings.topic}.dlq")
    assert letters == [(b"x" * DEAD_LETTER_BYTES_MAX, b"TOO_LONG")]


async def test_what_is_no_price_never_reaches_the_book_and_stops_nothing(system: System) -> None:
    await system.redis.hset(redis_keys.PRICES, "BAD", b"\xc1garbage")
    nan = Quote("AAPL", "NaN", WallClock().now_ns(), "test", 1)
    await system.redis.hset(redis_keys.PRICES, "AAPL", quote_encoder.encode(nan))
    async with running(system.settings):
        await system.send(opening("p-1"), deposit("p-1", "5", "d1"), fill("p-1", "BUY", "2", "1", "b1"))
        first = await system.mark_when("p-1", lambda mark: mark.ledger_sequence == 3)
        assert (first.nav, first.quality) == (5 * MICRO, MarkQuality.MISSING)
        for price in ("NaN", "0", "-3", "Infinity", "x", "1e999999999"):
            await system.quote("AAPL", price)
            await asyncio.sleep(0.06)  # three flushes, so that each would have had its effect
            assert (await system.mark("p-1")).nav == 5 * MICRO  # type: ignore[union-attr]
        await system.quote("AAPL", "3")
        assert (await system.mark_when("p-1", lambda mark: mark.quality is MarkQuality.LIVE)).nav == 9 * MICRO


# -- interleavings made on purpose ---------------------------------------------------------------------------


async def test_a_renewal_does_not_count_what_is_about_to_be_let_go_as_surplus_again(alone: Evaluator) -> None:
    own(alone, 0, 1, 2, 3)

    async def renew(*_: object) -> Tenure:
        return Tenure(frozenset(range(4)), [], 2)

    alone.shards = SimpleNamespace(renew=renew)  # type: ignore[assignment]
    for _ in range(3):
        await alone._renew()
    assert alone._leaving == {0, 1}


async def test_every_batch_of_a_fetch_comes_to_an_end_before_the_next_fetch(alone: Evaluator) -> None:
    own(alone, 0, 1)
    ended = []
    waiting = {TopicPartition("topic", shard): [SimpleNamespace(offset=0, key=b"", value=b"")] for shard in (0, 1)}

    async def getmany(*asked: TopicPartition, **_: object) -> dict[Any, Any]:
        return {one: waiting.pop(one) for one in asked if one in waiting}

    async def book(of: Lease, *_: object) -> None:
        await asyncio.sleep(0.05 * of.shard)
        ended.append(of.shard)
        raise ConnectionResetError

    alone._consumer = SimpleNamespace(getmany=getmany, assignment=lambda: set(waiting))
    alone.producer = SimpleNamespace()
    alone._ledger = SimpleNamespace(book=book)  # type: ignore[assignment]
    with pytest.raises(ConnectionResetError):
        await alone._poll()
    assert ended == [0, 1]
    assert {claimed.shard for claimed in alone._claims} == {0, 1}


async def test_a_batchs_positions_that_could_not_be_written_have_the_shard_published_again(alone: Evaluator) -> None:
    own(alone, 0)

    async def fail(*_: object) -> bool:
        raise ConnectionResetError

    alone.hot.write_positions = fail  # type: ignore[method-assign]
    change = PositionsChange("p-0", False, ["AAPL"], {}, [])
    await alone.positions.write(alone.owned[0], [change])
    assert not alone.owned[0].published


async def test_a_shard_that_turns_out_fenced_when_taken_again_leaves_the_book(alone: Evaluator) -> None:
    own(alone, 0, 1)
    released = []

    async def fenced(_: Lease) -> OwnedShard:
        raise Fenced("a newer epoch")

    async def release(of: Lease) -> None:
        released.append(of)

    alone._take_over.take = fenced  # type: ignore[method-assign]
    alone.shards = SimpleNamespace(release=release)  # type: ignore[assignment]
    await alone._take(lease(0))
    assert alone._leaving == {0}
    await alone._let_go(0)
    assert (alone.owned.keys(), "p-0" in alone.book, "p-1" in alone.book) == ({1}, False, True)


async def test_a_shard_taken_again_under_its_lease_goes_on_with_its_sequence(alone: Evaluator) -> None:
    own(alone, 0)
    alone.owned[0].sequence = 41

    async def take(of: Lease) -> OwnedShard:
        return OwnedShard(of, 9)

    alone._take_over.take = take  # type: ignore[method-assign]
    await alone._take(lease(0))
    assert (alone.owned[0].sequence, alone.owned[0].next_offset) == (41, 9)
    await alone._take(lease(0, epoch=2))
    assert alone.owned[0].sequence == 0


async def test_shards_are_published_one_by_one_as_they_are_taken(alone: Evaluator) -> None:
    done: list[str] = []

    async def take(of: Lease) -> OwnedShard:
        done.append(f"take {of.shard}")
        return OwnedShard(of, 0)

    async def settle(owned: OwnedShard) -> None:
        if not owned.published:
            done.append(f"publish {owned.lease.shard}")
        owned.published = True

    alone._take_over.take, alone._take_over.settle = take, settle  # type: ignore[method-assign]
    alone._assign = lambda: None  # type: ignore[method-assign]
    alone.quotes.ready.set()
    alone._claims = [lease(0), lease(1)]
    await alone._change_shards()
    assert done == ["take 0", "publish 0", "take 1", "publish 1"]
    assert alone._claims == []


async def test_a_batch_is_not_flushed_before_its_positions(alone: Evaluator) -> None:
    """Whoever takes over reads the ledger sequences of marks as what positions are up to."""
    own(alone, 0, 1)
    flushed: list[str] = []

    async def flush(_: object, slots: np.ndarray, *__: object) -> FlushOutcome:
        flushed.extend(alone.book.portfolio_ids(slots))
        return FlushOutcome.WRITTEN

    async def write_positions(*_: object) -> bool:
        await alone.flusher.flush()
        assert flushed == ["p-1"]
        return True

    alone.hot.flush, alone.hot.write_positions = flush, write_positions  # type: ignore[assignment,method-assign]
    held = Portfolio("p-0", "USD")
    entry = held.book(draft_event(opening("p-0"), AT), Present(0)).entry
    booked = Booked(entries=[entry], portfolios={"p-0": held}, touched={"p-0": set()})
    await post_in_steps(alone, alone.owned[0], booked)
    await alone.flusher.flush()
    assert flushed == ["p-1", "p-0"]


async def test_refused_positions_stop_a_shards_marks_at_once(alone: Evaluator) -> None:
    own(alone, 0)

    async def refuse(*_: object) -> bool:
        return False

    alone.hot.write_positions = refuse  # type: ignore[method-assign]
    await alone.positions.write(alone.owned[0], [PositionsChange("p-0", False, ["AAPL"], {}, {})])
    assert not alone.owned[0].published
    assert alone._leaving == {0}


@pytest.mark.parametrize(("later_epochs", "is_kept"), [(1, True), (2, False)])
async def test_day_bases_outlive_a_lease_that_ran_out_unless_somebody_else_had_the_shard(
    alone: Evaluator, later_epochs: int, is_kept: bool
) -> None:
    """PostgreSQL is away at the cut, for longer than a lease."""
    own(alone, 0)
    taken = Baseline("p-0", 7 * MICRO, 1, {"AAPL": 7 * MICRO})
    alone.owned[0].cuts_due.append((24 * HOUR_NS, [taken]))
    stored: list[tuple[Lease, list[Baseline]]] = []

    async def away(*_: object) -> None:
        raise ConnectionError("gone")

    async def store(of: Lease, _: object, baselines: list[Baseline]) -> None:
        stored.append((of, baselines))

    async def release(_: Lease) -> None:
        return None

    alone.shards.store_cut, alone.shards.release = away, release  # type: ignore[assignment,method-assign]
    alone.lose(lease(0), "lease expired")
    await alone._let_go(0)
    claimed = lease(0, 1 + later_epochs)
    if is_kept:
        with pytest.raises(ConnectionError):
            await alone._store_kept_cuts(claimed)
    alone.shards.store_cut = store  # type: ignore[assignment,method-assign]
    await alone._store_kept_cuts(claimed)
    await alone._store_kept_cuts(claimed)
    assert stored == ([(claimed, [taken])] if is_kept else [])


async def test_a_flush_writes_no_slot_that_has_changed_hands_since_it_was_counted(alone: Evaluator) -> None:
    own(alone, 0, 1)
    flushed: list[list[str]] = []

    async def flush(_: object, slots: np.ndarray, *__: object) -> FlushOutcome:
        flushed.append(alone.book.portfolio_ids(slots))
        return FlushOutcome.WRITTEN

    alone.hot.flush = flush  # type: ignore[assignment,method-assign]
    alone.owned[1].booked.append(alone.book.slots_of(1))
    alone.interest.live(0)
    alone.interest._shards[0].known_at_s = 0.0
    alone.interest.tell(0, "node", ["p-0"], complete=True, expires_at_s=math.inf)
    assert alone.interest.slots_of(0) is not None
    alone.book.drop_shard(1)
    alone.book.drop_shard(0)
    del alone.owned[1]
    own(alone, 2)
    alone.owned[2].published = False
    await alone.flusher.flush()
    assert flushed == [[]], "a heartbeat of shard 0"
    assert alone.book.portfolio_ids(alone.book.changed()) == ["p-2"]


async def test_leaving_is_said_before_shards_are_given_back_and_claims_are_given_back_too(alone: Evaluator) -> None:
    own(alone, 0)
    alone._claims = [lease(5)]
    said: list[object] = []

    async def leave() -> None:
        said.append("leave")

    async def release(of: Lease) -> None:
        said.append(of.shard)

    alone.shards = SimpleNamespace(leave=leave, release=release)  # type: ignore[assignment]
    await alone._leave()
    assert said == ["leave", 0, 5]
