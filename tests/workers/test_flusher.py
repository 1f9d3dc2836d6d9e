"""Take-over and flush around day cuts: with a real ledger and hot state that only remembers what it was told.

A `Life` is an evaluator from its start until it stops or dies; what follows it knows only what PostgreSQL has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from engine.instants import to_ns
from engine.marks import FrameHeader, Mark, MarkArray, decode_mark
from engine.runtime import telemetry
from engine.stores.hot_state_former import FormerState
from engine.stores.hot_state_redis import FlushOutcome
from tests.book_time import MICRO, Stage, instant
from tests.bookkeeping import cash, fill, opening
from tests.shard_ledger import CUT_AT, ShardLedger, shard_ledger
from workers.flusher import FRAME_AGE_MAX_S, Flusher
from workers.hot_positions import HotPositions
from workers.owned_shard import OwnedShard, SnapshotFrame
from workers.take_over import TakeOver

SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)
LATE = "15:30 Europe/Paris"  # 14:30 UTC in winter


class Hot:
    """Hot state that takes everything, unless told otherwise, and remembers it."""

    def __init__(self, stage: Stage) -> None:
        self._hot = stage.hot
        self.layout = stage.hot.layout
        self.encode = stage.hot.encode
        self.flushed: list[tuple[FrameHeader, MarkArray]] = []
        self.pushed: list[bytes] = []
        self.positions: dict[str, dict[str, int]] = {}
        self.answers: list[FlushOutcome | Exception] = []
        self.basis = ""

    async def flush(self, header: FrameHeader, slots: object, marks: MarkArray, shown_count: int) -> FlushOutcome:
        self.flushed.append((header, marks.copy()))
        return FlushOutcome.WRITTEN

    async def push_snapshot(self, shard: int, epoch: int, frame: bytes) -> tuple[FlushOutcome, int]:
        answer = self.answers.pop(0) if self.answers else FlushOutcome.WRITTEN
        if isinstance(answer, Exception):
            raise answer
        if answer is FlushOutcome.WRITTEN:
            self.pushed.append(frame)
        return answer, 0

    async def write_positions(self, shard: int, epoch: int, changes: Any) -> bool:
        for change in changes:
            self.positions[change.portfolio_id] = {s: held.day_base for s, held in change.positions.items()}
        return True

    async def write_marks(self, *_: object) -> list[Any]:
        return []

    async def advance(self, *_: object) -> bool:
        return True

    async def claim(self, *_: object) -> FormerState:
        return FormerState(None, "")

    async def set_basis(self, shard: int, epoch: int, basis: str) -> bool:
        self.basis = basis
        return True


class Life(Stage):
    """An evaluator that owns shard 0 of the ledger, as far as its flusher goes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger, now: Any) -> None:
        super().__init__(monkeypatch, now)
        self.hot = Hot(self)  # type: ignore[assignment]
        self.shards, self.ledger = ledger.shards, ledger
        self.former: Any = self.hot
        self.flusher = Flusher(self.settings, self.clocks, self)  # type: ignore[arg-type]
        self.time = self.flusher.time
        self.positions = HotPositions(self.clocks, self)  # type: ignore[arg-type]
        self.take_over = TakeOver(self, self.positions, self.time)  # type: ignore[arg-type]
        self.owned = {}

    async def take(self) -> OwnedShard:
        owned = self.owned[0] = await self.take_over.take(self.ledger.lease)
        return owned

    async def until(self, now: Any, *, is_stored: bool = True) -> None:
        """Time goes on, flush by flush; the events loop stores what is due, if it gets to it."""
        for _ in range(6):
            self.clocks.now = now
            self.clocks.wall_s += 0.05
            await self.flusher.flush()
        if is_stored:
            for owned in self.owned.values():
                await self.take_over.settle(owned)

    def shown(self, name: str) -> tuple[int, int, Any]:
        mark = self.mark(name)
        return mark.nav, mark.day_pnl, instant(mark.day_cut_at_ns)


@pytest.fixture
async def ledger(fresh_database: str) -> AsyncIterator[ShardLedger]:
    """One portfolio with 1,000 in cash and 2 AAPL at a cost of 10 each, booked before the cut."""
    async with shard_ledger(fresh_database) as one:
        await one.book(opening("p-1"), cash("p-1", "DEPOSIT", "1020", "d1"), fill("p-1", "BUY", "2", "10", "b1"))
        yield one


async def baselines(ledger: ShardLedger) -> list[tuple[str, Any, int, bool]]:
    rows = await ledger.admin.fetch("SELECT * FROM day_baseline ORDER BY cut_at, portfolio_id")
    return [(row["portfolio_id"], row["cut_at"], int(row["nav"] * MICRO), row["estimated"]) for row in rows]


# -- restarts around a cut ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dies", ["before", "pending", "taken", "stored", "later"])
@pytest.mark.parametrize("returns", [1, 7])
@pytest.mark.parametrize("recorded_before", [timedelta(0), HOUR], ids=["at the cut", "before it"])
async def test_wherever_an_evaluator_dies_the_day_counts_from_the_same_value(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger, dies: str, returns: int, recorded_before: timedelta
) -> None:
    """The cut lies at 1,022 (AAPL at 11); at 12.5 the day has gained 3, wherever the line between two lives is."""
    await ledger.close("AAPL", "11", CUT_AT - recorded_before, CUT_AT - HOUR)  # what the snapshots worker recorded
    first = Life(monkeypatch, ledger, CUT_AT - HOUR)
    await first.take()
    first.quote("11", CUT_AT - SECOND)
    await first.until(CUT_AT - SECOND)
    if dies == "pending":
        first.clocks.now = CUT_AT + SECOND
        await first.flusher.flush()
        assert first.shown("p-1")[2] == CUT_AT - 24 * HOUR
    elif dies != "before":
        first.quote("12", CUT_AT + SECOND)
        await first.until(CUT_AT + 2 * SECOND, is_stored=dies != "taken")
        assert first.shown("p-1") == (1_024 * MICRO, 2 * MICRO, CUT_AT)
    if dies == "later":
        await first.until(CUT_AT + HOUR)
    second = Life(monkeypatch, ledger, CUT_AT + returns * HOUR)
    second.quote("12.5", CUT_AT + returns * HOUR - SECOND)
    await second.take()
    assert second.shown("p-1") == (1_025 * MICRO, 3 * MICRO, CUT_AT)
    assert second.book.position_day_base("p-1", "AAPL") == 22 * MICRO
    await second.until(CUT_AT + returns * HOUR)
    is_estimated = dies in ("before", "pending", "taken") and recorded_before > timedelta(0)
    cut = [row for row in await baselines(ledger) if row[1] == CUT_AT]
    assert cut == [("p-1", CUT_AT, 1_022 * MICRO, is_estimated)]


async def test_one_that_returns_at_the_very_instant_of_a_cut_takes_it(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger
) -> None:
    life = Life(monkeypatch, ledger, CUT_AT)
    life.quote("11", CUT_AT)
    life.quote("12", CUT_AT + SECOND)
    await life.take()
    assert life.shown("p-1")[2] == CUT_AT - 24 * HOUR
    await life.until(CUT_AT + 2 * SECOND)
    assert life.shown("p-1") == (1_024 * MICRO, 2 * MICRO, CUT_AT)
    assert await baselines(ledger) == [("p-1", CUT_AT, 1_022 * MICRO, False)]


async def test_a_cut_that_passes_while_a_shard_is_loaded_counts_for_it(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger
) -> None:
    """Its group is in no Book yet, so nothing waits for it: the shard is read again."""
    await ledger.book(opening("p-2") | {"day_cut": LATE})
    cut_at = CUT_AT + 14.5 * HOUR
    life = Life(monkeypatch, ledger, cut_at - SECOND)
    load, loads = ledger.shards.load, []

    async def load_slowly(*arguments: Any) -> Any:
        loaded = await load(*arguments)
        loads.append(life.clocks.now)
        if len(loads) == 1:
            await life.until(cut_at + 2 * SECOND)
        return loaded

    monkeypatch.setattr(ledger.shards, "load", load_slowly)
    await life.take()
    assert loads == [cut_at - SECOND, cut_at + 2 * SECOND]
    assert (life.shown("p-1")[2], life.shown("p-2")[2]) == (CUT_AT, cut_at)


async def test_a_shard_taken_again_keeps_its_day(monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger) -> None:
    life = Life(monkeypatch, ledger, CUT_AT - HOUR)
    await life.take()
    life.quote("11", CUT_AT - SECOND)
    life.quote("12", CUT_AT + SECOND)
    await life.until(CUT_AT + 2 * SECOND)
    await ledger.book(cash("p-1", "DEPOSIT", "5", "d2"), at=CUT_AT + HOUR)
    await life.take()
    assert life.shown("p-1") == (1_029 * MICRO, 2 * MICRO, CUT_AT)


async def test_portfolios_of_two_cuts_are_taken_over_each_with_its_own(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger
) -> None:
    await ledger.book(opening("p-2") | {"day_cut": LATE}, fill("p-2", "BUY", "1", "10", "b2"))
    late_at = CUT_AT + 14.5 * HOUR
    first = Life(monkeypatch, ledger, CUT_AT - HOUR)
    await first.take()
    first.quote("11", CUT_AT - SECOND)
    first.quote("14", late_at - SECOND)
    await first.until(late_at - SECOND)
    second = Life(monkeypatch, ledger, late_at + HOUR)
    second.quote("14", late_at - SECOND)
    await second.take()
    assert second.shown("p-1") == (1_028 * MICRO, 6 * MICRO, CUT_AT)
    assert second.shown("p-2") == (4 * MICRO, 0, late_at)
    await second.until(late_at + HOUR)
    assert await baselines(ledger) == [
        ("p-1", CUT_AT, 1_022 * MICRO, False),
        ("p-2", late_at, 4 * MICRO, False),  # made afterwards, of a price that has not changed since
    ]


async def test_after_a_cut_positions_are_written_with_their_new_day_bases(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger
) -> None:
    life = Life(monkeypatch, ledger, CUT_AT - HOUR)
    owned = await life.take()
    life.quote("11", CUT_AT - SECOND)
    await life.until(CUT_AT - SECOND)
    assert life.hot.positions == {"p-1": {"AAPL": 20 * MICRO}}
    life.quote("12", CUT_AT + SECOND)
    await life.until(CUT_AT + 2 * SECOND)
    assert life.hot.positions == {"p-1": {"AAPL": 22 * MICRO}}
    assert not owned.positions_due


async def test_a_portfolio_that_has_just_been_booked_begins_its_day(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger
) -> None:
    life = Life(monkeypatch, ledger, CUT_AT + HOUR)
    await life.take()
    account = (await ledger.one()).account
    life.book.open("p-2", 0, account)
    life.flusher.place("p-2", LATE)
    assert life.shown("p-2")[2] == CUT_AT - 9.5 * HOUR
    assert sorted(life.book.day_cuts) == ["00:00 UTC", LATE]


# -- flushes ---------------------------------------------------------------------------------------------------


def flushed(life: Life) -> list[tuple[FrameHeader, list[Mark]]]:
    hot: Any = life.hot
    return [(header, [decode_mark(row.tobytes(), 1) for row in marks]) for header, marks in hot.flushed]


async def test_all_of_a_flush_has_one_instant_and_none_lies_beyond_a_cut_that_was_not_taken(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger
) -> None:
    life = Life(monkeypatch, ledger, CUT_AT - SECOND)
    await life.take()
    await life.until(CUT_AT - SECOND)
    for milliseconds in range(0, 3_000, 50):
        life.quote(str(11 + milliseconds), CUT_AT - SECOND + milliseconds * SECOND / 1_000)
        life.clocks.now = CUT_AT - SECOND + milliseconds * SECOND / 1_000
        life.clocks.wall_s += 0.05
        await life.flusher.flush()
    cuts = set()
    for header, marks in flushed(life):
        for mark in marks:
            cuts.add(mark.day_cut_at_ns)
            assert mark.as_of_ns == header.flushed_at_ns
            assert mark.day_cut_at_ns <= mark.as_of_ns <= mark.day_cut_at_ns + 24 * 3_600 * 10**9
    assert cuts == {to_ns(CUT_AT - 24 * HOUR), to_ns(CUT_AT)}


async def test_readers_see_no_gap_where_a_snapshot_was_numbered(
    monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger
) -> None:
    life = Life(monkeypatch, ledger, CUT_AT - HOUR + SECOND)
    await life.take()
    await life.until(CUT_AT - HOUR + SECOND)
    for hour in range(3):
        life.quote(str(10 + hour), CUT_AT + (hour - 1) * HOUR + SECOND)
        await life.until(CUT_AT + (hour - 1) * HOUR + 2 * SECOND)
    hot: Any = life.hot
    assert len(hot.pushed) == 2
    headers = [header for header, _ in flushed(life)]
    assert len(headers) >= 3
    for before, header in pairwise(headers):
        assert header.previous_sequence == before.sequence < header.sequence
    assert headers[-1].sequence - headers[0].sequence == len(headers) - 1 + len(hot.pushed)


# -- snapshot frames -------------------------------------------------------------------------------------------


@pytest.fixture
async def life(monkeypatch: pytest.MonkeyPatch, ledger: ShardLedger) -> Life:
    """One with a frame that waits."""
    one = Life(monkeypatch, ledger, CUT_AT + HOUR + SECOND)
    owned = await one.take()
    await one.until(CUT_AT + HOUR + SECOND)
    monkeypatch.setattr("workers.flusher.time.monotonic", one.clocks.monotonic)
    owned.frames_due.append(SnapshotFrame(to_ns(CUT_AT + HOUR), b"frame", one.clocks.wall_s))
    return one


def counted(outcome: str) -> float:
    return float(telemetry.SNAPSHOT_FRAMES.labels(outcome)._value.get())


async def test_a_frame_that_redis_did_not_take_is_offered_again(life: Life) -> None:
    hot: Any = life.hot
    hot.answers, before = [RedisConnectionError(), FlushOutcome.LOST], counted("pushed")
    for kept in (1, 1, 0):
        await life.flusher.flush()
        assert len(life.owned[0].frames_due) == kept
    assert (hot.pushed, counted("pushed")) == ([b"frame"], before + 1)


async def test_a_frame_that_redis_can_not_take_in_time_is_a_gap(life: Life) -> None:
    hot: Any = life.hot
    hot.answers, before = [FlushOutcome.LOST, FlushOutcome.LOST], counted("lost")
    await life.flusher.flush()
    life.clocks.wall_s += FRAME_AGE_MAX_S
    await life.flusher.flush()
    assert (life.owned[0].frames_due, hot.pushed, counted("lost")) == ([], [], before + 1)


async def test_a_frame_of_a_shard_that_has_another_owner_is_not_kept(life: Life) -> None:
    hot: Any = life.hot
    hot.answers = [FlushOutcome.FENCED]
    await life.flusher.flush()
    assert (life.owned[0].frames_due, hot.pushed) == ([], [])


async def test_a_shards_frames_are_pushed_in_order(life: Life) -> None:
    hot: Any = life.hot
    life.owned[0].frames_due.append(SnapshotFrame(to_ns(CUT_AT + 2 * HOUR), b"second", life.clocks.wall_s))
    await life.flusher.flush()
    assert hot.pushed == [b"frame", b"second"]
