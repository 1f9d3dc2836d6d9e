"""Random portfolio events, quotes and corporate actions, and what becomes of them by the oracle."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

from engine.corporate_actions import CorporateAction, DividendAction, SplitAction, opens_at
from tests.bookkeeping import cash, dividend, fill, opening, reversal, split
from tests.oracle import Oracle

PORTFOLIOS_COUNT = 24
# A split that is announced takes effect so much later; by then everybody knows of it.
ANNOUNCED_S = 3
# Known sectors and one symbol that nobody knows.
SECTORS = {"SIM1": "Tech", "SIM2": "Tech", "SIM3": "Energy", "SIM4": "Metals", "SIM5": "UNCLASSIFIED"}


class Stream:
    """Random events, and what becomes of them by the oracle."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.oracle = Oracle()
        self.names = [f"p-{number}" * (1 + number % 3) for number in range(PORTFOLIOS_COUNT)]
        self.sent: list[dict[str, Any]] = []
        self.bad: set[bytes] = set()
        self.prices = {symbol: self.random.randint(100, 90_000) for symbol in SECTORS}
        now = datetime.now(UTC)
        # Executions are of three days ago, before all corporate actions; from half-way on some are of today.
        self.executions = [now - timedelta(days=3)]
        # Nobody's day ends while the test runs, also when it runs at midnight.
        self.day_cut = f"{(now.hour + 12) % 24:02}:00 UTC"

    def good_or_refused(self, event: dict[str, Any]) -> tuple[str, bytes]:
        value = json.dumps(event).encode()
        if self.oracle.take(event) not in ("BOOKED", "DUPLICATE"):
            self.bad.add(value)
        self.sent.append(event)
        return event["portfolio_id"], value

    def malformed(self, key: str, value: bytes) -> tuple[str, bytes]:
        self.bad.add(value)
        return key, value

    def openings(self) -> list[tuple[str, bytes]]:
        return [self.good_or_refused(opening(name) | {"day_cut": self.day_cut}) for name in self.names]

    def next(self) -> tuple[str, bytes]:
        kind = self.random.random()
        if kind < 0.03:
            return self.bad_one()
        if kind < 0.10:
            return self.good_or_refused(self.random.choice(self.sent[-400:]))
        if kind < 0.13:
            again = self.random.choice(self.sent)
            return self.good_or_refused({**again, "portfolio_id": again["portfolio_id"], **self.changed(again)})
        if kind < 0.17:
            return self.good_or_refused(self.taking_back())
        return self.good_or_refused(self.trade() if kind < 0.75 else self.movement())

    def changed(self, event: dict[str, Any]) -> dict[str, str]:
        """Other content under the same id."""
        number = str(self.random.randint(1, 999))
        changing = {"open": "name", "fill": "fee", "cash": "amount", "reversal": "reference"}
        return {changing[event["type"]]: number}

    def taking_back(self) -> dict[str, Any]:
        """Now and then of what can not be taken back, or in another portfolio."""
        event = self.random.choice(self.sent)
        name = event["portfolio_id"] if self.random.random() < 0.95 else self.random.choice(self.names)
        return reversal(name, event["event_id"], self.fresh_id())

    def trade(self) -> dict[str, Any]:
        chosen, name = self.random, self.random.choice(self.names)
        symbol = chosen.choice(list(SECTORS))
        held = self.oracle.portfolios[name].positions.get(symbol)
        quantity, side = f"{chosen.randint(1, 10**6)}e-{chosen.choice((0, 2, 4))}", chosen.choice(("BUY", "SELL"))
        if held and chosen.random() < 0.3:
            exact = abs(held.quantity) * chosen.choice((1, 1, 2))
            quantity, side = f"{int(exact * 10**12)}e-12", "SELL" if held.quantity > 0 else "BUY"
        price = f"{self.prices[symbol] + chosen.randint(-99, 99) + 100}e-2"
        at = chosen.choice(self.executions).isoformat()
        return fill(name, side, quantity, price, self.fresh_id(), symbol, f"{chosen.randint(0, 500)}e-2", at)

    def movement(self) -> dict[str, Any]:
        kinds = ("DEPOSIT", "DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND")
        amount = f"{self.random.randint(1, 10**12)}e-6"
        return cash(self.random.choice(self.names), self.random.choice(kinds), amount, self.fresh_id())

    def bad_one(self) -> tuple[str, bytes]:
        name = self.random.choice(self.names)
        deposit = cash(name, "DEPOSIT", "1", self.fresh_id())
        broken = (
            b"{not json %d" % len(self.sent),
            json.dumps({**deposit, "amount": "-5"}).encode(),
            json.dumps({**deposit, "amount": "1e999999999"}).encode(),
            json.dumps({**deposit, "effective_at": "0001-01-01T00:00:00+14:00"}).encode(),
            json.dumps({**deposit, "unheard_of": 1}).encode(),
            json.dumps({**deposit, "portfolio_id": "nobody"}).encode(),
        )
        self.sent.append(deposit)
        return self.malformed(name, self.random.choice(broken))

    def fresh_id(self) -> str:
        return f"e-{len(self.sent)}-{self.random.randrange(10**9)}"

    def actions(self) -> list[CorporateAction]:
        """A split that comes two days late, one that is announced, a dividend of yesterday: the oracle takes them."""
        now = datetime.now(UTC)
        late_at, soon_at = now - timedelta(days=2), now + timedelta(seconds=ANNOUNCED_S)
        day = (now - timedelta(days=1)).date()
        self.oracle.split(split("SIM1", "3:2", late_at, "late"))
        self.oracle.accrue(dividend("SIM3", "0.37", "yesterday"), opens_at(day))
        self.oracle.pay(dividend("SIM3", "0.37", "yesterday"))
        self.oracle.priced_at["SIM2"] = now
        self.oracle.split(split("SIM2", "4", soon_at, "soon"))
        self.executions.append(soon_at)
        return [
            SplitAction(action_id="late", symbol="SIM1", ratio="3:2", effective_at=late_at),
            SplitAction(action_id="soon", symbol="SIM2", ratio="4", effective_at=soon_at),
            DividendAction(action_id="yesterday", symbol="SIM3", amount="0.37", ex_date=day, pay_date=day),
        ]

    def quote(self) -> tuple[str, str]:
        symbol = self.random.choice(list(SECTORS))
        self.prices[symbol] = max(100, self.prices[symbol] + self.random.randint(-200, 210))
        price = f"{self.prices[symbol] / 100:.2f}"
        self.oracle.prices.pop(symbol, None)
        self.oracle.tick(symbol, price)
        return symbol, price
