"""Symbol → sector and asset class, from the asset table, kept in memory; what is not there is UNCLASSIFIED."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.assets import UNCLASSIFIED, AssetClass
from engine.stores.tables import asset


class SectorMap:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._sectors: dict[str, str] = {}
        self._classes: dict[str, AssetClass] = {}

    async def load(self) -> None:
        """Read all assets. Raises DBAPIError, OSError."""
        async with self._engine.connect() as connection:
            rows = (await connection.execute(select(asset.c.symbol, asset.c.sector, asset.c.asset_class))).all()
        self._sectors = {row.symbol: row.sector for row in rows}
        self._classes = {row.symbol: AssetClass(row.asset_class) for row in rows}

    def learn(self, unclassified: Iterable[str]) -> None:
        """Note assets that a fill has just created."""
        for symbol in unclassified:
            self._sectors.setdefault(symbol, UNCLASSIFIED)

    def sector_of(self, symbol: str) -> str:
        return self._sectors.get(symbol, UNCLASSIFIED)

    def class_of(self, symbol: str) -> AssetClass:
        return self._classes.get(symbol, AssetClass.UNCLASSIFIED)
