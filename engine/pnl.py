"""Day P&L of a portfolio, and its flow-adjusted ratio.

    day_pnl  = NAV − day_base,         day_base = NAV at the cut + external flows since
    ratio    = Π (NAV just before flow k / NAV just after flow k−1) × (NAV / NAV just after the last flow) − 1

the time-weighted return since the cut. Its first sub-period starts at the cut. A sub-period that starts at NAV 0
has no return and does not count (a portfolio opened today begins with its first deposit); one that starts below 0
makes the ratio unknown until the next cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
        if self.segment_base < 0:
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
