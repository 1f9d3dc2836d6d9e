"""What the reconciler found, as readers see it, from the table `reconciliation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from engine.reconciliation import ReconciliationStatus
from engine.stores.ledger_reads import PoolSource

_LAST = """
    SELECT checked_at, ledger_sequence, drift_abs, status, figures FROM reconciliation WHERE portfolio_id = $1
"""


@dataclass(frozen=True, slots=True)
class LastCheck:
    """A portfolio's row of `reconciliation`."""

    checked_at: datetime
    ledger_sequence: int
    drift_abs: Decimal
    status: ReconciliationStatus
    figures: Sequence[str]


class ReconciliationReads:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away."""

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool

    async def last(self, portfolio_id: str) -> LastCheck | None:
        """The portfolio's last check; None when there was none."""
        row = await self._pool().fetchrow(_LAST, portfolio_id)
        if row is None:
            return None
        checked_at, ledger_sequence, drift_abs, status, figures = row
        return LastCheck(checked_at, ledger_sequence, drift_abs, ReconciliationStatus(status), figures)
