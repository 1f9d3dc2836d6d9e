"""Day cuts: when a portfolio's day ends and the next one begins.

    HH:MM <IANA zone>   every local calendar day at that time of day by the zone's clocks: "00:00 UTC"
    close:<exchange>    at every session's close of an exchange of engine.sessions: "close:XNYS", early closes included

An HH:MM cut happens once per local calendar day:

    the clocks go forward over it    as if they had not been moved yet: it happens as long after the change as it lies
                                     within the gap (02:30 where 02:00 becomes 03:00 is 03:30 of the new time), as in
                                     RFC 5545 and PEP 495 (fold 0)
    the clocks go back over it       at its first occurrence
    a zone leaves out a whole day    that day's cut falls on the next day's: one instant, one cut

So two cuts in a row lie 24 hours apart, on days of a change as much more or less as the clocks are moved. An exchange's
cuts may lie days apart, its weekends and holidays; a day without a session has no cut of its own. Beyond the recorded
sessions there is one at the usual close of each day of the usual week (engine.sessions).

Zones are those of the machine's time zone database, but for `localtime`, which is another one on each machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from functools import cache, lru_cache
from zoneinfo import ZoneInfo, available_timezones

from engine.instants import to_datetime, to_ns
from engine.sessions import UnknownExchangeError, sessions_of

TEXT_LENGTH_MAX = 64
CUTS_COUNT_MAX = 4_096  # remembered at once: 72 exchanges, and a dozen times of day in each zone that is in use

_CLOCK = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9]) ([A-Za-z0-9_+/-]+)")
_EXCHANGE = "close:"
_DAY = timedelta(days=1)


class BadDayCutError(ValueError):
    """The text names no day cut; the message says why."""


@dataclass(frozen=True, slots=True)
class DayCut:
    """Equal to another one of the same text. `last` and `next` of one day are looked up once."""

    text: str
    _around: Callable[[int], tuple[int, int]] = field(compare=False, repr=False)
    _answers: list[tuple[int, int]] = field(compare=False, repr=False, default_factory=lambda: [(0, 0)])

    def last(self, now_ns: int) -> int:
        """The greatest cut ≤ now."""
        return self._find(now_ns)[0]

    def next(self, now_ns: int) -> int:
        """The smallest cut > now."""
        return self._find(now_ns)[1]

    def _find(self, now_ns: int) -> tuple[int, int]:
        answer = self._answers[0]
        if not answer[0] <= now_ns < answer[1]:
            answer = self._answers[0] = self._around(now_ns)
        return answer


@lru_cache(maxsize=CUTS_COUNT_MAX)
def parse_day_cut(text: str) -> DayCut:
    """Raises BadDayCutError. An exchange's first use reads its calendar, which takes a second."""
    if len(text) > TEXT_LENGTH_MAX:
        raise BadDayCutError(f"day_cut is longer than {TEXT_LENGTH_MAX}")
    if text.startswith(_EXCHANGE):
        return _exchange_cut(text)
    found = _CLOCK.fullmatch(text)
    if found is None:
        raise BadDayCutError(f"day_cut {text!r} is neither 'HH:MM <zone>' nor 'close:<exchange>'")
    hour, minute, name = found.groups()
    # Looked for in a list of names: a zone is read from a file that its name leads to.
    if name not in _zones():
        raise BadDayCutError(f"day_cut {text!r}: there is no zone {name}")
    return DayCut(text, _clock_cuts(time(int(hour), int(minute)), ZoneInfo(name)))


def _exchange_cut(text: str) -> DayCut:
    try:
        sessions = sessions_of(text.removeprefix(_EXCHANGE))
    except UnknownExchangeError as error:
        raise BadDayCutError(f"day_cut {text!r}: {error}") from None

    def around(now_ns: int) -> tuple[int, int]:
        return sessions.last_close(now_ns), sessions.next_close(now_ns)

    return DayCut(text, around)


def _clock_cuts(at: time, zone: ZoneInfo) -> Callable[[int], tuple[int, int]]:
    def cut_of(day: date) -> int:
        return to_ns(datetime.combine(day, at, zone))

    def around(now_ns: int) -> tuple[int, int]:
        # Two days each way, for a cut that a gap moves into the next day and for a day that was left out.
        today = to_datetime(now_ns).astimezone(zone).date()
        cuts = [cut_of(today + _DAY * offset) for offset in range(-2, 3)]
        return max(cut for cut in cuts if cut <= now_ns), min(cut for cut in cuts if cut > now_ns)

    return around


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones() - {"localtime"})
