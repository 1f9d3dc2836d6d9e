"""When days end: by clocks that are moved, and at the closes of an exchange."""

from __future__ import annotations

import sys
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.day_cuts import TEXT_LENGTH_MAX, BadDayCutError, DayCut, parse_day_cut
from engine.instants import DAY_NS, HOUR_NS, to_datetime, to_ns

YEAR_2200_NS = to_ns(datetime(2200, 1, 1, tzinfo=UTC))
# Zones that move their clocks by an hour or less, or never, since 1990.
ZONES = ["UTC", "America/New_York", "Europe/London", "Australia/Lord_Howe", "Asia/Kathmandu", "Pacific/Chatham"]


def ns(text: str) -> int:
    return to_ns(datetime.fromisoformat(text))


def cuts(cut: DayCut, since: str, count: int) -> list[str]:
    """The next `count` cuts after an instant, as UTC texts."""
    found, at = [], ns(since)
    for _ in range(count):
        at = cut.next(at)
        found.append(to_datetime(at).strftime("%m-%dT%H:%M"))
    return found


@pytest.mark.parametrize(
    ("text", "since", "expected"),
    [
        # Clocks go forward 2026-03-08: 02:30 does not exist and happens at 03:30 of the new time.
        ("02:30 America/New_York", "2026-03-07T00:00Z", ["03-07T07:30", "03-08T07:30", "03-09T06:30"]),
        ("02:00 America/New_York", "2026-03-07T00:00Z", ["03-07T07:00", "03-08T07:00", "03-09T06:00"]),
        ("03:00 America/New_York", "2026-03-07T00:00Z", ["03-07T08:00", "03-08T07:00", "03-09T07:00"]),
        # Clocks go back 2026-11-01: 01:30 happens twice and the first one counts.
        ("01:30 America/New_York", "2026-10-31T00:00Z", ["10-31T05:30", "11-01T05:30", "11-02T06:30"]),
        ("02:00 America/New_York", "2026-10-31T00:00Z", ["10-31T06:00", "11-01T07:00", "11-02T07:00"]),
        ("01:30 Europe/London", "2026-03-28T00:00Z", ["03-28T01:30", "03-29T01:30", "03-30T00:30"]),
        ("01:00 Europe/London", "2026-10-24T00:00Z", ["10-24T00:00", "10-25T00:00", "10-26T01:00"][1:]),
        # Half an hour: forward 2026-10-04 at 02:00 to 02:30, back 2026-04-05 at 02:00 to 01:30.
        ("02:15 Australia/Lord_Howe", "2026-10-02T16:00Z", ["10-03T15:45", "10-04T15:15"]),
        ("01:45 Australia/Lord_Howe", "2026-04-03T15:00Z", ["04-04T14:45", "04-05T15:15"]),
        ("00:00 Asia/Kathmandu", "2026-03-01T00:00Z", ["03-01T18:15", "03-02T18:15"]),
        ("00:00 UTC", "2028-02-28T00:00Z", ["02-29T00:00", "03-01T00:00"]),
        ("23:59 Pacific/Kiritimati", "2026-01-01T00:00Z", ["01-01T09:59", "01-02T09:59"]),
        # Samoa left out 2011-12-30: that day's cut and the next one's are one.
        ("10:00 Pacific/Apia", "2011-12-29T00:00Z", ["12-29T20:00", "12-30T20:00", "12-31T20:00"]),
    ],
)
def test_cuts_follow_the_zone_s_clocks(text: str, since: str, expected: list[str]) -> None:
    assert cuts(parse_day_cut(text), since, len(expected)) == expected


def test_on_the_day_after_one_that_was_left_out_the_last_cut_is_older_than_a_day() -> None:
    """2011-12-31 05:00 in Samoa: the cut before was on the 29th, local time."""
    cut, now_ns = parse_day_cut("10:00 Pacific/Apia"), ns("2011-12-30T15:00Z")
    assert (cut.last(now_ns), cut.next(now_ns)) == (ns("2011-12-29T20:00Z"), ns("2011-12-30T20:00Z"))


def test_the_last_cut_is_the_one_before_and_a_cut_belongs_to_the_day_it_begins() -> None:
    cut = parse_day_cut("17:00 America/New_York")
    at = ns("2026-11-20T22:00Z")
    assert (cut.last(at), cut.next(at)) == (at, at + DAY_NS)
    assert (cut.last(at - 1), cut.next(at - 1)) == (at - DAY_NS, at)


def test_close_cuts_are_the_exchange_s_with_early_closes_holidays_and_weekends() -> None:
    # Thanksgiving 2026-11-26 has no session and the day after closes at 13:00 in New York.
    assert cuts(parse_day_cut("close:XNYS"), "2026-11-25T00:00Z", 3) == ["11-25T21:00", "11-27T18:00", "11-30T21:00"]
    # Independence Day 2026 falls on a Saturday and is kept on Friday the 3rd.
    assert cuts(parse_day_cut("close:XNYS"), "2026-07-02T00:00Z", 2) == ["07-02T20:00", "07-06T20:00"]
    saturday = ns("2026-11-28T12:00Z")
    assert to_datetime(parse_day_cut("close:XNYS").last(saturday)) == datetime(2026, 11, 27, 18, tzinfo=UTC)


@pytest.mark.parametrize("text", ["00:00 UTC", "02:30 America/New_York", "close:XNYS", "close:XSES", "close:24/7"])
@pytest.mark.parametrize("now_ns", [-(10**18), 0, 1, YEAR_2200_NS, 2**63 - 1])
def test_no_instant_is_beyond_a_cut(text: str, now_ns: int) -> None:
    cut = parse_day_cut(text)
    assert cut.last(now_ns) <= now_ns < cut.next(now_ns) <= cut.last(now_ns) + 4 * DAY_NS


@given(
    st.sampled_from(ZONES),
    st.times(),
    st.integers(ns("1990-01-03T00:00Z"), ns("2099-12-31T00:00Z")),
)
def test_a_cut_is_between_23_and_25_hours_after_the_one_before(zone: str, at: time, now_ns: int) -> None:
    cut = parse_day_cut(f"{at:%H:%M} {zone}")
    last, following = cut.last(now_ns), cut.next(now_ns)
    assert last <= now_ns < following
    assert 23 * HOUR_NS <= following - last <= 25 * HOUR_NS
    assert cut.last(following) == following and cut.last(following - 1) == last and cut.next(last) == following


@given(st.sampled_from(ZONES), st.times(), st.dates(date(1991, 1, 1), date(2090, 12, 31)))
def test_there_is_one_cut_in_each_local_day(zone: str, at: time, day: date) -> None:
    """Counted by the zone's own midnights; a cut that a gap moves stays within its day."""
    cut, clock = parse_day_cut(f"{at:%H:%M} {zone}"), ZoneInfo(zone)
    begins, ends = (to_ns(datetime.combine(one, time(), clock)) for one in (day, day + timedelta(days=1)))
    found = cut.next(begins - 1)
    assert begins <= found < ends <= cut.next(found)


@given(st.integers(ns("1990-01-03T00:00Z"), ns("2049-12-01T00:00Z")))
def test_close_cuts_never_stand_still(now_ns: int) -> None:
    cut = parse_day_cut("close:XNYS")
    last, following = cut.last(now_ns), cut.next(now_ns)
    assert last <= now_ns < following and cut.next(last) == following and cut.last(following - 1) == last
    assert following - last <= 7 * DAY_NS  # the longest pause since 1990 was in September 2001


def test_cuts_of_every_zone_ascend() -> None:
    """Also where a zone has moved its clocks by hours or left out a day."""
    for zone in sorted(available_timezones() - {"localtime"}):
        cut = parse_day_cut(f"02:30 {zone}")
        found = [cut.last(now_ns) for now_ns in range(ns("2011-12-20T00:00Z"), ns("2012-01-10T00:00Z"), 5 * HOUR_NS)]
        assert all(before <= after for before, after in pairwise(found)), zone
        assert len(set(found)) >= 20, zone


def test_answers_for_another_day_do_not_stick() -> None:
    """What is remembered is one day's answer: asked to and fro, every answer is that of a fresh cut."""
    cut = parse_day_cut("16:00 America/New_York")
    for now_ns in [ns("2026-03-08T12:00Z"), ns("2020-01-01T00:00Z"), ns("2026-03-08T12:00Z"), ns("2026-03-08T20:00Z")]:
        parse_day_cut.cache_clear()
        fresh = parse_day_cut(cut.text)
        assert (cut.last(now_ns), cut.next(now_ns)) == (fresh.last(now_ns), fresh.next(now_ns))


def test_a_cut_is_known_by_its_text() -> None:
    parse_day_cut.cache_clear()
    one = parse_day_cut("00:00 UTC")
    parse_day_cut.cache_clear()
    other = parse_day_cut("00:00 UTC")
    assert one is not other and {one: 1} == {other: 1} and one != parse_day_cut("00:01 UTC")
    with pytest.raises(AttributeError):
        one.text = "00:01 UTC"  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "UTC",
        "00:00",
        "00:00 ",
        "0:00 UTC",
        "24:00 UTC",
        "12:60 UTC",
        "12:00:00 UTC",
        "00:00  UTC",
        " 00:00 UTC",
        "00:00 UTC\n",
        "00:00\tUTC",
        "００:00 UTC",
        "00:00 Mars/Olympus",
        "00:00 utc",
        "00:00 localtime",
        "00:00 America",
        "00:00 ../../etc/passwd",
        "00:00 /etc/localtime",
        "00:00 America/../UTC",
        "00:00 America/New_York\0",
        "close:",
        "close:NYSE",  # an alias
        "close:xnys",
        "close: XNYS",
        "close:../XNYS",
        "Close:XNYS",
        "00:00 " + "A" * 60,
        "close:" + "X" * 10_000,
    ],
)
def test_other_texts_are_refused_with_a_message(text: str) -> None:
    with pytest.raises(BadDayCutError, match="day_cut") as caught:
        parse_day_cut(text)
    assert len(str(caught.value)) < 2 * TEXT_LENGTH_MAX + 60


def test_an_exchange_whose_calendar_can_not_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["engine.sessions"], "_calendar", _broken)
    with pytest.raises(BadDayCutError, match="calendar of XWAR can not be made: no holidays"):
        parse_day_cut("close:XWAR")


def _broken(exchange: str) -> None:
    raise ValueError("no holidays")
