"""Fills are found by when they took place.

An owner that lags behind the clock stamps `recorded_at` with the instant that its Book stands at, which may be hours
before a fill took place. So what was traded since a corporate action can not be bounded by `recorded_at`.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ledger_entry_recorded", "ledger_entry")
    op.create_index("ledger_entry_effective", "ledger_entry", ["effective_at"], postgresql_using="brin")
