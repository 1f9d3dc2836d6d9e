"""The exact reference against hand-computed vectors; what it refuses leaves it as it was."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from msgspec import structs

from engine.amounts import AmountError
from engine.entries import draft_event
from engine.ledger import LedgerEntry
from engine.messages import EventRejected, decode_event
from engine.portfolio import LedgerMismatch, Portfolio, Present, check_invariants, fold, value_portfolio
from tests.bookkeeping import AT, Bookkeeping, cash, fill, opening, record, reversal
from tests.oracle import MICRO

BIG = "576460752303"  # just below the largest amount


def booked(portfolio: Portfolio, *events: dict[str, Any]) -> list[LedgerEntry]:
    entries = []
    for event in events:
        decoded = decode_event(record(event).value)
        portfolio.check_event(decoded)
        entries.append(portfolio.book(draft_event(decoded, AT), Present(0)).entry)
        check_invariants(portfolio, {})
    return entries


def opened(*events: dict[str, Any]) -> Portfolio:
    portfolio = Portfolio("p-1", "USD")
    booked(portfolio, opening("p-1"), *events)
    return portfolio


def test_golden_vector_1_average_cost_of_a_long() -> None:
    portfolio = opened(
        cash("p-1", "DEPOSIT", "10000", "d"),
        fill("p-1", "BUY", "10", "100", "b1", fee="1"),
        fill("p-1", "BUY", "10", "110", "b2", fee="1"),
        fill("p-1", "SELL", "5", "120", "s1", fee="1"),
    )
    held, valued = portfolio.positions["AAPL"], value_portfolio(portfolio, {"AAPL": Decimal(120)})
    assert (held.quantity, held.cost) == (15, 15 * 105 * MICRO)
    assert (portfolio.realized, portfolio.fees, portfolio.cash) == (75 * MICRO, 3 * MICRO, 8_497 * MICRO)
    assert (valued.unrealized, valued.nav) == (225 * MICRO, 10_297 * MICRO)


def test_golden_vector_2_a_sale_that_crosses_zero() -> None:
    portfolio = opened(
        cash("p-1", "DEPOSIT", "10000", "d"),
        fill("p-1", "BUY", "10", "100", "b"),
        fill("p-1", "SELL", "15", "110", "s"),
    )
    held, valued = portfolio.positions["AAPL"], value_portfolio(portfolio, {"AAPL": Decimal(105)})
    assert (held.quantity, held.cost, held.realized) == (-5, -5 * 110 * MICRO, 0)
    assert (portfolio.realized, portfolio.cash) == (100 * MICRO, 10_650 * MICRO)
    assert (valued.unrealized, valued.nav) == (25 * MICRO, 10_125 * MICRO)


def test_golden_vector_11_a_reopened_position_begins_clean() -> None:
    portfolio = opened(
        fill("p-1", "BUY", "10", "100", "b1"),
        fill("p-1", "SELL", "10", "90", "s"),
        fill("p-1", "BUY", "10", "95", "b2"),
    )
    held, valued = portfolio.positions["AAPL"], value_portfolio(portfolio, {"AAPL": Decimal(96)})
    assert (valued.unrealized, portfolio.realized, held.realized) == (10 * MICRO, -100 * MICRO, 0)


def test_a_short_gains_when_bought_back_lower() -> None:
    portfolio = opened(fill("p-1", "SELL", "10", "50", "s"), fill("p-1", "BUY", "4", "45", "b"))
    held = portfolio.positions["AAPL"]
    assert (held.quantity, held.cost, held.realized) == (-6, -300 * MICRO, 20 * MICRO)


def test_a_partial_close_releases_its_share_half_even_and_the_last_unit_the_rest() -> None:
    portfolio = opened(fill("p-1", "BUY", "2", "0.0000025", "b"))
    assert portfolio.positions["AAPL"].cost == 5
    booked(portfolio, fill("p-1", "SELL", "1", "0.000001", "s1"))
    assert (portfolio.positions["AAPL"].cost, portfolio.realized) == (3, 1 - 2)
    booked(portfolio, fill("p-1", "SELL", "1", "0.000001", "s2"))
    assert (portfolio.positions, portfolio.realized) == ({}, 2 - 5)


def test_of_a_crossing_fill_the_two_notionals_sum_to_the_whole() -> None:
    portfolio = opened(fill("p-1", "BUY", "1", "1", "b"), fill("p-1", "SELL", "4", "0.0000005", "s"))
    # 4 × 0.5 = 2 micro-units in all: 0.5 rounds to 0 for the close, the other 2 open the short.
    assert (portfolio.cash, portfolio.positions["AAPL"].cost) == (-MICRO + 2, -2)
    assert portfolio.realized == -MICRO


@pytest.mark.parametrize(
    ("kind", "cash_after", "fees", "income", "flows"),
    [
        ("DEPOSIT", 3, 0, 0, 3),
        ("WITHDRAWAL", -3, 0, 0, -3),
        ("REWARD", 3, 0, 0, 3),
        ("FEE", -3, 3, 0, 0),
        ("INTEREST", 3, 0, 3, 0),
        ("DIVIDEND", 3, 0, 3, 0),
    ],
)
def test_each_kind_of_cash_has_its_place(kind: str, cash_after: int, fees: int, income: int, flows: int) -> None:
    portfolio = opened(cash("p-1", kind, "0.000003", "c"))
    assert (portfolio.cash, portfolio.fees, portfolio.income, portfolio.flows) == (cash_after, fees, income, flows)


@pytest.mark.parametrize(
    ("events", "refused"),
    [
        ([cash("p-1", "DEPOSIT", BIG, "a")], cash("p-1", "INTEREST", "1", "x")),
        ([cash("p-1", "WITHDRAWAL", BIG, "a")], cash("p-1", "FEE", "1", "x")),
        # Cash stays small throughout; what was paid, earned or moved in all does not.
        ([cash("p-1", "DEPOSIT", BIG, "a"), cash("p-1", "FEE", BIG, "b")], cash("p-1", "FEE", "1", "x")),
        ([cash("p-1", "INTEREST", BIG, "a"), cash("p-1", "FEE", BIG, "b")], cash("p-1", "DIVIDEND", "1", "x")),
        ([cash("p-1", "DEPOSIT", BIG, "a"), cash("p-1", "FEE", BIG, "b")], cash("p-1", "REWARD", "1", "x")),
        ([cash("p-1", "WITHDRAWAL", BIG, "a"), cash("p-1", "INTEREST", BIG, "b")], cash("p-1", "WITHDRAWAL", "1", "x")),
        ([fill("p-1", "BUY", "1", BIG, "a"), cash("p-1", "DEPOSIT", BIG, "b")], fill("p-1", "BUY", "1", "1", "x")),
        ([fill("p-1", "BUY", "100000000000000", "0.001", "a")], fill("p-1", "BUY", "0.1", "1", "x")),
        ([fill("p-1", "BUY", "999999999999999", "0.0001", "a")], fill("p-1", "BUY", "1", "0.1", "x")),
        ([], {**cash("p-1", "DEPOSIT", "1", "x"), "currency": "EUR"}),
        ([], opening("p-1", "x")),
    ],
)
def test_what_leaves_the_range_is_refused_and_changes_nothing(
    events: list[dict[str, Any]], refused: dict[str, Any]
) -> None:
    portfolio = opened(*events)
    before = replace(portfolio, positions=dict(portfolio.positions))
    with pytest.raises((EventRejected, AmountError)):
        booked(portfolio, refused)
    assert portfolio == before


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 4},
        {"amount": -2_000_001},
        {"realized": 1},
        {"cash_after": 0},
        {"quantity": Decimal(3)},
        {"cost": 2_000_001},
        {"nav_effect": 7},
        {"reference": "another"},
        {"hash": bytes(32)},
    ],
)
def test_a_ledger_that_was_tampered_with_does_not_fold(change: dict[str, Any]) -> None:
    portfolio = Portfolio("p-1", "USD")
    entries = booked(
        portfolio, opening("p-1"), cash("p-1", "DEPOSIT", "9", "d"), fill("p-1", "BUY", "2", "1", "b", fee="0.5")
    )
    assert fold("p-1", "USD", entries) == portfolio
    with pytest.raises(LedgerMismatch):
        fold("p-1", "USD", [*entries[:-1], structs.replace(entries[-1], **change)])


@pytest.mark.parametrize("reversed_id", ["s1", "b1", "b3"])
def test_a_streak_begins_anew_with_the_reversal_of_any_fill(reversed_id: str) -> None:
    """Of a close, of the fill that opened what was closed, and of one that is about neither: none can be told apart."""
    kept = Bookkeeping()
    kept.send(opening("p"), fill("p", "BUY", "1", "10", "b1"), fill("p", "SELL", "1", "11", "s1"))
    kept.send(fill("p", "BUY", "1", "10", "b2", "XOM"), fill("p", "SELL", "1", "11", "s2", "XOM"))
    kept.send(fill("p", "BUY", "1", "10", "b3", "BTC"), cash("p", "DEPOSIT", "5", "d"), reversal("p", "d", "r"))
    assert (kept.folded["p"].fills, kept.folded["p"].streak) == (5, 2)
    kept.send(reversal("p", reversed_id, "r2"))
    assert (kept.folded["p"].fills, kept.folded["p"].streak) == (4, 0)
    assert fold("p", "USD", kept.entries["p"]).streak == 0
    kept.send(fill("p", "BUY", "1", "10", "b4", "XOM"), fill("p", "SELL", "1", "11", "s4", "XOM"))
    assert kept.folded["p"].streak == 1


def test_check_invariants_sees_money_that_came_from_nowhere() -> None:
    portfolio = opened(fill("p-1", "BUY", "2", "1", "b"))
    check_invariants(portfolio, {"AAPL": Decimal(7)})
    with pytest.raises(AssertionError, match="not explained"):
        check_invariants(replace(portfolio, cash=portfolio.cash + 1), {})
    held = portfolio.positions["AAPL"]
    with pytest.raises(AssertionError, match="cost against quantity"):
        flipped = {"AAPL": structs.replace(held, cost=-held.cost)}
        check_invariants(replace(portfolio, positions=flipped, realized=portfolio.realized - 2 * held.cost), {})
