"""Badges: rules, what is proved, the outbox, awards and their events."""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NUMBER = sa.Numeric(38, 12)
INSTANT = sa.DateTime(timezone=True)


# What the ledgers that are there already come to: fills that stand, and the profitable closes since the last other one.
_COUNT_FILLS = """
    UPDATE portfolio SET fills = counted.fills FROM (
        SELECT portfolio_id, sum(CASE WHEN reverses IS NULL THEN 1 ELSE -1 END) AS fills
        FROM ledger_entry WHERE kind = 'FILL' GROUP BY portfolio_id
    ) AS counted WHERE portfolio.id = counted.portfolio_id
"""
_COUNT_STREAKS = """
    WITH closed AS (
        SELECT cycle.portfolio_id, closed_sequence, cycle.realized > cycle.fees AS is_profitable
        FROM closed_position AS cycle JOIN ledger_entry AS entry
            ON entry.portfolio_id = cycle.portfolio_id AND entry.sequence = closed_sequence
        WHERE entry.kind = 'FILL' AND entry.reverses IS NULL
    ), lost AS (
        SELECT portfolio_id, max(closed_sequence) AS at FROM closed WHERE NOT is_profitable GROUP BY portfolio_id
    )
    UPDATE portfolio SET streak = counted.streak FROM (
        SELECT closed.portfolio_id, count(*) AS streak FROM closed LEFT JOIN lost USING (portfolio_id)
        WHERE closed_sequence > coalesce(lost.at, 0) GROUP BY closed.portfolio_id
    ) AS counted WHERE portfolio.id = counted.portfolio_id
"""


def upgrade() -> None:
    for name in ("fills", "streak"):
        op.add_column("portfolio", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.execute(_COUNT_FILLS)
    op.execute(_COUNT_STREAKS)
    _create_proofs()
    _create_awards()


def _create_proofs() -> None:
    op.create_table(
        "badge_rule",
        sa.Column("badge_id", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("rarity", sa.Text, nullable=False),
        sa.Column("predicate", sa.Text, nullable=False),
        sa.Column("threshold", NUMBER, nullable=False),
        sa.Column("minimum", NUMBER, nullable=False),
        sa.Column("hysteresis", NUMBER, nullable=False),
        sa.Column("window_days", sa.Integer, nullable=False),
        sa.CheckConstraint("version > 0", name="badge_rule_version"),
    )
    op.create_table(
        "badge_state",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("badge_id", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("unlocked_at", INSTANT, nullable=False),
        sa.Column("events_count", sa.Integer, nullable=False),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("event_id", sa.Text, nullable=False, unique=True),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("produced_log", sa.Text),
        sa.Column("produced_at", INSTANT),
    )
    # Rows come and go; a table that stays small is vacuumed before it grows.
    op.execute("ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000)")


def _create_awards() -> None:
    op.create_table(
        "badge_award",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("badge_id", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("awarded_at", INSTANT, nullable=False),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("evidence", sa.Text, nullable=False),
    )
    op.create_table(
        "badge_event",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("event_id", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("badge_id", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("at", INSTANT, nullable=False),
        sa.Column("evidence", sa.Text, nullable=False),
        sa.CheckConstraint("kind IN ('UNLOCKED','ACTIVATED','LAPSED')", name="badge_event_kind"),
    )
