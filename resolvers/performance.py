"""Performance of a portfolio over a range (engine.performance), from the same points as its equity curve."""

from __future__ import annotations

import asyncio
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.assets import AssetClass
from engine.equity_curve import present_ratio
from engine.instants import DAY_NS, to_datetime
from engine.performance import (
    DAYS_PER_YEAR,
    SESSIONS_PER_YEAR,
    DayReturn,
    Trades,
    measure,
)
from engine.performance import Performance as Measured
from engine.sessions import sessions_of
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, Info
from resolvers.enums import EquityCurveRange, Resolution, Statistic, StatisticReason
from resolvers.equity_curve import History, load_history
from resolvers.explain import Contribution, load_contribution
from resolvers.fields import resolved


@strawberry.type(description="The return of one whole UTC day.")
class PerformanceDay:
    day: datetime = strawberry.field(description="00:00 UTC, when the day began.")
    twr: Decimal | None = strawberry.field(description="Its time-weighted return as a fraction; null beyond 10^15.")


@strawberry.type(description="The return of one UTC month.")
class PerformanceMonth:
    year: int = strawberry.field(description="The year, for example 2026.")
    month: int = strawberry.field(description="1 to 12.")
    twr: Decimal | None = strawberry.field(
        description="Its time-weighted return as a fraction; null where it starts at a NAV of 0 or less."
    )
    complete: bool = strawberry.field(description="False for the month the range begins in and for the running one.")


@strawberry.type(description="A statistic that is null, and why.")
class UndefinedStatistic:
    statistic: Statistic = strawberry.field(description="The field of Performance that is null.")
    reason: StatisticReason = strawberry.field(description="Why it has no value.")


@strawberry.type(
    description=(
        "Return, risk, drawdown and trades over a range. Everything follows from the points of equityCurve before "
        "thinning, live end included. Ratios are fractions (0.01 is 1 %), amounts are in the base currency. A field "
        "that is null is in `undefined` with the reason."
    )
)
class Performance:
    portfolio: strawberry.Private[PortfolioIdentity]
    history: strawberry.Private[History]
    range: EquityCurveRange = strawberry.field(description="The range asked for.")
    resolution: Resolution = strawberry.field(description="How far apart the points lie.")
    begun_at: datetime | None = strawberry.field(
        description="The first instant with capital in the range; null without any point."
    )
    ended_at: datetime | None = strawberry.field(description="The last point: now; null without any point.")
    twr: Decimal | None = strawberry.field(
        description="Time-weighted return: Π of the sub-periods' NAV at end / NAV at start, cut at every flow, − 1."
    )
    xirr: Decimal | None = strawberry.field(
        description=(
            "Money-weighted return a year: the r with Σ amount × (1 + r)^(−days / 365) = 0 over the NAV at the "
            "beginning and deposits, withdrawals and rewards, and the NAV at the end."
        )
    )
    annualized_return: Decimal | None = strawberry.field(
        description="(1 + twr)^(365 / days from begunAt to endedAt) − 1; null under 20 whole days."
    )
    annualization_days: int = strawberry.field(
        description=(
            "Days a year in volatility, sharpe and sortino: 365 when crypto was held in the range; else 252, where "
            "weekends and the exchange's holidays belong to its next session's day."
        )
    )
    days_count: int = strawberry.field(description="The whole UTC days with a return; first and running day left out.")
    volatility: Decimal | None = strawberry.field(
        description="Sample deviation (n − 1) of the days' returns × √annualizationDays; null under 20 days."
    )
    sharpe: Decimal | None = strawberry.field(
        description="Mean / sample deviation (n − 1) of the days' returns × √annualizationDays; risk-free rate 0."
    )
    sortino: Decimal | None = strawberry.field(
        description="Mean / √(Σ min(return, 0)² / n) of the days' returns × √annualizationDays."
    )
    calmar: Decimal | None = strawberry.field(description="annualizedReturn / maxDrawdown.")
    max_drawdown: Decimal | None = strawberry.field(
        description="The deepest fall of the TWR index below its highest so far, as a fraction ≥ 0."
    )
    max_drawdown_peak_at: datetime | None = strawberry.field(description="When the index was last at the peak before.")
    max_drawdown_trough_at: datetime | None = strawberry.field(description="When it was deepest.")
    max_drawdown_recovered_at: datetime | None = strawberry.field(
        description="When it was first back at the peak; null as long as it is not."
    )
    current_drawdown: Decimal | None = strawberry.field(description="The drawdown at the end, as a fraction ≥ 0.")
    best_day: PerformanceDay | None = strawberry.field(description="The whole day with the largest return.")
    worst_day: PerformanceDay | None = strawberry.field(description="The whole day with the smallest return.")
    day_win_rate: Decimal | None = strawberry.field(description="Days with a return above 0 / daysCount.")
    trades: int = strawberry.field(
        description="Fills that realised a gain or a loss, gross of fees; one exactly at cost is neither."
    )
    winning_trades: int = strawberry.field(description="Fills that realised a gain.")
    losing_trades: int = strawberry.field(description="Fills that realised a loss.")
    trade_win_rate: Decimal | None = strawberry.field(description="winningTrades / trades.")
    profit_factor: Decimal | None = strawberry.field(description="Σ gains / −Σ losses of the trades.")
    average_win: Decimal | None = strawberry.field(description="Σ gains / winningTrades, in the base currency.")
    average_loss: Decimal | None = strawberry.field(
        description="Σ losses / losingTrades, in the base currency; negative."
    )
    expectancy: Decimal | None = strawberry.field(description="Σ realised P&L of the trades / trades.")
    monthly_returns: list[PerformanceMonth] = strawberry.field(
        description=(
            "By UTC months, ascending: index at its last point / index at the last point before − 1. Π (1 + twr) "
            "over all is 1 + the range's twr. A month without points is a gap."
        )
    )
    undefined: list[UndefinedStatistic] = strawberry.field(description="The statistics that are null, and why.")

    @resolved("What each asset, sector and asset class contributed to the P&L between the first and the last point.")
    async def contribution(self, info: Info) -> Contribution:
        return await load_contribution(info.context, self.portfolio, self.history)


async def load_performance(
    context: Context, portfolio: PortfolioIdentity, curve_range: EquityCurveRange
) -> Performance:
    ledger, name = context.services.ledger, portfolio.portfolio_id
    history = await load_history(context, portfolio, curve_range)
    trades, crypto = await asyncio.gather(
        ledger.trades(name, history.after, history.last),
        ledger.has_held(name, AssetClass.CRYPTO, history.after, history.last),
    )
    annualization_days = DAYS_PER_YEAR if crypto else SESSIONS_PER_YEAR
    exchange = context.services.settings.calendar_equity
    # Whoever made the services has read its calendar.
    sessions = sessions_of(exchange) if exchange else None
    measured = measure(history.points, history.flows, trades, annualization_days, sessions)
    return _show(portfolio, curve_range, history, trades, measured)


def _show(
    portfolio: PortfolioIdentity,
    curve_range: EquityCurveRange,
    history: History,
    trades: Trades,
    measured: Measured,
) -> Performance:
    figures, deepest = measured.figures, measured.drawdown
    return Performance(
        portfolio=portfolio,
        history=history,
        range=curve_range,
        resolution=history.resolution,
        begun_at=_show_instant(measured.begun_at_ns),
        ended_at=_show_instant(measured.ended_at_ns),
        twr=figures.get(Statistic.TWR),
        xirr=figures.get(Statistic.XIRR),
        annualized_return=figures.get(Statistic.ANNUALIZED_RETURN),
        annualization_days=measured.annualization_days,
        days_count=measured.days_count,
        volatility=figures.get(Statistic.VOLATILITY),
        sharpe=figures.get(Statistic.SHARPE),
        sortino=figures.get(Statistic.SORTINO),
        calmar=figures.get(Statistic.CALMAR),
        max_drawdown=figures.get(Statistic.MAX_DRAWDOWN),
        max_drawdown_peak_at=_show_instant(deepest.peak_at_ns if deepest else None),
        max_drawdown_trough_at=_show_instant(deepest.trough_at_ns if deepest else None),
        max_drawdown_recovered_at=_show_instant(deepest.recovered_at_ns if deepest else None),
        current_drawdown=figures.get(Statistic.CURRENT_DRAWDOWN),
        best_day=_show_day(measured.best_day),
        worst_day=_show_day(measured.worst_day),
        day_win_rate=figures.get(Statistic.DAY_WIN_RATE),
        trades=trades.wins_count + trades.losses_count,
        winning_trades=trades.wins_count,
        losing_trades=trades.losses_count,
        trade_win_rate=figures.get(Statistic.TRADE_WIN_RATE),
        profit_factor=figures.get(Statistic.PROFIT_FACTOR),
        average_win=figures.get(Statistic.AVERAGE_WIN),
        average_loss=figures.get(Statistic.AVERAGE_LOSS),
        expectancy=figures.get(Statistic.EXPECTANCY),
        monthly_returns=[
            PerformanceMonth(year=one.year, month=one.month, twr=one.value, complete=one.complete)
            for one in measured.months
        ],
        undefined=[
            UndefinedStatistic(statistic=statistic, reason=measured.undefined[statistic])
            for statistic in Statistic
            if statistic in measured.undefined
        ],
    )


def _show_instant(at_ns: int | None) -> datetime | None:
    return None if at_ns is None else to_datetime(at_ns)


def _show_day(one: DayReturn | None) -> PerformanceDay | None:
    if one is None:
        return None
    return PerformanceDay(day=to_datetime(one.day * DAY_NS), twr=present_ratio(one.value))
