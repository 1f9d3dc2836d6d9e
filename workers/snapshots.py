"""The snapshots worker: keeps for ever what the evaluators and the market say at each instant of the grid.

The grid is every full UTC hour, every session close of the equities' exchange, and for prices every portfolio's day
cut: what portfolios were worth then can be told by anybody from the ledger, also when nobody evaluated.

    equity_snapshot   evaluators append a frame per shard and instant to the Redis list `snapshots:{n}`, oldest first,
                      and the frames are written in that order. A frame leaves its list once its rows are committed:
                      a worker that dies between writes it again, which changes nothing.
    price_close       the worker listens to quotes itself, with the evaluators' boundaries (workers.boundaries), and
                      writes the last quote of every symbol at the instant, and a symbol's very first quote at that
                      quote's own. Of several full hours that pass at once only the last is written,
                      a session close and a day cut always.

What passes while nobody evaluates or listens is a gap and stays one: nothing is invented afterwards. Evaluators
count what they pass over or lose, this worker what it can not read or keep. Several of these workers agree with each
other, as the first row of an instant stays.

History is kept as long as the settings say (engine.stores.history_retention); that is seen to once an hour.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

import asyncpg
import structlog

from engine.assets import AssetClass
from engine.day_cuts import BadDayCutError, DayCut, parse_day_cut
from engine.instants import HOUR_NS, to_datetime
from engine.markets import Markets
from engine.messages import Quote
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from engine.runtime.connections import (
    AWAY,
    Outage,
    RedisClient,
    connect_postgres,
    connect_redis,
    stopped_within,
    wait_until,
)
from engine.runtime.settings import Settings
from engine.sessions import Sessions
from engine.stores import redis_keys
from engine.stores.history_retention import HistoryRetention
from engine.stores.price_closes import PriceCloses
from engine.stores.snapshots_timescale import SnapshotStore, read_snapshot
from workers.boundaries import Boundaries, grace_of
from workers.lifecycle import run_together
from workers.quote_intake import QuoteIntake

RETENTION_INTERVAL_S = 3_600
# Instants whose prices wait for PostgreSQL, each with all symbols: two days of hours. The oldest are given up.
CLOSES_WAITING_MAX = 48

CUTS_INTERVAL_S = 10  # a portfolio's first cut, if it falls within this of its opening, may find no recorded prices

_DAY_CUTS = "SELECT DISTINCT day_cut FROM portfolio"
_SHARDS = "SELECT id FROM shard ORDER BY id"
_log = structlog.get_logger(__name__)


class SnapshotDrain:
    """Brings what waits in the lists of all shards into the store."""

    def __init__(self, redis: RedisClient, pool: asyncpg.Pool) -> None:
        self._redis = redis
        self._pool = pool
        self._store = SnapshotStore(pool)

    async def poll(self) -> int:
        """Write all frames that wait; returns how many rows were new. Raises AWAY errors."""
        shards = [row["id"] for row in await self._pool.fetch(_SHARDS)]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for shard in shards:
                pipeline.llen(redis_keys.snapshots(shard))
            waiting = await pipeline.execute()
        return sum([await self._drain(shard) for shard, count in zip(shards, waiting, strict=True) if count])

    async def _drain(self, shard: int) -> int:
        key, written = redis_keys.snapshots(shard), 0
        while (frame := await self._redis.lindex(key, 0)) is not None:
            assert isinstance(frame, bytes)
            try:
                snapshot = read_snapshot(frame)
            except ValueError as error:
                telemetry.SNAPSHOT_FRAMES.labels("unreadable").inc()
                _log.warning("bad_snapshot_frame", shard=shard, reason=str(error))
            else:
                count = await self._store.write(snapshot)
                written += count
                telemetry.SNAPSHOTS.inc(count)
                telemetry.SNAPSHOT_FRAMES.labels("written").inc()
            # By its content: the head may have been dropped meanwhile, as the list is bounded.
            await self._redis.lrem(key, 1, frame)  # type: ignore[arg-type] # its stub knows text only
        return written


class PriceRecorder:
    """Records the last quotes at each instant of the grid that the clock passes."""

    def __init__(
        self, clock: Clock, quotes: QuoteIntake, closes: PriceCloses, sessions: Sessions | None = None
    ) -> None:
        self._clock = clock
        self._quotes = quotes
        self._closes = closes
        self._sessions = sessions
        self._day_cuts: list[DayCut] = []
        self._boundaries = Boundaries(clock.now_ns(), self._next_close_ns, self._next_cut_ns, grace_s=grace_of(clock))
        quotes.waiting.boundary_of = self._boundaries.of
        self._last: dict[str, Quote] = {}
        self._first: dict[str, Quote] = {}
        self._unwritten: deque[tuple[int, list[Quote]]] = deque()

    def follow(self, day_cuts: Sequence[DayCut]) -> None:
        """Record at these cuts, too."""
        self._day_cuts = list(day_cuts)

    async def poll(self) -> int:
        """Record the instants that have passed; returns how many rows were new. Raises AWAY errors."""
        if self._quotes.ready.is_set():
            self._advance()
        written = 0
        if self._first:
            first = dict(self._first)
            written += await self._closes.write_first(list(first.values()))
            for symbol in first:
                del self._first[symbol]
        while self._unwritten:
            at_ns, quotes = self._unwritten[0]
            written += await self._closes.write(to_datetime(at_ns), quotes)
            self._unwritten.popleft()
        telemetry.PRICE_CLOSES.inc(written)
        return written

    def _advance(self) -> None:
        """Take what belongs to each boundary that is due."""
        boundaries = self._boundaries
        boundaries.observe(self._clock.now_ns(), time.monotonic(), self._quotes.settled_ns)
        while boundaries.is_due(boundary_ns := boundaries.pending_ns):
            self._take(boundary_ns)
            is_close = self._sessions is not None and self._sessions.last_close(boundary_ns) == boundary_ns
            is_cut = any(cut.last(boundary_ns) == boundary_ns for cut in self._day_cuts)
            if is_close or is_cut or not boundaries.is_due(boundary_ns + HOUR_NS):
                self._keep(boundary_ns)
            else:
                telemetry.PRICE_CLOSE_GAPS.inc()
            boundaries.pass_over(boundary_ns)
        self._take(boundary_ns)

    def _take(self, until_ns: int) -> None:
        """Bring the last quotes to an instant; the first one of a symbol is written down by itself."""
        taken = {quote.symbol: quote for quote in self._quotes.take(until_ns)}
        self._first |= {symbol: taken[symbol] for symbol in taken.keys() - self._last.keys()}
        self._last |= taken

    def _keep(self, at_ns: int) -> None:
        if self._last:
            self._unwritten.append((at_ns, list(self._last.values())))
        if len(self._unwritten) > CLOSES_WAITING_MAX:
            self._unwritten.popleft()
            telemetry.PRICE_CLOSE_GAPS.inc()

    def _next_close_ns(self, after_ns: int) -> int | None:
        return None if self._sessions is None else self._sessions.next_close(after_ns)

    def _next_cut_ns(self, after_ns: int) -> int | None:
        return min((cut.next(after_ns) for cut in self._day_cuts), default=None)


async def run_snapshots(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
    """Keep history until `stop` is set."""
    redis = connect_redis(settings, "snapshots")
    pool = None
    try:

        async def connect() -> None:
            nonlocal pool
            pool = pool or await connect_postgres(settings, "snapshots")

        if not await wait_until("postgresql", connect, stop):
            return
        assert pool is not None
        # The pool as a source: it is there from now on.
        connected = pool
        quotes = QuoteIntake(settings, name="snapshots-quotes")
        sessions = Markets(settings.calendars).sessions(AssetClass.EQUITY)
        recorder = PriceRecorder(clock, quotes, PriceCloses(lambda: connected), sessions)

        async def follow_cuts() -> None:
            texts = [row["day_cut"] for row in await connected.fetch(_DAY_CUTS)]
            # The first use of an exchange may read its calendar, for longer than the loop may wait.
            recorder.follow(await asyncio.to_thread(_parse_cuts, texts))

        retention = HistoryRetention(pool, settings.snapshot_retention_days, settings.price_close_retention_days)
        poll_interval_s = settings.snapshot_poll_interval_ms / 1_000
        await run_together(
            quotes.run(stop),
            _repeat(SnapshotDrain(redis, pool).poll, poll_interval_s, "redis or postgresql", stop),
            _repeat(recorder.poll, poll_interval_s, "postgresql", stop),
            _repeat(follow_cuts, CUTS_INTERVAL_S, "postgresql", stop),
            _repeat(lambda: retention.apply(to_datetime(clock.now_ns())), RETENTION_INTERVAL_S, "postgresql", stop),
        )
    finally:
        await redis.aclose()
        if pool is not None:
            await pool.close()


def _parse_cuts(texts: Iterable[str]) -> list[DayCut]:
    """Those that this machine's zones and calendars know; the evaluator says what becomes of the others."""
    cuts = []
    for text in texts:
        with suppress(BadDayCutError):
            cuts.append(parse_day_cut(text))
    return cuts


async def _repeat(
    work: Callable[[], Awaitable[object]], interval_s: float, dependency: str, stop: asyncio.Event
) -> None:
    """Do `work` every `interval_s`, or again a little later when a dependency is away, until `stop` is set."""
    outage = Outage(dependency)
    while not stop.is_set():
        delay_s = interval_s
        try:
            await work()
            outage.end()
        except AWAY as error:
            delay_s = outage.begin_or_continue(error)
        await stopped_within(stop, delay_s)
