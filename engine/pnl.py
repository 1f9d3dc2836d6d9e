"""Day P&L of a portfolio, and its flow-adjusted ratio.

    day_pnl  = NAV − day_base,         day_base = NAV at the cut + external flows since
    ratio    = Π (NAV just before flow k / NAV just after flow k−1) × (NAV / NAV just after the last flow) − 1

the time-weighted return since the cut. Its first sub-period starts at the cut. A sub-period that starts at NAV 0
does not count when it also ends there (a portfolio opened today begins with its first deposit); one that starts at
0 and moves, or starts below 0, has no return and makes the ratio unknown until the next cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.marks import RATIO_SCALE, UNKNOWN

Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

RATIO_MAX = 10**6 * RATIO_SCALE


@dataclass(frozen=True, slots=True)
class DayBase:
    """`base` and `segment_base` in micro-units; `factor` is the product of the closed sub-periods.

    `segment_base` is the NAV that the running sub-period started with; `factor` None means unknown.
    """

    base: int
    factor: float | None
    segment_base: int

    def after_flow(self, nav_before: int, amount: int) -> DayBase:
        """The base once an external flow of `amount` has come in at NAV `nav_before`."""
        factor = self.factor
        if self.segment_base < 0 or (self.segment_base == 0 and nav_before):
            factor = None
        elif factor is not None and self.segment_base > 0:
            factor *= nav_before / self.segment_base
        return DayBase(self.base + amount, factor, nav_before + amount)


def day_base_since(cut_nav: int, flows: Iterable[tuple[int, int]]) -> DayBase:
    """The base after all (NAV before, amount) flows since the cut, oldest first."""
    base = DayBase(cut_nav, 1, cut_nav)
    for nav_before, amount in flows:
        base = base.after_flow(nav_before, amount)
    return base


def day_ratio_e12(nav: Int64s, factor: Float64s, segment_base: Int64s) -> Int64s:
    """The ratio of many portfolios × 10¹²; UNKNOWN where it is undefined (factor NaN) or beyond ±10⁶."""
    with np.errstate(divide="ignore", invalid="ignore"):
        empty = (segment_base == 0) & (nav == 0)
        running = np.where(segment_base > 0, nav / segment_base, np.where(empty, 1, np.nan))
        ratio = (factor * running - 1) * RATIO_SCALE
    known = np.isfinite(ratio) & (np.abs(ratio) < RATIO_MAX)
    return np.where(known, np.rint(np.where(known, ratio, 0)), 0).astype(np.int64) + np.where(known, 0, UNKNOWN)
