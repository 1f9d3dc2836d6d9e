"""The timer wheel against a plain sorted list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from api.wheel import Wheel

TICK_S = 0.005
# Whole milliseconds, as event loops count; some far ahead.
MOMENTS_MS = st.one_of(st.integers(0, 200), st.integers(0, 10_000_000))
ACTIONS = st.lists(st.tuples(st.sampled_from(["add", "drop", "take"]), MOMENTS_MS, st.integers(0, 20)), max_size=200)


@given(ACTIONS)
def test_takes_what_a_sorted_list_would(actions: list[tuple[str, int, int]]) -> None:
    wheel: Wheel[int] = Wheel(TICK_S)
    waiting: dict[int, tuple[int, int]] = {}  # entry → due, tick
    now_ms = 0
    for action, moment_ms, number in actions:
        if action == "add":
            entry = len(waiting) + 1_000 * number
            if entry not in waiting:
                waiting[entry] = (moment_ms, wheel.add(moment_ms / 1_000, entry))
        elif action == "drop" and waiting:
            entry = sorted(waiting)[number % len(waiting)]
            wheel.drop(waiting.pop(entry)[1], entry)
        elif action == "take":
            now_ms = max(now_ms, moment_ms)
            # Due is what a whole tick has passed over: never early, at most a tick late.
            expected = {entry for entry, (due_ms, _) in waiting.items() if -(-due_ms // 5) * 5 <= now_ms}
            taken = wheel.take(now_ms / 1_000)
            assert set(taken) == expected and len(taken) == len(expected)
            ticks = [waiting.pop(entry)[1] for entry in taken]
            assert ticks == sorted(ticks)
        assert len(wheel) == len(waiting)
        due_s = wheel.next_due_s()
        assert (due_s is None) == (not waiting)
        if due_s is not None:
            earliest_ms = min(due_ms for due_ms, _ in waiting.values())
            assert earliest_ms - 0.001 <= due_s * 1_000 < earliest_ms + 5


def test_what_is_dropped_leaves_nothing() -> None:
    wheel: Wheel[int] = Wheel(TICK_S)
    for number in range(10_000):
        wheel.drop(wheel.add(1_000 + number, number), number)
    assert len(wheel) == 0 and not wheel._buckets and len(wheel._ticks) < 200
    assert wheel.next_due_s() is None


def test_dropping_twice_or_what_was_taken_is_no_fault() -> None:
    wheel: Wheel[str] = Wheel(TICK_S)
    tick = wheel.add(1, "a")
    wheel.add(1, "b")
    wheel.drop(tick, "a")
    wheel.drop(tick, "a")
    assert wheel.take(1) == ["b"]
    wheel.drop(tick, "b")
    assert wheel.take(2) == []
