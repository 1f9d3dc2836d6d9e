"""Classifications are versioned and effective-dated."""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "asset_version",
        sa.Column("symbol", sa.Text, sa.ForeignKey("asset.symbol"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("arrival", sa.BigInteger, sa.Identity(), nullable=False, unique=True),
        sa.Column("effective_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("asset_class", sa.Text, nullable=False),
        sa.Column("sector", sa.Text, nullable=False),
        sa.Column("industry", sa.Text, nullable=False),
        sa.CheckConstraint("version > 0", name="asset_version_number"),
    )
    op.add_column("asset", sa.Column("version", sa.Integer, nullable=False, server_default="1"))
    op.execute(
        "INSERT INTO asset_version (symbol, version, effective_at, name, asset_class, sector, industry) "
        "SELECT symbol, 1, 'epoch', name, asset_class, sector, industry FROM asset"
    )
