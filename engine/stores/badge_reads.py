"""Badges as readers see them, from PostgreSQL: the rules, what a portfolio was awarded, and its events in order.

A page of events is a keyset by `sequence`, so that it costs the same wherever it lies. Rules never change and are
few: they are remembered for RULES_LIFETIME_S, and read anew when an event names one that is not known.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from engine.badges import BadgeEventKind, Evidence, Rule, current_rules
from engine.stores.badges_postgres import read_rules
from engine.stores.ledger_reads import PoolSource

RULES_LIFETIME_S = 30

RuleKey = tuple[str, int]

_AWARDS = """
    SELECT badge_id, version, awarded_at, active, evidence FROM badge_award WHERE portfolio_id = $1
"""
_COUNTS = """
    SELECT ledger_sequence, fills, streak, (SELECT min(held_since) FROM position WHERE portfolio_id = $1)
    FROM portfolio WHERE id = $1
"""
_AFTER = """
    SELECT sequence, event_id, kind, badge_id, version, at, evidence
    FROM badge_event WHERE portfolio_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3
"""
_LAST = "SELECT coalesce(max(sequence), 0) FROM badge_event WHERE portfolio_id = $1"

_evidence_decoder: msgspec.json.Decoder[Evidence] = msgspec.json.Decoder(Evidence)


@dataclass(frozen=True, slots=True)
class Award:
    """A badge that a portfolio has for good; `active` may lapse and come back."""

    badge_id: str
    version: int
    awarded_at: datetime
    active: bool
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Counts:
    """What its ledger counts of a portfolio, after `ledger_sequence` entries; `held_since` None: it holds nothing."""

    ledger_sequence: int
    fills: int
    streak: int
    held_since: datetime | None


@dataclass(frozen=True, slots=True)
class BookedEvent:
    """A row of badge_event; `sequence` counts the portfolio's."""

    portfolio_id: str
    sequence: int
    event_id: str
    kind: BadgeEventKind
    badge_id: str
    version: int
    at: datetime
    evidence: Evidence


class BadgeReads:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away."""

    def __init__(self, pool: PoolSource) -> None:
        self._pool = pool
        self._rules: dict[RuleKey, Rule] = {}
        self._read_at_s = -float(RULES_LIFETIME_S)

    async def rules(self, needed: Sequence[RuleKey] = ()) -> Mapping[RuleKey, Rule]:
        """Every version of every rule; those `needed` are there when PostgreSQL has them."""
        old = time.monotonic() - self._read_at_s >= RULES_LIFETIME_S
        if old or any(key not in self._rules for key in needed):
            async with self._pool().acquire() as connection:
                found = await read_rules(connection)
            self._rules = {(rule.badge_id, rule.version): rule for rule in found}
            self._read_at_s = time.monotonic()
        return self._rules

    async def current_rules(self) -> list[Rule]:
        """The highest version of each badge."""
        return current_rules((await self.rules()).values())

    async def awards(self, portfolio_id: str) -> dict[RuleKey, Award]:
        rows = await self._pool().fetch(_AWARDS, portfolio_id)
        awards = [
            Award(badge_id, version, awarded_at, active, read_evidence(evidence))
            for badge_id, version, awarded_at, active, evidence in rows
        ]
        return {(award.badge_id, award.version): award for award in awards}

    async def counts(self, portfolio_id: str) -> Counts:
        row = await self._pool().fetchrow(_COUNTS, portfolio_id)
        return Counts(0, 0, 0, None) if row is None else Counts(*row)

    async def after(self, portfolio_id: str, sequence: int, count_max: int) -> list[BookedEvent]:
        """At most `count_max` events with a sequence above `sequence`, in order."""
        rows = await self._pool().fetch(_AFTER, portfolio_id, sequence, count_max)
        return [
            BookedEvent(
                portfolio_id, at, event_id, BadgeEventKind(kind), badge, version, took_place, read_evidence(text)
            )
            for at, event_id, kind, badge, version, took_place, text in rows
        ]

    async def last_sequence(self, portfolio_id: str) -> int:
        """The sequence of the newest event; 0 when there is none."""
        return int(await self._pool().fetchval(_LAST, portfolio_id))


def read_evidence(text: str) -> Evidence:
    """Evidence from its column."""
    return _evidence_decoder.decode(text)
