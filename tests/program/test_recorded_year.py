"""The recorded year through the whole program, and every figure of it reckoned again by tests.slow_fold."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from decimal import Decimal

import pytest

from tests.recorded_year import PORTFOLIOS, SESSIONS, TIMEOUT_S, Recorded, Row
from tests.slow_fold import Dividend, Fold, Split, Worth, Year

# A step and a batch that are booked at once may bear each other's instants: market time runs fast here.
SAME_TIME = timedelta(hours=6)

pytestmark = pytest.mark.timeout(TIMEOUT_S)


def test_the_file_is_the_year_that_it_is_said_to_be(year: Year) -> None:
    assert (len(year.closes), len(year.splits), len(year.dividends)) == (SESSIONS, 11, 1_550)


def test_every_session_s_close_is_worth_what_a_slow_fold_of_the_ledger_says(year: Year, recorded: Recorded) -> None:
    missing: Counter[datetime] = Counter()
    wrong = []
    assert len(recorded.portfolios) == PORTFOLIOS
    for name, rows in recorded.ledger.items():
        fold, taken = Fold(year), 0
        for close in year.closes:
            row = recorded.snapshots.get((name, close))
            if row is None:
                missing[close] += 1
                continue
            for entry in rows[taken : row["ledger_sequence"]]:
                fold.take(entry)
            taken = row["ledger_sequence"]
            found, expected = as_worth(row), fold.worth(close)
            if found != expected or row["nav"] != expected.nav:
                wrong.append((name, close, found, expected))
    assert not wrong, f"{len(wrong)} wrong, first {wrong[:3]}"
    assert not missing, f"sessions without a row, and for how many portfolios: {missing}"


def as_worth(row: Row) -> Worth:
    return Worth(row["cash"], row["receivables"], row["positions_value"])


def test_every_action_is_booked_once_for_each_holder_with_what_it_concerns(year: Year, recorded: Recorded) -> None:
    assert recorded.late_count == 0, "they were announced before the market opened"
    holders: Counter[str] = Counter()
    for name, rows in recorded.ledger.items():
        shard = recorded.portfolios[name]["shard"]
        booked = {row["event_id"]: row for row in rows if row["kind"] in ("SPLIT", "DIVIDEND_ACCRUED")}
        for kind, actions in (("SPLIT", year.splits), ("DIVIDEND_ACCRUED", year.dividends)):
            for action in actions:
                row = booked.pop(f"{action.action_id}#{name}", None)
                if row is None:
                    applied_at = recorded.applied_at[shard, action.action_id, kind]
                    assert not held_at(year, rows, action, applied_at), (name, action)
                    continue
                holders[kind] += 1
                check_step(row, kind, action, held_until(year, rows, row["sequence"], action))
        assert not booked, "entries of no action of the file"
    assert holders["SPLIT"] >= 2 and holders["DIVIDEND_ACCRUED"] > PORTFOLIOS * 10


def held_until(year: Year, rows: list[Row], sequence: int, action: Split | Dividend) -> Decimal:
    fold = Fold(year)
    for row in rows[: sequence - 1]:
        fold.take(row)
    return fold.held_for(action)


def held_at(year: Year, rows: list[Row], action: Split | Dividend, applied_at: datetime) -> Decimal:
    """What was held when the shard booked the action; 0 also when that changed just then."""
    before = [row for row in rows if row["recorded_at"] < applied_at - SAME_TIME]
    after = [row for row in rows if row["recorded_at"] < applied_at + SAME_TIME]
    return min(
        (held_until(year, rows, part[-1]["sequence"] + 1, action) if part else Decimal(0) for part in (before, after)),
        key=abs,
    )


def check_step(row: Row, kind: str, action: Split | Dividend, held: Decimal) -> None:
    assert held, "nobody's action"
    assert (row["kind"], row["symbol"], row["effective_at"], row["late"]) == (kind, action.symbol, action.at, False)
    if isinstance(action, Split):
        assert row["quantity"] == held * (action.ratio - 1)
        assert (row["amount"], row["receivable"], row["realized"]) == (0, 0, 0)
    else:
        assert (row["quantity"], row["price"]) == (held, action.per_share)
        assert row["receivable"] == round(held * action.per_share, 6)


def test_every_dividend_is_paid_once_and_as_it_was_accrued(year: Year, recorded: Recorded) -> None:
    ends_at = max(year.closes) + timedelta(hours=4)
    paid_at = {dividend.action_id: dividend.paid_at for dividend in year.dividends}
    for name, rows in recorded.ledger.items():
        accrued = {row["reference"]: row["receivable"] for row in rows if row["kind"] == "DIVIDEND_ACCRUED"}
        paid = [row for row in rows if row["kind"] == "DIVIDEND_PAID"]
        assert len({row["event_id"] for row in paid}) == len(paid)
        due = {action for action in accrued if paid_at[action] <= ends_at}
        assert {row["reference"] for row in paid} == due
        for row in paid:
            assert row["event_id"] == f"{row['reference']}#{name}#paid"
            assert row["amount"] == -row["receivable"] == accrued[row["reference"]]
        left = sum((amount for action, amount in accrued.items() if action not in due), Decimal(0))
        assert recorded.portfolios[name]["receivables"] == left


def test_splits_move_nobody_s_profit_and_loss(year: Year, recorded: Recorded) -> None:
    """AAPL and TSLA to the micro-unit; where price ÷ ratio has no end, by less than one of them a holding."""
    exact = {"split:AAPL:2020-08-31", "split:TSLA:2020-08-31"}
    seen = Counter()
    for rows in recorded.ledger.values():
        for row in rows:
            if row["kind"] == "SPLIT":
                seen[row["reference"]] += 1
                room = 0 if row["reference"] in exact else Decimal("0.000001")
                assert abs(row["nav_effect"]) <= room, row
                assert row["realized"] == 0
    assert exact <= set(seen)
    for name, row in recorded.portfolios.items():
        moved = sum((entry["nav_effect"] for entry in recorded.ledger[name] if entry["kind"] == "SPLIT"), Decimal(0))
        assert row["corporate"] == moved


def test_the_traders_rest_when_the_market_is_over(year: Year, recorded: Recorded) -> None:
    over = max(year.closes) + timedelta(days=1)
    last = max((row["recorded_at"] for rows in recorded.ledger.values() for row in rows), default=over)
    assert last <= over
    fills = [row for rows in recorded.ledger.values() for row in rows if row["kind"] == "FILL"]
    assert len(fills) > PORTFOLIOS * 15 + 20, "there was trading"
    assert max(row["effective_at"] for row in fills) <= max(year.closes)
