"""Assets in PostgreSQL, table `asset` (engine.stores.tables): what every process and every query joins with.

A later load wins over an earlier one, row by row.
Listing is by keyset, in symbol order of the C collation, so that pages neither repeat nor miss a symbol
whatever the database's locale is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import asyncpg

from engine.assets import Asset, AssetClass

UPSERT_COUNT_MAX = 1_000  # rows of one statement; bounds its parameters and its locks

_COLUMNS = "symbol, name, asset_class, sector, industry"
_ROWS = "SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])"
_UPSERT = f"""
    INSERT INTO asset ({_COLUMNS}) {_ROWS}
    ON CONFLICT (symbol) DO UPDATE SET
        name = excluded.name, asset_class = excluded.asset_class,
        sector = excluded.sector, industry = excluded.industry
"""
_GET = f"SELECT {_COLUMNS} FROM asset WHERE symbol = ANY($1::text[])"  # noqa: S608
_CLASSES = "SELECT symbol, asset_class FROM asset"
_LIST = f"""
    SELECT {_COLUMNS} FROM asset
    WHERE symbol COLLATE "C" > $1
      AND ($2::text IS NULL OR asset_class = $2) AND ($3::text IS NULL OR sector = $3)
    ORDER BY symbol COLLATE "C" LIMIT $4
"""  # noqa: S608

Connection = asyncpg.Pool | asyncpg.Connection


async def upsert_assets(pool: asyncpg.Pool, assets: Iterable[Asset]) -> int:
    """Write all of `assets` in one transaction, the last of a repeated symbol; answers how many symbols."""
    # Sorted, so that two loads at the same time take their row locks in the same order.
    by_symbol = {asset.symbol: asset for asset in assets}
    ordered = [by_symbol[symbol] for symbol in sorted(by_symbol)]
    async with pool.acquire() as connection, connection.transaction():
        for start in range(0, len(ordered), UPSERT_COUNT_MAX):
            await connection.execute(_UPSERT, *_arrays(ordered[start : start + UPSERT_COUNT_MAX]))
    return len(ordered)


async def get_assets(connection: Connection, symbols: Iterable[str]) -> dict[str, Asset]:
    """The known ones among `symbols`."""
    rows = await connection.fetch(_GET, list(set(symbols)))
    return {row["symbol"]: _asset(row) for row in rows}


async def list_assets(
    connection: Connection,
    count_max: int,
    after: str = "",
    asset_class: AssetClass | None = None,
    sector: str | None = None,
) -> list[Asset]:
    """At most `count_max` assets in symbol order, beginning after the symbol `after`."""
    class_text = None if asset_class is None else asset_class.value
    return [_asset(row) for row in await connection.fetch(_LIST, after, class_text, sector, count_max)]


async def get_classes(connection: Connection) -> dict[str, AssetClass]:
    """The class of every asset, by symbol."""
    return {row["symbol"]: AssetClass(row["asset_class"]) for row in await connection.fetch(_CLASSES)}


def _arrays(assets: Sequence[Asset]) -> list[list[str]]:
    return [
        [asset.symbol for asset in assets],
        [asset.name for asset in assets],
        [asset.asset_class.value for asset in assets],
        [asset.sector for asset in assets],
        [asset.industry for asset in assets],
    ]


def _asset(row: asyncpg.Record) -> Asset:
    asset_class = AssetClass(row["asset_class"])
    return Asset(row["symbol"], row["name"], asset_class, row["sector"], row["industry"])
