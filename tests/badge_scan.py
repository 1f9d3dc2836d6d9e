"""Badges the slow way: one portfolio's whole ledger read from its first entry, with fractions and plain loops.

It knows nothing of engine.badges. What it is told beside the ledger is what the ledger can not tell: the prices at the
booking of each entry, and the moments at which somebody looked (NAV and how long positions are held).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction

from engine.ledger import LedgerEntry, LedgerKind, Side
from tests.oracle import half_even, rounded

Prices = Mapping[str, Fraction]


@dataclass(frozen=True)
class Wanted:
    """One rule: what it counts, how much of it, and for sectors the weights at which one counts and still counts."""

    badge_id: str
    counts: str
    threshold: Fraction
    minimum: Fraction = Fraction(0)
    kept_above: Fraction = Fraction(0)


@dataclass(frozen=True)
class Moment:
    """Somebody looked at all portfolios, after so many entries of each."""

    at: datetime
    prices: Prices
    entries: Mapping[str, int]


@dataclass
class Cycle:
    held_since: datetime
    realized: int = 0
    fees: int = 0


@dataclass
class Scan:
    wanted: Sequence[Wanted]
    sector_of: Mapping[str, str]
    cash: int = 0
    fills: int = 0
    streak: int = 0
    quantity: dict[str, Fraction] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    cycles: dict[str, Cycle] = field(default_factory=dict)
    # What happened, in order: (badge, kind).
    events: dict[str, list[str]] = field(default_factory=dict)

    def happened(self, badge_id: str, kind: str) -> None:
        self.events.setdefault(badge_id, []).append(kind)

    def reach(self, counts: str, figure: Fraction) -> None:
        """Everything that counts this and asks for no more is unlocked, unless it is."""
        for rule in self.wanted:
            if rule.counts == counts and rule.badge_id not in self.events and figure >= rule.threshold:
                self.happened(rule.badge_id, "UNLOCKED")

    def read(self, entry: LedgerEntry, prices: Prices) -> None:
        self.cash += entry.amount - entry.fee + entry.receivable
        if entry.kind not in (LedgerKind.FILL, LedgerKind.SPLIT):
            return
        if entry.kind is LedgerKind.FILL:
            self.fills += 1 if entry.reverses is None else -1
            self.streak = self.streak if entry.reverses is None else 0
        self.trade(entry)
        self.reach("fills", Fraction(self.fills))
        self.reach("streak", Fraction(self.streak))
        self.look_at_sectors(prices)

    def trade(self, entry: LedgerEntry) -> None:
        symbol = entry.symbol
        assert symbol is not None and entry.quantity is not None
        moved = Fraction(entry.quantity)
        if entry.kind is LedgerKind.FILL:
            if entry.scale is not None:
                moved = rounded(moved * entry.scale)
            if entry.side is Side.SELL:
                moved = -moved
        before = self.quantity.get(symbol, Fraction(0))
        after = before + moved
        self.quantity[symbol] = after
        self.cost[symbol] = self.cost.get(symbol, 0) + entry.cost
        is_trade = entry.kind is LedgerKind.FILL and entry.reverses is None
        has_ended = before != 0 and (after == 0 or (is_trade and (before > 0) != (after > 0)))
        if before == 0 and after != 0:
            self.cycles[symbol] = Cycle(held_from(entry))
        if symbol in self.cycles:
            self.cycles[symbol].realized += entry.realized
            self.cycles[symbol].fees += entry.fee
        if has_ended:
            cycle = self.cycles.pop(symbol)
            self.reach("held days", days(entry.recorded_at - cycle.held_since))
            if is_trade:
                self.streak = self.streak + 1 if cycle.realized - cycle.fees > 0 else 0
            if after != 0:
                self.cycles[symbol] = Cycle(held_from(entry))

    def values(self, prices: Prices) -> dict[str, int]:
        return {
            symbol: half_even(quantity * prices[symbol] * 1_000_000) if symbol in prices else self.cost[symbol]
            for symbol, quantity in self.quantity.items()
            if quantity
        }

    def look_at_sectors(self, prices: Prices) -> None:
        gross: dict[str, int] = {}
        for symbol, value in self.values(prices).items():
            gross[self.sector_of[symbol]] = gross.get(self.sector_of[symbol], 0) + abs(value)
        whole = sum(gross.values())
        weights = [Fraction(value, whole) for sector, value in gross.items() if whole and sector != "UNCLASSIFIED"]
        for rule in self.wanted:
            if rule.counts == "sectors":
                many = sum(weight > rule.minimum for weight in weights) >= rule.threshold
                few = sum(weight > rule.kept_above for weight in weights) < rule.threshold
                last = self.events.get(rule.badge_id, ["NOTHING"])[-1]
                if last == "NOTHING" and many:
                    self.happened(rule.badge_id, "UNLOCKED")
                elif last == "LAPSED" and many:
                    self.happened(rule.badge_id, "ACTIVATED")
                elif last in ("UNLOCKED", "ACTIVATED") and few:
                    self.happened(rule.badge_id, "LAPSED")

    def look(self, at: datetime, prices: Prices) -> None:
        """A flush, and a look at what is due."""
        if all(symbol in prices for symbol, quantity in self.quantity.items() if quantity):
            self.reach("nav", Fraction(self.cash + sum(self.values(prices).values()), 1_000_000))
        for cycle in self.cycles.values():
            self.reach("held days", days(at - cycle.held_since))


def held_from(entry: LedgerEntry) -> datetime:
    """Nobody holds what was not bought yet, and nobody has held for long what was told of a moment ago."""
    return entry.recorded_at if entry.recorded_at > entry.effective_at else entry.effective_at


def days(time: timedelta) -> Fraction:
    return Fraction(time // timedelta(microseconds=1), 86_400_000_000)


def scan(
    name: str,
    entries: Sequence[LedgerEntry],
    prices_of: Mapping[tuple[str, int], Prices],
    moments: Sequence[Moment],
    wanted: Sequence[Wanted],
    sector_of: Mapping[str, str],
) -> dict[str, list[str]]:
    """What happened to each badge of a portfolio; `prices_of` are those at the booking, by name and sequence."""
    found, read = Scan(wanted, sector_of), 0
    for moment in moments:
        for entry in entries[read : moment.entries.get(name, 0)]:
            found.read(entry, prices_of[name, entry.sequence])
        read = moment.entries.get(name, 0)
        if read:
            found.look(moment.at, moment.prices)
    assert read == len(entries)
    return found.events
