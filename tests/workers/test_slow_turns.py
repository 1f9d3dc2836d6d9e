"""Turns: nothing waits for longer than it should, and no part is larger than it must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.slow_turns import SlowTurns

INTERVAL_S = 1.0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0.01, 0.011, 0.02, 0.1, 0.25]), min_size=400, max_size=400),
    st.integers(1, 3_000),
    st.integers(1, 50),
)
def test_what_has_changed_is_due_within_two_intervals_however_often_it_is_asked(
    waits_s: list[float], count: int, part_count: int
) -> None:
    """Every slot changes all the time; it is due once within its turn, or first in the next when flushes grow long."""
    turns, now_s = SlowTurns(INTERVAL_S, part_count), 100.0
    due_at_s = np.full(count, now_s)
    for wait_s in waits_s:
        now_s += wait_s
        part = turns.part(0, now_s, lambda: np.arange(count), count)
        assert len(set(part.tolist())) == len(part)
        due_at_s[part] = now_s
        assert now_s - due_at_s.min() <= 2 * INTERVAL_S + 2 * 0.25


@pytest.mark.parametrize("wait_s", [0.01, 0.05])
def test_a_turn_is_spread_over_the_interval_in_even_parts(wait_s: float) -> None:
    turns, parts, now_s = SlowTurns(INTERVAL_S, 10), [], 50.0
    while now_s < 60:
        now_s += wait_s
        parts.append(len(turns.part(0, now_s, lambda: np.arange(10_000), 10_000)))
    steady = parts[len(parts) // 2 :]
    assert max(steady) <= 1.2 * 10_000 * wait_s / INTERVAL_S
    assert sum(steady) == pytest.approx(10_000 * 5, rel=0.05)


def test_few_rows_are_one_part_and_shards_have_their_turns_one_after_the_other() -> None:
    turns, taken, now_s = SlowTurns(INTERVAL_S, 2_000), dict[int, list[float]](), 50.0
    while now_s < 53:
        now_s += 0.01
        for shard in range(8):
            part = turns.part(shard, now_s, lambda: np.arange(300), 300)
            if len(part):
                assert len(part) == 300
                taken.setdefault(shard, []).append(now_s)
    assert {len(at) for at in taken.values()} == {3}
    phases = sorted(at[0] % INTERVAL_S for at in taken.values())
    gaps = np.diff([*phases, phases[0] + INTERVAL_S])
    assert gaps.max() < 3 * INTERVAL_S / 8
    assert not turns.is_under_way


def test_a_shard_that_is_not_ours_any_more_has_no_turn_left() -> None:
    turns = SlowTurns(INTERVAL_S, 1)
    for step in range(300):
        turns.part(5, 10 + step / 100, lambda: np.arange(10_000), 10_000)
    assert turns.is_under_way
    turns.keep({4})
    assert not turns.is_under_way


def test_more_than_can_be_done_goes_round_in_parts_of_the_same_size() -> None:
    """However long flushes become, none is asked to do more; and no row is passed over."""
    turns, now_s, seen = SlowTurns(INTERVAL_S, 10), 50.0, np.zeros(10_000, np.int64)
    for _ in range(100):
        now_s += 0.25
        part = turns.part(0, now_s, lambda: np.arange(10_000), 500)
        assert len(part) <= 500
        seen[part] += 1
    assert seen.max() - seen.min() <= 1 and seen.min() >= 4
