"""The ledger, its shards, positions, corporate actions and day baselines; the append-only guard; history."""

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
    _create_corporate_actions()
    _create_ledger()
    _create_history()
    _create_reconciliation()
    _make_hypertables()


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
        sa.Column("receivables", MONEY, nullable=False),
        sa.Column("trading", MONEY, nullable=False),
        sa.Column("corporate", MONEY, nullable=False),
        sa.Column("ledger_sequence", sa.BigInteger, nullable=False),
        sa.Column("ledger_hash", sa.LargeBinary, nullable=False),
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
        sa.Column("fees", MONEY, nullable=False),
        sa.Column("opened_at", INSTANT, nullable=False),
        sa.Column("opened_sequence", sa.BigInteger, nullable=False),
        sa.CheckConstraint("quantity <> 0", name="position_open"),
        _finite("quantity"),
    )
    op.create_table(
        "closed_position",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("closed_sequence", sa.BigInteger, primary_key=True),
        sa.Column("symbol", sa.Text, nullable=False),
        sa.Column("side", sa.Text, nullable=False),
        sa.Column("realized", MONEY, nullable=False),
        sa.Column("fees", MONEY, nullable=False),
        sa.Column("opened_at", INSTANT, nullable=False),
        sa.Column("closed_at", INSTANT, nullable=False),
        sa.Column("opened_sequence", sa.BigInteger, nullable=False),
    )


def _create_corporate_actions() -> None:
    op.create_table(
        "corporate_action",
        sa.Column("action_id", sa.Text, primary_key=True),
        sa.Column("arrival", sa.BigInteger, sa.Identity(), nullable=False, unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("symbol", sa.Text, nullable=False),
        sa.Column("terms", sa.Text, nullable=False),
        sa.Column("currency", sa.Text),
        sa.Column("effective_at", INSTANT, nullable=False),
        sa.Column("paid_at", INSTANT),
        sa.Column("recorded_at", INSTANT, nullable=False),
        sa.Column("content_hash", sa.LargeBinary, nullable=False),
        sa.CheckConstraint("kind IN ('SPLIT','DIVIDEND')", name="corporate_action_kind"),
    )
    op.create_index("corporate_action_by_symbol", "corporate_action", ["symbol", "effective_at"])
    op.create_table(
        "shard_action",
        sa.Column("shard", sa.Integer, sa.ForeignKey("shard.id"), primary_key=True),
        sa.Column("action_id", sa.Text, sa.ForeignKey("corporate_action.action_id"), primary_key=True),
        sa.Column("step", sa.Text, primary_key=True),
        sa.Column("applied_at", INSTANT, nullable=False),
        sa.Column("late", sa.Boolean, nullable=False),
    )
    op.create_table(
        "receivable",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("action_id", sa.Text, sa.ForeignKey("corporate_action.action_id"), primary_key=True),
        sa.Column("amount", MONEY, nullable=False),
    )
    op.create_table(
        "topic_offset",
        sa.Column("log_id", sa.Text, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True),
        sa.Column("next_offset", sa.BigInteger, nullable=False),
    )


def _create_ledger() -> None:
    op.create_table(
        "ledger_entry",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("event_id", sa.Text, nullable=False, unique=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("symbol", sa.Text),
        sa.Column("side", sa.Text),
        sa.Column("quantity", NUMBER),
        sa.Column("price", NUMBER),
        sa.Column("scale", sa.Text),
        sa.Column("amount", MONEY, nullable=False),
        sa.Column("fee", MONEY, nullable=False),
        sa.Column("receivable", MONEY, nullable=False),
        sa.Column("realized", MONEY, nullable=False),
        sa.Column("cost", MONEY, nullable=False),
        sa.Column("nav_effect", MONEY, nullable=False),
        sa.Column("cash_after", MONEY, nullable=False),
        sa.Column("nav_before", MONEY),
        sa.Column("effective_at", INSTANT, nullable=False),
        sa.Column("recorded_at", INSTANT, nullable=False),
        sa.Column("late", sa.Boolean, nullable=False),
        sa.Column("reference", sa.Text),
        sa.Column("reverses", sa.Text, unique=True),
        sa.Column("content_hash", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.CheckConstraint(
            "kind IN ('OPEN','FILL','DEPOSIT','WITHDRAWAL','REWARD','FEE','INTEREST','DIVIDEND',"
            "'SPLIT','DIVIDEND_ACCRUED','DIVIDEND_PAID')",
            name="ledger_kind",
        ),
        sa.PrimaryKeyConstraint(
            "portfolio_id",
            "sequence",
            postgresql_include=["kind", "symbol", "side", "amount", "effective_at", "recorded_at", "reverses"],
        ),
        sa.CheckConstraint("fee >= 0 OR reverses IS NOT NULL", name="ledger_fee"),
        _finite("amount"),
    )
    op.create_index("ledger_entry_by_symbol", "ledger_entry", ["portfolio_id", "symbol", "sequence"])
    op.create_index(
        "ledger_entry_by_kind",
        "ledger_entry",
        ["portfolio_id", "kind", "sequence"],
        postgresql_where=sa.text("kind <> 'FILL'"),
    )
    # Index-only scans take what was vacuumed last; by default a fifth of the table waits for that.
    op.execute("ALTER TABLE ledger_entry SET (autovacuum_vacuum_insert_scale_factor = 0.02)")
    op.create_index("ledger_entry_recorded", "ledger_entry", ["recorded_at"], postgresql_using="brin")
    op.create_index(
        "ledger_entry_flows",
        "ledger_entry",
        ["recorded_at"],
        postgresql_where=sa.text("kind IN ('DEPOSIT','WITHDRAWAL','REWARD')"),
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
        sa.Column("estimated", sa.Boolean, nullable=False),
    )
    op.create_table(
        "equity_snapshot",
        sa.Column("portfolio_id", sa.Text, primary_key=True),
        sa.Column("at", INSTANT, primary_key=True),
        sa.Column("nav", MONEY, nullable=False),
        sa.Column("cash", MONEY, nullable=False),
        sa.Column("receivables", MONEY, nullable=False),
        sa.Column("positions_value", MONEY, nullable=False),
        sa.Column("flows", MONEY, nullable=False),
        sa.Column("twr_factor", sa.Double),
        sa.Column("quality", sa.SmallInteger, nullable=False),
        sa.Column("marked_at", INSTANT, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("ledger_sequence", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "price_close",
        sa.Column("symbol", sa.Text, primary_key=True),
        sa.Column("at", INSTANT, primary_key=True),
        sa.Column("price", NUMBER, nullable=False),
        sa.Column("ts_event", INSTANT, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("condition", sa.Text, nullable=False),
    )


def _create_reconciliation() -> None:
    op.create_table(
        "reconciliation",
        sa.Column("portfolio_id", sa.Text, sa.ForeignKey("portfolio.id"), primary_key=True),
        sa.Column("checked_at", INSTANT, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("ledger_sequence", sa.BigInteger, nullable=False),
        sa.Column("drift_abs", MONEY, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("figures", ARRAY(sa.Text), nullable=False),
    )
    op.create_table(
        "repair",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("shard", sa.Integer, nullable=False),
        sa.Column("asked_at", INSTANT, nullable=False),
        sa.Column("portfolios", ARRAY(sa.Text), nullable=False),
        sa.Column("figures", ARRAY(sa.Text), nullable=False),
        sa.Column("from_epoch", sa.BigInteger, nullable=False),
        sa.Column("to_epoch", sa.BigInteger),
        sa.Column("done_at", INSTANT),
    )


def _make_hypertables() -> None:
    """Hypertables and a daily continuous aggregate where TimescaleDB can be had, else a view of the same name.

    All of it is one transaction with the tables: a continuous aggregate may be made in one, as long as it is made
    WITH NO DATA, so a migration that fails leaves nothing behind.
    """
    _create_twr_product()
    if not _has_timescale():
        op.execute(f"CREATE VIEW equity_snapshot_daily AS {_DAILY}")
        _cover_snapshots()
        return
    for table, chunk in (("equity_snapshot", "7 days"), ("price_close", "30 days")):
        op.execute(
            f"SELECT create_hypertable('{table}', 'at', create_default_indexes => false, "
            f"chunk_time_interval => interval '{chunk}')"
        )
    # Compression and continuous aggregates are of the edition under the Timescale License; the one that is only
    # Apache 2.0 has hypertables, and gets the plain twin of the rest.
    if op.get_bind().scalar(sa.text("SELECT current_setting('timescaledb.license')")) != "timescale":
        structlog.get_logger("migration").warning("timescaledb_apache_only", missing="compression, daily aggregate")
        op.execute(f"CREATE VIEW equity_snapshot_daily AS {_DAILY}")
        return
    for table, segment in (("equity_snapshot", "portfolio_id"), ("price_close", "symbol")):
        op.execute(
            f"ALTER TABLE {table} SET (timescaledb.compress, timescaledb.compress_segmentby = '{segment}', "
            "timescaledb.compress_orderby = 'at')"
        )
        op.execute(f"SELECT add_compression_policy('{table}', interval '7 days')")
    # Real-time aggregation is off unless it is asked for; without it the running day would be missing.
    op.execute(
        "CREATE MATERIALIZED VIEW equity_snapshot_daily "
        f"WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS {_CONTINUOUS} WITH NO DATA"
    )
    # It must not reach back to rows that retention has dropped (engine.stores.history_retention keeps at least 400
    # days): a refresh there would delete their days.
    op.execute(
        "SELECT add_continuous_aggregate_policy('equity_snapshot_daily', start_offset => interval '366 days', "
        "end_offset => interval '1 day', schedule_interval => interval '1 hour')"
    )


def _cover_snapshots() -> None:
    """Let curves be read from the key alone: a portfolio's rows lie a page each, as all portfolios' come together.

    That takes pages that a vacuum has seen; by default one comes after a fifth of the table has been added.
    """
    op.execute(
        "ALTER TABLE equity_snapshot DROP CONSTRAINT equity_snapshot_pkey, ADD CONSTRAINT equity_snapshot_pkey "
        "PRIMARY KEY (portfolio_id, at) INCLUDE (nav, quality, ledger_sequence)"
    )
    op.execute("ALTER TABLE equity_snapshot SET (autovacuum_vacuum_insert_scale_factor = 0.01)")


def _has_timescale() -> bool:
    """Available is not enough: it must be preloaded and permitted."""
    connection = op.get_bind()
    if not connection.scalar(sa.text("SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb'")):
        return False
    try:
        with connection.begin_nested():
            connection.execute(sa.text("CREATE EXTENSION IF NOT EXISTS timescaledb"))
    except sa.exc.DBAPIError as error:
        structlog.get_logger("migration").warning("timescaledb_unusable", reason=str(error.orig)[:200])
        return False
    return True


def _create_twr_product() -> None:
    """The product of TWR factors; NULL as soon as one is, or when it is more than a double holds."""
    op.execute(
        """
        CREATE FUNCTION multiply_twr(product double precision, factor double precision) RETURNS double precision
        LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
            SELECT CASE WHEN product = 0 OR factor = 0 THEN product * factor
                WHEN abs(log(abs(product)) + log(abs(factor))) < 300 THEN product * factor END
        $$
        """
    )
    op.execute(
        "CREATE AGGREGATE twr_product(double precision) "
        "(SFUNC = multiply_twr, STYPE = double precision, INITCOND = '1', PARALLEL = SAFE)"
    )


# The last row of each UTC day, and what the day's rows say of their intervals.
_DAILY = """
    SELECT portfolio_id, date_trunc('day', at, 'UTC') AS day, max(at) AS at,
        (array_agg(nav ORDER BY at DESC))[1] AS nav, (array_agg(quality ORDER BY at DESC))[1] AS quality,
        (array_agg(ledger_sequence ORDER BY at DESC))[1] AS ledger_sequence,
        sum(flows) AS flows, twr_product(twr_factor) AS twr_factor
    FROM equity_snapshot GROUP BY 1, 2
"""
_CONTINUOUS = """
    SELECT portfolio_id, time_bucket(interval '1 day', at) AS day, max(at) AS at,
        last(nav, at) AS nav, last(quality, at) AS quality, last(ledger_sequence, at) AS ledger_sequence,
        sum(flows) AS flows, twr_product(twr_factor) AS twr_factor
    FROM equity_snapshot GROUP BY 1, 2
"""


def _drop_daily() -> None:
    """A continuous aggregate looks like a view, and is dropped like a materialized one."""
    with_timescale = op.get_bind().scalar(sa.text("SELECT 1 FROM pg_extension WHERE extname = 'timescaledb'"))
    continuous = "SELECT 1 FROM timescaledb_information.continuous_aggregates WHERE view_name = 'equity_snapshot_daily'"
    materialized = with_timescale and op.get_bind().scalar(sa.text(continuous))
    op.execute(f"DROP {'MATERIALIZED ' if materialized else ''}VIEW equity_snapshot_daily")
    op.execute("DROP AGGREGATE twr_product(double precision)")
    op.execute("DROP FUNCTION multiply_twr(double precision, double precision)")


def downgrade() -> None:
    _drop_daily()
    for table in (
        "repair",
        "reconciliation",
        "price_close",
        "equity_snapshot",
        "day_baseline",
        "ledger_entry",
        "topic_offset",
        "receivable",
        "shard_action",
        "corporate_action",
        "closed_position",
        "position",
        "portfolio",
        "evaluator",
        "shard",
        "asset",
    ):
        op.drop_table(table)
    op.execute("DROP FUNCTION refuse_ledger_change()")
