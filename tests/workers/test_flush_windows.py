"""What a flush writes and what it tells: watched and unwatched portfolios, those that are held back, and windows."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from engine.book import Holding
from engine.instants import to_ns
from engine.marks import FrameHeader, Mark, MarkArray, decode_frame, decode_mark
from engine.messages import Quote
from engine.runtime.clock import MarketClock, MarketClockPlan
from engine.stores import redis_keys
from engine.stores.hot_state_redis import FlushOutcome, HotStateWriter
from engine.stores.ledger_postgres import Lease
from tests.book_time import Stage
from workers.flusher import IDLE_INTERVAL_S, Flusher
from workers.owned_shard import OwnedShard

NOON = datetime(2026, 11, 17, 12, 20, tzinfo=UTC)
SLOW_S, WINDOW_S = 1.0, 0.01
EPOCH = 7
WAIT_S = 10


class Hot:
    """Hot state as a node of the API sees it: marks that can be read, and frames."""

    def __init__(self, stage: Stage) -> None:
        self._book = stage.book
        self.layout, self.encode = stage.hot.layout, stage.hot.encode
        self.marks: dict[str, Mark] = {}
        self.frames: list[tuple[FrameHeader, dict[str, Mark]]] = []
        self.listeners: list[Callable[[dict[str, Mark]], None]] = []
        self.answers: list[Exception] = []
        self.takes_s = 0.0

    async def flush(self, header: FrameHeader, slots: np.ndarray, marks: MarkArray, shown_count: int) -> FlushOutcome:
        await asyncio.sleep(self.takes_s)
        if self.answers:
            raise self.answers.pop(0)
        names = self._book.portfolio_ids(slots)
        rows = {name: decode_mark(row.tobytes(), EPOCH) for name, row in zip(names, marks, strict=True)}
        self.marks |= rows
        shown = {name: rows[name] for name in names[:shown_count]}
        self.frames.append((header, shown))
        for listener in self.listeners:
            listener(shown)
        return FlushOutcome.WRITTEN

    @property
    def shown(self) -> set[str]:
        return {name for _, rows in self.frames for name in rows}


class Windows(Stage):
    """An evaluator that owns shards 0 and 1, in which it is known who watches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        super().__init__(monkeypatch, NOON, **settings)
        self.looks: list[tuple[float, str]] = []
        for shard in (0, 1):
            self.owned[shard] = self.owned.get(shard) or self._own(shard)
            self.interest.live(shard)
        self.clocks.wall_s += 10
        self.replace_hot(Hot(self))
        self.badges.look = self._look  # type: ignore[method-assign]

    def _own(self, shard: int) -> OwnedShard:
        return OwnedShard(Lease(shard, EPOCH, "log"), 0, published=True)

    def _look(self, owned: Any, slots: np.ndarray, as_of_ns: int) -> None:
        self.looks += [(self.clocks.wall_s, name) for name in self.book.portfolio_ids(slots)]

    def replace_hot(self, hot: Any) -> None:
        self.hot = hot
        self.flusher = Flusher(self.settings, self.clocks, self)  # type: ignore[arg-type]
        self.time = self.flusher.time

    def begin(self, *names: str) -> None:
        """Portfolios of AAPL in shards 0 and 1."""
        for number, name in enumerate(names):
            self.open(name, shard=number % 2)
            self.interest.opened(number % 2, name)

    def watch(self, *names: str, node: str = "node") -> None:
        for shard in (0, 1):
            mine = [name for name in names if self.book.shard[self.book.slot(name)] == shard]
            self.interest.tell(shard, node, mine, True, self.clocks.wall_s + 1_000)

    async def window(self, wait_s: float = WINDOW_S) -> None:
        self.clocks.wall_s += wait_s
        self.clocks.now += timedelta(seconds=wait_s)
        await self.flusher.flush()

    async def settle_all(self) -> None:
        """All that has changed by now is written, and nothing is remembered of it."""
        await self.flusher.flush(everything=True)
        if isinstance(self.hot, Hot):
            self.hot.frames.clear()
        self.looks.clear()

    def price(self, price: str, symbol: str = "AAPL") -> None:
        self.quote(price, self.clocks.now, symbol)

    def nav(self, name: str) -> int:
        return self.book.nav(name)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Windows:
    return Windows(monkeypatch)


async def test_watched_rows_are_written_at_once_and_the_others_in_their_turn(windows: Windows) -> None:
    windows.begin("a", "b", "c", "d")
    windows.watch("a", "d")
    await windows.settle_all()
    windows.price("11")
    began_s, hot = windows.clocks.wall_s, windows.hot
    await windows.window()
    assert {name for name, mark in hot.marks.items() if mark.nav == 11_000_000} == {"a", "d"}
    while any(mark.nav != 11_000_000 for mark in hot.marks.values()):
        await windows.window()
        assert windows.clocks.wall_s - began_s < SLOW_S + 0.05
    assert windows.clocks.wall_s - began_s > 0.05
    assert hot.shown == {"a", "d"}


async def test_with_nobody_watching_all_of_it_is_slow_and_every_flush_has_its_number(windows: Windows) -> None:
    windows.begin(*(f"p-{number}" for number in range(10)))
    await windows.settle_all()
    hot, writes = windows.hot, 0
    for step in range(300):
        windows.price(f"{11 + step / 100:.2f}")
        await windows.window()
        writes = max(writes, len(hot.frames))
    assert hot.shown == set()
    assert 2 * 2 <= writes <= 2 * 4  # two shards in three seconds
    for shard in (0, 1):
        headers = [header for header, _ in hot.frames if header.shard == shard]
        assert all(one.sequence == two.previous_sequence for one, two in pairwise(headers))
        assert all(header.oldest_event_ns == 0 for header in headers)


async def test_without_a_slow_rate_everything_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(monkeypatch, flush_interval_ms=20, unwatched_flush_interval_ms=20)
    windows.begin("a", "b")
    windows.watch("a")
    await windows.settle_all()
    windows.price("11")
    await windows.window()
    assert {mark.nav for mark in windows.hot.marks.values()} == {11_000_000}
    assert windows.hot.shown == {"a"}


async def test_a_portfolio_that_becomes_watched_comes_with_the_next_frame(windows: Windows) -> None:
    windows.begin("a", "b")
    await windows.settle_all()
    windows.price("11")
    await windows.window()
    assert windows.hot.shown == set()
    windows.watch("a")
    await windows.window()
    assert windows.hot.shown == {"a"}
    assert windows.hot.marks["a"].nav == 11_000_000


@pytest.mark.parametrize("seed", range(40))
async def test_whenever_a_node_reads_and_is_heard_it_ends_with_the_newest_value(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """It listens first, then reads, and its interest takes a while; prices move until then and a little longer."""
    choices, windows = random.Random(seed), Windows(monkeypatch)
    names = [f"p-{number}" for number in range(6)]
    windows.begin(*names)
    await windows.settle_all()
    hot: Hot = windows.hot
    known: dict[str, Mark] = {}

    def hear(marks: dict[str, Mark]) -> None:
        for name, mark in marks.items():
            if name in known and mark.sequence > known[name].sequence:
                known[name] = mark

    hot.listeners.append(hear)
    waiting: list[tuple[int, str]] = []
    told: list[str] = []
    last_move = choices.randrange(100, 250)
    for step in range(last_move + 300):
        if step < last_move and choices.random() < 0.03:
            windows.price(f"{10 + choices.randrange(1_000) / 100:.2f}")
        await windows.window()
        if step < last_move and choices.random() < 0.05 and len(known) < 4:
            name = choices.choice([name for name in names if name not in known])
            known[name] = hot.marks[name]
            waiting.append((step + choices.randrange(200), name))
        for at, name in list(waiting):
            if at <= step:
                told.append(name)
                waiting.remove((at, name))
                windows.watch(*told)
    assert known and not waiting
    for name, mark in known.items():
        assert mark.nav == windows.nav(name), f"{name} is left behind at {mark}"


async def test_a_flush_that_failed_is_written_by_the_next_one_unwatched_rows_too(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows.flusher._outage, "begin_or_continue", lambda _: 0)
    windows.begin("a", "b")
    windows.watch("a")
    await windows.settle_all()
    hot: Hot = windows.hot
    windows.price("11")
    at_ns = to_ns(windows.clocks.now)
    hot.answers = [RedisConnectionError()]
    failed = 0
    while not failed:
        await windows.window()
        failed = 1 - len(hot.answers)
    assert hot.shown == set()
    await windows.window()
    header, rows = next((header, rows) for header, rows in hot.frames if rows)
    assert (rows["a"].nav, header.oldest_event_ns) == (11_000_000, at_ns)


# -- held back -------------------------------------------------------------------------------------------------


async def test_a_portfolio_whose_positions_are_on_their_way_waits_and_no_other_does(windows: Windows) -> None:
    windows.begin("a", "x", "b", "y")  # a and b are of shard 0
    windows.watch("a", "b")
    await windows.settle_all()
    hot: Hot = windows.hot
    with windows.flusher.holding(windows.owned[0], np.array([windows.book.slot("a")])):
        windows.price("11")
        for _ in range(150):
            await windows.window()
        assert {name for name, mark in hot.marks.items() if mark.nav == 11_000_000} == {"b", "x", "y"}
        assert "a" not in {name for _, name in windows.looks}
    await windows.window()
    assert hot.marks["a"].nav == 11_000_000


async def test_what_was_booked_is_written_at_once_and_told_only_to_who_watches(windows: Windows) -> None:
    windows.begin("a", "b", "c", "d")
    windows.watch("a")
    await windows.settle_all()
    hot: Hot = windows.hot
    for name in ("a", "c"):
        with windows.flusher.holding(windows.owned[0], np.array([windows.book.slot(name)])):
            windows.book.set_position(name, Holding("AAPL", Decimal(3), 30_000_000, 0))
    await windows.window()
    assert (hot.marks["a"].nav, hot.marks["c"].nav) == (30_000_000, 30_000_000)
    assert hot.shown == {"a"}


# -- who else sees ---------------------------------------------------------------------------------------------


async def test_badges_look_at_every_change_within_a_tenth_of_a_second_watched_or_not(windows: Windows) -> None:
    names = [f"p-{number}" for number in range(20)]
    windows.begin(*names)
    windows.watch(*names[:3])
    await windows.settle_all()
    for step in range(100):
        if step % 15 == 0:
            windows.price(f"{11 + step}")
            moved_s = windows.clocks.wall_s
            windows.looks.clear()
        await windows.window()
        if step % 15 == 14:
            assert {name for at_s, name in windows.looks if at_s - moved_s < 0.13} == set(names)


async def test_watchers_are_shown_every_row_that_was_written(windows: Windows) -> None:
    seen: dict[str, int] = {}

    def watch(owned: Any, slots: np.ndarray, marks: MarkArray) -> None:
        seen.update(zip(windows.book.portfolio_ids(slots), marks["nav"].tolist(), strict=True))

    windows.flusher.watchers.append(watch)
    windows.begin("a", "b", "c", "d")
    windows.watch("b")
    windows.price("11")
    for _ in range(110):
        await windows.window()
    assert seen == dict.fromkeys("abcd", 11_000_000)


# -- equal in the end ------------------------------------------------------------------------------------------


@pytest.fixture
async def client(redis_db: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_db, protocol=3) as redis:
        yield redis


async def marks_after(monkeypatch: pytest.MonkeyPatch, client: Redis, share: float, seed: int) -> dict[bytes, bytes]:
    """The hashes of hot state after a random course of quotes and bookings, watched by a share of all portfolios."""
    await client.flushall()
    with monkeypatch.context() as patch:
        windows, course, choices = Windows(patch), random.Random(seed), random.Random(seed + 1)
        layout = windows.hot.layout
        writer = HotStateWriter(client)
        writer.layout = layout
        windows.replace_hot(writer)
        for shard in (0, 1):
            assert await writer.advance(shard, EPOCH, "me", 1)
        names = [f"p-{number}" for number in range(40)]
        for number, name in enumerate(names):
            windows.open(name, shard=number % 2, symbol=("AAPL", "BTC", "GOLD")[number % 3])
            windows.interest.opened(number % 2, name)
        watched = [name for name in names if choices.random() < share]
        for _ in range(250):
            for symbol in ("AAPL", "BTC", "GOLD"):
                if course.random() < 0.3:
                    windows.price(f"{course.randrange(100, 10_000) / 100}", symbol)
            if course.random() < 0.2:
                name = course.choice(names)
                with windows.flusher.holding(windows.owned[names.index(name) % 2], np.array([windows.book.slot(name)])):
                    holding = Holding("BTC", Decimal(course.randrange(1, 50)), course.randrange(10**9), 0)
                    windows.book.set_position(name, holding)
            if choices.random() < 0.1:
                windows.watch(*choices.sample(watched, len(watched) // 2), *watched[:3])
            await windows.window(choices.choice([0.01, 0.02, 0.1]))
            windows.clocks.now = NOON + timedelta(seconds=_ / 100)
        windows.clocks.now = NOON + timedelta(seconds=10)
        for _ in range(int(SLOW_S / 0.05) + 3):
            await windows.window(0.05)
    found = {}
    for shard in (0, 1):
        for name, packed in (await client.hgetall(redis_keys.marks(shard, EPOCH))).items():
            row = np.frombuffer(packed, windows.book.marks(np.zeros(0, np.int64), 0, 0).dtype).copy()
            row["as_of_ns"] = row["sequence"] = 0
            found[name] = row.tobytes()
    return found


@pytest.mark.parametrize("seed", [1, 2])
async def test_watched_or_not_hot_state_ends_with_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, client: Redis, seed: int
) -> None:
    everything = await marks_after(monkeypatch, client, 1, seed)
    assert len(everything) == 40
    assert await marks_after(monkeypatch, client, 0, seed) == everything
    assert await marks_after(monkeypatch, client, 0.5, seed) == everything


# -- latency ---------------------------------------------------------------------------------------------------


def observed(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"navstream_{name}_count", labels) or 0


@pytest.mark.parametrize("is_recorded", [False, True])
async def test_a_frame_says_how_old_it_is_and_stages_are_observed(windows: Windows, is_recorded: bool) -> None:
    windows.begin("a", "b")
    windows.watch("a")
    await windows.settle_all()
    if is_recorded:
        windows.flusher._clock = MarketClock(MarketClockPlan(0, 1_000, [20_000]))
    stages = ("received_to_valued_seconds", "valued_to_hot_seconds", "tick_to_hot_seconds")
    before = [observed(stage) for stage in stages]
    received_ns, at_ns = time.time_ns() - 3_000_000, to_ns(windows.clocks.now)
    for later, symbol in ((5, "AAPL"), (0, "AAPL"), (2, "BTC")):
        quote = Quote(symbol, f"{11 + later}", at_ns + later, "feed")
        windows.quotes.waiting.add(quote, received_ns + later)
    await windows.window()
    ((header, _),) = [(header, rows) for header, rows in windows.hot.frames if rows]
    assert (header.oldest_event_ns, header.oldest_received_ns) == (at_ns, received_ns)
    assert received_ns < header.sent_at_ns <= time.time_ns()
    after = [observed(stage) for stage in stages]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 0 if is_recorded else 1]
    windows.hot.frames.clear()
    for _ in range(120):
        await windows.window()
    assert {(of.oldest_event_ns, of.oldest_received_ns) for of, _ in windows.hot.frames} == {(0, 0)}


# -- the loop, by the wall's clock -----------------------------------------------------------------------------


@asynccontextmanager
async def looping(windows: Windows) -> AsyncIterator[list[float]]:
    """The flush loop runs inside; yields the instants at which its flushes began."""
    stop, begun_s, flush = asyncio.Event(), list[float](), windows.flusher.flush

    async def noted(everything: bool = False) -> None:
        begun_s.append(time.monotonic())
        windows.clocks.now = NOON + timedelta(seconds=time.monotonic() - began_s)
        await flush(everything)

    began_s = time.monotonic()
    windows.flusher.flush = noted  # type: ignore[method-assign]
    task = asyncio.create_task(windows.flusher.run(stop))
    try:
        yield begun_s
    finally:
        stop.set()
        async with asyncio.timeout(WAIT_S):
            await task


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Windows:
    """By the wall's own clock, with `a` watched and everything written."""
    with monkeypatch.context() as patch:
        windows = Windows(patch)
        windows.begin("a", "b")
    windows.interest.live(0)
    windows.interest.live(1)
    for known in windows.interest._shards.values():
        known.known_at_s = 0.0
    for shard, name in enumerate("ab"):
        windows.interest.tell(shard, "node", [name], True, time.monotonic() + 1_000)
    return windows


def send(windows: Windows, price: str) -> None:
    windows.price(price)
    windows.quotes.arrived()  # type: ignore[attr-defined]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0.001)


async def test_an_idle_loop_looks_around_seldom_and_wakes_for_a_quote(ticking: Windows) -> None:
    hot: Hot = ticking.hot
    async with looping(ticking) as begun_s:
        await until(lambda: len(hot.marks) == 2)
        begun_s.clear()
        await asyncio.sleep(10 * IDLE_INTERVAL_S)
        assert len(begun_s) <= 11
        await until(lambda: time.monotonic() - begun_s[-1] > 2 * WINDOW_S)
        flushed = len(begun_s)
        send(ticking, "12")
        await until(lambda: hot.marks["a"].nav == 12_000_000)
        assert len(begun_s) == flushed + 1


async def test_a_quote_that_moves_nothing_watched_does_not_wake_the_loop(ticking: Windows) -> None:
    for shard in (0, 1):
        ticking.interest.tell(shard, "node", [], True, time.monotonic() + 1_000)
    async with looping(ticking) as begun_s:
        await asyncio.sleep(1)
        begun_s.clear()
        for step in range(100):
            send(ticking, f"{12 + step}")
            await asyncio.sleep(0.01)
        assert len(begun_s) <= 30


async def test_an_overload_makes_the_window_longer_and_no_queue(ticking: Windows) -> None:
    """Hot state takes 60 ms for a flush: six windows' quotes are conflated, and the last one is shown right after."""
    hot: Hot = ticking.hot
    hot.takes_s = 0.06
    applied, windows_count = list[str](), observed("flush_window_seconds")
    tick_all = ticking.book.tick_all

    def noted(quotes: Any, *more: Any) -> list[int]:
        applied.extend(str(price) for _, price, _, _ in quotes)
        return tick_all(quotes, *more)

    ticking.book.tick_all = noted  # type: ignore[method-assign]
    async with looping(ticking) as begun_s:
        for step in range(200):
            send(ticking, str(100 + step))
            await asyncio.sleep(0.005)
        await until(lambda: hot.marks.get("a") is not None and hot.marks["a"].nav == 299_000_000)
    lengths_s = np.diff(begun_s)
    assert np.median(lengths_s) >= 0.06
    assert len(applied) <= len(begun_s) < 200 / 2
    assert observed("flush_window_seconds") > windows_count


def test_frames_of_marks_have_the_shown_rows_alone() -> None:
    class NoRedis:
        def register_script(self, _: str) -> None:
            return None

    writer = HotStateWriter(NoRedis())  # type: ignore[arg-type]
    names = ["p", "qq", "rr", "s"]
    for slot, name in enumerate(names):
        writer.layout.place(slot, name)
    sent: list[bytes] = []

    async def send_all(_shard: int, _key: str, commands: list[list[bytes]]) -> list[int]:
        sent.extend(b"".join(command) for command in commands)
        return [2, 1]

    writer._send = send_all  # type: ignore[method-assign]
    marks = np.zeros(4, np.dtype([("nav", "<i8"), ("rest", "V136")]))
    marks["nav"] = [1, 2, 3, 4]
    header = FrameHeader(0, 1, 2, 1, 3, 4)
    slots = np.array([2, 0, 1, 3])
    asyncio.run(writer.flush(header, slots, marks, 2))  # type: ignore[arg-type]
    hset, publish = sent
    assert all(name.encode() in hset for name in names)
    _, groups = decode_frame(publish[publish.index(b"NVM3") : -2])
    assert {name for ids, _ in groups for name in ids} == {b"rr", b"p"}
