"""The recorded year through the whole program, and every figure of it reckoned again by tests.slow_fold."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from operator import itemgetter

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
    steps: list[tuple[str, Split | Dividend]] = [("SPLIT", split) for split in year.splits]
    steps += [("DIVIDEND_ACCRUED", dividend) for dividend in year.dividends]
    for name, rows in recorded.ledger.items():
        shard = recorded.portfolios[name]["shard"]
        booked = {row["event_id"]: row for row in rows if row["kind"] in ("SPLIT", "DIVIDEND_ACCRUED")}
        counts: dict[int, tuple[int, ...]] = {}
        for place, (kind, action) in enumerate(steps):
            row = booked.get(f"{action.action_id}#{name}")
            if row is not None:
                counts[place] = (row["sequence"] - 1,)
            else:
                counts[place] = around(rows, recorded.applied_at[shard, action.action_id, kind])
        held = held_after(year, rows, [(count, steps[place][1]) for place, of in counts.items() for count in of])
        for place, (kind, action) in enumerate(steps):
            row = booked.pop(f"{action.action_id}#{name}", None)
            quantities = [held[count, action] for count in counts[place]]
            if row is None:
                # Nothing was held when the shard booked the action, or that changed just then.
                assert not min(quantities, key=abs), (name, action)
                continue
            holders[kind] += 1
            check_step(row, kind, action, quantities[0])
        assert not booked, "entries of no action of the file"
    assert holders["SPLIT"] >= 2 and holders["DIVIDEND_ACCRUED"] > PORTFOLIOS * 10


def around(rows: list[Row], at: datetime) -> tuple[int, int]:
    """How many entries there were just before and just after an instant."""
    before = bisect_left(rows, at - SAME_TIME, key=itemgetter("recorded_at"))
    after = bisect_left(rows, at + SAME_TIME, key=itemgetter("recorded_at"))
    return before, after


def held_after(
    year: Year, rows: list[Row], asked: Iterable[tuple[int, Split | Dividend]]
) -> dict[tuple[int, Split | Dividend], Decimal]:
    """What was held, as an action counts it, after so many entries."""
    wanted: dict[int, list[Split | Dividend]] = defaultdict(list)
    for count, action in asked:
        wanted[count].append(action)
    fold, held = Fold(year), {}
    for count in range(len(rows) + 1):
        for action in wanted.get(count, ()):
            held[count, action] = fold.held_for(action)
        if count < len(rows):
            fold.take(rows[count])
    return held


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
