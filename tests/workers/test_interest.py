"""Which slots are watched: against a model of sets, and heard from a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from api.hub import Hub
from api.interest import InterestTeller
from engine.book import Account, Book
from engine.messages import InterestFrame, interest_encoder
from engine.pnl import DayBase
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from workers.interest import Interest

WAIT_S = 10
ACCOUNT = Account(0, 0, 0, 0, 0, 0, 0, 0, 1, DayBase(0, 1, 0))
LATER = time.monotonic() + 1_000_000


class Heard:
    """Interest in shards whose channels are listened to for long enough, as far as not said otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, known: Iterable[int] = (0, 1)) -> None:
        self.now_s = 1_000.0
        monkeypatch.setattr("workers.interest.time.monotonic", lambda: self.now_s)
        self.book, self.changes = Book(), 0
        self.interest = Interest(Settings(), self.book, lambda: (0, 1), self._change)
        for shard in known:
            self.interest.live(shard)
        self.now_s += 10

    def _change(self) -> None:
        self.changes += 1

    def open(self, name: str, shard: int = 0) -> None:
        self.book.open(name, shard, ACCOUNT)
        self.interest.opened(shard, name)

    def tell(self, names: Iterable[str], node: str = "one", *, complete: bool = True, shard: int = 0) -> None:
        self.interest.tell(shard, node, names, complete, self.now_s + 6)

    def watched(self, shard: int = 0) -> set[str]:
        slots = self.interest.slots_of(shard)
        assert slots is not None
        assert slots.tolist() == sorted(slots.tolist())
        mine = self.book.slots_of(shard)
        assert set(mine[self.interest.is_watched(mine)].tolist()) == set(slots.tolist())
        return set(self.book.portfolio_ids(slots))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    return Heard(monkeypatch)


def test_a_shard_is_watched_as_a_whole_until_every_node_has_been_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard(monkeypatch, known=())
    heard.open("p-1")
    heard.tell([])
    assert heard.interest.slots_of(0) is None
    heard.interest.live(0)
    assert heard.interest.slots_of(0) is None
    heard.now_s += Settings().interest_interval_ms / 1_000
    assert heard.watched() == set()
    heard.interest.drop(0)
    assert heard.interest.slots_of(0) is None


def test_a_portfolio_is_watched_while_any_node_watches_it(heard: Heard) -> None:
    for name in ("p-1", "p-2", "p-3"):
        heard.open(name)
    heard.tell(["p-1", "p-2"])
    heard.tell(["p-2", "p-3"], "two")
    heard.tell(["p-3"], complete=False)
    assert heard.watched() == {"p-1", "p-2", "p-3"}
    heard.tell(["p-1"])
    assert heard.watched() == {"p-1", "p-2", "p-3"}
    heard.tell([], "two")
    assert heard.watched() == {"p-1"}


def test_what_becomes_watched_counts_as_changed_and_what_was_does_not(heard: Heard) -> None:
    for name in ("p-1", "p-2"):
        heard.open(name)
    heard.tell(["p-1"])
    heard.book.clear(heard.book.slots_of(0))
    changes = heard.changes
    heard.tell(["p-1"])
    heard.tell(["p-1"], "two", complete=False)
    assert (heard.book.changed().tolist(), heard.changes) == ([], changes)
    heard.tell(["p-1", "p-2"])
    assert heard.book.portfolio_ids(heard.book.changed()) == ["p-2"]
    assert heard.changes == changes + 1


def test_a_node_that_is_silent_is_forgotten_and_one_that_speaks_is_not(heard: Heard) -> None:
    for name in ("p-1", "p-2"):
        heard.open(name)
    heard.tell(["p-1"])
    heard.tell(["p-2"], "two")
    heard.now_s += 5
    heard.tell(["p-1"])
    heard.now_s += 2
    heard.interest.forget([0])
    assert heard.watched() == {"p-1"}


def test_nobody_is_forgotten_for_what_the_listener_missed(heard: Heard) -> None:
    """After a lost connection every node has its time to speak again."""
    heard.open("p-1")
    heard.tell(["p-1"])
    heard.now_s += 100
    heard.interest.live(0)
    heard.interest.forget([0])
    assert heard.watched() == {"p-1"}
    heard.now_s += 5
    heard.interest.forget([0])
    assert heard.watched() == set()


def test_a_shard_is_watched_as_a_whole_while_its_channel_is_lost(heard: Heard) -> None:
    """What nodes say meanwhile is not heard, and they say all of it within an interval."""
    heard.open("p-1")
    heard.tell(["p-1"])
    heard.interest.lost(0)
    heard.interest.lost(9)
    heard.now_s += 100
    assert heard.interest.slots_of(0) is None and heard.watched(1) == set()
    heard.interest.live(0)
    assert heard.interest.slots_of(0) is None
    heard.now_s += Settings().interest_interval_ms / 1_000
    assert heard.watched() == {"p-1"}


def test_portfolios_may_open_later_than_they_are_watched_and_slots_be_taken_by_others(heard: Heard) -> None:
    heard.tell(["late", "p-1"])
    heard.open("p-1")
    heard.open("p-2")
    assert heard.watched() == {"p-1"}
    heard.open("late")
    assert heard.watched() == {"p-1", "late"}
    heard.book.drop_shard(0)
    for name in ("q-1", "q-2", "q-3"):
        heard.open(name, shard=1)
    assert heard.watched(1) == set()
    heard.book.open("p-1", 0, ACCOUNT)
    heard.interest.taken(0)
    assert heard.watched() == {"p-1"}


def test_an_id_of_another_shard_watches_nothing(heard: Heard) -> None:
    heard.open("p-1", shard=1)
    heard.tell(["p-1"], shard=0)
    assert (heard.watched(0), heard.watched(1)) == (set(), set())


NAMES = [f"p-{number}" for number in range(6)]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("tell"), st.sampled_from("ab"), st.booleans(), st.sets(st.sampled_from(NAMES)), st.integers(0, 1)
        ),
        st.tuples(st.just("open"), st.sampled_from(NAMES), st.integers(0, 1)),
        st.tuples(st.just("take"), st.integers(0, 1), st.sets(st.sampled_from(NAMES))),
        st.tuples(st.just("wait"), st.integers(0, 8)),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_as_a_model_of_sets(steps: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        heard = Heard(patch)
        told: dict[tuple[int, str], tuple[set[str], float]] = {}
        place: dict[str, int] = {}
        for step, *of in steps:
            if step == "tell":
                node, complete, names, shard = of
                heard.tell(names, node, complete=complete, shard=shard)
                before = set() if complete else told.get((shard, node), (set(), 0))[0]
                told[shard, node] = before | names, heard.now_s + 6
            elif step == "open" and of[0] not in place:
                place[of[0]] = of[1]
                heard.open(*of)
            elif step == "take":
                shard, names = of
                heard.book.drop_shard(shard)
                place = {name: at for name, at in place.items() if at != shard}
                for name in sorted(names - place.keys()):
                    place[name] = shard
                    heard.book.open(name, shard, ACCOUNT)
                heard.interest.taken(shard)
            elif step == "wait":
                heard.now_s += of[0]
                heard.interest.forget([shard for shard in (0, 1) if any(at == shard for at, _ in told)])
                told = {key: (names, until) for key, (names, until) in told.items() if until > heard.now_s}
            for shard in (0, 1):
                wanted = {name for (at, _), (names, _) in told.items() if at == shard for name in names}
                assert heard.watched(shard) == {name for name in wanted if place.get(name) == shard}


# -- heard from Redis ------------------------------------------------------------------------------------------


@asynccontextmanager
async def listening(redis_url: str, book: Book, owned: Callable[[], set[int]]) -> AsyncIterator[Interest]:
    stop = asyncio.Event()
    interest = Interest(Settings(redis_url=redis_url, interest_interval_ms=100), book, owned)
    task = asyncio.create_task(interest.run(stop))
    try:
        yield interest
    finally:
        stop.set()
        async with asyncio.timeout(WAIT_S):
            await task


async def watches(interest: Interest, book: Book, wanted: set[str], shard: int = 0) -> None:
    def ids() -> set[str] | None:
        slots = interest.slots_of(shard)
        return None if slots is None else set(book.portfolio_ids(slots))

    try:
        async with asyncio.timeout(WAIT_S):
            while ids() != wanted:
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"watched are {ids()}, not {wanted}")


async def test_a_hubs_watches_are_known_here_also_after_a_lost_connection(redis_db: str) -> None:
    book, hub, signal = Book(), Hub(), asyncio.Event()
    for name in ("p-1", "p-2"):
        book.open(name, 0, ACCOUNT)
    async with (
        Redis.from_url(redis_db, protocol=3) as redis,
        listening(redis_db, book, lambda: {0}) as interest,
    ):
        teller = asyncio.create_task(InterestTeller(redis, hub, interest._settings).run())
        try:
            with hub.watch_portfolio(0, "p-1", signal):
                await watches(interest, book, {"p-1"})
                await redis.client_kill_filter(_type="pubsub")
                with hub.watch_portfolio(0, "p-2", signal):
                    await watches(interest, book, {"p-1", "p-2"})
            await watches(interest, book, set())
        finally:
            teller.cancel()
            with suppress(asyncio.CancelledError):
                await teller


async def test_the_channels_are_those_of_the_shards_that_are_ours(redis_db: str) -> None:
    book, owned = Book(), {0}
    book.open("p-1", 3, ACCOUNT)
    async with Redis.from_url(redis_db, protocol=3) as redis, listening(redis_db, book, lambda: owned) as interest:

        async def listeners(shard: int) -> int:
            ((_, count),) = await redis.pubsub_shardnumsub(redis_keys.interest_channel(shard))
            return int(count)

        async def until(count: int) -> None:
            async with asyncio.timeout(WAIT_S):
                while await listeners(3) != count:
                    await asyncio.sleep(0.01)

        owned.add(3)
        await until(1)
        channel = redis_keys.interest_channel(3)
        await redis.spublish(channel, b"no frame")
        frame = InterestFrame("node", 60_000, False, ["p-1"])
        await redis.spublish(channel, interest_encoder.encode(frame))
        await watches(interest, book, {"p-1"}, shard=3)
        owned.discard(3)
        await until(0)
        assert interest.slots_of(3) is None


async def test_a_connection_that_was_lost_leaves_whole_shards_watched_until_nodes_have_spoken(redis_db: str) -> None:
    book = Book()
    book.open("p-1", 0, ACCOUNT)
    async with Redis.from_url(redis_db, protocol=3) as redis, listening(redis_db, book, lambda: {0}) as interest:
        await watches(interest, book, set())
        await redis.client_kill_filter(_type="pubsub")
        async with asyncio.timeout(WAIT_S):
            while interest.slots_of(0) is not None:
                await asyncio.sleep(0.01)
        await watches(interest, book, set())
