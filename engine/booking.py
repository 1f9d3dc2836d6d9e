"""Booking: from Kafka records, or a step of a corporate action, to ledger entries, in the log's order.

Pure: what the records refer to (entries with their ids, portfolios, known assets) is read by the store and handed
in. An event has its effect once: the same id with the same content is a duplicate and counted, the same id with
other content is a dead letter, as is whatever breaks a rule; the batch goes on behind it.

A fill after which the portfolio's gross value or gross cost, or the position's day base, would leave the exact range
is refused, so that no figure derived from them can wrap.

`nav_before` of an external flow and every `nav_effect` are at the evaluator's present prices; NAV is moved on within
the batch by what each entry does to it.

Shares. A fill executed before a split that the ledger has already is booked in today's shares (`scale`); so is the
reversal of a fill that was booked before a split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Protocol

from engine.amounts import AmountError, check_amount, scale_number
from engine.corporate_actions import Split, Step
from engine.entries import draft_accrual, draft_event, draft_payment, draft_reversal, draft_split
from engine.ledger import CORPORATE, LedgerEntry, LedgerKind
from engine.messages import (
    EventRejected,
    FillEvent,
    OpenEvent,
    PortfolioEvent,
    ReversalEvent,
    content_hash,
    decode_event,
)
from engine.portfolio import Booking, ClosedPosition, Move, Portfolio, Position, Present

EVENTS_PER_STEP = 25  # some 2 ms, during which nobody else has a turn


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
    closed: list[tuple[str, ClosedPosition]] = field(default_factory=list)
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


class Watch(Protocol):
    """Whoever follows a batch entry by entry, in the transaction that books it."""

    def booked(self, held: Portfolio, booking: Booking, price: Decimal | None) -> None:
        """`held` is the portfolio right after the entry, `price` that of the entry's symbol."""


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
class AppliedSplit:
    """A split that a shard's ledger has, and since when."""

    split: Split
    applied_at: datetime


@dataclass(frozen=True, slots=True)
class Known:
    """What a batch refers to, as the ledger has it: portfolios come with the positions that the batch touches.

    `originals` are the entries that its reversals name, `reversed_ids` those of them that are reversed already,
    `splits` those that the shard has, by symbol.
    """

    content_hashes: Mapping[str, bytes]
    portfolios: dict[str, Portfolio]
    shards: Mapping[str, int]
    classified: frozenset[str]
    originals: Mapping[str, LedgerEntry] = field(default_factory=dict)
    reversed_ids: frozenset[str] = frozenset()
    splits: Mapping[str, Sequence[AppliedSplit]] = field(default_factory=dict)


class Batch:
    """Records of one shard's partition, ascending offsets; undecodable ones are dead letters from the start."""

    def __init__(
        self,
        shard: int,
        records: Sequence[Record],
        marks: Marks,
        recorded_at: datetime,
        watch: Watch | None = None,
    ) -> None:
        self._shard = shard
        self._marks = marks
        self._watch = watch
        self._recorded_at = recorded_at
        self._events: list[tuple[Record, PortfolioEvent]] = []
        self._outcome = Booked()
        self._nav: dict[str, int] = {}
        self._exposure: dict[str, _Exposure] = {}
        self._booked: dict[str, LedgerEntry] = {}
        self._reversed: set[str] = set()
        self._offsets: dict[str, int] = {}
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
    def reverses(self) -> set[str]:
        """The events that the batch's reversals name."""
        return {event.reverses for _, event in self._events if isinstance(event, ReversalEvent)}

    def positions(self, originals: Mapping[str, LedgerEntry]) -> set[tuple[str, str]]:
        """Portfolio and symbol of the positions that the batch touches; `originals` are what it reverses, by event."""
        touched = {(event.portfolio_id, event.symbol) for _, event in self._events if isinstance(event, FillEvent)}
        for _, event in self._events:
            original = originals.get(event.reverses) if isinstance(event, ReversalEvent) else None
            if original is not None and original.symbol is not None:
                touched.add((event.portfolio_id, original.symbol))
        return touched

    def book(self, known: Known) -> Booked:
        """Book it all without a pause."""
        for _ in self.steps(known):
            pass
        return self.outcome

    @property
    def outcome(self) -> Booked:
        """What the steps came to, in the log's order."""
        outcome, offsets = self._outcome, self._offsets
        outcome.entries.sort(key=lambda entry: offsets[entry.event_id])
        outcome.dead_letters.sort(key=lambda letter: letter.record.offset)
        return outcome

    def steps(self, known: Known) -> Iterator[None]:
        """Book one portfolio after the other, pausing between two of them after EVENTS_PER_STEP events or more.

        Present values may change in a pause: all of a portfolio is booked at those of one moment.
        """
        self._outcome.portfolios = known.portfolios
        seen, since_pause = dict(known.content_hashes), 0
        for events in self._independent():
            if since_pause >= EVENTS_PER_STEP:
                yield
                since_pause = 0
            since_pause += len(events)
            for record, event in events:
                self._book_or_bury(record, event, known, seen)

    def _independent(self) -> Iterable[list[tuple[Record, PortfolioEvent]]]:
        """The events by portfolio; all together where portfolios have an id in common, of which the first counts."""
        groups: dict[str, list[tuple[Record, PortfolioEvent]]] = {}
        for record, event in self._events:
            groups.setdefault(event.portfolio_id, []).append((record, event))
        ids_count = sum(len({event.event_id for _, event in events}) for events in groups.values())
        return groups.values() if ids_count == len(self.event_ids) else [self._events]

    def _book_or_bury(self, record: Record, event: PortfolioEvent, known: Known, seen: dict[str, bytes]) -> None:
        try:
            if self._is_redelivered(event, seen.get(event.event_id)):
                self._outcome.duplicates += 1
            else:
                entry = self._book(event, known)
                seen[event.event_id], self._offsets[event.event_id] = entry.content_hash, record.offset
        except AmountError as error:
            self._bury(record, EventRejected(error.code, str(error)))
        except EventRejected as error:
            self._bury(record, error)

    def _is_redelivered(self, event: PortfolioEvent, recorded: bytes | None) -> bool:
        if recorded is not None and recorded != content_hash(event):
            raise EventRejected("EVENT_ID_REUSED", f"event {event.event_id} is recorded with other content")
        return recorded is not None

    def _book(self, event: PortfolioEvent, known: Known) -> LedgerEntry:
        outcome, portfolio_id = self._outcome, event.portfolio_id
        held = self._portfolio(event, known)
        held.check_event(event)
        nav_before = self._nav_of(held)
        booking = self._enter(held, self._draft(event, known), nav_before)
        entry = booking.entry
        touched = outcome.touched.setdefault(portfolio_id, set())
        if entry.symbol is not None:
            touched.add(entry.symbol)
            if entry.symbol not in known.classified:
                outcome.unclassified.add(entry.symbol)
        elif isinstance(event, OpenEvent):
            outcome.portfolios[portfolio_id] = held
            outcome.opened[portfolio_id] = event
        if booking.closed is not None:
            outcome.closed.append((portfolio_id, booking.closed))
        self._nav[portfolio_id] = nav_before + entry.nav_effect
        self._booked[entry.event_id] = entry
        if entry.reverses is not None:
            self._reversed.add(entry.reverses)
        outcome.entries.append(entry)
        if self._watch is not None:
            self._watch.booked(held, booking, None if entry.symbol is None else self._marks.price(entry.symbol))
        return entry

    def _draft(self, event: PortfolioEvent, known: Known) -> LedgerEntry:
        if not isinstance(event, ReversalEvent):
            scale = None
            if isinstance(event, FillEvent):
                scale = _scale(known.splits.get(event.symbol, ()), event.executed_at)
            return draft_event(event, self._recorded_at, scale)
        original = self._booked.get(event.reverses) or known.originals.get(event.reverses)
        if original is None or original.portfolio_id != event.portfolio_id:
            raise EventRejected("UNKNOWN_EVENT", f"there is no event {event.reverses} in this portfolio")
        if event.reverses in self._reversed or event.reverses in known.reversed_ids:
            raise EventRejected("ALREADY_REVERSED", f"event {event.reverses} is reversed already")
        if original.kind in CORPORATE or original.kind is LedgerKind.OPEN or original.reverses is not None:
            raise EventRejected("NOT_REVERSIBLE", f"a reversal and a {original.kind} can not be reversed")
        scale = None
        if original.symbol is not None:
            # The splits after it multiplied it, whether they were booked before it or after.
            scale = _scale(known.splits.get(original.symbol, ()), original.effective_at)
        return draft_reversal(event, original, self._recorded_at, scale)

    def _enter(self, held: Portfolio, draft: LedgerEntry, nav_before: int) -> Booking:
        """Book one draft at present prices."""
        symbol = draft.symbol
        if symbol is None:
            return held.book(draft, Present(nav_before))
        price = self._marks.price(symbol)
        exposure = after = self._exposure_of(held)

        def admit(entry: LedgerEntry, move: Move) -> None:
            nonlocal after
            value = exposure.value + abs(move.worth_after) - abs(move.worth_before)
            cost = exposure.cost + _gross_cost(move.after) - _gross_cost(move.before)
            traded = exposure.traded.get(symbol, 0) - entry.amount
            check_amount(value, "the portfolio's gross value")
            check_amount(cost, "the portfolio's gross cost")
            day_base = self._marks.position_day_base(held.portfolio_id, symbol) if exposure.known else 0
            check_amount(day_base + traded, "the position's day base")
            after = _Exposure(value, cost, {**exposure.traded, symbol: traded}, exposure.known)

        booking = held.book(draft, Present(nav_before, price, price), admit)
        self._exposure[held.portfolio_id] = after
        return booking

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


def _gross_cost(held: Position | None) -> int:
    return abs(held.cost) if held else 0


def _scale(splits: Iterable[AppliedSplit], at: datetime) -> Fraction | None:
    """What turns shares of `at` into today's, by the splits that took effect after it; None where nothing does."""
    scale = Fraction(1)
    for applied in splits:
        if applied.split.effective_at > at:
            scale *= applied.split.scale
    return None if scale == 1 else scale


@dataclass(frozen=True, slots=True)
class Holder:
    """Who a step concerns: the portfolio with its position in the symbol, and the shares bought (+) or sold (−) by
    fills at or after the step's instant that are booked already, both in today's shares. `scale` turns shares of that
    instant into today's, by splits that were booked before this step. For a payment: what is owed (micro-units)."""

    portfolio: Portfolio
    since: Decimal = Decimal(0)
    scale: Fraction = Fraction(1)
    owed: int = 0


@dataclass(frozen=True, slots=True)
class StepPrices:
    """The price of a step's symbol just before and just after it; None where there is none."""

    before: Decimal | None
    after: Decimal | None


@dataclass(frozen=True, slots=True)
class DueStep:
    """A step with what is known about it: `content` is the action's hash, `late` that it arrived after its instant."""

    step: Step
    prices: StepPrices
    late: bool
    content: bytes


def book_step(
    outcome: Booked, due: DueStep, holders: Iterable[Holder], recorded_at: datetime, watch: Watch | None = None
) -> list[LedgerEntry]:
    """Book one step for its holders; returns its entries, which `outcome` has too.

    A holder whose figures would leave the exact range is passed over and named in `dead_letters`, without a record.
    """
    step, entries = due.step, []
    for holder in holders:
        held = holder.portfolio
        try:
            draft = _draft_step(due, holder, recorded_at)
            if draft is None:
                continue
            booking = held.book(draft, Present(0, due.prices.before, due.prices.after))
        except AmountError as error:
            reason = f"{step.action_id}: portfolio {held.portfolio_id}: {error}"
            outcome.dead_letters.append(DeadLetter(Record(-1, None, None), error.code, reason))
            continue
        outcome.portfolios[held.portfolio_id] = held
        touched = outcome.touched.setdefault(held.portfolio_id, set())
        if step.kind is LedgerKind.SPLIT:
            touched.add(step.symbol)
        if booking.closed is not None:
            outcome.closed.append((held.portfolio_id, booking.closed))
        if watch is not None:
            watch.booked(held, booking, due.prices.after)
        entries.append(booking.entry)
    outcome.entries += entries
    return entries


def _draft_step(due: DueStep, holder: Holder, recorded_at: datetime) -> LedgerEntry | None:
    """None when the step does not concern the holder."""
    step, late, content = due.step, due.late, due.content
    name = holder.portfolio.portfolio_id
    if step.kind is LedgerKind.DIVIDEND_PAID:
        return draft_payment(step, name, holder.owed, recorded_at, late, content)
    position = holder.portfolio.positions.get(step.symbol)
    held = (position.quantity if position else Decimal(0)) - holder.since
    if not held:
        return None
    if step.scale is None:
        if step.currency != holder.portfolio.base_currency:
            return None
        # A dividend is per share of its ex-date.
        then = scale_number(held, 1 / holder.scale, "quantity")
        return draft_accrual(step, name, then, recorded_at, late, content) if then else None
    change = scale_number(held, step.scale, "quantity") - held
    return draft_split(step, name, change, recorded_at, late, content) if change else None
