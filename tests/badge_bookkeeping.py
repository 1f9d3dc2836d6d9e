"""tests.bookkeeping with badges followed: what a database would have of them, and what the scan has to be told.

`RULES` has a rule of each predicate that an evaluator looks at, with thresholds that few events reach.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any

from engine.badge_book import BadgeBook, OldestPosition
from engine.badges import BadgeState, Predicate, Proof, Rarity, Rule
from engine.booking import Batch, Booked, DueStep, Record, StepPrices, book_step
from engine.corporate_actions import Step
from tests.badge_scan import Moment, Prices
from tests.bookkeeping import SECTORS, Bookkeeping

SYMBOLS = ("AAPL", "XOM", "BTC", "DUST", "MYSTERY")  # the last one has no sector, and no price at first
SECTOR_OF = SECTORS | {"MYSTERY": "UNCLASSIFIED"}
DAY = timedelta(days=1)


def a_rule(badge_id: str, predicate: Predicate, threshold: str, **of: Any) -> Rule:
    common: dict[str, Any] = {"version": 1, "name": badge_id, "description": badge_id, "rarity": Rarity.COMMON}
    return Rule(badge_id=badge_id, predicate=predicate, threshold=Decimal(threshold), **common, **of)


RULES = [
    a_rule("first", Predicate.FILLS, "1"),
    a_rule("fourth", Predicate.FILLS, "4"),
    a_rule("two_in_a_row", Predicate.STREAK, "2"),
    a_rule("two_sectors", Predicate.SECTORS, "2", minimum=Decimal("0.3"), hysteresis=Decimal("0.1")),
    a_rule("three_sectors", Predicate.SECTORS, "3", minimum=Decimal("0.1")),
    a_rule("a_day", Predicate.HELD, "1", window_days=1),
    a_rule("three_days", Predicate.HELD, "3", window_days=3),
    a_rule("rich", Predicate.NAV, "1000"),
    a_rule("richer", Predicate.NAV, "2500.5"),
]


@dataclass
class BadgeBookkeeping(Bookkeeping):
    """Bookkeeping whose batches are followed. `stored` and `proofs` are what a database would have."""

    badges: BadgeBook = field(default_factory=lambda: BadgeBook(RULES))
    stored: dict[str, dict[str, BadgeState]] = field(default_factory=dict)
    proofs: list[Proof] = field(default_factory=list)
    prices_of: dict[tuple[str, int], Prices] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)

    def send_records(self, shard: int, records: list[Record]) -> Booked:  # type: ignore[override]
        lost = self.badges.turn(shard, self.book, SECTOR_OF.__getitem__)
        trial = Batch(shard, records, self.book, self.now, lost)
        trial.book(self.known(trial, shard))  # ... and the connection breaks
        turn = self.badges.turn(shard, self.book, SECTOR_OF.__getitem__)
        batch = Batch(shard, records, self.book, self.now, turn)
        outcome = batch.book(self.known(batch, shard))
        assert [proof.message for proof in turn.proofs] == [proof.message for proof in lost.proofs]
        for entry in outcome.entries:
            self.hashes[entry.event_id] = entry.content_hash
            self.prices_of[entry.portfolio_id, entry.sequence] = dict(self.oracle.prices)
        self.store(turn.proofs)
        self.posted(shard, outcome)
        self.badges.accept_turn(turn, outcome, self.book)
        self.now += timedelta(minutes=1)
        return outcome

    def book_step(self, shard: int, step: Step, prices: StepPrices) -> Booked:
        holders = [self.holder(name, step) for name in sorted(self.folded) if self.shard_of(name) == shard]
        outcome, turn = Booked(), self.badges.turn(shard, self.book, SECTOR_OF.__getitem__)
        due = DueStep(step, prices, self.now > step.at, b"")
        book_step(outcome, due, [holder for holder in holders if holder is not None], self.now, turn)
        for entry in outcome.entries:
            self.prices_of[entry.portfolio_id, entry.sequence] = dict(self.oracle.prices)
        self.store(turn.proofs)
        self.badges.accept_turn(turn, outcome, self.book)
        return outcome

    def store(self, proofs: list[Proof]) -> None:
        for proof in proofs:
            badge_id, state = proof.transition.rule.badge_id, proof.transition.state
            known = self.stored.setdefault(proof.portfolio_id, {})
            before = known.get(badge_id)
            assert state.events_count == (before.events_count if before else 0) + 1, "an event has its number once"
            known[badge_id] = state
        self.proofs += proofs

    def look(self) -> None:
        """A flush, and whatever is due."""
        slots = self.book.changed()
        while proofs := self.badges.rich(slots, self.book, self.now):
            self.store(proofs)
            self.badges.accept(proofs)
        self.book.clear(slots)
        for shard in range(self.shards_count):
            while names := self.badges.take_due(shard, self.now, 2):
                self.look_at_positions(names)
        counts = {name: len(entries) for name, entries in self.entries.items()}
        self.moments.append(Moment(self.now, dict(self.oracle.prices), counts))

    def look_at_positions(self, names: list[str]) -> None:
        for name in names:
            held = self.folded[name].positions
            if held:
                symbol = min(held, key=lambda of: held[of].held_since)
                first = held[symbol]
                oldest = OldestPosition(name, symbol, first.opened_at, first.held_since, len(self.entries[name]))
                proofs = self.badges.held_long(oldest, self.now)
                self.store(proofs)
                self.badges.accept(proofs)
                self.badges.looked_at(oldest)

    def take_over(self, shard: int) -> None:
        super().take_over(shard)
        self.badges.drop_shard(shard)
        for name, held in self.folded.items():
            if self.shard_of(name) == shard:
                assert name not in self.badges
                oldest = min((position.held_since for position in held.positions.values()), default=None)
                self.badges.open(name, shard, self.book.slot(name), self.stored.get(name), oldest)
