"""Which markets assets trade in, and what that makes of a price's age.

Quality of a price, worst last in engine.marks.MarkQuality (`age` is now − its instant):

    MISSING   there never was one
    HALTED    its last quote says so, at any age and hour: only a later quote ends a halt
    DELAYED   its last quote says so and age ≤ stale_after + DELAY_MAX: that source is always behind
    LIVE      age ≤ stale_after, whatever the calendar says: somebody trades
    CLOSED    older, its market is closed now, and the price is of the last session (not before that opened)
    STALE     older, while its market is open or of a session before the last; or of a market that never closes
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.assets import AssetClass
from engine.instants import SECOND_NS
from engine.marks import MarkQuality
from engine.messages import Condition
from engine.sessions import Sessions, sessions_of

# Exchanges give their prices away 15 minutes late, some 20.
DELAY_MAX_NS = 20 * 60 * SECOND_NS


class Markets:
    """Which sessions an asset class has: {class: exchange}; a class that is not there, or with "", never closes.

    Reads the calendars at once. Raises UnknownExchangeError.
    """

    def __init__(self, calendars: Mapping[AssetClass, str]) -> None:
        self._sessions = {asset_class: sessions_of(name) for asset_class, name in calendars.items() if name}

    def sessions(self, asset_class: AssetClass) -> Sessions | None:
        """None: always open."""
        return self._sessions.get(asset_class)

    def is_open(self, asset_class: AssetClass, at_ns: int) -> bool:
        sessions = self._sessions.get(asset_class)
        return sessions is None or sessions.is_open(at_ns)

    def quality(
        self,
        asset_class: AssetClass,
        ts_event_ns: int | None,
        condition: Condition,
        now_ns: int,
        stale_after_ns: int,
    ) -> MarkQuality:
        """The quality of a class's price stamped `ts_event_ns` (None: there never was one), seen at `now_ns`."""
        return quality_of(ts_event_ns, condition, self._sessions.get(asset_class), now_ns, stale_after_ns)


def quality_of(
    ts_event_ns: int | None, condition: Condition, sessions: Sessions | None, now_ns: int, stale_after_ns: int
) -> MarkQuality:
    """By the module's table; without `sessions` the market never closes."""
    if ts_event_ns is None:
        return MarkQuality.MISSING
    if condition == "HALTED":
        return MarkQuality.HALTED
    age_ns = now_ns - ts_event_ns
    if condition == "DELAYED" and age_ns <= stale_after_ns + DELAY_MAX_NS:
        return MarkQuality.DELAYED
    if age_ns <= stale_after_ns:
        return MarkQuality.LIVE
    if sessions is not None:
        around = sessions.around(now_ns)
        if not around.is_open and ts_event_ns >= around.last_open_ns:
            return MarkQuality.CLOSED
    return MarkQuality.STALE
