"""What a new owner reads of a shard: as it was booked, with each portfolio's day since its own cut.

Events are booked at instants of the test's choosing. Baselines that were stored count; those that nobody took
are estimated, and agree with what would have been taken.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal

import asyncpg
import pytest

from engine.baselines import Baseline
from engine.instants import to_ns
from engine.ledger import LedgerKind
from engine.pnl import DayBase
from engine.runtime.connections import postgres_dsn
from engine.stores.reconciliations import Reconciliations
from tests.bookkeeping import cash, fill, opening, reversal
from tests.builders import LedgerBuilder
from tests.scripted_ledger import BEGIN, HOUR, Moment, ScriptedLedger, lived
from tests.shard_ledger import AFTER, BEFORE, CUT_AT, MICRO, ShardLedger, shard_ledger
from tests.slow_loading import portfolios_of

CLOSE_AT = CUT_AT - timedelta(hours=3)


@pytest.fixture
async def ledger(fresh_database: str) -> AsyncIterator[ShardLedger]:
    async with shard_ledger(fresh_database) as one:
        yield one


# -- with the cut's baseline -----------------------------------------------------------------------------------


async def test_a_shard_is_loaded_as_it_was_booked_with_its_day_since_the_cut(ledger: ShardLedger) -> None:
    await ledger.book(opening("p-1"), cash("p-1", "DEPOSIT", "1", "d1"), fill("p-1", "BUY", "2", "3", "b1"))
    await ledger.shards.store_cut(ledger.lease, CUT_AT, [Baseline("p-1", MICRO, 3, {"AAPL": 7 * MICRO})])
    await ledger.book(
        fill("p-1", "SELL", "2", "4", "s1"),
        cash("p-1", "DEPOSIT", "10", "d2"),
        cash("p-1", "INTEREST", "3", "i1"),
        fill("p-1", "SELL", "1", "5", "s2", symbol="XOM", fee="0.5"),
        opening("p-2"),
        at=AFTER,
    )
    loaded = await ledger.load()
    assert (loaded.next_offset, loaded.cuts, loaded.estimated) == (8, {"00:00 UTC": to_ns(CUT_AT)}, [])
    first, second = portfolios_of(loaded)
    account = first.account
    assert (account.cash, account.realized, account.fees) == (20_500_000, 2 * MICRO, 500_000)
    assert (account.income, account.flows, account.ledger_sequence) == (3 * MICRO, 11 * MICRO, 7)
    assert (account.receivables, account.corporate) == (0, 0)
    assert (account.day.base, account.day.segment_base) == (11 * MICRO, 13_500_000)
    assert account.day.factor == 3.5  # 1.5, and 2 gained by the sale in the same batch
    assert [(h.symbol, h.quantity, h.cost, h.day_base) for h in first.holdings] == [
        ("XOM", Decimal(-1), -5 * MICRO, -5 * MICRO)
    ]
    assert (first.oldest, second.oldest) == (AFTER, None)
    assert first.closed_day_bases == {"AAPL": -MICRO}
    assert (second.account.day, second.holdings, second.day_cut) == (DayBase(0, 1, 0), [], "00:00 UTC")


async def test_a_baseline_counts_from_its_entry_not_from_its_instant(ledger: ShardLedger) -> None:
    """What was under way when the cut was taken may be stamped before it and is not in the baseline."""
    await ledger.book(opening("p-1"), cash("p-1", "DEPOSIT", "1", "d1"), cash("p-1", "DEPOSIT", "2", "d2"))
    await ledger.shards.store_cut(ledger.lease, CUT_AT, [Baseline("p-1", MICRO, 2, {})])
    assert (await ledger.one()).account.day.base == 3 * MICRO


async def test_only_deposits_withdrawals_and_rewards_move_the_day_base(ledger: ShardLedger) -> None:
    await ledger.book(opening("p-1"))
    await ledger.shards.store_cut(ledger.lease, CUT_AT, [Baseline("p-1", 0, 1, {})])
    kinds = ("DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND")
    await ledger.book(*(cash("p-1", kind, str(10**n), f"c-{kind}") for n, kind in enumerate(kinds)), at=AFTER)
    assert (await ledger.one()).account.day.base == (1 - 10 + 100) * MICRO


async def test_a_reversed_flow_and_a_reversed_fill_leave_the_day_as_if_they_had_not_been(ledger: ShardLedger) -> None:
    await ledger.book(opening("p-1"), fill("p-1", "BUY", "2", "3", "b1"))
    await ledger.shards.store_cut(ledger.lease, CUT_AT, [Baseline("p-1", 0, 2, {"AAPL": 7 * MICRO})])
    await ledger.book(cash("p-1", "DEPOSIT", "5", "d1"), fill("p-1", "BUY", "1", "4", "b2"), at=AFTER)
    await ledger.book(reversal("p-1", "d1", "r1"), reversal("p-1", "b2", "r2"), at=AFTER)
    loaded = await ledger.one()
    assert loaded.account.day.base == 0
    assert [(h.quantity, h.day_base) for h in loaded.holdings] == [(Decimal(2), 7 * MICRO)]


async def test_a_split_moves_no_day_base(ledger: ShardLedger) -> None:
    """Golden vector 4 across a restart: the base is a value."""
    await ledger.book(opening("p-1"), fill("p-1", "BUY", "10", "100", "b1"))
    await ledger.shards.store_cut(ledger.lease, CUT_AT, [Baseline("p-1", 200 * MICRO, 2, {"AAPL": 1_200 * MICRO})])
    await ledger.split("AAPL", "2", AFTER, AFTER)
    loaded = await ledger.one()
    assert [(h.quantity, h.cost, h.day_base) for h in loaded.holdings] == [(20, 1_000 * MICRO, 1_200 * MICRO)]
    assert loaded.account.day.base == 200 * MICRO


async def test_each_portfolio_counts_from_the_last_cut_of_its_own_kind(ledger: ShardLedger) -> None:
    late = "15:30 Europe/Paris"
    ledger.cuts = {late: AFTER}
    await ledger.book(opening("p-1"), opening("p-2") | {"day_cut": late})
    for name, nav in (("p-1", 1), ("p-2", 2)):
        for cut_at, more in ((CUT_AT, 0), (AFTER, 10)):
            await ledger.shards.store_cut(ledger.lease, cut_at, [Baseline(name, nav + more, 1, {})])
    loaded = await ledger.load()
    assert loaded.cuts == {"00:00 UTC": to_ns(CUT_AT), late: to_ns(AFTER)}
    days = {of.portfolio_id: (of.day_cut, of.day_cut_at_ns, of.account.day.base) for of in portfolios_of(loaded)}
    assert days == {"p-1": ("00:00 UTC", to_ns(CUT_AT), 1), "p-2": (late, to_ns(AFTER), 12)}


# -- without ------------------------------------------------------------------------------------------------------


async def test_a_portfolio_opened_since_the_cut_begins_with_nothing_and_has_no_baseline(ledger: ShardLedger) -> None:
    await ledger.book(opening("p-1"), cash("p-1", "DEPOSIT", "7", "d1"), fill("p-1", "BUY", "2", "3", "b1"), at=AFTER)
    loaded = await ledger.load()
    (portfolio,) = portfolios_of(loaded)
    assert loaded.estimated == []
    assert portfolio.account.day.base == 7 * MICRO
    assert [held.day_base for held in portfolio.holdings] == [6 * MICRO]


async def test_a_cut_that_passed_while_everything_was_down_is_made_up_for(ledger: ShardLedger) -> None:
    """At the cut: cash 1000 − 20 − 50 − 1 fee, 2 AAPL, 5 XOM."""
    await ledger.book(
        opening("p-1"),
        cash("p-1", "DEPOSIT", "1000", "d1"),
        fill("p-1", "BUY", "2", "10", "b1", fee="1"),
        fill("p-1", "BUY", "5", "10", "b2", symbol="XOM"),
    )
    await ledger.book(
        cash("p-1", "DEPOSIT", "100", "d2"),
        fill("p-1", "SELL", "5", "13", "s1", symbol="XOM"),
        fill("p-1", "BUY", "1", "12", "b3", fee="2"),
        fill("p-1", "SELL", "4", "6", "s2", symbol="MSFT"),
        at=AFTER,
    )
    for symbol, price in (("AAPL", "11"), ("XOM", "12"), ("MSFT", "7")):
        await ledger.close(symbol, price, CLOSE_AT, CLOSE_AT - timedelta(seconds=1))
        await ledger.close(symbol, "999", AFTER, AFTER)
        ledger.quotes[symbol] = (Decimal(777), AFTER)
    baseline = Baseline("p-1", 1_011 * MICRO, 4, {"AAPL": 22 * MICRO, "XOM": 60 * MICRO}, estimated=True)
    assert await ledger.estimated() == baseline
    loaded = await ledger.one()
    assert loaded.account.day.base == 1_111 * MICRO
    assert {held.symbol: held.day_base for held in loaded.holdings} == {"AAPL": 34 * MICRO, "MSFT": -24 * MICRO}
    assert loaded.closed_day_bases == {"XOM": -5 * MICRO}
    await ledger.shards.store_cut(ledger.lease, CUT_AT, [baseline])
    again = await ledger.load()
    assert (again.estimated, portfolios_of(again)) == ([], [loaded])


async def test_a_cut_long_ago_reads_the_entries_since_and_no_others(ledger: ShardLedger) -> None:
    """Found from the newest entry backwards: also where an instant was stamped by a clock that ran ahead."""
    await ledger.book(opening("p-1"), cash("p-1", "DEPOSIT", "1", "d1"))
    await ledger.book(cash("p-1", "DEPOSIT", "2", "d2"), at=AFTER)
    await ledger.book(cash("p-1", "DEPOSIT", "4", "d3"), at=BEFORE)
    await ledger.book(cash("p-1", "DEPOSIT", "8", "d4"), at=AFTER)
    assert (await ledger.estimated()).ledger_sequence == 4
    assert (await ledger.one()).account.day.base == 15 * MICRO


@pytest.mark.parametrize(
    ("quoted_at", "closes", "value"),
    [
        (CUT_AT, [(CLOSE_AT, "10")], 12),  # of the cut itself: nothing is newer
        (CUT_AT + timedelta(microseconds=1), [(CLOSE_AT, "10")], 10),
        (AFTER, [(CLOSE_AT, "10"), (CUT_AT, "11")], 11),
        (AFTER, [(AFTER, "10")], 12),  # better the present price than none
        (None, [(CLOSE_AT, "10")], 10),
        (None, [], 3),  # at cost
    ],
)
async def test_which_price_counts_at_a_missed_cut(
    ledger: ShardLedger, quoted_at: datetime | None, closes: list[tuple[datetime, str]], value: int
) -> None:
    await ledger.book(opening("p-1"), fill("p-1", "BUY", "1", "3", "b1"))
    if quoted_at is not None:
        ledger.quotes["AAPL"] = (Decimal(12), quoted_at)
    for at, price in closes:
        await ledger.close("AAPL", price, at, at)
    assert (await ledger.estimated()).values == {"AAPL": value * MICRO}


@pytest.mark.parametrize(
    ("effective_at", "booked_at", "value"),
    [
        (CUT_AT - timedelta(hours=1), CUT_AT - timedelta(hours=1), 1_200),  # between the close and the cut
        (CUT_AT + timedelta(hours=1), AFTER, 1_200),  # after the cut
        (CUT_AT - timedelta(hours=1), AFTER, 1_200),  # before the cut, booked when somebody was there again
    ],
)
async def test_a_split_on_either_side_of_a_missed_cut_moves_nobodys_value(
    ledger: ShardLedger, effective_at: datetime, booked_at: datetime, value: int
) -> None:
    await ledger.book(opening("p-1"), fill("p-1", "BUY", "10", "100", "b1"))
    await ledger.split("AAPL", "4", effective_at, booked_at)
    await ledger.close("AAPL", "120", CLOSE_AT, CLOSE_AT)
    assert (await ledger.estimated()).values == {"AAPL": value * MICRO}
    (held,) = (await ledger.one()).holdings
    assert (held.quantity, held.day_base) == (40, value * MICRO)


async def test_what_was_owed_at_a_missed_cut_was_part_of_its_nav(ledger: ShardLedger) -> None:
    """A dividend accrued before the cut and paid after it: the day has no income of it."""
    await ledger.book(opening("p-1"), cash("p-1", "DEPOSIT", "10", "d1"))
    for kind, at, amount, owed in (
        (LedgerKind.DIVIDEND_ACCRUED, BEFORE, 0, 3),
        (LedgerKind.DIVIDEND_PAID, AFTER, 3, -3),
    ):
        await ledger.admin.execute(
            "INSERT INTO ledger_entry (portfolio_id, sequence, event_id, kind, symbol, amount, fee, receivable,"
            " realized, cost, nav_effect, cash_after, effective_at, recorded_at, late, content_hash, hash)"
            " SELECT id, ledger_sequence + 1, $1, $1, 'AAPL', $2, 0, $3, 0, 0, 0, 0, $4, $4, false, '', ''"
            " FROM portfolio",
            kind.value,
            Decimal(amount),
            Decimal(owed),
            at,
        )
        await ledger.admin.execute(
            "UPDATE portfolio SET ledger_sequence = ledger_sequence + 1, cash = cash + $1, receivables = receivables"
            " + $2, income = income + $3",
            Decimal(amount),
            Decimal(owed),
            Decimal(max(owed, 0)),
        )
    assert (await ledger.estimated()).nav == 13 * MICRO
    account = (await ledger.one()).account
    assert (account.cash, account.receivables, account.day.base) == (13 * MICRO, 0, 13 * MICRO)


async def test_only_what_was_held_at_a_missed_cut_is_priced(ledger: ShardLedger) -> None:
    await ledger.book(opening("p-1"), fill("p-1", "BUY", "1", "3", "b1"))
    await ledger.book(fill("p-1", "BUY", "1", "3", "b2", symbol="XOM"), at=AFTER)
    asked: list[str] = []

    def quote_of(symbol: str) -> None:
        asked.append(symbol)

    cut_of: Callable[[str], int] = lambda _: to_ns(CUT_AT)  # noqa: E731
    await ledger.shards.load(ledger.lease, cut_of, quote_of)
    assert asked == ["AAPL"]


# -- against an object for each portfolio ------------------------------------------------------------------------


def by_portfolio(estimated: Sequence[tuple[int, list[Baseline]]]) -> dict[str, tuple[int, Baseline]]:
    return {one.portfolio_id: (cut_at_ns, one) for cut_at_ns, baselines in estimated for one in baselines}


async def live(
    ledger: ShardLedger,
    pool: asyncpg.Pool,
    life: tuple[ScriptedLedger, list[Moment]],
    day_cut: str,
    *,
    is_taken: bool,
) -> None:
    """Write a portfolio's life; its baseline as well, when its cut `is_taken`."""
    script, moments = life
    await LedgerBuilder(pool).portfolio(script.portfolio_id, opened_at=BEGIN)
    await pool.execute("UPDATE portfolio SET day_cut = $2 WHERE id = $1", script.portfolio_id, day_cut)
    await script.write(pool)
    before = [moment for moment in moments if moment.at <= ledger.cuts[day_cut]]
    if is_taken and before:
        taken = before[-1]
        baseline = Baseline(script.portfolio_id, taken.nav, taken.ledger_sequence, taken.worth.values)
        await ledger.shards.store_cut(ledger.lease, ledger.cuts[day_cut], [baseline])


@pytest.mark.parametrize("seed", range(5))
async def test_arrays_have_what_reading_portfolio_by_portfolio_finds(
    ledger: ShardLedger, fresh_database: str, seed: int
) -> None:
    """Lives of all kinds of entries, with baselines and without, of which some begin after the cut and some have no
    position left."""
    chance = random.Random(seed)
    ledger.cuts = {f"cut {n}": BEGIN + chance.randrange(-1, 12) * HOUR for n in range(3)}
    ledger.quotes = {"AAPL": (Decimal("101.5"), BEGIN + 2 * HOUR), "KO": (Decimal(77), BEGIN + 20 * HOUR)}
    async with asyncpg.create_pool(postgres_dsn(fresh_database), min_size=1, max_size=2) as pool:
        for number in range(9):
            life = lived(f"p-{number}", 100 * seed + number, steps=chance.choice([1, 3, 20, 90]))
            await live(ledger, pool, life, chance.choice(list(ledger.cuts)), is_taken=chance.random() < 0.5)
        await LedgerBuilder(pool).portfolio("p-none", opened_at=BEGIN)
        await pool.execute("UPDATE portfolio SET day_cut = 'cut 0' WHERE id = 'p-none'")
    await ledger.close("TSLA", "99", BEGIN, BEGIN)
    await ledger.close("AAPL", "98", min(ledger.cuts.values()), BEGIN)
    loaded, (expected, estimated) = await ledger.load(), await ledger.load_slowly()
    assert portfolios_of(loaded) == expected
    assert by_portfolio(loaded.estimated) == by_portfolio(estimated)
    assert (len(expected), len(by_portfolio(estimated)) > 0) == (10, True)


async def test_a_shard_without_portfolios_is_empty(ledger: ShardLedger) -> None:
    loaded = await ledger.load()
    assert (portfolios_of(loaded), loaded.symbols, loaded.estimated, loaded.closed_day_bases) == ([], [], [], [])


async def test_only_the_shard_s_own_portfolios_are_read(ledger: ShardLedger, fresh_database: str) -> None:
    """Places count within the shard, symbols among what it holds."""
    async with asyncpg.create_pool(postgres_dsn(fresh_database), min_size=1, max_size=2) as pool:
        for shard, name, symbol in ((1, "p-0", "AAPL"), (0, "p-1", "KO"), (1, "p-2", "TSLA")):
            script = ScriptedLedger(name)
            script.fill(symbol, "BUY", "1", "2")
            await LedgerBuilder(pool).portfolio(name, opened_at=BEGIN, shard=shard)
            await script.write(pool)
    loaded = await ledger.load()
    assert (loaded.portfolio_ids, loaded.symbols) == (["p-1"], ["KO"])


async def test_a_shard_is_under_repair_until_the_repair_is_finished(ledger: ShardLedger) -> None:
    await ledger.admin.execute("UPDATE shard SET owner = 'me'")
    asked = await Reconciliations(ledger.engine).ask_repair(0, ledger.lease.epoch, ["p-1"], ["nav"], 60)
    assert asked is not None
    assert (await ledger.load()).is_under_repair
    await Reconciliations(ledger.engine).finish_repair(asked, 2)
    assert not (await ledger.load()).is_under_repair
