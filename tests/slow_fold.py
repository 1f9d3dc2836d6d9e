"""The recorded year reckoned a second time, by plain loops over the ledger's fills and cash movements and over the file
of bars itself. It imports nothing of the program: what a split or a dividend does is taken from the file.

    shares      = Σ ± quantity × the ratios of the splits between execution and now
    dividend    = shares held before the ex-date's open × amount per share, owed from then on
    NAV         = cash + what is owed + Σ shares × the session's closing price, each product rounded to 10⁻⁶

A fill counts for a dividend when it was executed before the ex-date opened and had been booked when the dividend was.
All ratios of the year have at most three decimals and all quantities three, so nothing but those products is rounded.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from itertools import groupby
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

NEW_YORK = ZoneInfo("America/New_York")
# The day after Thanksgiving, and Christmas Eve.
EARLY_CLOSES = {date(2020, 11, 27), date(2020, 12, 24)}
PAID_AFTER = timedelta(days=14)
MICRO = Decimal("0.000001")
FAR = datetime(9999, 1, 1, tzinfo=UTC)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    action_id: str
    symbol: str
    at: datetime
    ratio: Decimal


@dataclass(frozen=True)
class Dividend:
    action_id: str
    symbol: str
    at: datetime
    paid_at: datetime
    per_share: Decimal


@dataclass
class Year:
    """`closes`: per session the last closing price of every symbol."""

    closes: dict[datetime, dict[str, Decimal]] = field(default_factory=dict)
    splits: list[Split] = field(default_factory=list)
    dividends: list[Dividend] = field(default_factory=list)


@dataclass(frozen=True)
class Worth:
    cash: Decimal
    receivables: Decimal
    positions: Decimal

    @property
    def nav(self) -> Decimal:
        return self.cash + self.receivables + self.positions


def read_year(path: Path) -> Year:
    year, prices = Year(), dict[str, Decimal]()
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for text, bars in groupby(csv.DictReader(file), lambda bar: bar["date"]):
            day = date.fromisoformat(text)
            opens = in_utc(day, time(9, 30))
            for bar in bars:
                symbol = bar["symbol"]
                prices[symbol] = Decimal(bar["close"])
                if Decimal(bar["split"]) != 1:
                    year.splits.append(Split(f"split:{symbol}:{day}", symbol, opens, Decimal(bar["split"])))
                if Decimal(bar["dividend"]) != 0:
                    paid = in_utc(day + PAID_AFTER, time(9, 30))
                    name, per_share = f"dividend:{symbol}:{day}", Decimal(bar["dividend"])
                    year.dividends.append(Dividend(name, symbol, opens, paid, per_share))
            year.closes[in_utc(day, time(13 if day in EARLY_CLOSES else 16))] = dict(prices)
    return year


def in_utc(day: date, at: time) -> datetime:
    return datetime.combine(day, at, NEW_YORK).astimezone(UTC)


def rounded(exact: Decimal) -> Decimal:
    return exact.quantize(MICRO, ROUND_HALF_EVEN)


class Fold:
    """One portfolio. Give it the ledger's rows in their order; ask it between them."""

    def __init__(self, year: Year) -> None:
        self.year = year
        self.cash = Decimal(0)
        self.owed: dict[str, Decimal] = {}
        self.fills: dict[str, list[tuple[datetime, Decimal]]] = {}
        self._dividends = {dividend.action_id: dividend for dividend in year.dividends}

    def take(self, row: Row) -> None:
        if row["kind"] == "FILL":
            notional, shares = rounded(row["quantity"] * row["price"]), row["quantity"]
            if row["side"] == "SELL":
                notional, shares = -notional, -shares
            self.cash -= notional + row["fee"]
            self.fills.setdefault(row["symbol"], []).append((row["effective_at"], shares))
        elif row["kind"] == "DIVIDEND_ACCRUED":
            dividend = self._dividends[row["reference"]]
            self.owed[dividend.action_id] = rounded(self.held_for(dividend) * dividend.per_share)
        elif row["kind"] == "DIVIDEND_PAID":
            self.cash += self.owed.pop(row["reference"])
        elif row["kind"] not in ("OPEN", "SPLIT"):
            self.cash += row["amount"]

    def held_for(self, action: Split | Dividend) -> Decimal:
        """The shares that an action concerns: of fills executed before it. Of two at one instant the split is first."""
        earlier = [split for split in self.year.splits if split is not action]
        return self._held(action.symbol, earlier, action.at, action.at)

    def worth(self, close: datetime) -> Worth:
        """At a session's close, with all that has been taken: a program that lags behind its market's clock has booked
        fills of after the close by then, and they are part of that state."""
        prices, positions = self.year.closes[close], Decimal(0)
        for symbol in self.fills:
            held = self._held(symbol, self.year.splits, close, FAR)
            positions += rounded(held * prices[symbol])
        return Worth(self.cash, sum(self.owed.values(), Decimal(0)), positions)

    def _held(self, symbol: str, splits: list[Split], now: datetime, before: datetime) -> Decimal:
        """What was executed before `before`, in shares of `now`."""
        ratios = [(split.at, split.ratio) for split in splits if split.symbol == symbol and split.at <= now]
        held = Decimal(0)
        for executed_at, shares in self.fills.get(symbol, []):
            if executed_at >= before:
                continue
            for at, ratio in ratios:
                if executed_at < at:
                    shares *= ratio
            held += shares
        return held
