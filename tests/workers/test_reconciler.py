"""Reconciliation of a running system: silent when all agrees, loud about every figure that does not, and a repair that
brings it back under a new epoch, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr

from engine.corporate_actions import DividendAction, SplitAction, encode_action
from engine.instants import SECOND_NS, to_datetime, to_ns
from engine.marks import MARK, Mark
from engine.positions import hot_position_decoder, hot_position_encoder
from engine.runtime.clock import WallClock
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from tests.gateway import SECRET, gateway_of
from tests.running_system import AT, System, connected, deposit, eventually, fill, opening, running, until_answered
from workers import portfolio_checks, reconciler
from workers.reconciler import reconcile_once, run_reconciler

REPAIRED_WITHIN_S = 20


@pytest.fixture
async def system(
    redis_db: str, fresh_database: str, kafka_bootstrap: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[System]:
    monkeypatch.setattr(portfolio_checks, "ATTEMPTS_MAX", 3)
    monkeypatch.setattr(reconciler, "HISTORY_LEAD_S", 0.5)
    monkeypatch.setattr(reconciler, "STEP_INTERVAL_S", 0.2)
    settings = Settings(
        redis_url=redis_db,
        postgres_url=fresh_database,
        kafka_bootstrap=kafka_bootstrap,
        topic=topic,
        actions_topic=f"{topic}-actions",
        jwt_secret=SecretStr(SECRET),
        reconcile_interval_s=1,
        reconcile_cpu_share_max=1,
        # A lease that ran out on a busy machine has its shard published anew, and what was corrupted is sound again.
        lease_duration_ms=60_000,
    )
    async with connected(settings) as one:
        yield one


async def trade(system: System, at: datetime = AT) -> None:
    """Two portfolios with a few entries each, whose fills were executed `at`."""
    await system.quote("AAPL", "100")
    await system.quote("MSFT", "50")
    for name in ("p-1", "p-2"):
        await system.send(
            opening(name),
            deposit(name, "1000", f"d-{name}"),
        )
        fills = (
            fill(name, "BUY", "3", "99.5", f"b-{name}", fee="0.25"),
            fill(name, "SELL", "1.5", "101", f"s-{name}"),
            fill(name, "SELL", "2", "51", f"m-{name}", symbol="MSFT"),
        )
        await system.send(*(msgspec.structs.replace(one, executed_at=at) for one in fills))
        await system.mark_when(name, lambda mark: mark.ledger_sequence == 5)


async def figures(system: System) -> set[tuple[str, str]]:
    report = await reconcile_once(system.settings)
    return {(difference.portfolio_id, difference.figure) for difference in report.differences}


@asynccontextmanager
async def reconciling(settings: Settings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_reconciler(settings, WallClock(), stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def status(system: System, name: str) -> str | None:
    return await system.pool.fetchval("SELECT status FROM reconciliation WHERE portfolio_id = $1", name)


async def status_when(system: System, name: str, wanted: str, timeout_s: float = REPAIRED_WITHIN_S) -> asyncpg.Record:
    """The portfolio's row once it has this status."""

    async def row() -> asyncpg.Record | None:
        return await system.pool.fetchrow(
            "SELECT * FROM reconciliation WHERE portfolio_id = $1 AND status = $2", name, wanted
        )

    return await eventually(row, timeout_s, lambda: status(system, name))


async def repairs(system: System) -> list[asyncpg.Record]:
    return await system.pool.fetch("SELECT * FROM repair ORDER BY id")


async def marks_key(system: System, name: str) -> str:
    """The key of the marks that readers of `name` are pointed at."""
    shard = await system.shard_of(name)
    return redis_keys.marks(shard, int(await system.redis.hget(redis_keys.shard(shard), "epoch")))


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"navstream_{name}", labels) or 0


# -- once ---------------------------------------------------------------------------------------------------------


async def test_agreement_while_prices_move(system: System) -> None:
    async with running(system.settings):
        await trade(system)

        async def move() -> None:
            for cents in range(10_000):
                await system.quote("AAPL", f"{100 + cents / 100:.2f}")
                await asyncio.sleep(0.005)

        moving = asyncio.create_task(move())
        report = await reconcile_once(system.settings)
        moving.cancel()
    assert (report.portfolios_count, report.entries_count, list(report.differences)) == (2, 10, [])


async def test_each_changed_figure_is_found_and_named(system: System) -> None:
    async with running(system.settings):
        await trade(system)
        await asyncio.sleep(0.3)
    shard = await system.shard_of("p-1")
    key = redis_keys.positions(shard, "p-1")
    held = hot_position_decoder.decode(await system.redis.hget(key, "AAPL"))
    await system.redis.hset(key, "AAPL", hot_position_encoder.encode((held.quantity, held.cost + 1, *(0, 0, 0))))
    assert ("p-1", "hot position AAPL") in await figures(system)
    await system.redis.hset(key, "AAPL", hot_position_encoder.encode(held))
    await system.redis.hset(key, "TSLA", hot_position_encoder.encode(held))
    assert ("p-1", "hot position TSLA") in await figures(system)
    await system.redis.hdel(key, "TSLA")
    await system.pool.execute(
        "UPDATE position SET cost = cost + 0.000001 WHERE portfolio_id = 'p-2' AND symbol = 'AAPL'"
    )
    assert await figures(system) == {("p-2", "position row AAPL")}


async def test_a_mark_at_a_price_that_never_was_is_found(system: System) -> None:
    async with running(system.settings):
        await trade(system)
    await system.quote("AAPL", "101")
    assert await figures(system) == {("p-1", "positions value"), ("p-2", "positions value")}


async def test_a_ledger_changed_behind_the_program_is_found(system: System) -> None:
    async with running(system.settings):
        await trade(system)
    await change_ledger(system)
    assert await figures(system) == {("p-1", "ledger")}


async def test_a_missing_mark_is_found(system: System) -> None:
    async with running(system.settings):
        await trade(system)
    await system.redis.hdel(await marks_key(system, "p-2"), "p-2")
    assert ("p-2", "mark") in await figures(system)


async def change_ledger(system: System) -> None:
    async with system.pool.acquire() as connection, connection.transaction():
        await connection.execute("ALTER TABLE ledger_entry DISABLE TRIGGER ledger_entry_append_only")
        await connection.execute("UPDATE ledger_entry SET amount = amount + 1 WHERE event_id = 'b-p-1'")
        await connection.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")


# -- repair -------------------------------------------------------------------------------------------------------


async def corrupt_mark(system: System) -> None:
    await system.redis.hset(await marks_key(system, "p-1"), "p-1", b"\x07" * MARK.itemsize)


async def corrupt_nav(system: System) -> None:
    key = await marks_key(system, "p-1")
    packed = bytearray(await system.redis.hget(key, "p-1"))
    nav = int.from_bytes(packed[:8], "little", signed=True) + 12_500_000
    packed[:8] = nav.to_bytes(8, "little", signed=True)
    await system.redis.hset(key, "p-1", bytes(packed))


async def settled_mark(system: System) -> None:
    """Wait until no slow turn is still to come that would write p-1's figures again."""
    key, mark = await marks_key(system, "p-1"), None
    while (found := await system.redis.hget(key, "p-1")) != mark:
        mark = found
        await asyncio.sleep(2.5 * system.settings.unwatched_flush_interval_ms / 1_000)


async def remove_mark(system: System) -> None:
    await system.redis.hdel(await marks_key(system, "p-1"), "p-1")


async def corrupt_position(system: System) -> None:
    key = redis_keys.positions(await system.shard_of("p-1"), "p-1")
    held = hot_position_decoder.decode(await system.redis.hget(key, "AAPL"))
    changed = hot_position_encoder.encode(("999", held.cost, held.realized, held.day_base, held.opened_at_ns))
    await system.redis.hset(key, "AAPL", changed)


async def invent_position(system: System) -> None:
    key = redis_keys.positions(await system.shard_of("p-1"), "p-1")
    await system.redis.hset(key, "TSLA", await system.redis.hget(key, "AAPL"))


async def remove_positions(system: System) -> None:
    await system.redis.delete(redis_keys.positions(await system.shard_of("p-1"), "p-1"))


@pytest.mark.parametrize(
    ("corrupt", "named", "drift"),
    [
        (corrupt_mark, "mark", "1004.75"),
        (corrupt_nav, "nav", "12.5"),
        (remove_mark, "mark", "1004.75"),
        (corrupt_position, "hot position AAPL", "0"),
        (invent_position, "hot position TSLA", "0"),
        (remove_positions, "hot position MSFT", "0"),
    ],
)
async def test_hot_state_changed_behind_the_program_is_found_repaired_and_agrees_again(
    system: System, corrupt: Callable[[System], Awaitable[None]], named: str, drift: str
) -> None:
    async with running(system.settings):
        await trade(system)
        sound = await system.mark_when("p-1", lambda mark: mark.nav == 1_004_750_000)
        positions = redis_keys.positions(await system.shard_of("p-1"), "p-1")
        held = await system.redis.hgetall(positions)
        async with reconciling(system.settings):
            for name in ("p-1", "p-2"):
                await status_when(system, name, "AGREED")
            repaired_before = metric("repairs_total")
            await corrupt(system)
            found = await status_when(system, "p-1", "DRIFTED")
            assert named in found["figures"]
            assert f"{found['drift_abs'].normalize():f}" == drift
            repaired = await status_when(system, "p-1", "REPAIRED")
            assert (repaired["drift_abs"], repaired["figures"]) == (0, [])
            agreed = await status_when(system, "p-1", "AGREED")
            await until_metric("drift_portfolios", 0)
        (repair,) = await repairs(system)
        assert (repair["portfolios"], repair["to_epoch"] > repair["from_epoch"]) == (["p-1"], True)
        assert named in repair["figures"]
        assert repair["done_at"] > repair["asked_at"]
        assert agreed["epoch"] == repair["to_epoch"]
        assert metric("repairs_total") == repaired_before + 1
        mark = await system.mark("p-1")
        assert mark is not None
        assert (figures_of(mark), mark.epoch) == (figures_of(sound), repair["to_epoch"])
        assert await system.redis.hgetall(positions) == held
        await system.send(deposit("p-1", "7", "after"))
        await system.mark_when("p-1", lambda mark: mark.nav == 1_011_750_000)
    assert await status(system, "p-2") == "AGREED"


def figures_of(mark: Mark) -> tuple[int, ...]:
    return (mark.nav, mark.cash, mark.positions_value, mark.unrealized, mark.realized, mark.fees, mark.ledger_sequence)


async def until_metric(name: str, value: float) -> None:
    async with asyncio.timeout(REPAIRED_WITHIN_S):
        while metric(name) != value:
            await asyncio.sleep(0.05)


async def test_a_subscription_sees_the_reset_and_never_what_was_corrupt(system: System) -> None:
    query = 'subscription { navUpdates(portfolioId: "p-1") { kind nav epoch } }'
    async with running(system.settings), gateway_of(system.settings) as gateway:
        await trade(system)
        await system.mark_when("p-1", lambda mark: mark.nav == 1_004_750_000)
        async with gateway.socket(gateway.token("user-1")) as socket:
            stream = await socket.subscribe(query)
            first = await stream.next()
            assert first["nav"] == "1004.75"
            async with reconciling(system.settings):
                await status_when(system, "p-1", "AGREED")
                await corrupt_nav(system)
                seen: list[Any] = []
                async with asyncio.timeout(REPAIRED_WITHIN_S):
                    while not seen or seen[-1]["kind"] != "RESET":
                        seen.append(await stream.next(REPAIRED_WITHIN_S))
                await status_when(system, "p-1", "REPAIRED")
    (repair,) = await repairs(system)
    assert {message["nav"] for message in seen} == {"1004.75"}
    assert (seen[-1]["epoch"], first["epoch"]) == (repair["to_epoch"], repair["from_epoch"])


async def test_what_a_repair_does_not_help_is_not_repaired_again(system: System) -> None:
    """Somebody goes on writing behind the program's back."""
    settings = system.settings.model_copy(update={"repair_interval_s": 1})
    async with running(settings):
        await trade(system)
        async with reconciling(settings):
            await status_when(system, "p-1", "AGREED")
            stop = asyncio.Event()

            async def spoil() -> None:
                while not stop.is_set():
                    await corrupt_position(system)
                    await asyncio.sleep(0.02)

            spoiling = asyncio.create_task(spoil())
            await until_answered(lambda: system.pool.fetchval("SELECT count(*) FROM repair WHERE done_at IS NOT NULL"))
            checked_at = (await status_when(system, "p-1", "DRIFTED"))["checked_at"]

            async def checked_since() -> bool:
                row = await status_when(system, "p-1", "DRIFTED")
                return bool((row["checked_at"] - checked_at).total_seconds() > 5)

            await until_answered(checked_since, REPAIRED_WITHIN_S)
            stop.set()
            await spoiling
            assert len(await repairs(system)) == 1
            assert metric("drift_portfolios") == 1
            # Helped by hand it agrees, and may be repaired again when it drifts another time.
            key = redis_keys.positions(await system.shard_of("p-1"), "p-1")
            await system.redis.hset(
                key, "AAPL", await system.redis.hget(redis_keys.positions(await system.shard_of("p-2"), "p-2"), "AAPL")
            )
            await status_when(system, "p-1", "AGREED")
            await remove_mark(system)
            await status_when(system, "p-1", "REPAIRED")
    assert len(await repairs(system)) == 2


async def test_a_shard_is_repaired_once_in_an_interval(system: System) -> None:
    async with running(system.settings):
        await trade(system)
        async with reconciling(system.settings):
            await status_when(system, "p-1", "AGREED")
            await corrupt_nav(system)
            await status_when(system, "p-1", "REPAIRED")
            await status_when(system, "p-1", "AGREED")
            await settled_mark(system)
            await corrupt_nav(system)
            await status_when(system, "p-1", "DRIFTED")
            await until_metric("drift", 12.5)
            await asyncio.sleep(3)
            assert len(await repairs(system)) == 1
            assert await status(system, "p-1") == "DRIFTED"
            await system.pool.execute("UPDATE repair SET asked_at = asked_at - interval '1 hour'")
            await status_when(system, "p-1", "REPAIRED")
            await until_metric("drift", 0)
    assert len(await repairs(system)) == 2


async def test_a_broken_ledger_is_named_and_not_repaired(system: System) -> None:
    async with running(system.settings):
        await trade(system)
        await change_ledger(system)
        await corrupt_nav(system)
        async with reconciling(system.settings):
            found = await status_when(system, "p-1", "BROKEN_LEDGER")
            assert (found["figures"], found["drift_abs"]) == (["ledger"], 0)
            await until_metric("broken_ledgers", 1)
            await status_when(system, "p-2", "AGREED")
            await asyncio.sleep(1)
    assert await repairs(system) == []


async def test_a_repair_is_finished_by_the_next_process(system: System) -> None:
    """The reconciler ends between asking and being answered."""
    async with running(system.settings):
        await trade(system)
        shard = await system.shard_of("p-1")
        await system.pool.execute(
            "INSERT INTO repair (shard, asked_at, portfolios, figures, from_epoch)"
            " SELECT id, now(), '{p-1}', '{nav}', epoch FROM shard WHERE id = $1",
            shard,
        )
        await corrupt_nav(system)
        async with reconciling(system.settings):
            await asyncio.sleep(2)
            assert await status(system, "p-1") is None, "while it is repaired nothing is said about it"
            await system.pool.execute("UPDATE shard SET owner = NULL WHERE id = $1", shard)
            await status_when(system, "p-1", "REPAIRED")
    assert len(await repairs(system)) == 1


async def test_nothing_is_said_about_a_shard_that_nobody_keeps(system: System) -> None:
    async with running(system.settings):
        await trade(system)
    await corrupt_nav(system)
    unsettled = metric("reconciled_total", status="UNSETTLED")
    async with reconciling(system.settings):
        await status_when(system, "p-2", "AGREED")
        async with asyncio.timeout(REPAIRED_WITHIN_S):
            while metric("reconciled_total", status="UNSETTLED") < unsettled + 1:
                await asyncio.sleep(0.05)
        assert await status(system, "p-1") is None
        async with asyncio.timeout(REPAIRED_WITHIN_S):
            while metric("oldest_check_age_seconds") < 1:
                await asyncio.sleep(0.05)
    assert await repairs(system) == []


async def test_agreement_through_trades_and_take_overs(system: System) -> None:
    """Two evaluators, one of which comes and goes, while prices move and portfolios trade and open."""
    async with running(system.settings), reconciling(system.settings):
        await trade(system)
        stop = asyncio.Event()

        async def move() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                await system.quote("AAPL", f"{100 + number % 50 / 100:.2f}")
                await system.send(fill("p-1", "BUY", "0.5", "100", f"f-{number}"), deposit("p-2", "1", f"e-{number}"))
                if number % 20 == 0:
                    await system.send(opening(f"q-{number}"), deposit(f"q-{number}", "5", f"q-{number}-1"))
                await asyncio.sleep(0.02)

        moving = asyncio.create_task(move())
        for _ in range(2):
            async with running(system.settings):
                await asyncio.sleep(3)
            await asyncio.sleep(2)
        stop.set()
        await moving
        names = [row["id"] for row in await system.pool.fetch("SELECT id FROM portfolio")]
        assert len(names) > 5
        for name in names:
            await status_when(system, name, "AGREED")
    assert await repairs(system) == []
    assert metric("drift_portfolios") == 0


async def test_agreement_through_a_split_a_dividend_and_a_late_split(system: System) -> None:
    """The ledger has each before the Book has; quotes of the old shares meet marks of the new ones."""
    async with running(system.settings), reconciling(system.settings):
        now = WallClock().now_ns()
        await trade(system, to_datetime(now) - timedelta(days=3))
        await status_when(system, "p-1", "AGREED")
        effective_at, ex_date = to_datetime(now + 4 * SECOND_NS), to_datetime(now).date() - timedelta(days=1)
        split = SplitAction(action_id="s-1", symbol="AAPL", ratio="3:2", effective_at=effective_at)
        late = SplitAction(action_id="s-2", symbol="MSFT", ratio="4", effective_at=to_datetime(now - 60 * SECOND_NS))
        dividend = DividendAction(
            action_id="d-1", symbol="AAPL", amount="0.5", ex_date=ex_date, pay_date=ex_date + timedelta(days=30)
        )
        for action in (split, dividend, late):
            await system.producer.send_and_wait(system.settings.actions_topic, encode_action(action))
        for cents in range(60):
            is_after = WallClock().now_ns() >= to_ns(effective_at)
            await system.quote("AAPL", f"{(68 if is_after else 102) + cents / 100:.2f}")
            await asyncio.sleep(0.1)
        mark = await system.mark_when("p-1", lambda mark: mark.receivables == 750_000)
        assert mark.ledger_sequence == 8
        checked_at = to_datetime(WallClock().now_ns())
        for name in ("p-1", "p-2"):

            async def later(of: str = name) -> bool:
                return bool((await status_when(system, of, "AGREED"))["checked_at"] > checked_at)

            await until_answered(later, REPAIRED_WITHIN_S)
        assert (await status_when(system, "p-1", "AGREED"))["ledger_sequence"] == 8
    assert await repairs(system) == []


async def test_an_outage_passes(system: System) -> None:
    """Without its servers the reconciler waits, and goes on when they are back."""
    away = system.settings.model_copy(update={"redis_url": "redis://127.0.0.1:1"})
    async with running(system.settings):
        await trade(system)
        async with reconciling(away):
            await asyncio.sleep(1.5)
        assert await status(system, "p-1") is None
        async with reconciling(system.settings):
            await status_when(system, "p-1", "AGREED")
            await system.pool.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'navstream-reconciler'"
            )
            await system.redis.client_kill_filter(_type="pubsub")
            before = (await status_when(system, "p-1", "AGREED"))["checked_at"]

            async def later() -> bool:
                return bool((await status_when(system, "p-1", "AGREED"))["checked_at"] > before)

            await until_answered(later, REPAIRED_WITHIN_S)
    assert await repairs(system) == []
