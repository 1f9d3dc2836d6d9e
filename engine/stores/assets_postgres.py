"""Assets in PostgreSQL, tables `asset` and `asset_version` (engine.stores.tables): what every process joins with.

`asset` has the newest classification of a symbol, `asset_version` all of them, each with the instant since when it is
in force. A symbol's first one has always been, because nobody had another; a load that changes class, sector or
industry begins a new one at the instant of the load, and moves nothing of before. A new name is just a better name:
the newest version has it, and arrives once more. `arrival` numbers versions in the order in which they were committed,
so that readers ask for what is new alone.

Loads come one after another. Loading the same twice changes nothing; of a repeated symbol the last row counts.
Listing is by keyset, in symbol order of the C collation, so that pages neither repeat nor miss a symbol
whatever the database's locale is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from engine.assets import Asset, AssetClass

UPSERT_COUNT_MAX = 1_000  # rows of one statement; bounds its parameters and its locks

_COLUMNS = "symbol, name, asset_class, sector, industry"
# Fills add UNCLASSIFIED assets before a load or after it: no version arrives before one that is committed after it.
_ONE_AFTER_ANOTHER = "LOCK TABLE asset_version IN SHARE ROW EXCLUSIVE MODE"
_UPSERT = f"""
    INSERT INTO asset AS known ({_COLUMNS})
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])
    ON CONFLICT (symbol) DO UPDATE SET
        name = excluded.name, asset_class = excluded.asset_class,
        sector = excluded.sector, industry = excluded.industry,
        version = known.version + CASE WHEN (known.asset_class, known.sector, known.industry)
            = (excluded.asset_class, excluded.sector, excluded.industry) THEN 0 ELSE 1 END
    WHERE ($6 OR known.asset_class = 'UNCLASSIFIED')
        AND (known.name, known.asset_class, known.sector, known.industry)
            <> (excluded.name, excluded.asset_class, excluded.sector, excluded.industry)
"""  # noqa: S608 - the columns are ours
# A version is never in force before the one that it follows, whatever the clock says.
_BEGIN_VERSIONS = """
    INSERT INTO asset_version (symbol, version, effective_at, name, asset_class, sector, industry)
    SELECT symbol, asset.version, CASE WHEN before.version IS NULL THEN 'epoch'
        ELSE greatest($2, before.effective_at + interval '1 microsecond') END,
        asset.name, asset.asset_class, asset.sector, asset.industry
    FROM asset LEFT JOIN asset_version AS before USING (symbol)
    WHERE symbol = ANY($1::text[]) AND (before.version IS NULL OR before.version = asset.version - 1)
        AND NOT EXISTS (
            SELECT FROM asset_version AS same WHERE same.symbol = asset.symbol AND same.version = asset.version
        )
    ORDER BY symbol
    RETURNING version
"""
_RENAME = """
    UPDATE asset_version AS newest SET name = asset.name, arrival = DEFAULT FROM asset
    WHERE asset.symbol = ANY($1::text[]) AND newest.symbol = asset.symbol AND newest.version = asset.version
        AND newest.name <> asset.name
"""
_VERSIONS = """
    SELECT arrival, symbol, version, effective_at, name, asset_class, sector, industry FROM asset_version
    WHERE arrival > $1 ORDER BY arrival
"""
_IN_FORCE = """
    SELECT DISTINCT ON (symbol) symbol, name, asset_class, sector, industry, version, effective_at FROM asset_version
    WHERE symbol = ANY($1::text[]) AND effective_at <= $2 ORDER BY symbol, version DESC
"""
_NEWEST = """
    SELECT symbol, asset.name, asset.asset_class, asset.sector, asset.industry, version, effective_at
    FROM asset LEFT JOIN asset_version USING (symbol, version)
"""
_GET = f"{_NEWEST} WHERE symbol = ANY($1::text[])"
_CLASSES = "SELECT symbol, asset_class FROM asset"
_LIST = f"""
    {_NEWEST}
    WHERE symbol COLLATE "C" > $1
      AND ($2::text IS NULL OR asset.asset_class = $2) AND ($3::text IS NULL OR asset.sector = $3)
    ORDER BY symbol COLLATE "C" LIMIT $4
"""

_ALWAYS = datetime.fromtimestamp(0, UTC)

Connection = asyncpg.Pool | asyncpg.Connection | PoolConnectionProxy


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did, in symbols: `added` were not known, `reclassified` have begun a new version."""

    count: int
    added: int
    reclassified: int


@dataclass(frozen=True, slots=True)
class AssetVersion:
    """A classification, and since when it is in force."""

    arrival: int
    version: int
    effective_at: datetime
    asset: Asset


async def upsert_assets(pool: asyncpg.Pool, assets: Iterable[Asset], at: datetime, reclassify: bool = True) -> Loaded:
    """Write all of `assets` in one transaction; what changes a classification does so from `at` on.

    Without `reclassify` only what nobody has classified yet is changed.
    """
    by_symbol = {asset.symbol: asset for asset in assets}
    ordered = [by_symbol[symbol] for symbol in sorted(by_symbol)]
    begun: list[int] = []
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(_ONE_AFTER_ANOTHER)
        for start in range(0, len(ordered), UPSERT_COUNT_MAX):
            part = ordered[start : start + UPSERT_COUNT_MAX]
            await connection.execute(_UPSERT, *_arrays(part), reclassify)
            symbols = [one.symbol for one in part]
            begun += [row[0] for row in await connection.fetch(_BEGIN_VERSIONS, symbols, at)]
            await connection.execute(_RENAME, symbols)
    return Loaded(len(ordered), begun.count(1), len(begun) - begun.count(1))


async def versions_after(connection: Connection, arrival: int) -> list[AssetVersion]:
    """The classifications that arrived after `arrival`, in that order."""
    rows = await connection.fetch(_VERSIONS, arrival)
    return [AssetVersion(row["arrival"], row["version"], row["effective_at"], _asset(row)) for row in rows]


async def classified_at(connection: Connection, symbols: Iterable[str], at: datetime) -> dict[str, Asset]:
    """The classifications in force at an instant, of the known ones among `symbols`."""
    rows = await connection.fetch(_IN_FORCE, list(set(symbols)), at)
    return {row["symbol"]: _asset(row) for row in rows}


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
    asset_class, since = AssetClass(row["asset_class"]), row["effective_at"]
    always = since is None or since == _ALWAYS
    return Asset(
        row["symbol"],
        row["name"],
        asset_class,
        row["sector"],
        row["industry"],
        row["version"],
        None if always else since,
    )
