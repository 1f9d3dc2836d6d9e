"""A batch: what is redelivered, what is refused, and that the rest is booked in the log's order."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from engine.booking import EVENTS_PER_STEP, Batch, Known, Record
from tests.bookkeeping import AT, Bookkeeping, cash, fill, opening, record
from tests.oracle import MICRO


def test_golden_vector_7_the_same_event_twice_has_one_effect() -> None:
    kept = Bookkeeping()
    deposit = cash("p-1", "DEPOSIT", "100", "d")
    (within,) = kept.send(opening("p-1"), deposit, deposit)
    (across,) = kept.send(deposit)
    assert (within.duplicates, across.duplicates, len(across.entries)) == (1, 1, 0)
    assert kept.mark("p-1").cash == 100 * MICRO
    kept.check()


def test_the_same_id_with_other_content_is_a_dead_letter_in_and_across_batches() -> None:
    kept = Bookkeeping()
    first, other = cash("p-1", "DEPOSIT", "100", "d"), cash("p-1", "DEPOSIT", "101", "d")
    (within,) = kept.send(opening("p-1"), first, other)
    (across,) = kept.send(other)
    assert [letter.code for letter in within.dead_letters + across.dead_letters] == ["EVENT_ID_REUSED"] * 2
    kept.check()


def test_an_event_refused_once_may_be_booked_when_its_portfolio_is_open() -> None:
    kept = Bookkeeping()
    deposit = cash("p-1", "DEPOSIT", "100", "d")
    (refused,) = kept.send(deposit)
    assert [letter.code for letter in refused.dead_letters] == ["UNKNOWN_PORTFOLIO"]
    kept.send(opening("p-1"), deposit)
    assert kept.mark("p-1").cash == 100 * MICRO


def test_a_bad_record_leaves_the_batch_around_it_as_it_is() -> None:
    kept = Bookkeeping()
    records = [
        record(opening("p-1"), 0),
        Record(1, b"p-1", None),
        record(b"{", 2, "p-1"),
        record(cash("p-1", "DEPOSIT", "1", "d1"), 3, key="p-2"),
        Record(4, None, json.dumps(cash("p-1", "DEPOSIT", "1", "d2")).encode()),
        record({**cash("p-1", "DEPOSIT", "1", "d3"), "currency": "EUR"}, 5),
        record(opening("p-1", "again"), 6),
        record(cash("p-1", "DEPOSIT", "1", "d4"), 7),
    ]
    outcome = kept.send_records(0, records)
    assert {letter.record.offset: letter.code for letter in outcome.dead_letters} == {
        1: "EMPTY",
        2: "MALFORMED",
        3: "WRONG_KEY",
        4: "WRONG_KEY",
        5: "WRONG_CURRENCY",
        6: "ALREADY_OPEN",
    }
    assert [(entry.sequence, entry.event_id) for entry in outcome.entries] == [(1, "open-p-1"), (2, "d4")]


def test_a_portfolio_of_another_shard_is_refused() -> None:
    batch = Batch(1, [record(opening("p-1"))], Bookkeeping().book, AT)
    outcome = batch.book(Known({}, {}, {"p-1": 0}, frozenset()))
    assert [letter.code for letter in outcome.dead_letters] == ["WRONG_PARTITION"]
    assert (outcome.entries, outcome.portfolios) == ([], {})


@pytest.mark.parametrize("price", [None, "120"])
def test_a_flows_nav_before_includes_the_events_before_it_in_the_batch(price: str | None) -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "10000", "d1"), fill("p-1", "BUY", "10", "100", "b1"))
    if price:
        kept.tick("AAPL", price)
    (outcome,) = kept.send(
        fill("p-1", "SELL", "5", "130", "s", fee="2"),
        cash("p-1", "DEPOSIT", "1", "d2"),
        cash("p-1", "FEE", "3", "f"),
        cash("p-1", "WITHDRAWAL", "1", "w"),
    )
    # 10,000 − 1,000 + 650 − 2 and five left, at cost 100 or at 120.
    nav = 9_648 + 5 * int(price or "100")
    assert [entry.nav_before for entry in outcome.entries] == [None, nav * MICRO, None, (nav - 2) * MICRO]
    kept.check()


def test_unheard_of_symbols_are_named_once() -> None:
    kept = Bookkeeping()
    batch = Batch(
        0,
        [record(opening("p-1")), record(fill("p-1", "BUY", "1", "1", "a")), record(fill("p-1", "BUY", "1", "1", "b"))],
        kept.book,
        AT,
    )
    assert batch.positions({}) == {("p-1", "AAPL")}
    assert batch.book(Known({}, {}, {}, frozenset())).unclassified == {"AAPL"}


def test_entries_carry_the_figures_of_their_event() -> None:
    kept = Bookkeeping()
    (outcome,) = kept.send(opening("p-1"), fill("p-1", "SELL", "2", "3.5", "s", fee="0.25"))
    entry = outcome.entries[1]
    assert (entry.amount, entry.fee, entry.cash_after) == (7 * MICRO, MICRO // 4, 6_750_000)
    assert (entry.quantity, entry.price, entry.side) == (Decimal(2), Decimal("3.5"), "SELL")
    assert (entry.effective_at, entry.recorded_at) == (AT, AT)


# -- sums stay within the exact range ---------------------------------------------------------------------------


def opened(*symbols_at: tuple[str, str]) -> Bookkeeping:
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "1000000", "deposit"))
    for symbol, price in symbols_at:
        kept.tick(symbol, price)
    return kept


def test_fills_far_below_the_market_can_not_pile_up_value_beyond_the_range() -> None:
    """Each position alone is within it; together they would wrap int64."""
    kept = opened(("AAPL", "500"), ("MSFT", "500"))
    first = kept.send(fill("p-1", "BUY", "1150000000", "0.000001", "a", symbol="AAPL"))
    second = kept.send(fill("p-1", "BUY", "1150000000", "0.000001", "m", symbol="MSFT"))
    assert [len(outcome.entries) for outcome in first + second] == [1, 0]
    assert [letter.code for letter in second[0].dead_letters] == ["TOO_LARGE"]
    kept.check()


def test_a_day_of_huge_round_trips_can_not_pile_up_a_day_base_beyond_the_range() -> None:
    kept = opened()
    for turn in range(3):
        kept.send(fill("p-1", "BUY", "1000", "570000000", f"a{turn}", symbol="AAPL"))
        kept.send(fill("p-1", "SELL", "1000", "0.001", f"b{turn}", symbol="AAPL"))
        kept.send(fill("p-1", "SELL", "1000", "570000000", f"c{turn}", symbol="MSFT"))
        kept.send(fill("p-1", "BUY", "1000", "0.001", f"d{turn}", symbol="MSFT"))
        kept.check()
    assert abs(kept.book.position_day_base("p-1", "AAPL")) < 2**59


def test_a_long_and_a_short_can_not_pile_up_cost_beyond_the_range() -> None:
    kept = opened()
    kept.send(fill("p-1", "BUY", "1000", "570000000", "a", symbol="AAPL"))
    refused = kept.send(fill("p-1", "SELL", "1000", "570000000", "b", symbol="MSFT"))
    assert [letter.code for letter in refused[0].dead_letters] == ["TOO_LARGE"]
    kept.check()


# -- in steps --------------------------------------------------------------------------------------------------


def flows(portfolios_count: int, per_portfolio: int) -> list[Record]:
    """Deposits of many portfolios, one after the other in turn."""
    names = [f"p-{number}" for number in range(portfolios_count)]
    events = [cash(name, "DEPOSIT", "1", f"{name}-{at}") for at in range(per_portfolio) for name in names]
    return [record(event, offset) for offset, event in enumerate(events)]


def test_a_large_batch_pauses_between_portfolios_and_each_is_booked_at_prices_of_one_moment() -> None:
    kept, names = Bookkeeping(), [f"p-{number}" for number in range(60)]
    kept.send(*(opening(name) for name in names), *(fill(name, "BUY", "1", "10", f"b-{name}") for name in names))
    batch = Batch(0, flows(60, 3), kept.book, kept.now)
    steps, prices = batch.steps(kept.known(batch, 0)), 0
    for prices, _ in enumerate(steps, 1):
        kept.tick("AAPL", str(10 + prices))
    assert prices == 60 * 3 // (EVENTS_PER_STEP + 2)
    outcome = batch.outcome
    assert [entry.event_id for entry in outcome.entries] == [f"{name}-{at}" for at in range(3) for name in names]
    befores: dict[str, list[int]] = {}
    for entry in outcome.entries:
        befores.setdefault(entry.portfolio_id, []).append(entry.nav_before or 0)
    for first, *later in befores.values():
        assert later == [first + MICRO, first + 2 * MICRO]
    assert len({first for first, *_ in befores.values()}) == prices + 1


@pytest.mark.parametrize("later", ["p-1", "p-2"])
def test_of_an_id_that_two_portfolios_use_the_first_in_the_log_counts(later: str) -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), opening("p-2"))
    first = {"p-1": "p-2", "p-2": "p-1"}[later]
    batch = Batch(
        0,
        [
            record(cash("p-1", "DEPOSIT", "9", "d0"), 0),
            record(cash(first, "DEPOSIT", "1", "same"), 1),
            record(cash(later, "DEPOSIT", "1", "same"), 2),
        ],
        kept.book,
        kept.now,
    )
    outcome = batch.book(kept.known(batch, 0))
    assert [(entry.portfolio_id, entry.event_id) for entry in outcome.entries] == [("p-1", "d0"), (first, "same")]
    assert [(letter.record.offset, letter.code) for letter in outcome.dead_letters] == [(2, "EVENT_ID_REUSED")]
