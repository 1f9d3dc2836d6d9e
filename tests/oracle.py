"""A second accounting, written from the definitions alone: slow, plain, sharing no line with the engine.

Quantities, prices and averages are `Fraction`s, amounts are whole micro-units. It takes portfolio events as the JSON
objects that travel over Kafka, each once (the first occurrence wins), and answers BOOKED, DUPLICATE or the reason of
the refusal. Whatever is asked of it is computed anew from quantities and prices.

Decisions it shares with the engine, because without them a micro-unit has no owner: a fill's notional is rounded once;
a partial close releases round_half_even(cost × closed / quantity); of a fill that crosses zero the closing part is
rounded and the opening part is the rest; a position without a usable price counts at its cost.

`realized_exact` and `cost_exact` follow the same fills without any rounding: they show that the rounded figures
stay within a micro-unit or two per fill.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

MICRO = 1_000_000
AMOUNT_LIMIT_MICRO = 576_460_752_303_423_488  # 2⁵⁹
NUMBER_LIMIT = 10**15
FLOW_SIGNS = {"DEPOSIT": 1, "WITHDRAWAL": -1, "REWARD": 1}
INCOME_KINDS = ("INTEREST", "DIVIDEND")


class OutOfRange(Exception):
    """A figure beyond what the ledger keeps exactly."""


def half_even(exact: Fraction) -> int:
    """The nearest whole number; of two equally near ones the even one."""
    below = exact.numerator // exact.denominator
    rest = exact - below
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1):
        return below + 1
    return below


def number(text: str) -> Fraction:
    return Fraction(Decimal(text))


def micro(text: str) -> int:
    """An amount of money as micro-units; more decimals than six are refused."""
    exact = number(text) * MICRO
    if exact.denominator != 1:
        raise OutOfRange("TOO_PRECISE")
    return limited(exact.numerator)


def limited(amount: int) -> int:
    if abs(amount) >= AMOUNT_LIMIT_MICRO:
        raise OutOfRange("TOO_LARGE")
    return amount


def check_number(exact: Fraction) -> None:
    """At most 15 significant digits, 12 decimals, below 10¹⁵."""
    if abs(exact) >= NUMBER_LIMIT:
        raise OutOfRange("TOO_LARGE")
    scaled = exact * 10**12
    if scaled.denominator != 1 or len(str(abs(scaled.numerator)).rstrip("0")) > 15:
        raise OutOfRange("TOO_PRECISE")


@dataclass
class Position:
    """One cycle from flat to flat. `quantity` and `cost` carry the sign."""

    quantity: Fraction
    cost: int
    realized: int
    cost_exact: Fraction


@dataclass
class Day:
    """What a portfolio looked like at the cut, and what has come and gone since."""

    nav: int = 0
    values: dict[str, int] = field(default_factory=dict)
    traded: dict[str, int] = field(default_factory=dict)
    flows: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Figures:
    """Everything a mark says, in micro-units, and per symbol value and day P&L (also of positions closed today)."""

    nav: int
    cash: int
    positions_value: int
    unrealized: int
    realized: int
    fees: int
    day_pnl: int
    ledger_sequence: int
    missing: bool
    values: dict[str, int]
    position_day_pnl: dict[str, int]


@dataclass
class Portfolio:
    name: str
    currency: str
    cash: int = 0
    realized: int = 0
    realized_exact: Fraction = Fraction(0)
    fees: int = 0
    income: int = 0
    flows: int = 0
    entries: int = 0
    fills: int = 0
    positions: dict[str, Position] = field(default_factory=dict)
    day: Day = field(default_factory=Day)
    income_today: int = 0
    fees_today: int = 0

    # -- events ----------------------------------------------------------------------------------------------

    def move_cash(self, kind: str, amount: int, prices: dict[str, Fraction]) -> None:
        if kind in FLOW_SIGNS:
            signed = FLOW_SIGNS[kind] * amount
            self.day.flows.append((self.figures(prices).nav, signed))
            self.flows = limited(self.flows + signed)
            self.cash += signed
        elif kind in INCOME_KINDS:
            self.income = limited(self.income + amount)
            self.income_today += amount
            self.cash += amount
        elif kind == "FEE":
            self.pay(amount)
        limited(self.cash)

    def pay(self, fee: int) -> None:
        self.fees = limited(self.fees + fee)
        self.fees_today += fee
        self.cash -= fee

    def fill(self, symbol: str, sign: int, quantity: Fraction, price: Fraction, fee: int) -> None:
        """`quantity` > 0; `sign` is +1 for a buy, −1 for a sell."""
        notional = limited(half_even(quantity * price * MICRO))
        self.fills += 1
        self.cash -= sign * notional
        self.pay(fee)
        limited(self.cash)
        self.day.traded[symbol] = self.day.traded.get(symbol, 0) + sign * notional
        held = self.positions.get(symbol)
        if held is None or (held.quantity > 0) == (sign > 0):
            self.add(symbol, sign * quantity, sign * notional, sign * quantity * price * MICRO)
            return
        closed = min(abs(held.quantity), quantity)
        closing = notional if closed == quantity else limited(half_even(closed * price * MICRO))
        self.reduce(symbol, closed, closing, closed * price * MICRO)
        if quantity > closed:
            rest = quantity - closed
            self.add(symbol, sign * rest, sign * (notional - closing), sign * rest * price * MICRO)

    def limit(self, symbol: str, prices: dict[str, Fraction]) -> None:
        """After a fill: gross value, gross cost and the position's day base stay within the range."""
        limited(sum(abs(self.value(name, prices)) for name in self.positions))
        limited(sum(abs(held.cost) for held in self.positions.values()))
        limited(self.day.values.get(symbol, 0) + self.day.traded.get(symbol, 0))

    def add(self, symbol: str, quantity: Fraction, cost: int, cost_exact: Fraction) -> None:
        held = self.positions.setdefault(symbol, Position(Fraction(0), 0, 0, Fraction(0)))
        held.quantity += quantity
        held.cost = limited(held.cost + cost)
        held.cost_exact += cost_exact
        check_number(held.quantity)

    def reduce(self, symbol: str, closed: Fraction, proceeds: int, proceeds_exact: Fraction) -> None:
        """Close `closed` > 0 units: a long is sold for the proceeds, a short is bought back with them."""
        held = self.positions[symbol]
        direction = 1 if held.quantity > 0 else -1
        released = half_even(Fraction(abs(held.cost)) * closed / abs(held.quantity))
        released_exact = abs(held.cost_exact) * closed / abs(held.quantity)
        gain = direction * (proceeds - released)
        self.realized = limited(self.realized + gain)
        self.realized_exact += direction * (proceeds_exact - released_exact)
        held.realized = limited(held.realized + gain)
        held.cost -= direction * released
        held.cost_exact -= direction * released_exact
        held.quantity -= direction * closed
        if held.quantity == 0:
            del self.positions[symbol]
        else:
            check_number(held.quantity)

    # -- what it is worth ------------------------------------------------------------------------------------

    def value(self, symbol: str, prices: dict[str, Fraction]) -> int:
        held = self.positions.get(symbol)
        if held is None:
            return 0
        if symbol not in prices:
            return held.cost
        value = half_even(held.quantity * prices[symbol] * MICRO)
        return value if abs(value) < AMOUNT_LIMIT_MICRO else held.cost

    def figures(self, prices: dict[str, Fraction]) -> Figures:
        values = {symbol: self.value(symbol, prices) for symbol in self.positions}
        nav = self.cash + sum(values.values())
        today = set(values) | set(self.day.values) | set(self.day.traded)
        return Figures(
            nav=nav,
            cash=self.cash,
            positions_value=sum(values.values()),
            unrealized=sum(values[symbol] - held.cost for symbol, held in self.positions.items()),
            realized=self.realized,
            fees=self.fees,
            day_pnl=nav - self.day.nav - sum(amount for _, amount in self.day.flows),
            ledger_sequence=self.entries,
            missing=any(symbol not in prices for symbol in values),
            values=values,
            position_day_pnl={
                symbol: values.get(symbol, 0) - self.day.values.get(symbol, 0) - self.day.traded.get(symbol, 0)
                for symbol in today
            },
        )

    def day_return(self, prices: dict[str, Fraction]) -> Fraction | None:
        """Time-weighted since the cut: a sub-period that starts at 0 does not count, one below 0 has no return."""
        product, start = Fraction(1), self.day.nav
        ends = [*self.day.flows, (self.figures(prices).nav, 0)]
        for nav_before, amount in ends:
            if start < 0 or (start == 0 and nav_before != 0):
                return None
            if start > 0:
                product *= Fraction(nav_before, start)
            start = nav_before + amount
        return product - 1

    def sectors(self, prices: dict[str, Fraction], sector_of: dict[str, str]) -> dict[str, tuple[int, int]]:
        """Sector → (signed value, sum of absolute values)."""
        sums: dict[str, tuple[int, int]] = {}
        for symbol in self.positions:
            value = self.value(symbol, prices)
            net, gross = sums.get(sector_of[symbol], (0, 0))
            sums[sector_of[symbol]] = (net + value, gross + abs(value))
        return sums

    def cut(self, prices: dict[str, Fraction]) -> None:
        figures = self.figures(prices)
        self.day = Day(figures.nav, dict(figures.values))
        self.income_today = self.fees_today = 0

    def check(self, prices: dict[str, Fraction]) -> None:
        """The identities of the accounting, and how far rounding may have carried it."""
        now = self.figures(prices)
        assert now.nav == self.flows + self.realized + now.unrealized + self.income - self.fees
        by_position = sum(now.position_day_pnl.values())
        assert now.day_pnl == by_position + self.income_today - self.fees_today
        assert abs(self.realized - self.realized_exact) <= 2 * self.fills
        for held in self.positions.values():
            assert abs(held.cost - held.cost_exact) <= 2 * self.fills


class Oracle:
    """All portfolios and all prices. `now` is implicit: a price is what was last accepted."""

    def __init__(self) -> None:
        self.portfolios: dict[str, Portfolio] = {}
        self.prices: dict[str, Fraction] = {}
        self.recorded: dict[str, dict[str, object]] = {}

    def take(self, event: dict[str, str]) -> str:
        """BOOKED, DUPLICATE, or why the event is refused."""
        event_id = event["event_id"]
        if event_id in self.recorded:
            return "DUPLICATE" if self.recorded[event_id] == event else "EVENT_ID_REUSED"
        try:
            refusal = self._book(event)
        except OutOfRange as error:
            refusal = str(error)
        if refusal:
            return refusal
        self.recorded[event_id] = dict(event)
        return "BOOKED"

    def _book(self, event: dict[str, str]) -> str:
        name = event["portfolio_id"]
        if event["type"] == "open":
            if name in self.portfolios:
                return "ALREADY_OPEN"
            self.portfolios[name] = Portfolio(name, event["base_currency"], entries=1)
            return ""
        if name not in self.portfolios:
            return "UNKNOWN_PORTFOLIO"
        # Booked on a copy, so that whatever is refused half-way has changed nothing.
        after = copy.deepcopy(self.portfolios[name])
        if event["currency"] != after.currency:
            return "WRONG_CURRENCY"
        if event["type"] == "cash":
            amount = micro(event["amount"])
            if amount <= 0:
                return "NOT_POSITIVE"
            after.move_cash(event["kind"], amount, self.prices)
        else:
            quantity, price = number(event["quantity"]), number(event["price"])
            check_number(quantity)
            check_number(price)
            if quantity <= 0 or price <= 0:
                return "NOT_POSITIVE"
            sign = {"BUY": 1, "SELL": -1}[event["side"]]
            after.fill(event["symbol"], sign, quantity, price, micro(event.get("fee", "0")))
            after.limit(event["symbol"], self.prices)
        after.entries += 1
        self.portfolios[name] = after
        return ""

    def tick(self, symbol: str, price: str) -> None:
        self.prices[symbol] = number(price)

    def cut(self) -> None:
        for portfolio in self.portfolios.values():
            portfolio.cut(self.prices)

    def check(self) -> None:
        for portfolio in self.portfolios.values():
            portfolio.check(self.prices)
