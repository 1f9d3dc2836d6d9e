"""The daily job: what a close's figures prove, against figures computed here in another way."""

from __future__ import annotations

import asyncio
import random
import statistics
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise

import asyncpg
import pytest
import pytest_asyncio

from engine.badges import BadgeMessage, Predicate, badge_message_decoder, load_rules
from engine.instants import DAY_NS, to_ns
from engine.runtime.connections import postgres_dsn
from engine.runtime.settings import Settings
from engine.sessions import sessions_of
from engine.stores.badges_postgres import sync_rules
from engine.stores.daily_figures import DailyFigureReads, last_close_ns, read_sector_profits, read_sharpe
from tests.builders import LedgerBuilder
from workers.daily_badges import DailyBadges, closes_between, judge_close

CLOSED_AT = datetime(2026, 11, 20, 21, tzinfo=UTC)
SINCE = CLOSED_AT - timedelta(days=30)
OPENED_AT = CLOSED_AT - timedelta(days=200)
SECTORS = ("Energy", "Materials", "Industrials", "Utilities", "Financials")
SESSIONS = sessions_of("XNYS")


@pytest_asyncio.fixture(loop_scope="session")
async def ledger(fresh_database: str) -> AsyncIterator[LedgerBuilder]:
    async with asyncpg.create_pool(postgres_dsn(fresh_database), min_size=1, max_size=4) as pool:
        async with pool.acquire() as connection:
            await sync_rules(connection, load_rules())
        yield LedgerBuilder(pool)


async def judge(ledger: LedgerBuilder, closed_at: datetime = CLOSED_AT) -> list[BadgeMessage]:
    """What one judgement proves, as it went to the outbox."""
    async with ledger.pool.acquire() as connection:
        await connection.execute("TRUNCATE outbox")
        count = await judge_close(connection, "badge-events", closed_at, SESSIONS)
        rows = await connection.fetch("SELECT payload FROM outbox ORDER BY id")
    assert len(rows) == count
    return [badge_message_decoder.decode(row[0]) for row in rows]


async def opened(ledger: LedgerBuilder, shard: int = 0, opened_at: datetime = OPENED_AT) -> str:
    name = f"p-{uuid.uuid4().hex[:8]}"
    await ledger.portfolio(name, shard=shard, opened_at=opened_at)
    return name


# -- Sharpe ratio ---------------------------------------------------------------------------------------------


def navs(seed: int, drift: float, noise: float, days: int = 120) -> dict[datetime, float]:
    """A NAV at 20:00 and 23:00 of every day and at the close, walking at random."""
    rng, nav, found = random.Random(seed), 10_000.0, {}
    for back in range(days, -1, -1):
        midnight = CLOSED_AT.replace(hour=0) - timedelta(days=back)
        for hour in (20, 21, 23):
            nav *= 1 + drift + rng.gauss(0, noise)
            found[midnight + timedelta(hours=hour)] = round(nav, 2)
    return {at: nav for at, nav in found.items() if at <= CLOSED_AT}


def slow_sharpe(navs: dict[datetime, float], window_days: int) -> float:
    begin = CLOSED_AT - timedelta(days=window_days)
    last = {at.date(): nav for at, nav in sorted(navs.items()) if begin <= at}
    del last[CLOSED_AT.date()]
    trading = [
        nav
        for day, nav in last.items()
        if SESSIONS.next_close((at := to_ns(datetime(day.year, day.month, day.day, tzinfo=UTC))) - 1) < at + DAY_NS
    ]
    returns = [after / before - 1 for before, after in pairwise(trading)]
    return float(statistics.mean(returns) / statistics.stdev(returns) * 252**0.5)


async def test_a_sharpe_ratio_above_the_threshold_is_proved_once(ledger: LedgerBuilder) -> None:
    series = {await opened(ledger): navs(seed, 0.0001, 0.002) for seed in range(6)}
    for name, of in series.items():
        await ledger.snapshots(name, {at: str(nav) for at, nav in of.items()})
    young, unsnapped = await opened(ledger, opened_at=CLOSED_AT - timedelta(days=20)), await opened(ledger)
    rich = {at: nav for at, nav in navs(1, 0.01, 0.001).items() if at > CLOSED_AT - timedelta(days=20)}
    await ledger.snapshots(young, {at: str(nav) for at, nav in rich.items()})
    await ledger.snapshots(unsnapped, {at: str(nav) for at, nav in navs(1, 0.01, 0.001).items() if at < CLOSED_AT})
    expected = {name: slow_sharpe(of, 90) for name, of in series.items()}
    assert 0 < sum(ratio > 2 for ratio in expected.values()) < len(expected), expected
    async with ledger.pool.acquire() as connection:
        found = await read_sharpe(connection, [*series, young, unsnapped], CLOSED_AT, 90, SESSIONS)
    assert {name: float(ratio) for name, ratio in found.items()} == pytest.approx(expected, abs=1e-9)
    proved = [one for one in await judge(ledger) if one.evidence.predicate is Predicate.SHARPE]
    assert {one.portfolio_id for one in proved} == {name for name, ratio in expected.items() if ratio > 2}
    assert all(Decimal(one.evidence.figure) == found[one.portfolio_id] for one in proved)
    assert all((one.at, one.evidence.until) == (CLOSED_AT, CLOSED_AT) for one in proved)
    assert [one for one in await judge(ledger) if one.evidence.predicate is Predicate.SHARPE] == []


async def test_a_deposit_is_no_return(ledger: LedgerBuilder) -> None:
    name, of = await opened(ledger), navs(3, 0.0, 0.002)
    paid_at = CLOSED_AT - timedelta(days=40, minutes=30)
    before = max(at for at in of if at < paid_at)
    await ledger.snapshots(name, {at: str(nav) for at, nav in of.items() if at < paid_at}, ledger_sequence=1)
    # Twice the capital from there on: every NAV after it doubles.
    await ledger.flow(name, 2, str(of[before]), str(of[before]), paid_at)
    await ledger.snapshots(name, {at: str(round(2 * nav, 2)) for at, nav in of.items() if at > paid_at}, 2)
    async with ledger.pool.acquire() as connection:
        found = await read_sharpe(connection, [name], CLOSED_AT, 90, SESSIONS)
    assert float(found[name]) == pytest.approx(slow_sharpe(of, 90), abs=1e-6)


# -- sector profits -------------------------------------------------------------------------------------------


async def price(ledger: LedgerBuilder, symbol: str, at: datetime, value: str) -> None:
    await ledger.pool.execute("INSERT INTO price_close VALUES ($1, $2, $3, $2, 'feed', '')", symbol, at, Decimal(value))


async def invest(ledger: LedgerBuilder, prices_at_close: dict[str, str], bought_within: bool = False) -> str:
    """10 of each symbol, bought at 100 with a fee of 1; before the window at the price of its beginning, 100."""
    name = await opened(ledger, opened_at=CLOSED_AT - timedelta(days=10) if bought_within else OPENED_AT)
    for number, (symbol, at_close) in enumerate(prices_at_close.items(), 1):
        await ledger.pool.execute(
            "INSERT INTO asset VALUES ($1, $1, 'EQUITY', $2, '') ON CONFLICT DO NOTHING",
            symbol,
            SECTORS[int(symbol[-1])] if symbol[-1].isdigit() else "UNCLASSIFIED",
        )
        await ledger.fill(name, number, symbol)
        await ledger.pool.execute(
            "INSERT INTO position VALUES ($1, $2, 10, 1000, 0, 1, $3, $4, $3)", name, symbol, OPENED_AT, number
        )
        await ledger.pool.execute("DELETE FROM price_close WHERE symbol = $1", symbol)
        await price(ledger, symbol, SINCE, "100")
        await price(ledger, symbol, CLOSED_AT, at_close)
    count = len(prices_at_close)
    if not bought_within:
        await ledger.snapshots(name, {SINCE: str(1_000 * count)}, count)
    worth = sum(10 * Decimal(value) for value in prices_at_close.values())
    await ledger.snapshots(name, {CLOSED_AT: str(worth)}, count)
    return name


async def test_profits_in_five_sectors_are_proved(ledger: LedgerBuilder) -> None:
    name = await invest(ledger, {f"S{n}": "100.01" for n in range(5)} | {"X": "500"})
    (proof,) = await judge(ledger)
    assert (proof.portfolio_id, proof.badge_id, proof.evidence.figure) == (name, "all_weather", "5")
    assert {one.sector: one.value for one in proof.evidence.sectors or ()} == dict.fromkeys(SECTORS, "0.1")
    assert (proof.evidence.since, proof.evidence.until) == (SINCE, CLOSED_AT)
    assert await judge(ledger) == []


async def test_what_was_bought_within_the_window_counts_from_what_was_paid(ledger: LedgerBuilder) -> None:
    # A fee of 1 on each: 100.1 is exactly no profit.
    even = await invest(ledger, {f"S{n}": "100.1" for n in range(5)}, bought_within=True)
    async with ledger.pool.acquire() as connection:
        assert (await read_sector_profits(connection, [even], CLOSED_AT, 30))[even].count == 0
    more = await invest(ledger, {f"T{n}": "100.100001" for n in range(5)}, bought_within=True)
    async with ledger.pool.acquire() as connection:
        assert (await read_sector_profits(connection, [more], CLOSED_AT, 30))[more].count == 5


async def test_four_sectors_are_not_enough_and_unknown_values_prove_nothing(ledger: LedgerBuilder) -> None:
    await invest(ledger, {f"S{n}": "101" for n in range(4)} | {"S4": "99"})
    assert await judge(ledger) == []
    name = await invest(ledger, {f"T{n}": "101" for n in range(5)})
    await ledger.pool.execute("UPDATE price_close SET price = 102 WHERE symbol = 'T0' AND at = $1", CLOSED_AT)
    async with ledger.pool.acquire() as connection:
        assert await read_sector_profits(connection, [name], CLOSED_AT, 30) == {}
    assert await judge(ledger) == []


async def test_readers_see_the_same_figures(ledger: LedgerBuilder) -> None:
    name = await invest(ledger, {f"S{n}": "101" for n in range(3)})
    reads = DailyFigureReads(lambda: ledger.pool, SESSIONS)
    rules = load_rules()
    assert (await reads.of(name, rules, to_ns(CLOSED_AT) + 5)).sector_profits == 3
    # The next close has no snapshot yet: the one before still counts.
    assert (await reads.of(name, rules, SESSIONS.next_close(to_ns(CLOSED_AT)) + 5)).sector_profits == 3


# -- when -----------------------------------------------------------------------------------------------------


class StandingClock:
    def __init__(self, now_ns: int) -> None:
        self.at_ns = now_ns

    def now_ns(self) -> int:
        return self.at_ns


async def test_a_close_is_judged_when_its_snapshots_are_there(ledger: LedgerBuilder, fresh_database: str) -> None:
    name = await invest(ledger, {f"S{n}": "101" for n in range(5)})
    late = await opened(ledger, shard=1)
    settings = Settings(postgres_url=fresh_database)
    clock, stop = StandingClock(to_ns(CLOSED_AT) + 1_000_000), asyncio.Event()
    rounds = asyncio.Semaphore(0)

    async def judged() -> int:
        return int(await ledger.pool.fetchval("SELECT count(*) FROM badge_state WHERE portfolio_id = $1", name))

    async with ledger.pool.acquire() as connection:
        daily = DailyBadges(settings, clock, connection)
        task = asyncio.create_task(daily.run(stop, rounds.release))
        await rounds.acquire()
        assert await judged() == 0  # shard 1 has no snapshot of the close
        await ledger.snapshots(late, {CLOSED_AT: "1"})
        async with asyncio.timeout(10):
            while not await judged():
                await rounds.acquire()
        stop.set()
        await task


async def test_closes_at_which_nobody_judged_are_judged_by_who_comes_next(
    ledger: LedgerBuilder, fresh_database: str
) -> None:
    """What is worth a badge at a close is so at the next one hardly ever."""
    settings = Settings(postgres_url=fresh_database)

    async def run_at(now_ns: int) -> list[datetime]:
        """Let a job catch up; the closes it judged."""
        stop, judged = asyncio.Event(), []

        class Noting(DailyBadges):
            async def _judge(self, closed_at: datetime) -> None:
                await super()._judge(closed_at)
                judged.append(closed_at)

        async with ledger.pool.acquire() as connection:
            daily = Noting(settings, StandingClock(now_ns), connection)
            async with asyncio.timeout(10):
                await daily.run(stop, stop.set)
        return judged

    name = await opened(ledger)
    closes = [CLOSED_AT - timedelta(days=days) for days in (4, 3, 2, 1, 0)]  # Monday to Friday
    await ledger.snapshots(name, dict.fromkeys(closes, "1"))
    for close in closes:
        await ledger.pool.execute("INSERT INTO price_close VALUES ('X', $1, 1, $1, 'feed', '')", close)
    assert await run_at(to_ns(closes[0])) == [closes[0]]
    assert await run_at(to_ns(closes[4]) + 1) == closes[1:]
    # The last one once more: it may not have been judged to its end.
    assert await run_at(to_ns(closes[4]) + 1) == [closes[4]]


def test_closes_that_are_passed_over_are_counted() -> None:
    close_ns = to_ns(CLOSED_AT)
    before_ns = last_close_ns(SESSIONS, close_ns - 1)
    assert closes_between(SESSIONS, before_ns, close_ns) == 0
    # A week of sessions.
    assert closes_between(SESSIONS, to_ns(CLOSED_AT - timedelta(days=7)), close_ns) == 4
    assert closes_between(None, 0 * DAY_NS, 3 * DAY_NS) == 2
