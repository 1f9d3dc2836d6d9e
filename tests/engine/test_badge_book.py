"""What an evaluator keeps of badges in memory: event by event the same as reading the whole ledger again.

The machine books random scripts for several portfolios on two shards: fills, duplicates, reversals, splits, dividends,
quotes; shards are taken over in the middle, and transactions are lost before they commit.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.badge_book import _Sectors
from engine.badges import (
    EVIDENCE_PRICES_MAX,
    BadgeEventKind,
    BadgeState,
    Predicate,
    Proof,
    Transition,
    badge_message_encoder,
    load_rules,
)
from engine.book import Book
from engine.portfolio import Position
from tests.badge_bookkeeping import DAY, SECTOR_OF, SYMBOLS, BadgeBookkeeping
from tests.badge_scan import Wanted, scan
from tests.bookkeeping import AT, cash, fill, opening, reversal

NAMES = ("a", "bb", "p-3", "p-4")
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
