"""The Book from boundary to boundary: what its state at each one is made of, and what marks may say meanwhile."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.badges import load_rules
from engine.corporate_actions import Split
from engine.day_cuts import parse_day_cut
from engine.instants import to_ns
from engine.marks import MarkQuality
from engine.runtime import telemetry
from tests.book_time import MICRO, Stage
from workers.book_time import FRAMES_KEPT_MAX, HOLD_MAX_S

# A Tuesday; XNYS trades from 14:30 to 21:00 UTC.
MIDNIGHT = datetime(2026, 11, 17, tzinfo=UTC)
SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)
CLOSE = MIDNIGHT + 21 * HOUR


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch, MIDNIGHT - 10 * SECOND)


# -- day cuts ------------------------------------------------------------------------------------------------


def test_a_cut_lies_between_the_quotes_up_to_it_and_those_beyond(stage: Stage) -> None:
    stage.open("p-1")
    stage.quote("10", MIDNIGHT)
    stage.quote("11", MIDNIGHT + timedelta(microseconds=1))
    stage.advance(MIDNIGHT + SECOND)
    assert stage.cuts() == [(MIDNIGHT, {"p-1": 10 * MICRO})]
    mark = stage.mark("p-1")
    assert (mark.nav, mark.day_pnl, mark.day_cut_at_ns) == (11 * MICRO, MICRO, to_ns(MIDNIGHT))
    assert stage.owned[0].positions_due
    assert stage.book.position_day_base("p-1", "AAPL") == 10 * MICRO


def test_until_its_cut_is_taken_no_mark_is_stamped_beyond_it(stage: Stage) -> None:
    """Nothing comes, so the cut waits for the grace; marks of that time count from the day before."""
    stage.open("p-1")
    stage.quote("10", MIDNIGHT - SECOND)
    stage.advance(MIDNIGHT - SECOND)
    for seconds, is_taken in ((1, False), (2, False), (3, False), (4, False), (5, True)):
        as_of = stage.advance(MIDNIGHT + seconds * SECOND, wall_s=0.06)
        day_cut = MIDNIGHT if is_taken else MIDNIGHT - 24 * HOUR
        assert stage.mark("p-1").day_cut_at_ns == to_ns(day_cut)
        assert as_of == (MIDNIGHT + seconds * SECOND if is_taken else MIDNIGHT)
        assert stage.mark("p-1").as_of_ns == to_ns(as_of)


@given(
    st.lists(
        st.one_of(st.integers(0, 40 * 3_600), st.tuples(st.integers(-7_200, 7_200), st.integers(1, 99))), max_size=30
    )
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_mark_lies_within_the_day_that_it_counts_from(
    monkeypatch: pytest.MonkeyPatch, steps: list[int | tuple[int, int]]
) -> None:
    """The clock leaps and quotes come from around its time; four cuts in one Book. asOf never goes back."""
    texts = ("00:00 UTC", "09:15 America/New_York", "close:XNYS", "23:59 Pacific/Chatham")
    stage, now = Stage(monkeypatch, MIDNIGHT), MIDNIGHT
    for text in texts:
        stage.open(text.replace(" ", "_"), text)
    before = MIDNIGHT
    for step in steps:
        if isinstance(step, tuple):
            stage.quote(str(step[1]), now + step[0] * SECOND)
            continue
        now += step * SECOND
        reached = stage.advance(now)
        assert before <= reached <= now
        before = reached
        for text in texts:
            mark = stage.mark(text.replace(" ", "_"))
            assert mark.day_cut_at_ns <= mark.as_of_ns <= parse_day_cut(text).next(mark.day_cut_at_ns), text


def test_two_portfolios_with_different_cuts_are_cut_apart(stage: Stage) -> None:
    stage.open("p-utc")
    stage.open("p-close", "close:XNYS")
    stage.quote("10", MIDNIGHT - SECOND)
    stage.settle(MIDNIGHT + HOUR)
    stage.quote("12", CLOSE - SECOND)
    stage.quote("13", CLOSE + SECOND)
    stage.settle(CLOSE + HOUR)
    assert stage.cuts() == [(MIDNIGHT, {"p-utc": 10 * MICRO}), (CLOSE, {"p-close": 12 * MICRO})]
    assert [stage.mark(name).day_pnl for name in ("p-utc", "p-close")] == [3 * MICRO, MICRO]


@pytest.mark.parametrize(
    ("day", "hours"), [((2026, 3, 29), 23), ((2026, 10, 25), 25), ((2026, 6, 1), 24), ((2028, 2, 29), 24)]
)
def test_a_day_is_as_long_as_its_zones_clocks_make_it(
    monkeypatch: pytest.MonkeyPatch, day: tuple[int, int, int], hours: int
) -> None:
    """From midnight to midnight in Paris, on the days of its clocks' changes and on others."""
    begins = datetime(*day, tzinfo=ZoneInfo("Europe/Paris")).astimezone(UTC)
    stage = Stage(monkeypatch, begins - HOUR)
    stage.open("p-1", "00:00 Europe/Paris")
    for hour in range(-1, 27):
        stage.quote(str(100 + hour), begins + hour * HOUR)
        stage.settle(begins + hour * HOUR + SECOND)
    ends = begins + hours * HOUR
    assert stage.cuts() == [(begins, {"p-1": 100 * MICRO}), (ends, {"p-1": (100 + hours) * MICRO})]
    assert (stage.mark("p-1").day_cut_at_ns, stage.mark("p-1").day_pnl) == (to_ns(ends), (26 - hours) * MICRO)


def test_cuts_that_were_passed_at_once_are_all_taken(stage: Stage) -> None:
    """A recorded market leaps over its weekend; a laptop wakes up."""
    stage.open("p-1")
    stage.quote("10", MIDNIGHT - SECOND)
    stage.settle(MIDNIGHT + 72 * HOUR + SECOND)
    assert stage.cuts() == [(MIDNIGHT + n * 24 * HOUR, {"p-1": 10 * MICRO}) for n in range(4)]


def test_a_portfolio_opened_after_a_cut_is_not_cut_by_it(stage: Stage) -> None:
    stage.settle(MIDNIGHT + SECOND)
    stage.open("p-1")
    assert stage.mark("p-1").day_cut_at_ns == to_ns(MIDNIGHT)
    stage.settle(MIDNIGHT + 2 * SECOND)
    assert stage.cuts() == []


def test_a_portfolio_opened_while_a_cut_is_pending_is_cut_by_it(stage: Stage) -> None:
    stage.advance(MIDNIGHT + SECOND)
    stage.open("p-1")
    assert stage.mark("p-1").day_cut_at_ns == to_ns(MIDNIGHT - 24 * HOUR)
    stage.settle(MIDNIGHT + 2 * SECOND)
    assert stage.cuts() == [(MIDNIGHT, {"p-1": 0})]


def test_a_cut_that_this_machine_can_not_read_is_the_default_and_is_said_once(stage: Stage) -> None:
    stage.open("p-1", "00:00 Mars/Olympus_Mons")
    stage.settle(MIDNIGHT + SECOND)
    assert stage.cuts() == [(MIDNIGHT, {"p-1": 0})]
    assert stage.time._reported == {"00:00 Mars/Olympus_Mons"}


def test_baselines_are_kept_per_shard_and_the_shards_of_others_keep_none(stage: Stage) -> None:
    stage.open("p-1")
    stage.open("p-2", shard=3)
    stage.settle(MIDNIGHT + SECOND)
    assert stage.cuts() == [(MIDNIGHT, {"p-1": 0})]
    assert stage.mark("p-2").day_cut_at_ns == to_ns(MIDNIGHT)


# -- snapshot frames -------------------------------------------------------------------------------------------


def test_an_hours_frame_has_all_marks_as_they_were_at_it(stage: Stage) -> None:
    stage.open("p-1")
    stage.open("p-22")
    stage.quote("10", MIDNIGHT)
    stage.quote("11", MIDNIGHT + SECOND)
    stage.advance(MIDNIGHT + 2 * SECOND)
    ((at, marks),) = stage.frames().items()
    assert (at, marks.keys()) == (MIDNIGHT, {"p-1", "p-22"})
    mark = marks["p-22"]
    assert (mark.nav, mark.as_of_ns, mark.day_cut_at_ns) == (10 * MICRO, to_ns(MIDNIGHT), to_ns(MIDNIGHT))
    assert (mark.epoch, mark.sequence, stage.owned[0].sequence) == (7, 1, 1)


def test_a_nav_that_no_flush_sees_is_found_at_the_snapshot(stage: Stage) -> None:
    (whale,) = [rule for rule in load_rules() if rule.badge_id == "whale"]
    badges = stage.badges.book
    badges.set_rules([whale])
    stage.open("p-1")
    badges.open("p-1", 0, stage.book.slot("p-1"))
    stage.quote(str(whale.threshold), MIDNIGHT)
    stage.quote("11", MIDNIGHT + SECOND)
    stage.advance(MIDNIGHT + 2 * SECOND)
    (proof,) = stage.badges._found[0].values()
    assert (proof.portfolio_id, proof.transition.at) == ("p-1", MIDNIGHT)


def test_of_many_hours_at_once_the_last_has_a_frame_and_the_others_are_gaps(stage: Stage) -> None:
    gaps = telemetry.SNAPSHOT_GAPS._value.get()
    stage.open("p-1")
    stage.settle(MIDNIGHT + 5 * HOUR + SECOND)
    assert list(stage.frames()) == [MIDNIGHT + 5 * HOUR]
    assert telemetry.SNAPSHOT_GAPS._value.get() == gaps + 5


def test_a_session_close_always_has_a_frame_with_its_own_prices(stage: Stage) -> None:
    stage.open("p-1")
    for hour in range(3):
        stage.quote(str(10 + hour), CLOSE + (hour - 1) * HOUR - SECOND)
    stage.quote("19", CLOSE + HOUR + SECOND)
    stage.settle(CLOSE + HOUR + 2 * SECOND)
    navs = {at: marks["p-1"].nav for at, marks in stage.frames().items()}
    assert navs == {CLOSE: 11 * MICRO, CLOSE + HOUR: 12 * MICRO}


def test_without_a_calendar_there_are_hours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, CLOSE - SECOND, calendar_equity="")
    stage.open("p-1")
    stage.settle(CLOSE + 2 * HOUR)
    assert list(stage.frames()) == [CLOSE + 2 * HOUR]


def test_an_early_close_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The day after Thanksgiving ends at 13:00 in New York."""
    early = datetime(2026, 11, 27, 18, tzinfo=UTC)
    stage = Stage(monkeypatch, early - SECOND)
    stage.open("p-1", "close:XNYS")
    stage.settle(early + 5 * HOUR)
    assert list(stage.frames()) == [early, early + 5 * HOUR]
    assert stage.cuts() == [(early, {"p-1": 0})]


def test_a_bounded_number_of_frames_is_kept_and_the_oldest_are_counted_as_lost(stage: Stage) -> None:
    lost = telemetry.SNAPSHOT_FRAMES.labels("lost")._value.get()
    stage.open("p-1")
    for hour in range(FRAMES_KEPT_MAX + 2):
        stage.settle(MIDNIGHT + hour * HOUR)
    assert list(stage.frames()) == [MIDNIGHT + hour * HOUR for hour in range(2, FRAMES_KEPT_MAX + 2)]
    assert telemetry.SNAPSHOT_FRAMES.labels("lost")._value.get() == lost + 2


def test_a_replays_days_between_two_looks_are_as_exact_as_any(stage: Stage) -> None:
    """Three days of four quotes, seen at once: each midnight and each close has the state of exactly its quotes."""
    stage.open("p-1")
    prices = {}
    for number in range(12):
        at = MIDNIGHT + number // 4 * 24 * HOUR + (14.5 + 2.16 * (number % 4)) * HOUR
        prices[at] = 100 + number
        stage.quote(str(100 + number), at)
    stage.settle(MIDNIGHT + 71 * HOUR + 1800 * SECOND)

    def expected(at: datetime) -> int:
        return max((price for quoted_at, price in prices.items() if quoted_at <= at), default=0) * MICRO

    days = [MIDNIGHT + n * 24 * HOUR for n in range(3)]
    assert stage.cuts() == [(day, {"p-1": expected(day)}) for day in days]
    navs = {at: marks["p-1"].nav for at, marks in stage.frames().items()}
    hours = [days[2] + 20 * HOUR, days[2] + 23 * HOUR]  # the last with a quote beyond it, and the last of all
    assert navs == {at: expected(at) for at in [*(day + 21 * HOUR for day in days), *hours]}


def test_a_boundary_waits_for_a_batch_that_is_being_booked(stage: Stage) -> None:
    """What is stamped up to a cut is in its baseline."""
    stage.open("p-1")
    with stage.time.booking():
        assert stage.settle(MIDNIGHT + SECOND) == MIDNIGHT
        assert stage.cuts() == [] and stage.time.is_held
    stage.advance(MIDNIGHT + 2 * SECOND)
    assert [at for at, _ in stage.cuts()] == [MIDNIGHT]


# -- what holds a boundary up ----------------------------------------------------------------------------------


def test_nothing_beyond_a_boundary_is_applied_while_it_is_held(stage: Stage) -> None:
    noon = MIDNIGHT + 12 * HOUR - timedelta(microseconds=1)
    stage.open("p-1")
    stage.actions.instants, stage.actions.held = [to_ns(noon)], {to_ns(noon)}
    stage.quote("10", noon)
    stage.quote("40", noon + SECOND)
    assert stage.settle(noon + 2 * SECOND) == noon
    assert stage.mark("p-1").nav == 10 * MICRO
    assert to_ns(noon) in stage.actions.asked
    stage.actions.held.clear()
    assert stage.advance(noon + 3 * SECOND) == noon + 3 * SECOND
    assert stage.mark("p-1").nav == 40 * MICRO


def test_the_schedule_is_asked_only_when_all_quotes_up_to_the_boundary_are_in_the_book(stage: Stage) -> None:
    noon = MIDNIGHT + 12 * HOUR - timedelta(microseconds=1)
    stage.open("p-1")
    stage.actions.instants = [to_ns(noon)]
    stage.advance(noon + SECOND)
    assert to_ns(noon) not in stage.actions.asked
    stage.quote("40", noon + SECOND)
    stage.advance(noon + 2 * SECOND)
    assert to_ns(noon) in stage.actions.asked


def test_what_holds_for_too_long_is_passed_and_counted(stage: Stage) -> None:
    forced = telemetry.BOUNDARIES_FORCED._value.get()
    noon = MIDNIGHT + 12 * HOUR - timedelta(microseconds=1)
    stage.actions.instants, stage.actions.held = [to_ns(noon)], {to_ns(noon)}
    stage.settle(noon + SECOND)
    assert stage.advance(noon + 2 * SECOND, HOLD_MAX_S - 1) == noon
    assert stage.advance(noon + 3 * SECOND, 1.1) == noon + 3 * SECOND
    assert telemetry.BOUNDARIES_FORCED._value.get() == forced + 1


def test_no_state_is_taken_while_a_shard_is_loaded(stage: Stage) -> None:
    stage.open("p-1")
    stage.quote("10", MIDNIGHT - SECOND)
    stage.quote("11", MIDNIGHT + SECOND)
    with stage.time.loading():
        assert stage.settle(MIDNIGHT + 2 * SECOND) == MIDNIGHT
        stage.open("p-2")
    stage.advance(MIDNIGHT + 3 * SECOND)
    assert stage.cuts() == [(MIDNIGHT, {"p-1": 10 * MICRO, "p-2": 10 * MICRO})]
    assert stage.frames()[MIDNIGHT].keys() == {"p-1", "p-2"}


# -- quotes ----------------------------------------------------------------------------------------------------


def test_a_quote_that_the_schedule_refuses_is_not_applied(stage: Stage) -> None:
    stage.open("p-1")
    stage.actions.refused = {"AAPL"}
    stage.quote("10", MIDNIGHT - 5 * SECOND)
    stage.advance(MIDNIGHT - SECOND)
    assert stage.book.price("AAPL") is None


@pytest.mark.parametrize("price", ["NaN", "0", "-3", "x", "1e999999999"])
def test_what_is_no_price_is_counted_and_moves_nothing(stage: Stage, price: str) -> None:
    refused = telemetry.QUOTES_REFUSED._value.get()
    stage.open("p-1")
    stage.quote(price, MIDNIGHT - 5 * SECOND)
    stage.advance(MIDNIGHT - SECOND)
    assert stage.mark("p-1").quality is MarkQuality.MISSING
    assert telemetry.QUOTES_REFUSED._value.get() == refused + 1


def test_the_books_price_is_told_in_the_shares_that_it_was_quoted_in(stage: Stage) -> None:
    stage.quote("30", MIDNIGHT - 5 * SECOND)
    stage.advance(MIDNIGHT - SECOND)
    assert stage.time.quote_of("MSFT") is None
    assert stage.time.quote_of("AAPL") == (30, to_ns(MIDNIGHT - 5 * SECOND))
    stage.actions.splits = {"AAPL": [Split(MIDNIGHT - 9 * SECOND, 2), Split(MIDNIGHT - 2 * SECOND, 4)]}
    assert stage.time.quote_of("AAPL") == (120, to_ns(MIDNIGHT - 5 * SECOND))


# -- quality ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbol", "quoted", "now", "quality"),
    [
        ("AAPL", CLOSE - SECOND, CLOSE, "LIVE"),
        ("AAPL", CLOSE - SECOND, CLOSE + HOUR, "CLOSED"),
        ("AAPL", CLOSE - 7 * HOUR, CLOSE + HOUR, "STALE"),
        ("AAPL", CLOSE - 3 * HOUR, CLOSE - HOUR, "STALE"),
        ("BTC", CLOSE - SECOND, CLOSE + HOUR, "STALE"),
        ("BTC", CLOSE + HOUR - SECOND, CLOSE + HOUR, "LIVE"),
        ("XYZ", CLOSE - SECOND, CLOSE + HOUR, "STALE"),
    ],
)
def test_a_price_is_worth_what_its_class_and_the_calendar_say(
    monkeypatch: pytest.MonkeyPatch, symbol: str, quoted: datetime, now: datetime, quality: str
) -> None:
    stage = Stage(monkeypatch, quoted)
    stage.open("p-1", symbol=symbol)
    stage.quote("10", quoted, symbol)
    stage.advance(quoted)
    assert stage.mark("p-1").quality is MarkQuality.LIVE
    stage.settle(now)
    assert stage.mark("p-1").quality is MarkQuality[quality]


def test_a_price_that_is_old_when_it_comes_is_never_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart: the last prices are read at once, long before qualities are looked over again."""
    stage = Stage(monkeypatch, CLOSE + HOUR)
    stage.open("p-1")
    stage.open("p-2", symbol="BTC")
    stage.advance(CLOSE + HOUR)
    for symbol in ("AAPL", "BTC"):
        stage.quote("10", CLOSE - SECOND, symbol)
    stage.advance(CLOSE + HOUR + SECOND)
    assert [stage.mark(name).quality.name for name in ("p-1", "p-2")] == ["CLOSED", "STALE"]


def test_what_a_source_says_lasts_until_its_next_quote(stage: Stage) -> None:
    stage.open("p-1")
    stage.quote("10", MIDNIGHT - 5 * SECOND, condition="HALTED")
    stage.advance(MIDNIGHT - SECOND)
    stage.settle(MIDNIGHT + 9 * HOUR)
    assert stage.mark("p-1").quality is MarkQuality.HALTED
    stage.quote("10", MIDNIGHT + 9 * HOUR, condition="DELAYED")
    stage.advance(MIDNIGHT + 9 * HOUR + SECOND)
    assert stage.mark("p-1").quality is MarkQuality.DELAYED


@pytest.mark.parametrize("by", ["market", "wall"])
def test_qualities_are_looked_over_by_both_clocks(stage: Stage, by: str) -> None:
    stage.open("p-1", symbol="BTC")
    stage.quote("10", MIDNIGHT + HOUR, "BTC")
    stage.settle(MIDNIGHT + HOUR + SECOND)
    stale_from = MIDNIGHT + HOUR + 900 * SECOND
    stage.advance(stale_from)
    assert stage.mark("p-1").quality is MarkQuality.LIVE
    stage.advance(stale_from + SECOND, wall_s=0.01)
    assert stage.mark("p-1").quality is MarkQuality.LIVE  # both clocks went on too little
    if by == "market":
        stage.advance(stale_from + 60 * SECOND, wall_s=0.01)
    else:
        stage.advance(stale_from + SECOND, wall_s=1.0)
    assert stage.mark("p-1").quality is MarkQuality.STALE


def test_a_frames_qualities_are_those_of_its_instant(stage: Stage) -> None:
    stage.open("p-1", symbol="BTC")
    stage.quote("10", MIDNIGHT + HOUR, "BTC")
    stage.settle(MIDNIGHT + HOUR + SECOND)
    stage.advance(MIDNIGHT + HOUR + 900 * SECOND)
    stage.owned[0].frames_due.clear()
    stage.quote("11", MIDNIGHT + 2 * HOUR + SECOND, "BTC")
    stage.advance(MIDNIGHT + 2 * HOUR + SECOND)
    assert stage.mark("p-1").quality is MarkQuality.LIVE
    ((_, marks),) = stage.frames().items()
    assert marks["p-1"].quality is MarkQuality.STALE
