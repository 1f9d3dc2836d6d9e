"""Every kind of award comes out again from the ledger, and whatever is changed about it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from engine.badge_proofs import (
    LAG_MAX,
    ONE_WAY,
    Classification,
    FaultKind,
    Given,
    GivenAward,
    ProofCheck,
    RuleKey,
    ToldEvent,
    check_daily,
    rich_since,
)
from engine.badges import (
    BadgeEventKind,
    BadgeState,
    Evidence,
    Predicate,
    Proof,
    Rarity,
    Rule,
    SectorEvidence,
    Transition,
)
from engine.portfolio import Portfolio
from tests.badge_bookkeeping import DAY, RULES, SECTOR_OF, SYMBOLS, BadgeBookkeeping
from tests.bookkeeping import AT, cash, fill, opening

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOMENT = timedelta(microseconds=1)
ALWAYS = Classification({symbol: [(EPOCH, sector)] for symbol, sector in SECTOR_OF.items()})


@dataclass
class Told:
    """What the tables have of one portfolio; tests take from it and change it."""

    kept: BadgeBookkeeping
    events: list[ToldEvent]
    proved: dict[RuleKey, int] = field(default_factory=dict)
    deserved: dict[RuleKey, str] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()
    awards: dict[RuleKey, GivenAward] = field(default_factory=dict)
    classification: Classification = ALWAYS

    def follow(self) -> None:
        """Proofs and awards as the events say."""
        for event in self.events:
            self.proved[event.key] = self.proved.get(event.key, 0) + 1
            if event.kind is BadgeEventKind.UNLOCKED:
                self.awards[event.key] = GivenAward(event.at, True, event.evidence)
            elif event.key in self.awards:
                is_active = event.kind is BadgeEventKind.ACTIVATED
                self.awards[event.key] = replace(self.awards[event.key], active=is_active)

    def faults(self) -> list[tuple[str, str]]:
        rules = {(rule.badge_id, rule.version): rule for rule in RULES}
        given = Given(self.awards, self.events, self.proved, self.waiting, self.deserved)
        check = ProofCheck(Portfolio("a", "USD"), rules, RULES, given, self.classification)
        for entry in self.kept.entries["a"]:
            check.take(entry)
        return sorted((one.badge_id, one.kind.value) for one in check.end(self.kept.now))

    def event(self, badge_id: str, number: int = 1) -> ToldEvent:
        return [one for one in self.events if one.badge_id == badge_id][number - 1]

    def change(self, badge_id: str, number: int = 1, **of: Any) -> None:
        """Change a field of an event, or of its evidence; and of its award alike."""
        event = self.event(badge_id, number)
        fields = {name: value for name, value in of.items() if name in ("at", "kind")}
        evidence = {name: value for name, value in of.items() if name not in fields}
        changed = replace(event, **fields, evidence=msgspec.structs.replace(event.evidence, **evidence))
        self.events[self.events.index(event)] = changed
        if number == 1:
            award = self.awards[event.key]
            self.awards[event.key] = GivenAward(changed.at, award.active, changed.evidence)

    def erase(self, badge_id: str) -> None:
        """Every trace, but for the place that its events had among the others."""
        self.events = [event for event in self.events if event.badge_id != badge_id]
        for table in (self.proved, self.awards):
            table.pop((badge_id, 1), None)


@pytest.fixture
def told() -> Told:
    """Fills, closes, sectors that come and go, a NAV, and days that pass."""
    kept = BadgeBookkeeping()
    kept.send(opening("a"))
    for symbol in SYMBOLS[:-1]:
        kept.tick(symbol, "20")
    kept.send(cash("a", "DEPOSIT", "800", "d"))
    kept.look()
    kept.send(fill("a", "BUY", "10", "20", "b1"), fill("a", "BUY", "10", "20", "b2", "XOM"))
    kept.send(fill("a", "BUY", "5", "20", "b3", "BTC"), fill("a", "SELL", "5", "30", "s1", "BTC"))
    kept.send(fill("a", "BUY", "5", "20", "b4", "BTC"), fill("a", "SELL", "5", "30", "s2", "BTC"))
    kept.send(fill("a", "SELL", "10", "20", "s3", "XOM"))
    kept.now += DAY + timedelta(hours=1)
    kept.look()
    kept.send(fill("a", "BUY", "10", "20", "b5", "XOM"))
    kept.tick("AAPL", "60")
    kept.look()
    kept.send(cash("a", "FEE", "1", "f"))
    messages = [proof.message for proof in kept.proofs]
    events = [
        ToldEvent(number, one.event_id, one.kind, one.badge_id, one.version, one.at, one.evidence)
        for number, one in enumerate(messages, 1)
    ]
    found = Told(kept, events)
    found.follow()
    assert {(event.badge_id, event.kind.value) for event in events} == {
        ("first", "UNLOCKED"),
        ("fourth", "UNLOCKED"),
        ("two_in_a_row", "UNLOCKED"),
        ("two_sectors", "UNLOCKED"),
        ("two_sectors", "LAPSED"),
        ("two_sectors", "ACTIVATED"),
        ("three_sectors", "UNLOCKED"),
        ("three_sectors", "LAPSED"),
        ("three_sectors", "ACTIVATED"),
        ("a_day", "UNLOCKED"),
        ("rich", "UNLOCKED"),
    }
    return found


def test_what_was_proved_comes_out_again(told: Told) -> None:
    assert told.faults() == []


@pytest.mark.parametrize(
    ("badge_id", "by"),
    [
        ("first", MOMENT),
        ("two_in_a_row", -MOMENT),
        ("two_sectors", MOMENT),
        ("a_day", timedelta(hours=-1, minutes=-10)),  # before it was held for so long
        ("a_day", timedelta(hours=2)),  # the next entry was booked by then
        ("rich", timedelta(hours=-2)),
        ("rich", timedelta(hours=2)),
    ],
)
def test_an_instant_that_was_changed_is_seen(told: Told, badge_id: str, by: timedelta) -> None:
    told.change(badge_id, at=told.event(badge_id).at + by)
    assert (badge_id, "WRONG") in told.faults()


def test_what_is_proved_last_is_not_of_the_future(told: Told) -> None:
    del told.kept.entries["a"][-1]
    told.change("rich", at=told.kept.now + LAG_MAX)
    assert told.faults() == []
    told.change("rich", at=told.kept.now + LAG_MAX + MOMENT)
    assert told.faults() == [("rich", "WRONG")]


@pytest.mark.parametrize(
    ("badge_id", "change"),
    [
        ("first", {"figure": "2"}),
        ("first", {"threshold": "0"}),
        ("first", {"event_id": None}),
        ("first", {"event_id": "b2"}),
        ("fourth", {"ledger_sequence": 999}),
        ("two_in_a_row", {"ledger_sequence": 1}),
        ("a_day", {"opened_at": AT - DAY}),
        ("a_day", {"since": AT - DAY}),
        ("a_day", {"since": None}),
        ("a_day", {"symbol": "XOM"}),
        ("a_day", {"figure": "3"}),
        ("a_day", {"event_id": "s1"}),
        ("rich", {"nav": "999999"}),
        ("rich", {"prices": {"AAPL": "61", "XOM": "20"}}),
        ("rich", {"prices": None}),
        ("rich", {"event_id": "f"}),
        ("two_sectors", {"prices": {"AAPL": "20"}}),
        ("two_sectors", {"prices": {"AAPL": "20", "XOM": "21"}}),
        ("two_sectors", {"figure": "3"}),
    ],
)
def test_evidence_that_was_changed_is_seen(told: Told, badge_id: str, change: dict[str, Any]) -> None:
    told.change(badge_id, **change)
    assert told.faults() == [(badge_id, "WRONG")]


def test_sectors_are_those_in_force_at_the_instant(told: Told) -> None:
    at = told.event("two_sectors").at
    versions = dict(ALWAYS.versions) | {"XOM": [(EPOCH, "Energy"), (at - LAG_MAX - MOMENT, "Utilities")]}
    told.classification = Classification(versions)
    assert ("two_sectors", "WRONG") in told.faults()
    # Nobody knows of a reclassification the moment it is made.
    told.classification = Classification(versions | {"XOM": [(EPOCH, "Energy"), (at, "Utilities")]})
    assert [fault for fault in told.faults() if fault == ("two_sectors", "WRONG")] != [], "the later events"
    told.events = [event for event in told.events if event.at <= at]
    told.proved, told.awards = {}, {}
    told.follow()
    assert ("two_sectors", "WRONG") not in told.faults()


@pytest.mark.parametrize("badge_id", ["first", "fourth", "two_in_a_row", "a_day"])
def test_what_the_ledger_proves_is_missed_when_every_trace_is_gone(told: Told, badge_id: str) -> None:
    told.erase(badge_id)
    told.events = [replace(event, sequence=number) for number, event in enumerate(told.events, 1)]
    assert told.faults() == [(badge_id, "MISSING")]


def test_what_snapshots_prove_is_missed_too(told: Told) -> None:
    told.erase("rich")
    assert told.faults() == [], "nothing tells of it"
    told.deserved[("rich", 1)] = "by a snapshot"
    assert told.faults() == [("rich", "MISSING")]


def test_events_that_are_gone_leave_a_gap(told: Told) -> None:
    told.erase("two_sectors")
    assert [kind for _, kind in told.faults()] == ["LOST"]


def test_what_can_not_be_seen_is_said() -> None:
    both_ways = {Predicate.FILLS, Predicate.STREAK, Predicate.HELD}
    assert ONE_WAY.keys() == set(Predicate) - both_ways


def test_one_that_is_on_its_way_is_not_lost(told: Told) -> None:
    event = told.events.pop()
    assert event.badge_id == "rich"
    del told.awards[event.key]
    assert told.faults() == [("rich", "LOST")]
    told.waiting = frozenset({event.event_id})
    assert told.faults() == []


def forge_an_award(told: Told) -> None:
    told.awards[("richer", 1)] = told.awards[("rich", 1)]


def forge_an_event(told: Told) -> None:
    told.proved[("rich", 1)] = 0


def take_an_award(told: Told) -> None:
    del told.awards[("rich", 1)]


def date_an_award_back(told: Told) -> None:
    told.awards[("rich", 1)] = replace(told.awards[("rich", 1)], awarded_at=AT)


def switch_one_off(told: Told) -> None:
    told.awards[("rich", 1)] = replace(told.awards[("rich", 1)], active=False)


def swap_kinds(told: Told) -> None:
    told.change("two_sectors", 2, kind=BadgeEventKind.ACTIVATED)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (forge_an_award, ("richer", FaultKind.FORGED)),
        (forge_an_event, ("rich", FaultKind.FORGED)),
        (take_an_award, ("rich", FaultKind.DIFFERS)),
        (date_an_award_back, ("rich", FaultKind.DIFFERS)),
        (switch_one_off, ("rich", FaultKind.DIFFERS)),
        (swap_kinds, ("two_sectors", FaultKind.WRONG)),
    ],
)
def test_awards_events_and_proofs_are_of_one_kind(
    told: Told, change: Callable[[Told], None], fault: tuple[str, FaultKind]
) -> None:
    change(told)
    assert fault in told.faults()


def test_a_ledger_that_does_not_fold_proves_nothing(told: Told) -> None:
    entries = told.kept.entries["a"]
    entries[3] = msgspec.structs.replace(entries[3], realized=entries[3].realized + 1)
    assert told.faults() == [("", "WRONG")]


# -- what snapshots prove --------------------------------------------------------------------------------------

WEATHER = Rule(
    badge_id="weather",
    version=1,
    name="w",
    description="w",
    rarity=Rarity.RARE,
    predicate=Predicate.SECTOR_PROFITS,
    threshold=Decimal(2),
    window_days=30,
)
AGAIN = Evidence(
    figure="2",
    threshold="2",
    predicate=Predicate.SECTOR_PROFITS,
    ledger_sequence=7,
    sectors=[SectorEvidence(sector="Energy", value="1"), SectorEvidence(sector="Tech", value="2")],
    since=AT - 30 * DAY,
    until=AT,
)


def daily(at: datetime = AT, **change: Any) -> str:
    transition = Transition(WEATHER, BadgeEventKind.UNLOCKED, Decimal(2), BadgeState(True, 1), AT)
    evidence = msgspec.structs.replace(AGAIN, **change)
    event = ToldEvent(1, "weather:1#a#1", BadgeEventKind.UNLOCKED, "weather", 1, at, evidence)
    return check_daily(event, Proof("a", transition, AGAIN))


def test_a_daily_award_is_of_its_close_with_all_that_it_rests_on() -> None:
    assert daily() == ""
    assert "not of its close" in daily(at=AT + MOMENT)
    for name, value in {
        "figure": "3",
        "since": AT - 31 * DAY,
        "sectors": (AGAIN.sectors or [])[:1],
        "ledger_sequence": 8,
        "nav": "5",
    }.items():
        assert daily(**{name: value}).startswith(f"{name} is ")


def test_a_daily_award_that_its_snapshots_do_not_prove() -> None:
    event = ToldEvent(1, "weather:1#a#1", BadgeEventKind.UNLOCKED, "weather", 1, AT, AGAIN)
    assert "do not prove it" in check_daily(event, None)


@pytest.mark.parametrize(
    ("reached", "since"),
    [
        ([], None),
        ([True], None),
        ([False, True, False, True], None),
        ([False, True, True], 1),
        ([True, False, True, True, True], 2),
    ],
)
def test_a_nav_is_reached_when_snapshots_say_so_for_longer_than_a_moment(
    reached: Sequence[bool], since: int | None
) -> None:
    hour = timedelta(hours=1)
    points = [(AT + number * hour, one) for number, one in enumerate(reached)]
    assert rich_since(points, timedelta(minutes=1)) == (None if since is None else AT + since * hour)
    assert rich_since(points, 3 * hour) is None
