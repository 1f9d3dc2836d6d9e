"""Turns: when the unwatched rows of each shard are written, each once within an interval, spread evenly over it.

Shards have their turns at different instants of the interval. In its turn a shard's changed rows are taken in parts,
one with every flush, so that no flush is long: of `part_count` rows, or as many more as it takes to be done when the
next turn begins, but of `count_max` at most. What is left then all the same, because there is more than can be done,
comes first in that one: turns go round all rows more slowly, and flushes stay short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from engine.book_columns import Int64s

_EVEN = (math.sqrt(5) - 1) / 2  # multiples of it lie evenly within 1, however many there are

_ASKED_INTERVAL_MIN_S = 0.001
_NONE = np.zeros(0, np.int64)


@dataclass(slots=True)
class _Turn:
    ends_at_s: float
    asked_at_s: float
    left: Int64s


class SlowTurns:
    def __init__(self, interval_s: float, part_count: int) -> None:
        self._interval_s = interval_s
        self._part_count = part_count
        self._turns: dict[int, _Turn] = {}

    @property
    def is_under_way(self) -> bool:
        """Whether some shard has rows left in its turn."""
        return any(len(turn.left) for turn in self._turns.values())

    def part(self, shard: int, now_s: float, changed: Callable[[], Int64s], count_max: int) -> Int64s:
        """The slots of a shard that are due now; `changed` answers all that have changed, ascending."""
        turn = self._turns.get(shard)
        if turn is None:
            # Its first turn begins when the phase that is its own comes round.
            phase_s = shard * _EVEN % 1 * self._interval_s
            turn = self._turns[shard] = _Turn(now_s + (phase_s - now_s) % self._interval_s, now_s, _NONE)
        asked_at_s, turn.asked_at_s = turn.asked_at_s, now_s
        if now_s >= turn.ends_at_s:
            late_s = (now_s - turn.ends_at_s) % self._interval_s
            turn.ends_at_s, slots = now_s - late_s + self._interval_s, changed()
            first = int(np.searchsorted(slots, turn.left[0])) if len(turn.left) else 0
            turn.left = np.roll(slots, -first)
        if not len(turn.left):
            return _NONE
        # As often as it was asked last, it is asked again before the turn is over.
        parts = max(1.0, (turn.ends_at_s - now_s) / max(now_s - asked_at_s, _ASKED_INTERVAL_MIN_S))
        count = min(max(self._part_count, math.ceil(len(turn.left) / parts)), count_max)
        part, turn.left = turn.left[:count], turn.left[count:]
        return part

    def keep(self, shards: Collection[int]) -> None:
        """Forget the other shards."""
        for shard in self._turns.keys() - set(shards):
            del self._turns[shard]
