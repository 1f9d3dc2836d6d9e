"""The snapshots worker: what waits in the lists is written once and in order, prices are recorded on the grid."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from engine.assets import AssetClass
from engine.day_cuts import parse_day_cut
from engine.instants import HOUR_NS, SECOND_NS, to_datetime, to_ns
from engine.markets import Markets
from engine.messages import Quote
from engine.runtime import telemetry
from engine.runtime.connections import connect_redis
from engine.runtime.settings import Settings
from engine.sessions import Sessions
from engine.stores import redis_keys
from engine.stores.price_closes import PriceCloses
from tests.builders import HotStateBuilder, MarkRow
from tests.history_twins import MICRO, Twin, snapshot_frame, twin
from workers import snapshots
from workers.quote_intake import QuoteIntake
from workers.snapshots import PriceRecorder, SnapshotDrain, run_snapshots

__all__ = ["twin"]

START = datetime(2026, 11, 20, 13, tzinfo=UTC)  # a Friday: the session closes at 21:00
HOUR = timedelta(hours=1)
LONG_AGO = START - timedelta(days=30)
WAIT_S = 20


class SetClock:
    def __init__(self, now: datetime) -> None:
        self.ns = to_ns(now)

    def now_ns(self) -> int:
        return self.ns


class DyingRedis:
    """Dies when it is to take a frame from its list."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def __getattr__(self, name: str) -> Any:
        if name == "lrem":
            raise ConnectionError("gone")
        return getattr(self._redis, name)


@pytest.fixture
async def redis(redis_db: str) -> AsyncIterator[Redis]:
    async with connect_redis(Settings(redis_url=redis_db), "test") as connection:
        yield connection


async def shards(twin: Twin, count: int = 1) -> None:
    await twin.pool.execute(
        "INSERT INTO shard SELECT n, 'l', 0, 1, NULL, NULL FROM generate_series(1, $1) AS n", count - 1
    )
    await twin.pool.execute("INSERT INTO shard VALUES (0, 'l', 0, 1, NULL, NULL)")


async def append(
    redis: Redis, at: datetime, navs: Mapping[str, int], shard: int = 0, epoch: int = 7, sequence: int = 1
) -> bytes:
    rows = {name: MarkRow(nav=nav, cash=0, ledger_sequence=0) for name, nav in navs.items()}
    frame = snapshot_frame(at, rows, shard, epoch, sequence)
    await redis.rpush(redis_keys.snapshots(shard), frame)  # type: ignore[arg-type]
    return frame


async def rows(twin: Twin) -> list[tuple[str, datetime, int]]:
    found = await twin.pool.fetch("SELECT portfolio_id, at, nav FROM equity_snapshot ORDER BY at, portfolio_id")
    return [(row["portfolio_id"], row["at"], int(row["nav"] * MICRO)) for row in found]


async def waiting(redis: Redis, shard: int = 0) -> int:
    return await redis.llen(redis_keys.snapshots(shard))  # type: ignore[no-any-return]


# -- snapshots --------------------------------------------------------------------------------------------------


async def test_what_waits_is_written_in_order_and_leaves_the_lists(twin: Twin, redis: Redis) -> None:
    await shards(twin, 3)
    drain, before = SnapshotDrain(redis, twin.pool), telemetry.SNAPSHOTS._value.get()
    assert await drain.poll() == 0
    await append(redis, START, {"p": 100, "q": -3})
    await append(redis, START + HOUR, {"p": 150, "q": -3})
    await append(redis, START, {"other": 5}, shard=2)
    assert await drain.poll() == 5
    assert await rows(twin) == [
        ("other", START, 5),
        ("p", START, 100),
        ("q", START, -3),
        ("p", START + HOUR, 150),
        ("q", START + HOUR, -3),
    ]
    assert [await waiting(redis, shard) for shard in range(3)] == [0, 0, 0]
    assert telemetry.SNAPSHOTS._value.get() == before + 5
    assert await drain.poll() == 0


async def test_a_worker_that_dies_between_commit_and_removal_changes_nothing(twin: Twin, redis: Redis) -> None:
    await shards(twin)
    await append(redis, START, {"p": 100})
    await append(redis, START + HOUR, {"p": 200})
    dying = SnapshotDrain(DyingRedis(redis), twin.pool)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await dying.poll()
        assert (await rows(twin), await waiting(redis)) == ([("p", START, 100)], 2)
    assert await SnapshotDrain(redis, twin.pool).poll() == 1
    assert await rows(twin) == [("p", START, 100), ("p", START + HOUR, 200)]
    assert await waiting(redis) == 0


async def test_a_frame_stays_until_its_rows_are_committed(twin: Twin, redis: Redis) -> None:
    await shards(twin)
    await append(redis, START, {"p": 100})
    drain = SnapshotDrain(redis, twin.pool)
    await twin.pool.execute("ALTER TABLE equity_snapshot ADD CONSTRAINT none CHECK (nav > 1)")
    with pytest.raises(asyncpg.PostgresError):
        await drain.poll()
    assert (await rows(twin), await waiting(redis)) == ([], 1)
    await twin.pool.execute("ALTER TABLE equity_snapshot DROP CONSTRAINT none")
    assert (await drain.poll(), await waiting(redis)) == (1, 0)


async def test_several_workers_agree(twin: Twin, redis: Redis) -> None:
    await shards(twin)
    for hour in range(6):
        await append(redis, START + hour * HOUR, {"p": 100 + hour, "q": 7})
    drains = [SnapshotDrain(redis, twin.pool) for _ in range(3)]
    assert sum(await asyncio.gather(*(drain.poll() for drain in drains))) == 12
    assert len(await rows(twin)) == 12
    assert await waiting(redis) == 0


async def test_two_owners_of_a_shard_may_both_have_appended_an_instant(twin: Twin, redis: Redis) -> None:
    await shards(twin)
    await append(redis, START, {"p": 100}, epoch=7)
    await append(redis, START, {"p": 101, "q": 5}, epoch=8)
    assert await SnapshotDrain(redis, twin.pool).poll() == 2
    assert await rows(twin) == [("p", START, 100), ("q", START, 5)]


async def test_what_can_not_be_read_is_counted_and_given_up(twin: Twin, redis: Redis) -> None:
    await shards(twin)
    unreadable = telemetry.SNAPSHOT_FRAMES.labels("unreadable")
    before = unreadable._value.get()
    frame = await append(redis, START, {"p": 100})
    await redis.lset(redis_keys.snapshots(0), 0, frame[:-1])  # type: ignore[arg-type]
    await redis.rpush(redis_keys.snapshots(0), b"no frame at all")  # type: ignore[arg-type]
    await append(redis, START + HOUR, {"p": 7})
    assert await SnapshotDrain(redis, twin.pool).poll() == 1
    assert await rows(twin) == [("p", START + HOUR, 7)], "the instant that was lost stays a gap"
    assert (unreadable._value.get() - before, await waiting(redis)) == (2, 0)


async def test_a_list_that_was_cut_at_its_head_meanwhile_loses_nothing_else(twin: Twin, redis: Redis) -> None:
    """The list is bounded: while the first frame is written, the evaluator may drop it for a new one."""
    await shards(twin)
    for hour in range(3):
        await append(redis, START + hour * HOUR, {"p": hour})
    drain = SnapshotDrain(redis, twin.pool)
    write, dropped = drain._store.write, []

    async def write_slowly(snapshot: Any) -> int:
        if not dropped:
            dropped.append(await redis.lpop(redis_keys.snapshots(0)))
        return await write(snapshot)

    drain._store.write = write_slowly  # type: ignore[method-assign]
    assert await drain.poll() == 3
    assert len(await rows(twin)) == 3


async def test_twenty_thousand_portfolios_are_all_kept(twin: Twin, redis: Redis) -> None:
    await shards(twin, 4)
    for hour in range(2):
        for shard in range(4):
            navs = {f"p-{number:05}": number + hour for number in range(shard, 20_000, 4)}
            await append(redis, START + hour * HOUR, navs, shard)
        assert await SnapshotDrain(redis, twin.pool).poll() == 20_000
    assert await twin.pool.fetchval("SELECT count(*) FROM equity_snapshot") == 40_000
    assert await twin.pool.fetchval("SELECT sum(nav) FROM equity_snapshot WHERE at > $1", START) == Decimal(
        "200.010000"
    )


# -- prices -----------------------------------------------------------------------------------------------------


def sessions() -> Sessions | None:
    return Markets({AssetClass.EQUITY: "XNYS"}).sessions(AssetClass.EQUITY)


async def recorder(twin: Twin, clock: SetClock) -> tuple[PriceRecorder, QuoteIntake]:
    """Of symbols that were recorded long before."""
    old = Quote("AAPL", "1", to_ns(LONG_AGO), "feed"), Quote("MSFT", "1", to_ns(LONG_AGO), "feed")
    await PriceCloses(lambda: twin.pool).write_first(old)
    intake = QuoteIntake(Settings(), catalogue=["AAPL"])
    intake.ready.set()
    return PriceRecorder(clock, intake, PriceCloses(lambda: twin.pool), sessions()), intake


def offer(intake: QuoteIntake, at: datetime, price: str = "1", symbol: str = "AAPL", condition: Any = "") -> None:
    intake._offer(Quote(symbol, price, to_ns(at), "feed", condition=condition))


async def closes(twin: Twin) -> list[tuple[Any, ...]]:
    found = await twin.pool.fetch(
        "SELECT symbol, at, price, ts_event FROM price_close WHERE at > $1 ORDER BY at, symbol", LONG_AGO
    )
    return [(row["symbol"], row["at"], int(row["price"]), row["ts_event"]) for row in found]


async def poll_at(recorder: PriceRecorder, clock: SetClock, now: datetime) -> int:
    """All that was quoted up to now has been heard."""
    clock.ns = recorder._quotes.waiting.settled_ns = to_ns(now)
    recorder._quotes._frame_at_s = time.monotonic()
    return await recorder.poll()


async def test_the_last_quote_up_to_the_hour_is_recorded_and_none_beyond(twin: Twin) -> None:
    clock = SetClock(START)
    recording, intake = await recorder(twin, clock)
    offer(intake, START + timedelta(minutes=59), "10")
    offer(intake, START + timedelta(minutes=20), "7", "MSFT")
    assert await poll_at(recording, clock, START + timedelta(minutes=59)) == 0
    offer(intake, START + HOUR, "11")
    offer(intake, START + HOUR + timedelta(microseconds=1), "12")
    assert await poll_at(recording, clock, START + HOUR + timedelta(seconds=1)) == 2
    offer(intake, START + 2 * HOUR + timedelta(seconds=1), "13")
    assert await poll_at(recording, clock, START + 2 * HOUR + timedelta(seconds=2)) == 2
    assert await closes(twin) == [
        ("AAPL", START + HOUR, 11, START + HOUR),
        ("MSFT", START + HOUR, 7, START + timedelta(minutes=20)),
        ("AAPL", START + 2 * HOUR, 12, START + HOUR + timedelta(microseconds=1)),
        ("MSFT", START + 2 * HOUR, 7, START + timedelta(minutes=20)),
    ]


async def test_an_hour_in_which_nothing_comes_ends_by_the_wall_clock(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SetClock(START)
    recording, intake = await recorder(twin, clock)
    offer(intake, START)
    clock.ns = to_ns(START + HOUR) + SECOND_NS
    assert await recording.poll() == 0, "a quote may still come"
    monkeypatch.setattr(recording._boundaries, "_grace_s", 1e-9)
    assert await recording.poll() == 1


async def test_of_several_hours_at_once_only_the_last_and_the_closes_are_recorded(twin: Twin) -> None:
    clock, before = SetClock(START), telemetry.PRICE_CLOSE_GAPS._value.get()
    recording, intake = await recorder(twin, clock)
    for hour in range(30):
        offer(intake, START + hour * HOUR + timedelta(minutes=30), str(hour + 1))
    assert await poll_at(recording, clock, START + 28 * HOUR + timedelta(minutes=10)) == 2
    assert await closes(twin) == [
        ("AAPL", datetime(2026, 11, 20, 21, tzinfo=UTC), 8, START + timedelta(hours=7, minutes=30)),
        ("AAPL", START + 28 * HOUR, 28, START + timedelta(hours=27, minutes=30)),
    ]
    assert telemetry.PRICE_CLOSE_GAPS._value.get() == before + 26


async def test_nothing_is_recorded_before_the_prices_were_read(twin: Twin) -> None:
    clock = SetClock(START)
    recording, intake = await recorder(twin, clock)
    intake.ready.clear()
    offer(intake, START + 2 * HOUR)
    offer(intake, START + 3 * HOUR + timedelta(seconds=1))
    assert await poll_at(recording, clock, START + 3 * HOUR + timedelta(seconds=2)) == 0
    intake.ready.set()
    assert await poll_at(recording, clock, START + 3 * HOUR + timedelta(seconds=2)) == 1


async def test_what_can_not_be_written_waits_and_is_bounded(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "CLOSES_WAITING_MAX", 2)
    clock, before = SetClock(START), telemetry.PRICE_CLOSE_GAPS._value.get()
    recording, intake = await recorder(twin, clock)
    await twin.pool.execute("ALTER TABLE price_close RENAME TO away")
    for hour in range(1, 5):
        offer(intake, START + hour * HOUR + timedelta(minutes=1), str(hour))
        now = START + hour * HOUR + timedelta(minutes=2)
        with pytest.raises(asyncpg.PostgresError):
            await poll_at(recording, clock, now)
    await twin.pool.execute("ALTER TABLE away RENAME TO price_close")
    assert await recording.poll() == 2
    assert [(at, price) for _, at, price, _ in await closes(twin)] == [(START + 3 * HOUR, 2), (START + 4 * HOUR, 3)]
    assert telemetry.PRICE_CLOSE_GAPS._value.get() == before + 1


async def test_a_symbol_has_a_price_from_its_very_first_quote_on(twin: Twin) -> None:
    clock = SetClock(START)
    recording, intake = await recorder(twin, clock)
    for minutes, symbol in ((10, "NEW"), (20, "NEW"), (15, "AAPL")):
        offer(intake, START + timedelta(minutes=minutes), str(minutes), symbol)
        await poll_at(recording, clock, START + timedelta(minutes=minutes + 1))
    first = START + timedelta(minutes=10)
    assert await closes(twin) == [("NEW", first, 10, first)]


async def test_prices_are_recorded_at_the_day_cuts_that_portfolios_have(twin: Twin) -> None:
    """Of two that are passed at once both are kept."""
    clock = SetClock(START)
    recording, intake = await recorder(twin, clock)
    recording.follow([parse_day_cut("13:31 UTC"), parse_day_cut("19:07 Asia/Kolkata")])  # 13:37 UTC
    for minutes in (30, 32, 38):
        offer(intake, START + timedelta(minutes=minutes), str(minutes))
    assert await poll_at(recording, clock, START + timedelta(minutes=39)) == 2
    assert [(at, price) for _, at, price, _ in await closes(twin)] == [
        (START + timedelta(minutes=31), 30),
        (START + timedelta(minutes=37), 32),
    ]


async def test_a_market_without_sessions_has_its_hours(twin: Twin) -> None:
    clock, intake = SetClock(START), QuoteIntake(Settings(), catalogue=[])
    intake.ready.set()
    recording = PriceRecorder(clock, intake, PriceCloses(lambda: twin.pool))
    offer(intake, START + HOUR)
    offer(intake, START + 20 * HOUR + timedelta(seconds=1), "2")
    assert await poll_at(recording, clock, START + 20 * HOUR + timedelta(seconds=1)) == 2
    assert [(at, price) for _, at, price, _ in await closes(twin)] == [(START + HOUR, 1), (START + 20 * HOUR, 1)]


# -- the whole worker -------------------------------------------------------------------------------------------


async def test_the_worker_keeps_what_comes_until_it_is_asked_to_stop(twin: Twin, redis: Redis, redis_db: str) -> None:
    await shards(twin, 2)
    clock, stop, hot = SetClock(START), asyncio.Event(), HotStateBuilder(redis)
    await twin.portfolios("p")
    old = START - timedelta(days=500)
    await twin.snapshot(old, {"p": 1})
    await twin.snapshot(old + HOUR, {"p": 2})
    settings = Settings(redis_url=redis_db, postgres_url=twin.url, snapshot_poll_interval_ms=50)
    task = asyncio.create_task(run_snapshots(settings, clock, stop))
    try:
        await append(redis, START, {"p": 100}, shard=1)
        await hot.quote("one", 1, [Quote("AAPL", "189.5", to_ns(START), "feed")])
        async with asyncio.timeout(WAIT_S):
            while len(await twin.pool.fetch("SELECT FROM equity_snapshot WHERE at > $1", old + HOUR)) < 1:
                await asyncio.sleep(0.02)
            clock.ns = to_ns(START + HOUR) + SECOND_NS
            while len(await closes(twin)) < 2:
                await asyncio.sleep(0.02)
            while await twin.pool.fetchval("SELECT count(*) FROM equity_snapshot WHERE at = $1", old):
                await asyncio.sleep(0.02)
    finally:
        stop.set()
        async with asyncio.timeout(WAIT_S):
            await task
    assert [(symbol, at) for symbol, at, _, _ in await closes(twin)] == [
        ("AAPL", START),
        ("AAPL", to_datetime(to_ns(START) + HOUR_NS)),
    ]
