"""Every setting, with its unit in its name and its reason beside it. Environment prefix: NAVSTREAM_."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import msgspec
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.assets import AssetClass

JWT_SECRET_BYTES_MIN = 32


class ReadyFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a started system tells others: written by `navstream up --ready-file`, read by the other commands."""

    graphql_url: str
    ws_url: str
    redis_url: str
    postgres_url: str
    kafka_bootstrap: str
    topic: str
    actions_topic: str = "corporate-actions"
    jwt_secret: str
    market_clock: str
    pids: dict[str, int]
    metrics_urls: dict[str, str]


class Settings(BaseSettings):
    """One process's settings, read once from the environment by its composition root."""

    model_config = SettingsConfigDict(env_prefix="NAVSTREAM_", frozen=True, extra="ignore")

    # redis://, rediss:// or unix://; of a cluster redis+cluster://user:password@host:port,host:port with any of its
    # nodes (rediss+cluster:// over TLS).
    redis_url: str = ""
    postgres_url: str = ""
    kafka_bootstrap: str = ""
    topic: str = "portfolio-events"
    actions_topic: str = "corporate-actions"
    badge_topic: str = "badge-events"
    threshold_topic: str = "threshold-events"
    # Offsets are kept per log: empty means the Kafka cluster's own id.
    kafka_log_id: str = ""

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = ()

    jwt_secret: SecretStr = SecretStr("")
    jwt_jwks_url: str = ""
    jwt_audience: str = "navstream"
    jwt_issuer: str = "navstream"

    # A JSON text (engine.runtime.clock) when the program's time is a recorded market's; empty for wall time.
    market_clock: str = ""
    # Trading sessions that another process has made (engine.runtime.session_files); empty: each makes its own.
    sessions_file: str = ""
    log_level: str = "INFO"
    # Where a worker serves its metrics; 0 is nowhere. The API serves its own on its port.
    metrics_port: int = 0

    # Watched marks reach hot state at most this long after the tick that moved them: half of what a reader could tell.
    flush_interval_ms: int = Field(default=10, ge=5, le=10_000)
    # The others do within this, a hundredth of the writing; up to the interval above there is no difference. The
    # reconciler's history of prices goes back 30 s, and a mark must not be older.
    unwatched_flush_interval_ms: int = Field(default=1_000, ge=5, le=10_000)
    # How often an API process tells evaluators all that is watched there. What is new is told at once.
    interest_interval_ms: int = Field(default=2_000, ge=100, le=60_000)
    lease_duration_ms: int = Field(default=3_000, ge=1_000)
    lease_renewal_interval_ms: int = Field(default=1_000, ge=100)
    # Of one poll, shared evenly by an evaluator's shards: so many take a fifth of a second, for which boundaries may
    # have to wait.
    event_batch_count_max: int = Field(default=1_000, ge=1, le=10_000)
    # A price older than this is flagged STALE, or CLOSED while its market is (engine.markets).
    stale_after_s: int = Field(default=900, ge=1)
    # The exchange (of exchange_calendars) whose sessions a class of assets has; empty never closes.
    calendar_equity: str = "XNYS"
    calendar_commodity: str = "CMES"
    # Whether quotes stamped outside of their market's sessions are believed.
    extended_hours: bool = True
    # Sources that publish late on purpose, separated by commas: their quotes are flagged DELAYED.
    delayed_sources: Annotated[tuple[str, ...], NoDecode] = ()
    # Bounds the memory that a flood of unheard-of symbols can take, in `prices` and in every Book.
    symbols_count_max: int = Field(default=20_000, ge=1)
    quotes_publish_interval_ms: int = Field(default=10, ge=1, le=1_000)
    # A quote stamped further ahead than this is time travel and dropped.
    quote_future_tolerance_ms: int = Field(default=5_000, ge=0)
    snapshot_poll_interval_ms: int = Field(default=200, ge=50)
    # Hourly snapshots are kept so long, then one a day for ever. No curve is hourly for more than 30 days, and a curve
    # of a year and the refreshing of its daily aggregate reach back 366.
    snapshot_retention_days: int = Field(default=400, ge=367, le=36_500)
    # Recorded prices are what a NAV of the past is made of: a shorter time is as far back as it can be asked for.
    # 36,500 is for ever; a year of them is about 9,000 rows per symbol.
    price_close_retention_days: int = Field(default=36_500, ge=367, le=36_500)
    # Every portfolio is reconciled once within this, or less often where that would take more of a core than its share.
    reconcile_interval_s: int = Field(default=300, ge=1)
    reconcile_cpu_share_max: float = Field(default=0.1, gt=0, le=1)
    # A shard is not published anew for a repair more often than this: it resets all its subscriptions.
    repair_interval_s: int = Field(default=600, ge=1)

    # What one client may ask for. Each is refused or closed with a code when exceeded.
    query_depth_max: int = 12
    query_aliases_max: int = 30
    query_tokens_max: int = 1_000
    # Rows of one answer, counted before it is run: so many hold the loop for about 150 ms, during which nobody else
    # is served.
    query_objects_max: int = 5_000
    body_bytes_max: int = 64 * 1024
    ws_message_bytes_max: int = 64 * 1024
    sockets_per_subject_max: int = 100
    operations_per_socket_max: int = 50
    connection_init_timeout_s: int = 10
    send_timeout_s: int = 5
    heartbeat_interval_s: int = 15
    page_size_max: int = 200
    # Each export of a ledger holds one of the pool's connections for as long as its client takes the file.
    exports_count_max: int = Field(default=2, ge=1)
    rate_hz_max: int = 20
    # A feed without a frame or heartbeat (one comes every second) for this long is taken for dead and made anew.
    feed_silence_max_ms: int = Field(default=5_000, ge=100)
    # How long a mutation waits for Kafka before it answers UNAVAILABLE.
    acknowledge_timeout_s: int = Field(default=15, ge=1)

    # Whether webhooks may go to addresses that only this machine or network reaches, and without TLS: for tests and
    # closed networks. Elsewhere it would let any subject knock at doors behind the firewall.
    webhook_private_addresses: bool = False
    # Each delivery under way holds a socket and for a moment one of the pool's connections.
    webhook_deliveries_count_max: int = Field(default=32, ge=1, le=1_000)
    # One endpoint that hangs takes no more than these of them.
    webhook_endpoint_deliveries_count_max: int = Field(default=4, ge=1)
    # One owner whose endpoints all hang takes no more than these.
    webhook_owner_deliveries_count_max: int = Field(default=8, ge=1)
    # From the look-up of the name to the answer's headers.
    webhook_timeout_s: int = Field(default=10, ge=1, le=30)
    # A name whose servers do not answer holds a thread for longer than an attempt lasts. One owner's twenty webhooks
    # leave others most of them.
    webhook_lookups_count_max: int = Field(default=64, ge=1, le=1_000)
    # What waits for one endpoint; more is dropped and counted. An endpoint that is away for a day makes no more rows.
    webhook_waiting_count_max: int = Field(default=10_000, ge=1)
    webhooks_per_subject_max: int = Field(default=20, ge=1)
    # How long a rotated secret goes on signing beside the new one, unless the owner says otherwise.
    webhook_rotation_overlap_s: int = Field(default=86_400, ge=0, le=604_800)
    # A test goes to an address of the caller's choosing: each subject may send one this often at most, over all of its
    # webhooks, so that nobody is flooded through us.
    webhook_test_interval_s: int = Field(default=10, ge=0)
    # The delivery log reaches back so far; the payloads are in the badge events for ever.
    webhook_log_retention_days: int = Field(default=30, ge=2, le=3_650)
    # Each is compared at every flush that changes its portfolio.
    thresholds_per_portfolio_max: int = Field(default=50, ge=1, le=1_000)
    # A new threshold is watched within this.
    threshold_poll_interval_ms: int = Field(default=2_000, ge=50, le=5_000)
    # Crossings that wait for PostgreSQL, per evaluator; beyond it they are given up, counted, and looked for anew.
    threshold_crossings_waiting_max: int = Field(default=10_000, ge=1)

    redis_timeout_s: int = Field(default=1, ge=1)
    postgres_timeout_s: int = Field(default=10, ge=1)
    postgres_pool_size: int = Field(default=8, ge=1)

    @field_validator("allowed_origins", "delayed_sources", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @property
    def calendars(self) -> dict[AssetClass, str]:
        """What engine.markets.Markets is made of."""
        return {AssetClass.EQUITY: self.calendar_equity, AssetClass.COMMODITY: self.calendar_commodity}

    def using(self, ready: ReadyFile) -> Self:
        """These settings, pointed at a system that is already running."""
        return self.model_copy(
            update={
                "redis_url": ready.redis_url,
                "postgres_url": ready.postgres_url,
                "kafka_bootstrap": ready.kafka_bootstrap,
                "topic": ready.topic,
                "actions_topic": ready.actions_topic,
                "jwt_secret": SecretStr(ready.jwt_secret),
                "market_clock": ready.market_clock,
            }
        )

    def environment(self) -> dict[str, str]:
        """The variables by which a child process gets the same servers, clock and secret."""
        return {
            "NAVSTREAM_REDIS_URL": self.redis_url,
            "NAVSTREAM_POSTGRES_URL": self.postgres_url,
            "NAVSTREAM_KAFKA_BOOTSTRAP": self.kafka_bootstrap,
            "NAVSTREAM_TOPIC": self.topic,
            "NAVSTREAM_ACTIONS_TOPIC": self.actions_topic,
            "NAVSTREAM_BADGE_TOPIC": self.badge_topic,
            "NAVSTREAM_THRESHOLD_TOPIC": self.threshold_topic,
            "NAVSTREAM_JWT_SECRET": self.jwt_secret.get_secret_value(),
            "NAVSTREAM_MARKET_CLOCK": self.market_clock,
            "NAVSTREAM_SESSIONS_FILE": self.sessions_file,
            "NAVSTREAM_PORT": str(self.port),
            "NAVSTREAM_LOG_LEVEL": self.log_level,
        }


def read_ready_file(path: Path) -> ReadyFile:
    """Raises FileNotFoundError, or msgspec.MsgspecError when the file is not a ready file."""
    return msgspec.json.decode(path.read_bytes(), type=ReadyFile)
