"""What `badges verify` makes of snapshots: daily awards derived again, and what is deserved and nowhere written."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest_asyncio

from engine.badge_proofs import BadgeFault, FaultKind
from engine.badges import load_rules
from engine.marks import MarkQuality
from engine.runtime.connections import postgres_dsn
from engine.sessions import sessions_of
from engine.stores import badge_awards
from engine.stores.badge_verification import BadgeVerification
from engine.stores.badges_postgres import sync_rules
from tests.builders import LedgerBuilder
from workers.daily_badges import judge_close

CLOSED_AT = datetime(2026, 11, 20, 21, tzinfo=UTC)
NOW = CLOSED_AT + timedelta(days=3, hours=3)  # after the close of the next session
DAY = timedelta(days=1)
SESSIONS = sessions_of("XNYS")


@pytest_asyncio.fixture(loop_scope="session")
async def ledger(fresh_database: str) -> AsyncIterator[LedgerBuilder]:
    async with asyncpg.create_pool(postgres_dsn(fresh_database), min_size=1, max_size=2) as pool:
        async with pool.acquire() as connection:
            await sync_rules(connection, load_rules())
        yield LedgerBuilder(pool)


async def untouchable(ledger: LedgerBuilder) -> str:
    """A portfolio whose NAV rises most days, judged and awarded."""
    await ledger.portfolio("p-1", opened_at=CLOSED_AT - 200 * DAY)
    rng, nav, navs = random.Random(1), 10_000.0, {}
    for back in range(120, -1, -1):
        nav *= 1.002 + rng.gauss(0, 0.002)
        navs[CLOSED_AT - back * DAY] = f"{nav:.2f}"
    await ledger.snapshots("p-1", navs)
    async with ledger.pool.acquire() as connection:
        assert await judge_close(connection, "badge-events", CLOSED_AT, SESSIONS) == 1
        rows = await connection.fetch("DELETE FROM outbox RETURNING payload")
        await badge_awards.book(connection, [badge_awards.read_message(row[0]) for row in rows])
    return "p-1"


async def verify(ledger: LedgerBuilder, kept: timedelta = 400 * DAY) -> tuple[list[BadgeFault], int]:
    """The faults, and how many proofs could not be looked at."""
    faults: list[BadgeFault] = []
    async with ledger.pool.acquire() as connection:
        verification = BadgeVerification(connection, SESSIONS, faults.append, kept)
        verified = await verification.verify(None, NOW, lambda _: None)
    assert verified.faults_count == len(faults)
    return faults, verified.unrecorded_count


def kinds(faults: list[BadgeFault]) -> list[tuple[str, FaultKind]]:
    return [(one.badge_id, one.kind) for one in faults]


async def test_a_daily_award_comes_out_again(ledger: LedgerBuilder) -> None:
    await untouchable(ledger)
    assert await verify(ledger) == ([], 0)
    await ledger.pool.execute("UPDATE badge_event SET at = at + interval '1 second'")
    await ledger.pool.execute("UPDATE badge_award SET awarded_at = awarded_at + interval '1 second'")
    assert kinds((await verify(ledger))[0]) == [("untouchable", FaultKind.WRONG)]


async def test_a_close_without_a_snapshot_is_no_close_while_snapshots_are_kept(ledger: LedgerBuilder) -> None:
    await untouchable(ledger)
    await ledger.pool.execute("DELETE FROM equity_snapshot WHERE at = $1", CLOSED_AT)
    faults, unrecorded = await verify(ledger)
    assert (kinds(faults), unrecorded) == ([("untouchable", FaultKind.WRONG)], 0)
    assert "no snapshot" in faults[0].detail
    # Older than what is kept: nobody can say.
    assert await verify(ledger, kept=94 * DAY) == ([], 1)
    assert (await verify(ledger, kept=96 * DAY))[1] == 0


async def test_an_instant_that_is_no_close_proves_nothing(ledger: LedgerBuilder) -> None:
    await untouchable(ledger)
    for table, at in (("badge_event", "at"), ("badge_award", "awarded_at")):
        await ledger.pool.execute(
            f"UPDATE {table} SET {at} = $1, evidence = replace(evidence, '2026-11-20T21', '2026-11-20T20')",
            CLOSED_AT - timedelta(hours=1),
        )
    faults, _ = await verify(ledger)
    assert kinds(faults) == [("untouchable", FaultKind.WRONG)] and "no close" in faults[0].detail


async def test_a_daily_award_that_left_no_trace_is_missed(ledger: LedgerBuilder) -> None:
    await untouchable(ledger)
    await ledger.pool.execute("TRUNCATE badge_award, badge_event, badge_state")
    assert kinds((await verify(ledger))[0]) == [("untouchable", FaultKind.MISSING)]


async def test_a_nav_that_snapshots_show_for_longer_than_a_moment_is_missed(ledger: LedgerBuilder) -> None:
    hours = [CLOSED_AT - timedelta(hours=back) for back in range(5, 0, -1)]
    for name, navs in {
        "for-hours": ("1", "1000000", "1000001", "1", "1"),
        "for-a-moment": ("1", "1000000", "1", "2000000", "999999.999999"),
        "unpriced": ("1000000",) * 5,
    }.items():
        await ledger.portfolio(name, opened_at=CLOSED_AT - 9 * DAY)
        await ledger.snapshots(name, dict(zip(hours, navs, strict=True)))
    unpriced = MarkQuality.MISSING.value
    await ledger.pool.execute("UPDATE equity_snapshot SET quality = $1 WHERE portfolio_id = 'unpriced'", unpriced)
    (fault,) = (await verify(ledger))[0]
    assert (fault.portfolio_id, fault.badge_id, fault.kind) == ("for-hours", "whale", FaultKind.MISSING)
