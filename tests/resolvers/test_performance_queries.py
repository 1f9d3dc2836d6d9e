"""Performance and the curve's return over the real gateway: one history, two views of it that agree."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from engine.assets import Asset, AssetClass
from tests.builders import MICRO, OPENED_AT, MarkRow
from tests.gateway import Gateway

FIELDS = """range resolution begunAt endedAt twr xirr annualizedReturn annualizationDays daysCount volatility sharpe
    sortino calmar maxDrawdown maxDrawdownPeakAt maxDrawdownTroughAt maxDrawdownRecoveredAt currentDrawdown
    bestDay { day twr } worstDay { day twr } dayWinRate trades winningTrades losingTrades tradeWinRate profitFactor
    averageWin averageLoss expectancy monthlyReturns { year month twr complete } undefined { statistic reason }"""
QUERY = f"""query($id: String!, $range: EquityCurveRange!, $max: Int) {{ portfolio(portfolioId: $id) {{
    valuation {{ nav }}
    performance(range: $range) {{ {FIELDS} }}
    equityCurve(range: $range, maxPoints: $max) {{ points {{ at nav twrIndex highWaterMark drawdown }} }} }} }}"""

DAYS = 60
DEPOSITED_ON = 30  # the day, from the first, in which a second deposit of 5,000 comes in


async def ask(gateway: Gateway, portfolio_id: str, **variables: Any) -> tuple[Any, list[Any]]:
    """The performance and the points of the curve."""
    answer = (await gateway.ask(QUERY, {"id": portfolio_id, "range": "YEAR_1", **variables}))["portfolio"]
    return answer["performance"], answer["equityCurve"]["points"]


def undefined(performance: Any) -> dict[str, str]:
    return {one["statistic"]: one["reason"] for one in performance["undefined"]}


async def live(gateway: Gateway, shard: int, portfolio_id: str, nav: int, ledger_sequence: int) -> None:
    await gateway.redis.point(shard, 1)
    row = MarkRow(nav=nav, ledger_sequence=ledger_sequence)
    await gateway.redis.marks(shard, 1, {portfolio_id: row})


def last_hour_of(day: int) -> datetime:
    """23:00 UTC of the `day`-th of DAYS days, the last of which is yesterday."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return today - timedelta(days=DAYS - day, hours=1) + timedelta(days=1)


def index_of(day: int) -> Decimal:
    """What is earned by the end of a day: 1 % up, 1 % up, 1 % down and so on."""
    index = Decimal(1)
    for step in range(1, day + 1):
        index *= Decimal("0.99") if step % 3 == 0 else Decimal("1.01")
    return index


@pytest.fixture
async def earned(gateway: Gateway, shard: int, portfolio_id: str) -> str:
    """1,000 deposited, earning `index_of` daily; 5,000 more when DEPOSITED_ON begins; live at the last day's NAV."""
    ledger = gateway.ledger
    await ledger.flow(portfolio_id, 2, "1000", "0", last_hour_of(0) - timedelta(minutes=5))
    before = {last_hour_of(day): f"{1_000 * index_of(day):.6f}" for day in range(DEPOSITED_ON)}
    await ledger.snapshots(portfolio_id, before, ledger_sequence=2)
    base = Decimal(before[last_hour_of(DEPOSITED_ON - 1)])
    await ledger.flow(portfolio_id, 3, "5000", str(base), last_hour_of(DEPOSITED_ON - 1) + timedelta(minutes=5))
    scale = (base + 5_000) / index_of(DEPOSITED_ON - 1)
    after = {last_hour_of(day): f"{scale * index_of(day):.6f}" for day in range(DEPOSITED_ON, DAYS)}
    await ledger.snapshots(portfolio_id, after, ledger_sequence=3)
    nav = round(scale * index_of(DAYS - 1) * MICRO)
    await live(gateway, shard, portfolio_id, nav, 3)
    return portfolio_id


async def test_the_curve_shows_returns_that_a_deposit_does_not_move(gateway: Gateway, earned: str) -> None:
    performance, points = await ask(gateway, earned)
    assert len(points) == DAYS + 1
    for day, point in enumerate(points[:-1]):
        assert float(point["twrIndex"]) == pytest.approx(float(index_of(day)), abs=1e-8)
    high = max(index_of(day) for day in range(DAYS))
    assert float(points[-1]["highWaterMark"]) == pytest.approx(float(high), abs=1e-8)
    assert float(points[-1]["drawdown"]) == pytest.approx(float(1 - index_of(DAYS - 1) / high), abs=1e-8)
    assert performance["monthlyReturns"][-1]["complete"] is False


async def test_curve_valuation_and_performance_agree(gateway: Gateway, earned: str) -> None:
    data = (await gateway.ask(QUERY, {"id": earned, "range": "YEAR_1"}))["portfolio"]
    performance, points = data["performance"], data["equityCurve"]["points"]
    assert points[-1]["nav"] == data["valuation"]["nav"]
    assert Decimal(points[-1]["twrIndex"]) - 1 == Decimal(performance["twr"])
    assert points[-1]["drawdown"] == performance["currentDrawdown"]
    assert max(points, key=lambda point: Decimal(point["drawdown"]))["drawdown"] == performance["maxDrawdown"]
    _, few = await ask(gateway, earned, max=5)
    assert len(few) == 5
    assert max(Decimal(point["drawdown"]) for point in few) == Decimal(performance["maxDrawdown"])


async def test_performance_against_plain_loops(gateway: Gateway, earned: str) -> None:
    performance, _ = await ask(gateway, earned)
    returns, before = [], None
    for day in range(DAYS):
        if last_hour_of(day).weekday() < 5:
            returns += [] if before is None else [float(index_of(day) / before) - 1]
            before = index_of(day)
    deviation, mean = statistics.stdev(returns), statistics.mean(returns)
    assert (performance["annualizationDays"], performance["daysCount"]) == (252, len(returns))
    assert float(performance["twr"]) == pytest.approx(float(index_of(DAYS - 1)) - 1, abs=1e-8)
    assert float(performance["volatility"]) == pytest.approx(deviation * 252**0.5, abs=1e-6)
    assert float(performance["sharpe"]) == pytest.approx(mean / deviation * 252**0.5, abs=1e-4)
    assert float(performance["maxDrawdown"]) == pytest.approx(0.01, abs=1e-8)
    assert performance["begunAt"] == (last_hour_of(0) - timedelta(minutes=5)).isoformat()[:-6] + "Z"
    elapsed = datetime.fromisoformat(performance["endedAt"]) - (last_hour_of(0) - timedelta(minutes=5))
    annual = float(index_of(DAYS - 1)) ** (timedelta(days=365) / elapsed) - 1
    assert float(performance["annualizedReturn"]) == pytest.approx(annual, rel=1e-6)
    assert float(performance["calmar"]) == pytest.approx(annual / 0.01, rel=1e-5)
    product = Decimal(1)
    for month in performance["monthlyReturns"]:
        product *= 1 + Decimal(month["twr"])
    assert float(product - 1) == pytest.approx(float(performance["twr"]), abs=1e-8)
    assert set(undefined(performance).values()) <= {"NO_TRADES", "NOT_RECOVERED"}


async def test_a_range_within_its_life_begins_at_its_first_snapshot(gateway: Gateway, earned: str) -> None:
    performance, points = await ask(gateway, earned, range="DAYS_7")
    assert points[0]["twrIndex"] == "1"
    assert performance["begunAt"] == points[0]["at"]
    assert undefined(performance)["SHARPE"] == "TOO_FEW_DAYS"
    assert performance["sharpe"] is performance["annualizedReturn"] is None
    assert performance["bestDay"] is not None


async def test_trades_and_crypto_in_the_range(gateway: Gateway, earned: str, shard: int) -> None:
    assert (await ask(gateway, earned))[0]["annualizationDays"] == 252
    await gateway.ledger.assets([Asset("BTC-USD", "Bitcoin", AssetClass.CRYPTO, "Layer 1 Crypto", "")])
    for sequence, realized in ((4, "30"), (5, "-10"), (6, "0"), (7, "12"), (8, "999")):
        await gateway.ledger.fill(earned, sequence, "BTC-USD", "SELL", "1", realized)
    await live(gateway, shard, earned, 7_000 * MICRO, ledger_sequence=7)
    performance, _ = await ask(gateway, earned)
    shown = {name: performance[name] for name in ("trades", "winningTrades", "losingTrades", "expectancy")}
    assert shown == {"trades": 3, "winningTrades": 2, "losingTrades": 1, "expectancy": "10.6666666667"}
    assert (performance["profitFactor"], performance["averageWin"], performance["averageLoss"]) == ("4.2", "21", "-10")
    assert (performance["tradeWinRate"], performance["annualizationDays"]) == ("0.6666666667", 365)


async def test_a_flow_that_the_mark_does_not_include_yet_is_left_out(gateway: Gateway, earned: str, shard: int) -> None:
    before, _ = await ask(gateway, earned)
    await gateway.ledger.flow(earned, 4, "777", "1", datetime.now(UTC))
    after, _ = await ask(gateway, earned)
    assert after["twr"] == before["twr"]


async def test_an_opened_portfolio_without_anything_else(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    query = f"""query($id: String!) {{ portfolio(portfolioId: $id) {{ performance(range: ALL) {{ {FIELDS} }}
        equityCurve(range: ALL) {{ points {{ nav }} }} }} }}"""
    data = (await gateway.ask(query, {"id": portfolio_id}))["portfolio"]
    assert data["equityCurve"]["points"] == []
    assert (data["performance"]["begunAt"], data["performance"]["monthlyReturns"]) == (None, [])
    assert undefined(data["performance"])["TWR"] == "NO_HISTORY"
    await live(gateway, shard, portfolio_id, 0, 1)
    performance, points = await ask(gateway, portfolio_id, range="ALL")
    assert (performance["twr"], points[0]["twrIndex"]) == ("0", "1")
    assert performance["begunAt"] == OPENED_AT.isoformat()[:-6] + "Z"
    assert undefined(performance)["XIRR"] == "NO_SIGN_CHANGE"


async def test_from_where_nav_was_below_zero_there_is_no_return(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    await gateway.ledger.snapshots(portfolio_id, {datetime.now(UTC) - timedelta(days=2): "-5"}, ledger_sequence=1)
    await live(gateway, shard, portfolio_id, 100 * MICRO, 1)
    performance, points = await ask(gateway, portfolio_id, range="DAYS_7")
    assert [point["twrIndex"] for point in points] == [None, None]
    assert performance["twr"] is None
    assert undefined(performance)["TWR"] == undefined(performance)["CURRENT_DRAWDOWN"] == "NAV_NOT_POSITIVE"


async def test_every_undefined_statistic_is_null_and_every_null_is_named(
    gateway: Gateway, earned: str, portfolio_id: str
) -> None:
    for asked in ("DAYS_7", "DAYS_30", "YEAR_1", "ALL"):
        performance, _ = await ask(gateway, earned, range=asked)
        named = {name.replace("_", "").lower() for name in undefined(performance)}
        assert named == {name.lower() for name, value in performance.items() if value is None}


async def test_it_needs_the_scope_and_the_owner(gateway: Gateway, portfolio_id: str) -> None:
    variables = {"id": portfolio_id, "range": "ALL"}
    assert await gateway.codes(QUERY, variables, gateway.token("ann", "ledger:read")) == ["FORBIDDEN"]
    assert await gateway.codes(QUERY, variables, gateway.token("bob")) == ["NOT_FOUND"]
    assert await gateway.codes(QUERY, variables, None) == ["UNAUTHENTICATED"]
