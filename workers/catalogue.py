"""Assets on their way into the asset table, and from there into Redis.

PostgreSQL keeps every classification (engine.stores.assets_postgres); the hash `assets` has the one in force of each
symbol. It is written whole at every load, after the commit, so that what a load before it could not write is made
good. Whoever keeps classifications in memory asks PostgreSQL every few seconds for what is new.
"""

from __future__ import annotations

import asyncpg
import structlog

from engine.assets import Asset, Classification, classification_encoder, load_catalogue, parse_assets
from engine.instants import to_datetime, to_ns
from engine.runtime.clock import make_clock
from engine.runtime.connections import AWAY, connect_postgres, connect_redis
from engine.runtime.settings import Settings
from engine.stores import redis_keys
from engine.stores.assets_postgres import Loaded, upsert_assets, versions_after

SYMBOLS_PER_COMMAND_MAX = 1_000

_log = structlog.get_logger(__name__)


async def load_assets(settings: Settings, text: str = "") -> Loaded:
    """Load the assets of a CSV text, whose classifications are in force from now on by the program's clock; without a
    text the shipped catalogue, which classifies only what nobody has classified.

    Raises engine.assets.AssetFileError (a ValueError) with the line that is wrong; AWAY errors when PostgreSQL is away.
    """
    assets: list[Asset] = parse_assets(text.splitlines(keepends=True)) if text else list(load_catalogue().values())
    at = to_datetime(make_clock(settings.market_clock).now_ns())
    pool = await connect_postgres(settings, "catalogue")
    try:
        loaded = await upsert_assets(pool, assets, at, reclassify=bool(text))
        if settings.redis_url:
            await _tell(settings, pool)
        return loaded
    finally:
        await pool.close()


async def _tell(settings: Settings, pool: asyncpg.Pool) -> None:
    """Bring all classifications in force to Redis. When it is away the next load does."""
    packed = {
        one.asset.symbol: classification_encoder.encode(
            Classification(
                one.asset.name,
                one.asset.asset_class,
                one.asset.sector,
                one.asset.industry,
                one.version,
                to_ns(one.effective_at),
            )
        )
        for one in await versions_after(pool, 0)
    }
    redis = connect_redis(settings, "catalogue")
    symbols = list(packed)
    try:
        for start in range(0, len(symbols), SYMBOLS_PER_COMMAND_MAX):
            part = {symbol: packed[symbol] for symbol in symbols[start : start + SYMBOLS_PER_COMMAND_MAX]}
            await redis.hset(redis_keys.ASSETS, mapping=part)  # type: ignore[arg-type] # its stub knows text only
    except AWAY as error:
        _log.warning("assets_unwritten", reason=type(error).__name__)
    finally:
        await redis.aclose()
