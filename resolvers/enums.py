"""The engine's enums as GraphQL knows them. They are imported from here, so that they are described first."""

from __future__ import annotations

import strawberry

from engine.assets import AssetClass
from engine.equity_curve import EquityCurveRange, Resolution
from engine.ledger import LedgerKind, Side
from engine.marks import MarkQuality

__all__ = ["AssetClass", "EquityCurveRange", "LedgerKind", "MarkQuality", "Resolution", "Side"]

strawberry.enum(AssetClass, description="The kind of an asset. UNCLASSIFIED: nobody has said.")
strawberry.enum(
    EquityCurveRange,
    description=(
        "How far a curve reaches back. DAYS_7, DAYS_30: hourly. YEAR_1: the last of each UTC day. ALL: hourly in "
        "the portfolio's first 30 days, then the last of each UTC day."
    ),
)
strawberry.enum(Resolution, name="EquityCurveResolution", description="How far apart the snapshots of a curve lie.")
strawberry.enum(LedgerKind, description="What an entry books: the opening, a fill, or a cash movement by its kind.")
strawberry.enum(Side, description="The side of a fill.")
strawberry.enum(
    MarkQuality,
    description=(
        "How good a price is. LIVE: fresh. STALE: the last good price, older than the limit for staleness. "
        "MISSING: there never was a price, the position is carried at cost. A sum carries the worst of its parts."
    ),
)
