from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

import pytest
from redis.asyncio import Redis

from engine.assets import AssetClass, load_catalogue
from engine.instants import DAY_NS, to_ns
from engine.messages import (
    CashEvent,
    EventRejected,
    FillEvent,
    OpenEvent,
    PortfolioEvent,
    Quote,
    check_event,
    decode_event,
    encode_event,
    quote_encoder,
)
from engine.runtime.clock import MarketClock, MarketClockPlan, WallClock
from engine.runtime.settings import Settings
from engine.stores.redis_keys import PRICES
from tests.topics import read_topic
from workers.feeds.simulated import START_PRICES
from workers.traders import (
    POSITIONS_COUNT,
    demo_owner,
    demo_portfolio_id,
    demo_symbols,
    portfolio_events_for_demo,
    run_traders,
)

AT = datetime(2026, 11, 22, 10, tzinfo=UTC)
PRICES_AT_START = {symbol: Decimal(text) for symbol, text in START_PRICES.items()}


def demo(count: int = 20, seed: int = 7) -> list[PortfolioEvent]:
    return list(portfolio_events_for_demo(PRICES_AT_START, count, seed, AT))


# --- the demo's portfolios


def test_the_demo_repeats_by_seed_ids_included() -> None:
    assert demo() == demo()
    assert demo(seed=8) != demo()
    assert demo(count=30)[: len(demo())] == demo()


def test_every_event_is_valid_and_no_id_comes_twice() -> None:
    events = demo(count=60)
    for event in events:
        check_event(event)
        assert decode_event(encode_event(event)) == event
        assert UUID(event.event_id).version == 7
    assert len({event.event_id for event in events}) == len(events)


def test_a_portfolio_is_opened_funded_and_buys_fifteen_distinct_positions() -> None:
    by_portfolio = defaultdict(list)
    for event in demo():
        by_portfolio[event.portfolio_id].append(event)
    assert list(by_portfolio) == [f"demo-{n:04d}" for n in range(1, 21)]
    for events in by_portfolio.values():
        assert [type(event) for event in events] == [OpenEvent, CashEvent, *[FillEvent] * POSITIONS_COUNT]
        assert len({event.symbol for event in events if isinstance(event, FillEvent)}) == POSITIONS_COUNT


def test_the_first_owner_has_five_portfolios_and_the_others_several() -> None:
    owners = Counter(event.owner for event in demo(count=45) if isinstance(event, OpenEvent))
    assert owners.pop("demo") == 5
    assert owners == {f"user-{n:02d}": 4 for n in range(1, 11)}
    assert demo_owner(4) == "demo"


def test_purchases_fit_the_deposit() -> None:
    deposits: dict[str, Decimal] = {}
    spent: dict[str, Decimal] = defaultdict(Decimal)
    shorts: dict[str, int] = Counter()
    for event in demo(count=100):
        if isinstance(event, CashEvent):
            deposits[event.portfolio_id] = Decimal(event.amount)
        elif isinstance(event, FillEvent):
            assert Decimal(event.price) == PRICES_AT_START[event.symbol]
            shorts[event.portfolio_id] += event.side == "SELL"
            spent[event.portfolio_id] += Decimal(event.quantity) * Decimal(event.price)
    assert all(Decimal("0.75") < spent[portfolio] / deposits[portfolio] < 1 for portfolio in deposits)
    assert Counter(shorts.values()) == {0: 90, 3: 10}


def test_quantities_have_the_decimals_their_assets_are_traded_in() -> None:
    catalogue, decimals = load_catalogue(), defaultdict(set)
    for event in demo(count=100):
        if isinstance(event, FillEvent):
            places = -int(Decimal(event.quantity).as_tuple().exponent)
            decimals[catalogue[event.symbol].asset_class].add(places)
    assert max(decimals[AssetClass.CRYPTO]) == 6
    assert max(decimals[AssetClass.COMMODITY]) == 2
    assert decimals[AssetClass.EQUITY] == {0, 1, 2, 3}


def test_fewer_symbols_than_positions_are_all_held() -> None:
    events = list(portfolio_events_for_demo({"A": Decimal(5), "B": Decimal("0.01")}, 1, 1, AT))
    assert {event.symbol for event in events if isinstance(event, FillEvent)} == {"A", "B"}
    assert demo_symbols("demo-0001", ["B", "A"], 1) == demo_symbols("demo-0001", ["A", "B"], 1)


# --- trading


async def test_traders_trade_what_the_portfolios_hold_at_current_prices(
    kafka_bootstrap: str, topic: str, redis_db: str
) -> None:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic=topic, redis_url=redis_db)
    async with Redis.from_url(redis_db) as redis:
        quotes = [Quote(symbol, str(price), time.time_ns(), "t") for symbol, price in PRICES_AT_START.items()]
        await redis.hset(PRICES, mapping={quote.symbol: quote_encoder.encode(quote) for quote in quotes})
    stop = asyncio.Event()
    acknowledged = 0

    def count(so_far: int) -> None:
        nonlocal acknowledged
        acknowledged = so_far
        if so_far >= 150:
            stop.set()

    async with asyncio.timeout(30):
        total = await run_traders(settings, WallClock(), stop, 6, 7, list(PRICES_AT_START), 300, count)
    assert total == acknowledged >= 150
    records = await read_topic(kafka_bootstrap, topic, total)
    events = [decode_event(record.value) for record in records]
    assert len({event.event_id for event in events}) == total
    fills = [event for event in events if isinstance(event, FillEvent)]
    assert {fill.side for fill in fills} == {"BUY", "SELL"}
    assert {type(event) for event in events} == {FillEvent, CashEvent}
    assert {event.portfolio_id for event in events} == {demo_portfolio_id(index) for index in range(6)}
    for fill in fills:
        assert fill.symbol in demo_symbols(fill.portfolio_id, PRICES_AT_START, 7)
        assert Decimal(fill.price) == PRICES_AT_START[fill.symbol]
        assert abs(fill.executed_at.timestamp() - time.time()) < 60


async def test_a_fill_is_executed_at_the_instant_of_its_price(kafka_bootstrap: str, topic: str, redis_db: str) -> None:
    """So a price of before a split is never one for shares of after it, however late it is booked."""
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic=topic, redis_url=redis_db)
    close = datetime(2020, 8, 28, 20, tzinfo=UTC)
    async with Redis.from_url(redis_db) as redis:
        await redis.hset(PRICES, "AAPL", quote_encoder.encode(Quote("AAPL", "499.23", to_ns(close), "t")))
    stop = asyncio.Event()
    async with asyncio.timeout(30):
        total = await run_traders(
            settings, WallClock(), stop, 2, 7, ["AAPL"], 300, lambda n: stop.set() if n >= 20 else None
        )
    fills = [decode_event(record.value) for record in await read_topic(kafka_bootstrap, topic, total)]
    prices = {(fill.price, fill.executed_at) for fill in fills if isinstance(fill, FillEvent)}
    assert prices == {("499.23", close)}


async def test_trading_ends_with_the_recorded_market(kafka_bootstrap: str, topic: str, redis_db: str) -> None:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic=topic, redis_url=redis_db)
    async with Redis.from_url(redis_db) as redis:
        await redis.hset(PRICES, "AAPL", quote_encoder.encode(Quote("AAPL", "10", 18_565 * DAY_NS, "t")))
    # Two seconds of wall time are left of the only session.
    clock = MarketClock(MarketClockPlan(time.time_ns() + 2_000_000_000 - 4_000_000_000, 250, [18_565]))
    async with asyncio.timeout(30):
        total = await run_traders(settings, clock, asyncio.Event(), 2, 7, ["AAPL"], 200)
        assert total > 10
        assert await run_traders(settings, clock, asyncio.Event(), 2, 7, ["AAPL"], 200) == 0


async def test_without_prices_nobody_trades_and_stop_still_stops(
    kafka_bootstrap: str, topic: str, redis_db: str
) -> None:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic=topic, redis_url=redis_db)
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.5, stop.set)
    async with asyncio.timeout(15):
        total = await run_traders(settings, WallClock(), stop, 3, 7, ["AAPL"], 100)
    records = await read_topic(kafka_bootstrap, topic, total)
    assert {type(decode_event(record.value)) for record in records} <= {CashEvent}


async def test_an_absent_kafka_does_not_keep_traders_from_stopping(redis_db: str) -> None:
    settings = Settings(kafka_bootstrap="127.0.0.1:1", redis_url=redis_db)
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.5, stop.set)
    async with asyncio.timeout(15):
        assert await run_traders(settings, WallClock(), stop, 3, 7, ["AAPL"]) == 0


@pytest.mark.parametrize(("portfolios_count", "symbols"), [(0, ["A"]), (1, [])])
async def test_nobody_to_trade_or_nothing_is_refused(portfolios_count: int, symbols: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        await run_traders(Settings(), WallClock(), asyncio.Event(), portfolios_count, 7, symbols)


def test_a_trader_s_event_is_never_refused_by_its_own_rules() -> None:
    """Tiny and large prices alike: the smallest size keeps the quantity above zero and in range."""
    for price in ("0.000001", "0.0049", "999999.99"):
        for event in portfolio_events_for_demo({"BTC-USD": Decimal(price), "AAPL": Decimal(price)}, 10, 1, AT):
            try:
                check_event(event)
            except EventRejected as error:
                pytest.fail(f"{price}: {error.code}")
