"""When exchanges trade.

A session is [open, close) of one trading day: at its close an exchange is closed already, unless the next session
opens at that instant. Breaks (lunch in Tokyo) are not closes: a session with a break is one session, open throughout.
Sessions come from the calendars of exchange_calendars with their holidays and early closes, from FIRST_DAY to LAST_DAY
or as much of that as is recorded there. Before the first and after the last of them an exchange trades on every day of
its usual week at the hours of the last one: no holidays are known there, and no instant is an error.

exchange_calendars brings pandas (about a second and 85 MB), so it is imported here alone, and when the first exchange
is asked for: whoever needs sessions makes its `Markets` (engine.markets) while it starts. What is kept of an exchange
is two arrays.
"""

from __future__ import annotations

import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, tzinfo
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from engine.instants import to_datetime, to_ns

FIRST_DAY, LAST_DAY = date(1990, 1, 1), date(2050, 1, 1)
SAMPLE_DAYS = date(2022, 1, 3), date(2022, 1, 28)  # recorded for every exchange
_DAY = timedelta(days=1)
# Of a usual week, any instant's neighbours lie nearer than this, also where a zone skips a day.
_WEEK_DAYS = 9


class UnknownExchangeError(ValueError):
    """No calendar has this name, or the library can not make it."""


@dataclass(frozen=True, slots=True)
class Around:
    """The opens and closes next to an instant: the greatest ≤ it, the smallest > it."""

    last_open_ns: int
    next_open_ns: int
    last_close_ns: int
    next_close_ns: int

    @property
    def is_open(self) -> bool:
        return self.last_open_ns >= self.last_close_ns


@dataclass(frozen=True, slots=True)
class UsualWeek:
    """When an exchange trades outside its recorded days: `weekdays` (0 is Monday), hours in `zone`."""

    zone: tzinfo
    weekdays: frozenset[int]
    opens: timedelta
    """Since midnight of the session's day; below 0 where a session opens on the eve."""
    closes: timedelta
    recorded_from: date
    recorded_until: date

    def around(self, now_ns: int) -> list[tuple[int, int]]:
        """(open, close) of the unrecorded days near an instant, ascending."""
        today = to_datetime(now_ns).astimezone(self.zone).date()
        days = (today + _DAY * offset for offset in range(-_WEEK_DAYS, _WEEK_DAYS + 1))
        return [
            (self._at(day, self.opens), self._at(day, self.closes))
            for day in days
            if day.weekday() in self.weekdays and not self.recorded_from <= day <= self.recorded_until
        ]

    def _at(self, day: date, since_midnight: timedelta) -> int:
        return to_ns((datetime.combine(day, time()) + since_midnight).replace(tzinfo=self.zone))


@dataclass(eq=False, slots=True)
class Sessions:
    """Of one exchange. `opens` and `closes`: int64 nanoseconds since 1970, one each per recorded session, ascending."""

    exchange: str
    opens: array[int]
    closes: array[int]
    week: UsualWeek
    # The last answer, for instants from .. until: who asks, asks about now.
    _answer: tuple[int, int, Around | None] = field(default=(0, 0, None), repr=False)

    def around(self, now_ns: int) -> Around:
        since_ns, until_ns, answer = self._answer
        if answer is None or not since_ns <= now_ns < until_ns:
            answer = self._around(now_ns)
            since_ns = max(answer.last_open_ns, answer.last_close_ns)
            self._answer = (since_ns, min(answer.next_open_ns, answer.next_close_ns), answer)
        return answer

    def is_open(self, now_ns: int) -> bool:
        return self.around(now_ns).is_open

    def last_open(self, now_ns: int) -> int:
        """The greatest open ≤ now."""
        return self.around(now_ns).last_open_ns

    def last_close(self, now_ns: int) -> int:
        """The greatest close ≤ now."""
        return self.around(now_ns).last_close_ns

    def next_close(self, now_ns: int) -> int:
        """The smallest close > now."""
        return self.around(now_ns).next_close_ns

    def _around(self, now_ns: int) -> Around:
        usual = [] if self.closes[0] <= now_ns < self.opens[-1] else self.week.around(now_ns)
        return Around(
            *_neighbours(self.opens, [opens for opens, _ in usual], now_ns),
            *_neighbours(self.closes, [closes for _, closes in usual], now_ns),
        )


def _neighbours(recorded: array[int], usual: list[int], now_ns: int) -> tuple[int, int]:
    at = bisect_right(recorded, now_ns)
    near = [*recorded[max(0, at - 1) : at + 1], *usual]
    return max(instant for instant in near if instant <= now_ns), min(instant for instant in near if instant > now_ns)


@cache
def sessions_of(exchange: str) -> Sessions:
    """The sessions of the exchange that exchange_calendars calls so, no alias. Raises UnknownExchangeError."""
    if exchange in _made_before:
        return _made_before[exchange]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import exchange_calendars

        if exchange not in exchange_calendars.get_calendar_names(include_aliases=False):
            raise UnknownExchangeError(f"no exchange is called {exchange[:40]!r}")
        try:
            return _extract(exchange, _calendar(exchange))
        except (ValueError, NotImplementedError) as error:
            raise UnknownExchangeError(f"the calendar of {exchange} can not be made: {str(error)[:80]}") from None


class _Recorded(msgspec.Struct, frozen=True):
    """Sessions on their way from the process that made them to another one; offsets in seconds."""

    exchange: str
    opens: list[int]
    closes: list[int]
    zone: str
    weekdays: list[int]
    opens_s: int
    closes_s: int
    recorded_from: date
    recorded_until: date


# What another process has made.
_made_before: dict[str, Sessions] = {}


def dump_sessions(exchanges: Iterable[str]) -> bytes:
    """The sessions of exchanges for `use_sessions` of other processes. Raises UnknownExchangeError."""
    return msgspec.json.encode([_recorded(sessions_of(exchange)) for exchange in exchanges])


def use_sessions(data: bytes) -> None:
    """Use what another process has dumped instead of making it. Raises msgspec.MsgspecError, a ValueError."""
    for one in msgspec.json.decode(data, type=list[_Recorded]):
        week = UsualWeek(
            zone=ZoneInfo(one.zone),
            weekdays=frozenset(one.weekdays),
            opens=timedelta(seconds=one.opens_s),
            closes=timedelta(seconds=one.closes_s),
            recorded_from=one.recorded_from,
            recorded_until=one.recorded_until,
        )
        _made_before[one.exchange] = Sessions(one.exchange, array("q", one.opens), array("q", one.closes), week)


def _recorded(sessions: Sessions) -> _Recorded:
    week = sessions.week
    return _Recorded(
        exchange=sessions.exchange,
        opens=sessions.opens.tolist(),
        closes=sessions.closes.tolist(),
        zone=str(week.zone),
        weekdays=sorted(week.weekdays),
        opens_s=week.opens // timedelta(seconds=1),
        closes_s=week.closes // timedelta(seconds=1),
        recorded_from=week.recorded_from,
        recorded_until=week.recorded_until,
    )


def _calendar(exchange: str) -> Any:
    """From FIRST_DAY to LAST_DAY, or as much of that as is recorded."""
    from exchange_calendars import get_calendar

    # The library keeps what it makes by name: that is a small one, of which only the class is wanted.
    first, last = SAMPLE_DAYS
    kind = type(get_calendar(exchange, start=first.isoformat(), end=last.isoformat()))
    recorded_from, recorded_until = kind.bound_min(), kind.bound_max()
    return kind(
        start=FIRST_DAY.isoformat() if recorded_from is None else max(recorded_from, type(recorded_from)(FIRST_DAY)),
        end=LAST_DAY.isoformat() if recorded_until is None else min(recorded_until, type(recorded_until)(LAST_DAY)),
    )


def _extract(exchange: str, calendar: Any) -> Sessions:
    """The arrays of a calendar: its frames are some MB each and not kept."""
    open_time, close_time = calendar.open_times[-1][1], calendar.close_times[-1][1]
    return Sessions(
        exchange,
        array("q", calendar.opens.to_numpy("datetime64[ns]").view("int64").tolist()),
        array("q", calendar.closes.to_numpy("datetime64[ns]").view("int64").tolist()),
        UsualWeek(
            zone=calendar.tz,
            weekdays=frozenset(day for day, trades in enumerate(calendar.weekmask) if trades == "1"),
            opens=_since_midnight(open_time, calendar.open_offset),
            closes=_since_midnight(close_time, calendar.close_offset),
            recorded_from=calendar.first_session.date(),
            recorded_until=calendar.last_session.date(),
        ),
    )


def _since_midnight(at: time, days: int) -> timedelta:
    return timedelta(days=int(days), hours=at.hour, minutes=at.minute)
