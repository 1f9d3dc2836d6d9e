"""Fills in new shares wait for their split, and nothing else does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from engine.booking import Record
from engine.instants import to_ns
from engine.runtime import telemetry
from tests.bookkeeping import cash, fill, record
from workers.split_order import HOLD_MAX_S, SplitOrder

SPLIT_AT = datetime(2026, 11, 20, 14, 30, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)


class Schedule:
    """Of AAPL a split at SPLIT_AT is due and not booked, until `booked`."""

    booked = False

    def unbooked_splits(self, now_ns: int) -> dict[str, int]:
        return {} if self.booked or now_ns < to_ns(SPLIT_AT) else {"AAPL": to_ns(SPLIT_AT)}


class At:
    def __init__(self) -> None:
        self.now = SPLIT_AT + MILLISECOND
        self.wall_s = 100.0

    def now_ns(self) -> int:
        return to_ns(self.now)

    def monotonic(self) -> float:
        return self.wall_s


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    at = At()
    monkeypatch.setattr("workers.split_order.time", at)
    return at


@pytest.fixture
def order(at: At) -> SplitOrder:
    return SplitOrder(at, Schedule())  # type: ignore[arg-type]


def bought(symbol: str, executed_at: datetime) -> dict[str, Any]:
    return fill("p-1", "BUY", "1", "100", f"{symbol}-{executed_at:%S%f}", symbol=symbol) | {
        "executed_at": executed_at.isoformat()
    }


def records(*events: dict[str, Any]) -> list[Record]:
    return [record(event, offset) for offset, event in enumerate(events)]


def test_a_fill_of_the_split_s_instant_or_later_waits_and_what_follows_it_too(order: SplitOrder) -> None:
    batch = records(
        bought("AAPL", SPLIT_AT - MILLISECOND),
        bought("XOM", SPLIT_AT),
        bought("AAPL", SPLIT_AT),
        bought("XOM", SPLIT_AT),
    )
    assert order.bookable(0, batch) == batch[:2]
    assert order.bookable(1, batch[:2]) == batch[:2]


def test_what_can_not_be_read_and_what_is_no_fill_waits_for_nothing(order: SplitOrder) -> None:
    batch = [Record(0, b"p-1", b"{"), record(cash("p-1", "DEPOSIT", "1", "c"), 1)]
    assert order.bookable(0, batch) == batch


def test_it_goes_on_once_the_split_is_booked(order: SplitOrder, at: At) -> None:
    batch = records(bought("AAPL", SPLIT_AT))
    schedule = Schedule()
    order = SplitOrder(at, schedule)  # type: ignore[arg-type]
    assert order.bookable(0, batch) == []
    schedule.booked = True
    assert order.bookable(0, batch) == batch


def test_nobody_waits_for_a_split_that_lies_ahead_of_the_clock(order: SplitOrder, at: At) -> None:
    """A fill that says it is from the future stops no partition."""
    at.now = SPLIT_AT - MILLISECOND
    batch = records(bought("AAPL", SPLIT_AT))
    assert order.bookable(0, batch) == batch


def test_a_shard_waits_for_a_split_once_and_not_for_ever(order: SplitOrder, at: At) -> None:
    first, second = records(bought("AAPL", SPLIT_AT)), records(bought("AAPL", SPLIT_AT + MILLISECOND))
    before = telemetry.FILLS_BEFORE_SPLIT._value.get()
    assert order.bookable(0, first) == []
    at.wall_s += HOLD_MAX_S
    assert order.bookable(0, first) == first
    assert order.bookable(0, second) == second
    assert order.bookable(1, first) == []
    assert telemetry.FILLS_BEFORE_SPLIT._value.get() == before + 2
