"""What an evaluator keeps of badges in memory: event by event the same as reading the whole ledger again.

The machine books random scripts for several portfolios on two shards: fills, duplicates, reversals, splits, dividends,
quotes; shards are taken over in the middle, and transactions are lost before they commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.badge_book import BadgeBook, OldestPosition, _Sectors
from engine.badges import (
    EVIDENCE_PRICES_MAX,
    BadgeEventKind,
    BadgeState,
    Predicate,
    Proof,
    Rarity,
    Rule,
    Transition,
    badge_message_encoder,
    load_rules,
)
from engine.book import Book
from engine.booking import Batch, Booked, DueStep, Record, StepPrices, book_step
from engine.corporate_actions import Step
from engine.portfolio import Position
from tests.badge_scan import Moment, Prices, Wanted, scan
from tests.bookkeeping import AT, SECTORS, Bookkeeping, cash, fill, opening, reversal

NAMES = ("a", "bb", "p-3", "p-4")
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
WANTED = [
    Wanted("first", "fills", Fraction(1)),
    Wanted("fourth", "fills", Fraction(4)),
    Wanted("two_in_a_row", "streak", Fraction(2)),
    Wanted("two_sectors", "sectors", Fraction(2), Fraction(3, 10), Fraction(2, 10)),
    Wanted("three_sectors", "sectors", Fraction(3), Fraction(1, 10), Fraction(1, 10)),
    Wanted("a_day", "held days", Fraction(1)),
    Wanted("three_days", "held days", Fraction(3)),
    Wanted("rich", "nav", Fraction(1000)),
    Wanted("richer", "nav", Fraction("2500.5")),
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


names = st.sampled_from(NAMES)
symbols = st.sampled_from(SYMBOLS)
quantities = st.integers(1, 40).map(str)
prices = st.integers(1, 400).map(lambda n: f"{n}e-1")
fees = st.sampled_from(("0", "0.25", "3"))
agos = st.sampled_from([timedelta(0)] * 6 + [timedelta(minutes=3), timedelta(hours=20), 4 * DAY])
RATIOS = ("4", "3:2", "1:8", "0.125")


class Badges(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.kept = BadgeBookkeeping(shards_count=2)
        self.kept.send(*(opening(name) for name in NAMES))
        for symbol in SYMBOLS[:-1]:
            self.kept.tick(symbol, "20")
        self.kept.send(*(cash(name, "DEPOSIT", "800", f"paid-in-{name}") for name in NAMES))
        self.kept.look()
        self.count = 0
        self.sent: list[dict[str, Any]] = []

    def fresh(self) -> str:
        self.count += 1
        return f"e-{self.count}"

    def send(self, *events: dict[str, Any]) -> None:
        self.sent += events
        self.kept.send(*events)
        self.kept.look()

    @rule(data=st.data(), count=st.integers(1, 5))
    def trade(self, data: st.DataObject, count: int) -> None:
        """Several fills in one batch, of several portfolios."""
        self.send(
            *(
                fill(
                    data.draw(names),
                    data.draw(st.sampled_from(("BUY", "BUY", "SELL"))),
                    data.draw(quantities),
                    data.draw(prices),
                    self.fresh(),
                    data.draw(symbols),
                    data.draw(fees),
                    text(self.kept.now - data.draw(agos)),
                )
                for _ in range(count)
            )
        )

    @rule(
        name=names,
        symbol=symbols,
        better=st.sampled_from((True, True, False)),
        part=st.sampled_from(("1", "1", "0.5", "2")),
        fee=fees,
    )
    def close(self, name: str, symbol: str, better: bool, part: str, fee: str) -> None:
        """Flat, half, or through zero; at a gain or a loss."""
        held = self.kept.folded[name].positions.get(symbol)
        if held is not None:
            price = abs(Decimal(held.cost)) / 1_000_000 / abs(held.quantity) * (Decimal("1.5") if better else 1)
            quantity = abs(held.quantity) * Decimal(part)
            side = "SELL" if held.quantity > 0 else "BUY"
            price = max(round(price, 2), Decimal("0.01"))
            self.send(fill(name, side, str(quantity), str(price), self.fresh(), symbol, fee, text(self.kept.now)))

    @rule(name=names, kind=st.sampled_from(("DEPOSIT", "WITHDRAWAL", "FEE")), amount=st.integers(1, 2_000).map(str))
    def move(self, name: str, kind: str, amount: str) -> None:
        self.send(cash(name, kind, amount, self.fresh()))

    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        if self.sent:
            self.kept.send(*data.draw(st.lists(st.sampled_from(self.sent), min_size=1, max_size=3)))
            self.kept.look()

    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        if self.sent:
            event = data.draw(st.sampled_from(self.sent))
            self.send(reversal(event["portfolio_id"], event["event_id"], self.fresh()))

    @rule(symbol=symbols, price=prices)
    def tick(self, symbol: str, price: str) -> None:
        self.kept.tick(symbol, price)
        self.kept.look()

    @rule(symbol=symbols, ratio=st.sampled_from(RATIOS), ago=agos)
    def split(self, symbol: str, ratio: str, ago: timedelta) -> None:
        self.kept.split(symbol, ratio, self.kept.now - ago, self.fresh())
        self.kept.look()

    @rule(hours=st.sampled_from((7, 24, 50)), looks=st.booleans())
    def wait(self, hours: int, looks: bool) -> None:
        """Somebody may be late to look at what is due: a position that is closed first was held all the same."""
        self.kept.now += timedelta(hours=hours)
        if looks:
            self.kept.look()

    @rule(shard=st.integers(0, 1))
    def take_over(self, shard: int) -> None:
        self.kept.take_over(shard)
        self.kept.look()

    @invariant()
    def everybody_has_what_the_whole_ledger_proves(self) -> None:
        kept = self.kept
        for name, entries in kept.entries.items():
            wanted = scan(name, entries, kept.prices_of, kept.moments, WANTED, SECTOR_OF)
            proved: dict[str, list[str]] = {}
            for proof in kept.proofs:
                if proof.portfolio_id == name:
                    proved.setdefault(proof.transition.rule.badge_id, []).append(proof.transition.kind.value)
            assert proved == wanted
            states = {badge: BadgeState(kinds[-1] != "LAPSED", len(kinds)) for badge, kinds in wanted.items()}
            assert kept.badges.states(name) == kept.stored.get(name, {}) == states


TestBadges = Badges.TestCase
TestBadges.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def text(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


def test_evidence_is_never_too_large_to_be_told() -> None:
    """A portfolio of thousands of positions in as many sectors, all with names as long as can be."""
    of = next(one for one in load_rules() if one.predicate is Predicate.SECTORS)
    transition = Transition(of, BadgeEventKind.UNLOCKED, Decimal(5), BadgeState(True, 1), AT)
    sizes = []
    for count in (EVIDENCE_PRICES_MAX, EVIDENCE_PRICES_MAX + 1, 10_000):
        names = [f"{n:064}" for n in range(count)]
        held = _Sectors(lambda symbol: "sector " + symbol)
        for name in names:
            held.move(name, Position(Decimal(1), 1, 0, 0, AT, 1, AT), Decimal("999999.999999"))
        evidence = held.evidence(transition, Book(), dict.fromkeys(names, Decimal("999999.999999")), "e", 1)
        assert (evidence.prices is None) is (count > EVIDENCE_PRICES_MAX)
        sizes.append(len(badge_message_encoder.encode(Proof("p", transition, evidence).message)))
    assert max(sizes) < 200_000
