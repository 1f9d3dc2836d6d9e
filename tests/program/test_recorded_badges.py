"""The badges of the recorded year, reckoned again by tests.slow_badges.

What rests on the ledger alone must agree exactly. Where prices of the moment decide, the evidence has them: they must
prove the award, and closing prices say who has clearly met a rule before, or met it and went without.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from engine.marks import MarkQuality
from tests.recorded_year import TIMEOUT_S, Recorded, Row
from tests.slow_badges import Cycle, Step, above, sector_of, walk, weights
from tests.slow_fold import Fold, Year

pytestmark = pytest.mark.timeout(TIMEOUT_S)

DAY = timedelta(days=1)
# Evaluators look between batches, and a day of the market is a fifth of a second here; then there are weekends.
SOON = 5 * DAY


def rule(recorded: Recorded, badge_id: str) -> Row:
    (found,) = [row for row in recorded.rules if row["badge_id"] == badge_id]
    return found


def award(recorded: Recorded, name: str, badge_id: str) -> dict[str, Any] | None:
    row = recorded.awards.get((name, badge_id))
    return None if row is None else json.loads(row["evidence"]) | {"awarded_at": row["awarded_at"]}


def portfolios(recorded: Recorded) -> Iterator[tuple[str, list[Step]]]:
    assert recorded.ledger
    for name, rows in recorded.ledger.items():
        yield name, list(walk(rows))


@pytest.mark.parametrize("badge_id", ["first_fill", "centurion", "market_maker"])
def test_fills_are_counted_to_the_very_one(recorded: Recorded, badge_id: str) -> None:
    threshold = rule(recorded, badge_id)["threshold"]
    for name, steps in portfolios(recorded):
        reached = next((step.row for step in steps if step.fills >= threshold), None)
        proved = award(recorded, name, badge_id)
        assert (proved is None) == (reached is None), name
        if proved is not None and reached is not None:
            assert (proved["ledger_sequence"], proved["event_id"]) == (reached["sequence"], reached["event_id"])


def test_a_streak_is_awarded_with_the_close_that_completes_it(recorded: Recorded) -> None:
    threshold = rule(recorded, "hot_streak")["threshold"]
    awarded = 0
    for name, steps in portfolios(recorded):
        reached = next((step.row["sequence"] for step in steps if step.streak >= threshold), None)
        proved = award(recorded, name, "hot_streak")
        assert (proved["ledger_sequence"] if proved else None) == reached, name
        awarded += proved is not None
    assert awarded < len(recorded.ledger), "a badge that everybody has says nothing"


def test_holding_for_thirty_days_is_awarded_and_nothing_shorter(recorded: Recorded, year: Year) -> None:
    days, ends_at = timedelta(days=rule(recorded, "diamond_hands")["window_days"]), max(year.closes)
    for name, steps in portfolios(recorded):
        held = [(cycle, cycle.ended_at or ends_at) for cycle in cycles(steps)]
        dues = [cycle.held_since + days for cycle, until in held if until - cycle.held_since >= days + SOON]
        proved = award(recorded, name, "diamond_hands")
        if proved is None:
            assert not dues, name
            continue
        opened_at, since = (datetime.fromisoformat(proved[of]) for of in ("opened_at", "since"))
        told = (proved["symbol"], opened_at, since)
        assert any(
            (cycle.symbol, cycle.opened_at, cycle.held_since) == told and until - since >= days - SOON
            for cycle, until in held
        ), (name, proved)
        assert since + days <= proved["awarded_at"] <= min(dues, default=ends_at) + SOON


def cycles(steps: list[Step]) -> list[Cycle]:
    closed = [cycle for step in steps for cycle in step.closed]
    return [*closed, *steps[-1].open.values()]


def test_five_sectors_at_once_are_proved_by_the_prices_of_the_moment(recorded: Recorded, year: Year) -> None:
    of, sectors = rule(recorded, "diversified"), sector_of()
    closes, awarded = sorted(year.closes), 0
    for name, steps in portfolios(recorded):
        proved = award(recorded, name, "diversified")
        for step in steps:
            at = None if proved is None else proved["ledger_sequence"]
            if step.row["sequence"] == at:
                assert proved is not None
                prices = {
                    symbol: step.paid[symbol] / step.shares[symbol] if price is None else Decimal(price)
                    for symbol, price in proved["prices"].items()
                }
                shares = weights(step.shares, prices, sectors)
                assert above(shares, of["minimum"]) >= of["threshold"], name
                told = {one["sector"]: Decimal(one["weight"]) for one in proved["sectors"]}
                assert {sector: float(weight) for sector, weight in told.items()} == pytest.approx(
                    {sector: float(weight) for sector, weight in shares.items()}, abs=1e-9
                )
                awarded += 1
                break
            if step.row["kind"] == "FILL":
                around = [close for close in closes if abs(close - step.row["effective_at"]) < 2 * DAY]
                clearly = [
                    above(weights(step.shares, year.closes[close], sectors), 2 * of["minimum"]) >= of["threshold"]
                    for close in around
                ]
                assert not (clearly and all(clearly)), (name, step.row["sequence"])
    assert awarded > len(recorded.ledger) // 2


def test_who_was_worth_a_million_at_a_close_is_a_whale_and_every_whale_was(recorded: Recorded, year: Year) -> None:
    threshold = rule(recorded, "whale")["threshold"]
    rich_at: dict[str, list[datetime]] = {name: [] for name in recorded.ledger}
    for (name, at), row in recorded.snapshots.items():
        # A NAV with a position at its cost, because it never had a price, proves nothing.
        if row["nav"] >= threshold and row["quality"] != MarkQuality.MISSING:
            rich_at[name].append(at)
    for name, rows in recorded.ledger.items():
        rich, proved = rich_at[name], award(recorded, name, "whale")
        assert proved is not None or not rich, name
        if proved is not None:
            assert proved["awarded_at"] <= min(rich, default=proved["awarded_at"]) + SOON
            assert Decimal(proved["nav"]) == worth(year, rows, proved) >= threshold


def worth(year: Year, rows: list[Row], proved: dict[str, Any]) -> Decimal:
    """NAV after the evidence's entry, at the evidence's prices."""
    fold, steps = Fold(year), list(walk(rows[: proved["ledger_sequence"]]))
    for row in rows[: proved["ledger_sequence"]]:
        fold.take(row)
    prices = {symbol: Decimal(price) for symbol, price in proved["prices"].items()}
    held = sum((round(shares * prices[symbol], 6) for symbol, shares in steps[-1].shares.items()), Decimal(0))
    return fold.cash + sum(fold.owed.values(), Decimal(0)) + held


def test_whoever_s_sharpe_ratio_was_above_two_at_a_close_is_untouchable_since_the_first_such(
    recorded: Recorded, year: Year
) -> None:
    """By what each session day has multiplied the portfolio's worth with, since its first one with a snapshot."""
    window, closes = timedelta(days=rule(recorded, "untouchable")["window_days"]), sorted(year.closes)
    sessions = [close.date() for close in closes]
    multiples: dict[str, dict[date, float]] = {name: {} for name in recorded.ledger}
    for (name, at), row in sorted(recorded.snapshots.items()):
        # What happens between sessions counts with the next one.
        session = next(iter(sessions[bisect_left(sessions, at.date()) :]), None)
        if session is not None:
            factor = 1.0 if row["twr_factor"] is None else row["twr_factor"]
            multiples[name][session] = multiples[name].get(session, 1.0) * factor
    for name, of in multiples.items():
        judged = [close for close in closes if (name, close) in recorded.snapshots]
        ratios = {close: sharpe(of, (close - window).date(), close.date()) for close in judged}
        reached = next((close for close, ratio in ratios.items() if ratio > 2), None)
        proved = award(recorded, name, "untouchable")
        assert (None if proved is None else proved["awarded_at"]) == reached, name
        if proved is not None and reached is not None:
            assert float(proved["figure"]) == pytest.approx(ratios[reached], rel=1e-6)


def sharpe(multiples: dict[date, float], begin: date, end: date) -> float:
    """Of the whole days of a window; the day of its close is not over yet, and the first one is where returns begin."""
    returns = [multiple - 1 for day, multiple in multiples.items() if begin <= day < end][1:]
    if len(returns) < 20:
        return 0.0
    mean = sum(returns) / len(returns)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in returns) / (len(returns) - 1))
    return mean / deviation * math.sqrt(252) if deviation else 0.0


def test_every_event_is_told_once_and_each_badge_begins_with_unlocked(recorded: Recorded) -> None:
    by_badge: dict[tuple[str, str], list[str]] = {}
    for event in recorded.badge_events:
        by_badge.setdefault((event["portfolio_id"], event["badge_id"]), []).append(event["kind"])
    assert by_badge.keys() == recorded.awards.keys()
    for badge, kinds in by_badge.items():
        assert kinds[0] == "UNLOCKED"
        assert kinds[1:] == [("LAPSED", "ACTIVATED")[at % 2] for at in range(len(kinds) - 1)]
        assert recorded.awards[badge]["active"] is (kinds[-1] != "LAPSED")
