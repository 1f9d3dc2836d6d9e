"""Everything that can happen to portfolios, in any order: engine, fold of the ledger, Book and oracle agree."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.bookkeeping import Bookkeeping, cash, fill, opening, reversal

NAMES = ("a", "bb", "p-3")
SYMBOLS = ("AAPL", "BTC", "DUST")
MICRO = 1_000_000
CASH_KINDS = ("DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND")
RATIOS = ("4", "2", "3:2", "1:8", "1.589", "0.125", "1:3", "20")

names = st.sampled_from(NAMES)
symbols = st.sampled_from(SYMBOLS)
quantities = st.integers(1, 10**6).flatmap(lambda n: st.sampled_from([f"{n}", f"{n}e-2", f"{n}e-6"]))
prices = st.integers(1, 10**7).map(lambda n: f"{n}e-4")
amounts = st.integers(1, 10**9).map(lambda n: f"{n}e-6")
# How long ago it happened: most things just now, some before what was booked in between.
agos = st.sampled_from([timedelta(0)] * 6 + [timedelta(minutes=m) for m in (1, 3, 8, 20, 60)])


class MixedEvents(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.kept = Bookkeeping(shards_count=2)
        self.kept.send(*(opening(name) for name in NAMES))
        self.count = 0
        self.fills: list[tuple[str, str]] = []
        self.unpaid: list[tuple[str, str, str]] = []

    def fresh(self) -> str:
        self.count += 1
        return f"e-{self.count}"

    @rule(
        name=names, side=st.sampled_from(("BUY", "SELL")), symbol=symbols, quantity=quantities, price=prices, ago=agos
    )
    def trade(self, name: str, side: str, symbol: str, quantity: str, price: str, ago: timedelta) -> None:
        event = fill(name, side, quantity, price, self.fresh(), symbol, "0.25", text(self.kept.now - ago))
        self.kept.send(event)
        self.fills.append((name, event["event_id"]))

    @rule(name=names, symbol=symbols, price=prices, part=st.sampled_from(("1", "0.5", "2")))
    def close(self, name: str, symbol: str, price: str, part: str) -> None:
        """Flat, half, or through zero."""
        held = self.kept.folded[name].positions.get(symbol)
        if held is not None:
            quantity = abs(held.quantity) * Decimal(part)
            side = "SELL" if held.quantity > 0 else "BUY"
            event = fill(name, side, str(quantity), price, self.fresh(), symbol, "0.5", text(self.kept.now))
            self.kept.send(event)
            self.fills.append((name, event["event_id"]))

    @rule(name=names, kind=st.sampled_from(CASH_KINDS), amount=amounts)
    def move(self, name: str, kind: str, amount: str) -> None:
        event = cash(name, kind, amount, self.fresh())
        self.kept.send(event)
        self.fills.append((name, event["event_id"]))

    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        """Also a second time, and what somebody else did: both are refused."""
        if self.fills:
            name, event_id = data.draw(st.sampled_from(self.fills))
            self.kept.send(reversal(data.draw(st.sampled_from([name] * 5 + list(NAMES))), event_id, self.fresh()))

    @rule(symbol=symbols, price=prices, ago=agos)
    def tick(self, symbol: str, price: str, ago: timedelta) -> None:
        self.kept.tick(symbol, price, self.kept.now - ago)

    @rule(symbol=symbols, ratio=st.sampled_from(RATIOS), ago=agos)
    def split(self, symbol: str, ratio: str, ago: timedelta) -> None:
        self.kept.split(symbol, ratio, self.kept.now - ago, self.fresh())

    @rule(symbol=symbols, amount=st.integers(1, 10**6).map(lambda n: f"{n}e-5"), ago=agos)
    def accrue(self, symbol: str, amount: str, ago: timedelta) -> None:
        action_id = self.fresh()
        self.kept.accrue(symbol, amount, self.kept.now - ago, action_id)
        self.unpaid.append((symbol, amount, action_id))

    @rule()
    def pay(self) -> None:
        if self.unpaid:
            self.kept.pay(*self.unpaid.pop(0))

    @rule()
    def cut(self) -> None:
        self.kept.cut()

    @rule(shard=st.integers(0, 1))
    def take_over(self, shard: int) -> None:
        self.kept.take_over(shard)

    @invariant()
    def everything_agrees(self) -> None:
        self.kept.check()


TestMixedEvents = MixedEvents.TestCase
TestMixedEvents.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def text(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")
