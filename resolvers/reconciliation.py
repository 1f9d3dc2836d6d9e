"""What the reconciler found when it checked a portfolio last (engine.reconciliation)."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

import strawberry

from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context
from resolvers.enums import ReconciliationStatus


@strawberry.type(
    description=(
        "The last comparison of what is shown with a fold of the portfolio's ledger. All but status and figures is "
        "null before the first one."
    )
)
class Reconciliation:
    checked_at: datetime | None = strawberry.field(description="When it was made.")
    ledger_sequence: int | None = strawberry.field(description="How many ledger entries were folded.")
    drift_abs: Decimal | None = strawberry.field(
        description=(
            "|NAV shown − NAV by the ledger| in the base currency, at the same prices; all of the NAV when none was "
            "shown. 0 for a broken ledger, which says no NAV."
        )
    )
    status: ReconciliationStatus = strawberry.field(description="What it found.")
    figures: list[str] = strawberry.field(
        description="The figures that did not agree, sorted, such as `nav` or `hot position AAPL`; empty when all did."
    )


async def load_reconciliation(context: Context, portfolio: PortfolioIdentity) -> Reconciliation:
    last = await context.services.reconciliations.last(portfolio.portfolio_id)
    if last is None:
        status = ReconciliationStatus.NEVER_CHECKED
        return Reconciliation(checked_at=None, ledger_sequence=None, drift_abs=None, status=status, figures=[])
    return Reconciliation(
        checked_at=last.checked_at,
        ledger_sequence=last.ledger_sequence,
        drift_abs=last.drift_abs,
        status=last.status,
        figures=list(last.figures),
    )
