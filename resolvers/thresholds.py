"""Thresholds (engine.thresholds): bounds of a portfolio's figures that webhooks are told of when reached."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

import strawberry

from engine.stores.ledger_reads import PortfolioIdentity
from engine.stores.thresholds_postgres import ShownThreshold, TooManyThresholds
from engine.thresholds import ThresholdRefused, check_threshold
from resolvers.context import SCOPE_WEBHOOKS_WRITE, Context, Info
from resolvers.enums import ThresholdFigure, ThresholdSide
from resolvers.errors import ErrorCode, PublicError, not_found


@strawberry.type(
    description=(
        "A bound of a figure of a portfolio's. It fires once when a flush finds the figure at or beyond the bound, and "
        "is armed again once the figure has left it by more than the hysteresis. An unknown figure, and a mark of "
        "quality MISSING, do neither."
    )
)
class Threshold:
    threshold_id: str = strawberry.field(description="Its id; the first part of its events' ids.")
    portfolio_id: str = strawberry.field(description="Whose figure is watched.")
    figure: ThresholdFigure = strawberry.field(description="Which figure.")
    side: ThresholdSide = strawberry.field(description="On which side of the bound it fires.")
    bound: Decimal = strawberry.field(description="The bound, in the figure's unit; the bound itself is beyond it.")
    hysteresis: Decimal = strawberry.field(
        description="How far beyond the bound, on the other side, the figure must have been to arm it again; ≥ 0."
    )
    armed: bool = strawberry.field(description="Whether it fires the next time.")
    crossings_count: int = strawberry.field(description="How often it has fired.")
    crossed_at: datetime | None = strawberry.field(
        description="The mark that it fired at last; null when it never did."
    )
    created_at: datetime = strawberry.field(description="When it was created; it is watched within 5 s.")


@strawberry.input(description="A new threshold. When the figure is beyond the bound already, it fires at once.")
class CreateThresholdInput:
    portfolio_id: str = strawberry.field(description="A portfolio of the caller's own.")
    figure: ThresholdFigure = strawberry.field(description="Which figure to watch.")
    side: ThresholdSide = strawberry.field(description="On which side of the bound to fire.")
    bound: Decimal = strawberry.field(
        description="At most 6 decimals for an amount, 12 for a ratio; else TOO_PRECISE, TOO_LARGE."
    )
    hysteresis: Decimal = strawberry.field(
        default=Decimal(0), description="As exact as the bound, and not below 0 (BAD_HYSTERESIS)."
    )


async def create_threshold(info: Info, input: CreateThresholdInput) -> Threshold:
    context = info.context
    await owned_portfolio(context, input.portfolio_id)
    try:
        check_threshold(input.figure, input.bound, input.hysteresis)
        created = await context.services.thresholds.create(
            input.portfolio_id,
            input.figure,
            input.side,
            input.bound,
            input.hysteresis,
            context.services.settings.thresholds_per_portfolio_max,
        )
    except ThresholdRefused as error:
        raise PublicError(error.code, str(error)) from None
    except TooManyThresholds:
        allowed = context.services.settings.thresholds_per_portfolio_max
        raise PublicError(ErrorCode.TOO_MANY_THRESHOLDS, f"a portfolio has at most {allowed} thresholds") from None
    return _show(created)


async def delete_threshold(info: Info, threshold_id: str) -> str:
    access = info.context.require(SCOPE_WEBHOOKS_WRITE)
    # PostgreSQL refuses to even compare a text with NUL.
    if "\0" in threshold_id or not await info.context.services.thresholds.delete(access.subject, threshold_id):
        raise not_found("threshold")
    return threshold_id


async def load_thresholds(context: Context, portfolio: PortfolioIdentity) -> list[Threshold]:
    return [_show(shown) for shown in await context.services.thresholds.list(portfolio.portfolio_id)]


async def owned_portfolio(context: Context, portfolio_id: str) -> PortfolioIdentity:
    """A portfolio of the caller's own; an administrator's rights do not make others' his. Raises PublicError."""
    access = context.require(SCOPE_WEBHOOKS_WRITE)
    identity = await context.services.portfolios.find_expected(portfolio_id)
    if identity is None or identity.owner != access.subject:
        raise not_found("portfolio")
    return identity


def _show(shown: ShownThreshold) -> Threshold:
    one = shown.threshold
    return Threshold(
        threshold_id=one.threshold_id,
        portfolio_id=one.portfolio_id,
        figure=one.figure,
        side=one.side,
        bound=one.bound,
        hysteresis=one.hysteresis,
        armed=one.armed,
        crossings_count=shown.crossings_count,
        crossed_at=shown.crossed_at,
        created_at=shown.created_at,
    )
