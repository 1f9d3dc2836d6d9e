"""What allocation and badges add to a fill: CPU time of an evaluator at 15 positions, for few and for many portfolios.

Batches of 500 fills in as many portfolios of the seed load, and batches of one fill each. Timed is what an evaluator
does for sectors and badges and for nothing else: following the entries of a batch (engine.badge_book), taking in what
it proved, and the sector allocation that goes to hot state. The quotes' part is timed beside it: comparing the NAVs of
a flush's rows with what the next badge asks for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal

import numpy as np

from benchmarks.report import Figure, Report
from benchmarks.seed_load import OPENED_AT, Load, make_book, make_load
from engine.badge_book import BadgeBook
from engine.badges import BadgeState, load_rules
from engine.book import Book
from engine.booking import Booked
from engine.entries import draft_event
from engine.messages import FillEvent
from engine.portfolio import Booking, Portfolio, Position, Present
from engine.posting import allocation

FEW, MANY = 1_000, 20_000
BATCH_COUNT = 500
ROUNDS = 15
MICROSECONDS_MAX = 100
RATIO_MAX = 1.3

Followed = tuple[Portfolio, Booking, Decimal | None]


def run() -> None:
    report = Report("badges")
    few, many = _Evaluator(FEW), _Evaluator(MANY)
    # Turn and turn about, so that what else the machine does falls on both.
    batches = [(few.batch(BATCH_COUNT), many.batch(BATCH_COUNT)) for _ in range(ROUNDS)]
    singles = [(few.batch(1), many.batch(1)) for _ in range(ROUNDS * 20)]
    of_few, of_many = (float(np.median([round[at] for round in batches])) for at in (0, 1))
    single_few, single_many = (float(np.median([round[at] for round in singles])) for at in (0, 1))
    report.add(
        Figure(f"per fill, {FEW:,} portfolios, batches of {BATCH_COUNT}", of_few, "µs", at_most=MICROSECONDS_MAX)
    )
    report.add(
        Figure(f"per fill, {MANY:,} portfolios, batches of {BATCH_COUNT}", of_many, "µs", at_most=MICROSECONDS_MAX)
    )
    report.add(Figure("20,000 portfolios against 1,000", of_many / of_few, "×", at_most=RATIO_MAX))
    report.add(Figure(f"per fill, {FEW:,} portfolios, alone in its batch", single_few, "µs"))
    report.add(Figure(f"per fill, {MANY:,} portfolios, alone in its batch", single_many, "µs"))
    report.add(Figure("per fill that proves two badges", _Evaluator(FEW, ()).batch(BATCH_COUNT), "µs"))
    rows = float(np.median([many.flush() for _ in range(ROUNDS)]))
    report.add(Figure(f"per flushed row, {MANY:,} rows", rows, "µs"))
    report.finish()


class _Evaluator:
    """As far as sectors and badges go. Everybody has their first fill and is diversified, or nobody is anything."""

    def __init__(self, portfolios_count: int, met: Sequence[str] = ("first_fill", "diversified")) -> None:
        self._load: Load = make_load(portfolios_count)
        self._book: Book = make_book(self._load)
        self._sectors = {self._load.symbol(n): f"Sector {n % 11}" for n in range(len(self._load.prices))}
        self._badges = BadgeBook(load_rules())
        for number in range(portfolios_count):
            name = self._load.portfolio_id(number)
            states = dict.fromkeys(met, BadgeState(True, 1))
            self._badges.open(name, number % 4, self._book.slot(name), states, OPENED_AT)
        self._random = np.random.default_rng(1)
        self._count = 0

    def batch(self, count: int) -> float:
        """µs per fill of one batch."""
        numbers = self._random.choice(len(self._load.held), count, replace=False).tolist()
        followed = [self._fill(number) for number in numbers]
        booked = Booked()
        begun_ns = time.process_time_ns()
        turn = self._badges.turn(0, self._book, self._sectors.__getitem__)
        for held, booking, price in followed:
            turn.booked(held, booking, price)
        self._badges.accept_turn(turn, booked, self._book)
        for held, _, _ in followed:
            allocation(self._book, held.portfolio_id, self._sectors.__getitem__)
        return (time.process_time_ns() - begun_ns) / 1_000 / count

    def flush(self) -> float:
        """µs per row of a flush of everything, none of which has reached anything."""
        slots = np.arange(len(self._load.held))
        self._book.cash[slots] = -self._book.positions_value[slots]
        begun_ns = time.process_time_ns()
        self._badges.rich(slots, self._book, OPENED_AT)
        return (time.process_time_ns() - begun_ns) / 1_000 / len(slots)

    def _fill(self, number: int) -> Followed:
        """A fill of one of its positions, booked: 10 more of it."""
        load, place = self._load, self._count % 15
        self._count += 1
        name, asset = load.portfolio_id(number), int(load.held[number][place])
        symbol, price = load.symbol(asset), load.prices[asset]
        quantity = Decimal(int(load.quantities[number][place]))
        held = Portfolio(name, "USD", ledger_sequence=self._count, fills=self._count % 90)
        held.positions[symbol] = Position(quantity, 10**6, 0, 0, OPENED_AT, 1, OPENED_AT)
        event = FillEvent(
            event_id=f"e-{self._count}",
            portfolio_id=name,
            symbol=symbol,
            side="BUY",
            quantity="10",
            price=str(price),
            currency="USD",
            executed_at=OPENED_AT,
        )
        draft = draft_event(event, OPENED_AT + timedelta(seconds=self._count))
        return held, held.book(draft, Present(0, price, price)), price
