"""Every award, derived again from the ledger, classifications and snapshots (engine.badge_proofs).

Each portfolio is read in a transaction of its own, so that its ledger, its awards and its outbox are of one instant.
What a daily award rests on is read again as long as all of its window is kept; then a close without a snapshot is no
close that anything was proved with. Older ones are counted as unrecorded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import msgspec

from engine.amounts import plain
from engine.badge_proofs import (
    LAG_MAX,
    BadgeFault,
    Classification,
    FaultKind,
    Given,
    GivenAward,
    ProofCheck,
    RuleKey,
    ToldEvent,
    check_daily,
    daily_events,
    rich_since,
)
from engine.badges import DAILY, BadgeEventKind, Predicate, Rule, current_rules
from engine.instants import to_datetime, to_ns
from engine.marks import MarkQuality
from engine.portfolio import Portfolio
from engine.sessions import Sessions
from engine.stores.badge_reads import read_evidence
from engine.stores.badges_postgres import read_rules
from engine.stores.daily_figures import CHUNK_COUNT, last_close_ns
from engine.stores.daily_proofs import daily_proofs
from engine.stores.ledger_reads import ENTRY_COLUMNS, read_entry
from engine.stores.outbox import Connection

PORTFOLIOS_AT_ONCE = 500
ENTRIES_AT_ONCE = 1_000

_PORTFOLIOS = "SELECT id, base_currency FROM portfolio WHERE id > $1 ORDER BY id LIMIT $2"
_PORTFOLIO = "SELECT id, base_currency FROM portfolio WHERE id = $1"
_ENTRIES = f"""
    SELECT {ENTRY_COLUMNS} FROM ledger_entry WHERE portfolio_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3
"""  # noqa: S608 -- constants of ours
_AWARDS = "SELECT badge_id, version, awarded_at, active, evidence FROM badge_award WHERE portfolio_id = $1"
_EVENTS = """
    SELECT sequence, event_id, kind, badge_id, version, at, evidence FROM badge_event
    WHERE portfolio_id = $1 ORDER BY sequence
"""
_STATES = "SELECT badge_id, version, events_count FROM badge_state WHERE portfolio_id = $1"
_WAITING = "SELECT event_id FROM outbox WHERE key = $1"
_VERSIONS = "SELECT symbol, effective_at, sector FROM asset_version ORDER BY symbol, version"
_IS_SNAPPED = "SELECT EXISTS (SELECT FROM equity_snapshot WHERE portfolio_id = $1 AND at = $2)"
# Those that nothing else proves to have reached a NAV are few.
_RICH = """
    SELECT id FROM unnest($1::text[]) AS asked (id) WHERE EXISTS (
        SELECT FROM equity_snapshot WHERE portfolio_id = id AND nav >= $2 AND quality <> $3
    ) AND NOT EXISTS (SELECT FROM badge_state WHERE portfolio_id = id AND badge_id = $4 AND version = $5)
"""
_NAVS = """
    SELECT at, nav >= $2 AND quality <> $3 FROM equity_snapshot WHERE portfolio_id = $1 ORDER BY at
"""
# A snapshot may stand for its day where it is older than hours are kept: what a window began with is another one then.
WINDOW_MARGIN = timedelta(days=2)


@dataclass(slots=True)
class VerifiedBadges:
    """How much was looked at. `unrecorded_count`: daily proofs whose snapshots are not all kept any more."""

    portfolios_count: int = 0
    awards_count: int = 0
    events_count: int = 0
    faults_count: int = 0
    unrecorded_count: int = 0


class BadgeVerification:
    """`kept`: so long all snapshots and prices are kept. `lag_max`: see engine.badge_proofs."""

    def __init__(
        self,
        connection: Connection,
        sessions: Sessions | None,
        report: Callable[[BadgeFault], None],
        kept: timedelta,
        lag_max: timedelta = LAG_MAX,
    ) -> None:
        self._connection = connection
        self._sessions = sessions
        self._report = report
        self._kept = kept
        self._lag_max = lag_max
        self._rules: Mapping[RuleKey, Rule] = {}
        self._current: Sequence[Rule] = ()
        self._classification = Classification({})
        self.verified = VerifiedBadges()

    async def verify(
        self, portfolio_id: str | None, now: datetime, progress: Callable[[VerifiedBadges], None]
    ) -> VerifiedBadges:
        """Check one portfolio, or all; each fault is handed to `report`.

        Raises KeyError for a portfolio that does not exist.
        """
        rules = await read_rules(self._connection)
        self._rules = {(rule.badge_id, rule.version): rule for rule in rules}
        self._current = current_rules(rules)
        versions = defaultdict(list)
        for symbol, since, sector in await self._connection.fetch(_VERSIONS):
            versions[symbol].append((since, sector))
        self._classification = Classification(versions)
        if portfolio_id is not None:
            row = await self._connection.fetchrow(_PORTFOLIO, portfolio_id)
            if row is None:
                raise KeyError(portfolio_id)
            deserved = await self._deserved([portfolio_id], now)
            await self._verify_portfolio(row[0], row[1], now, deserved.get(portfolio_id, {}))
            return self.verified
        after = ""
        while rows := await self._connection.fetch(_PORTFOLIOS, after, PORTFOLIOS_AT_ONCE):
            deserved = await self._deserved([row[0] for row in rows], now)
            for name, base_currency in rows:
                try:
                    await self._verify_portfolio(name, base_currency, now, deserved.get(name, {}))
                except (msgspec.MsgspecError, ValueError, ArithmeticError) as error:
                    # Somebody has written what this program never writes.
                    self.verified.faults_count += 1
                    self._report(BadgeFault(name, "", 0, FaultKind.WRONG, f"can not be read: {error!r}"))
                progress(self.verified)
            after = rows[-1][0]
        return self.verified

    async def _deserved(self, ids: Sequence[str], now: datetime) -> dict[str, dict[RuleKey, str]]:
        """By portfolio the current rules that snapshots say are met, and what says so."""
        found: dict[str, dict[RuleKey, str]] = defaultdict(dict)
        # The job may still be at work on the last close.
        last_ns = last_close_ns(self._sessions, to_ns(now - self._lag_max))
        closed_at = to_datetime(last_close_ns(self._sessions, last_ns - 1))
        for rule in self._current:
            key = rule.badge_id, rule.version
            if rule.predicate in DAILY:
                for start in range(0, len(ids), CHUNK_COUNT):
                    part = ids[start : start + CHUNK_COUNT]
                    for proof in await daily_proofs(self._connection, rule, part, closed_at, self._sessions):
                        found[proof.portfolio_id][key] = f"at the close of {closed_at:%Y-%m-%d %H:%M}"
            elif rule.predicate is Predicate.NAV:
                missing = MarkQuality.MISSING.value
                rich = await self._connection.fetch(_RICH, ids, rule.threshold, missing, *key)
                for (name,) in rich:
                    points = await self._connection.fetch(_NAVS, name, rule.threshold, missing)
                    since = rich_since(map(tuple, points), self._lag_max)
                    if since is not None:
                        found[name][key] = f"{plain(rule.threshold)} since the snapshot of {since:%Y-%m-%d %H:%M}"
        return found

    async def _verify_portfolio(
        self, portfolio_id: str, base_currency: str, now: datetime, deserved: Mapping[RuleKey, str]
    ) -> None:
        async with self._connection.transaction(isolation="repeatable_read", readonly=True):
            given = await self._given(portfolio_id, deserved)
            portfolio = Portfolio(portfolio_id, base_currency)
            check = ProofCheck(portfolio, self._rules, self._current, given, self._classification, self._lag_max)
            after = 0
            while rows := await self._connection.fetch(_ENTRIES, portfolio_id, after, ENTRIES_AT_ONCE):
                for row in rows:
                    check.take(read_entry(row))
                after = rows[-1]["sequence"]
            faults = [*check.end(now), *await self._check_daily(portfolio_id, given.events, now)]
        for fault in faults:
            self._report(fault)
        self.verified.portfolios_count += 1
        self.verified.awards_count += len(given.awards)
        self.verified.events_count += len(given.events)
        self.verified.faults_count += len(faults)

    async def _given(self, portfolio_id: str, deserved: Mapping[RuleKey, str]) -> Given:
        fetch = self._connection.fetch
        return Given(
            awards={
                (badge_id, version): GivenAward(at, active, read_evidence(evidence))
                for badge_id, version, at, active, evidence in await fetch(_AWARDS, portfolio_id)
            },
            events=[
                ToldEvent(sequence, event_id, BadgeEventKind(kind), badge_id, version, at, read_evidence(evidence))
                for sequence, event_id, kind, badge_id, version, at, evidence in await fetch(_EVENTS, portfolio_id)
            ],
            proved={(row[0], row[1]): row[2] for row in await fetch(_STATES, portfolio_id)},
            waiting=frozenset(row[0] for row in await fetch(_WAITING, portfolio_id)),
            deserved=deserved,
        )

    async def _check_daily(self, portfolio_id: str, events: Sequence[ToldEvent], now: datetime) -> list[BadgeFault]:
        faults = []
        for event in daily_events(events, self._rules):
            rule, until = self._rules[event.key], event.evidence.until
            if until is None or last_close_ns(self._sessions, to_ns(until)) != to_ns(until):
                said = f"{until} is no close"
            elif until - timedelta(days=rule.window_days) - WINDOW_MARGIN < now - self._kept:
                self.verified.unrecorded_count += 1
                continue
            elif not await self._connection.fetchval(_IS_SNAPPED, portfolio_id, until):
                said = f"there is no snapshot of {until}"
            else:
                proofs = await daily_proofs(self._connection, rule, [portfolio_id], until, self._sessions)
                said = check_daily(event, proofs[0] if proofs else None)
            if said:
                detail = f"{event.event_id}: {said}"
                faults.append(BadgeFault(portfolio_id, *event.key, FaultKind.WRONG, detail))
        return faults
