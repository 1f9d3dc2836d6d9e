"""Badges reckoned a second time, by plain loops over one portfolio's ledger rows. It imports nothing of the engine.

fills    + 1 for each fill, − 1 for each reversal of one
close    a fill brings a position to zero or through it; profitable when what the cycle realised is above its fees
held     a cycle's position, from the execution or the booking of its first fill, whichever is later, until the fill
         that ends it is booked
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from tests.running_program import RECORDING

CATALOGUES = (Path(__file__).parents[1] / "engine" / "catalogue.csv", RECORDING.with_name("assets.csv"))

Row = Mapping[str, Any]


@dataclass
class Cycle:
    symbol: str
    opened_at: datetime
    held_since: datetime
    shares: Decimal
    realized: Decimal = Decimal(0)
    fees: Decimal = Decimal(0)
    paid: Decimal = Decimal(0)  # what it cost, as long as nothing of it was sold
    ended_at: datetime | None = None  # when the entry that ended it was booked
    ended_sequence: int | None = None


@dataclass(frozen=True)
class Step:
    """What stands after one ledger row. `closed` are the cycles that a fill ended with it."""

    row: Row
    fills: int
    streak: int
    open: Mapping[str, Cycle]
    shares: Mapping[str, Decimal]
    paid: Mapping[str, Decimal]
    closed: Iterable[Cycle]


def sector_of() -> dict[str, str]:
    """As the demo of a recording classifies: the file beside it counts more than the shipped one."""
    found: dict[str, str] = {}
    for path in CATALOGUES:
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                found |= {row["symbol"]: row["sector"] for row in csv.DictReader(file)}
    return found


def walk(rows: Iterable[Row]) -> Iterator[Step]:
    """The rows of one portfolio in their order; without reversals of fills, which a recorded market has none of."""
    fills = streak = 0
    open_: dict[str, Cycle] = {}
    for row in rows:
        closed: list[Cycle] = []
        if row["kind"] == "SPLIT":
            open_[row["symbol"]].shares += row["quantity"]
        elif row["kind"] == "FILL":
            assert row["reverses"] is None
            fills += 1
            closed = trade(open_, row)
            for cycle in closed:
                streak = streak + 1 if cycle.realized > cycle.fees else 0
        shares = {symbol: cycle.shares for symbol, cycle in open_.items()}
        paid = {symbol: cycle.paid for symbol, cycle in open_.items()}
        yield Step(row, fills, streak, dict(open_), shares, paid, closed)


def trade(open_: dict[str, Cycle], row: Row) -> list[Cycle]:
    """Bring a fill's cycle to what it is after it; returns the cycle that it ended, if any."""
    symbol, shares = row["symbol"], row["quantity"] * ratio(row["scale"])
    if row["side"] == "SELL":
        shares = -shares
    cycle = open_.get(symbol)
    if cycle is None:
        open_[symbol] = Cycle(symbol, row["effective_at"], held_from(row), shares, fees=row["fee"], paid=-row["amount"])
        return []
    before, cycle.shares = cycle.shares, cycle.shares + shares
    cycle.realized += row["realized"]
    cycle.paid -= row["amount"]
    cycle.fees += row["fee"]
    if cycle.shares and (cycle.shares > 0) == (before > 0):
        return []
    rest, cycle.shares = cycle.shares, Decimal(0)
    cycle.ended_at, cycle.ended_sequence = row["recorded_at"], row["sequence"]
    del open_[symbol]
    if rest:
        open_[symbol] = Cycle(symbol, row["effective_at"], held_from(row), rest)
    return [cycle]


def held_from(row: Row) -> datetime:
    return sorted([row["effective_at"], row["recorded_at"]])[1]


def ratio(text: str | None) -> Decimal:
    if text is None:
        return Decimal(1)
    new, old = text.split(":")
    return Decimal(new) / Decimal(old)


def weights(
    shares: Mapping[str, Decimal], prices: Mapping[str, Decimal], sectors: Mapping[str, str]
) -> dict[str, Fraction]:
    """Each sector's share of the gross value; UNCLASSIFIED is one of them."""
    gross: dict[str, Decimal] = {}
    for symbol, held in shares.items():
        sector = sectors.get(symbol, "UNCLASSIFIED")
        gross[sector] = gross.get(sector, Decimal(0)) + round(abs(held) * prices[symbol], 6)
    whole = sum(gross.values(), Decimal(0))
    return {sector: Fraction(value) / Fraction(whole) for sector, value in gross.items()} if whole else {}


def above(shares_of_value: Mapping[str, Fraction], minimum: Decimal) -> int:
    return sum(weight > Fraction(minimum) for sector, weight in shares_of_value.items() if sector != "UNCLASSIFIED")
