from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import aclosing
from decimal import Decimal

import numpy as np
import pytest

from engine.assets import load_catalogue
from engine.messages import Quote
from engine.quotes import QuoteFilter, RawQuote, Verdict
from engine.runtime.clock import WallClock
from workers.feeds import Feed
from workers.feeds.simulated import START_PRICES, SimulatedFeed


async def take(feed: Feed, count: int) -> list[RawQuote]:
    """The first `count` quotes of the feed."""
    taken: list[RawQuote] = []
    async with asyncio.timeout(20), aclosing(feed.batches()) as batches:
        async for batch in batches:
            taken += batch
            if len(taken) >= count:
                break
    return taken


def simulated(seed: int, quotes_per_s: int = 200, clock: WallClock | None = None) -> SimulatedFeed:
    return SimulatedFeed(list(load_catalogue().values()), clock or WallClock(), seed, quotes_per_s)


class FixedClock(WallClock):
    def now_ns(self) -> int:
        return 1_795_000_000_000_000_000


def test_a_seed_repeats_and_another_differs() -> None:
    one, same, other = (simulated(seed, clock=FixedClock()) for seed in (1, 1, 2))
    steps = [feed.step() for feed in (one, same, other)]
    assert steps[0] == steps[1] != steps[2]


def test_the_rate_is_kept_and_liquid_assets_tick_more() -> None:
    feed = simulated(3, quotes_per_s=210)
    ticks = Counter(quote.symbol for _ in range(20 * 60) for quote in feed.step())
    assert sum(ticks.values()) == 210 * 60
    assert len(ticks) == 60
    symbols = list(load_catalogue())
    assert ticks[symbols[0]] > 3 * 60 > ticks[symbols[-1]] > 0.5 * 60


def test_every_simulated_quote_is_accepted_by_the_filter() -> None:
    catalogue = load_catalogue()
    classes = {asset.symbol: asset.asset_class for asset in catalogue.values()}
    quote_filter, feed = QuoteFilter(classes, 1_000, 5_000_000_000), simulated(4)
    seen = {quote_filter.judge(q, time.time_ns())[0] for _ in range(500) for q in feed.step()}
    assert seen == {Verdict.ACCEPTED}


def test_every_catalogue_asset_has_a_price_to_start_at() -> None:
    assert set(START_PRICES) == set(load_catalogue())


def test_assets_of_a_sector_move_together_more_than_others() -> None:
    feed = simulated(5)
    assets = list(load_catalogue().values())
    correlation = np.corrcoef(np.array([feed._moves() for _ in range(4_000)]).T)
    within, across = [], []
    for i, one in enumerate(assets):
        for j, other in enumerate(assets[:i]):
            (within if one.sector == other.sector else across).append(correlation[i, j])
    assert np.mean(within) == pytest.approx(0.50, abs=0.03)
    assert np.mean(across) == pytest.approx(0.30, abs=0.03)


def test_a_restarted_simulation_goes_on_from_the_last_prices_with_newer_sequences() -> None:
    before = simulated(6)
    last = {quote.symbol: quote for _ in range(50) for quote in before.step()}
    after = simulated(6)
    after.resume({"BTC-USD": Quote("BTC-USD", "31000.5", 1, "simulated", 1)})
    again = {quote.symbol: quote for _ in range(50) for quote in after.step()}
    assert Decimal(again["BTC-USD"].price) == pytest.approx(Decimal(31_000), rel=Decimal("0.02"))
    assert min(q.sequence or 0 for q in again.values()) > min(q.sequence or 0 for q in last.values())


async def test_the_simulated_feed_keeps_its_pace() -> None:
    started = time.monotonic()
    quotes = await take(simulated(7, quotes_per_s=400), 200)
    assert 200 <= len(quotes) <= 240
    assert 0.3 < time.monotonic() - started < 3
