"""Fills and splits in order.

A fill of a split's instant or later is in new shares. Until the split is booked the Book's price is in old ones, so
such a fill would be worth a multiple of what was paid, and the split would take that back: NAV jumps twice, and both
jumps are explained wrongly. So it waits, and all that follows it in its partition, until the split is booked on the
shard; at most HOLD_MAX_S of wall time, then it is booked as it is and that is counted. A split that nobody knows of yet
is late, which its entries say.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import structlog

from engine.booking import Record
from engine.instants import to_ns
from engine.messages import EventRejected, FillEvent, decode_event
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from workers.corporate_actions import ActionSchedule

HOLD_MAX_S = 10.0

_log = structlog.get_logger(__name__)


class SplitOrder:
    def __init__(self, clock: Clock, actions: ActionSchedule) -> None:
        self._clock = clock
        self._actions = actions
        # Since when, by the wall clock, a shard has waited for a symbol's split.
        self._waiting: dict[tuple[int, str, int], float] = {}

    def bookable(self, shard: int, records: Sequence[Record]) -> Sequence[Record]:
        """The records of a shard, in their order, up to the first that waits for a split."""
        due = self._actions.unbooked_splits(self._clock.now_ns())
        if self._waiting:
            self._waiting = {of: since_s for of, since_s in self._waiting.items() if due.get(of[1]) == of[2]}
        if due:
            for at, record in enumerate(records):
                if self._waits(shard, record, due):
                    return records[:at]
        return records

    def _waits(self, shard: int, record: Record, due: Mapping[str, int]) -> bool:
        try:
            event = decode_event(record.value)
        except EventRejected:
            return False  # a dead letter
        split_at_ns = due.get(event.symbol) if isinstance(event, FillEvent) else None
        if not isinstance(event, FillEvent) or split_at_ns is None or to_ns(event.executed_at) < split_at_ns:
            return False
        wall_s = time.monotonic()
        if wall_s - self._waiting.setdefault((shard, event.symbol, split_at_ns), wall_s) < HOLD_MAX_S:
            return True
        telemetry.FILLS_BEFORE_SPLIT.inc()
        _log.warning("split_awaited_in_vain", shard=shard, symbol=event.symbol, event_id=event.event_id)
        return False
