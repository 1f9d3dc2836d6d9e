"""Performance against hand computations, the statistics module and empyrical; and why a figure is undefined."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.equity_curve import CurvePoint, EquityPoint, Flow, curve
from engine.marks import MarkQuality
from engine.performance import (
    DAY_NS,
    MonthReturn,
    Performance,
    Statistic,
    StatisticReason,
    Trades,
    annualized_return,
    calmar,
    day_returns,
    max_drawdown,
    measure,
    sharpe,
    sortino,
    trade_figures,
    twr,
    volatility,
    xirr,
)
from engine.sessions import sessions_of

MICRO = 1_000_000
NO_TRADES = Trades(0, 0, 0, 0)
MONDAY = datetime(2026, 1, 5, 23, tzinfo=UTC)
GOLDEN_RETURNS = [0.01, -0.005, 0.002, 0.004]

daily = st.lists(st.floats(-0.2, 0.25).map(lambda value: round(value, 6)), min_size=25, max_size=80)


def ns(instant: datetime) -> int:
    return round((instant - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)) * 1_000


def points_of(navs: Sequence[int], begin: datetime = MONDAY, every: timedelta = timedelta(days=1)) -> list[CurvePoint]:
    """One point a day from `begin` on, NAVs in whole units."""
    measured = [
        EquityPoint(ns(begin + at * every), nav * MICRO, MarkQuality.LIVE, 0) for at, nav in enumerate(navs) if nav >= 0
    ]
    return curve(measured, [])


def earning(returns: Sequence[float], begin: datetime = MONDAY) -> list[CurvePoint]:
    """A point a day that earns these returns, and a running day at the end."""
    navs = list(accumulate(returns, lambda nav, value: nav * (1 + value), initial=1e9))
    return points_of([round(nav) for nav in [*navs, navs[-1]]], begin)


def measured(navs: Sequence[int], days: int = 365) -> Performance:
    return measure(points_of(navs), [], NO_TRADES, days)


# -- days -----------------------------------------------------------------------------------------------------


def test_golden_vector_9_sharpe_in_both_annualisations() -> None:
    assert round(float(sharpe(GOLDEN_RETURNS, 252, count_min=0)), 4) == 7.0586
    assert round(float(sharpe(GOLDEN_RETURNS, 365, count_min=0)), 4) == 8.4950
    assert sharpe(GOLDEN_RETURNS, 252) is StatisticReason.TOO_FEW_DAYS


@given(daily.filter(lambda values: len(set(values)) > 1 and min(values) < -1e-9), st.sampled_from([252, 365]))
def test_daily_statistics_agree_with_empyrical(returns: list[float], days: int) -> None:
    empyrical = pytest.importorskip("empyrical", reason="the extra `statistics` is not installed")
    array = np.array(returns)
    assert volatility(returns, days) == pytest.approx(empyrical.annual_volatility(array, annualization=days), rel=1e-9)
    assert sharpe(returns, days) == pytest.approx(empyrical.sharpe_ratio(array, annualization=days), rel=1e-6, abs=1e-9)
    assert sortino(returns, days) == pytest.approx(
        empyrical.sortino_ratio(array, annualization=days), rel=1e-6, abs=1e-9
    )


@given(daily)
def test_drawdown_and_return_agree_with_empyrical(returns: list[float]) -> None:
    empyrical = pytest.importorskip("empyrical", reason="the extra `statistics` is not installed")
    points = earning(returns)
    array = np.array(returns)
    deepest = max_drawdown(points)
    assert not isinstance(deepest, StatisticReason)
    assert deepest.depth == pytest.approx(-empyrical.max_drawdown(array), abs=1e-7)
    assert twr(points) == pytest.approx(empyrical.cum_returns_final(array), abs=1e-6)
    days = day_returns(points, 365)
    assert not isinstance(days, StatisticReason)
    assert [one.value for one in days] == pytest.approx(returns, abs=1e-6)


def test_daily_statistics_by_hand() -> None:
    returns = [0.01, -0.02, 0.03, 0.0, -0.01] * 5
    root = math.sqrt(252)
    deviation, mean = statistics.stdev(returns), statistics.mean(returns)
    downside = math.sqrt((0.02**2 + 0.01**2) / 5)
    found = measure(earning(returns), [], NO_TRADES, 365).figures
    assert float(found[Statistic.VOLATILITY]) == pytest.approx(deviation * math.sqrt(365), abs=1e-6)
    assert volatility(returns, 252) == pytest.approx(deviation * root, rel=1e-12)
    assert sharpe(returns, 252) == pytest.approx(mean / deviation * root, rel=1e-12)
    assert sortino(returns, 252) == pytest.approx(mean / downside * root, rel=1e-12)
    assert found[Statistic.DAY_WIN_RATE] == Decimal("0.4")


def test_first_and_running_day_do_not_count() -> None:
    hours = [100 + at for at in range(60)]  # from Monday 23:00 to Thursday 10:00, hourly
    points = points_of(hours, every=timedelta(hours=1))
    days = day_returns(points, 252)
    assert not isinstance(days, StatisticReason)
    assert [one.day for one in days] == [ns(MONDAY) // DAY_NS + 1, ns(MONDAY) // DAY_NS + 2]
    assert [one.value for one in days] == pytest.approx([124 / 100 - 1, 148 / 124 - 1])


def test_a_weekend_belongs_to_monday_with_252_days_and_to_itself_with_365() -> None:
    friday = MONDAY - timedelta(days=3)
    points = points_of([100, 110, 121, 133, 133], friday)
    sessions, every_day = day_returns(points, 252), day_returns(points, 365)
    assert not isinstance(sessions, StatisticReason) and not isinstance(every_day, StatisticReason)
    assert [one.value for one in sessions] == pytest.approx([0.33])
    assert [one.value for one in every_day] == pytest.approx([0.1, 0.1, 133 / 121 - 1])


@pytest.mark.parametrize(("missing", "count"), [(3, 2), (4, 1)])
def test_a_return_over_a_long_gap_belongs_to_no_day(missing: int, count: int) -> None:
    points = points_of([100, 110, *[-1] * missing, 150, 150])
    days = day_returns(points, 365)
    assert not isinstance(days, StatisticReason)
    assert len(days) == count
    assert twr(points) == pytest.approx(0.5)


def test_a_day_that_starts_with_nothing_does_not_count() -> None:
    begin = ns(MONDAY)
    navs, sequences = [0, 0, 110, 121, 121], [0, 0, 1, 1, 1]
    rows = enumerate(zip(navs, sequences, strict=True))
    points = [EquityPoint(begin + at * DAY_NS, nav, MarkQuality.LIVE, sequence) for at, (nav, sequence) in rows]
    days = day_returns(curve(points, [Flow(begin + 2 * DAY_NS - 1, 1, 100, 0)]), 365)
    assert not isinstance(days, StatisticReason)
    assert [(one.day - begin // DAY_NS, one.value) for one in days] == [(3, pytest.approx(0.1))]


def test_best_and_worst_day() -> None:
    found = measured([100, 110, 99, 101, 500])
    assert found.best_day is not None and found.worst_day is not None
    assert (found.best_day.day, found.best_day.value) == (ns(MONDAY) // DAY_NS + 1, pytest.approx(0.1))
    assert (found.worst_day.day, found.worst_day.value) == (ns(MONDAY) // DAY_NS + 2, pytest.approx(-0.1))
    assert (found.days_count, found.figures[Statistic.DAY_WIN_RATE]) == (3, Decimal("0.6666666667"))


def test_rounding_of_a_flow_is_no_gain_or_loss() -> None:
    measured_at = [EquityPoint(ns(MONDAY) + at * DAY_NS, 100 + 7 * at, MarkQuality.LIVE, at) for at in range(30)]
    flows = [Flow(ns(MONDAY) + at * DAY_NS, at, 7, 93 + 7 * at) for at in range(1, 30)]
    found = measure(curve(measured_at, flows), flows, NO_TRADES, 365)
    assert found.figures[Statistic.DAY_WIN_RATE] == found.figures[Statistic.VOLATILITY] == 0
    assert found.undefined[Statistic.SHARPE] is StatisticReason.NO_VARIATION
    assert found.undefined[Statistic.SORTINO] is StatisticReason.NO_LOSING_DAY
    assert found.undefined[Statistic.CALMAR] is StatisticReason.NO_DRAWDOWN


# -- returns over the range -----------------------------------------------------------------------------------


def test_annualized_return_by_calendar_days() -> None:
    assert annualized_return(0.21, 730 * DAY_NS, 20) == pytest.approx(0.1)
    assert annualized_return(-1, 730 * DAY_NS, 20) == -1
    assert annualized_return(0.21, 730 * DAY_NS, 19) is StatisticReason.TOO_FEW_DAYS
    assert annualized_return(0.21, 0, 20) is StatisticReason.TOO_FEW_DAYS
    assert annualized_return(-1.5, 730 * DAY_NS, 20) is StatisticReason.NAV_NOT_POSITIVE
    assert annualized_return(1e14, DAY_NS, 20) is StatisticReason.OUT_OF_RANGE


def test_annualized_return_begins_with_the_first_capital() -> None:
    begin = ns(MONDAY)
    navs = [0, 0, 0, *[100] * 29, 121]
    points = [EquityPoint(begin + at * 365 * DAY_NS // 32, nav, MarkQuality.LIVE, at) for at, nav in enumerate(navs)]
    flow = Flow(points[-1].at_ns - 730 * DAY_NS, 3, 100, 0)
    found = measure(curve(points, [flow]), [flow], NO_TRADES, 365)
    assert found.begun_at_ns == flow.at_ns
    assert found.undefined[Statistic.ANNUALIZED_RETURN] is StatisticReason.TOO_FEW_DAYS
    assert found.figures[Statistic.TWR] == Decimal("0.21")


def test_xirr_of_a_published_example() -> None:
    """The example in the manual of a spreadsheet's XIRR: 0.373362535."""
    dates = [(2008, 1, 1), (2008, 3, 1), (2008, 10, 30), (2009, 2, 15), (2009, 4, 1)]
    amounts = [-10_000, 2_750, 4_250, 3_250, 2_750]
    cash = [(ns(datetime(*date, tzinfo=UTC)), amount) for date, amount in zip(dates, amounts, strict=True)]
    assert xirr(cash) == pytest.approx(0.373362535, abs=1e-8)


@pytest.mark.parametrize(
    ("cash", "expected"),
    [
        ([(0, -100), (365, 110)], 0.1),
        ([(0, -100), (365, 100)], 0),
        ([(0, -100), (730, 25)], -0.5),
        ([(0, 0), (100, -100), (465, 300)], 2),
        ([(0, -100), (365, 230), (730, -132)], 0.1),  # 0.1 and 0.2 solve it
    ],
)
def test_xirr(cash: list[tuple[int, int]], expected: float) -> None:
    assert xirr([(day * DAY_NS, amount) for day, amount in cash]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "cash",
    [
        [(0, 0), (365, 0)],
        [(0, -100), (365, -50)],
        [(0, 0), (365, 10)],
        [(0, -1), (1e-9, 2)],
        [(0, 1), (365, -3), (730, 4)],
    ],
    ids=["nothing", "less than lost", "out of nothing", "too fast", "complex"],
)
def test_xirr_without_a_rate(cash: list[tuple[float, int]]) -> None:
    assert xirr([(round(day * DAY_NS), amount) for day, amount in cash]) is StatisticReason.NO_SIGN_CHANGE


@given(st.lists(st.tuples(st.integers(1, 1_000), st.integers(1, 10**9)), min_size=1, max_size=12), st.floats(0.3, 3))
def test_xirr_solves_its_equation(paid: list[tuple[int, int]], grown: float) -> None:
    end = max(day for day, _ in paid) + 100
    cash = [(day * DAY_NS, -amount) for day, amount in sorted(paid)]
    cash.append((end * DAY_NS, max(1, round(sum(amount for _, amount in paid) * grown))))
    rate = xirr(cash)
    assert not isinstance(rate, StatisticReason)
    worth = [amount * (1 + rate) ** (-at_ns / DAY_NS / 365) for at_ns, amount in cash]
    assert math.fsum(worth) == pytest.approx(0, abs=1e-9 * math.fsum(map(abs, worth)))


def test_xirr_of_a_measured_range_counts_flows_and_both_ends() -> None:
    begin = ns(MONDAY)
    points = [EquityPoint(begin, 100, MarkQuality.LIVE, 0), EquityPoint(begin + 730 * DAY_NS, 231, MarkQuality.LIVE, 1)]
    flow = Flow(begin + 365 * DAY_NS, 1, 100, 110)
    found = measure(curve(points, [flow]), [flow], NO_TRADES, 365)
    assert found.figures[Statistic.XIRR] == Decimal("0.1")
    assert found.figures[Statistic.TWR] == Decimal("0.21")
    assert found.begun_at_ns == begin


# -- drawdown -------------------------------------------------------------------------------------------------


def test_golden_vector_8() -> None:
    found = measured([100, 120, 90, 130, 117])
    assert found.figures[Statistic.MAX_DRAWDOWN] == Decimal("0.25")
    assert found.figures[Statistic.CURRENT_DRAWDOWN] == Decimal("0.1")
    assert found.drawdown is not None
    at = [ns(MONDAY) + day * DAY_NS for day in range(5)]
    instants = (found.drawdown.peak_at_ns, found.drawdown.trough_at_ns, found.drawdown.recovered_at_ns)
    assert instants == (at[1], at[2], at[3])


def test_a_drawdown_that_is_not_recovered_says_so() -> None:
    found = measured([100, 100, 80, 80, 99])
    assert found.drawdown is not None
    assert found.drawdown.peak_at_ns == ns(MONDAY) + DAY_NS
    assert found.drawdown.trough_at_ns == ns(MONDAY) + 2 * DAY_NS
    assert found.undefined[Statistic.MAX_DRAWDOWN_RECOVERED_AT] is StatisticReason.NOT_RECOVERED


def test_without_a_drawdown_it_is_zero_and_has_no_instants() -> None:
    found = measured([100, 101, 101, 105])
    assert (found.drawdown, found.figures[Statistic.MAX_DRAWDOWN]) == (None, 0)
    assert found.undefined[Statistic.MAX_DRAWDOWN_TROUGH_AT] is StatisticReason.NO_DRAWDOWN


def test_calmar() -> None:
    deepest = max_drawdown(points_of([100, 80, 90]))
    assert calmar(0.1, deepest) == pytest.approx(0.5)
    assert calmar(StatisticReason.TOO_FEW_DAYS, deepest) is StatisticReason.TOO_FEW_DAYS


# -- months ---------------------------------------------------------------------------------------------------


def test_months() -> None:
    points = points_of([100, 110, 99, 99, 198], datetime(2025, 12, 20, tzinfo=UTC), timedelta(days=15))
    assert measure(points, [], NO_TRADES, 365).months == [
        MonthReturn(2025, 12, Decimal(0), False),
        MonthReturn(2026, 1, Decimal("-0.01"), True),  # 4 and 19 January
        MonthReturn(2026, 2, Decimal("1"), False),  # 3 and 18 February
    ]


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=60), st.integers(1, 40))
def test_months_multiply_to_the_whole(navs: list[int], every_days: int) -> None:
    points = points_of(navs, every=timedelta(days=every_days))
    months = measure(points, [], NO_TRADES, 365).months
    product = math.prod(1 + (one.value or Decimal(0)) for one in months)
    assert float(product) == pytest.approx(navs[-1] / navs[0], rel=1e-3, abs=1e-3)
    assert [(one.year, one.month) for one in months] == sorted({(one.year, one.month) for one in months})


# -- trades ---------------------------------------------------------------------------------------------------


def test_trades_are_exact() -> None:
    found = trade_figures(Trades(3, 1, 75 * MICRO + 1, -25 * MICRO))
    assert found == {
        Statistic.TRADE_WIN_RATE: Decimal("0.75"),
        Statistic.PROFIT_FACTOR: Decimal("3.00000004"),
        Statistic.EXPECTANCY: Decimal("12.50000025"),
        Statistic.AVERAGE_WIN: Decimal("25.0000003333"),
        Statistic.AVERAGE_LOSS: Decimal("-25"),
    }


def test_trades_without_losses_gains_or_any() -> None:
    only_gains, only_losses = trade_figures(Trades(2, 0, 10, 0)), trade_figures(Trades(0, 2, 0, -10))
    assert only_gains[Statistic.PROFIT_FACTOR] is only_gains[Statistic.AVERAGE_LOSS] is StatisticReason.NO_LOSSES
    assert only_gains[Statistic.TRADE_WIN_RATE] == 1
    assert only_losses[Statistic.AVERAGE_WIN] is StatisticReason.NO_GAINS
    assert (only_losses[Statistic.PROFIT_FACTOR], only_losses[Statistic.TRADE_WIN_RATE]) == (0, 0)
    assert set(trade_figures(NO_TRADES).values()) == {StatisticReason.NO_TRADES}


# -- what is undefined ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("navs", [[], [100]])
def test_without_history_everything_says_so(navs: list[int]) -> None:
    found = measured(navs)
    assert found.figures == {}
    reasons = {found.undefined[name] for name in Statistic if "TRADE" not in name and "WIN" not in name}
    assert reasons >= {StatisticReason.NO_HISTORY}
    assert found.undefined[Statistic.TWR] is found.undefined[Statistic.SHARPE] is StatisticReason.NO_HISTORY
    assert set(found.undefined) == set(Statistic)


def test_a_nav_that_starts_below_zero_leaves_no_return_but_money_weighted() -> None:
    begin = ns(MONDAY)
    points = [EquityPoint(begin + at * DAY_NS, nav, MarkQuality.LIVE, at) for at, nav in enumerate([-10, 90, 120])]
    flow = Flow(begin + DAY_NS, 1, 100, -10)
    found = measure(curve(points, [flow]), [flow], NO_TRADES, 365)
    for name in (Statistic.TWR, Statistic.SHARPE, Statistic.MAX_DRAWDOWN, Statistic.CURRENT_DRAWDOWN):
        assert found.undefined[name] is StatisticReason.NAV_NOT_POSITIVE
    assert [one.value for one in found.months] == [None]


def test_an_absurd_gain_is_out_of_range() -> None:
    found = measured([0, 1, 2**59])
    assert Statistic.TWR in found.figures
    points = [EquityPoint(ns(MONDAY) + at, nav, MarkQuality.LIVE, 0) for at, nav in enumerate([1, 2**59])]
    assert measure(curve(points, []), [], NO_TRADES, 365).undefined[Statistic.TWR] is StatisticReason.OUT_OF_RANGE


@given(st.lists(st.integers(0, 10**6), max_size=60), st.sampled_from([252, 365]))
def test_every_statistic_has_a_value_or_a_reason(navs: list[int], days: int) -> None:
    found = measure(points_of(navs), [], NO_TRADES, days)
    instants = {name for name in Statistic if name.endswith("_AT") or name in ("BEST_DAY", "WORST_DAY")}
    assert not set(found.figures) & set(found.undefined)
    assert set(found.figures) | set(found.undefined) | instants == set(Statistic)
    assert all(value.is_finite() for value in found.figures.values())
    assert (found.best_day is None) == (Statistic.BEST_DAY in found.undefined)
    assert (found.drawdown is None) == (Statistic.MAX_DRAWDOWN_PEAK_AT in found.undefined)


# -- the exchange's days --------------------------------------------------------------------------------------


def test_a_holiday_is_no_day_of_252_and_its_return_is_the_next_ones() -> None:
    """Thanksgiving (Thursday 2025-11-27) and the weekend after it; the Friday closes early, and is a day."""
    points = points_of([100, 101, 102, 103, 104, 105, 106, 110], datetime(2025, 11, 25, 23, tzinfo=UTC))
    sessions = sessions_of("XNYS")
    days = day_returns(points, 252, sessions)
    assert isinstance(days, list)
    first = ns(datetime(2025, 11, 25, tzinfo=UTC)) // DAY_NS
    assert [one.day - first for one in days] == [1, 3, 6]
    assert [one.value for one in days] == pytest.approx([101 / 100 - 1, 103 / 101 - 1, 106 / 103 - 1])
    plain = day_returns(points, 252)
    assert isinstance(plain, list)
    assert [one.day - first for one in plain] == [1, 2, 3, 6]
    assert isinstance(every := day_returns(points, 365, sessions), list)
    assert len(every) == 6


def test_the_exchanges_days_are_those_of_a_year() -> None:
    """2024 had 252 sessions; the first is where the returns start, and the last point's day is running."""
    points = points_of(list(range(1_000, 1_367)), datetime(2024, 1, 1, 23, tzinfo=UTC))
    days = day_returns(points, 252, sessions_of("XNYS"))
    assert isinstance(days, list)
    assert len(days) == 251
    assert math.prod(1 + one.value for one in days) == pytest.approx(1_365 / 1_001)
