"""The permanent record's tables (SQLAlchemy Core), as Alembic builds them.

Money is NUMERIC(38,6), quantities and prices NUMERIC(38,12): what engine.amounts admits fits exactly. NUMERIC
takes NaN, so a CHECK refuses it. `ledger_entry` is append-only (a trigger of the first migration refuses UPDATE,
DELETE and TRUNCATE). `equity_snapshot` is a hypertable on `at` where the timescaledb extension exists, a plain
table of the same name otherwise.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
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
)

# One row per Kafka partition. `log_id` (cluster/topic) names the log that `next_offset` counts in; `epoch` fences
# its owner; `cut_at` is the last day cut whose baselines are stored.
shard = Table(
    "shard",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("log_id", Text, nullable=False),
    Column("next_offset", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("owner", Text),
    Column("lease_until", INSTANT),
    Column("cut_at", INSTANT),
    CheckConstraint("next_offset >= 0 AND epoch >= 0", name="shard_counts"),
)

# Who evaluates at present, also those that own nothing yet: the divisor of the fair share.
evaluator = Table(
    "evaluator",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("seen_at", INSTANT, nullable=False),
)

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
    Column("ledger_sequence", BigInteger, nullable=False),
    _finite("cash"),
    Index("portfolio_by_owner", "owner", "id"),
    Index("portfolio_by_shard", "shard"),
)

# Open positions only: a flat one leaves this table, its history stays in the ledger.
position = Table(
    "position",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("symbol", Text, ForeignKey("asset.symbol"), primary_key=True),
    Column("quantity", NUMBER, nullable=False),
    Column("cost", MONEY, nullable=False),
    Column("realized", MONEY, nullable=False),
    Column("opened_at", INSTANT, nullable=False),
    CheckConstraint("quantity <> 0", name="position_open"),
    _finite("quantity"),
)

# `nav_before` stands on external flows only: the NAV that the time-weighted return is cut at.
ledger_entry = Table(
    "ledger_entry",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("event_id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("symbol", Text),
    Column("side", Text),
    Column("quantity", NUMBER),
    Column("price", NUMBER),
    Column("amount", MONEY, nullable=False),
    Column("fee", MONEY, nullable=False),
    Column("realized", MONEY, nullable=False),
    Column("cash_after", MONEY, nullable=False),
    Column("nav_before", MONEY),
    Column("effective_at", INSTANT, nullable=False),
    Column("recorded_at", INSTANT, nullable=False),
    Column("reference", Text),
    Column("content_hash", LargeBinary, nullable=False),
    CheckConstraint(
        "kind IN ('OPEN','FILL','DEPOSIT','WITHDRAWAL','REWARD','FEE','INTEREST','DIVIDEND')",
        name="ledger_kind",
    ),
    CheckConstraint("fee >= 0", name="ledger_fee"),
    _finite("amount"),
)

# What each portfolio was worth at its last day cut: `symbols[i]` was worth `position_values[i]`.
day_baseline = Table(
    "day_baseline",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("cut_at", INSTANT, primary_key=True),
    Column("nav", MONEY, nullable=False),
    Column("ledger_sequence", BigInteger, nullable=False),
    Column("symbols", ARRAY(Text), nullable=False),
    Column("position_values", ARRAY(MONEY), nullable=False),
)

equity_snapshot = Table(
    "equity_snapshot",
    metadata,
    Column("portfolio_id", Text, primary_key=True),
    Column("at", INSTANT, primary_key=True),
    Column("nav", MONEY, nullable=False),
    Column("cash", MONEY, nullable=False),
    Column("positions_value", MONEY, nullable=False),
    Column("quality", SmallInteger, nullable=False),
    Column("marked_at", INSTANT, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("ledger_sequence", BigInteger, nullable=False),
)
