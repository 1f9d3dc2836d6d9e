"""Boundaries: the instants at which the state of all portfolios is taken, and when it may be.

The state at a boundary B is that of exactly the quotes with `ts_event` ≤ B that were published before B was settled.
Full UTC hours are boundaries, and whatever the `sources` say: session closes, day cuts, instants of corporate actions.
B is due once the clock has passed it and the quotes worker has settled it (`QuoteFrame.settled_ns`), which is the same
moment in the stream of frames for everybody who listens. While that worker is silent, nothing comes that could belong
before B: then it is due after a grace of wall time, BOUNDARY_GRACE_S by the world's clock, RECORDED_GRACE_S by a
recorded market's, which passes days in that time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from engine.instants import HOUR_NS
from engine.runtime.clock import Clock, MarketClock

BOUNDARY_GRACE_S = 0.2
RECORDED_GRACE_S = 2.0

# The first instant after the given one; None when there is none.
Source = Callable[[int], int | None]


def grace_of(clock: Clock) -> float:
    """How long to wait for quotes of before a boundary that the clock has passed, in seconds of wall time."""
    return RECORDED_GRACE_S if isinstance(clock, MarketClock) else BOUNDARY_GRACE_S


class Boundaries:
    """Time up to `passed_ns` is done with: everything up to there is applied, every boundary up to there taken."""

    def __init__(self, passed_ns: int, *sources: Source, grace_s: float = BOUNDARY_GRACE_S) -> None:
        self.passed_ns = passed_ns
        self._grace_s = grace_s
        self._sources = sources
        self._now_ns = self._settled_ns = passed_ns
        # While it is silent: the clock at wall instants not older than the grace.
        self._silent: deque[tuple[float, int]] = deque()
        # The clock at wall instants a second apart, as long as it was beyond what has been passed.
        self._behind: deque[tuple[float, int]] = deque()
        # The last interval between boundaries that was asked for: (since, boundary].
        self._answer = (0, 0)

    @property
    def pending_ns(self) -> int:
        """The first boundary that has not been taken."""
        return self.of(self.passed_ns + 1)

    def of(self, instant_ns: int) -> int:
        """The smallest boundary ≥ an instant, of those that have not been taken."""
        instant_ns = max(instant_ns, self.passed_ns + 1)
        since_ns, boundary_ns = self._answer
        if not since_ns < instant_ns <= boundary_ns:
            boundary_ns = self._after(instant_ns - 1)
            self._answer = (instant_ns - 1, boundary_ns)
        return boundary_ns

    def _after(self, instant_ns: int) -> int:
        nexts = [(instant_ns // HOUR_NS + 1) * HOUR_NS, *(source(instant_ns) for source in self._sources)]
        return min(next_ns for next_ns in nexts if next_ns is not None)

    def observe(self, now_ns: int, wall_s: float, settled_ns: int | None = None) -> None:
        """Note what the clock says at a wall instant, and up to where time is settled (None: nobody says)."""
        self._now_ns = now_ns
        if settled_ns is not None:
            self._silent.clear()
        else:
            self._silent.append((wall_s, now_ns))
            settled_ns = self._settled_ns
            while self._silent[0][0] <= wall_s - self._grace_s:
                settled_ns = self._silent.popleft()[1]
        self._settled_ns = max(self._settled_ns, min(now_ns, settled_ns))
        self.refresh()

    def lag_s(self, wall_s: float) -> float:
        """For how long, by the wall clock, the pending boundary has been behind the clock; 0 when it is not."""
        if self._now_ns < self.pending_ns:
            self._behind.clear()
            return 0.0
        if not self._behind or wall_s - self._behind[-1][0] >= 1:
            self._behind.append((wall_s, self._now_ns))
        while len(self._behind) > 1 and self._behind[0][1] < self.pending_ns:
            self._behind.popleft()
        return wall_s - self._behind[0][0]

    def refresh(self) -> None:
        """The sources may have changed."""
        self._answer = (0, 0)

    def is_due(self, boundary_ns: int) -> bool:
        """Whether the state at a boundary may be taken."""
        return boundary_ns <= self._settled_ns

    def pass_over(self, boundary_ns: int) -> None:
        """The boundary has been taken."""
        self.passed_ns, self._answer = boundary_ns, (0, 0)

    def reach(self, now_ns: int) -> int:
        """The instant that the state stands at: now, but not beyond the pending boundary; it never goes back."""
        self.refresh()
        pending_ns = self.pending_ns
        reached_ns = max(self.passed_ns, min(now_ns, pending_ns))
        # A boundary that comes into being later may not lie before what marks say already.
        self.passed_ns = max(self.passed_ns, min(reached_ns, pending_ns - 1))
        return reached_ns
