"""Awards derived again: what a portfolio's ledger says about the badges that it was given, and those that it was not.

A `ProofCheck` folds the ledger entry by entry, as the evaluator did, and looks at each badge event when the fold has
reached the entry that its evidence names:

    FILLS, STREAK   the fold counts the figure at that entry, and the entry is the event's
    HELD            the position was opened at `opened_at` and held from `since` on, or ended with the entry, and is old
                    enough at `at`
    SECTORS         the positions at the evidence's prices (null: at cost), by the classification in force at `at`, give
                    the evidence's sectors, and these the figure that the kind of the event asks for
    NAV             cash, receivables and the positions at the evidence's prices give NAV
    SHARPE,         the close is one, and its snapshots, as far as they are kept, prove the same again (`check_daily`)
    SECTOR_PROFITS

What is proved with an entry is of its instant. What is proved between two entries is of an instant between theirs,
give or take the lag with which an evaluator learns of things. Which prices the market had is the evidence's own word:
only full hours and closes are recorded.

    FORGED    an award or event that nobody has proved
    WRONG     a proof that does not come out again
    DIFFERS   an award that is not what its events say
    LOST      proved, and neither awarded nor on its way; or a gap in the numbers of the portfolio's badge events
    MISSING   deserved by the current rule, and not proved. The ledger tells of FILLS, STREAK and HELD. Snapshots tell
              of NAV, when they show it for longer than the lag, and the close before the last one of SHARPE and
              SECTOR_PROFITS (`Given.deserved`). Of SECTORS nothing tells (`ONE_WAY`).
              A rule counts from the first fill after it was made known, or from the day that a position is old enough:
              until then it may be MISSING.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from engine.amounts import AmountError, from_micro, plain
from engine.assets import UNCLASSIFIED
from engine.badge_book import sector_evidence
from engine.badges import (
    BOOKED,
    DAILY,
    EVIDENCE_PRICES_MAX,
    BadgeEventKind,
    Evidence,
    Facts,
    Predicate,
    Proof,
    Rule,
    figure,
    is_met,
    sectors_above,
)
from engine.ledger import LedgerEntry
from engine.portfolio import LedgerMismatch, Portfolio, Position
from engine.positions import carried_value
from engine.sectors import SectorValue

# An evaluator learns of a reclassification, looks at what is due and commits this late at most, and clocks differ.
LAG_MAX = timedelta(minutes=1)
# A recorded market's clock moves days within the time that a transaction takes.
RECORDED_LAG_MAX = timedelta(days=5)

# What is not seen when every trace of an award has gone: the award, its events and what its prover wrote.
ONE_WAY: Mapping[Predicate, str] = {
    Predicate.SECTORS: "no prices are recorded with fills, so only a gap in the events tells that one is gone",
    Predicate.NAV: "one that no recorded snapshot shows for longer than a moment is not missed",
    Predicate.SHARPE: "missed when the close before the last one proves it",
    Predicate.SECTOR_PROFITS: "missed when the close before the last one proves it",
}

RuleKey = tuple[str, int]


class FaultKind(StrEnum):
    FORGED = "FORGED"
    WRONG = "WRONG"
    DIFFERS = "DIFFERS"
    LOST = "LOST"
    MISSING = "MISSING"


@dataclass(frozen=True, slots=True)
class BadgeFault:
    portfolio_id: str
    badge_id: str
    version: int
    kind: FaultKind
    detail: str


@dataclass(frozen=True, slots=True)
class ToldEvent:
    """A badge event as subscribers were told it; `sequence` numbers the portfolio's."""

    sequence: int
    event_id: str
    kind: BadgeEventKind
    badge_id: str
    version: int
    at: datetime
    evidence: Evidence

    @property
    def key(self) -> RuleKey:
        return (self.badge_id, self.version)


@dataclass(frozen=True, slots=True)
class GivenAward:
    awarded_at: datetime
    active: bool
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Given:
    """All that is known of one portfolio's badges. `proved` is how many events of each rule its prover wrote, `waiting`
    the ids of those that are still in the outbox. `events` are in order. `deserved` are rules that something else than
    the ledger says are met, and what says so."""

    awards: Mapping[RuleKey, GivenAward]
    events: Sequence[ToldEvent]
    proved: Mapping[RuleKey, int]
    waiting: frozenset[str]
    deserved: Mapping[RuleKey, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Classification:
    """The sectors that symbols had: (since, sector) by symbol, ascending."""

    versions: Mapping[str, Sequence[tuple[datetime, str]]]

    def sector(self, symbol: str, at: datetime) -> str:
        found = UNCLASSIFIED
        for since, sector in self.versions.get(symbol, ()):
            if since <= at:
                found = sector
        return found


@dataclass(slots=True)
class ProofCheck:
    """The check of one portfolio. `faults` are those found so far."""

    portfolio: Portfolio
    rules: Mapping[RuleKey, Rule]
    current: Sequence[Rule]
    given: Given
    classification: Classification
    lag_max: timedelta = LAG_MAX
    faults: list[BadgeFault] = field(default_factory=list)
    _deserved: dict[RuleKey, str] = field(default_factory=dict)
    _due: dict[int, list[ToldEvent]] = field(default_factory=dict)
    # Proved after the last entry that was taken, so not after the next one.
    _latest: list[ToldEvent] = field(default_factory=list)
    _broken: bool = False

    def __post_init__(self) -> None:
        for event in self.given.events:
            rule = self.rules.get(event.key)
            if rule is None or not _is_of(rule, event.evidence):
                self._fault(event.key, FaultKind.WRONG, f"{event.event_id}: there is no such rule")
            elif rule.predicate not in DAILY:
                self._due.setdefault(event.evidence.ledger_sequence or 0, []).append(event)

    def take(self, entry: LedgerEntry) -> None:
        """Fold the next entry, and check what was proved with it."""
        if self._broken:
            return
        before = self.portfolio.positions.get(entry.symbol or "")
        try:
            closed = self.portfolio.replay(entry)
        except (LedgerMismatch, AmountError) as mismatch:
            # The ledger's own check says it all; without a fold nothing can be said of badges.
            self._broken = True
            self._fault(("", 0), FaultKind.WRONG, str(mismatch))
            return
        ended = None if closed is None else before
        self._end_latest(entry.recorded_at, f"entry {entry.sequence} was booked")
        self._note_deserved(entry, ended)
        for event in self._due.pop(entry.sequence, ()):
            said = self._check(event, self.rules[event.key], entry, ended)
            if said:
                self._fault(event.key, FaultKind.WRONG, f"{event.event_id}: {said}")

    def end(self, now: datetime) -> list[BadgeFault]:
        """All faults, when every entry was taken."""
        if self._broken:
            return self.faults
        self._end_latest(now, "now")
        for sequence, events in sorted(self._due.items()):
            for event in events:
                self._fault(event.key, FaultKind.WRONG, f"{event.event_id}: there is no entry {sequence}")
        for rule in self.current:
            if rule.predicate is Predicate.HELD:
                for symbol, position in self.portfolio.positions.items():
                    if now - self.lag_max - position.held_since >= timedelta(days=rule.window_days):
                        self._deserves(rule, f"{symbol} is held since {position.held_since:%Y-%m-%d %H:%M}")
        self._check_given()
        return self.faults

    def _end_latest(self, at: datetime, what: str) -> None:
        for event in self._latest:
            if event.at > at + self.lag_max:
                self._fault(event.key, FaultKind.WRONG, f"{event.event_id}: {event.at} is after {what}")
        self._latest.clear()

    # -- what was not given ----------------------------------------------------------------------------------

    def _note_deserved(self, entry: LedgerEntry, ended: Position | None) -> None:
        held_since = None if ended is None else ended.held_since
        facts = Facts(fills=self.portfolio.fills, streak=self.portfolio.streak, held_since=held_since)
        for rule in self.current:
            if rule.predicate in _DESERVED and is_met(rule, figure(rule, facts, entry.recorded_at)):
                self._deserves(rule, f"by entry {entry.sequence}, event {entry.event_id}")

    def _deserves(self, rule: Rule, why: str) -> None:
        self._deserved.setdefault((rule.badge_id, rule.version), why)

    def _check_given(self) -> None:
        """Awards against events, events against proofs, proofs against what is deserved."""
        given, told = self.given, dict[RuleKey, list[ToldEvent]]()
        for event in given.events:
            told.setdefault(event.key, []).append(event)
        gap = next((number for number, event in enumerate(given.events, 1) if event.sequence != number), None)
        if gap is not None:
            after = given.events[gap - 1]
            self._fault(after.key, FaultKind.LOST, f"no event has the number {gap}, before {after.event_id}")
        for key in given.awards.keys() - told.keys():
            self._fault(key, FaultKind.FORGED, "awarded without an event")
        for key, events in told.items():
            number = given.proved.get(key, 0)
            expected = [f"{key[0]}:{key[1]}#{self.portfolio.portfolio_id}#{n + 1}" for n in range(len(events))]
            if len(events) > number or [event.event_id for event in events] != expected:
                self._fault(key, FaultKind.FORGED, f"{len(events)} events, of which {number} were proved")
            if [event.kind for event in events] != _kinds(len(events)):
                self._fault(key, FaultKind.WRONG, f"{', '.join(event.kind for event in events)} do not follow")
            self._check_award(key, events)
        for key, number in given.proved.items():
            for n in range(len(told.get(key, ())), number):
                event_id = f"{key[0]}:{key[1]}#{self.portfolio.portfolio_id}#{n + 1}"
                if event_id not in given.waiting:
                    self._fault(key, FaultKind.LOST, f"{event_id} was proved")
        for key, why in given.deserved.items():
            self._deserved.setdefault(key, why)
        for key in self._deserved.keys() - given.proved.keys() - told.keys():
            self._fault(key, FaultKind.MISSING, f"deserved {self._deserved[key]}")

    def _check_award(self, key: RuleKey, events: Sequence[ToldEvent]) -> None:
        award, first, last = self.given.awards.get(key), events[0], events[-1]
        if award is None:
            self._fault(key, FaultKind.DIFFERS, f"{first.event_id} was told and not awarded")
        elif (award.awarded_at, award.evidence) != (first.at, first.evidence):
            self._fault(key, FaultKind.DIFFERS, f"not what {first.event_id} says")
        elif award.active is (last.kind is BadgeEventKind.LAPSED):
            self._fault(key, FaultKind.DIFFERS, f"active is {award.active} after {last.kind}")

    # -- what was given --------------------------------------------------------------------------------------

    def _check(self, event: ToldEvent, rule: Rule, entry: LedgerEntry, ended: Position | None) -> str:
        """Why the event does not follow from the ledger up to `entry`; empty when it does."""
        evidence = event.evidence
        if said := self._check_instant(event, rule, entry):
            return said
        match rule.predicate:
            case Predicate.FILLS | Predicate.STREAK:
                facts = Facts(fills=self.portfolio.fills, streak=self.portfolio.streak)
            case Predicate.HELD:
                held = self._held(evidence, entry, ended)
                if held is None or (held.opened_at, held.held_since) != (evidence.opened_at, evidence.since):
                    return f"{evidence.symbol} was not opened at {evidence.opened_at} and held since {evidence.since}"
                facts = Facts(held_since=held.held_since)
            case Predicate.SECTORS:
                return self._check_sectors(event, rule)
            case _:
                if evidence.prices is None and len(self.portfolio.positions) > EVIDENCE_PRICES_MAX:
                    return ""
                nav = self._nav(evidence)
                if nav is None or evidence.nav is None or Decimal(evidence.nav) != from_micro(nav):
                    return f"NAV is {None if nav is None else plain(from_micro(nav))}, not {evidence.nav}"
                facts = Facts(nav=nav)
        return _compare(rule, figure(rule, facts, event.at), evidence)

    def _check_instant(self, event: ToldEvent, rule: Rule, entry: LedgerEntry) -> str:
        """What is proved with an entry is of its instant, other things are of a moment between this and the next."""
        event_id = event.evidence.event_id
        if event_id is None and rule.predicate in BOOKED - {Predicate.SECTORS}:
            return "it names no event"
        if event_id is not None and rule.predicate is Predicate.NAV:
            return "no event proves a NAV"
        if event_id is not None:
            same = (event_id, event.at) == (entry.event_id, entry.recorded_at)
            return "" if same else f"entry {entry.sequence} is of another event or instant"
        if event.at < entry.recorded_at - self.lag_max:
            return f"{event.at} is before entry {entry.sequence} was booked"
        self._latest.append(event)
        return ""

    def _held(self, evidence: Evidence, entry: LedgerEntry, ended: Position | None) -> Position | None:
        """What is proved with an entry ended with it; otherwise it is held still."""
        if evidence.event_id is not None:
            return ended if (evidence.event_id, evidence.symbol) == (entry.event_id, entry.symbol) else None
        return self.portfolio.positions.get(evidence.symbol or "")

    def _check_sectors(self, event: ToldEvent, rule: Rule) -> str:
        evidence = event.evidence
        if evidence.prices is None and len(self.portfolio.positions) > EVIDENCE_PRICES_MAX:
            return ""
        if (evidence.prices or {}).keys() != self.portfolio.positions.keys():
            return "its prices are not those of the positions held"
        # By what the evaluator may have known then.
        sums = self._sectors(evidence, event.at)
        if sector_evidence(sums) != (evidence.sectors or []):
            sums = self._sectors(evidence, event.at - self.lag_max)
        if sector_evidence(sums) != (evidence.sectors or []):
            return "its sectors are not those of the positions at its prices"
        if event.kind is not BadgeEventKind.LAPSED:
            return _compare(rule, Decimal(sectors_above(sums, rule.minimum)), evidence)
        left = sectors_above(sums, rule.minimum - rule.hysteresis)
        if left >= rule.threshold or Decimal(evidence.figure) != left:
            return f"{left} sectors are left, not {evidence.figure}"
        return ""

    def _sectors(self, evidence: Evidence, at: datetime) -> dict[str, SectorValue]:
        sums: dict[str, SectorValue] = {}
        for symbol, value in self._values(evidence).items():
            sector = self.classification.sector(symbol, at)
            known = sums.get(sector, SectorValue(0, 0))
            sums[sector] = SectorValue(known.value + value, known.gross + abs(value))
        return sums

    def _nav(self, evidence: Evidence) -> int | None:
        """None when a position had no price: such a NAV proves nothing."""
        prices = evidence.prices or {}
        if any(prices.get(symbol) is None for symbol in self.portfolio.positions):
            return None
        return self.portfolio.cash + self.portfolio.receivables + sum(self._values(evidence).values())

    def _values(self, evidence: Evidence) -> dict[str, int]:
        prices = evidence.prices or {}
        return {
            symbol: carried_value(held.quantity, held.cost, _decimal(prices.get(symbol)))
            for symbol, held in self.portfolio.positions.items()
        }

    def _fault(self, key: RuleKey, kind: FaultKind, detail: str) -> None:
        self.faults.append(BadgeFault(self.portfolio.portfolio_id, *key, kind, detail))


_DESERVED = frozenset({Predicate.FILLS, Predicate.STREAK, Predicate.HELD})


def check_daily(event: ToldEvent, again: Proof | None) -> str:
    """Why an event of SHARPE or SECTOR_PROFITS does not follow; `again` is what the snapshots of its close prove."""
    if again is None:
        return f"the snapshots of {event.evidence.until} do not prove it"
    expected = again.message
    if event.at != expected.at:
        return f"it is of {event.at}, not of its close, {expected.at}"
    for name in Evidence.__struct_fields__:
        told, found = getattr(event.evidence, name), getattr(expected.evidence, name)
        if told != found:
            return f"{name} is {found}, not {told}"
    return ""


def rich_since(points: Iterable[tuple[datetime, bool]], lag_max: timedelta = LAG_MAX) -> datetime | None:
    """Since when snapshots say, for longer than the lag, that a NAV is reached; None when they do not. `points`:
    instants, ascending, and whether the NAV was reached then."""
    since = None
    for at, is_reached in points:
        if not is_reached:
            since = None
        elif since is None:
            since = at
        elif at - since > lag_max:
            return since
    return None


def daily_events(events: Iterable[ToldEvent], rules: Mapping[RuleKey, Rule]) -> list[ToldEvent]:
    """Those that snapshots prove."""
    return [event for event in events if event.key in rules and rules[event.key].predicate in DAILY]


def _kinds(count: int) -> list[BadgeEventKind]:
    """What happens to a badge, in order: only SECTORS has more than the first."""
    later = (BadgeEventKind.LAPSED, BadgeEventKind.ACTIVATED)
    return [BadgeEventKind.UNLOCKED, *(later[n % 2] for n in range(count - 1))][:count]


def _is_of(rule: Rule, evidence: Evidence) -> bool:
    return evidence.predicate is rule.predicate and Decimal(evidence.threshold) == rule.threshold


def _compare(rule: Rule, reached: Decimal | None, evidence: Evidence) -> str:
    if reached is None or reached != Decimal(evidence.figure):
        return f"the figure is {None if reached is None else plain(reached)}, not {evidence.figure}"
    return "" if is_met(rule, reached) else f"{evidence.figure} does not meet {plain(rule.threshold)}"


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)
