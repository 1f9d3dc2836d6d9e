"""Performance of a portfolio over a range: the statistics of its curve, its flows and its closing fills.

All of it follows from the points of engine.equity_curve, so the curve and these figures can not disagree. Money
(averages and sums of realised P&L) is exact until it is presented; statistics are float64 of the TWR index. Ratios
are fractions, presented with 10 decimals. A figure that is undefined has a reason (`StatisticReason`) in place.

Returns
    twr                 index at the end − 1, cut at every external flow
    xirr                the r of  Σ amountᵢ × (1 + r)^(−daysᵢ / 365) = 0  over −NAV at the beginning, −flows, +NAV at
                        the end, at the instants they were booked; where several r solve it, the nearest to 0 in
                        ln(1 + r), which is sought where 10⁻¹⁵ < 1 + r < 10¹⁵. Rewards count as paid in.
    annualized return   (1 + twr)^(365 / days from the first instant with capital to the end) − 1

Days
    A day's return is index at its last point / index at the last point of the day before − 1, by UTC days. The
    first day (whole only by chance) and the running one are no whole days and do not count, neither does a day that
    starts at NAV 0. `annualization_days` is 365 when crypto was held in the range: every day counts; else 252: a day
    on which the exchange of the equities closes no session (weekends, holidays) counts as part of the next one on which
    it does. Where more than GAP_DAYS_MAX days lie between two points, the return between them belongs to no day and is
    left out.

    volatility = s × √annualization_days                      s: sample deviation (n − 1) of the returns
    sharpe     = mean / s × √annualization_days               risk-free rate 0
    sortino    = mean / d × √annualization_days               d = √(Σ min(return, 0)² / n), the target being known
    calmar     = annualized return / max drawdown

    These and the annualized return need DAYS_COUNT_MIN day returns.

Drawdown
    Of the index, at the curve's points: the deepest, the last point at the high-water mark before it (peak), where
    it was deepest first (trough), the first point back at that mark (recovery), and the drawdown at the end.

Trades
    The fills of the range that realised a gain or a loss, gross of fees. One that closes exactly at its cost is
    neither and is not counted.

    profit_factor = Σ gains / −Σ losses      expectancy = (Σ gains + Σ losses) / trades      averages per gain, loss

Months
    By UTC months: index at the last point of a month / index at the last point before it − 1. The product of all
    (1 + return) is 1 + twr. A month without a point is a gap; its return is part of the next one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise

import numpy as np

from engine.amounts import average, ratio
from engine.equity_curve import INDEX_NOISE, RATIO_MAX, CurvePoint, Flow, present_ratio
from engine.instants import DAY_NS
from engine.sessions import Sessions

DAYS_COUNT_MIN = 20
GAP_DAYS_MAX = 4  # a long weekend: Thursday's last point to Monday's
DAYS_PER_YEAR = 365
SESSIONS_PER_YEAR = 252

# XIRR is sought as x = ln(1 + r), which bounds both sides alike: r from −1 + 10⁻¹⁵ to 10¹⁵.
_LOG_RATE_STEP = 0.001
_LOG_RATE_MAX = math.log(RATIO_MAX)
_BISECTIONS = 60  # of at most 2 × 34.5: down to float64's own resolution
_MONDAY = 4  # 1970-01-01, day 0, was a Thursday


class StatisticReason(StrEnum):
    NO_HISTORY = "NO_HISTORY"
    NAV_NOT_POSITIVE = "NAV_NOT_POSITIVE"
    TOO_FEW_DAYS = "TOO_FEW_DAYS"
    NO_VARIATION = "NO_VARIATION"
    NO_LOSING_DAY = "NO_LOSING_DAY"
    NO_DRAWDOWN = "NO_DRAWDOWN"
    NOT_RECOVERED = "NOT_RECOVERED"
    NO_SIGN_CHANGE = "NO_SIGN_CHANGE"
    NO_TRADES = "NO_TRADES"
    NO_GAINS = "NO_GAINS"
    NO_LOSSES = "NO_LOSSES"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    PRICES_NOT_RECORDED = "PRICES_NOT_RECORDED"


class Statistic(StrEnum):
    TWR = "TWR"
    XIRR = "XIRR"
    ANNUALIZED_RETURN = "ANNUALIZED_RETURN"
    VOLATILITY = "VOLATILITY"
    SHARPE = "SHARPE"
    SORTINO = "SORTINO"
    CALMAR = "CALMAR"
    MAX_DRAWDOWN = "MAX_DRAWDOWN"
    MAX_DRAWDOWN_PEAK_AT = "MAX_DRAWDOWN_PEAK_AT"
    MAX_DRAWDOWN_TROUGH_AT = "MAX_DRAWDOWN_TROUGH_AT"
    MAX_DRAWDOWN_RECOVERED_AT = "MAX_DRAWDOWN_RECOVERED_AT"
    CURRENT_DRAWDOWN = "CURRENT_DRAWDOWN"
    BEST_DAY = "BEST_DAY"
    WORST_DAY = "WORST_DAY"
    DAY_WIN_RATE = "DAY_WIN_RATE"
    TRADE_WIN_RATE = "TRADE_WIN_RATE"
    PROFIT_FACTOR = "PROFIT_FACTOR"
    AVERAGE_WIN = "AVERAGE_WIN"
    AVERAGE_LOSS = "AVERAGE_LOSS"
    EXPECTANCY = "EXPECTANCY"


# A statistic, or why there is none.
Outcome = float | StatisticReason
Figure = Decimal | StatisticReason


@dataclass(frozen=True, slots=True)
class Trades:
    """Fills that realised something: `gains` ≥ 0 and `losses` ≤ 0 are sums in micro-units."""

    wins_count: int
    losses_count: int
    gains: int
    losses: int


@dataclass(frozen=True, slots=True)
class DayReturn:
    """`day` counts UTC days since 1970."""

    day: int
    value: float


@dataclass(frozen=True, slots=True)
class MonthReturn:
    """`value` is None where the index is; the range's first and running months are not `complete`."""

    year: int
    month: int
    value: Decimal | None
    complete: bool


@dataclass(frozen=True, slots=True)
class Drawdown:
    """The deepest drawdown; `recovered_at_ns` is None as long as the index is below its peak."""

    depth: float
    peak_at_ns: int
    trough_at_ns: int
    recovered_at_ns: int | None


@dataclass(frozen=True, slots=True)
class Performance:
    """`figures` has ratios and money by statistic; `best_day` … are None for the reason in `undefined`."""

    begun_at_ns: int | None
    ended_at_ns: int | None
    annualization_days: int
    days_count: int
    figures: dict[Statistic, Decimal]
    undefined: dict[Statistic, StatisticReason]
    drawdown: Drawdown | None
    best_day: DayReturn | None
    worst_day: DayReturn | None
    months: list[MonthReturn]


def measure(
    points: Sequence[CurvePoint],
    flows: Sequence[Flow],
    trades: Trades,
    annualization_days: int,
    sessions: Sessions | None = None,
) -> Performance:
    """The performance over ascending `points`, with the `flows` between them in ledger order.

    `sessions` are those that 252 days a year are counted by; without them all days but weekends are.
    """
    begun_at_ns = _begun_at_ns(points, flows) if points else None
    returns = day_returns(points, annualization_days, sessions)
    deepest = max_drawdown(points)
    statistics = _statistics(points, flows, returns, deepest, annualization_days)
    figures: dict[Statistic, Figure] = {name: _shown(value) for name, value in statistics.items()}
    figures |= trade_figures(trades)
    undefined = {name: value for name, value in figures.items() if isinstance(value, StatisticReason)}
    undefined |= _undefined_instants(deepest) | _undefined_days(returns)
    days = [] if isinstance(returns, StatisticReason) else returns
    return Performance(
        begun_at_ns=begun_at_ns,
        ended_at_ns=points[-1].at_ns if points else None,
        annualization_days=annualization_days,
        days_count=len(days),
        figures={name: value for name, value in figures.items() if isinstance(value, Decimal)},
        undefined=undefined,
        drawdown=deepest if isinstance(deepest, Drawdown) and deepest.depth else None,
        best_day=max(days, key=_value, default=None),
        worst_day=min(days, key=_value, default=None),
        months=month_returns(points, begun_at_ns),
    )


def _statistics(
    points: Sequence[CurvePoint],
    flows: Sequence[Flow],
    returns: list[DayReturn] | StatisticReason,
    deepest: Drawdown | StatisticReason,
    annualization_days: int,
) -> dict[Statistic, Outcome]:
    total = twr(points)
    if isinstance(returns, StatisticReason):
        annual: Outcome = returns
        daily = dict.fromkeys((Statistic.VOLATILITY, Statistic.SHARPE, Statistic.SORTINO), annual)
        daily[Statistic.DAY_WIN_RATE] = returns
    else:
        values = [one.value for one in returns]
        annual = annualized_return(total, points[-1].at_ns - _begun_at_ns(points, flows), len(values))
        daily = {
            Statistic.VOLATILITY: volatility(values, annualization_days),
            Statistic.SHARPE: sharpe(values, annualization_days),
            Statistic.SORTINO: sortino(values, annualization_days),
            Statistic.DAY_WIN_RATE: _share_above_zero(values),
        }
    return daily | {
        Statistic.TWR: total,
        Statistic.XIRR: xirr(_investor_cash(points, flows)) if len(points) > 1 else StatisticReason.NO_HISTORY,
        Statistic.ANNUALIZED_RETURN: annual,
        Statistic.CALMAR: calmar(annual, deepest),
        Statistic.MAX_DRAWDOWN: deepest.depth if isinstance(deepest, Drawdown) else deepest,
        Statistic.CURRENT_DRAWDOWN: _current_drawdown(points),
    }


# -- returns --------------------------------------------------------------------------------------------------


def twr(points: Sequence[CurvePoint]) -> Outcome:
    if len(points) < 2:
        return StatisticReason.NO_HISTORY
    index = points[-1].index
    return StatisticReason.NAV_NOT_POSITIVE if index is None else index - 1


def annualized_return(
    total: Outcome, elapsed_ns: int, days_count: int, days_count_min: int = DAYS_COUNT_MIN
) -> Outcome:
    if isinstance(total, StatisticReason):
        return total
    if days_count < days_count_min or elapsed_ns <= 0:
        return StatisticReason.TOO_FEW_DAYS
    if total < -1:
        return StatisticReason.NAV_NOT_POSITIVE
    try:
        return float((1 + total) ** (DAYS_PER_YEAR * DAY_NS / elapsed_ns)) - 1
    except OverflowError:
        return StatisticReason.OUT_OF_RANGE


def xirr(cash: Sequence[tuple[int, int]]) -> Outcome:
    """The yearly rate at which (instant in ns, amount) are worth 0 together; paid in is negative."""
    amounts = np.array([amount for _, amount in cash], dtype=np.float64)
    if not (amounts > 0).any() or not (amounts < 0).any():
        return StatisticReason.NO_SIGN_CHANGE
    years = np.array([at_ns - cash[0][0] for at_ns, _ in cash], dtype=np.float64) / (DAYS_PER_YEAR * DAY_NS)

    def worth(log_rate: float) -> float:
        exponents = -log_rate * years
        # A factor common to all amounts moves no root and keeps the largest power at 1.
        return float(amounts @ np.exp(exponents - exponents.max()))

    bracket = _bracket(worth)
    return StatisticReason.NO_SIGN_CHANGE if bracket is None else math.expm1(_bisect(worth, *bracket))


def _bracket(worth: Callable[[float], float]) -> tuple[float, float] | None:
    """The interval nearest to 0, of those that double in length on both sides, over which `worth` changes sign."""
    inner, outer = 0.0, _LOG_RATE_STEP
    while inner < _LOG_RATE_MAX:
        outer = min(outer, _LOG_RATE_MAX)
        for low, high in ((inner, outer), (-outer, -inner)):
            if worth(low) * worth(high) <= 0:
                return low, high
        inner, outer = outer, outer * 2
    return None


def _bisect(worth: Callable[[float], float], low: float, high: float) -> float:
    rising = worth(high) > worth(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if (worth(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _investor_cash(points: Sequence[CurvePoint], flows: Sequence[Flow]) -> list[tuple[int, int]]:
    paid = [(flow.at_ns, -flow.amount) for flow in flows]
    return [(points[0].at_ns, -points[0].nav), *paid, (points[-1].at_ns, points[-1].nav)]


def _begun_at_ns(points: Sequence[CurvePoint], flows: Sequence[Flow]) -> int:
    """The first instant with capital: the beginning, or the first flow into nothing."""
    return flows[0].at_ns if flows and not points[0].nav else points[0].at_ns


# -- days -----------------------------------------------------------------------------------------------------


def day_returns(
    points: Sequence[CurvePoint], annualization_days: int, sessions: Sessions | None = None
) -> list[DayReturn] | StatisticReason:
    """The returns of whole days, ascending. NAV_NOT_POSITIVE when one of them has none."""
    if len(points) < 2:
        return StatisticReason.NO_HISTORY
    closes = {point.at_ns // DAY_NS: point for point in points}
    closes.pop(points[-1].at_ns // DAY_NS)
    days = [day for day in closes if annualization_days == DAYS_PER_YEAR or _is_session(day, sessions)]
    returns = []
    for before, day in pairwise(days):
        start, end = closes[before], closes[day]
        if start.nav == 0 or day - before > GAP_DAYS_MAX:
            continue
        if start.index is None or end.index is None or start.index <= 0:
            return StatisticReason.NAV_NOT_POSITIVE
        value = end.index / start.index - 1
        returns.append(DayReturn(day, value if abs(value) > INDEX_NOISE else 0))
    return returns


# All portfolios' curves have the same days.
@lru_cache(maxsize=4_096)
def _is_session(day: int, sessions: Sessions | None) -> bool:
    if sessions is None:
        return (day - _MONDAY) % 7 < 5
    return sessions.next_close(day * DAY_NS - 1) < (day + 1) * DAY_NS


def volatility(returns: Sequence[float], annualization_days: int, count_min: int = DAYS_COUNT_MIN) -> Outcome:
    if len(returns) < max(count_min, 2):
        return StatisticReason.TOO_FEW_DAYS
    return _sample_deviation(returns) * math.sqrt(annualization_days)


def sharpe(returns: Sequence[float], annualization_days: int, count_min: int = DAYS_COUNT_MIN) -> Outcome:
    if len(returns) < max(count_min, 2):
        return StatisticReason.TOO_FEW_DAYS
    deviation = _sample_deviation(returns)
    if deviation <= INDEX_NOISE:
        return StatisticReason.NO_VARIATION
    return _mean(returns) / deviation * math.sqrt(annualization_days)


def sortino(returns: Sequence[float], annualization_days: int, count_min: int = DAYS_COUNT_MIN) -> Outcome:
    if len(returns) < max(count_min, 1):
        return StatisticReason.TOO_FEW_DAYS
    downside = math.sqrt(math.fsum(min(value, 0) ** 2 for value in returns) / len(returns))
    if not downside:
        return StatisticReason.NO_LOSING_DAY
    return _mean(returns) / downside * math.sqrt(annualization_days)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _sample_deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _share_above_zero(values: Sequence[float]) -> Outcome:
    return sum(value > 0 for value in values) / len(values) if values else StatisticReason.TOO_FEW_DAYS


def _undefined_days(returns: list[DayReturn] | StatisticReason) -> dict[Statistic, StatisticReason]:
    reason = returns if isinstance(returns, StatisticReason) else StatisticReason.TOO_FEW_DAYS
    return {} if isinstance(returns, list) and returns else {Statistic.BEST_DAY: reason, Statistic.WORST_DAY: reason}


# -- drawdown -------------------------------------------------------------------------------------------------


def max_drawdown(points: Sequence[CurvePoint]) -> Drawdown | StatisticReason:
    """The deepest drawdown of the points' index, of depth 0 when there is none."""
    if len(points) < 2:
        return StatisticReason.NO_HISTORY
    if points[-1].index is None:
        return StatisticReason.NAV_NOT_POSITIVE
    trough = max(range(len(points)), key=lambda at: points[at].drawdown or 0)
    high = points[trough].high_water_mark
    assert high is not None
    peak = max(at for at in range(trough + 1) if not points[at].drawdown)
    recovered = next((point.at_ns for point in points[trough:] if _is_back(point, high)), None)
    return Drawdown(points[trough].drawdown or 0, points[peak].at_ns, points[trough].at_ns, recovered)


def _is_back(point: CurvePoint, high: float) -> bool:
    return point.index is not None and point.index >= high * (1 - INDEX_NOISE)


def calmar(annual: Outcome, deepest: Drawdown | StatisticReason) -> Outcome:
    if isinstance(deepest, StatisticReason):
        return deepest
    if isinstance(annual, StatisticReason):
        return annual
    return annual / deepest.depth if deepest.depth else StatisticReason.NO_DRAWDOWN


def _current_drawdown(points: Sequence[CurvePoint]) -> Outcome:
    if len(points) < 2:
        return StatisticReason.NO_HISTORY
    drawdown = points[-1].drawdown
    return StatisticReason.NAV_NOT_POSITIVE if drawdown is None else drawdown


def _undefined_instants(deepest: Drawdown | StatisticReason) -> dict[Statistic, StatisticReason]:
    instants = (Statistic.MAX_DRAWDOWN_PEAK_AT, Statistic.MAX_DRAWDOWN_TROUGH_AT, Statistic.MAX_DRAWDOWN_RECOVERED_AT)
    if isinstance(deepest, StatisticReason):
        return dict.fromkeys(instants, deepest)
    if not deepest.depth:
        return dict.fromkeys(instants, StatisticReason.NO_DRAWDOWN)
    recovered = deepest.recovered_at_ns is not None
    return {} if recovered else {Statistic.MAX_DRAWDOWN_RECOVERED_AT: StatisticReason.NOT_RECOVERED}


# -- months ---------------------------------------------------------------------------------------------------


def month_returns(points: Sequence[CurvePoint], begun_at_ns: int | None) -> list[MonthReturn]:
    """The months with points, ascending, from the one with the first capital to the running one."""
    if len(points) < 2 or begun_at_ns is None:
        return []
    days = {point.at_ns // DAY_NS: point for point in points}
    closes = {_month(day): point for day, point in days.items()}
    first, last = _month(begun_at_ns // DAY_NS), _month(points[-1].at_ns // DAY_NS)
    months, before = [], points[0].index
    for (year, month), close in closes.items():
        if (year, month) >= first:
            value = None
            if close.index is not None and before is not None and before > 0:
                value = present_ratio(close.index / before - 1)
            complete = first < (year, month) < last
            months.append(MonthReturn(year, month, value, complete))
        before = close.index
    return months


def _month(day: int) -> tuple[int, int]:
    instant = datetime.fromtimestamp(day * 86_400, UTC)
    return instant.year, instant.month


# -- trades ---------------------------------------------------------------------------------------------------


def trade_figures(trades: Trades) -> dict[Statistic, Figure]:
    """Exact figures of the closing fills; amounts in the base currency."""
    wins_count, losses_count = trades.wins_count, trades.losses_count
    gains, losses, count = trades.gains, trades.losses, wins_count + losses_count
    no_gains = StatisticReason.NO_GAINS if count else StatisticReason.NO_TRADES
    no_losses = StatisticReason.NO_LOSSES if count else StatisticReason.NO_TRADES
    win_rate, profit_factor = ratio(wins_count, count), ratio(gains, -losses)
    return {
        Statistic.TRADE_WIN_RATE: no_gains if win_rate is None else win_rate,
        Statistic.PROFIT_FACTOR: no_losses if profit_factor is None else profit_factor,
        Statistic.EXPECTANCY: average(gains + losses, Decimal(count)) if count else no_gains,
        Statistic.AVERAGE_WIN: average(gains, Decimal(wins_count)) if wins_count else no_gains,
        Statistic.AVERAGE_LOSS: average(losses, Decimal(losses_count)) if losses_count else no_losses,
    }


def _shown(value: Outcome) -> Figure:
    if isinstance(value, StatisticReason):
        return value
    shown = present_ratio(value)
    return StatisticReason.OUT_OF_RANGE if shown is None else shown


def _value(one: DayReturn) -> float:
    return one.value
