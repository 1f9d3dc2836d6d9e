"""Badges: what a portfolio has done, told by rules that are data.

A rule compares one figure of a portfolio with its threshold. Which figure is its predicate's matter:

    FILLS           fills booked, less those that were reversed              figure ≥ threshold
    STREAK          closes in a row that were profitable after fees; the     figure ≥ threshold
                    reversal of any fill begins the row anew
    SECTORS         sectors whose weight (engine.sectors) is above `minimum`; UNCLASSIFIED is none; ≥ threshold
    HELD            whole days since the oldest open position is held: since figure ≥ threshold, which is `window_days`
                    the fill that opened it was executed and booked, whichever is later
    NAV             NAV; unknown while a position never had a price          figure ≥ threshold
    SECTOR_PROFITS  sectors that made a profit within `window_days`          figure ≥ threshold
    SHARPE          Sharpe ratio over `window_days` (engine.performance)     figure > threshold

A figure that is unknown proves nothing and takes nothing away.

    UNLOCKED    the first time that a rule is met: for good, and active
    LAPSED      SECTORS alone: fewer than `threshold` sectors have weights above `minimum − hysteresis`
    ACTIVATED   SECTORS alone: after it lapsed, `threshold` sectors have weights above `minimum` again

so weights that move around `minimum` by less than `hysteresis` change nothing. A rule never changes: a new version is
a rule of its own with an award of its own. The highest version of a badge is the one that is looked at; awards of
older ones stay.

`events_count` numbers a portfolio's events of one rule, from 1, which gives each event an id that is the same however
often it is told: `<badge_id>:<version>#<portfolio_id>#<events_count>`.

Adding a rule is an entry in badge_rules.json. Fractions are exact: weights are compared as whole micro-units.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from importlib.resources import files

import msgspec

from engine.amounts import DECIMALS_MAX, EXACT, MAGNITUDE_MAX, MICRO_DIGITS, from_micro, present
from engine.assets import UNCLASSIFIED
from engine.sectors import SectorValue

# A portfolio of more positions has evidence without prices: what proves one badge must never be too large to be told.
EVIDENCE_PRICES_MAX = 1_000
EVIDENCE_SECTORS_MAX = 100  # the largest ones
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,39}")
_ZERO = Decimal(0)


class Predicate(StrEnum):
    FILLS = "FILLS"
    SECTORS = "SECTORS"
    STREAK = "STREAK"
    HELD = "HELD"
    NAV = "NAV"
    SECTOR_PROFITS = "SECTOR_PROFITS"
    SHARPE = "SHARPE"


# What is looked at with every entry that moves a position, and what at the daily snapshot.
BOOKED = frozenset({Predicate.FILLS, Predicate.SECTORS, Predicate.STREAK})
DAILY = frozenset({Predicate.SECTOR_PROFITS, Predicate.SHARPE})


class Rarity(StrEnum):
    COMMON = "COMMON"
    UNCOMMON = "UNCOMMON"
    RARE = "RARE"
    EPIC = "EPIC"
    LEGENDARY = "LEGENDARY"


class BadgeEventKind(StrEnum):
    UNLOCKED = "UNLOCKED"
    ACTIVATED = "ACTIVATED"
    LAPSED = "LAPSED"


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One version of a badge. `minimum` and `hysteresis` are fractions, for SECTORS alone; the others have 0."""

    badge_id: str
    version: int
    name: str
    description: str
    rarity: Rarity
    predicate: Predicate
    threshold: Decimal
    minimum: Decimal = _ZERO
    hysteresis: Decimal = _ZERO
    window_days: int = 0


class BadRuleError(ValueError):
    """A rule that can not be evaluated as it stands."""


class SectorEvidence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sector: its signed value, gross value and share of the gross value; for SECTOR_PROFITS what it contributed
    (`value`) alone."""

    sector: str
    value: str
    gross: str | None = None
    weight: str | None = None


class Evidence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an event rests on, so that anybody can compute it again. Decimals are plain text; a price of None stands for
    a position carried at its cost; without `prices` there were more than EVIDENCE_PRICES_MAX positions, and it can not
    be computed again. `event_id` is the portfolio event (or entry) that it was proved with. A position that was HELD
    was opened at `opened_at` and is held since `since`; windows go from `since` to `until`."""

    figure: str
    threshold: str
    predicate: Predicate
    event_id: str | None = None
    ledger_sequence: int | None = None
    sectors: list[SectorEvidence] | None = None
    prices: dict[str, str | None] | None = None
    nav: str | None = None
    symbol: str | None = None
    opened_at: datetime | None = None
    since: datetime | None = None
    until: datetime | None = None


class BadgeMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a badge, on its way from the transaction that proved it to its consumers."""

    v: int = 1
    event_id: str
    kind: BadgeEventKind
    portfolio_id: str
    badge_id: str
    version: int
    at: datetime
    evidence: Evidence


badge_message_encoder = msgspec.json.Encoder()
badge_message_decoder: msgspec.json.Decoder[BadgeMessage] = msgspec.json.Decoder(BadgeMessage)
_rules_decoder: msgspec.json.Decoder[list[Rule]] = msgspec.json.Decoder(list[Rule])


@dataclass(frozen=True, slots=True)
class BadgeState:
    """What is known of one rule that a portfolio has met."""

    active: bool
    events_count: int


# By badge id, of the current version of each: what is not there has not been unlocked.
States = Mapping[str, BadgeState]


@dataclass(frozen=True, slots=True)
class Facts:
    """A portfolio's figures as rules see them; None is unknown. `nav` and the sectors are in micro-units."""

    fills: int | None = None
    streak: int | None = None
    nav: int | None = None
    sectors: Mapping[str, SectorValue] | None = None
    held_since: datetime | None = None
    sharpe: Decimal | None = None
    sector_profits: int | None = None


@dataclass(frozen=True, slots=True)
class Transition:
    """What a rule does at an instant, the figure that made it do so, and the state it leads to."""

    rule: Rule
    kind: BadgeEventKind
    figure: Decimal
    state: BadgeState
    at: datetime


@dataclass(frozen=True, slots=True)
class Proof:
    """A transition of one portfolio with its evidence: what is written in the transaction that proves it."""

    portfolio_id: str
    transition: Transition
    evidence: Evidence

    @property
    def message(self) -> BadgeMessage:
        transition = self.transition
        rule = transition.rule
        return BadgeMessage(
            event_id=event_id_of(rule, self.portfolio_id, transition.state.events_count),
            kind=transition.kind,
            portfolio_id=self.portfolio_id,
            badge_id=rule.badge_id,
            version=rule.version,
            at=transition.at,
            evidence=self.evidence,
        )


def event_id_of(rule: Rule, portfolio_id: str, events_count: int) -> str:
    return f"{rule.badge_id}:{rule.version}#{portfolio_id}#{events_count}"


# -- rules ----------------------------------------------------------------------------------------------------


def load_rules() -> list[Rule]:
    """The rules that ship with the program, in their file's order."""
    return parse_rules(files("engine").joinpath("badge_rules.json").read_bytes())


def parse_rules(text: bytes) -> list[Rule]:
    """Read a list of rules. Raises BadRuleError."""
    try:
        rules = _rules_decoder.decode(text)
    except msgspec.MsgspecError as error:
        raise BadRuleError(str(error)) from None
    seen: set[tuple[str, int]] = set()
    for rule in rules:
        check_rule(rule)
        if (rule.badge_id, rule.version) in seen:
            raise BadRuleError(f"{rule.badge_id}:{rule.version} is there twice")
        seen.add((rule.badge_id, rule.version))
    return rules


def check_rule(rule: Rule) -> None:
    """Raises BadRuleError."""
    if not all(_is_exact(of) for of in (rule.threshold, rule.minimum, rule.hysteresis)):
        raise BadRuleError(f"{rule.badge_id}:{rule.version}: a number is not finite, too large or too precise")
    for fault, said in (
        (not _IDENTIFIER.fullmatch(rule.badge_id), "badge_id is not like `first_fill`"),
        (rule.version < 1, "version is not above 0"),
        (not rule.name or not rule.description, "name and description are not empty"),
        (rule.threshold <= 0, "threshold is not above 0"),
        (rule.predicate is Predicate.NAV and not _is_exact(rule.threshold, MICRO_DIGITS), "threshold is no amount"),
        (not 0 <= rule.hysteresis <= rule.minimum < 1, "0 ≤ hysteresis ≤ minimum < 1 does not hold"),
        (rule.minimum and rule.predicate is not Predicate.SECTORS, "minimum is for SECTORS"),
        ((rule.window_days > 0) != (rule.predicate in _WINDOWED), "window_days is for HELD, SECTOR_PROFITS and SHARPE"),
        (rule.predicate is Predicate.HELD and rule.threshold != rule.window_days, "threshold is not window_days"),
    ):
        if fault:
            raise BadRuleError(f"{rule.badge_id}:{rule.version}: {said}")


_WINDOWED = DAILY | {Predicate.HELD}


def _is_exact(value: Decimal, decimals: int = DECIMALS_MAX) -> bool:
    """Whether PostgreSQL keeps the number as it is, of so many decimals."""
    return value.is_finite() and value < MAGNITUDE_MAX and value == present(value, decimals)


def current_rules(rules: Iterable[Rule]) -> list[Rule]:
    """The highest version of each badge, in the order of their first versions."""
    highest: dict[str, Rule] = {}
    for rule in rules:
        known = highest.get(rule.badge_id)
        if known is None or rule.version > known.version:
            highest[rule.badge_id] = rule
    return list(highest.values())


# -- evaluation -----------------------------------------------------------------------------------------------


def figure(rule: Rule, facts: Facts, at: datetime) -> Decimal | None:
    """What the rule compares with its threshold; None is unknown."""
    match rule.predicate:
        case Predicate.FILLS:
            return _decimal(facts.fills)
        case Predicate.STREAK:
            return _decimal(facts.streak)
        case Predicate.SECTORS:
            return None if facts.sectors is None else Decimal(sectors_above(facts.sectors, rule.minimum))
        case Predicate.HELD:
            return None if facts.held_since is None else Decimal((at - facts.held_since) // timedelta(days=1))
        case Predicate.NAV:
            return None if facts.nav is None else from_micro(facts.nav)
        case Predicate.SECTOR_PROFITS:
            return _decimal(facts.sector_profits)
        case Predicate.SHARPE:
            return facts.sharpe


def is_met(rule: Rule, reached: Decimal | None) -> bool:
    """Whether a figure meets the rule's threshold."""
    if reached is None:
        return False
    return reached > rule.threshold if rule.predicate is Predicate.SHARPE else reached >= rule.threshold


def sectors_above(sectors: Mapping[str, SectorValue], minimum: Decimal) -> int:
    """How many sectors have a weight above `minimum`: gross > minimum × Σ gross, exactly."""
    bound = EXACT.multiply(minimum, Decimal(sum(held.gross for held in sectors.values())))
    return sum(held.gross > bound for sector, held in sectors.items() if sector != UNCLASSIFIED)


def transitions(rules: Sequence[Rule], states: States, facts: Facts, at: datetime) -> list[Transition]:
    """What these (current) rules do to a portfolio of these states, in their order."""
    found = []
    for rule in rules:
        state = states.get(rule.badge_id)
        if state is not None and rule.predicate is not Predicate.SECTORS:
            continue
        if state is None or not state.active:
            reached = figure(rule, facts, at)
            if is_met(rule, reached):
                assert reached is not None
                kind = BadgeEventKind.UNLOCKED if state is None else BadgeEventKind.ACTIVATED
                found.append(_transition(rule, kind, reached, state, at))
        elif facts.sectors is not None:
            left = sectors_above(facts.sectors, rule.minimum - rule.hysteresis)
            if left < rule.threshold:
                found.append(_transition(rule, BadgeEventKind.LAPSED, Decimal(left), state, at))
    return found


# Most badges have one event for ever: they share one state.
_UNLOCKED = BadgeState(active=True, events_count=1)


def _transition(
    rule: Rule, kind: BadgeEventKind, reached: Decimal, state: BadgeState | None, at: datetime
) -> Transition:
    after = _UNLOCKED if state is None else BadgeState(kind is BadgeEventKind.ACTIVATED, state.events_count + 1)
    return Transition(rule, kind, reached, after, at)


def _decimal(count: int | None) -> Decimal | None:
    return None if count is None else Decimal(count)
