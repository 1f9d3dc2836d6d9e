"""The ledger, its shards, positions and day baselines; the append-only guard; equity snapshots."""

from __future__ import annotations

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects.postgresql import ARRAY

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

MONEY = sa.Numeric(38, 6)
NUMBER = sa.Numeric(38, 12)
INSTANT = sa.DateTime(timezone=True)


def _finite(column: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(
        f"{column} <> 'NaN'::numeric AND abs({column}) < 'Infinity'::numeric", name=f"{column}_finite"
    )


def upgrade() -> None:
    _create_reference_tables()
    _create_portfolio_tables()
    _create_ledger()
    _create_history()


def _create_reference_tables() -> None:
    op.create_table(
        "asset",
        sa.Column("symbol", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("asset_class", sa.Text, nullable=False),
        sa.Column("sector", sa.Text, nullable=False),
        sa.Column("industry", sa.Text, nullable=False),
    )
    op.create_table(
        "shard",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("log_id", sa.Text, nullable=False),
        sa.Column("next_offset", sa.BigInteger, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("lease_until", INSTANT),
        sa.Column("cut_at", INSTANT),
        sa.CheckConstraint("next_offset >= 0 AND epoch >= 0", name="shard_counts"),
    )
    op.create_table(
        "evaluator",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("seen_at", INSTANT, nullable=False),
    )


def _create_portfolio_tables() -> None:
    op.create_table(
        "portfolio",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("shard", sa.Integer, sa.ForeignKey("shard.id"), nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("base_currency", sa.Text, nullable=False),
        sa.Column("day_cut", sa.Text, nullable=False),
        sa.Column("opened_at", INSTANT, nullable=False),
        sa.Column("cash", MONEY, nullable=False),
        sa.Column("realized", MONEY, nullable=False),
        sa.Column("fees", MONEY, nullable=False),
        sa.Column("income", MONEY, nullable=False),
        sa.Column("flows", MONEY, nullable=False),
        sa.Column("ledger_sequence", sa.BigInteger, nullable=False),
        _finite("cash"),
    )
    op.create_index("portfolio_by_owner", "portfolio", ["owner", "id"])
    op.create_index("portfolio_by_shard", "portfolio", ["shard"])
    op.create_table(
        "position",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("symbol", sa.Text, sa.ForeignKey("asset.symbol"), primary_key=True),
        sa.Column("quantity", NUMBER, nullable=False),
        sa.Column("cost", MONEY, nullable=False),
        sa.Column("realized", MONEY, nullable=False),
        sa.Column("opened_at", INSTANT, nullable=False),
        sa.CheckConstraint("quantity <> 0", name="position_open"),
        _finite("quantity"),
    )


def _create_ledger() -> None:
    op.create_table(
        "ledger_entry",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("event_id", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("symbol", sa.Text),
        sa.Column("side", sa.Text),
        sa.Column("quantity", NUMBER),
        sa.Column("price", NUMBER),
        sa.Column("amount", MONEY, nullable=False),
        sa.Column("fee", MONEY, nullable=False),
        sa.Column("realized", MONEY, nullable=False),
        sa.Column("cash_after", MONEY, nullable=False),
        sa.Column("nav_before", MONEY),
        sa.Column("effective_at", INSTANT, nullable=False),
        sa.Column("recorded_at", INSTANT, nullable=False),
        sa.Column("reference", sa.Text),
        sa.Column("content_hash", sa.LargeBinary, nullable=False),
        sa.CheckConstraint(
            "kind IN ('OPEN','FILL','DEPOSIT','WITHDRAWAL','REWARD','FEE','INTEREST','DIVIDEND')",
            name="ledger_kind",
        ),
        sa.CheckConstraint("fee >= 0", name="ledger_fee"),
        _finite("amount"),
    )
    op.execute(
        """
        CREATE FUNCTION refuse_ledger_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'ledger_entry is append-only: % refused', TG_OP USING ERRCODE = 'restrict_violation';
        END $$
        """
    )
    op.execute(
        "CREATE TRIGGER ledger_entry_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entry "
        "FOR EACH STATEMENT EXECUTE FUNCTION refuse_ledger_change()"
    )
    # Fires also under session_replication_role = replica, which would otherwise switch the guard off.
    op.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")


def _create_history() -> None:
    op.create_table(
        "day_baseline",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("cut_at", INSTANT, primary_key=True),
        sa.Column("nav", MONEY, nullable=False),
        sa.Column("ledger_sequence", sa.BigInteger, nullable=False),
        sa.Column("symbols", ARRAY(sa.Text), nullable=False),
        sa.Column("position_values", ARRAY(MONEY), nullable=False),
    )
    op.create_table(
        "equity_snapshot",
        sa.Column("portfolio_id", sa.Text, primary_key=True),
        sa.Column("at", INSTANT, primary_key=True),
        sa.Column("nav", MONEY, nullable=False),
        sa.Column("cash", MONEY, nullable=False),
        sa.Column("positions_value", MONEY, nullable=False),
        sa.Column("quality", sa.SmallInteger, nullable=False),
        sa.Column("marked_at", INSTANT, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("ledger_sequence", sa.BigInteger, nullable=False),
    )
    _make_hypertable()


def _make_hypertable() -> None:
    """A hypertable where TimescaleDB can be had. Available is not enough: it must be preloaded and permitted."""
    connection = op.get_bind()
    if not connection.scalar(sa.text("SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb'")):
        return
    try:
        with connection.begin_nested():
            connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS timescaledb"))
    except sa.exc.DBAPIError as error:
        structlog.get_logger("migration").warning("timescaledb_unusable", reason=str(error.orig)[:200])
        return
    op.execute("SELECT create_hypertable('equity_snapshot', 'at', create_default_indexes => false)")


def downgrade() -> None:
    for table in (
        "equity_snapshot",
        "day_baseline",
        "ledger_entry",
        "position",
        "portfolio",
        "evaluator",
        "shard",
        "asset",
    ):
        op.drop_table(table)
    op.execute("DROP FUNCTION refuse_ledger_change()")
