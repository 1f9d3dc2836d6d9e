"""A second accounting, written from the definitions alone: slow, plain, sharing no line with the engine.

Quantities, prices and averages are `Fraction`s, amounts are whole micro-units. It takes portfolio events as the JSON
objects that travel over Kafka, each once (the first occurrence wins), and answers BOOKED, DUPLICATE or the reason of
the refusal. Corporate actions are taken step by step: `split`, `accrue`, `pay`. Whatever is asked of it is computed
anew from quantities and prices.

Decisions it shares with the engine, because without them a micro-unit has no owner: a fill's notional is rounded
once; a partial close releases round_half_even(cost × closed / quantity); of a fill that crosses zero the closing part
is rounded and the opening part is the rest, and its fee belongs to what it closed; a position without a usable price
counts at its cost. A split's quantity and price are rounded half-even to 12 decimals and 15 digits; a cost that no
quantity of its sign stands for (after a split or a reversal) is realised. What was held before an instant is what is
held now without the fills executed since.

`realized_exact` and `cost_exact` follow the same fills without any rounding: they show that the rounded figures
stay within a micro-unit or two per fill.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

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


def ratio(text: str) -> Fraction:
    """New shares per old one: a decimal, or new:old."""
    new, colon, old = text.partition(":")
    return Fraction(int(new), int(old)) if colon else number(text)


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


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


def rounded(exact: Fraction) -> Fraction:
    """Half-even to 12 decimals, and to 15 significant digits where those are fewer."""
    whole_digits = len(str(int(abs(exact)))) if abs(exact) >= 1 else 0
    decimals = 12
    if whole_digits:
        decimals = min(12, 15 - whole_digits)
    elif exact:
        leading_zeros = 0
        while abs(exact) * 10 ** (leading_zeros + 1) < 1:
            leading_zeros += 1
        decimals = min(12, 15 + leading_zeros)
    nearest = half_even(exact * Fraction(10) ** decimals) / Fraction(10) ** decimals
    if abs(nearest) >= NUMBER_LIMIT:
        raise OutOfRange("TOO_LARGE")
    return nearest


@dataclass
class Position:
    """One cycle from flat to flat. `quantity` and `cost` carry the sign."""

    quantity: Fraction
    cost: int
    realized: int
    cost_exact: Fraction
    fees: int = 0
    opened_sequence: int = 0


@dataclass(frozen=True)
class Cycle:
    """A position that is over."""

    symbol: str
    is_long: bool
    realized: int
    fees: int
    opened_sequence: int
    closed_sequence: int


@dataclass
class Day:
    """What a portfolio looked like at the cut, and what has come and gone since."""

    nav: int = 0
    values: dict[str, int] = field(default_factory=dict)
    traded: dict[str, int] = field(default_factory=dict)
    flows: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Trade:
    """A fill that stands: what it did, so that it can be taken back."""

    symbol: str
    signed_quantity: Fraction
    executed_at: datetime
    amount: int
    fee: int
    realized: int
    cost: int
    realized_exact: Fraction
    cost_exact: Fraction


@dataclass(frozen=True)
class SplitTaken:
    symbol: str
    ratio: Fraction
    at: datetime


@dataclass
class Figures:
    """Everything a mark says, in micro-units, and per symbol value and day P&L (also of positions closed today)."""

    nav: int
    cash: int
    receivables: int
    positions_value: int
    unrealized: int
    realized: int
    fees: int
    income: int
    flows: int
    trading: int
    corporate: int
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
    trading: int = 0
    corporate: int = 0
    entries: int = 0
    fills: int = 0
    positions: dict[str, Position] = field(default_factory=dict)
    owed: dict[str, int] = field(default_factory=dict)
    trades: dict[str, Trade] = field(default_factory=dict)
    movements: dict[str, tuple[str, int]] = field(default_factory=dict)
    cycles: list[Cycle] = field(default_factory=list)
    day: Day = field(default_factory=Day)
    income_today: int = 0
    fees_today: int = 0

    @property
    def receivables(self) -> int:
        return sum(self.owed.values())

    # -- events ----------------------------------------------------------------------------------------------

    def move_cash(self, kind: str, amount: int, prices: dict[str, Fraction]) -> None:
        """`amount` is negative when a movement is taken back."""
        if kind in FLOW_SIGNS:
            signed = FLOW_SIGNS[kind] * amount
            self.day.flows.append((self.figures(prices).nav, signed))
            self.flows = limited(self.flows + signed)
            self.cash += signed
        elif kind in INCOME_KINDS:
            self.earn(amount)
            self.cash += amount
        elif kind == "FEE":
            self.pay_fee(amount)
        limited(self.cash)

    def earn(self, amount: int) -> None:
        self.income = limited(self.income + amount)
        self.income_today += amount

    def pay_fee(self, fee: int) -> None:
        self.fees = limited(self.fees + fee)
        self.fees_today += fee
        self.cash -= fee

    def fill(self, event: dict[str, str], scale: Fraction) -> None:
        """Buy or sell; `scale` turns the shares of the execution into today's."""
        symbol, sign = event["symbol"], {"BUY": 1, "SELL": -1}[event["side"]]
        quantity, price, fee = number(event["quantity"]), number(event["price"]), micro(event.get("fee", "0"))
        exact = quantity * price * MICRO
        notional = limited(half_even(exact))
        shares = quantity if scale == 1 else rounded(quantity * scale)
        if shares == 0:
            raise OutOfRange("NOT_POSITIVE")
        realized, realized_exact = self.realized, self.realized_exact
        self.fills += 1
        self.trade_cash(symbol, -sign * notional, fee)
        closed, closing = Fraction(0), 0
        held = self.positions.get(symbol)
        if held is not None and (held.quantity > 0) != (sign > 0):
            closed, closing = min(abs(held.quantity), shares), notional
            if closed < shares:
                closing = half_even(closed * price * MICRO if scale == 1 else notional * closed / shares)
            self.reduce(symbol, closed, limited(closing), exact * closed / shares, fee)
        if closed < shares:
            rest = exact * (shares - closed) / shares
            opening_fee = 0 if closed else fee
            self.add(symbol, sign * (shares - closed), sign * (notional - closing), sign * rest, opening_fee)
        realized, realized_exact = self.realized - realized, self.realized_exact - realized_exact
        self.trades[event["event_id"]] = Trade(
            symbol=symbol,
            signed_quantity=sign * quantity,
            executed_at=instant(event["executed_at"]),
            amount=-sign * notional,
            fee=fee,
            realized=realized,
            cost=realized + sign * notional,
            realized_exact=realized_exact,
            cost_exact=realized_exact + sign * exact,
        )

    def trade_cash(self, symbol: str, amount: int, fee: int) -> None:
        self.cash += amount
        self.pay_fee(fee)
        limited(self.cash)
        self.day.traded[symbol] = self.day.traded.get(symbol, 0) - amount

    def limit(self, symbol: str, prices: dict[str, Fraction]) -> None:
        """After a fill: gross value, gross cost and the position's day base stay within the range."""
        limited(sum(abs(self.value(name, prices)) for name in self.positions))
        limited(sum(abs(held.cost) for held in self.positions.values()))
        limited(self.day.values.get(symbol, 0) + self.day.traded.get(symbol, 0))

    def held_or_new(self, symbol: str) -> Position:
        """A new one begins with the entry that is being booked."""
        return self.positions.setdefault(symbol, Position(Fraction(0), 0, 0, Fraction(0), 0, self.entries + 1))

    def add(self, symbol: str, quantity: Fraction, cost: int, cost_exact: Fraction, fee: int) -> None:
        held = self.held_or_new(symbol)
        held.quantity += quantity
        held.cost = limited(held.cost + cost)
        held.cost_exact += cost_exact
        held.fees += fee
        check_number(held.quantity)

    def reduce(self, symbol: str, closed: Fraction, proceeds: int, proceeds_exact: Fraction, fee: int) -> None:
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
        held.fees += fee
        if held.quantity == 0:
            self.archive(symbol, direction > 0)
        else:
            check_number(held.quantity)

    def archive(self, symbol: str, is_long: bool) -> None:
        held = self.positions.pop(symbol)
        self.cycles.append(Cycle(symbol, is_long, held.realized, held.fees, held.opened_sequence, self.entries + 1))

    # -- taking back, and corporate actions ------------------------------------------------------------------

    def reverse_trade(self, event_id: str, scale: Fraction) -> None:
        """Take a fill back; `scale` turns its shares into today's."""
        trade = self.trades.pop(event_id)
        self.trade_cash(trade.symbol, -trade.amount, -trade.fee)
        self.realized = limited(self.realized - trade.realized)
        self.realized_exact -= trade.realized_exact
        shares = trade.signed_quantity if scale == 1 else rounded(trade.signed_quantity * scale)
        was_held = trade.symbol in self.positions
        held = self.held_or_new(trade.symbol)
        was_long = held.quantity > 0
        held.quantity -= shares
        held.cost -= trade.cost
        held.cost_exact -= trade.cost_exact
        held.realized -= trade.realized
        held.fees -= trade.fee
        self.settle(trade.symbol, was_long, was_held)

    def settle(self, symbol: str, was_long: bool, was_held: bool = True) -> None:
        """A cost that no quantity of its sign stands for is realised."""
        held = self.positions[symbol]
        if held.quantity == 0 or (held.cost != 0 and (held.cost > 0) != (held.quantity > 0)):
            self.realized = limited(self.realized - held.cost)
            self.realized_exact -= held.cost_exact
            held.realized -= held.cost
            held.cost, held.cost_exact = 0, Fraction(0)
        if held.quantity == 0 and was_held:
            self.archive(symbol, was_long)
        elif held.quantity == 0:
            del self.positions[symbol]
        else:
            check_number(held.quantity)
            limited(held.cost)
            limited(held.realized)
            limited(held.fees)

    def held_before(self, symbol: str, at: datetime, splits: list[SplitTaken]) -> Fraction:
        """The shares that were held just before an instant, in today's."""
        held = self.positions.get(symbol)
        quantity = held.quantity if held else Fraction(0)
        for trade in self.trades.values():
            if trade.symbol == symbol and trade.executed_at >= at:
                quantity -= rounded(trade.signed_quantity * scale_after(splits, symbol, trade.executed_at))
        return quantity

    def split(self, symbol: str, multiplied: Fraction, by: Fraction) -> bool:
        """Multiply `multiplied` of the shares; False when that changes nothing."""
        change = rounded(multiplied * by) - multiplied
        if change == 0:
            return False
        was_held = symbol in self.positions
        held = self.held_or_new(symbol)
        was_long = held.quantity > 0
        held.quantity += change
        self.settle(symbol, was_long, was_held)
        return True

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
        nav = self.cash + self.receivables + sum(values.values())
        today = set(values) | set(self.day.values) | set(self.day.traded)
        return Figures(
            nav=nav,
            cash=self.cash,
            receivables=self.receivables,
            positions_value=sum(values.values()),
            unrealized=sum(values[symbol] - held.cost for symbol, held in self.positions.items()),
            realized=self.realized,
            fees=self.fees,
            income=self.income,
            flows=self.flows,
            trading=self.trading,
            corporate=self.corporate,
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


def scale_after(splits: list[SplitTaken], symbol: str, at: datetime) -> Fraction:
    """What turns the shares of an instant into today's: the splits taken that took effect after it."""
    scale = Fraction(1)
    for split in splits:
        if split.symbol == symbol and split.at > at:
            scale *= split.ratio
    return scale


class Oracle:
    """All portfolios and all prices. `now` is implicit: a price is what was last accepted."""

    def __init__(self) -> None:
        self.portfolios: dict[str, Portfolio] = {}
        self.prices: dict[str, Fraction] = {}
        self.priced_at: dict[str, datetime] = {}
        self.recorded: dict[str, dict[str, Any]] = {}
        self.reversed: set[str] = set()
        self.splits: list[SplitTaken] = []
        self.actions_taken: set[tuple[str, str]] = set()

    def take(self, event: dict[str, Any]) -> str:
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

    def _book(self, event: dict[str, Any]) -> str:
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
        if event["type"] == "reversal":
            refusal = self._reverse(after, event)
        elif event["currency"] != after.currency:
            refusal = "WRONG_CURRENCY"
        elif event["type"] == "cash":
            refusal = self._move_cash(after, event)
        else:
            refusal = self._fill(after, event)
        if not refusal:
            after.entries += 1
            self.portfolios[name] = after
            if event["type"] == "reversal":
                self.reversed.add(event["reverses"])
        return refusal

    def _move_cash(self, after: Portfolio, event: dict[str, Any]) -> str:
        amount = micro(event["amount"])
        if amount <= 0:
            return "NOT_POSITIVE"
        after.move_cash(event["kind"], amount, self.prices)
        after.movements[event["event_id"]] = (event["kind"], amount)
        return ""

    def _fill(self, after: Portfolio, event: dict[str, Any]) -> str:
        quantity, price = number(event["quantity"]), number(event["price"])
        check_number(quantity)
        check_number(price)
        if quantity <= 0 or price <= 0:
            return "NOT_POSITIVE"
        nav_before, fees_before = after.figures(self.prices).nav, after.fees
        after.fill(event, scale_after(self.splits, event["symbol"], instant(event["executed_at"])))
        after.limit(event["symbol"], self.prices)
        self._count_trading(after, nav_before, fees_before)
        return ""

    def _reverse(self, after: Portfolio, event: dict[str, Any]) -> str:
        name = event["reverses"]
        original = self.recorded.get(name)
        if original is None or original["portfolio_id"] != after.name:
            return "UNKNOWN_EVENT"
        if name in self.reversed:
            return "ALREADY_REVERSED"
        if original["type"] == "cash":
            kind, amount = after.movements[name]
            after.move_cash(kind, -amount, self.prices)
            return ""
        if original["type"] != "fill":
            return "NOT_REVERSIBLE"
        symbol, trade = original["symbol"], after.trades[name]
        nav_before, fees_before = after.figures(self.prices).nav, after.fees
        after.reverse_trade(name, scale_after(self.splits, symbol, trade.executed_at))
        after.limit(symbol, self.prices)
        self._count_trading(after, nav_before, fees_before)
        return ""

    def _count_trading(self, after: Portfolio, nav_before: int, fees_before: int) -> None:
        effect = after.figures(self.prices).nav - nav_before
        after.trading = limited(after.trading + effect + after.fees - fees_before)

    # -- corporate actions: each step once -------------------------------------------------------------------

    def split(self, action: dict[str, Any]) -> None:
        """Every holder's shares of before it are multiplied; a price of before it is divided."""
        symbol, by, at = action["symbol"], ratio(action["ratio"]), instant(action["effective_at"])
        if ("split", action["action_id"]) in self.actions_taken:
            return
        self.actions_taken.add(("split", action["action_id"]))
        prices = dict(self.prices)
        if symbol in prices and self.priced_at.get(symbol, at) < at:
            prices[symbol] = rounded(prices[symbol] / by)
            if prices[symbol] == 0:
                del prices[symbol]
        for name, portfolio in self.portfolios.items():
            after = copy.deepcopy(portfolio)
            try:
                if not after.split(symbol, after.held_before(symbol, at, self.splits), by):
                    continue
                effect = after.value(symbol, prices) - portfolio.value(symbol, self.prices)
                after.corporate = limited(after.corporate + effect)
            except OutOfRange:
                continue
            after.entries += 1
            self.portfolios[name] = after
        self.prices = prices
        self.splits.append(SplitTaken(symbol, by, at))

    def accrue(self, action: dict[str, Any], at: datetime) -> None:
        """The ex-date, whose session opens at `at`: who held before it is owed, who was short owes."""
        if ("accrued", action["action_id"]) in self.actions_taken:
            return
        self.actions_taken.add(("accrued", action["action_id"]))
        for name, portfolio in self.portfolios.items():
            held = portfolio.held_before(action["symbol"], at, self.splits)
            held = rounded(held / scale_after(self.splits, action["symbol"], at))  # per share of that day
            if held == 0 or portfolio.currency != action["currency"]:
                continue
            after = copy.deepcopy(portfolio)
            try:
                amount = limited(half_even(held * number(action["amount"]) * MICRO))
                after.owed[action["action_id"]] = amount
                after.earn(amount)
                limited(after.receivables)
            except OutOfRange:
                continue
            after.entries += 1
            self.portfolios[name] = after

    def pay(self, action: dict[str, Any]) -> None:
        """What was accrued becomes cash."""
        for name, portfolio in self.portfolios.items():
            if action["action_id"] not in portfolio.owed:
                continue
            after = copy.deepcopy(portfolio)
            try:
                after.cash = limited(after.cash + after.owed.pop(action["action_id"]))
            except OutOfRange:
                continue
            after.entries += 1
            self.portfolios[name] = after

    def tick(self, symbol: str, price: str, at: datetime | None = None) -> None:
        """A quote stamped `at`; of before a split that was taken it is not applied. Without a stamp it is of now."""
        if at is not None and any(split.symbol == symbol and split.at > at for split in self.splits):
            return
        self.prices[symbol] = number(price)
        self.priced_at.pop(symbol, None)
        if at is not None:
            self.priced_at[symbol] = at

    def cut(self) -> None:
        for portfolio in self.portfolios.values():
            portfolio.cut(self.prices)

    def check(self) -> None:
        for portfolio in self.portfolios.values():
            portfolio.check(self.prices)
