"""The replay feed: a year of recorded daily bars at the speed of the market clock, with its corporate actions.

File: CSV or gzipped CSV with the header `date,symbol,open,high,low,close,…`, sorted by date; prices stay the
text that the file has. Columns `dividend` (per share) and `split` (new shares per old one) are read where they are.
A bar becomes four quotes, because that is the order in which a bar's extremes most often fall:

    close ≥ open:  open, low, high, close            close < open:  open, high, low, close

at the open of that day's session in New York, after a third and two thirds of it, and at its close: 09:30, 11:40, 13:50
and 16:00, or 13:00 where the exchange closed early. So the last quote is the session's close. Each is emitted when the
clock has reached its instant, never before.

A feed that begins late (a restarted worker) is given what it missed as one batch: the newest quote of each
symbol. After the last bar it ends. A row that can not be read is counted and skipped; a file that can not be
read is a ValueError when the feed is made.

A split takes effect when the session of its bar's date opens, before that day's first quote; a dividend's date is its
ex-date. The file knows no pay dates: PAID_AFTER_DAYS days after the ex-date are assumed. All actions of the file are
announced before its first quote, under ids that say what they are (`split:AAPL:2020-08-31`), so announcing them again
changes nothing. A bar with both is a split first: its dividend is per new share.

Spec: `replay:FILE[@SPEED]`, SPEED in market days per second of wall time (1 by default, three decimals at
most). The program makes the market clock from `plan_replay` and gives it to every process.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from itertools import groupby
from pathlib import Path
from time import time_ns
from typing import IO
from zoneinfo import ZoneInfo

from engine.amounts import AmountError, parse_number, plain
from engine.corporate_actions import (
    CorporateAction,
    DividendAction,
    SplitAction,
    decode_action,
    encode_action,
    opens_at,
)
from engine.instants import DAY_NS, SECOND_NS, to_ns
from engine.messages import EventRejected, Quote
from engine.quotes import RawQuote
from engine.runtime.clock import MarketClock, plan_market_clock
from engine.sessions import sessions_of
from workers.feeds import PROBLEMS, Batch

SOURCE = "replay"
HEADER = ["date", "symbol", "open", "high", "low", "close"]
EXCHANGE = "XNYS"
CLOSES = time(16, 0)  # on a day that the exchange's calendar does not have
QUOTES_PER_BAR = 4
SPEED_MILLI_MAX = 1_000_000
PAID_AFTER_DAYS = 14
CURRENCY = "USD"
# The longest sleep: a clock's arithmetic is exact, but wall time may be set while we sleep.
SLEEP_S_MAX = 1
END_NS = 2**62

_NEW_YORK = ZoneInfo("America/New_York")
_BAD_ROWS = PROBLEMS.labels(SOURCE, "bad_row")
_BAD_ACTIONS = PROBLEMS.labels(SOURCE, "bad_action")


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What the program needs to know of a file: the market clock's plan (JSON) and the sessions' dates."""

    plan_json: str
    dates: list[date]


class ReplayFeed:
    """Quotes of the bars in `path`, paced by `clock`. Raises OSError, ValueError for a file that is not one."""

    name = SOURCE

    def __init__(self, path: Path, clock: MarketClock) -> None:
        self.path = path
        self._clock = clock
        self._next_ns = 0  # the instant of the quotes that come next
        check_file(path)

    def resume(self, quotes: Mapping[str, Quote]) -> None:
        """Nothing to do: recorded prices are what they are."""

    def settled_ns(self) -> int | None:
        """Quotes come in the order of time: up to the next one, or up to now where that lies ahead."""
        return min(self._next_ns - 1, self._clock.now_ns())

    async def batches(self) -> AsyncGenerator[Batch, None]:
        missed: dict[str, RawQuote] = {}
        began_ns = self._clock.now_ns()
        sessions = set(self._clock.plan.days)
        for instant_ns, quotes in bar_quotes(self.path):
            if instant_ns // DAY_NS not in sessions:
                continue  # the clock was planned from another file and will never get there
            if instant_ns < began_ns:
                missed.update((quote.symbol, quote) for quote in quotes)
                await asyncio.sleep(0)
                continue
            if missed:
                yield list(missed.values())
                missed = {}
            self._next_ns = instant_ns
            await self._reach(instant_ns)
            yield quotes
        if missed:
            yield list(missed.values())
        self._next_ns = END_NS

    async def _reach(self, instant_ns: int) -> None:
        while self._clock.now_ns() < instant_ns:
            wait_s = (self._clock.wall_ns(instant_ns) - time_ns()) / SECOND_NS
            # At least a millisecond: rounding must not turn the last stretch into a busy loop.
            await asyncio.sleep(min(SLEEP_S_MAX, max(wait_s, 1 / 1_000)))


def parse_replay(spec: str) -> tuple[Path, int]:
    """`FILE[@SPEED]` as a path and thousandths of market days per second. Raises ValueError."""
    name, separator, speed = spec.rpartition("@")
    if not separator or Path(spec).exists():
        name, speed = spec, "1"
    try:
        speed_milli = Decimal(speed) * 1_000
        if not (1 <= speed_milli <= SPEED_MILLI_MAX and speed_milli == int(speed_milli)):
            raise InvalidOperation
    except InvalidOperation:
        raise ValueError(f"a replay's speed is 0.001 to 1000 market days per second, not {speed!r}") from None
    if not name:
        raise ValueError("a replay needs a file: replay:FILE[@SPEED]")
    return Path(name), int(speed_milli)


def plan_replay(path: Path, speed_milli: int, wall_start_ns: int) -> ReplayPlan:
    """The market clock over all sessions of the file, its first one beginning at `wall_start_ns`.

    Raises OSError, ValueError.
    """
    check_file(path)
    dates = [day for day, _ in _days(path)]
    if not dates:
        raise ValueError(f"{path} has no bars")
    return ReplayPlan(plan_market_clock(dates, speed_milli, wall_start_ns), dates)


def first_day_prices(path: Path) -> dict[str, Decimal]:
    """The opening prices of the file's first session, by symbol; reads no further. Raises OSError, ValueError."""
    check_file(path)
    prices = {}
    for _, bars in _days(path):
        for bar in bars:
            try:
                prices[bar[1]] = parse_number(bar[2], "open")
            except AmountError:
                _BAD_ROWS.inc()
        break
    return {symbol: price for symbol, price in prices.items() if price > 0}


def check_file(path: Path) -> None:
    """Raises OSError when the file can not be opened, ValueError when it does not begin like a file of bars."""
    try:
        with _open(path) as file:
            header = next(csv.reader(file), [])
    except (UnicodeDecodeError, EOFError, csv.Error) as error:
        raise ValueError(f"{path} is not a file of daily bars: {error}") from None
    if header[: len(HEADER)] != HEADER:
        raise ValueError(f"{path} is not a file of daily bars: its header does not begin {','.join(HEADER)}")


def bar_quotes(path: Path) -> Iterator[tuple[int, list[RawQuote]]]:
    """All quotes of the file, in time order: (instant in nanoseconds, the quotes of that instant)."""
    for day, bars in _days(path):
        ordered = [(bar[1], bar_prices(*bar[2:6])) for bar in bars]
        for step, instant_ns in enumerate(quote_instants(day)):
            yield instant_ns, [RawQuote(symbol, prices[step], instant_ns, SOURCE) for symbol, prices in ordered]


def quote_instants(day: date) -> list[int]:
    """When a bar's four prices are quoted: the session in three equal parts."""
    open_ns = to_ns(opens_at(day))
    sessions = sessions_of(EXCHANGE)
    is_session = sessions.last_open(open_ns) == open_ns
    close_ns = sessions.next_close(open_ns) if is_session else to_ns(datetime.combine(day, CLOSES, _NEW_YORK))
    return [open_ns + (close_ns - open_ns) * step // (QUOTES_PER_BAR - 1) for step in range(QUOTES_PER_BAR)]


def bar_prices(opening: str, high: str, low: str, close: str) -> tuple[str, str, str, str]:
    """A bar's four prices in the order in which they are quoted; text that is no number keeps its place."""
    try:
        rising = Decimal(close) >= Decimal(opening)
    except InvalidOperation:
        rising = True
    return (opening, low, high, close) if rising else (opening, high, low, close)


def bar_actions(path: Path) -> Iterator[CorporateAction]:
    """All splits and dividends of the file, in its order. What is none is counted and skipped. Raises OSError."""
    with _open(path) as file:
        header = next(csv.reader(file), [])
    columns = [(header.index(name), make) for name, make in _ACTIONS if name in header]
    for day, bars in _days(path):
        for bar in bars:
            for column, make in columns:
                if column < len(bar) and bar[column] and (action := _action(make, bar, column, day)) is not None:
                    yield action


def _action(make: _MakeAction, bar: list[str], column: int, day: date) -> CorporateAction | None:
    try:
        action = make(bar[1], day, parse_number(bar[column], "an action"))
        return None if action is None else decode_action(encode_action(action))
    except (AmountError, EventRejected):
        _BAD_ACTIONS.inc()
        return None


def _split(symbol: str, day: date, ratio: Decimal) -> CorporateAction | None:
    if ratio == 1:
        return None
    return SplitAction(action_id=f"split:{symbol}:{day}", symbol=symbol, ratio=plain(ratio), effective_at=opens_at(day))


def _dividend(symbol: str, day: date, per_share: Decimal) -> CorporateAction | None:
    if not per_share:
        return None
    return DividendAction(
        action_id=f"dividend:{symbol}:{day}",
        symbol=symbol,
        amount=plain(per_share),
        currency=CURRENCY,
        ex_date=day,
        pay_date=day + timedelta(days=PAID_AFTER_DAYS),
    )


_MakeAction = Callable[[str, date, Decimal], CorporateAction | None]
_ACTIONS: tuple[tuple[str, _MakeAction], ...] = (("split", _split), ("dividend", _dividend))


def _days(path: Path) -> Iterator[tuple[date, list[list[str]]]]:
    with _open(path) as file:
        rows = csv.reader(file)
        next(rows, None)
        for text, bars in groupby(rows, lambda row: row[0] if row else ""):
            complete = [bar for bar in bars if len(bar) >= len(HEADER)]
            try:
                yield date.fromisoformat(text), complete
            except ValueError:
                _BAD_ROWS.inc()


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
