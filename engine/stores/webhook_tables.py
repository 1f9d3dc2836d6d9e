"""The tables of webhooks and thresholds (SQLAlchemy Core).

    webhook            an endpoint of a subject's, and what it is told of
    webhook_secret     what its deliveries are signed with; two while one is being rotated
    webhook_delivery   what is to be posted, or was; one per webhook and event
    webhook_attempt    every attempt to deliver: the log
    webhook_test       when each subject last asked for a test
    threshold          a bound that a portfolio's figure is watched for

Secrets are kept as they are: a hash of one could not sign. Whoever reads this table can sign in its stead, so it is
granted to the program alone, and no query of the API reads it.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

from engine.stores.tables import INSTANT, NUMBER, metadata

# `portfolio_ids` NULL is all portfolios of the owner, those that it will open too.
webhook = Table(
    "webhook",
    metadata,
    Column("id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("kinds", ARRAY(Text), nullable=False),
    Column("portfolio_ids", ARRAY(Text)),
    Column("active", Boolean, nullable=False),
    Column("created_at", INSTANT, nullable=False, server_default=text("now()")),
    Index("webhook_by_owner", "owner", "id"),
)

# `expires_at` NULL is the newest one, which signs until it is rotated.
webhook_secret = Table(
    "webhook_secret",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("webhook_id", Text, ForeignKey("webhook.id", ondelete="CASCADE"), nullable=False),
    Column("secret", Text, nullable=False),
    Column("expires_at", INSTANT),
    Index("webhook_secret_by_webhook", "webhook_id", "id"),
)

# Ids grow with time, so that they order the log. A PENDING row is taken by moving `due_at` beyond the time that an
# attempt may last: when its worker dies, it is due again then.
webhook_delivery = Table(
    "webhook_delivery",
    metadata,
    Column("id", Text, primary_key=True),
    Column("webhook_id", Text, ForeignKey("webhook.id", ondelete="CASCADE"), nullable=False),
    Column("event_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("portfolio_id", Text),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", INSTANT, nullable=False, server_default=text("now()")),
    Column("status", Text, nullable=False, server_default="PENDING"),
    Column("attempts_count", Integer, nullable=False, server_default="0"),
    Column("due_at", INSTANT),
    Column("finished_at", INSTANT),
    UniqueConstraint("webhook_id", "event_id", name="webhook_delivery_once"),
    CheckConstraint("status IN ('PENDING','DELIVERED','DEAD')", name="webhook_delivery_status"),
    CheckConstraint("(status = 'PENDING') = (due_at IS NOT NULL)", name="webhook_delivery_due"),
    Index("webhook_delivery_log", "webhook_id", "id"),
    Index("webhook_delivery_waiting", "webhook_id", "due_at", postgresql_where=text("status = 'PENDING'")),
    Index("webhook_delivery_created", "created_at", postgresql_using="brin"),
)

webhook_attempt = Table(
    "webhook_attempt",
    metadata,
    Column("delivery_id", Text, ForeignKey("webhook_delivery.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("at", INSTANT, nullable=False),
    Column("duration_ms", Integer, nullable=False),
    Column("status_code", Integer),
    Column("error", Text),
)

webhook_test = Table(
    "webhook_test",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("tested_at", INSTANT, nullable=False),
)

# `arrival` numbers what was created and deleted in the order of the commits, so that an evaluator knows what it has
# not seen. A deleted row stays for a while for that reason.
threshold = Table(
    "threshold",
    metadata,
    Column("id", Text, primary_key=True),
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), nullable=False),
    Column("figure", Text, nullable=False),
    Column("side", Text, nullable=False),
    Column("bound", NUMBER, nullable=False),
    Column("hysteresis", NUMBER, nullable=False),
    Column("armed", Boolean, nullable=False, server_default=text("true")),
    Column("crossings_count", Integer, nullable=False, server_default="0"),
    Column("crossed_at", INSTANT),
    Column("created_at", INSTANT, nullable=False, server_default=text("now()")),
    Column("deleted_at", INSTANT),
    Column("arrival", BigInteger, nullable=False, unique=True),
    CheckConstraint("figure IN ('NAV','DAY_PNL','DAY_PNL_RATIO')", name="threshold_figure"),
    CheckConstraint("side IN ('ABOVE','BELOW')", name="threshold_side"),
    CheckConstraint("hysteresis >= 0", name="threshold_hysteresis"),
    Index("threshold_by_portfolio", "portfolio_id", "id"),
)
