"""Booking a batch of Kafka records: decode, refuse, tell the redelivered from the new, book in the log's order.

Pure: what the records refer to (entries with their ids, portfolios, known assets) is read by the store and handed
in. An event has its effect once: the same id with the same content is a duplicate and counted, the same id with
other content is a dead letter, as is whatever breaks a rule; the batch goes on behind it.

A fill after which the portfolio's gross value or gross cost, or the position's day base, would leave the exact range
is refused, so that no figure derived from them can wrap.

`nav_before` of an external flow is the NAV at the evaluator's present prices, moved on within the batch by what
each event does to cash and value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Protocol

from engine.amounts import check_amount
from engine.ledger import LedgerEntry
from engine.messages import EventRejected, FillEvent, OpenEvent, PortfolioEvent, content_hash, decode_event
from engine.portfolio import Portfolio, Position
from engine.positions import carried_value


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record of a shard's partition."""

    offset: int
    key: bytes | None
    value: bytes | None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    record: Record
    code: str
    reason: str


@dataclass(slots=True)
class Booked:
    """The outcome of a batch. `portfolios` hold the state after it, with the positions that it touched."""

    entries: list[LedgerEntry] = field(default_factory=list)
    opened: dict[str, OpenEvent] = field(default_factory=dict)
    portfolios: dict[str, Portfolio] = field(default_factory=dict)
    touched: dict[str, set[str]] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    duplicates: int = 0
    unclassified: set[str] = field(default_factory=set)


class Marks(Protocol):
    """What the evaluator knows about present values while it books: NAV per portfolio, price per symbol."""

    def nav(self, portfolio_id: str) -> int: ...

    def price(self, symbol: str) -> Decimal | None: ...

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        """Σ |value| and Σ |cost| of the open positions."""

    def position_day_base(self, portfolio_id: str, symbol: str) -> int: ...


@dataclass(frozen=True, slots=True)
class _Exposure:
    """Σ |value| and Σ |cost| of a portfolio within the batch, and its signed notionals of the batch per symbol.

    `known` says that the evaluator held the portfolio before the batch.
    """

    value: int
    cost: int
    traded: Mapping[str, int]
    known: bool


@dataclass(frozen=True, slots=True)
class Known:
    """What a batch refers to, as the ledger has it: portfolios come with the positions that the batch touches."""

    content_hashes: Mapping[str, bytes]
    portfolios: dict[str, Portfolio]
    shards: Mapping[str, int]
    classified: frozenset[str]


class Batch:
    """Records of one shard's partition, ascending offsets; undecodable ones are dead letters from the start."""

    def __init__(self, shard: int, records: Sequence[Record], marks: Marks, recorded_at: datetime) -> None:
        self._shard = shard
        self._marks = marks
        self._recorded_at = recorded_at
        self._events: list[tuple[Record, PortfolioEvent]] = []
        self._outcome = Booked()
        self._nav: dict[str, int] = {}
        self._exposure: dict[str, _Exposure] = {}
        for record in records:
            try:
                event = decode_event(record.value)
                _check_key(record, event)
                self._events.append((record, event))
            except EventRejected as error:
                self._bury(record, error)

    @property
    def event_ids(self) -> set[str]:
        return {event.event_id for _, event in self._events}

    @property
    def portfolio_ids(self) -> set[str]:
        return {event.portfolio_id for _, event in self._events}

    @property
    def symbols(self) -> set[str]:
        return {event.symbol for _, event in self._events if isinstance(event, FillEvent)}

    def book(self, known: Known) -> Booked:
        self._outcome.portfolios = known.portfolios
        seen = dict(known.content_hashes)
        for record, event in self._events:
            try:
                if self._is_redelivered(event, seen.get(event.event_id)):
                    self._outcome.duplicates += 1
                else:
                    entry = self._book(event, known)
                    seen[event.event_id] = entry.content_hash
            except EventRejected as error:
                self._bury(record, error)
        return self._outcome

    def _is_redelivered(self, event: PortfolioEvent, recorded: bytes | None) -> bool:
        if recorded is not None and recorded != content_hash(event):
            raise EventRejected("EVENT_ID_REUSED", f"event {event.event_id} is recorded with other content")
        return recorded is not None

    def _book(self, event: PortfolioEvent, known: Known) -> LedgerEntry:
        outcome, portfolio_id = self._outcome, event.portfolio_id
        held = self._portfolio(event, known)
        nav_before = self._nav_of(held)
        entry, value_change = self._enter(held, event, nav_before)
        change = entry.amount - entry.fee + value_change
        touched = outcome.touched.setdefault(portfolio_id, set())
        if isinstance(event, FillEvent):
            touched.add(event.symbol)
            if event.symbol not in known.classified:
                outcome.unclassified.add(event.symbol)
        elif isinstance(event, OpenEvent):
            outcome.portfolios[portfolio_id] = held
            outcome.opened[portfolio_id] = event
        self._nav[portfolio_id] = nav_before + change
        outcome.entries.append(entry)
        return entry

    def _enter(self, held: Portfolio, event: PortfolioEvent, nav_before: int) -> tuple[LedgerEntry, int]:
        """Book one event; the entry, and what it does to the value of the positions at present prices."""
        if not isinstance(event, FillEvent):
            return held.book(event, self._recorded_at, nav_before), 0
        symbol, price = event.symbol, self._marks.price(event.symbol)
        before, exposure = held.positions.get(symbol), self._exposure_of(held)
        value_before = _worth(before, price)
        after = exposure

        def admit(entry: LedgerEntry, position: Position | None) -> None:
            nonlocal after
            value = exposure.value + abs(_worth(position, price)) - abs(value_before)
            cost = exposure.cost + _gross_cost(position) - _gross_cost(before)
            traded = exposure.traded.get(symbol, 0) - entry.amount
            check_amount(value, "the portfolio's gross value")
            check_amount(cost, "the portfolio's gross cost")
            day_base = self._marks.position_day_base(held.portfolio_id, symbol) if exposure.known else 0
            check_amount(day_base + traded, "the position's day base")
            after = _Exposure(value, cost, {**exposure.traded, symbol: traded}, exposure.known)

        entry = held.book(event, self._recorded_at, nav_before, admit)
        self._exposure[held.portfolio_id] = after
        return entry, _worth(held.positions.get(symbol), price) - value_before

    def _exposure_of(self, held: Portfolio) -> _Exposure:
        known = self._exposure.get(held.portfolio_id)
        if known is None:
            opened_here = held.portfolio_id in self._outcome.opened
            value, cost = (0, 0) if opened_here else self._marks.exposure(held.portfolio_id)
            known = _Exposure(value, cost, {}, not opened_here)
        return known

    def _portfolio(self, event: PortfolioEvent, known: Known) -> Portfolio:
        if known.shards.get(event.portfolio_id, self._shard) != self._shard:
            raise EventRejected("WRONG_PARTITION", f"portfolio {event.portfolio_id} lives in another partition")
        held = self._outcome.portfolios.get(event.portfolio_id)
        if held is not None:
            return held
        if isinstance(event, OpenEvent):
            return Portfolio(event.portfolio_id, event.base_currency)
        raise EventRejected("UNKNOWN_PORTFOLIO", f"portfolio {event.portfolio_id} is not open")

    def _nav_of(self, held: Portfolio) -> int:
        if held.portfolio_id not in self._nav:
            nav = self._marks.nav(held.portfolio_id) if held.ledger_sequence else 0
            self._nav[held.portfolio_id] = nav
        return self._nav[held.portfolio_id]

    def _bury(self, record: Record, error: EventRejected) -> None:
        self._outcome.dead_letters.append(DeadLetter(record, error.code, str(error)))


def _check_key(record: Record, event: PortfolioEvent) -> None:
    """The key decides the partition, so an event under another key would meet its portfolio in the wrong one."""
    if record.key != event.portfolio_id.encode():
        raise EventRejected("WRONG_KEY", "the record's key is not the event's portfolio_id")


def _worth(held: Position | None, price: Decimal | None) -> int:
    """What the position will count for in the Book."""
    return carried_value(held.quantity, held.cost, price) if held else 0


def _gross_cost(held: Position | None) -> int:
    return abs(held.cost) if held else 0
