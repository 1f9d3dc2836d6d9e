"""Assets: what a symbol stands for (engine.assets)."""

from __future__ import annotations

from datetime import datetime

import strawberry

from engine.assets import Asset as EngineAsset
from resolvers.context import SCOPE_PORTFOLIO_READ, Info
from resolvers.enums import AssetClass
from resolvers.errors import not_found
from resolvers.nodes import Node, write_id
from resolvers.pages import Connection, check_first, connection, read_cursor, write_cursor


@strawberry.type(description="What a symbol stands for. Anybody with a token may see assets.")
class Asset(Node):
    symbol: str = strawberry.field(description="The name under which it is quoted and traded; unique.")
    name: str = strawberry.field(description="Its name in words; the symbol where nobody has said.")
    asset_class: AssetClass = strawberry.field(description="The kind of asset.")
    sector: str = strawberry.field(
        description="GICS sector of an equity, navstream's own sectors of other classes, or UNCLASSIFIED."
    )
    industry: str = strawberry.field(description="Industry within the sector; empty where nobody has said.")
    version: int = strawberry.field(
        description="Counts the asset's classifications (class, sector and industry), from 1; this one is in force."
    )
    classified_at: datetime | None = strawberry.field(
        description="Since when this classification is in force; null for the first one, which always was."
    )


def show_asset(asset: EngineAsset) -> Asset:
    return Asset(
        id=write_id("Asset", asset.symbol),
        symbol=asset.symbol,
        name=asset.name,
        asset_class=asset.asset_class,
        sector=asset.sector,
        industry=asset.industry,
        version=asset.version,
        classified_at=asset.classified_at,
    )


async def resolve_asset(info: Info, symbol: str) -> Asset | None:
    info.context.require(SCOPE_PORTFOLIO_READ)
    asset = None if "\0" in symbol else await info.context.services.assets.find(symbol)
    if asset is None:
        raise not_found("asset")
    return show_asset(asset)


async def resolve_assets(
    info: Info,
    first: int,
    after: str | None = None,
    asset_class: AssetClass | None = None,
    sector: str | None = None,
) -> Connection[Asset]:
    info.context.require(SCOPE_PORTFOLIO_READ)
    services = info.context.services
    first = check_first(first, services.settings.page_size_max)
    begin = "" if after is None else read_cursor("assets", after)
    if sector is not None and "\0" in sector:
        return connection([], first, after, _cursor, show_asset)
    assets = await services.assets.page(first + 1, begin, asset_class, sector)
    return connection(assets, first, after, _cursor, show_asset)


def _cursor(asset: EngineAsset) -> str:
    return write_cursor("assets", asset.symbol)
