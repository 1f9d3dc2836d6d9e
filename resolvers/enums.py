"""The engine's enums as GraphQL knows them. They are imported from here, so that they are described first."""

from __future__ import annotations

import strawberry

from engine.assets import AssetClass
from engine.equity_curve import EquityCurveRange, Resolution
from engine.ledger import LedgerKind, Side
from engine.marks import MarkQuality
from engine.performance import Statistic, StatisticReason

__all__ = [
    "AssetClass",
    "EquityCurveRange",
    "LedgerKind",
    "MarkQuality",
    "Resolution",
    "Side",
    "Statistic",
    "StatisticReason",
]

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
strawberry.enum(Statistic, description="A field of Performance that may be undefined, by its name.")
strawberry.enum(
    StatisticReason,
    description=(
        "Why a statistic is undefined. NO_HISTORY: the range has fewer than two points. NAV_NOT_POSITIVE: a period "
        "starts at a NAV of 0 or less, from which there is no return. TOO_FEW_DAYS: fewer than 20 whole days (1 for "
        "a best or worst day and the rate). NO_VARIATION: all days are alike. NO_LOSING_DAY: no day lost. "
        "NO_DRAWDOWN: the index never fell. NOT_RECOVERED: it is still below its peak. NO_SIGN_CHANGE: no rate "
        "solves the equation of xirr. NO_TRADES, NO_GAINS, NO_LOSSES: no fill of the range realised anything, a "
        "gain, a loss. OUT_OF_RANGE: beyond 10^15."
    ),
)
