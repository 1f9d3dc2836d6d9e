"""Which boundary an instant belongs to, and when its state may be taken."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.instants import HOUR_NS
from workers.boundaries import BOUNDARY_GRACE_S, Boundaries

START_NS = 500_000 * HOUR_NS + 7


def at(*instants: int) -> Callable[[int], int | None]:
    return lambda after_ns: min((instant for instant in instants if instant > after_ns), default=None)


def test_full_hours_are_boundaries_and_whatever_a_source_says() -> None:
    boundaries = Boundaries(START_NS, at(START_NS + 10, START_NS + 30), at(), at(START_NS + 20))
    found = []
    for _ in range(5):
        found.append(boundaries.pending_ns)
        boundaries.pass_over(found[-1])
    hour_ns = 500_001 * HOUR_NS
    assert found == [START_NS + 10, START_NS + 20, START_NS + 30, hour_ns, hour_ns + HOUR_NS]


@given(st.lists(st.integers(1, 3 * HOUR_NS), max_size=5), st.lists(st.integers(-HOUR_NS, 4 * HOUR_NS), max_size=9))
def test_an_instant_belongs_to_the_first_boundary_that_is_not_before_it(offsets: list[int], asked: list[int]) -> None:
    boundaries = Boundaries(START_NS, at(*(START_NS + offset for offset in offsets)))
    hours = [(500_001 + n) * HOUR_NS for n in range(6)]
    all_of_them = sorted({*hours, *(START_NS + offset for offset in offsets)})
    for offset in asked:
        instant_ns = START_NS + offset
        expected = all_of_them[bisect_left(all_of_them, max(instant_ns, START_NS + 1))]
        assert boundaries.of(instant_ns) == expected


def test_what_is_passed_is_passed_for_late_instants_too() -> None:
    boundaries = Boundaries(START_NS, at(START_NS + 10))
    boundaries.pass_over(START_NS + 10)
    assert boundaries.of(START_NS + 3) == 500_001 * HOUR_NS


def test_a_boundary_is_due_when_the_clock_has_passed_it_and_it_is_settled() -> None:
    boundaries = Boundaries(START_NS, at(START_NS + 10))
    for now_ns, settled_ns, is_due in ((9, 10, False), (50, 9, False), (50, 10, True)):
        boundaries.observe(START_NS + now_ns, 1.0, START_NS + settled_ns)
        assert boundaries.is_due(START_NS + 10) is is_due, (now_ns, settled_ns)


def test_what_is_settled_stays_settled() -> None:
    """A new quotes worker, whose clock is behind the one before it."""
    boundaries = Boundaries(START_NS, at(START_NS + 10))
    boundaries.observe(START_NS + 50, 1.0, START_NS + 10)
    boundaries.observe(START_NS + 51, 1.1, START_NS + 3)
    assert boundaries.is_due(START_NS + 10)


def test_while_nobody_says_a_boundary_is_due_when_the_grace_is_over() -> None:
    boundaries = Boundaries(START_NS, at(START_NS + 10))
    for wall_s, now_ns, is_due in ((1.0, 9, False), (1.1, 10, False), (1.29, 30, False), (1.31, 40, True)):
        boundaries.observe(START_NS + now_ns, wall_s)
        assert boundaries.is_due(START_NS + 10) is is_due, wall_s


def test_many_boundaries_passed_long_ago_are_all_due_at_once() -> None:
    """A replay's clock runs over a day of hours between two looks; each hour must not cost a grace of its own."""
    boundaries = Boundaries(START_NS)
    boundaries.observe(START_NS + 48 * HOUR_NS, 1.0)
    boundaries.observe(START_NS + 49 * HOUR_NS, 1.0 + BOUNDARY_GRACE_S)
    passed = 0
    while boundaries.is_due(boundaries.pending_ns):
        boundaries.pass_over(boundaries.pending_ns)
        passed += 1
    assert passed == 48


def test_the_state_stands_at_now_but_never_beyond_what_is_pending() -> None:
    boundaries = Boundaries(START_NS, at(START_NS + 10))
    reached = [boundaries.reach(START_NS + offset) - START_NS for offset in (4, 2, 9, 10, 15)]
    assert reached == [4, 4, 9, 10, 10]
    boundaries.pass_over(START_NS + 10)
    assert boundaries.reach(START_NS + 15) == START_NS + 15


def test_a_boundary_that_comes_into_being_behind_the_state_is_none() -> None:
    instants = [START_NS + 50]
    boundaries = Boundaries(START_NS, lambda after_ns: at(*instants)(after_ns))
    assert boundaries.reach(START_NS + 20) == START_NS + 20
    instants.append(START_NS + 15)
    assert boundaries.reach(START_NS + 21) == START_NS + 21
    instants.append(START_NS + 30)
    assert boundaries.reach(START_NS + 40) == START_NS + 30


def test_a_state_that_stands_at_the_pending_boundary_has_not_taken_it() -> None:
    boundaries = Boundaries(START_NS, at(START_NS + 10))
    boundaries.reach(START_NS + 99)
    assert (boundaries.pending_ns, boundaries.passed_ns) == (START_NS + 10, START_NS + 9)


@pytest.mark.parametrize("looks", [100, 10_000])
def test_what_is_remembered_of_the_clock_is_bounded_by_the_grace(looks: int) -> None:
    boundaries = Boundaries(START_NS)
    for look in range(looks):
        boundaries.observe(START_NS + look, look / 1_000)
    assert len(boundaries._silent) <= BOUNDARY_GRACE_S * 1_000 + 1


def test_the_grace_of_silence_begins_anew_with_each_silence() -> None:
    boundaries = Boundaries(START_NS, at(START_NS + 10))
    for wall_s, settled_ns in ((1.0, None), (1.1, 5), (1.2, None), (1.3, None)):
        boundaries.observe(START_NS + 50, wall_s, None if settled_ns is None else START_NS + settled_ns)
        assert not boundaries.is_due(START_NS + 10)
    boundaries.observe(START_NS + 50, 1.2 + BOUNDARY_GRACE_S, None)
    assert boundaries.is_due(START_NS + 10)


def test_the_lag_is_for_how_long_the_pending_boundary_has_been_behind_the_clock() -> None:
    """By the wall clock, to the second."""
    boundaries = Boundaries(0)
    assert lag_at(boundaries, HOUR_NS - 1, 0) == 0
    for second in range(1, 6):
        assert lag_at(boundaries, HOUR_NS * second, second) == second - 1
    boundaries.pass_over(3 * HOUR_NS)
    assert lag_at(boundaries, 6 * HOUR_NS, 6) == 2  # the fourth hour was full at second 4
    for hour in (4, 5, 6):
        boundaries.pass_over(hour * HOUR_NS)
    assert lag_at(boundaries, 6 * HOUR_NS, 7) == 0


def lag_at(boundaries: Boundaries, now_ns: int, wall_s: float) -> float:
    boundaries.observe(now_ns, wall_s)
    return boundaries.lag_s(wall_s)
