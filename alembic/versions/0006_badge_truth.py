"""What badges rest on: the classification that each shard was last looked at with; streaks that end at reversals; since
when a position is held, whatever its fill says of itself. And what webhooks tell of hosts, and who may test them when.
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# A streak begins anew with the reversal of a fill: the profitable closes since that and the last other close.
_COUNT_STREAKS = """
    WITH reversed AS (
        SELECT portfolio_id, max(sequence) AS at FROM ledger_entry
        WHERE kind = 'FILL' AND reverses IS NOT NULL GROUP BY portfolio_id
    ), closed AS (
        SELECT cycle.portfolio_id, closed_sequence, cycle.realized > cycle.fees AS is_profitable
        FROM reversed JOIN closed_position AS cycle USING (portfolio_id) JOIN ledger_entry AS entry
            ON entry.portfolio_id = cycle.portfolio_id AND entry.sequence = closed_sequence
        WHERE closed_sequence > reversed.at AND entry.kind = 'FILL'
    ), lost AS (
        SELECT portfolio_id, max(closed_sequence) AS at FROM closed WHERE NOT is_profitable GROUP BY portfolio_id
    )
    UPDATE portfolio SET streak = counted.streak FROM (
        SELECT reversed.portfolio_id, count(closed_sequence) AS streak FROM reversed
        LEFT JOIN lost USING (portfolio_id) LEFT JOIN closed
            ON closed.portfolio_id = reversed.portfolio_id AND closed_sequence > coalesce(lost.at, 0)
        GROUP BY reversed.portfolio_id
    ) AS counted WHERE portfolio.id = counted.portfolio_id AND portfolio.streak <> counted.streak
"""

_HOLD = """
    UPDATE position SET held_since = greatest(position.opened_at, entry.recorded_at) FROM ledger_entry AS entry
    WHERE entry.portfolio_id = position.portfolio_id AND entry.sequence = opened_sequence
"""


def upgrade() -> None:
    # 0: what was loaded while nobody was there is looked at once by the next owner of each shard.
    op.add_column("shard", sa.Column("classified_arrival", sa.BigInteger, nullable=False, server_default="0"))
    op.execute(_COUNT_STREAKS)
    op.add_column("position", sa.Column("held_since", sa.DateTime(timezone=True)))
    op.execute(_HOLD)
    op.execute("UPDATE position SET held_since = opened_at WHERE held_since IS NULL")
    op.alter_column("position", "held_since", nullable=False)
    op.execute("UPDATE webhook_attempt SET error = 'UNRESOLVED' WHERE error = 'PRIVATE_ADDRESS'")
    op.create_table(
        "webhook_test",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("tested_at", sa.DateTime(timezone=True), nullable=False),
    )
