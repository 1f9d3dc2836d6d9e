"""Every award, derived again from the ledger, classifications and snapshots (engine.badge_proofs).

Each portfolio is read in a transaction of its own, so that its ledger, its awards and its outbox are of one instant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import msgspec

from engine.badge_proofs import (
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
)
from engine.badges import BadgeEventKind, Predicate, Rule, current_rules
from engine.portfolio import Portfolio
from engine.sessions import Sessions
from engine.stores.badge_reads import read_evidence
from engine.stores.badges_postgres import read_rules
from engine.stores.daily_figures import read_sector_profits, read_sharpe
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
    SELECT event_id, kind, badge_id, version, at, evidence FROM badge_event WHERE portfolio_id = $1 ORDER BY sequence
"""
_STATES = "SELECT badge_id, version, events_count FROM badge_state WHERE portfolio_id = $1"
_WAITING = "SELECT event_id FROM outbox WHERE key = $1"
_VERSIONS = "SELECT symbol, effective_at, sector FROM asset_version ORDER BY symbol, version"
_IS_SNAPPED = "SELECT EXISTS (SELECT FROM equity_snapshot WHERE portfolio_id = $1 AND at = $2)"


@dataclass(slots=True)
class VerifiedBadges:
    """How much was looked at. `unrecorded_count`: daily proofs whose snapshots are not kept any more."""

    portfolios_count: int = 0
    awards_count: int = 0
    events_count: int = 0
    faults_count: int = 0
    unrecorded_count: int = 0


class BadgeVerification:
    def __init__(self, connection: Connection, sessions: Sessions | None, report: Callable[[BadgeFault], None]) -> None:
        self._connection = connection
        self._sessions = sessions
        self._report = report
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
            await self._verify_portfolio(row[0], row[1], now)
            return self.verified
        after = ""
        while rows := await self._connection.fetch(_PORTFOLIOS, after, PORTFOLIOS_AT_ONCE):
            for name, base_currency in rows:
                try:
                    await self._verify_portfolio(name, base_currency, now)
                except (msgspec.MsgspecError, ValueError, ArithmeticError) as error:
                    # Somebody has written what this program never writes.
                    self.verified.faults_count += 1
                    self._report(BadgeFault(name, "", 0, FaultKind.WRONG, f"can not be read: {error!r}"))
                progress(self.verified)
            after = rows[-1][0]
        return self.verified

    async def _verify_portfolio(self, portfolio_id: str, base_currency: str, now: datetime) -> None:
        async with self._connection.transaction(isolation="repeatable_read", readonly=True):
            given = await self._given(portfolio_id)
            portfolio = Portfolio(portfolio_id, base_currency)
            check = ProofCheck(portfolio, self._rules, self._current, given, self._classification)
            after = 0
            while rows := await self._connection.fetch(_ENTRIES, portfolio_id, after, ENTRIES_AT_ONCE):
                for row in rows:
                    check.take(read_entry(row))
                after = rows[-1]["sequence"]
            faults = [*check.end(now), *await self._check_daily(portfolio_id, given.events)]
        for fault in faults:
            self._report(fault)
        self.verified.portfolios_count += 1
        self.verified.awards_count += len(given.awards)
        self.verified.events_count += len(given.events)
        self.verified.faults_count += len(faults)

    async def _given(self, portfolio_id: str) -> Given:
        fetch = self._connection.fetch
        return Given(
            awards={
                (badge_id, version): GivenAward(at, active, read_evidence(evidence))
                for badge_id, version, at, active, evidence in await fetch(_AWARDS, portfolio_id)
            },
            events=[
                ToldEvent(event_id, BadgeEventKind(kind), badge_id, version, at, read_evidence(evidence))
                for event_id, kind, badge_id, version, at, evidence in await fetch(_EVENTS, portfolio_id)
            ],
            proved={(row[0], row[1]): row[2] for row in await fetch(_STATES, portfolio_id)},
            waiting=frozenset(row[0] for row in await fetch(_WAITING, portfolio_id)),
        )

    async def _check_daily(self, portfolio_id: str, events: Sequence[ToldEvent]) -> list[BadgeFault]:
        faults = []
        for event in daily_events(events, self._rules):
            rule, until = self._rules[event.key], event.evidence.until
            if until is not None and not await self._connection.fetchval(_IS_SNAPPED, portfolio_id, until):
                self.verified.unrecorded_count += 1
                continue
            reached = None if until is None else await self._daily_figure(rule, portfolio_id, until)
            said = check_daily(rule, event.evidence, reached)
            if said:
                detail = f"{event.event_id}: {said}"
                faults.append(BadgeFault(portfolio_id, *event.key, FaultKind.WRONG, detail))
        return faults

    async def _daily_figure(self, rule: Rule, portfolio_id: str, until: datetime) -> Decimal | None:
        ids, days = [portfolio_id], rule.window_days
        if rule.predicate is Predicate.SHARPE:
            return (await read_sharpe(self._connection, ids, until, days, self._sessions)).get(portfolio_id)
        profits = (await read_sector_profits(self._connection, ids, until, days)).get(portfolio_id)
        return None if profits is None else Decimal(profits.count)
