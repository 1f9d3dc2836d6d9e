"""The Book on its way through time: from boundary to boundary, and as far as the clock is.

    advance    quotes stamped up to the pending boundary B are applied; when B is due (workers.boundaries) its state is
               taken, and the way goes on to the next one

What is done at B, when every quote of up to B and none of beyond is in the Book:

    day cuts           that fall on B: the day bases of just their portfolios are set; baselines wait for the ledger
    corporate actions  whose instant is B + 1 ns: nothing goes on until they are booked (`ActionSchedule.holds`)
    snapshot frames    on full hours and on session closes: all marks of each owned shard, with B as their instant

Of several full hours that are passed at once only the last has frames, the others are gaps; a session close always
has. What holds B up does so for HOLD_MAX_S of wall time, then B is passed and that is counted. A shard that is being
loaded holds B up as well, so that no state is taken of one that is half in the Book, and so does a batch that is being
booked, so that the state at B has every entry that is stamped up to it.

Marks are stamped with `as_of_ns`: the clock, but never beyond a boundary that has not been taken. So a day cut is
never later than the marks that count from it, and no mark without a cut is later than it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import NamedTuple

import structlog

from engine.amounts import AmountError, parse_number, scale_number
from engine.assets import AssetClass
from engine.baselines import Baseline
from engine.corporate_actions import scale_since
from engine.day_cuts import BadDayCutError, parse_day_cut
from engine.instants import HOUR_NS, SECOND_NS, to_datetime
from engine.markets import Markets
from engine.marks import FrameHeader, MarkQuality
from engine.messages import Quote
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from engine.runtime.settings import Settings
from workers.boundaries import Boundaries, grace_of
from workers.owned_shard import Host, OwnedShard, SnapshotFrame

HOLD_MAX_S = 10.0
# Qualities are looked over this often by the wall clock, and as soon as the market's went on by that much.
QUALITY_CHECK_INTERVAL_S = 1.0
QUALITY_CHECK_INTERVAL_NS = 60 * SECOND_NS
DAY_CUT_DEFAULT = "00:00 UTC"
LAG_TOLD_S = 10.0  # being behind the clock is told at this lag, and again after as much more
FRAMES_KEPT_MAX = 8  # per shard, while Redis is away; a frame of 5,000 portfolios is 800 kB

_log = structlog.get_logger(__name__)


class Advance(NamedTuple):
    """Where the Book stands, and of the oldest quote which moved anything: its instant, and when the quotes worker took
    it in. 0 where there is none."""

    as_of_ns: int
    oldest_event_ns: int
    oldest_received_ns: int


class BookTime:
    def __init__(self, settings: Settings, clock: Clock, host: Host) -> None:
        self._clock = clock
        self._host = host
        self._stale_after_ns = settings.stale_after_s * SECOND_NS
        self._markets = Markets(settings.calendars)
        # A boundary of this very instant is still to be taken.
        self._boundaries = Boundaries(
            clock.now_ns() - 1,
            self._next_close_ns,
            self._next_cut_ns,
            lambda ns: host.actions.next_boundary_ns(ns),
            grace_s=grace_of(clock),
        )
        host.quotes.waiting.boundary_of = self._boundaries.of
        self._loads_count = 0
        self._bookings_count = 0
        # The boundary that is held up, since when by the wall clock.
        self._held: tuple[int, float] | None = None
        self._checked = (0.0, 0)
        self._reported: set[str] = set()
        self._lag_told_s = 0.0

    @property
    def as_of_ns(self) -> int:
        """The instant that the Book stands at, for what is stamped now."""
        return self._boundaries.reach(self._clock.now_ns())

    @property
    def reached_ns(self) -> int:
        """No boundary up to here is still to be taken."""
        return self._boundaries.passed_ns

    @property
    def is_held(self) -> bool:
        """Whether a boundary that is due waits for somebody, and quotes wait for it."""
        return self._held is not None

    def advance(self) -> Advance:
        """Bring the Book to the present."""
        boundaries, quotes = self._boundaries, self._host.quotes
        now_ns = self._clock.now_ns()
        boundaries.observe(now_ns, time.monotonic(), quotes.settled_ns)
        moved: list[int] = []
        while True:
            boundary_ns = boundaries.pending_ns
            at_ns = min(now_ns, boundary_ns)
            moved += self._apply(quotes.take(boundary_ns), at_ns)
            if not boundaries.is_due(boundary_ns) or self._is_held(boundary_ns):
                break
            self._take(boundary_ns)
            boundaries.pass_over(boundary_ns)
        as_of_ns = boundaries.reach(now_ns)
        self._tell_lag(boundaries.lag_s(time.monotonic()))
        wall_s, (checked_at_s, checked_at_ns) = time.monotonic(), self._checked
        if wall_s - checked_at_s >= QUALITY_CHECK_INTERVAL_S or as_of_ns - checked_at_ns >= QUALITY_CHECK_INTERVAL_NS:
            self._check_qualities(as_of_ns)
        received_ns = quotes.waiting.take_received_ns()
        return Advance(as_of_ns, min(moved, default=0), received_ns if moved else 0)

    def _tell_lag(self, lag_s: float) -> None:
        telemetry.BOOK_LAG.set(lag_s)
        if lag_s >= self._lag_told_s + LAG_TOLD_S:
            self._lag_told_s = lag_s
            _log.warning("book_behind", lag_s=round(lag_s), as_of=to_datetime(self.reached_ns).isoformat())
        elif not lag_s and self._lag_told_s:
            self._lag_told_s = 0.0
            _log.info("book_caught_up")

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While a shard is loaded no boundary is passed, or not for HOLD_MAX_S."""
        self._loads_count += 1
        try:
            yield
        finally:
            self._loads_count -= 1

    @contextmanager
    def booking(self) -> Iterator[None]:
        """While a batch is on its way into the ledger and the Book no boundary is passed, or not for HOLD_MAX_S.

        What is stamped up to a boundary is in the state at it then.
        """
        self._bookings_count += 1
        try:
            yield
        finally:
            self._bookings_count -= 1

    def last_cut(self, day_cut: str) -> int:
        """The last cut of this kind that the Book has reached. One that nothing can read any more is the default."""
        return self._last_cut(day_cut, self._boundaries.passed_ns)

    def quote_of(self, symbol: str) -> tuple[Decimal, int] | None:
        """The Book's price of a symbol with its instant, in the shares of that instant."""
        price, ts_event_ns = self._host.book.price(symbol), self._host.book.price_as_of_ns(symbol)
        if price is None:
            return None
        return scale_number(price, scale_since(ts_event_ns, self._host.actions.splits_of(symbol)), "price"), ts_event_ns

    # -- boundaries ------------------------------------------------------------------------------------------

    def _next_close_ns(self, after_ns: int) -> int | None:
        sessions = self._markets.sessions(AssetClass.EQUITY)
        return None if sessions is None else sessions.next_close(after_ns)

    def _next_cut_ns(self, after_ns: int) -> int | None:
        cuts = (parse_day_cut(self._readable(text)).next(after_ns) for text in self._host.book.day_cuts)
        return min(cuts, default=None)

    def _last_cut(self, day_cut: str, at_ns: int) -> int:
        return parse_day_cut(self._readable(day_cut)).last(at_ns)

    def _readable(self, day_cut: str) -> str:
        try:
            parse_day_cut(day_cut)
        except BadDayCutError as error:
            # It was good when the portfolio was opened; this machine's zones or calendars lack it.
            if day_cut not in self._reported:
                self._reported.add(day_cut)
                _log.error("day_cut_unknown", day_cut=day_cut, reason=str(error), instead=DAY_CUT_DEFAULT)
            return DAY_CUT_DEFAULT
        return day_cut

    def _is_held(self, boundary_ns: int) -> bool:
        if not self._host.actions.holds(boundary_ns) and not self._loads_count and not self._bookings_count:
            self._held = None
            return False
        wall_s = time.monotonic()
        if self._held is None or self._held[0] != boundary_ns:
            self._held = (boundary_ns, wall_s)
        if wall_s - self._held[1] < HOLD_MAX_S:
            return True
        telemetry.BOUNDARIES_FORCED.inc()
        under_way = {"loads": self._loads_count, "bookings": self._bookings_count}
        _log.warning("boundary_forced", boundary=to_datetime(boundary_ns).isoformat(), **under_way)
        return False

    def _take(self, boundary_ns: int) -> None:
        """What is done at a boundary, all quotes up to it being in the Book."""
        for day_cut in self._host.book.day_cuts:
            self._cut(day_cut, self._last_cut(day_cut, boundary_ns))
        sessions = self._markets.sessions(AssetClass.EQUITY)
        is_close = sessions is not None and sessions.last_close(boundary_ns) == boundary_ns
        if boundary_ns % HOUR_NS and not is_close:
            return
        if not is_close and self._boundaries.is_due(boundary_ns + HOUR_NS):
            telemetry.SNAPSHOT_GAPS.inc()
            return
        self._check_qualities(boundary_ns)
        for owned in self._host.owned.values():
            self._frame(owned, boundary_ns)

    def _cut(self, day_cut: str, cut_at_ns: int) -> None:
        """Set the group's day bases to the present values and keep them for the ledger, unless it has been done."""
        book = self._host.book
        slots = book.due(day_cut, cut_at_ns)
        if not len(slots):
            return
        book.cut(slots, cut_at_ns)
        shards = book.shard[slots]
        for owned in self._host.owned.values():
            mine = slots[shards == owned.lease.shard]
            sequences = book.ledger_sequence[mine].tolist()
            of_each = zip(book.portfolio_ids(mine), sequences, book.values_of(mine), strict=True)
            baselines = [Baseline(name, book.nav(name), sequence, values) for name, sequence, values in of_each]
            if baselines:
                owned.cuts_due.append((cut_at_ns, baselines))
                owned.positions_due = True
        cut_at = to_datetime(cut_at_ns).isoformat()
        _log.info("day_cut", day_cut=day_cut, cut_at=cut_at, portfolios=len(slots))

    def _frame(self, owned: OwnedShard, boundary_ns: int) -> None:
        """Keep all marks of a shard for the snapshots worker."""
        book, lease = self._host.book, owned.lease
        slots = book.slots_of(lease.shard)
        slots = slots[~book.out_of_range(slots)]
        # What a snapshot is worth, it has been worth, also when no flush comes between it and the next price.
        self._host.badges.look(owned, slots, boundary_ns)
        owned.sequence += 1
        header = FrameHeader(lease.shard, lease.epoch, owned.sequence, owned.flushed_sequence, boundary_ns, 0)
        data = self._host.hot.encode(header, slots, book.marks(slots, boundary_ns, owned.sequence))
        owned.frames_due.append(SnapshotFrame(boundary_ns, data, time.monotonic()))
        if len(owned.frames_due) > FRAMES_KEPT_MAX:
            del owned.frames_due[0]
            telemetry.SNAPSHOT_FRAMES.labels("lost").inc()

    # -- quotes ----------------------------------------------------------------------------------------------

    def _apply(self, quotes: Sequence[Quote], at_ns: int) -> list[int]:
        """Bring quotes into the Book; returns the instants of those that moved anything."""
        telemetry.QUOTES_APPLIED.inc(len(quotes))
        book, taken = self._host.book, [(quote, price) for quote in quotes if (price := self._price(quote)) is not None]
        touched = book.tick_all([(quote.symbol, price, quote.ts_event_ns, quote.condition) for quote, price in taken])
        for quote, _ in taken:
            if at_ns - quote.ts_event_ns > self._stale_after_ns:
                book.set_quality(quote.symbol, self._quality(quote, at_ns))
        return [quote.ts_event_ns for (quote, _), count in zip(taken, touched, strict=True) if count]

    def _price(self, quote: Quote) -> Decimal | None:
        """What the quote says in the Book's shares; None when it is not to be applied."""
        try:
            price = parse_number(quote.price, "price")
            if price <= 0:
                raise AmountError("NOT_POSITIVE", "price is not positive")
            adjusted = self._host.actions.adjusted(quote, self._host.book.price(quote.symbol) is None)
            if adjusted is None:
                return None
            return price if adjusted is quote else parse_number(adjusted.price, "price")
        except AmountError as error:
            telemetry.QUOTES_REFUSED.inc()
            _log.warning("quote_refused", symbol=quote.symbol, price=quote.price, reason=str(error))
            return None

    def _quality(self, quote: Quote, at_ns: int) -> MarkQuality:
        asset_class = self._host.sectors.class_of(quote.symbol)
        return self._markets.quality(asset_class, quote.ts_event_ns, quote.condition, at_ns, self._stale_after_ns)

    def _check_qualities(self, at_ns: int) -> None:
        """Let every price be worth what it is worth at an instant."""
        self._checked = (time.monotonic(), at_ns)
        book, class_of, fresh_since_ns = self._host.book, self._host.sectors.class_of, at_ns - self._stale_after_ns
        for symbol, ts_event_ns, condition, quality in book.prices():
            if quality is MarkQuality.LIVE and ts_event_ns >= fresh_since_ns:
                continue
            now = self._markets.quality(class_of(symbol), ts_event_ns, condition, at_ns, self._stale_after_ns)
            if now is not quality:
                book.set_quality(symbol, now)
