"""The permanent record's tables (SQLAlchemy Core), as Alembic builds them.

Money is NUMERIC(38,6), quantities and prices NUMERIC(38,12): what engine.amounts admits fits exactly. NUMERIC
takes NaN, so a CHECK refuses it. `ledger_entry` is append-only (a trigger of the first migration refuses UPDATE,
DELETE and TRUNCATE). `equity_snapshot` and `price_close` are hypertables on `at` where the timescaledb extension
exists, plain tables of the same names otherwise.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

metadata = MetaData()

MONEY = Numeric(38, 6)
NUMBER = Numeric(38, 12)
INSTANT = DateTime(timezone=True)


def _finite(column: str) -> CheckConstraint:
    return CheckConstraint(
        f"{column} <> 'NaN'::numeric AND abs({column}) < 'Infinity'::numeric", name=f"{column}_finite"
    )


asset = Table(
    "asset",
    metadata,
    Column("symbol", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("asset_class", Text, nullable=False),
    Column("sector", Text, nullable=False),
    Column("industry", Text, nullable=False),
    Column("version", Integer, nullable=False, server_default="1"),
)

# Every classification that an asset had, and since when; `asset` has the newest. `arrival` numbers them as they came.
asset_version = Table(
    "asset_version",
    metadata,
    Column("symbol", Text, ForeignKey("asset.symbol"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("arrival", BigInteger, Identity(), nullable=False, unique=True),
    Column("effective_at", INSTANT, nullable=False),
    Column("name", Text, nullable=False),
    Column("asset_class", Text, nullable=False),
    Column("sector", Text, nullable=False),
    Column("industry", Text, nullable=False),
    CheckConstraint("version > 0", name="asset_version_number"),
)

# One row per Kafka partition. `log_id` (cluster/topic) names the log that `next_offset` counts in; `epoch` fences
# its owner; `classified_arrival` is the newest asset_version.arrival that its portfolios' badges were looked at with.
shard = Table(
    "shard",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("log_id", Text, nullable=False),
    Column("next_offset", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("owner", Text),
    Column("lease_until", INSTANT),
    Column("classified_arrival", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("next_offset >= 0 AND epoch >= 0", name="shard_counts"),
)

# Who evaluates at present, also those that own nothing yet: the divisor of the fair share.
evaluator = Table(
    "evaluator",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("seen_at", INSTANT, nullable=False),
)

# `ledger_hash` is the hash of the newest ledger entry: entries cut off the end of the chain are missed by it.
portfolio = Table(
    "portfolio",
    metadata,
    Column("id", Text, primary_key=True),
    Column("shard", Integer, ForeignKey("shard.id"), nullable=False),
    Column("owner", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("base_currency", Text, nullable=False),
    Column("day_cut", Text, nullable=False),
    Column("opened_at", INSTANT, nullable=False),
    Column("cash", MONEY, nullable=False),
    Column("realized", MONEY, nullable=False),
    Column("fees", MONEY, nullable=False),
    Column("income", MONEY, nullable=False),
    Column("flows", MONEY, nullable=False),
    Column("receivables", MONEY, nullable=False),
    Column("trading", MONEY, nullable=False),
    Column("corporate", MONEY, nullable=False),
    Column("ledger_sequence", BigInteger, nullable=False),
    Column("ledger_hash", LargeBinary, nullable=False),
    Column("fills", BigInteger, nullable=False, server_default="0"),
    Column("streak", BigInteger, nullable=False, server_default="0"),
    _finite("cash"),
    Index("portfolio_by_owner", "owner", "id"),
    Index("portfolio_by_shard", "shard"),
)

# Open positions only: a flat one leaves this table for `closed_position`. `fees` and `realized` are the cycle's, whose
# first entry is `opened_sequence`.
position = Table(
    "position",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("symbol", Text, ForeignKey("asset.symbol"), primary_key=True),
    Column("quantity", NUMBER, nullable=False),
    Column("cost", MONEY, nullable=False),
    Column("realized", MONEY, nullable=False),
    Column("fees", MONEY, nullable=False),
    Column("opened_at", INSTANT, nullable=False),
    Column("opened_sequence", BigInteger, nullable=False),
    Column("held_since", INSTANT, nullable=False),
    CheckConstraint("quantity <> 0", name="position_open"),
    _finite("quantity"),
)

# Cycles from flat to flat, by the entry that ended each.
closed_position = Table(
    "closed_position",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("closed_sequence", BigInteger, primary_key=True),
    Column("symbol", Text, nullable=False),
    Column("side", Text, nullable=False),
    Column("realized", MONEY, nullable=False),
    Column("fees", MONEY, nullable=False),
    Column("opened_at", INSTANT, nullable=False),
    Column("closed_at", INSTANT, nullable=False),
    Column("opened_sequence", BigInteger, nullable=False),
)

# What `corporate-actions` brought, in order of arrival. `terms` is a split's ratio new:old or a dividend's amount per
# share; a dividend takes effect on its ex-date (`effective_at`) and is paid at `paid_at`.
corporate_action = Table(
    "corporate_action",
    metadata,
    Column("action_id", Text, primary_key=True),
    Column("arrival", BigInteger, Identity(), nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("symbol", Text, nullable=False),
    Column("terms", Text, nullable=False),
    Column("currency", Text),
    Column("effective_at", INSTANT, nullable=False),
    Column("paid_at", INSTANT),
    Column("recorded_at", INSTANT, nullable=False),
    Column("content_hash", LargeBinary, nullable=False),
    CheckConstraint("kind IN ('SPLIT','DIVIDEND')", name="corporate_action_kind"),
    Index("corporate_action_by_symbol", "symbol", "effective_at"),
)

# Which steps of which actions each shard has in its ledger: SPLIT, DIVIDEND_ACCRUED, DIVIDEND_PAID; once each.
shard_action = Table(
    "shard_action",
    metadata,
    Column("shard", Integer, ForeignKey("shard.id"), primary_key=True),
    Column("action_id", Text, ForeignKey("corporate_action.action_id"), primary_key=True),
    Column("step", Text, primary_key=True),
    Column("applied_at", INSTANT, nullable=False),
    Column("late", Boolean, nullable=False),
)

# Dividends accrued and not paid yet.
receivable = Table(
    "receivable",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("action_id", Text, ForeignKey("corporate_action.action_id"), primary_key=True),
    Column("amount", MONEY, nullable=False),
)

# How far a topic that every shard takes part in has been read, per partition of one log.
topic_offset = Table(
    "topic_offset",
    metadata,
    Column("log_id", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("next_offset", BigInteger, nullable=False),
)

# engine.ledger says what the columns mean. `nav_before` stands on external flows only.
ledger_entry = Table(
    "ledger_entry",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("event_id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("symbol", Text),
    Column("side", Text),
    Column("quantity", NUMBER),
    Column("price", NUMBER),
    Column("scale", Text),
    Column("amount", MONEY, nullable=False),
    Column("fee", MONEY, nullable=False),
    Column("receivable", MONEY, nullable=False),
    Column("realized", MONEY, nullable=False),
    Column("cost", MONEY, nullable=False),
    Column("nav_effect", MONEY, nullable=False),
    Column("cash_after", MONEY, nullable=False),
    Column("nav_before", MONEY),
    Column("effective_at", INSTANT, nullable=False),
    Column("recorded_at", INSTANT, nullable=False),
    Column("late", Boolean, nullable=False),
    Column("reference", Text),
    Column("reverses", Text, unique=True),
    Column("content_hash", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    CheckConstraint(
        "kind IN ('OPEN','FILL','DEPOSIT','WITHDRAWAL','REWARD','FEE','INTEREST','DIVIDEND',"
        "'SPLIT','DIVIDEND_ACCRUED','DIVIDEND_PAID')",
        name="ledger_kind",
    ),
    # It holds all that a filter asks about, so that a filter which matches nothing reads no row of the table.
    PrimaryKeyConstraint(
        "portfolio_id",
        "sequence",
        postgresql_include=["kind", "symbol", "side", "amount", "effective_at", "recorded_at", "reverses"],
    ),
    CheckConstraint("fee >= 0 OR reverses IS NOT NULL", name="ledger_fee"),
    _finite("amount"),
    # Lots, filters by symbol, and what was traded since an instant.
    Index("ledger_entry_by_symbol", "portfolio_id", "symbol", "sequence"),
    # Most entries are fills; the other kinds are few, and looked for.
    Index(
        "ledger_entry_by_kind",
        "portfolio_id",
        "kind",
        "sequence",
        postgresql_where=text("kind <> 'FILL'"),
    ),
    # Rows lie nearly in the order in which they took place, so a block range index finds what is recent at next to no
    # cost. Not by `recorded_at`: an owner that lags behind stamps that with an instant before the fill's own.
    Index("ledger_entry_effective", "effective_at", postgresql_using="brin"),
    # The time-weighted return is cut at these; there are few of them.
    Index(
        "ledger_entry_flows",
        "recorded_at",
        postgresql_where=text("kind IN ('DEPOSIT','WITHDRAWAL','REWARD')"),
    ),
)

# What each portfolio was worth at its day cuts: `symbols[i]` was worth `position_values[i]`. `estimated` says that
# nobody evaluated at the cut, and that the figures were made afterwards from the ledger and recorded prices.
day_baseline = Table(
    "day_baseline",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("cut_at", INSTANT, primary_key=True),
    Column("nav", MONEY, nullable=False),
    Column("ledger_sequence", BigInteger, nullable=False),
    Column("symbols", ARRAY(Text), nullable=False),
    Column("position_values", ARRAY(MONEY), nullable=False),
    Column("estimated", Boolean, nullable=False),
)

# `flows` and `twr_factor` are of the interval since the portfolio's row before; a factor without definition is NULL.
equity_snapshot = Table(
    "equity_snapshot",
    metadata,
    Column("portfolio_id", Text, primary_key=True),
    Column("at", INSTANT, primary_key=True),
    Column("nav", MONEY, nullable=False),
    Column("cash", MONEY, nullable=False),
    Column("receivables", MONEY, nullable=False),
    Column("positions_value", MONEY, nullable=False),
    Column("flows", MONEY, nullable=False),
    Column("twr_factor", Double),
    Column("quality", SmallInteger, nullable=False),
    Column("marked_at", INSTANT, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("ledger_sequence", BigInteger, nullable=False),
)

# The last accepted quote of each symbol at each instant of the grid.
price_close = Table(
    "price_close",
    metadata,
    Column("symbol", Text, primary_key=True),
    Column("at", INSTANT, primary_key=True),
    Column("price", NUMBER, nullable=False),
    Column("ts_event", INSTANT, nullable=False),
    Column("source", Text, nullable=False),
    Column("condition", Text, nullable=False),
)

# What the reconciler found last; `status` is AGREED, REPAIRED, DRIFTED or BROKEN_LEDGER (engine.reconciliation),
# `figures` names what did not agree.
reconciliation = Table(
    "reconciliation",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("checked_at", INSTANT, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("ledger_sequence", BigInteger, nullable=False),
    Column("drift_abs", MONEY, nullable=False),
    Column("status", Text, nullable=False),
    Column("figures", ARRAY(Text), nullable=False),
)

# Every repair that was made, for good.
repair = Table(
    "repair",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("shard", Integer, nullable=False),
    Column("asked_at", INSTANT, nullable=False),
    Column("portfolios", ARRAY(Text), nullable=False),
    Column("figures", ARRAY(Text), nullable=False),
    Column("from_epoch", BigInteger, nullable=False),
    Column("to_epoch", BigInteger),
    Column("done_at", INSTANT),
)
