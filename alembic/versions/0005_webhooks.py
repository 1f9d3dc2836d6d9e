"""Webhooks: endpoints, their secrets, deliveries and the log of them; thresholds."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

NUMBER = sa.Numeric(38, 12)
INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    _create_endpoints()
    _create_deliveries()
    _create_thresholds()


def _create_endpoints() -> None:
    op.create_table(
        "webhook",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("kinds", ARRAY(sa.Text), nullable=False),
        sa.Column("portfolio_ids", ARRAY(sa.Text)),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False, server_default=sa.text("now()")),
    )
    op.create_index("webhook_by_owner", "webhook", ["owner", "id"])
    op.create_table(
        "webhook_secret",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("webhook_id", sa.Text, sa.ForeignKey("webhook.id", ondelete="CASCADE"), nullable=False),
        sa.Column("secret", sa.Text, nullable=False),
        sa.Column("expires_at", INSTANT),
    )
    op.create_index("webhook_secret_by_webhook", "webhook_secret", ["webhook_id", "id"])


def _create_deliveries() -> None:
    op.create_table(
        "webhook_delivery",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("webhook_id", sa.Text, sa.ForeignKey("webhook.id", ondelete="CASCADE"), nullable=False),
        sa.Column("event_id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("portfolio_id", sa.Text),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False, server_default=sa.text("now()")),
        sa.Column("status", sa.Text, nullable=False, server_default="PENDING"),
        sa.Column("attempts_count", sa.Integer, nullable=False, server_default="0"),
        sa.Column("due_at", INSTANT),
        sa.Column("finished_at", INSTANT),
        sa.UniqueConstraint("webhook_id", "event_id", name="webhook_delivery_once"),
        sa.CheckConstraint("status IN ('PENDING','DELIVERED','DEAD')", name="webhook_delivery_status"),
        sa.CheckConstraint("(status = 'PENDING') = (due_at IS NOT NULL)", name="webhook_delivery_due"),
    )
    op.create_index("webhook_delivery_log", "webhook_delivery", ["webhook_id", "id"])
    waiting = sa.text("status = 'PENDING'")
    op.create_index("webhook_delivery_waiting", "webhook_delivery", ["webhook_id", "due_at"], postgresql_where=waiting)
    op.create_index("webhook_delivery_created", "webhook_delivery", ["created_at"], postgresql_using="brin")
    op.create_table(
        "webhook_attempt",
        sa.Column("delivery_id", sa.Text, sa.ForeignKey("webhook_delivery.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("duration_ms", sa.Integer, nullable=False),
        sa.Column("status_code", sa.Integer),
        sa.Column("error", sa.Text),
    )


def _create_thresholds() -> None:
    op.create_table(
        "threshold",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), nullable=False),
        sa.Column("figure", sa.Text, nullable=False),
        sa.Column("side", sa.Text, nullable=False),
        sa.Column("bound", NUMBER, nullable=False),
        sa.Column("hysteresis", NUMBER, nullable=False),
        sa.Column("armed", sa.Boolean, nullable=False, server_default=sa.text("true")),
        sa.Column("crossings_count", sa.Integer, nullable=False, server_default="0"),
        sa.Column("crossed_at", INSTANT),
        sa.Column("created_at", INSTANT, nullable=False, server_default=sa.text("now()")),
        sa.Column("deleted_at", INSTANT),
        sa.Column("arrival", sa.BigInteger, nullable=False, unique=True),
        sa.CheckConstraint("figure IN ('NAV','DAY_PNL','DAY_PNL_RATIO')", name="threshold_figure"),
        sa.CheckConstraint("side IN ('ABOVE','BELOW')", name="threshold_side"),
        sa.CheckConstraint("hysteresis >= 0", name="threshold_hysteresis"),
    )
    op.create_index("threshold_by_portfolio", "threshold", ["portfolio_id", "id"])
