from __future__ import annotations

import asyncio
import gzip
import time
from collections import Counter
from contextlib import aclosing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from engine.assets import AssetClass
from engine.corporate_actions import DividendAction, SplitAction, decode_action, encode_action
from engine.instants import DAY_NS, to_ns
from engine.quotes import QuoteFilter, Verdict
from engine.runtime.clock import MarketClock, MarketClockPlan, make_clock, plan_market_clock
from workers.feeds.replay import (
    ReplayFeed,
    bar_actions,
    bar_prices,
    bar_quotes,
    first_day_prices,
    parse_replay,
    plan_replay,
)
from workers.feeds.select import make_feed

MARKET = Path(__file__).parents[3] / "shared" / "market"
BARS = MARKET / "us_equities_daily_2020-04_2021-04.csv.gz"
HEADER = "date,symbol,open,high,low,close,volume,dividend,split\n"


def recorded(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"no recorded market data at {path}")
    return path


def problems(feed: str, problem: str) -> float:
    return REGISTRY.get_sample_value("navstream_feed_problems_total", {"feed": feed, "problem": problem}) or 0.0


def write_bars(path: Path, *rows: str) -> Path:
    text = HEADER + "".join(f"{row}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def clock_over(path: Path, speed_milli: int, started_s_ago: float = 0) -> MarketClock:
    plan = plan_replay(path, speed_milli, time.time_ns() - int(started_s_ago * 1e9))
    clock = make_clock(plan.plan_json)
    assert isinstance(clock, MarketClock)
    return clock


TWO_DAYS = (
    "2020-10-30,A,10,12,9,11,1,0.0,1.0",
    "2020-10-30,B,5,6,4,4.50,1,0.0,1.0",
    "2020-11-02,A,11,11,11,11,1,0,1",
)


def test_a_bar_s_extremes_come_in_the_order_of_its_direction() -> None:
    assert bar_prices("10", "12", "9", "11") == ("10", "9", "12", "11")
    assert bar_prices("10", "12", "9", "10") == ("10", "9", "12", "10")
    assert bar_prices("11", "12", "9", "10") == ("11", "12", "9", "10")
    assert bar_prices("x", "12", "9", "10") == ("x", "9", "12", "10")


def test_quotes_stand_at_new_york_s_session_in_summer_and_winter_time(tmp_path: Path) -> None:
    path = write_bars(tmp_path / "bars.csv.gz", *TWO_DAYS)
    steps = list(bar_quotes(path))
    assert [at for at, _ in steps] == [
        to_ns(datetime(2020, 10, 30, hour, minute, tzinfo=UTC))
        for hour, minute in ((13, 30), (15, 40), (17, 50), (20, 0))
    ] + [
        to_ns(datetime(2020, 11, 2, hour, minute, tzinfo=UTC))
        for hour, minute in ((14, 30), (16, 40), (18, 50), (21, 0))
    ]
    assert [(q.symbol, q.price) for q in steps[3][1]] == [("A", "11"), ("B", "4.50")]
    assert all(q.ts_event_ns == at and q.sequence is None for at, quotes in steps for q in quotes)


def test_a_session_that_closes_early_ends_with_its_last_quote(tmp_path: Path) -> None:
    """The day after Thanksgiving, and a day that the exchange does not know."""
    path = write_bars(tmp_path / "bars.csv", "2020-11-27,A,1,1,1,2,1,0,1", "2020-11-28,A,1,1,1,2,1,0,1")
    assert [at for at, _ in bar_quotes(path)] == [
        to_ns(datetime(2020, 11, day, hour, minute, tzinfo=UTC))
        for day, times in ((27, ((14, 30), (15, 40), (16, 50), (18, 0))), (28, ((14, 30), (16, 40), (18, 50), (21, 0))))
        for hour, minute in times
    ]


async def test_a_replay_follows_its_clock_and_ends(tmp_path: Path) -> None:
    path = write_bars(tmp_path / "bars.csv", *TWO_DAYS)
    clock = clock_over(path, speed_milli=4_000)
    feed = ReplayFeed(path, clock)
    quotes = []
    async with asyncio.timeout(10):
        async for batch in feed.batches():
            now_ns = clock.now_ns()
            # Never early, and no later than a fifth of a wall second, which here is 0.8 of a market day.
            assert all(quote.ts_event_ns <= now_ns < quote.ts_event_ns + 0.8 * DAY_NS for quote in batch)
            quotes += batch
    assert [quote.price for quote in quotes if quote.symbol == "A"] == ["10", "9", "12", "11"] + ["11"] * 4


async def test_a_late_replay_gives_what_was_missed_as_one_batch(tmp_path: Path) -> None:
    path = write_bars(tmp_path / "bars.csv", *TWO_DAYS)
    # Half a second into a session that ends after one: at 12:00 UTC of the second day, before its open.
    batches = []
    async with aclosing(ReplayFeed(path, clock_over(path, 1_000, started_s_ago=1.5)).batches()) as feed:
        async for batch in feed:
            batches.append([(quote.symbol, quote.price) for quote in batch])
            break
    assert batches == [[("A", "11"), ("B", "4.50")]]
    after_the_end = ReplayFeed(path, clock_over(path, 1_000, started_s_ago=60))
    assert [[q.price for q in batch] async for batch in after_the_end.batches()] == [["11", "4.50"]]


async def test_rows_that_can_not_be_read_are_counted_and_skipped(tmp_path: Path) -> None:
    path = write_bars(tmp_path / "bars.csv", "2020-10-30,A,10,12", "soon,A,1,1,1,1,1,0,1", TWO_DAYS[2], "")
    before = problems("replay", "bad_row")
    feed = ReplayFeed(path, clock_over(path, 1_000, started_s_ago=60))
    assert [len(batch) async for batch in feed.batches()] == [1]
    assert problems("replay", "bad_row") > before


# --- corporate actions


def test_bars_with_a_split_or_a_dividend_announce_them(tmp_path: Path) -> None:
    path = write_bars(
        tmp_path / "bars.csv",
        "2020-08-28,A,10,12,9,11,1,0.0,1.0",
        "2020-08-31,A,3,3,3,3,1,0.250,4.0",
        "2020-12-01,B,3,3,3,3,1,0.0,0.125",
    )
    assert list(bar_actions(path)) == [
        SplitAction(
            action_id="split:A:2020-08-31",
            symbol="A",
            ratio="4",
            effective_at=datetime(2020, 8, 31, 13, 30, tzinfo=UTC),
        ),
        DividendAction(
            action_id="dividend:A:2020-08-31",
            symbol="A",
            amount="0.25",
            currency="USD",
            ex_date=date(2020, 8, 31),
            pay_date=date(2020, 9, 14),
        ),
        SplitAction(
            action_id="split:B:2020-12-01",
            symbol="B",
            ratio="0.125",
            effective_at=datetime(2020, 12, 1, 14, 30, tzinfo=UTC),
        ),
    ]
    assert list(bar_actions(path)) == list(bar_actions(path)), "announced again, they are the same"


def test_an_action_takes_effect_no_later_than_its_day_s_first_quote(tmp_path: Path) -> None:
    path = write_bars(tmp_path / "bars.csv", "2020-10-30,A,1,1,1,1,1,0,2", "2020-11-02,A,1,1,1,1,1,0,2")
    splits = [to_ns(action.effective_at) for action in bar_actions(path) if isinstance(action, SplitAction)]
    firsts = [at for at, _ in bar_quotes(path)][::4]
    assert splits == firsts


@pytest.mark.parametrize("value", ["-0.5,1", "NaN,1", "much,1", "0,0", "0,-2", "0,1e9", "1e-30,1"])
def test_what_is_no_action_is_counted_and_skipped(tmp_path: Path, value: str) -> None:
    path = write_bars(tmp_path / "bars.csv", f"2020-10-30,A,1,1,1,1,1,{value}", "2020-11-02,A,1,1,1,1,1,0,2")
    before = problems("replay", "bad_action")
    assert [action.action_id for action in bar_actions(path)] == ["split:A:2020-11-02"]
    assert problems("replay", "bad_action") == before + 1


def test_bars_without_those_columns_have_no_actions(tmp_path: Path) -> None:
    path = tmp_path / "bars.csv"
    path.write_text("date,symbol,open,high,low,close\n2020-10-30,A,1,1,1,1\n2020-10-30,A,1,1,1,1,5,2\n")
    assert list(bar_actions(path)) == []
    path.write_text("date,symbol,open,high,low,close,split\n2020-10-30,A,1,1,1,1,2\n2020-10-30,B,1,1,1,1,\n")
    assert [action.action_id for action in bar_actions(path)] == ["split:A:2020-10-30"]


def test_the_recorded_year_has_11_splits_and_1550_dividends() -> None:
    actions = list(bar_actions(recorded(BARS)))
    assert Counter(type(action) for action in actions) == {SplitAction: 11, DividendAction: 1_550}
    assert len({action.action_id for action in actions}) == 1_561
    for action in actions:
        assert decode_action(encode_action(action)) == action
    ratios = {action.symbol: action.ratio for action in actions if isinstance(action, SplitAction)}
    assert (ratios["AAPL"], ratios["TSLA"], ratios["RTX"]) == ("4", "5", "1.589")
    # Of two on one day the split is first: the dividend is per new share.
    ids = [action.action_id for action in actions if action.symbol == "RTX"]
    assert ids[:2] == ["split:RTX:2020-04-03", "dividend:RTX:2020-04-03"]


def test_what_is_no_file_of_bars_is_refused(tmp_path: Path) -> None:
    clock = MarketClock(MarketClockPlan(0, 1_000, [18_565]))
    (tmp_path / "other.csv").write_text("symbol,name\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(HEADER.encode() * 50)[:30])
    (tmp_path / "not.csv.gz").write_text(HEADER)
    for name in ("other.csv", "binary.csv", "cut.csv.gz", "not.csv.gz", "absent.csv"):
        with pytest.raises(ValueError, match=name):
            make_feed(f"replay:{tmp_path / name}", clock)
    with pytest.raises(ValueError, match="has no bars"):
        plan_replay(write_bars(tmp_path / "empty.csv"), 1_000, 0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("bars.csv", ("bars.csv", 1_000)),
        ("bars.csv@2.5", ("bars.csv", 2_500)),
        ("a@b/bars.csv@10", ("a@b/bars.csv", 10_000)),
    ],
)
def test_a_replay_s_specification(spec: str, expected: tuple[str, int]) -> None:
    assert parse_replay(spec) == (Path(expected[0]), expected[1])


@pytest.mark.parametrize(
    "spec", ["bars.csv@0", "bars.csv@-1", "bars.csv@NaN", "bars.csv@fast", "bars.csv@1e9", "@2", ""]
)
def test_a_bad_replay_specification_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="replay"):
        parse_replay(spec)


def test_the_recorded_year_is_planned_and_its_first_prices_are_read() -> None:
    path = recorded(BARS)
    plan = plan_replay(path, 1_000, 5)
    assert len(plan.dates) == 266
    assert (plan.dates[0], plan.dates[-1]) == (date(2020, 4, 1), date(2021, 4, 21))
    clock = make_clock(plan.plan_json)
    assert isinstance(clock, MarketClock)
    assert clock.plan.wall_start_ns == 5
    prices = first_day_prices(path)
    assert len(prices) > 490
    assert prices["A"] == Decimal("69.47")


def test_the_recorded_year_passes_the_filter_and_every_close_is_what_remains() -> None:
    """Splits and crashes go through quarantine within the day: no session ends at a wrong price."""
    path = recorded(BARS)
    symbols = dict.fromkeys(first_day_prices(path), AssetClass.EQUITY)
    quote_filter = QuoteFilter(symbols, 1_000, 0)
    counts: Counter[Verdict] = Counter()
    for step, (at_ns, quotes) in enumerate(bar_quotes(path)):
        for quote in quotes:
            counts[quote_filter.judge(quote, at_ns)[0]] += 1
        if step % 4 == 3:
            latest = quote_filter.latest()
            assert all(Decimal(latest[q.symbol].price) == Decimal(q.price) for q in quotes if q.symbol in symbols)
    assert set(counts) == {Verdict.ACCEPTED, Verdict.QUARANTINED}
    assert sum(counts.values()) == 4 * 133_902
    assert counts[Verdict.QUARANTINED] < 100


def test_the_market_clock_of_another_file_skips_its_days(tmp_path: Path) -> None:
    path = write_bars(tmp_path / "bars.csv", *TWO_DAYS)
    later = [date(2020, 10, 30) + timedelta(days=n) for n in range(3, 5)]
    clock = make_clock(plan_market_clock(later, 1_000_000, 0))
    assert isinstance(clock, MarketClock)

    async def collect() -> list[str]:
        return [quote.symbol async for batch in ReplayFeed(path, clock).batches() for quote in batch]

    assert asyncio.run(collect()) == ["A"]
