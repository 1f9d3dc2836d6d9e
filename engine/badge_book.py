"""What an evaluator keeps in memory of its portfolios' badges, so that nothing is scanned to find the next one.

    with every entry that moves a position    fills, streak and sectors right after it, at present prices (BadgeTurn)
    by due date                               one instant per portfolio, at which a position may be old enough
    at flush                                  per slot the NAV that the next rule asks for, against the changed rows
    after a reclassification                  the sectors of those who hold the asset

What is found is a Proof. It counts from the commit of the transaction that writes it: `accept` takes it in, nothing
else changes what is known, and all of it is read again with the shard. A due date that was found is not
found again before it was accepted or given back; a NAV not before it was accepted, or reaches what a further rule asks
for.

HELD goes by the book time: a position is held from `held_since` (engine.portfolio) to the instant at which the entry
that ended its cycle was booked. A due date is that of the oldest position when it was last looked at; when that one is
gone the date of the one that is the oldest then takes its place, so each portfolio has one date, whatever it trades.

Sectors are those of the batch's own positions at the Book's prices, kept up to date from entry to entry. A cost stands
for the value of a position that has no price. Pure, and not thread-safe.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from engine.amounts import from_micro, plain, ratio, to_micro
from engine.badges import (
    BOOKED,
    EVIDENCE_PRICES_MAX,
    EVIDENCE_SECTORS_MAX,
    BadgeState,
    Evidence,
    Facts,
    Predicate,
    Proof,
    Rule,
    SectorEvidence,
    States,
    Transition,
    current_rules,
    transitions,
)
from engine.book import NAV_MAX_MICRO, Book
from engine.booking import Booked
from engine.ledger import LedgerKind
from engine.marks import MarkQuality
from engine.portfolio import Booking, Portfolio, Position
from engine.positions import carried_value
from engine.posting import SectorOf
from engine.sectors import SectorValue, sum_up

Int64s = NDArray[np.int64]

# A NAV that is never reached: of a slot whose portfolio has all NAV badges, or whose proof is under way.
OUT_OF_REACH = np.iinfo(np.int64).max
_NOTHING = SectorValue(0, 0)


@dataclass(frozen=True, slots=True)
class OldestPosition:
    """The open position that a portfolio has held for longest, read in the transaction that proves with it."""

    portfolio_id: str
    symbol: str
    opened_at: datetime
    held_since: datetime
    ledger_sequence: int


@dataclass(slots=True)
class _Known:
    """One portfolio: the states of the rules that it has met, and when it is looked at next (None: never)."""

    shard: int
    slot: int
    states: dict[str, BadgeState]
    due_at: datetime | None = None


class BadgeBook:
    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._known: dict[str, _Known] = {}
        # Due dates of each shard's portfolios, a heap; one that its portfolio does not have any more is passed over.
        self._dues: dict[int, list[tuple[datetime, str]]] = {}
        self._nav_bound: Int64s = np.full(64, OUT_OF_REACH, np.int64)
        self.set_rules(rules)

    def set_rules(self, rules: Iterable[Rule]) -> None:
        """Before anything is opened: the rules (all versions) to go by."""
        self.rules = current_rules(rules)
        # A cycle that ends may have been held long enough without having been looked at.
        self.booked_rules = [rule for rule in self.rules if rule.predicate in BOOKED | {Predicate.HELD}]
        self._held_rules = [rule for rule in self.rules if rule.predicate is Predicate.HELD]
        self._sector_rules = [rule for rule in self.rules if rule.predicate is Predicate.SECTORS]
        self._nav_rules = [
            (rule, min(to_micro(rule.threshold), NAV_MAX_MICRO))
            for rule in self.rules
            if rule.predicate is Predicate.NAV
        ]

    def __contains__(self, portfolio_id: str) -> bool:
        return portfolio_id in self._known

    def states(self, portfolio_id: str) -> States:
        """What the portfolio has met, by badge id; nothing of one that is not here."""
        known = self._known.get(portfolio_id)
        return {} if known is None else known.states

    # -- portfolios ------------------------------------------------------------------------------------------

    def open(
        self, portfolio_id: str, shard: int, slot: int, states: States | None = None, oldest: datetime | None = None
    ) -> None:
        """Take a portfolio in, whose oldest open position is held since `oldest`."""
        known = self._known[portfolio_id] = _Known(shard, slot, dict(states or {}))
        if slot >= len(self._nav_bound):
            grown = np.full(max(slot + 1, 2 * len(self._nav_bound)), OUT_OF_REACH, np.int64)
            grown[: len(self._nav_bound)] = self._nav_bound
            self._nav_bound = grown
        self._nav_bound[slot] = self._next_nav(known)
        if oldest is not None:
            self._schedule(portfolio_id, known, oldest)

    def drop_shard(self, shard: int) -> None:
        """Forget all portfolios of a shard."""
        self._dues.pop(shard, None)
        for name in [name for name, known in self._known.items() if known.shard == shard]:
            self._nav_bound[self._known.pop(name).slot] = OUT_OF_REACH

    def accept(self, proofs: Iterable[Proof]) -> None:
        """These are committed."""
        for proof in proofs:
            known = self._known.get(proof.portfolio_id)
            if known is not None:
                known.states[proof.transition.rule.badge_id] = proof.transition.state
                if proof.transition.rule.predicate is Predicate.NAV:
                    self._nav_bound[known.slot] = self._next_nav(known)

    def accept_turn(self, turn: BadgeTurn, booked: Booked, book: Book) -> None:
        """A batch is committed, and the Book has it."""
        for portfolio_id in booked.opened:
            self.open(portfolio_id, turn.shard, book.slot(portfolio_id))
        self.accept(turn.proofs)
        for portfolio_id, held_since in turn.held_since.items():
            known = self._known.get(portfolio_id)
            if known is not None:
                self._schedule(portfolio_id, known, held_since)

    # -- with every entry ------------------------------------------------------------------------------------

    def turn(self, shard: int, book: Book, sector_of: SectorOf) -> BadgeTurn:
        """To follow one batch of a shard entry by entry, without waiting in between."""
        return BadgeTurn(self, shard, book, sector_of)

    def reclassified(self, portfolio_id: str, book: Book, sector_of: SectorOf, at: datetime) -> list[Proof]:
        """What the sectors of a portfolio prove as they are now, without an entry."""
        known = self._known.get(portfolio_id)
        if known is None:
            return []
        held = _Sectors.of(book, portfolio_id, sector_of)
        found = transitions(self._sector_rules, known.states, Facts(sectors=held.sums), at)
        sequence = int(book.ledger_sequence[known.slot])
        return [Proof(portfolio_id, one, held.evidence(one, book, {}, None, sequence)) for one in found]

    # -- at flush --------------------------------------------------------------------------------------------

    def rich(self, slots: Int64s, book: Book, at: datetime) -> list[Proof]:
        """Proofs for all of the slots whose NAV has reached what a rule asks for: it may be less again a moment later,
        and each portfolio comes here once for each rule."""
        if not self._nav_rules or not len(slots):
            return []
        nav = book.cash[slots] + book.receivables[slots] + book.positions_value[slots]
        unpriced = book.quality_count[MarkQuality.MISSING][slots] > 0
        # A portfolio that was taken in by the Book and not here yet has no bound to reach.
        bounds = np.full(len(slots), OUT_OF_REACH, np.int64)
        known_here = slots < len(self._nav_bound)
        bounds[known_here] = self._nav_bound[slots[known_here]]
        reached = slots[(nav >= bounds) & ~unpriced]
        proofs: list[Proof] = []
        prices: dict[str, str | None] = {}
        for portfolio_id in book.portfolio_ids(reached):
            known = self._known[portfolio_id]
            proofs += self._rich(portfolio_id, known, book, at, prices)
        return proofs

    def _rich(
        self, portfolio_id: str, known: _Known, book: Book, at: datetime, prices: dict[str, str | None]
    ) -> list[Proof]:
        """`prices`: as text, as far as others needed them."""
        nav, sequence = book.nav(portfolio_id), int(book.ledger_sequence[known.slot])
        self._nav_bound[known.slot] = self._next_nav(known, nav)
        found = transitions([rule for rule, _ in self._nav_rules], known.states, Facts(nav=nav), at)
        if not found:
            return []
        symbols = [symbol for symbol, _ in book.values(portfolio_id)]
        for symbol in symbols:
            if symbol not in prices:
                prices[symbol] = _text(book.price(symbol))
        held = _bounded({symbol: prices[symbol] for symbol in symbols})
        return [
            Proof(portfolio_id, one, _evidence(one, ledger_sequence=sequence, nav=plain(from_micro(nav)), prices=held))
            for one in found
        ]

    def _next_nav(self, known: _Known, above: int = -OUT_OF_REACH) -> int:
        """The least NAV that proves anything; `above` the one whose proofs are under way."""
        return min(
            (bound for rule, bound in self._nav_rules if bound > above and rule.badge_id not in known.states),
            default=OUT_OF_REACH,
        )

    # -- by due date -----------------------------------------------------------------------------------------

    def next_due(self, shard: int) -> datetime | None:
        """When the next portfolio of a shard is to be looked at; never after it is."""
        heap = self._dues.get(shard)
        return heap[0][0] if heap else None

    def take_due(self, shard: int, at: datetime, count_max: int) -> list[str]:
        """The portfolios that are to be looked at by `at`: each is `looked_at` next, or given back."""
        heap, found = self._dues.get(shard, []), list[str]()
        while heap and heap[0][0] <= at and len(found) < count_max:
            due_at, portfolio_id = heapq.heappop(heap)
            known = self._known.get(portfolio_id)
            if known is not None and known.due_at == due_at:
                known.due_at = None
                found.append(portfolio_id)
        return found

    def held_long(self, oldest: OldestPosition, at: datetime) -> list[Proof]:
        """What the portfolio's oldest open position proves."""
        states = self.states(oldest.portfolio_id)
        found = transitions(self._held_rules, states, Facts(held_since=oldest.held_since), at)
        return [
            Proof(
                oldest.portfolio_id,
                one,
                _evidence(
                    one,
                    ledger_sequence=oldest.ledger_sequence,
                    symbol=oldest.symbol,
                    opened_at=oldest.opened_at,
                    since=oldest.held_since,
                ),
            )
            for one in found
        ]

    def looked_at(self, oldest: OldestPosition) -> None:
        """What the position proves is accepted: look again when it, or it for another rule, may be old enough."""
        known = self._known.get(oldest.portfolio_id)
        if known is not None:
            self._schedule(oldest.portfolio_id, known, oldest.held_since)

    def give_back(self, portfolio_ids: Iterable[str], at: datetime) -> None:
        """They could not be looked at: they stay due at `at`."""
        for portfolio_id in portfolio_ids:
            known = self._known.get(portfolio_id)
            if known is not None:
                self._set_due(portfolio_id, known, at)

    def _schedule(self, portfolio_id: str, known: _Known, held_since: datetime) -> None:
        windows = [rule.window_days for rule in self._held_rules if rule.badge_id not in known.states]
        if windows:
            self._set_due(portfolio_id, known, held_since + timedelta(days=min(windows)))

    def _set_due(self, portfolio_id: str, known: _Known, due_at: datetime) -> None:
        if known.due_at is not None and known.due_at <= due_at:
            return
        known.due_at = due_at
        heap = self._dues.setdefault(known.shard, [])
        heapq.heappush(heap, (due_at, portfolio_id))
        # Dates that came nearer leave their old ones behind: at most as many as there are portfolios.
        if len(heap) > 2 * len(self._known) + 64:
            current = {(of.due_at, name) for name, of in self._known.items() if of.shard == known.shard and of.due_at}
            heap[:] = [entry for entry in heap if entry in current]
            heapq.heapify(heap)


class BadgeTurn:
    """One batch, or one transaction of a corporate action's steps, of a shard. `proofs` are what it proves so far,
    `held_since` of the oldest of the positions that it opened, per portfolio in which it opened any."""

    def __init__(self, badges: BadgeBook, shard: int, book: Book, sector_of: SectorOf) -> None:
        self.shard = shard
        self.proofs: list[Proof] = []
        self.held_since: dict[str, datetime] = {}
        self._badges = badges
        self._book = book
        self._sector_of = sector_of
        self._sectors: dict[str, _Sectors] = {}
        self._states: dict[str, dict[str, BadgeState]] = {}
        # Prices as the batch's splits left them; the Book learns of them afterwards.
        self._prices: dict[str, Decimal | None] = {}

    def booked(self, held: Portfolio, booking: Booking, price: Decimal | None) -> None:
        """See engine.booking.Watch."""
        entry, name = booking.entry, held.portfolio_id
        if entry.kind not in (LedgerKind.FILL, LedgerKind.SPLIT) or entry.symbol is None:
            return
        if entry.kind is LedgerKind.SPLIT:
            self._prices[entry.symbol] = price
        position = held.positions.get(entry.symbol)
        sectors = self._sectors.get(name)
        if sectors is None:
            sectors = self._sectors[name] = _Sectors.of(self._book, name, self._sector_of)
        sectors.move(entry.symbol, position, price)
        if position is not None and position.opened_sequence == entry.sequence:
            self.held_since[name] = min(self.held_since.get(name, position.held_since), position.held_since)
        ended = booking.before if booking.closed is not None else None
        facts = Facts(
            fills=held.fills,
            streak=held.streak,
            sectors=sectors.sums,
            held_since=None if ended is None else ended.held_since,
        )
        states = self._states.get(name) or self._badges.states(name)
        found = transitions(self._badges.booked_rules, states, facts, entry.recorded_at)
        if found:
            self._states[name] = {**states, **{one.rule.badge_id: one.state for one in found}}
            self.proofs += [Proof(name, one, self._evidence(one, booking, sectors)) for one in found]

    def _evidence(self, one: Transition, booking: Booking, sectors: _Sectors) -> Evidence:
        entry, ended = booking.entry, booking.before
        if one.rule.predicate is Predicate.SECTORS:
            return sectors.evidence(one, self._book, self._prices, entry.event_id, entry.sequence)
        of = {"event_id": entry.event_id, "ledger_sequence": entry.sequence}
        if one.rule.predicate is Predicate.HELD and ended is not None:
            return _evidence(one, **of, symbol=entry.symbol, opened_at=ended.opened_at, since=ended.held_since)
        return _evidence(one, **of)


@dataclass(slots=True)
class _Sectors:
    """The values of one portfolio's open positions, and their sums by sector."""

    sector_of: SectorOf
    values: dict[str, int] = field(default_factory=dict)
    sums: dict[str, SectorValue] = field(default_factory=dict)

    @classmethod
    def of(cls, book: Book, portfolio_id: str, sector_of: SectorOf) -> _Sectors:
        """As the Book has them; nothing of a portfolio that is new."""
        sectors = cls(sector_of)
        if portfolio_id in book:
            sectors.values = dict(book.values(portfolio_id))
            sectors.sums = sum_up((sector_of(symbol), value) for symbol, value in sectors.values.items())
        return sectors

    def move(self, symbol: str, position: Position | None, price: Decimal | None) -> None:
        before = self.values.pop(symbol, 0)
        after = 0
        if position is not None:
            after = self.values[symbol] = carried_value(position.quantity, position.cost, price)
        self._add(symbol, after - before, abs(after) - abs(before))

    def _add(self, symbol: str, value: int, gross: int) -> None:
        sector = self.sector_of(symbol)
        held = self.sums.get(sector, _NOTHING)
        self.sums[sector] = SectorValue(held.value + value, held.gross + gross)

    def evidence(
        self,
        one: Transition,
        book: Book,
        prices: Mapping[str, Decimal | None],
        event_id: str | None,
        ledger_sequence: int,
    ) -> Evidence:
        """With all sectors, and the prices that their values were made with."""
        return _evidence(
            one,
            event_id=event_id,
            ledger_sequence=ledger_sequence,
            sectors=sector_evidence(self.sums),
            prices=_bounded(
                {
                    symbol: _text(prices[symbol] if symbol in prices else book.price(symbol))
                    for symbol in sorted(self.values)
                }
            ),
        )


def _bounded(prices: dict[str, str | None]) -> dict[str, str | None] | None:
    return prices if len(prices) <= EVIDENCE_PRICES_MAX else None


def sector_evidence(sums: Mapping[str, SectorValue]) -> list[SectorEvidence]:
    """Sectors that are worth anything, largest first."""
    whole = sum(held.gross for held in sums.values())
    return [
        SectorEvidence(
            sector=sector,
            value=plain(from_micro(held.value)),
            gross=plain(from_micro(held.gross)),
            weight=plain(ratio(held.gross, whole) or Decimal(0)),
        )
        for sector, held in sorted(sums.items(), key=lambda item: (-item[1].gross, item[0]))[:EVIDENCE_SECTORS_MAX]
        if held.gross
    ]


def _evidence(one: Transition, **of: object) -> Evidence:
    rule = one.rule
    return Evidence(
        figure=plain(one.figure),
        threshold=plain(rule.threshold),
        predicate=rule.predicate,
        **of,  # type: ignore[arg-type]
    )


def _text(price: Decimal | None) -> str | None:
    return None if price is None else plain(price)


def proofs_of(
    rules: Sequence[Rule], states: States, portfolio_id: str, facts: Facts, at: datetime, **of: object
) -> list[Proof]:
    """What facts that were gathered elsewhere prove; `of` are the evidence's own fields."""
    return [Proof(portfolio_id, one, _evidence(one, **of)) for one in transitions(rules, states, facts, at)]
