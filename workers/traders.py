"""The demo's traders: invented portfolios and fills, so that there is something to look at. Never part of a
real installation.

`portfolio_events_for_demo` is a pure function: same arguments, same events, ids included, and the k-th portfolio
is the same whatever their number. Each one is opened, gets one deposit, and then POSITIONS_COUNT fills at the
given prices that spend most of it; every tenth portfolio is short in a few of them. Quantities have the decimals
that such assets are traded in: crypto 6, commodities 2, equities whole shares, or 3 where the money buys only a
few.

`run_traders` goes on with random fills at current prices (Redis `prices`), in the symbols that the portfolios hold
already, and now and then moves cash. A fill is worth a sum of money, so a split changes how many shares it is; it is
executed at the instant of the quote whose price it has, so price and shares are of one time, whichever side of a split
it is booked on. Dividends come as corporate actions, never from here. When a recorded market is over, so is trading.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from decimal import Decimal
from random import Random

import uuid_utils

from engine.amounts import plain
from engine.assets import Asset, AssetClass, load_catalogue
from engine.instants import to_datetime, to_ns
from engine.messages import (
    CashEvent,
    FillEvent,
    OpenEvent,
    PortfolioEvent,
    Side,
    encode_event,
    quote_decoder,
)
from engine.runtime.clock import Clock, is_over
from engine.runtime.connections import AWAY, Outage, RedisClient, connect_redis, make_producer, stopped_within
from engine.runtime.settings import Settings
from engine.stores.redis_keys import PRICES
from workers.producing import EventSender

POSITIONS_COUNT = 15
DEMO_OWNER = "demo"
DEMO_OWNER_PORTFOLIOS_COUNT = 5
OWNER_PORTFOLIOS_COUNT = 4
SHORT_EVERY = 10  # one portfolio in so many is short
SHORT_POSITIONS_COUNT = 3
FILLS_PER_S = 3
CASH_PERCENT = 4  # of the traders' events
CURRENCY = "USD"
VENUE = "SIM"

_DEPOSITS = (10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000)
_STRATEGIES = ("Growth", "Income", "Balanced", "Momentum", "Value", "Core", "Global", "Opportunities")
_FEW_SHARES = 10


def demo_portfolio_id(index: int) -> str:
    """The id of the demo's portfolio `index`, counted from 0."""
    return f"demo-{index + 1:04d}"


def demo_owner(index: int) -> str:
    """The first portfolios belong to `demo`, the others to user-01, user-02…, several each."""
    if index < DEMO_OWNER_PORTFOLIOS_COUNT:
        return DEMO_OWNER
    return f"user-{(index - DEMO_OWNER_PORTFOLIOS_COUNT) // OWNER_PORTFOLIOS_COUNT + 1:02d}"


def demo_symbols(portfolio_id: str, symbols: Iterable[str], seed: int) -> list[str]:
    """The POSITIONS_COUNT symbols that a portfolio holds out of `symbols` (all of them where there are fewer)."""
    ordered = sorted(symbols)
    return Random(f"{seed}/{portfolio_id}/symbols").sample(ordered, min(POSITIONS_COUNT, len(ordered)))


def portfolio_events_for_demo(
    prices: Mapping[str, Decimal],
    portfolios_count: int,
    seed: int,
    at: datetime,
    assets: Mapping[str, Asset] | None = None,
) -> Iterator[PortfolioEvent]:
    """The events that make `portfolios_count` portfolios at the instant `at`, portfolio by portfolio.

    `assets` tells crypto from equities; by default the shipped catalogue.
    """
    assets = load_catalogue() if assets is None else assets
    for index in range(portfolios_count):
        yield from _portfolio_events(index, prices, seed, at, assets)


def _portfolio_events(
    index: int, prices: Mapping[str, Decimal], seed: int, at: datetime, assets: Mapping[str, Asset]
) -> Iterator[PortfolioEvent]:
    portfolio_id = demo_portfolio_id(index)
    random = Random(f"{seed}/{portfolio_id}")
    deposit = random.choice(_DEPOSITS)
    yield OpenEvent(
        event_id=_uuid7_at(at, random),
        portfolio_id=portfolio_id,
        owner=demo_owner(index),
        name=f"{random.choice(_STRATEGIES)} {index + 1}",
        base_currency=CURRENCY,
        opened_at=at,
    )
    yield CashEvent(
        event_id=_uuid7_at(at, random),
        portfolio_id=portfolio_id,
        kind="DEPOSIT",
        amount=f"{deposit}.00",
        currency=CURRENCY,
        effective_at=at,
        reference="opening deposit",
    )
    symbols = demo_symbols(portfolio_id, prices, seed)
    weights = [random.randint(50, 150) for _ in symbols]
    invested = deposit * random.randint(85, 97) // 100
    shorts_count = SHORT_POSITIONS_COUNT if index % SHORT_EVERY == SHORT_EVERY - 1 else 0
    for number, (symbol, weight) in enumerate(zip(symbols, weights, strict=True)):
        budget = Decimal(invested * weight // sum(weights))
        side: Side = "SELL" if number < shorts_count else "BUY"
        event_id = _uuid7_at(at, random)
        yield _fill(event_id, portfolio_id, symbol, side, budget, prices[symbol], at, assets.get(symbol))


def _fill(
    event_id: str,
    portfolio_id: str,
    symbol: str,
    side: Side,
    budget: Decimal,
    price: Decimal,
    at: datetime,
    asset: Asset | None,
) -> FillEvent:
    """A fill worth about `budget`: at least one unit of the smallest size the asset is traded in."""
    decimals = _quantity_decimals(budget, price, asset)
    units = max(1, int((budget / price).scaleb(decimals)))
    return FillEvent(
        event_id=event_id,
        portfolio_id=portfolio_id,
        symbol=symbol,
        side=side,
        quantity=plain(Decimal(units).scaleb(-decimals)),
        price=plain(price),
        fee="1.00",
        currency=CURRENCY,
        executed_at=at,
        order_id=f"o-{event_id[-12:]}",
        venue=VENUE,
    )


def _quantity_decimals(budget: Decimal, price: Decimal, asset: Asset | None) -> int:
    asset_class = AssetClass.UNCLASSIFIED if asset is None else asset.asset_class
    if asset_class is AssetClass.CRYPTO:
        return 6
    if asset_class is AssetClass.COMMODITY:
        return 2
    return 3 if budget < price * _FEW_SHARES else 0


def _uuid7_at(at: datetime, random: Random) -> str:
    """A version 7 UUID (RFC 9562) of a given instant whose random bits come from `random`: repeatable."""
    milliseconds = to_ns(at) // 1_000_000
    value = milliseconds << 80 | 0x7 << 76 | random.getrandbits(12) << 64 | 0b10 << 62 | random.getrandbits(62)
    return str(uuid.UUID(int=value))


async def run_traders(
    settings: Settings,
    clock: Clock,
    stop: asyncio.Event,
    portfolios_count: int,
    seed: int,
    symbols: Sequence[str],
    fills_per_s: int = FILLS_PER_S,
    on_acknowledged: Callable[[int], None] | None = None,
) -> int:
    """Trade in the demo's portfolios until `stop` or the end of a recorded market; answers how many events Kafka
    acknowledged.

    `symbols` are those the portfolios were made from. Kafka or Redis away: one log line, then on again.
    """
    trader = _Trader(clock, portfolios_count, seed, symbols)
    redis = connect_redis(settings, "traders")
    outage, acknowledged_count = Outage("kafka or redis of the traders"), 0
    try:
        while not (stop.is_set() or is_over(clock)):
            # A producer that has failed for good says so on every send: after an outage there is a new one.
            producer = make_producer(settings, "traders")
            sender = EventSender(producer, settings.topic, on_acknowledged)
            try:
                await producer.start()
                await _trade(trader, clock, redis, sender, outage, stop, fills_per_s)
                await sender.drain()
            except AWAY as error:
                await stopped_within(stop, outage.begin_or_continue(error))
            finally:
                with suppress(*AWAY):
                    await producer.stop()
                acknowledged_count += sender.acknowledged_count
    finally:
        with suppress(*AWAY):
            await redis.aclose()
    return acknowledged_count


async def _trade(
    trader: _Trader,
    clock: Clock,
    redis: RedisClient,
    sender: EventSender,
    outage: Outage,
    stop: asyncio.Event,
    fills_per_s: int,
) -> None:
    while not (stop.is_set() or is_over(clock)):
        event = await trader.next_event(redis)
        if event is not None:
            await sender.send(encode_event(event))
        outage.end()
        await stopped_within(stop, trader.pause_s(fills_per_s))


class _Trader:
    """Chooses what happens next: who trades what, at the price of the moment."""

    def __init__(self, clock: Clock, portfolios_count: int, seed: int, symbols: Sequence[str]) -> None:
        if portfolios_count < 1 or not symbols:
            raise ValueError("traders need at least one portfolio and one symbol")
        self._clock = clock
        self._portfolios_count = portfolios_count
        self._seed = seed
        self._symbols = symbols
        self._assets = load_catalogue()
        self._random = Random(f"{seed}/traders")

    def pause_s(self, fills_per_s: int) -> float:
        """Exponential: independent traders together make a Poisson process."""
        return self._random.expovariate(fills_per_s)

    async def next_event(self, redis: RedisClient) -> PortfolioEvent | None:
        """A fill or a cash movement; None when the chosen symbol has no price yet. Raises RedisError."""
        portfolio_id = demo_portfolio_id(self._random.randrange(self._portfolios_count))
        at = to_datetime(self._clock.now_ns())
        if self._random.randrange(100) < CASH_PERCENT:
            return self._cash(portfolio_id, at)
        symbol = self._random.choice(demo_symbols(portfolio_id, self._symbols, self._seed))
        stored = await redis.hget(PRICES, symbol)
        if not isinstance(stored, bytes):
            return None
        quote = quote_decoder.decode(stored)
        side: Side = self._random.choice(("BUY", "SELL"))
        budget = Decimal(self._random.randint(100, 2_500))
        price, executed_at = Decimal(quote.price), to_datetime(quote.ts_event_ns)
        return _fill(_new_id(), portfolio_id, symbol, side, budget, price, executed_at, self._assets.get(symbol))

    def _cash(self, portfolio_id: str, at: datetime) -> CashEvent:
        deposit = self._random.randrange(3) == 0
        cents = self._random.randint(50_000, 500_000) if deposit else self._random.randint(100, 9_900)
        return CashEvent(
            event_id=_new_id(),
            portfolio_id=portfolio_id,
            kind="DEPOSIT" if deposit else "INTEREST",
            amount=plain(Decimal(cents).scaleb(-2)),
            currency=CURRENCY,
            effective_at=at,
            reference="savings plan" if deposit else "interest on cash",
        )


def _new_id() -> str:
    return str(uuid_utils.uuid7())
