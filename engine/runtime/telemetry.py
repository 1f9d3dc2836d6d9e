"""Logs and metrics of one process.

Logs are JSON lines on standard error, readable text when that is a terminal; every line carries its role. Metrics
are Prometheus counters, gauges and histograms; a worker serves them on `metrics_port` (0: not at all), the API on
`/metrics`.
"""

from __future__ import annotations

import logging
import sys

import structlog
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from engine.runtime.settings import Settings

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)

EVENTS = Counter("navstream_events_total", "Portfolio events by outcome", ["outcome"])
DEAD_LETTERS = Counter("navstream_dead_letters_total", "Events that will never be booked, by reason", ["code"])
UNCLASSIFIED = Counter("navstream_unclassified_assets_total", "Assets created by a fill in an unknown symbol")
RECLASSIFIED = Counter("navstream_reclassified_assets_total", "Assets whose class, sector or industry has changed")
QUOTES_APPLIED = Counter("navstream_quotes_applied_total", "Quotes applied to the Book after conflation")
QUOTES_CONFLATED = Counter("navstream_quotes_conflated_total", "Quotes replaced by a newer one within a window")
QUOTES_REFUSED = Counter("navstream_quotes_refused_total", "Quotes whose values would leave the exact range")
QUOTES_BEFORE_SPLIT = Counter(
    "navstream_quotes_before_split_total", "Quotes not applied because a later split is in the Book already"
)
QUOTES_WITHHELD = Counter("navstream_quotes_withheld_total", "Quotes of a symbol whose split could not be booked yet")
FILLS_BEFORE_SPLIT = Counter(
    "navstream_fills_before_split_total", "Fills in new shares booked before a split that could not be booked in time"
)
ACTIONS = Counter("navstream_corporate_actions_total", "Corporate actions read, by outcome", ["outcome"])
ACTION_STEPS = Counter("navstream_corporate_action_steps_total", "Steps booked, by shard and kind", ["kind"])
ACTION_HOLDERS_PASSED = Counter(
    "navstream_corporate_action_holders_passed_total", "Holders whose figures would have left the exact range"
)
QUOTE_SEGMENTS_MERGED = Counter("navstream_quote_segments_merged_total", "Boundaries whose last quotes were given up")
QUOTE_GAPS = Counter("navstream_quote_gaps_total", "Lost quote frames noticed; `prices` was read again")
FLUSHES = Counter("navstream_flushes_total", "Flushes of a shard by outcome", ["outcome"])
ROWS_FLUSHED = Counter("navstream_marks_written_total", "Marks written to hot state")
MARKS_WITHHELD = Counter("navstream_marks_withheld_total", "Marks out of the showable range, not written")
SHARDS_OWNED = Gauge("navstream_shards_owned", "Shards this evaluator owns")
POSITIONS_HELD = Gauge("navstream_positions_held", "Open positions in the Book")
# Where a quote's time goes, from when the quotes worker has it (workers.quotes).
RECEIVED_TO_VALUED = Histogram(
    "navstream_received_to_valued_seconds",
    "Oldest quote of a flush, from the quotes worker until the Book has it",
    buckets=LATENCY_BUCKETS_S,
)
VALUED_TO_HOT = Histogram(
    "navstream_valued_to_hot_seconds",
    "From the Book's being at a flush's instant until its watched marks are in hot state",
    buckets=LATENCY_BUCKETS_S,
)
TICK_TO_HOT = Histogram(
    "navstream_tick_to_hot_seconds",
    "Oldest quote of a flush until its watched marks are in hot state; not by a recorded market's clock",
    buckets=LATENCY_BUCKETS_S,
)
FLUSH_WINDOW = Histogram(
    "navstream_flush_window_seconds",
    "From the beginning of a flush to that of the next; quotes of one symbol within it are conflated",
    buckets=LATENCY_BUCKETS_S,
)
FLUSH_STAGE = Histogram(
    "navstream_flush_stage_seconds",
    "What a stage of a flush took: value, look (for badges), write, frames (of boundaries)",
    ["stage"],
    buckets=LATENCY_BUCKETS_S,
)
PORTFOLIOS_WATCHED = Gauge("navstream_portfolios_watched", "Portfolios that somebody watches, of this evaluator's")
BOOKING_TIME = Histogram("navstream_booking_seconds", "One ledger transaction", buckets=LATENCY_BUCKETS_S)
TAKE_OVER = Histogram(
    "navstream_take_over_seconds",
    "Stages of taking a shard over: read from the ledger, build the Book, write to hot state",
    ["stage"],
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
SNAPSHOTS = Counter("navstream_snapshots_total", "Equity snapshots written")
SNAPSHOT_GAPS = Counter("navstream_snapshot_gaps_total", "Grid instants without snapshots")
SNAPSHOT_FRAMES = Counter("navstream_snapshot_frames_total", "Snapshot frames of a shard by outcome", ["outcome"])
PRICE_CLOSES = Counter("navstream_price_closes_total", "Recorded prices written")
PRICE_CLOSE_GAPS = Counter("navstream_price_close_gaps_total", "Grid instants without recorded prices")
BOOK_LAG = Gauge("navstream_book_lag_seconds", "Wall time for which the oldest boundary that is due has been waiting")
BOUNDARIES_FORCED = Counter("navstream_boundaries_forced_total", "Boundaries passed before all was booked up to them")
DRIFT = Gauge("navstream_drift", "Sum over portfolios of |NAV shown - NAV of the ledger|, in currency units")
DRIFT_PORTFOLIOS = Gauge("navstream_drift_portfolios", "Portfolios whose hot state is not what the ledger says")
BROKEN_LEDGERS = Gauge("navstream_broken_ledgers", "Portfolios whose ledger does not fold to their record")
RECONCILED = Counter("navstream_reconciled_total", "Checks of portfolios, by what they found", ["status"])
REPAIRS = Counter("navstream_repairs_total", "Shards that were let go to be published anew")
OLDEST_CHECK_AGE = Gauge("navstream_oldest_check_age_seconds", "Age of the check that is longest ago")
BADGES_PROVED = Counter("navstream_badges_proved_total", "Badge events that this evaluator proved", ["badge", "kind"])
OUTBOX_PRODUCED = Counter("navstream_outbox_produced_total", "Messages that Kafka has acknowledged", ["topic"])
OUTBOX_TOO_LARGE = Counter("navstream_outbox_too_large_total", "Attempts to produce what Kafka takes for too large")
OUTBOX_WAITING = Gauge("navstream_outbox_waiting", "Messages proved and not booked by their consumer yet")
BADGE_MESSAGES = Counter(
    "navstream_badge_messages_total", "Messages of the badges worker's topics, by outcome", ["outcome"]
)
DAILY_BADGES = Histogram("navstream_daily_badges_seconds", "Judging one session close", buckets=LATENCY_BUCKETS_S)
DAILY_BADGES_SKIPPED = Counter("navstream_daily_badges_skipped_total", "Session closes passed over for a newer one")
QUOTES_FORGOTTEN = Counter("navstream_quotes_forgotten_total", "Quotes that a full history of prices gave up early")

WEBHOOK_DELIVERIES = Counter(
    "navstream_webhook_deliveries_total", "Webhook deliveries by what became of them", ["outcome"]
)
WEBHOOK_ATTEMPTS = Counter("navstream_webhook_attempts_total", "Attempts to deliver, by error or `ok`", ["outcome"])
WEBHOOK_TIME = Histogram(
    "navstream_webhook_attempt_seconds", "From the look-up of a name to the answer", buckets=(*LATENCY_BUCKETS_S, 10.0)
)
THRESHOLDS_WATCHED = Gauge("navstream_thresholds_watched", "Thresholds that this evaluator compares")
THRESHOLD_CROSSINGS = Counter("navstream_threshold_crossings_total", "Thresholds that fired, by outcome", ["outcome"])


def start_telemetry(settings: Settings, role: str) -> None:
    """Configure this process's logs and serve its metrics. Call once, from the composition root."""
    terminal = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role)
    # Client libraries repeat every failed attempt; what matters of it is logged once by connections.Outage.
    for name in ("aiokafka", "strawberry", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if settings.metrics_port and role != "api":
        try:
            start_http_server(settings.metrics_port, settings.host)
        except OSError as error:
            structlog.get_logger(__name__).warning("metrics_not_served", port=settings.metrics_port, reason=str(error))
