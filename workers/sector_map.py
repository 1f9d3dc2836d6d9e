"""Symbol → asset class, sector and industry as they are in force, kept in memory; what is not there is UNCLASSIFIED.

`refresh` asks for what was loaded since, so that a reclassification is known within the interval at which it is called.
Versions are numbered by their `arrival`: `reclassified_since` says what has moved to another sector after one of them,
also when it was loaded while this process was not there.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.ext.asyncio import AsyncEngine

from engine.assets import Asset, AssetClass, unclassified
from engine.stores.assets_postgres import versions_after
from engine.stores.ledger_rows import driver_of


class SectorMap:
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._assets: dict[str, Asset] = {}
        self._arrival = 0
        # Of each symbol whose sector is known to have changed the arrival that last did it.
        self._moved: dict[str, int] = {}

    @property
    def arrival(self) -> int:
        """The newest version that is known here."""
        return self._arrival

    async def load(self) -> None:
        """Read all assets. Raises DBAPIError, asyncpg.PostgresError, OSError."""
        self._arrival = 0
        await self.refresh()

    async def refresh(self) -> set[str]:
        """Learn what was loaded since; returns the symbols whose class, sector or industry is another one now.

        Raises DBAPIError, asyncpg.PostgresError, OSError.
        """
        async with self._engine.connect() as connection:
            arrived = await versions_after(await driver_of(connection), self._arrival)
        changed = set()
        for one in arrived:
            asset, known = one.asset, self._get(one.asset.symbol)
            if (asset.asset_class, asset.sector, asset.industry) != (known.asset_class, known.sector, known.industry):
                changed.add(asset.symbol)
            if asset.sector != known.sector:
                self._moved[asset.symbol] = one.arrival
            self._assets[asset.symbol] = asset
            self._arrival = one.arrival
        return changed

    def reclassified_since(self, arrival: int) -> set[str]:
        """The symbols that have another sector than they had when `arrival` was the newest version."""
        return {symbol for symbol, moved in self._moved.items() if moved > arrival}

    def learn(self, symbols: Iterable[str]) -> None:
        """Note assets that a fill has just created."""
        for symbol in symbols:
            self._assets.setdefault(symbol, unclassified(symbol))

    def sector_of(self, symbol: str) -> str:
        return self._get(symbol).sector

    def class_of(self, symbol: str) -> AssetClass:
        return self._get(symbol).asset_class

    def _get(self, symbol: str) -> Asset:
        return self._assets.get(symbol) or unclassified(symbol)
