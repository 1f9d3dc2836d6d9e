"""What time it is, for every process alike.

`WallClock` is UTC now. `MarketClock` replays a recorded market: session k of the recording fills the k-th
`1/speed` seconds of wall time since the start, its 24 hours (UTC) stretched evenly over it; days without a session
are skipped; after the last one the clock stands still at its end. It is a pure function of wall time, so
processes agree without talking:

    position = (wall − wall_start) × speed / 1 s          market = date[⌊position⌋] + frac(position) × 24 h
"""

from __future__ import annotations

import time
from datetime import date
from typing import Protocol

import msgspec

from engine.instants import DAY_NS, SECOND_NS

_EPOCH = date(1970, 1, 1)


class Clock(Protocol):
    def now_ns(self) -> int:
        """Nanoseconds since 1970, UTC."""


class WallClock:
    def now_ns(self) -> int:
        return time.time_ns()


class MarketClockPlan(msgspec.Struct, frozen=True):
    """`speed_milli` is market days per 1,000 wall seconds; `days` are days since 1970, ascending."""

    wall_start_ns: int
    speed_milli: int
    days: list[int]


class MarketClock:
    def __init__(self, plan: MarketClockPlan) -> None:
        if plan.speed_milli <= 0 or not plan.days:
            raise ValueError("a market clock needs a positive speed and at least one session")
        self.plan = plan

    def now_ns(self) -> int:
        return self.market_ns(time.time_ns())

    @property
    def end_ns(self) -> int:
        """The end of the last session's day, where the clock stands still."""
        return (self.plan.days[-1] + 1) * DAY_NS

    def market_ns(self, wall_ns: int) -> int:
        """The market's instant at a wall instant; before the start it is the start of the first session."""
        plan = self.plan
        position_ns = max(0, wall_ns - plan.wall_start_ns) * plan.speed_milli // 1_000
        session, part_ns = divmod(position_ns, SECOND_NS)
        if session >= len(plan.days):
            return self.end_ns
        return plan.days[session] * DAY_NS + part_ns * DAY_NS // SECOND_NS

    def wall_ns(self, market_ns: int) -> int:
        """The first wall instant at which the market clock has reached `market_ns` (of a day in the plan)."""
        plan = self.plan
        day, part_ns = divmod(market_ns, DAY_NS)
        position_ns = plan.days.index(day) * SECOND_NS + -(-part_ns * SECOND_NS // DAY_NS)
        return plan.wall_start_ns + -(-position_ns * 1_000 // plan.speed_milli)


def make_clock(plan_json: str) -> Clock:
    """WallClock for an empty text, else the MarketClock it describes. Raises msgspec.MsgspecError, ValueError."""
    return MarketClock(msgspec.json.decode(plan_json, type=MarketClockPlan)) if plan_json else WallClock()


def is_over(clock: Clock) -> bool:
    """Whether a recorded market has come to its end; wall time never does."""
    return isinstance(clock, MarketClock) and clock.now_ns() >= clock.end_ns


def plan_market_clock(dates: list[date], speed_milli: int, wall_start_ns: int) -> str:
    days = [(day - _EPOCH).days for day in sorted(set(dates))]
    return msgspec.json.encode(MarketClockPlan(wall_start_ns, speed_milli, days)).decode()
