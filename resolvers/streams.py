"""How a state stream is paced: the latest value, at most one interval late, never a queue.

    first value                    at once                          SNAPSHOT
    change after silence           at once (leading edge)           UPDATE
    change within the interval     when the interval is over, with the newest value (trailing edge); where many came,
                                   with the next one that comes, see `await_s`
    the shard's owner changed      like a change, whatever the values are        RESET
    nothing to send for 15 s       the last value again             HEARTBEAT
    the live feed is lost          nothing, not even a heartbeat; then, where one was withheld, UPDATE or RESET

The interval is 1 / maxRateHz. While a slow client has not taken the last message, newer values replace each other
in the watch's one slot; `conflated` says how many marks a message stands for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TypeVar

from engine.marks import Mark
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, Info, MarkWatch
from resolvers.errors import ErrorCode, PublicError
from resolvers.mark_messages import Fields, Head
from resolvers.selection import python_name, selection_of
from resolvers.stream_kind import StreamKind

RATE_HZ_DEFAULT = 4.0
# Thirty years. A rate may be so small that its interval is infinite, which is no instant of a timer.
INTERVAL_MAX_S = 1e9
# From so many marks an interval on, the next one is near enough to be worth a wait: of so many mean distances between
# two, for of marks at random instants 0.7 % are farther apart, but not of more than this part of an interval.
AWAITED_MARKS_MIN = 5
AWAITED_DISTANCES = 5
AWAITED_PART = 0.5
# A process that comes to an edge so late is too busy for the work of waiting, and has waited.
LATE_S = 0.02

Update = TypeVar("Update")


def await_s(marks_count: int, elapsed_s: float, interval_s: float) -> float:
    """How long the next mark is awaited at a trailing edge, when so many came in the time since the last message.

    Whatever leaves at the edge is as old as the last mark is by then, and stays on screen for an interval; the next one
    would leave fresh. For marks at random instants, a mean distance d apart, and an interval of T, what a viewer sees
    is then (T + d)/2 + d²/2(T + d) old on average instead of T/2 + d.
    """
    if marks_count < AWAITED_MARKS_MIN or elapsed_s > interval_s + LATE_S:
        return 0.0
    return min(AWAITED_DISTANCES / marks_count, AWAITED_PART) * elapsed_s


class Pace:
    """Rations one stream's messages: `interval_s` between two, a heartbeat after `heartbeat_s` of silence."""

    def __init__(self, signal: asyncio.Event, interval_s: float, heartbeat_s: float) -> None:
        self._signal = signal
        self.interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        self._now = asyncio.get_running_loop().time
        self._sent_at = self._now() - interval_s
        self._beat_at = self._now()

    async def changed(self, watch: MarkWatch | None = None, unsent_count: int = 0) -> bool:
        """Wait until there is something to take and the interval is over; False when a heartbeat is due first. Of a
        watch of marks, of which so many were taken and not sent, the next one is awaited where it is near."""
        try:
            async with asyncio.timeout_at(self._beat_at + self._heartbeat_s):
                await self._signal.wait()
        except TimeoutError:
            self._beat_at = self._now()
            return False
        rest_s = self._sent_at + self.interval_s - self._now()
        if rest_s > 0:
            await asyncio.sleep(rest_s)
            if watch is not None:
                self._signal.clear()
                wait_s = await_s(unsent_count + watch.waiting_count(), self._now() - self._sent_at, self.interval_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._signal.wait()
        self._signal.clear()
        return True

    def sending(self) -> None:
        """A message is about to be sent: the next interval and the next silence begin."""
        self._sent_at = self._beat_at = self._now()


def make_pace(context: Context, max_rate_hz: float | None, signal: asyncio.Event) -> Pace:
    """Raises PublicError BAD_RATE unless 0 < max_rate_hz ≤ the setting `rate_hz_max`."""
    settings = context.services.settings
    max_rate_hz = RATE_HZ_DEFAULT if max_rate_hz is None else max_rate_hz
    if not 0 < max_rate_hz <= settings.rate_hz_max:
        raise PublicError(ErrorCode.BAD_RATE, f"maxRateHz is above 0 and at most {settings.rate_hz_max}")
    return Pace(signal, min(1 / max_rate_hz, INTERVAL_MAX_S), settings.heartbeat_interval_s)


async def mark_updates(
    info: Info,
    portfolio: PortfolioIdentity,
    max_rate_hz: float | None,
    fields: Fields,
    show: Callable[[Head, Mark, Mark | None], Update],
) -> AsyncIterator[Update]:
    """The messages of a stream that shows one portfolio's marks: sent past graphql-core where the operation's way out
    can do that, and otherwise each made by `show` of what is said of the message, its mark, and for an UPDATE the mark
    of the message before.

    One is sent when a column of the mark that a selected one of its `fields` shows differs from the message before.
    """
    signal = asyncio.Event()
    pace = make_pace(info.context, max_rate_hz, signal)
    live = info.context.live
    projection = None if live is None else live.compile(info)
    if live is not None and projection is not None:
        await live.deliver(portfolio, projection, pace.interval_s)
        return
    columns = _selected_columns(info, fields)
    last: Mark | None = None
    sent: Mark | None = None
    stands_for = 0
    withheld = False
    with info.context.services.hub.watch_portfolio(portfolio.shard, portfolio.portfolio_id, signal) as watch:
        while True:
            changed = await pace.changed(watch, stands_for)
            taken = watch.take() if changed else None
            if taken is None:
                if changed or last is None:
                    continue
                if not watch.current:
                    withheld = True
                    continue
                pace.sending()
                yield show(Head(StreamKind.HEARTBEAT, portfolio.portfolio_id, 0, None), last, None)
                continue
            kind = kind_of(last, taken[0])
            last, stands_for = taken[0], stands_for + taken[1]
            resumed = withheld and watch.current
            is_same = sent is not None and all(getattr(last, name) == getattr(sent, name) for name in columns)
            if kind is StreamKind.UPDATE and is_same and not resumed:
                continue
            latency_ms = None if kind is StreamKind.SNAPSHOT else watch.latency_ms(time.time_ns())
            before = sent if kind is StreamKind.UPDATE else None
            head = Head(kind, portfolio.portfolio_id, stands_for or 1, latency_ms)
            withheld = withheld and not resumed
            sent, stands_for = last, 0
            pace.sending()
            yield show(head, last, before)


def kind_of(last: Mark | None, mark: Mark) -> StreamKind:
    """The kind of the message that shows `mark` after one that showed `last`."""
    if last is None:
        return StreamKind.SNAPSHOT
    return StreamKind.UPDATE if mark.epoch == last.epoch else StreamKind.RESET


def _selected_columns(info: Info, fields: Fields) -> frozenset[str]:
    """The columns of a mark that the operation shows."""
    object_type, selection = selection_of(info._raw_info)
    names = {python_name(object_type, nodes[0].name.value) for nodes in selection.values()}
    return frozenset(column for name, field in fields.items() if name in names for column in field.columns)
