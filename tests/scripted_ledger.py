"""A portfolio's life, step by step: what the evaluator would book, and what it all was worth after each step.

`worth` and `nav` value the portfolio by a plain loop over what it holds, at the prices of that step: what a past
state is compared with. `write` leaves it in PostgreSQL the way the evaluator does.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import asyncpg

from engine.amounts import scale_number
from engine.corporate_actions import Split, Step, price_after
from engine.entries import draft_accrual, draft_event, draft_payment, draft_reversal, draft_split
from engine.explain import Worth
from engine.instants import to_ns
from engine.ledger import LedgerEntry, LedgerKind
from engine.messages import CashEvent, FillEvent, OpenEvent, Quote, ReversalEvent
from engine.portfolio import ClosedPosition, Portfolio, Position, Present, value_portfolio
from engine.stores.ledger_rows import write_closed, write_entries, write_portfolios, write_positions
from engine.stores.price_closes import PriceCloses

BEGIN = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)
SYMBOLS = ("AAPL", "TSLA", "KO")


@dataclass(frozen=True)
class Moment:
    """The portfolio at an instant, as it stood after the step taken then."""

    at: datetime
    ledger_sequence: int
    nav: int
    worth: Worth
    prices: dict[str, Decimal]
    positions: dict[str, Position]
    figures: dict[str, int]


@dataclass
class ScriptedLedger:
    """Every step is taken at `at`, which only `wait` moves."""

    portfolio_id: str = "p-1"
    at: datetime = BEGIN
    entries: list[LedgerEntry] = field(default_factory=list)
    closed: list[ClosedPosition] = field(default_factory=list)
    quotes: dict[str, Quote] = field(default_factory=dict)
    splits: dict[str, list[Split]] = field(default_factory=dict)
    owed: list[tuple[Step, int]] = field(default_factory=list)
    actions: list[tuple[Step, datetime]] = field(default_factory=list)
    recorded: list[tuple[datetime, list[Quote]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.portfolio = Portfolio(self.portfolio_id, "USD")
        self._ids = itertools.count(1)
        opening = OpenEvent(
            event_id=self._id(), portfolio_id=self.portfolio_id, owner="ann", name="n", base_currency="USD",
            opened_at=self.at, day_cut="00:00 UTC",
        )  # fmt: skip
        self._book(draft_event(opening, self.at))

    # -- steps ----------------------------------------------------------------------------------------------

    def wait(self, length: timedelta = HOUR) -> Moment:
        self.at += length
        return self.moment()

    def quote(self, symbol: str, price: str) -> None:
        self.quotes[symbol] = Quote(symbol, price, to_ns(self.at), "test")

    def cash(self, kind: str, amount: str) -> LedgerEntry:
        event = CashEvent(
            event_id=self._id(), portfolio_id=self.portfolio_id, kind=kind, amount=amount, currency="USD",
            effective_at=self.at,
        )  # fmt: skip
        return self._book(draft_event(event, self.at))

    def noted(self, reference: str) -> LedgerEntry:
        """A deposit with a text of its source."""
        event = CashEvent(
            event_id=self._id(), portfolio_id=self.portfolio_id, kind="DEPOSIT", amount="1", currency="USD",
            effective_at=self.at, reference=reference,
        )  # fmt: skip
        return self._book(draft_event(event, self.at))

    def fill(
        self, symbol: str, side: str, quantity: str, price: str, fee: str = "0", scale: Fraction | None = None
    ) -> LedgerEntry:
        event = FillEvent(
            event_id=self._id(), portfolio_id=self.portfolio_id, symbol=symbol, side=side, quantity=quantity,
            price=price, fee=fee, currency="USD", executed_at=self.at,
        )  # fmt: skip
        return self._book(draft_event(event, self.at, scale))

    def reverse(self, original: LedgerEntry) -> LedgerEntry | None:
        """None when there is nothing to reverse."""
        if original.kind is LedgerKind.OPEN or original.reverses or "#" in original.event_id:
            return None
        if any(entry.reverses == original.event_id for entry in self.entries):
            return None
        scale = original.scale
        for split in self.splits.get(original.symbol or "", []):
            if split.effective_at_ns > to_ns(original.recorded_at):
                scale = (scale or Fraction(1)) * split.scale
        event = ReversalEvent(
            event_id=self._id(), portfolio_id=self.portfolio_id, reverses=original.event_id, effective_at=self.at
        )
        return self._book(draft_reversal(event, original, self.at, scale))

    def split(self, symbol: str, scale: Fraction, late_by: timedelta = timedelta()) -> None:
        """Takes effect now, or took effect a while ago: then the quotes since are in new shares already."""
        effective_at = self.at - late_by
        step = self._step(LedgerKind.SPLIT, symbol, effective_at, scale=scale)
        before = self.price(symbol)
        self.splits.setdefault(symbol, []).append(Split(effective_at, scale))
        held = self.portfolio.positions.get(symbol)
        change = scale_number(held.quantity, scale, "quantity") - held.quantity if held else Decimal(0)
        if change:
            draft = draft_split(step, self.portfolio_id, change, self.at, bool(late_by), b"s")
            self._book(draft, (before, self.price(symbol)))

    def accrue(self, symbol: str, per_share: str) -> None:
        step = self._step(LedgerKind.DIVIDEND_ACCRUED, symbol, self.at, per_share=Decimal(per_share))
        held = self.portfolio.positions.get(symbol)
        if held:
            entry = self._book(draft_accrual(step, self.portfolio_id, held.quantity, self.at, False, b"d"))
            self.owed.append((step, entry.receivable))

    def pay(self) -> None:
        """Pay what was accrued first."""
        if self.owed:
            step, amount = self.owed.pop(0)
            paid = replace(step, kind=LedgerKind.DIVIDEND_PAID)
            self._book(draft_payment(paid, self.portfolio_id, amount, self.at, False, b"d"))

    def record(self) -> None:
        """The present quotes become the recorded prices of this instant of the grid."""
        self.recorded.append((self.at, list(self.quotes.values())))

    # -- figures --------------------------------------------------------------------------------------------

    def price(self, symbol: str) -> Decimal | None:
        quote = self.quotes.get(symbol)
        if quote is None:
            return None
        return price_after(Decimal(quote.price), quote.ts_event_ns, self.splits.get(symbol, ()))

    def prices(self) -> dict[str, Decimal]:
        return {symbol: price for symbol in self.quotes if (price := self.price(symbol)) is not None}

    def nav(self) -> int:
        return value_portfolio(self.portfolio, self.prices()).nav

    def worth(self) -> Worth:
        values = value_portfolio(self.portfolio, self.prices()).values
        return Worth(self.portfolio.cash + self.portfolio.receivables, values)

    def moment(self) -> Moment:
        names = ("cash", "receivables", "realized", "fees", "income", "flows", "trading", "corporate")
        return Moment(
            at=self.at,
            ledger_sequence=self.portfolio.ledger_sequence,
            nav=self.nav(),
            worth=self.worth(),
            prices=self.prices(),
            positions=dict(self.portfolio.positions),
            figures={name: getattr(self.portfolio, name) for name in names},
        )

    # -- rows -----------------------------------------------------------------------------------------------

    async def write(self, pool: asyncpg.Pool, entries: Iterable[LedgerEntry] | None = None) -> None:
        """Everything into a database that has the portfolio's row, its positions' assets included."""
        symbols = {entry.symbol for entry in self.entries if entry.symbol}
        async with pool.acquire() as connection, connection.transaction():
            await connection.executemany(
                "INSERT INTO asset (symbol, name, asset_class, sector, industry)"
                " VALUES ($1, $1, 'UNCLASSIFIED', 'UNCLASSIFIED', '') ON CONFLICT DO NOTHING",
                [(symbol,) for symbol in sorted(symbols)],
            )
            await write_entries(connection, self.entries if entries is None else entries)
            await write_portfolios(connection, [self.portfolio])
            await write_positions(connection, {self.portfolio_id: self.portfolio}, {self.portfolio_id: symbols})
            await write_closed(connection, [(self.portfolio_id, one) for one in self.closed])
            shard = await connection.fetchval("SELECT shard FROM portfolio WHERE id = $1", self.portfolio_id)
            for step, applied_at in self.actions:
                await connection.execute(
                    "INSERT INTO corporate_action (action_id, kind, symbol, terms, effective_at, recorded_at,"
                    " content_hash) VALUES ($1, $2, $3, $4, $5, $6, '')",
                    *(step.action_id, "SPLIT" if step.scale else "DIVIDEND", step.symbol, step.terms, step.at),
                    applied_at,
                )
                await connection.execute(
                    "INSERT INTO shard_action (shard, action_id, step, applied_at, late) VALUES ($1, $2, $3, $4, $5)",
                    *(shard, step.action_id, step.kind.value, applied_at, step.at < applied_at),
                )
        for at, quotes in self.recorded:
            await PriceCloses(lambda: pool).write(at, quotes)

    def _book(self, draft: LedgerEntry, prices: tuple[Decimal | None, Decimal | None] | None = None) -> LedgerEntry:
        before, after = prices or (self.price(draft.symbol or ""), self.price(draft.symbol or ""))
        nav = value_portfolio(self.portfolio, self.prices()).nav
        booking = self.portfolio.book(draft, Present(nav, before, after))
        self.entries.append(booking.entry)
        if booking.closed is not None:
            self.closed.append(booking.closed)
        return booking.entry

    def _step(
        self,
        kind: LedgerKind,
        symbol: str,
        at: datetime,
        scale: Fraction | None = None,
        per_share: Decimal | None = None,
    ) -> Step:
        number = next(self._ids)
        step = Step(f"{self.portfolio_id}-a{number}", kind, symbol, at, number, "USD", scale, per_share)
        self.actions.append((step, self.at))
        return step

    def _id(self) -> str:
        return f"{self.portfolio_id}-e{next(self._ids)}"


def lived(name: str, seed: int, steps: int = 220) -> tuple[ScriptedLedger, list[Moment]]:
    """A life of all kinds of entries; moments[k] is after the entry k + 1."""
    chance, script = random.Random(seed), ScriptedLedger(name)
    script.cash("DEPOSIT", "100000")
    moments: dict[int, Moment] = {}
    for symbol in SYMBOLS:
        script.quote(symbol, "100")
    while script.portfolio.ledger_sequence < steps:
        script.wait(timedelta(minutes=7))
        symbol = chance.choice(SYMBOLS)
        match chance.randrange(12):
            case 0:
                script.quote(symbol, str(chance.randint(50, 150)))
            case 1:
                script.cash(chance.choice(["DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST"]), "12.345678")
            case 2:
                late_by = chance.choice([timedelta(), HOUR])
                script.split(symbol, chance.choice([Fraction(2), Fraction(1, 2), Fraction(3, 2)]), late_by)
            case 3:
                script.accrue(symbol, "0.37")
            case 4:
                script.pay()
            case 5:
                script.reverse(chance.choice(script.entries))
            case 6:
                script.fill(symbol, "BUY", "3.001", "98.7", "0.5", scale=Fraction(3, 2))
            case _:
                size = str(chance.choice([1, 2, 5, 10, 20]))
                script.fill(symbol, chance.choice(["BUY", "SELL"]), size, str(chance.randint(80, 120)), "1.25")
        moments[script.portfolio.ledger_sequence] = script.moment()
    return script, [moments[sequence] for sequence in sorted(moments)]
