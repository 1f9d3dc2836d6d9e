"""Corporate actions in a real PostgreSQL: recorded once, booked once per shard, in one transaction, under the epoch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from engine.booking import Booked, DueStep, StepPrices
from engine.corporate_actions import CorporateAction, DividendAction, SplitAction
from engine.ledger import LedgerKind
from engine.stores.actions_postgres import ActionsStore, KnownAction, applied_splits
from engine.stores.ledger_postgres import Fenced, Lease
from tests.bookkeeping import AT, cash, fill, opening
from tests.books import LOG, Books, numbered, open_books

EFFECTIVE_AT = datetime(2026, 11, 20, 14, 30, tzinfo=UTC)  # half an hour before bookkeeping.AT
BEFORE, AFTER = EFFECTIVE_AT - timedelta(hours=1), EFFECTIVE_AT + timedelta(hours=1)
SPLIT = SplitAction(action_id="s", symbol="AAPL", ratio="4", effective_at=EFFECTIVE_AT)
DIVIDEND = DividendAction(
    action_id="d", symbol="AAPL", amount="0.5", ex_date=date(2026, 11, 20), pay_date=date(2026, 12, 4)
)
PRICES = StepPrices(Decimal(100), Decimal(25))


@pytest.fixture
async def books(fresh_database: str) -> AsyncIterator[Books]:
    async with open_books(fresh_database) as books:
        yield books


def executed(event: dict[str, Any], at: datetime) -> dict[str, Any]:
    return event | {"executed_at": at.isoformat()}


def bought(name: str, quantity: str, at: datetime = BEFORE, side: str = "BUY") -> dict[str, Any]:
    return executed(fill(name, side, quantity, "100", f"{name}-{side}-{quantity}-{at:%H%M}"), at)


async def record(books: Books, *actions: CorporateAction, at: datetime = BEFORE) -> list[KnownAction]:
    store = ActionsStore(books.engine)
    await store.record(books.leases[0], LOG, {0: len(actions)}, actions, at)
    return await store.known(0)


def due(action: KnownAction, step: int = 0, prices: StepPrices = PRICES) -> DueStep:
    return DueStep(action.steps[step], prices, action.recorded_at > action.steps[step].at, action.content_hash)


async def book(books: Books, action: KnownAction, step: int = 0, shard: int = 0) -> Booked | None:
    booked, new = await ActionsStore(books.engine).book(books.leases[shard], [due(action, step)], AFTER, {})
    return booked if new else None


async def held(books: Books) -> dict[str, tuple[Decimal, Decimal]]:
    rows = await books.admin.fetch("SELECT portfolio_id, quantity, cost FROM position ORDER BY 1")
    return {row["portfolio_id"]: (row["quantity"], row["cost"]) for row in rows}


async def test_an_action_is_recorded_once_and_another_with_its_id_is_named(books: Books) -> None:
    store = ActionsStore(books.engine)
    other = SplitAction(action_id="s", symbol="AAPL", ratio="5", effective_at=EFFECTIVE_AT)
    assert await store.record(books.leases[0], LOG, {0: 2, 1: 1}, [SPLIT, SPLIT, DIVIDEND], BEFORE) == (2, [])
    assert await store.record(books.leases[0], LOG, {0: 4}, [SPLIT, other], BEFORE) == (0, [other])
    assert await store.offsets(LOG) == {0: 4, 1: 1}
    assert await store.offsets("another log") == {}
    split, dividend = await store.known(0)
    assert [action.action_id for action in (split, dividend)] == ["s", "d"]
    assert await store.known(split.arrival) == [dividend]
    (step,) = split.steps
    assert (step.kind, step.at, step.scale) == (LedgerKind.SPLIT, EFFECTIVE_AT, Fraction(4))
    accrued, paid = dividend.steps
    assert (accrued.kind, paid.kind, paid.per_share) == ("DIVIDEND_ACCRUED", "DIVIDEND_PAID", Decimal("0.5"))
    assert (accrued.at, paid.at) == (EFFECTIVE_AT, datetime(2026, 12, 4, 14, 30, tzinfo=UTC))


async def test_of_two_in_one_batch_the_first_counts(books: Books) -> None:
    other = SplitAction(action_id="s", symbol="AAPL", ratio="5", effective_at=EFFECTIVE_AT)
    store = ActionsStore(books.engine)
    assert await store.record(books.leases[0], LOG, {0: 2}, [SPLIT, other], BEFORE) == (1, [other])
    assert (await store.known(0))[0].steps[0].scale == 4


async def test_who_lost_shard_0_records_nothing(books: Books) -> None:
    stale = Lease(0, books.leases[0].epoch - 1, LOG)
    with pytest.raises(Fenced):
        await ActionsStore(books.engine).record(stale, LOG, {0: 1}, [SPLIT], BEFORE)
    assert await ActionsStore(books.engine).known(0) == []
    assert await ActionsStore(books.engine).offsets(LOG) == {}


async def test_a_split_is_booked_for_every_holder_of_the_shard_once(books: Books) -> None:
    await books.book(*numbered(opening("p-1"), opening("p-2"), opening("p-3"), bought("p-1", "10"), bought("p-2", "3")))
    await books.book(*numbered(opening("q-1"), bought("q-1", "7")), shard=1)
    (action,) = await record(books, SPLIT)
    booked = await book(books, action)
    assert [entry.event_id for entry in booked.entries] == ["s#p-1", "s#p-2"]
    assert await held(books) == {"p-1": (40, 1_000), "p-2": (12, 300), "q-1": (7, 700)}
    assert await book(books, action) is None
    assert (await held(books))["p-1"] == (40, 1_000)
    await book(books, action, shard=1)
    assert (await held(books))["q-1"] == (28, 700)
    applied = await ActionsStore(books.engine).applied(1)
    assert applied == {("s", LedgerKind.SPLIT): AFTER}
    (split,) = applied_splits([action], applied)["AAPL"]
    assert (split.split.scale, split.applied_at) == (4, AFTER)


@pytest.mark.parametrize("booked_at", [AT, EFFECTIVE_AT - timedelta(days=3)], ids=["timely", "by an owner far behind"])
async def test_fills_booked_before_the_action_but_executed_after_it_are_in_new_shares_already(
    books: Books, booked_at: datetime
) -> None:
    """One bought more, one sold all, one sold short what it did not hold: all after the split, none of them aware."""
    await books.book(
        *numbered(opening("p-1"), opening("p-2"), opening("p-3"), bought("p-1", "10"), bought("p-2", "10")),
    )
    later = [bought("p-1", "8", AFTER), bought("p-2", "40", AFTER, "SELL"), bought("p-3", "5", AFTER, "SELL")]
    await books.book(*numbered(*later, first=5), at=booked_at)
    (action,) = await record(books, SPLIT, at=AFTER)
    booked = await book(books, action)
    assert [entry.late for entry in booked.entries] == [True, True]
    assert {name: quantity for name, (quantity, _) in (await held(books)).items()} == {"p-1": 48, "p-3": -5}


async def test_a_dividend_goes_to_who_held_at_its_ex_date_and_is_paid_to_them_once(books: Books) -> None:
    """p-2 sold after the ex-date, p-3 bought after it, p-4 is short."""
    await books.book(
        *numbered(
            *(opening(f"p-{n}") for n in (1, 2, 3, 4)),
            cash("p-1", "DEPOSIT", "1000", "c"),
            bought("p-1", "10"),
            bought("p-2", "10"),
            bought("p-4", "2", side="SELL"),
            bought("p-2", "10", AFTER, "SELL"),
            bought("p-3", "10", AFTER),
        )
    )
    (action,) = await record(books, DIVIDEND)
    booked = await book(books, action)
    assert {entry.portfolio_id: entry.receivable for entry in booked.entries} == {
        "p-1": 5_000_000,
        "p-2": 5_000_000,
        "p-4": -1_000_000,
    }
    owed = "SELECT portfolio_id, amount FROM receivable ORDER BY 1"
    assert [tuple(row) for row in await books.admin.fetch(owed)] == [("p-1", 5), ("p-2", 5), ("p-4", -1)]
    before = dict(await books.admin.fetch("SELECT id, cash FROM portfolio"))
    paid = await book(books, action, step=1)
    assert [entry.event_id for entry in paid.entries] == ["d#p-1#paid", "d#p-2#paid", "d#p-4#paid"]
    after = dict(await books.admin.fetch("SELECT id, cash FROM portfolio"))
    assert {name: after[name] - before[name] for name in after} == {"p-1": 5, "p-2": 5, "p-3": 0, "p-4": -1}
    assert await books.admin.fetch(owed) == []
    assert await books.admin.fetchval("SELECT sum(abs(receivables)) FROM portfolio") == 0
    assert await book(books, action, step=1) is None


async def test_steps_are_booked_whole_or_not_at_all(books: Books) -> None:
    await books.book(*numbered(opening("p-1"), bought("p-1", "10")))
    split, dividend = await record(books, SPLIT, DIVIDEND)
    await books.admin.execute("ALTER TABLE receivable ADD CHECK (amount < 0)")
    with pytest.raises(IntegrityError):
        await ActionsStore(books.engine).book(books.leases[0], [due(split), due(dividend)], AFTER, {})
    assert await ActionsStore(books.engine).applied(0) == {}
    assert await held(books) == {"p-1": (10, 1_000)}


async def test_many_steps_in_one_transaction_see_each_other(books: Books) -> None:
    """A dividend per old share, the split, another dividend per new share, and the first one paid."""
    await books.book(*numbered(opening("p-1"), opening("p-2"), bought("p-1", "10"), bought("p-2", "1", side="SELL")))
    second = DividendAction(
        action_id="e", symbol="AAPL", amount="0.1", ex_date=date(2026, 11, 20), pay_date=date(2026, 12, 4)
    )
    dividend, split, later = await record(books, DIVIDEND, SPLIT, second)
    steps = [due(dividend), due(split), due(later), due(dividend, 1)]
    booked, new = await ActionsStore(books.engine).book(books.leases[0], steps, AFTER, {})
    assert new == [one.step for one in steps]
    assert [entry.receivable for entry in booked.entries if entry.portfolio_id == "p-1"] == [
        5 * 10**6,
        0,
        4 * 10**6,
        -(5 * 10**6),
    ]
    assert await held(books) == {"p-1": (40, 1_000), "p-2": (-4, -100)}
    owed = await books.admin.fetch("SELECT portfolio_id, action_id, amount FROM receivable ORDER BY 1")
    assert [tuple(row) for row in owed] == [("p-1", "e", 4), ("p-2", "e", Decimal("-0.4"))]
    sums = await books.admin.fetch("SELECT receivables, income FROM portfolio ORDER BY id")
    assert [tuple(row) for row in sums] == [(4, 9), (Decimal("-0.4"), Decimal("-0.9"))]
    again, new = await ActionsStore(books.engine).book(books.leases[0], [*steps, due(later, 1)], AFTER, {})
    assert ([step.kind for step in new], len(again.entries)) == (["DIVIDEND_PAID"], 2)


async def test_a_former_owner_books_no_step(books: Books) -> None:
    await books.book(*numbered(opening("p-1"), bought("p-1", "10")))
    (action,) = await record(books, SPLIT)
    await books.admin.execute("UPDATE shard SET epoch = epoch + 1 WHERE id = 0")
    with pytest.raises(Fenced):
        await book(books, action)
    assert await held(books) == {"p-1": (10, 1_000)}


async def test_an_early_fill_and_a_reversal_after_a_split_are_booked_in_new_shares(books: Books) -> None:
    await books.book(*numbered(opening("p-1"), bought("p-1", "10"), bought("p-1", "1")))
    (action,) = await record(books, SPLIT)
    await book(books, action)
    splits = applied_splits([action], await ActionsStore(books.engine).applied(0))
    back = {
        "type": "reversal",
        "event_id": "r",
        "portfolio_id": "p-1",
        "reverses": bought("p-1", "1")["event_id"],
        "effective_at": AFTER.isoformat(),
    }
    early, timely = bought("p-1", "2"), executed(fill("p-1", "BUY", "2", "25", "timely"), AFTER)
    outcome = await books.book(*numbered(early, timely, back, first=3), splits=splits)
    assert [entry.scale for entry in outcome.entries] == [4, None, 4]
    assert (await held(books))["p-1"] == (40 + 8 + 2, 1_000 + 200 + 50)


async def test_splits_in_any_order_of_arrival_and_a_late_dividend_count_in_the_shares_of_the_day(
    books: Books,
) -> None:
    """10 before everything, 6 between the splits: (10 × 2 + 6) × 3, and a dividend on the 10 of its ex-date."""
    before, between, after = (EFFECTIVE_AT + timedelta(hours=hours) for hours in (-30, -10, -1))
    early = SplitAction(action_id="early", symbol="AAPL", ratio="2", effective_at=EFFECTIVE_AT - timedelta(hours=20))
    late = SplitAction(action_id="late", symbol="AAPL", ratio="3", effective_at=EFFECTIVE_AT - timedelta(hours=2))
    dividend = DividendAction(
        action_id="dv", symbol="AAPL", amount="1", ex_date=date(2026, 11, 18), pay_date=date(2026, 12, 4)
    )
    before -= timedelta(days=3)
    events = [opening("p-1"), bought("p-1", "10", before), bought("p-1", "6", between), bought("p-1", "5", after)]
    wrong = bought("p-1", "4", after)
    back = {
        "type": "reversal",
        "event_id": "r",
        "portfolio_id": "p-1",
        "reverses": wrong["event_id"],
        "effective_at": after.isoformat(),
    }
    await books.book(*numbered(*events, wrong, back))
    store = ActionsStore(books.engine)
    of_early, of_late, of_dividend = await record(books, early, late, dividend, at=AFTER)
    for action in (of_late, of_early, of_dividend):
        splits = applied_splits([of_early, of_late], await store.applied(0))
        await store.book(books.leases[0], [due(action)], AFTER, splits)
    assert (await held(books))["p-1"][0] == (10 * 2 + 6) * 3 + 5
    accrued = await books.admin.fetchrow("SELECT quantity, receivable FROM ledger_entry WHERE kind LIKE 'DIVIDEND%'")
    assert tuple(accrued) == (10, 10)
