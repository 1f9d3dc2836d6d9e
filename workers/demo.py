"""The demo's traders as a process: wait for prices, make the portfolios once, then go on trading."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path

import structlog

from engine.assets import Asset, load_catalogue, parse_assets
from engine.instants import to_datetime
from engine.messages import quote_decoder
from engine.runtime.clock import Clock
from engine.runtime.connections import AWAY, Outage, connect_postgres, connect_redis, stopped_within
from engine.runtime.settings import Settings
from engine.stores.redis_keys import PRICES
from workers.feeds.replay import first_day_prices
from workers.producing import produce_events
from workers.traders import demo_portfolio_id, portfolio_events_for_demo, run_traders

PRICES_POLL_INTERVAL_S = 0.2

_log = structlog.get_logger(__name__)


async def run_demo_traders(
    settings: Settings, clock: Clock, stop: asyncio.Event, portfolios_count: int, seed: int, recording: str
) -> None:
    """Trade until `stop`. Portfolios are bought at the recording's first prices, else at those in Redis.

    When a recorded market is over nobody trades any more, and the process waits for its end.
    """
    assets = demo_assets(recording)
    prices = first_day_prices(Path(recording)) if recording else await _wait_for_prices(settings, stop, len(assets))
    if stop.is_set():
        return
    if not await _is_open(settings, demo_portfolio_id(0)):
        events = portfolio_events_for_demo(prices, portfolios_count, seed, to_datetime(clock.now_ns()), assets)
        count = await produce_events(settings, events)
        _log.info("demo_portfolios_made", portfolios=portfolios_count, events=count)
    await run_traders(settings, clock, stop, portfolios_count, seed, sorted(prices))
    if not stop.is_set():
        _log.info("market_over")
        await stop.wait()


def demo_assets(recording: str) -> dict[str, Asset]:
    """The shipped catalogue, and what an `assets.csv` beside the recording says of its symbols."""
    assets = dict(load_catalogue())
    beside = Path(recording).with_name("assets.csv") if recording else None
    if beside is not None and beside.exists():
        for asset in parse_assets(beside.read_text().splitlines(keepends=True)):
            assets.setdefault(asset.symbol, asset)
    return assets


async def _wait_for_prices(settings: Settings, stop: asyncio.Event, count: int) -> dict[str, Decimal]:
    redis = connect_redis(settings, "traders")
    outage = Outage("redis")
    try:
        while not stop.is_set():
            try:
                stored = await redis.hgetall(PRICES)
            except AWAY as error:
                await stopped_within(stop, outage.begin_or_continue(error))
                continue
            if len(stored) >= count:
                quotes = [quote_decoder.decode(packed) for packed in stored.values() if isinstance(packed, bytes)]
                return {quote.symbol: Decimal(quote.price) for quote in quotes}
            await stopped_within(stop, PRICES_POLL_INTERVAL_S)
    finally:
        await redis.aclose()
    return {}


async def _is_open(settings: Settings, portfolio_id: str) -> bool:
    pool = await connect_postgres(settings, "traders")
    try:
        return bool(await pool.fetchval("SELECT 1 FROM portfolio WHERE id = $1", portfolio_id))
    finally:
        await pool.close()
