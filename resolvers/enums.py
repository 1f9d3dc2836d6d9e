"""The engine's enums as GraphQL knows them. They are imported from here, so that they are described first."""

from __future__ import annotations

import strawberry

from engine.assets import AssetClass
from engine.badges import BadgeEventKind, Rarity
from engine.badges import Predicate as BadgePredicate
from engine.equity_curve import EquityCurveRange, Resolution
from engine.ledger import LedgerKind, Side
from engine.marks import MarkQuality
from engine.performance import Statistic, StatisticReason
from engine.reconciliation import ReconciliationStatus
from engine.thresholds import ThresholdFigure, ThresholdSide
from engine.webhooks import AttemptError, DeliveryStatus, WebhookKind

__all__ = [
    "AssetClass",
    "AttemptError",
    "BadgeEventKind",
    "BadgePredicate",
    "DeliveryStatus",
    "EquityCurveRange",
    "LedgerKind",
    "MarkQuality",
    "Rarity",
    "ReconciliationStatus",
    "Resolution",
    "Side",
    "Statistic",
    "StatisticReason",
    "ThresholdFigure",
    "ThresholdSide",
    "WebhookKind",
]

strawberry.enum(AssetClass, description="The kind of an asset. UNCLASSIFIED: nobody has said.")
strawberry.enum(
    BadgeEventKind,
    description=(
        "UNLOCKED: awarded, for good. LAPSED: what it was awarded for holds no more. ACTIVATED: after it lapsed, it "
        "holds again."
    ),
)
strawberry.enum(
    BadgePredicate,
    name="BadgePredicate",
    description=(
        "Which figure a badge goes by: of the ledger (FILLS, STREAK), of the allocation (SECTORS), of time (HELD), of "
        "prices (NAV), of the last session close (SECTOR_PROFITS, SHARPE)."
    ),
)
strawberry.enum(Rarity, description="How much of a feat a badge is, the least first.")
strawberry.enum(
    EquityCurveRange,
    description=(
        "How far a curve reaches back. DAYS_7, DAYS_30: hourly. YEAR_1: the last of each UTC day. ALL: hourly in "
        "the portfolio's first 30 days, then the last of each UTC day."
    ),
)
strawberry.enum(Resolution, name="EquityCurveResolution", description="How far apart the snapshots of a curve lie.")
strawberry.enum(
    LedgerKind,
    description=(
        "What an entry books. OPEN: the opening. FILL: an execution. DEPOSIT, WITHDRAWAL, REWARD: external flows, "
        "never P&L. FEE, INTEREST, DIVIDEND: cash movements that are P&L. SPLIT: a position in new shares. "
        "DIVIDEND_ACCRUED: a dividend owed from its ex-date on. DIVIDEND_PAID: one that was paid."
    ),
)
strawberry.enum(
    ReconciliationStatus,
    description=(
        "What the last check of a portfolio found. AGREED: every figure shown is what the ledger says. REPAIRED: it is "
        "again, after it was not and all was published anew. DRIFTED: it is not. BROKEN_LEDGER: the entries of the "
        "ledger do not follow from each other, or the record made of them is not theirs. NEVER_CHECKED: no check yet."
    ),
)
strawberry.enum(Side, description="The side of a fill.")
strawberry.enum(
    MarkQuality,
    description=(
        "How good a price is, best first; a sum carries the worst of its parts. LIVE: fresh. CLOSED: of the last "
        "session of its market, which is closed now. DELAYED: its source publishes late on purpose. STALE: older than "
        "the limit while its market is open, or of a session before the last. HALTED: trading is suspended, the price "
        "is the last good one. MISSING: there never was a price, the position is carried at cost."
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
        "gain, a loss. OUT_OF_RANGE: beyond 10^15. PRICES_NOT_RECORDED: the prices recorded for an end of the range do "
        "not give the NAV that it has."
    ),
)
strawberry.enum(
    ThresholdFigure,
    description=(
        "A figure of the mark. NAV, DAY_PNL: an amount of the base currency. DAY_PNL_RATIO: a fraction, 0.01 is one "
        "percent."
    ),
)
strawberry.enum(ThresholdSide, description="ABOVE fires at figure ≥ bound, BELOW at figure ≤ bound.")
strawberry.enum(
    WebhookKind,
    description="What a webhook can be told of: events of badges, and thresholds that were crossed.",
)
strawberry.enum(
    DeliveryStatus,
    description=(
        "PENDING: to be attempted (again). DELIVERED: the endpoint answered 2xx. DEAD: given up a day after the event."
    ),
)
strawberry.enum(
    AttemptError,
    description=(
        "STATUS: an answer other than 2xx; redirections are not followed. TIMEOUT: no answer in time. UNRESOLVED: the "
        "host does not resolve to public addresses alone. UNREACHABLE: no connection, or no TLS. PROTOCOL: no HTTP "
        "answer."
    ),
)
