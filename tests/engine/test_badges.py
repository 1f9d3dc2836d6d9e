"""Rules by hand: every predicate at its threshold, hysteresis, versions, events with ids of their own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from engine.badge_book import OUT_OF_REACH, BadgeBook, proofs_of
from engine.badges import (
    BadgeMessage,
    BadgeState,
    BadRuleError,
    Facts,
    Predicate,
    Rule,
    States,
    badge_message_decoder,
    badge_message_encoder,
    current_rules,
    figure,
    load_rules,
    parse_rules,
    sectors_above,
    transitions,
)
from engine.book import Account, Book, Holding
from engine.pnl import DayBase
from engine.sectors import SectorValue

AT = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
RULES = {rule.badge_id: rule for rule in load_rules()}
MILLION = 1_000_000 * 10**6
ONE = Holding("AAPL", Decimal(1), 100_000_000, 0)


def kinds(badge_id: str, facts: Facts, state: BadgeState | None = None, at: datetime = AT) -> list[str]:
    states: States = {} if state is None else {badge_id: state}
    return [one.kind.value for one in transitions([RULES[badge_id]], states, facts, at)]


def sectors(**weights: int) -> dict[str, SectorValue]:
    """Gross values by sector."""
    return {name: SectorValue(value, value) for name, value in weights.items()}


def five(smallest: int, whole: int = 10_000) -> Facts:
    """Five sectors, of which the smallest has so many ten-thousandths of the whole."""
    rest = (whole - smallest) // 4
    return Facts(sectors=sectors(a=rest, b=rest, c=rest, d=whole - smallest - 3 * rest, e=smallest))


# -- the shipped rules -------------------------------------------------------------------------------------


def test_the_shipped_rules_are_those_that_are_promised() -> None:
    assert [(rule.name, rule.predicate.value, str(rule.threshold)) for rule in load_rules()] == [
        ("First Fill", "FILLS", "1"),
        ("Centurion", "FILLS", "100"),
        ("Market Maker", "FILLS", "1000"),
        ("Diversified", "SECTORS", "5"),
        ("Hot Streak", "STREAK", "5"),
        ("Diamond Hands", "HELD", "30"),
        ("Whale", "NAV", "1000000"),
        ("All-Weather", "SECTOR_PROFITS", "5"),
        ("Untouchable", "SHARPE", "2"),
    ]
    assert {rule.predicate for rule in load_rules()} == set(Predicate)


@pytest.mark.parametrize(
    ("badge_id", "below", "reached"),
    [
        ("first_fill", Facts(fills=0), Facts(fills=1)),
        ("centurion", Facts(fills=99), Facts(fills=100)),
        ("market_maker", Facts(fills=999), Facts(fills=1_000)),
        ("hot_streak", Facts(streak=4), Facts(streak=5)),
        ("whale", Facts(nav=MILLION - 1), Facts(nav=MILLION)),
        ("all_weather", Facts(sector_profits=4), Facts(sector_profits=5)),
        ("untouchable", Facts(sharpe=Decimal(2)), Facts(sharpe=Decimal("2.0000000001"))),
        ("diversified", five(500), five(501)),
        (
            "diamond_hands",
            Facts(held_since=AT - timedelta(days=30) + timedelta(microseconds=1)),
            Facts(held_since=AT - timedelta(days=30)),
        ),
    ],
)
def test_a_badge_is_unlocked_at_its_threshold_and_once(badge_id: str, below: Facts, reached: Facts) -> None:
    assert kinds(badge_id, below) == []
    assert kinds(badge_id, Facts()) == [], "nothing is known"
    assert kinds(badge_id, reached) == ["UNLOCKED"]
    assert kinds(badge_id, reached, BadgeState(True, 1)) == []


@pytest.mark.parametrize(
    "badge_id", [rule.badge_id for rule in load_rules() if rule.predicate is not Predicate.SECTORS]
)
def test_a_badge_is_for_good(badge_id: str) -> None:
    nothing = Facts(0, 0, -MILLION, {}, AT, Decimal(-3), 0)
    assert kinds(badge_id, nothing, BadgeState(True, 1)) == []


def test_figures_are_what_is_compared() -> None:
    facts = Facts(7, 3, 1_500_000, five(501).sectors, AT - timedelta(days=2, hours=23), Decimal("1.25"), 4)
    found = {badge_id: figure(rule, facts, AT) for badge_id, rule in RULES.items()}
    assert found == {
        "first_fill": 7,
        "centurion": 7,
        "market_maker": 7,
        "diversified": 5,
        "hot_streak": 3,
        "diamond_hands": 2,
        "whale": Decimal("1.5"),
        "all_weather": 4,
        "untouchable": Decimal("1.25"),
    }
    assert {figure(rule, Facts(), AT) for rule in RULES.values()} == {None}


# -- sectors -----------------------------------------------------------------------------------------------


def test_weights_around_the_minimum_do_not_make_a_badge_flicker() -> None:
    """0.0501, 0.05, 0.0401: nothing happens; at 0.04 it lapses; 0.0401, 0.05: nothing; above 0.05 it is back."""
    state: BadgeState | None = None
    told = []
    for smallest in (500, 501, 500, 401, 501, 401, 400, 401, 500, 400, 501, 500):
        for one in transitions([RULES["diversified"]], {"diversified": state} if state else {}, five(smallest), AT):
            state = one.state
            told.append((smallest, one.kind.value, state))
    assert told == [
        (501, "UNLOCKED", BadgeState(True, 1)),
        (400, "LAPSED", BadgeState(False, 2)),
        (501, "ACTIVATED", BadgeState(True, 3)),
    ]


def test_what_is_unclassified_has_weight_and_is_no_sector() -> None:
    held = sectors(a=10, b=10, c=10, d=10, UNCLASSIFIED=60)
    assert sectors_above(held, Decimal("0.05")) == 4
    assert sectors_above(held | sectors(e=10), Decimal("0.1")) == 0, "10 of 110 are less than a tenth"


def test_short_positions_count_by_their_gross_value() -> None:
    held = {"long": SectorValue(50, 50), "short": SectorValue(-30, 30), "both": SectorValue(0, 20)}
    assert sectors_above(held, Decimal("0.19")) == 3
    assert sectors_above(held, Decimal("0.2")) == 2


def test_nothing_held_lapses_and_is_met_by_nobody() -> None:
    assert sectors_above({}, Decimal(0)) == 0
    assert sectors_above(sectors(a=0), Decimal(0)) == 0
    assert kinds("diversified", Facts(sectors={}), BadgeState(True, 1)) == ["LAPSED"]
    assert kinds("diversified", Facts(), BadgeState(True, 1)) == [], "unknown is not nothing"


def test_weights_are_compared_exactly_at_any_size() -> None:
    whole = 20 * (2**59 - 1)
    just = Facts(sectors=sectors(a=whole // 20, b=whole - whole // 20))
    assert sectors_above(just.sectors or {}, Decimal("0.05")) == 1
    assert sectors_above(sectors(a=whole // 20 + 1, b=whole - whole // 20 - 1), Decimal("0.05")) == 2


# -- events ------------------------------------------------------------------------------------------------


def test_a_message_travels_as_it_is_and_says_what_proved_it() -> None:
    (proof,) = proofs_of([RULES["whale"]], {}, "p-1", Facts(nav=MILLION), AT, nav="1000000", ledger_sequence=4)
    sent = badge_message_encoder.encode(proof.message)
    assert badge_message_decoder.decode(sent) == proof.message
    assert msgspec.json.decode(sent) == {
        "v": 1,
        "event_id": "whale:1#p-1#1",
        "kind": "UNLOCKED",
        "portfolio_id": "p-1",
        "badge_id": "whale",
        "version": 1,
        "at": "2026-11-20T15:00:00Z",
        "evidence": {
            "figure": "1000000",
            "threshold": "1000000",
            "predicate": "NAV",
            "ledger_sequence": 4,
            "nav": "1000000",
        },
    }


def test_every_event_of_a_badge_has_an_id_of_its_own() -> None:
    (lapsed,) = proofs_of([RULES["diversified"]], {"diversified": BadgeState(True, 3)}, "p", Facts(sectors={}), AT)
    message: BadgeMessage = lapsed.message
    assert (message.event_id, message.kind, message.evidence.figure) == ("diversified:1#p#4", "LAPSED", "0")


# -- rules as data -----------------------------------------------------------------------------------------

A_RULE: dict[str, Any] = {
    "badge_id": "some_badge",
    "version": 1,
    "name": "Some",
    "description": "Something.",
    "rarity": "RARE",
    "predicate": "FILLS",
    "threshold": "5",
}


def test_a_new_version_is_an_award_of_its_own() -> None:
    old, new = parse_rules(msgspec.json.encode([A_RULE, A_RULE | {"version": 2, "threshold": "6"}]))
    assert current_rules([new, old]) == [new]
    book = BadgeBook([old, new])
    assert book.rules == [new]


@pytest.mark.parametrize(
    "change",
    [
        {"badge_id": "Not Like This"},
        {"version": 0},
        {"name": ""},
        {"rarity": "HUGE"},
        {"predicate": "LUCK"},
        {"threshold": "0"},
        {"threshold": "NaN"},
        {"threshold": "1e-13"},
        {"minimum": "0.1"},
        {"window_days": 3},
        {"unheard": 1},
        {"predicate": "SECTORS", "minimum": "0.1", "hysteresis": "0.2"},
        {"predicate": "SECTORS", "minimum": "1"},
        {"predicate": "HELD", "window_days": 6},
        {"predicate": "SHARPE"},
        {"predicate": "NAV", "threshold": "0.0000001"},
    ],
)
def test_a_rule_that_can_not_be_evaluated_is_refused(change: dict[str, Any]) -> None:
    parse_rules(msgspec.json.encode([A_RULE]))
    with pytest.raises(BadRuleError):
        parse_rules(msgspec.json.encode([A_RULE | change]))


def test_a_rule_that_is_there_twice_is_refused() -> None:
    with pytest.raises(BadRuleError, match="twice"):
        parse_rules(msgspec.json.encode([A_RULE, A_RULE]))


# -- memory ------------------------------------------------------------------------------------------------


def held_rule(days: int) -> Rule:
    change = {"badge_id": f"held_{days}", "predicate": "HELD", "threshold": str(days), "window_days": days}
    return parse_rules(msgspec.json.encode([A_RULE | change]))[0]


def nav_rule(millions: int) -> Rule:
    change = {"badge_id": f"worth_{millions}", "predicate": "NAV", "threshold": str(millions * 10**6)}
    return parse_rules(msgspec.json.encode([A_RULE | change]))[0]


def test_nobody_who_was_rich_for_a_moment_is_missed_however_many_they_are() -> None:
    count, book, badges = 1_500, Book(), BadgeBook([nav_rule(1), nav_rule(2)])
    book.tick("AAPL", Decimal(900_000), 1)
    for number in range(count):
        book.open(f"p-{number}", 0, Account(0, 0, 0, 0, 0, 0, 0, 0, 3, DayBase(0, 1, 0)), [ONE])
        badges.open(f"p-{number}", 0, book.slot(f"p-{number}"))

    def look(price: int) -> list[tuple[str, str]]:
        book.tick("AAPL", Decimal(price), 1)
        proofs = badges.rich(book.slots_of(0), book, AT)
        assert {(one.evidence.nav, tuple(one.evidence.prices or {})) for one in proofs} <= {(str(price), ("AAPL",))}
        return [(one.portfolio_id, one.transition.rule.badge_id) for one in proofs]

    assert look(999_999) == []
    everybody = {f"p-{number}" for number in range(count)}
    first = look(1_000_000)
    assert len(first) == count and set(first) == {(name, "worth_1") for name in everybody}
    assert look(999_000) == look(1_500_000) == [], "they are on their way"
    # What a further rule asks for is reached while nothing is written yet: the first one comes again, as the same.
    assert set(look(2_000_000)) == {(name, f"worth_{of}") for name in everybody for of in (1, 2)}
    assert look(2_000_000) == []


def test_due_dates_that_come_nearer_leave_no_heap_behind() -> None:
    book = BadgeBook([held_rule(30)])
    for number in range(10):
        book.open(f"p-{number}", 0, number, None, AT)
    for nearer in range(5_000):
        book.give_back([f"p-{nearer % 10}"], AT - timedelta(seconds=nearer))
    assert len(book._dues[0]) <= 2 * 10 + 64
    assert len(book.take_due(0, AT, 100)) == 10, "each once"
    assert book.next_due(0) is None


def test_a_dropped_shard_leaves_nothing_behind() -> None:
    book = BadgeBook([held_rule(30), *load_rules()])
    book.open("p-1", 0, 70, {"whale": BadgeState(True, 1)}, AT)
    book.open("p-2", 1, 3, None, AT)
    assert (book._nav_bound[70], book._nav_bound[3]) == (OUT_OF_REACH, MILLION)
    book.drop_shard(1)
    assert "p-2" not in book and book.next_due(1) is None and book._nav_bound[3] == OUT_OF_REACH
    assert book.next_due(0) == AT + timedelta(days=30)
    assert book.take_due(1, AT + timedelta(days=99), 10) == []
