"""The tables of badges (SQLAlchemy Core), from the rules to what was awarded.

    badge_rule     the rules as data; every version of each, the highest one counts
    badge_state    what the prover of a badge knows: unlocked, active; written in the transaction that proves it
    outbox         what is on its way to Kafka, written in that same transaction; gone once its consumer has it
    badge_award    awards, one per (portfolio, badge, version), for good; written by the consumer
    daily_close    the last session close that the daily job has judged; one row
    badge_event    what subscribers are told, in order per portfolio; written with the award

A JSON text is kept as it was written (`json` would not keep decimals).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Integer,
    LargeBinary,
    Table,
    Text,
)

from engine.stores.tables import INSTANT, NUMBER, metadata

# engine.badges says what the columns mean.
badge_rule = Table(
    "badge_rule",
    metadata,
    Column("badge_id", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("rarity", Text, nullable=False),
    Column("predicate", Text, nullable=False),
    Column("threshold", NUMBER, nullable=False),
    Column("minimum", NUMBER, nullable=False),
    Column("hysteresis", NUMBER, nullable=False),
    Column("window_days", Integer, nullable=False),
    CheckConstraint("version > 0", name="badge_rule_version"),
)

# `events_count` numbers the portfolio's events of this badge, so that each has an id of its own.
badge_state = Table(
    "badge_state",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("badge_id", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("active", Boolean, nullable=False),
    Column("unlocked_at", INSTANT, nullable=False),
    Column("events_count", Integer, nullable=False),
)

# `produced_log` names the Kafka log that has the message: another log (a new embedded broker) gets it again.
outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("event_id", Text, nullable=False, unique=True),
    Column("topic", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("produced_log", Text),
    Column("produced_at", INSTANT),
)

badge_award = Table(
    "badge_award",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("badge_id", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("awarded_at", INSTANT, nullable=False),
    Column("active", Boolean, nullable=False),
    Column("evidence", Text, nullable=False),
)

badge_event = Table(
    "badge_event",
    metadata,
    Column("portfolio_id", Text, ForeignKey("portfolio.id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("event_id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("badge_id", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("at", INSTANT, nullable=False),
    Column("evidence", Text, nullable=False),
    CheckConstraint("kind IN ('UNLOCKED','ACTIVATED','LAPSED')", name="badge_event_kind"),
)

daily_close = Table(
    "daily_close",
    metadata,
    Column("is_last", Boolean, primary_key=True, server_default="true"),
    Column("judged_at", INSTANT, nullable=False),
    CheckConstraint("is_last", name="daily_close_one"),
)
