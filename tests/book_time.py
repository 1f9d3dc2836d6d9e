"""A Book on its way through time without servers: clocks, quotes and corporate actions are the test's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from engine.assets import AssetClass
from engine.book import Account, Book, Holding
from engine.corporate_actions import Split
from engine.instants import to_ns
from engine.marks import Mark, decode_frame, decode_mark
from engine.messages import Condition, Quote
from engine.pnl import DayBase
from engine.runtime.settings import Settings
from engine.stores.hot_state_redis import HotStateWriter
from engine.stores.ledger_postgres import Lease
from workers import book_time
from workers.badge_proving import BadgeProving
from workers.book_time import BookTime
from workers.interest import Interest
from workers.owned_shard import OwnedShard
from workers.quote_intake import WaitingQuotes

MICRO = 1_000_000


class Clocks:
    """Both clocks: the market's in `now`, the wall's in seconds."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.wall_s = 1_000.0

    def now_ns(self) -> int:
        return to_ns(self.now)

    def monotonic(self) -> float:
        return self.wall_s


@dataclass
class Actions:
    """What is held up, which instants are boundaries, and quotes that are not to be applied."""

    held: set[int] = field(default_factory=set)
    instants: list[int] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    splits: dict[str, list[Split]] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def next_boundary_ns(self, after_ns: int) -> int | None:
        return min((instant for instant in self.instants if instant > after_ns), default=None)

    def holds(self, boundary_ns: int) -> bool:
        self.asked.append(boundary_ns)
        return boundary_ns in self.held

    def adjusted(self, quote: Quote, first: bool) -> Quote | None:
        return None if quote.symbol in self.refused else quote

    def splits_of(self, symbol: str) -> Iterable[Split]:
        return self.splits.get(symbol, ())

    def splits_digest(self) -> str:
        return str(sorted(self.splits.items()))


class Quotes:
    def __init__(self) -> None:
        self.waiting = WaitingQuotes()
        self.settled_ns: int | None = None

    def take(self, until_ns: int | None = None) -> list[Quote]:
        return self.waiting.take(until_ns)


class Sectors:
    """AAPL is an equity, BTC is crypto, GOLD a commodity."""

    arrival = 3

    def class_of(self, symbol: str) -> AssetClass:
        classes = {"AAPL": AssetClass.EQUITY, "BTC": AssetClass.CRYPTO, "GOLD": AssetClass.COMMODITY}
        return classes.get(symbol, AssetClass.UNCLASSIFIED)

    def sector_of(self, symbol: str) -> str:
        return "Tech"


class Stage:
    """A host with a Book; shard 0 is owned. Every portfolio holds 1 of AAPL unless said otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: datetime, **settings: Any) -> None:
        self.clocks = Clocks(now)
        monkeypatch.setattr(book_time.time, "monotonic", self.clocks.monotonic)
        self.book, self.quotes, self.actions, self.sectors = Book(), Quotes(), Actions(), Sectors()
        self.hot = HotStateWriter(_no_redis())
        self.owned: dict[int, OwnedShard] = {0: OwnedShard(Lease(0, 7, "log"), 0, published=True)}
        self.lost: list[int] = []
        self.shards: Any = None
        self.badges = BadgeProving(None, self)  # type: ignore[arg-type]
        self.settings = Settings(**settings)
        # Nothing is heard of what is watched, so that everything counts as watched.
        self.interest = Interest(self.settings, self.book, lambda: self.owned)
        self.time = BookTime(self.settings, self.clocks, self)  # type: ignore[arg-type]

    def lose(self, lease: Lease, reason: str) -> None:
        self.lost.append(lease.shard)

    def open(self, name: str, day_cut: str = "00:00 UTC", shard: int = 0, symbol: str = "AAPL") -> None:
        account = Account(0, 0, 0, 0, 0, 0, 0, 0, 1, DayBase(0, 1, 0))
        self.book.open(name, shard, account, [Holding(symbol, Decimal(1), 0, 0)])
        self.book.begin_day(name, day_cut, self.time.last_cut(day_cut))
        self.hot.layout.place(self.book.slot(name), name)

    def quote(self, price: str, at: datetime, symbol: str = "AAPL", condition: Condition = "") -> None:
        """The feed sends in order: what is stamped before is here."""
        self.quotes.waiting.add(Quote(symbol, price, to_ns(at), "feed", None, condition))
        self.quotes.settled_ns = max(self.quotes.settled_ns or 0, to_ns(at) - 1)

    def advance(self, now: datetime, wall_s: float = 0.05) -> datetime:
        """Both clocks go on and the Book with them; returns the instant that it stands at then. The feed is silent from
        then on."""
        self.clocks.now = now
        self.clocks.wall_s += wall_s
        reached_ns = self.time.advance()[0]
        self.quotes.settled_ns = None
        return instant(reached_ns)

    def settle(self, now: datetime) -> datetime:
        """As `advance`, and as often again as lets the grace of boundaries pass."""
        for _ in range(7):
            reached = self.advance(now)
        return reached

    def mark(self, name: str, as_of: datetime | None = None) -> Mark:
        slots = np.array([self.book.slot(name)], np.int64)
        as_of_ns = self.time.as_of_ns if as_of is None else to_ns(as_of)
        return decode_mark(self.book.marks(slots, as_of_ns, 1).tobytes(), 7)

    def frames(self, shard: int = 0) -> dict[datetime, dict[str, Mark]]:
        """The snapshot frames that wait, by their boundary."""
        return {instant(frame.boundary_ns): marks_in(frame.data) for frame in self.owned[shard].frames_due}

    def cuts(self, shard: int = 0) -> list[tuple[datetime, dict[str, int]]]:
        """The baselines that wait for the ledger: NAV by portfolio."""
        due = self.owned[shard].cuts_due
        return [(instant(at_ns), {base.portfolio_id: base.nav for base in baselines}) for at_ns, baselines in due]


def marks_in(frame: bytes) -> dict[str, Mark]:
    header, groups = decode_frame(frame)
    found = {}
    for ids, packed in groups:
        for at, name in enumerate(ids):
            found[name.decode()] = decode_mark(packed[144 * at : 144 * (at + 1)], header.epoch)
    return found


def instant(ns: int) -> datetime:
    return datetime.fromtimestamp(ns / 1_000_000_000, UTC)


def _no_redis() -> Any:
    class NoRedis:
        def register_script(self, _: str) -> None:
            return None

    return NoRedis()
