"""Assets on their way into the asset table."""

from __future__ import annotations

from engine.assets import Asset, load_catalogue, parse_assets
from engine.runtime.connections import connect_postgres
from engine.runtime.settings import Settings
from engine.stores.assets_postgres import upsert_assets


async def load_assets(settings: Settings, text: str = "") -> int:
    """Upsert the shipped catalogue, or the assets of a CSV text; returns how many.

    Raises engine.assets.AssetFileError (a ValueError) with the line that is wrong.
    """
    assets: list[Asset] = parse_assets(text.splitlines(keepends=True)) if text else list(load_catalogue().values())
    pool = await connect_postgres(settings, "catalogue")
    try:
        return await upsert_assets(pool, assets)
    finally:
        await pool.close()
