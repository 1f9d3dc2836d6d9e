"""What badges rest on: the classification that each shard was last looked at with."""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # 0: what was loaded while nobody was there is looked at once by the next owner of each shard.
    op.add_column("shard", sa.Column("classified_arrival", sa.BigInteger, nullable=False, server_default="0"))
