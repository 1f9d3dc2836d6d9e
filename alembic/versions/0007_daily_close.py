"""Up to which session close the daily job has judged, so that none is passed over while nobody judges."""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "daily_close",
        sa.Column("is_last", sa.Boolean, primary_key=True, server_default="true"),
        sa.Column("judged_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("is_last", name="daily_close_one"),
    )
