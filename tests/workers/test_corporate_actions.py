"""What the flusher is told of corporate actions: which instants to wait at, and which quotes are in today's shares."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import pytest

from engine.booking import StepPrices
from engine.corporate_actions import Split, Step
from engine.instants import to_ns
from engine.ledger import LedgerKind
from engine.messages import Quote
from engine.stores.actions_postgres import KnownAction
from workers.corporate_actions import ActionSchedule

AT = datetime(2026, 11, 20, 14, 30, tzinfo=UTC)
DAY = timedelta(days=1)
BEFORE, AFTER = to_ns(AT) - 1, to_ns(AT) + 1


class Store:
    """What PostgreSQL has; `booked` by shard."""

    def __init__(self, *actions: KnownAction) -> None:
        self.actions: Sequence[KnownAction] = actions
        self.booked: dict[int, dict[tuple[str, LedgerKind], datetime]] = {}

    async def known(self, after: int) -> list[KnownAction]:
        return [action for action in self.actions if action.arrival > after]

    async def applied(self, shard: int) -> dict[tuple[str, LedgerKind], datetime]:
        return dict(self.booked.get(shard, {}))


def split(
    name: str = "s", arrival: int = 1, at: datetime = AT, scale: int = 4, recorded_at: datetime = AT - DAY
) -> KnownAction:
    step = Step(name, LedgerKind.SPLIT, "AAPL", at, arrival, scale=Fraction(scale))
    return KnownAction(name, arrival, AT - DAY, b"", (step,))


def dividend(name: str = "d", arrival: int = 2, at: datetime = AT) -> KnownAction:
    accrued = Step(name, LedgerKind.DIVIDEND_ACCRUED, "XOM", at, arrival, per_share=Decimal(1))
    paid = Step(name, LedgerKind.DIVIDEND_PAID, "XOM", at, arrival, per_share=Decimal(1))
    return KnownAction(name, arrival, AT - DAY, b"", (paid, accrued))


async def schedule(store: Store, *shards: int) -> ActionSchedule:
    of = ActionSchedule(store)  # type: ignore[arg-type]
    for shard in shards:
        await of.take(shard)
    return of


def quote(ts_event_ns: int, price: str = "100") -> Quote:
    return Quote("AAPL", price, ts_event_ns, "test")


def due(of: ActionSchedule) -> list[tuple[str, str, list[int]]]:
    return [(action.action_id, step.kind.value, shards) for action, step, shards in of.due()]


async def test_a_step_is_due_when_everything_before_its_instant_is_in_the_book() -> None:
    of = await schedule(Store(split()), 0)
    assert (of.next_boundary_ns(0), of.next_boundary_ns(BEFORE)) == (BEFORE, None)
    assert (due(of), of.holds(BEFORE - 1), due(of)) == ([], False, [])
    assert of.holds(BEFORE)
    assert due(of) == [("s", "SPLIT", [0])]


async def test_a_boundary_holds_until_the_last_shard_has_the_step() -> None:
    store = Store(split())
    of = await schedule(store, 0, 1)
    of.reach(BEFORE)
    (_, step, shards), *_ = of.due()
    assert shards == [0, 1]
    of.booked(0, step, AT)
    assert (of.holds(BEFORE), due(of)) == (True, [("s", "SPLIT", [1])])
    of.booked(1, step, AT)
    assert (of.holds(BEFORE), due(of), of.next_boundary_ns(0)) == (False, [], None)


async def test_who_owns_nothing_waits_for_nothing() -> None:
    of = await schedule(Store(split()))
    await of.refresh()
    assert (of.holds(BEFORE), of.next_boundary_ns(0), due(of)) == (False, None, [])
    await of.take(3)
    assert of.holds(BEFORE)
    of.drop(3)
    assert not of.holds(BEFORE)


async def test_steps_come_by_instant_then_arrival_and_a_payment_after_its_accrual() -> None:
    store = Store(split("later", 1, AT + DAY), dividend("d", 2), split("s", 3), split("first", 4, AT - DAY))
    of = await schedule(store, 0)
    of.reach(to_ns(AT + 2 * DAY))
    assert [(name, kind) for name, kind, _ in due(of)] == [
        ("first", "SPLIT"),
        ("d", "DIVIDEND_ACCRUED"),
        ("d", "DIVIDEND_PAID"),
        ("s", "SPLIT"),
        ("later", "SPLIT"),
    ]


async def test_a_shard_that_has_a_step_already_does_not_get_it_again() -> None:
    store = Store(split(), dividend())
    store.booked[0] = {("s", LedgerKind.SPLIT): AT}
    of = await schedule(store, 0)
    of.reach(AFTER)
    assert [kind for _, kind, _ in due(of)] == ["DIVIDEND_ACCRUED", "DIVIDEND_PAID"]
    assert of.splits_of("AAPL") == (Split(AT, Fraction(4)),)
    assert [one.applied_at for one in of.splits_of_shard(0)["AAPL"]] == [AT]
    assert (of.splits_of("XOM"), of.splits_of_shard(9)) == ((), {})


async def test_what_arrives_is_learnt_once() -> None:
    store = Store(split())
    of = await schedule(store, 0)
    store.actions = [*store.actions, split("t", 2, AT + DAY)]
    await of.refresh()
    assert of.next_boundary_ns(BEFORE) == to_ns(AT + DAY) - 1
    await of.refresh()
    of.reach(to_ns(AT + 2 * DAY))
    assert len(due(of)) == 2


async def test_a_quote_from_before_a_split_in_the_book_is_not_applied_unless_it_is_the_first() -> None:
    store = Store(split())
    store.booked[0] = {("s", LedgerKind.SPLIT): AT}
    of = await schedule(store, 0)
    assert of.adjusted(quote(BEFORE), first=False) is None
    first = of.adjusted(quote(BEFORE), first=True)
    assert first is not None and (first.price, first.ts_event_ns) == ("25", BEFORE)
    for first_of_symbol in (True, False):
        assert of.adjusted(quote(to_ns(AT)), first=first_of_symbol) == quote(to_ns(AT))
    assert of.adjusted(quote(BEFORE, "0.000000000001"), first=True) is None


async def test_a_halt_that_repeats_the_price_from_before_a_split_is_still_heard() -> None:
    store = Store(split())
    store.booked[0] = {("s", LedgerKind.SPLIT): AT}
    of = await schedule(store, 0)
    halted = of.adjusted(Quote("AAPL", "100", BEFORE, "test", None, "HALTED"), first=False)
    assert halted is not None and (halted.price, halted.condition) == ("25", "HALTED")


async def test_a_first_quote_goes_through_every_split_since() -> None:
    store = Store(split("s", 1, AT, 4), split("t", 2, AT + DAY, 5))
    store.booked[0] = {("s", LedgerKind.SPLIT): AT, ("t", LedgerKind.SPLIT): AT + DAY}
    of = await schedule(store, 0)
    prices = [of.adjusted(quote(ns), first=True) for ns in (BEFORE, AFTER, to_ns(AT + DAY))]
    assert [one.price for one in prices if one] == ["5", "20", "100"]


async def test_quotes_of_a_split_that_could_not_be_booked_yet_are_withheld() -> None:
    of = await schedule(Store(split(), dividend()), 0)
    assert of.adjusted(quote(BEFORE), first=False) == quote(BEFORE)
    assert of.adjusted(quote(AFTER), first=False) is None
    assert of.adjusted(quote(AFTER), first=True) == quote(AFTER)
    other = Quote("XOM", "1", AFTER, "test")
    assert of.adjusted(other, first=False) == other


@pytest.mark.parametrize(
    ("price", "ts_event_ns", "before", "after"),
    [("100", BEFORE, "100", "25"), ("25", AFTER, "25", "25"), ("25", to_ns(AT), "25", "25")],
)
async def test_the_prices_around_a_split(price: str, ts_event_ns: int, before: str, after: str) -> None:
    of = await schedule(Store(split()), 0)
    step = split().steps[0]
    assert of.prices(step, Decimal(price), ts_event_ns) == StepPrices(Decimal(before), Decimal(after))
    assert of.prices(step, None, 0) == StepPrices(None, None)


async def test_a_shard_that_comes_after_the_books_price_was_divided_sees_both_prices() -> None:
    store = Store(split())
    store.booked[0] = {("s", LedgerKind.SPLIT): AT}
    of = await schedule(store, 0, 1)
    assert of.prices(split().steps[0], Decimal(25), BEFORE) == StepPrices(Decimal(100), Decimal(25))


async def test_a_dividend_leaves_the_price_as_it_is() -> None:
    of = await schedule(Store(dividend()), 0)
    assert of.prices(dividend().steps[0], Decimal(7), BEFORE) == StepPrices(Decimal(7), Decimal(7))
