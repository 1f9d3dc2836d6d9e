"""Sessions of exchanges, and the quality of a price by class, hour, age and condition."""

from __future__ import annotations

import subprocess
import sys
import warnings
from array import array
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.assets import AssetClass
from engine.instants import SECOND_NS, to_datetime, to_ns
from engine.markets import DELAY_MAX_NS, Markets, quality_of
from engine.marks import MarkQuality
from engine.messages import Condition
from engine.runtime.session_files import read_session_file
from engine.sessions import Sessions, UnknownExchangeError, UsualWeek, sessions_of

STALE_AFTER_NS = 900 * SECOND_NS
MARKETS = Markets({AssetClass.EQUITY: "XNYS", AssetClass.COMMODITY: "CMES", AssetClass.CRYPTO: ""})


def ns(text: str) -> int:
    return to_ns(datetime.fromisoformat(text))


def utc(at_ns: int) -> str:
    return to_datetime(at_ns).strftime("%Y-%m-%dT%H:%M")


@pytest.mark.parametrize(
    ("exchange", "now", "is_open"),
    [
        ("XNYS", "2026-11-25T14:29:59Z", False),
        ("XNYS", "2026-11-25T14:30:00Z", True),
        ("XNYS", "2026-11-25T20:59:59Z", True),
        ("XNYS", "2026-11-25T21:00:00Z", False),
        ("XNYS", "2026-11-26T17:00:00Z", False),  # Thanksgiving
        ("XNYS", "2026-11-27T17:59:00Z", True),
        ("XNYS", "2026-11-27T18:00:00Z", False),  # closes at 13:00
        ("XNYS", "2026-11-28T17:00:00Z", False),  # Saturday
        ("XNYS", "2026-07-01T13:30:00Z", True),  # summer time
        ("XNYS", "2026-07-01T20:00:00Z", False),
        ("XTKS", "2026-11-25T03:00:00Z", True),  # lunch in Tokyo is a break, not a close
        ("CMES", "2026-11-25T23:00:00Z", True),  # one session closes and the next opens
        ("CMES", "2026-11-28T17:00:00Z", False),
        ("CMES", "2026-11-29T23:00:00Z", True),  # Sunday evening
        ("CMES", "2060-06-06T21:59:00Z", False),  # unrecorded: futures open on Sunday evening all the same
        ("CMES", "2060-06-06T22:00:00Z", True),
        ("24/7", "2026-11-28T00:00:00Z", True),
    ],
)
def test_an_exchange_is_open_from_its_open_until_before_its_close(exchange: str, now: str, is_open: bool) -> None:
    assert sessions_of(exchange).is_open(ns(now)) is is_open


def test_the_instants_around_a_holiday() -> None:
    sessions, now_ns = sessions_of("XNYS"), ns("2026-11-26T17:00Z")
    assert utc(sessions.last_open(now_ns)) == "2026-11-25T14:30"
    assert utc(sessions.last_close(now_ns)) == "2026-11-25T21:00"
    assert utc(sessions.next_close(now_ns)) == "2026-11-27T18:00"
    close_ns = ns("2026-11-25T21:00Z")
    assert (sessions.last_close(close_ns), sessions.last_close(close_ns - 1)) == (close_ns, ns("2026-11-24T21:00Z"))


def test_the_recorded_instants_are_whole_sorted_and_one_each() -> None:
    for exchange in ("XNYS", "CMES", "XSES"):
        sessions = sessions_of(exchange)
        assert len(sessions.opens) == len(sessions.closes) > 9_000
        assert sessions.opens.itemsize == sessions.closes.itemsize == 8
        assert all(opens < closes for opens, closes in zip(sessions.opens, sessions.closes, strict=True))
        assert all(closes <= opens for closes, opens in zip(sessions.closes, sessions.opens[1:], strict=False))
        assert all(before < after for before, after in pairwise(sessions.closes))


@given(st.integers(0, ns("2199-12-31T00:00Z")), st.sampled_from(["XNYS", "CMES", "XSES", "XSAU"]))
def test_the_neighbours_of_any_instant_are_next_to_it(now_ns: int, exchange: str) -> None:
    sessions = sessions_of(exchange)
    around = sessions.around(now_ns)
    assert around == sessions._around(now_ns)  # what is remembered is what is found
    assert around.last_open_ns <= now_ns < around.next_open_ns
    assert around.last_close_ns <= now_ns < around.next_close_ns
    assert sessions.around(around.next_close_ns).last_close_ns == around.next_close_ns
    assert sessions.around(around.next_open_ns - 1).last_open_ns == around.last_open_ns
    assert around.is_open == (around.next_close_ns <= around.next_open_ns)


@pytest.mark.parametrize(
    ("exchange", "now", "last_close", "next_close"),
    [
        # XNYS is recorded until 2049: Christmas 2051 is a Monday like any other.
        ("XNYS", "2051-12-25T12:00Z", "2051-12-22T21:00", "2051-12-25T21:00"),
        ("XNYS", "1975-07-05T12:00Z", "1975-07-04T20:00", "1975-07-07T20:00"),
        # From the last recorded session on, and up to the first: 1990 began with a holiday that is not recorded.
        ("XNYS", "2050-01-01T12:00Z", "2049-12-31T21:00", "2050-01-03T21:00"),
        ("XNYS", "1990-01-01T12:00Z", "1989-12-29T21:00", "1990-01-01T21:00"),
        ("XNYS", "1990-01-02T15:00Z", "1990-01-01T21:00", "1990-01-02T21:00"),
        ("XNYS", "2049-12-31T15:00Z", "2049-12-30T21:00", "2049-12-31T21:00"),
        # Futures open on the eve, and Riyadh trades from Sunday to Thursday.
        ("CMES", "2060-06-06T12:00Z", "2060-06-04T22:00", "2060-06-07T22:00"),
        ("XSAU", "2035-01-05T12:00Z", "2035-01-04T12:00", "2035-01-07T12:00"),
    ],
)
def test_beyond_its_records_an_exchange_keeps_its_usual_week(
    exchange: str, now: str, last_close: str, next_close: str
) -> None:
    sessions = sessions_of(exchange)
    assert (utc(sessions.last_close(ns(now))), utc(sessions.next_close(ns(now)))) == (last_close, next_close)


def test_usual_hours_do_not_lengthen_a_short_last_session() -> None:
    friday = date(2026, 1, 2)
    week = UsualWeek(UTC, frozenset(range(5)), timedelta(hours=9), timedelta(hours=17), friday, friday)
    sessions = Sessions("ONE", array("q", [ns("2026-01-02T09:00Z")]), array("q", [ns("2026-01-02T12:00Z")]), week)
    now_ns = ns("2026-01-02T13:00Z")
    assert (utc(sessions.last_close(now_ns)), utc(sessions.next_close(now_ns))) == (
        "2026-01-02T12:00",
        "2026-01-05T17:00",
    )
    assert not sessions.is_open(now_ns)


@pytest.mark.parametrize("exchange", ["", "NYSE", "xnys", "Mars", "X" * 1_000])
def test_an_unknown_exchange_is_refused(exchange: str) -> None:
    with pytest.raises(UnknownExchangeError, match="no exchange is called"):
        sessions_of(exchange)


def test_markets_with_an_unknown_exchange_are_refused_at_once() -> None:
    with pytest.raises(UnknownExchangeError):
        Markets({AssetClass.EQUITY: "NOWHERE"})


def test_a_calendar_says_nothing_on_standard_error_and_pandas_waits_for_the_first_one() -> None:
    code = (
        "import sys, engine.sessions as s; assert 'pandas' not in sys.modules; s.sessions_of('XNYS');"
        "assert 'pandas' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sessions_of.__wrapped__("XLON")


# -- quality ------------------------------------------------------------------------------------------------------

OPEN, CLOSED, WEEKEND = "2026-11-25T19:00Z", "2026-11-26T03:00Z", "2026-11-28T12:00Z"
Q = MarkQuality
E, C, X, U = AssetClass.EQUITY, AssetClass.COMMODITY, AssetClass.CRYPTO, AssetClass.UNCLASSIFIED


@pytest.mark.parametrize(
    ("asset_class", "now", "age", "expected"),
    [
        # (class, now, when the price was quoted, (no condition, DELAYED, HALTED))
        (E, OPEN, "2026-11-25T18:50Z", (Q.LIVE, Q.DELAYED, Q.HALTED)),
        (E, OPEN, "2026-11-25T18:45Z", (Q.LIVE, Q.DELAYED, Q.HALTED)),  # exactly the limit
        (E, OPEN, "2026-11-25T18:44Z", (Q.STALE, Q.DELAYED, Q.HALTED)),
        (E, OPEN, "2026-11-25T18:24Z", (Q.STALE, Q.STALE, Q.HALTED)),
        (E, OPEN, "2026-11-24T20:59Z", (Q.STALE, Q.STALE, Q.HALTED)),
        (E, CLOSED, "2026-11-26T02:50Z", (Q.LIVE, Q.DELAYED, Q.HALTED)),  # extended hours: somebody trades
        (E, CLOSED, "2026-11-26T02:30Z", (Q.CLOSED, Q.DELAYED, Q.HALTED)),
        (E, CLOSED, "2026-11-25T20:59Z", (Q.CLOSED, Q.CLOSED, Q.HALTED)),
        (E, CLOSED, "2026-11-25T14:30Z", (Q.CLOSED, Q.CLOSED, Q.HALTED)),  # the session's first instant
        (E, CLOSED, "2026-11-25T14:29Z", (Q.STALE, Q.STALE, Q.HALTED)),
        (E, WEEKEND, "2026-11-27T17:59Z", (Q.CLOSED, Q.CLOSED, Q.HALTED)),
        (E, WEEKEND, "2026-11-25T20:59Z", (Q.STALE, Q.STALE, Q.HALTED)),  # before the short Friday
        (C, OPEN, "2026-11-25T18:50Z", (Q.LIVE, Q.DELAYED, Q.HALTED)),
        (C, OPEN, "2026-11-25T18:30Z", (Q.STALE, Q.DELAYED, Q.HALTED)),
        (C, CLOSED, "2026-11-26T02:30Z", (Q.STALE, Q.DELAYED, Q.HALTED)),  # futures trade at night
        (C, WEEKEND, "2026-11-27T17:59Z", (Q.CLOSED, Q.CLOSED, Q.HALTED)),
        (C, WEEKEND, "2026-11-26T02:00Z", (Q.STALE, Q.STALE, Q.HALTED)),
        *((other, OPEN, "2026-11-25T18:50Z", (Q.LIVE, Q.DELAYED, Q.HALTED)) for other in (X, U)),
        *((other, CLOSED, "2026-11-26T02:30Z", (Q.STALE, Q.DELAYED, Q.HALTED)) for other in (X, U)),
        *((other, WEEKEND, "2026-11-27T17:59Z", (Q.STALE, Q.STALE, Q.HALTED)) for other in (X, U)),
    ],
)
def test_quality(asset_class: AssetClass, now: str, age: str, expected: tuple[Q, Q, Q]) -> None:
    conditions: tuple[Condition, ...] = ("", "DELAYED", "HALTED")
    found = [MARKETS.quality(asset_class, ns(age), condition, ns(now), STALE_AFTER_NS) for condition in conditions]
    assert tuple(found) == expected
    assert MARKETS.quality(asset_class, None, "", ns(now), STALE_AFTER_NS) is Q.MISSING


def test_a_delayed_source_may_be_late_by_its_delay_beside_the_limit() -> None:
    limit = STALE_AFTER_NS + DELAY_MAX_NS
    assert quality_of(0, "DELAYED", None, limit, STALE_AFTER_NS) is Q.DELAYED
    assert quality_of(0, "DELAYED", None, limit + 1, STALE_AFTER_NS) is Q.STALE


def test_a_price_from_ahead_of_the_clock_is_live() -> None:
    assert quality_of(5, "", None, 0, 1) is Q.LIVE


@given(
    st.sampled_from(AssetClass),
    st.integers(ns("2026-11-01T00:00Z"), ns("2026-12-31T00:00Z")),
    st.integers(0, 10 * 86_400 * SECOND_NS),
    st.integers(0, 10 * 86_400 * SECOND_NS),
)
def test_an_older_price_is_never_of_better_quality(asset_class: AssetClass, now_ns: int, age: int, more: int) -> None:
    conditions: tuple[Condition, ...] = ("", "DELAYED", "HALTED")
    for condition in conditions:
        younger = MARKETS.quality(asset_class, now_ns - age, condition, now_ns, STALE_AFTER_NS)
        older = MARKETS.quality(asset_class, now_ns - age - more, condition, now_ns, STALE_AFTER_NS)
        # DELAYED turns into CLOSED, which says more: that nothing newer is to be had.
        assert older >= younger or (younger, older) == (Q.DELAYED, Q.CLOSED)


def test_a_market_is_open_unless_its_sessions_say_otherwise() -> None:
    saturday = ns(WEEKEND)
    assert [MARKETS.is_open(one, saturday) for one in (E, C, X, U)] == [False, False, True, True]
    assert MARKETS.sessions(X) is None and MARKETS.sessions(E) is sessions_of("XNYS")


def test_instants_go_there_and_back() -> None:
    assert to_datetime(1_795_342_800_123_456_789) == datetime(2026, 11, 22, 10, 20, 0, 123_456, UTC)
    assert to_ns(to_datetime(1_795_342_800_123_456_789)) == 1_795_342_800_123_456_000


def test_sessions_made_by_another_process_are_the_same_and_need_no_library(tmp_path: Path) -> None:
    file = tmp_path / "sessions.json"
    subprocess.run([sys.executable, "-m", "engine.runtime.session_files", file, "XNYS", "CMES"], check=True)
    told = """
import sys
from pathlib import Path
from engine.runtime.session_files import read_session_file
from engine.sessions import sessions_of
read_session_file(Path(sys.argv[1]))
for name in ("XNYS", "CMES"):
    found = sessions_of(name)
    print(found.opens.tolist() == found.opens.tolist(), hash(tuple(found.opens)), hash(tuple(found.closes)), found.week)
print("pandas" in sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", told, file], check=True, capture_output=True, text=True).stdout
    expected = [
        f"True {hash(tuple(own.opens))} {hash(tuple(own.closes))} {own.week}"
        for own in (sessions_of("XNYS"), sessions_of("CMES"))
    ]
    assert answer.splitlines() == [*expected, "False"]


@pytest.mark.parametrize("content", [None, b"", b"[]", b'[{"exchange": 1}]'])
def test_a_session_file_that_is_none_costs_time_only(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "sessions.json"
    if content is not None:
        file.write_bytes(content)
    read_session_file(file)
    assert sessions_of("XNYS").is_open(to_ns(datetime(2026, 11, 20, 15, 0, tzinfo=UTC)))
