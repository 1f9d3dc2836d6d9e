"""A timer wheel: thousands of deadlines behind one timer.

Time is divided into ticks of `tick_s`; what falls due within one tick waits in that tick's bucket, and the whole bucket
is taken at once when the tick is over: never before its time, at most one tick late. Adding, dropping and taking an
entry cost the same however many others wait; only the first entry of a tick costs a step of a heap.

    tick of a deadline = ⌈due_s / tick_s⌉        due at now_s: all ticks ≤ ⌊now_s / tick_s⌋

An entry that is dropped leaves nothing: neither itself nor an empty bucket, however far ahead it was due. The wheel
reads no clock and owns no timer; its owner asks `next_due_s` when to look again.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Entry = TypeVar("Entry")

# A deadline computed in floats may lie this part of a tick above the tick that it means.
_ROUNDING = 1e-6
# The heap is made anew when more of it than this is ticks whose buckets were dropped.
_DROPPED_COUNT_MIN = 64


class Wheel(Generic[Entry]):
    def __init__(self, tick_s: float) -> None:
        self._ticks_per_s = 1 / tick_s
        self._buckets: dict[int, set[Entry]] = {}
        self._ticks: list[int] = []

    def add(self, due_s: float, entry: Entry) -> int:
        """Let `entry` fall due; the tick returned is what drops it again."""
        tick = math.ceil(due_s * self._ticks_per_s - _ROUNDING)
        bucket = self._buckets.get(tick)
        if bucket is None:
            self._buckets[tick] = {entry}
            heappush(self._ticks, tick)
        else:
            bucket.add(entry)
        return tick

    def drop(self, tick: int, entry: Entry) -> None:
        """Forget an entry; one that was taken already is no fault."""
        bucket = self._buckets.get(tick)
        if bucket is None:
            return
        bucket.discard(entry)
        if not bucket:
            del self._buckets[tick]
            if len(self._ticks) > 2 * len(self._buckets) + _DROPPED_COUNT_MIN:
                self._ticks = list(self._buckets)
                heapify(self._ticks)

    def take(self, now_s: float) -> list[Entry]:
        """All that is due, earlier ticks first."""
        last = self.tick_of(now_s)
        due: list[Entry] = []
        while self._ticks and self._ticks[0] <= last:
            due += self._buckets.pop(heappop(self._ticks), ())
        return due

    def tick_of(self, now_s: float) -> int:
        """The last tick that is over."""
        return math.floor(now_s * self._ticks_per_s + _ROUNDING)

    def next_due_s(self) -> float | None:
        """When the next entry falls due, None when there is none."""
        while self._ticks and self._ticks[0] not in self._buckets:
            heappop(self._ticks)
        return self._ticks[0] / self._ticks_per_s if self._ticks else None

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))
