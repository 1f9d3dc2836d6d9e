"""Badges of a portfolio (engine.badges): how far each one is, and what happened to them, as a lossless stream.

`badgeEvents` reads PostgreSQL when the channel `badges` says that there is something, and every BADGE_POLL_INTERVAL_S
besides, so that it goes on when Redis is away. It sends every event once, in the order of `sequence`; a client that was
away gives the last cursor it saw and gets all that came since, on any node.

`badgeProgress` is a state stream. What its figures are made of is read again when a mark includes more of the ledger,
and when there is a badge event; what is judged once a day, when a session has closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.badges import Evidence, Facts, Rule
from engine.badges import figure as figure_of
from engine.instants import to_datetime
from engine.marks import Mark, MarkQuality
from engine.stores.badge_reads import Award, BookedEvent, Counts, RuleKey
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, Info
from resolvers.enums import BadgeEventKind, BadgePredicate, Rarity
from resolvers.errors import AWAY
from resolvers.nav import not_ready
from resolvers.pages import read_sequence_cursor, write_cursor
from resolvers.stream_kind import StreamKind
from resolvers.streams import kind_of, make_pace

BADGE_POLL_INTERVAL_S = 15
EVENT_BATCH_COUNT_MAX = 200
FIGURE_DECIMALS = 10


@strawberry.type(description="One version of a badge: a rule that never changes.")
class Badge:
    badge_id: str = strawberry.field(description="Which badge it is, in all its versions.")
    version: int = strawberry.field(description="The version of its rule; each is awarded for itself.")
    name: str = strawberry.field(description="What it is called.")
    description: str = strawberry.field(description="What it is awarded for.")
    rarity: Rarity = strawberry.field(description="How much of a feat it is.")


@strawberry.type(description="A sector as it stood when a badge was proved.")
class BadgeEvidenceSector:
    sector: str = strawberry.field(description="The sector.")
    value: Decimal = strawberry.field(
        description="Σ marketValue of its positions; for SECTOR_PROFITS its P&L over the window."
    )
    gross: Decimal | None = strawberry.field(description="Σ |marketValue| of its positions.")
    weight: Decimal | None = strawberry.field(description="gross / Σ gross of all sectors.")


@strawberry.type(description="A price that a badge was proved with.")
class BadgeEvidencePrice:
    symbol: str = strawberry.field(description="The asset.")
    price: Decimal | None = strawberry.field(description="Its price; null: there was none, and its cost counted.")


@strawberry.type(
    description=(
        "What a badge event rests on: enough to compute it again from the ledger up to ledgerSequence. What does not "
        "belong to the predicate is null or empty."
    )
)
class BadgeEvidence:
    predicate: BadgePredicate = strawberry.field(description="What was compared with the threshold.")
    figure: Decimal = strawberry.field(description="The figure that was reached.")
    threshold: Decimal = strawberry.field(description="The threshold of the rule.")
    event_id: strawberry.ID | None = strawberry.field(description="The event of the ledger that proved it.")
    ledger_sequence: int | None = strawberry.field(description="How many entries the ledger had, that one included.")
    sectors: list[BadgeEvidenceSector] = strawberry.field(description="The sectors that were compared.")
    prices: list[BadgeEvidencePrice] = strawberry.field(description="The prices that sectors or NAV were valued at.")
    nav: Decimal | None = strawberry.field(description="NAV.")
    symbol: str | None = strawberry.field(description="HELD: the position that was held so long.")
    opened_at: datetime | None = strawberry.field(description="HELD: when its cycle began.")
    since: datetime | None = strawberry.field(description="Where the window began; HELD: since when it is held.")
    until: datetime | None = strawberry.field(description="Where the window ended.")


@strawberry.type(description="How far a portfolio is with a badge, by the current version of its rule.")
class BadgeProgress:
    badge: Badge = strawberry.field(description="The badge.")
    predicate: BadgePredicate = strawberry.field(
        description=(
            "What is counted. FILLS: fills that were not reversed. STREAK: profitable closes in a row. SECTORS: "
            "sectors above the rule's minimum weight at the last fill. HELD: days since the fill that opened the "
            "oldest open position was executed and booked, whichever was later. NAV: NAV. SECTOR_PROFITS: sectors "
            "with positive P&L over the window. SHARPE: the Sharpe ratio over the window. The last two are of the "
            "last session close."
        )
    )
    figure: Decimal | None = strawberry.field(description="What it has reached now; null while that is unknown.")
    threshold: Decimal = strawberry.field(description="What figure must reach; SHARPE: exceed.")
    awarded_at: datetime | None = strawberry.field(description="When it was awarded, for good; null: not yet.")
    active: bool = strawberry.field(
        description="Awarded, and in force: SECTORS lapses when too few sectors are left, and comes back. false before."
    )
    evidence: BadgeEvidence | None = strawberry.field(description="What it was awarded for; null before.")


@strawberry.type(description="A message of badgeEvents: what happened to one badge, and where to resume after it.")
class BadgeEvent:
    kind: BadgeEventKind = strawberry.field(description="What happened.")
    cursor: str = strawberry.field(description="Opaque; give it as `after` to resume behind this event.")
    event_id: strawberry.ID = strawberry.field(description="The same however often the event is told.")
    at: datetime = strawberry.field(description="When it was proved.")
    portfolio_id: str = strawberry.field(description="Whose badge it is.")
    badge: Badge = strawberry.field(description="The badge.")
    evidence: BadgeEvidence = strawberry.field(description="What it rests on.")


@strawberry.type(description="A message of badgeProgress.")
class BadgeProgressUpdate:
    kind: StreamKind = strawberry.field(description="Why it was sent.")
    portfolio_id: str = strawberry.field(description="Whose badges these are.")
    badges: list[BadgeProgress] = strawberry.field(description="All badges, as in Portfolio.badges.")
    conflated: int = strawberry.field(description="How many marks this message stands for.")


@dataclass(frozen=True, slots=True)
class Standing:
    """All that progress is shown from, but for NAV."""

    rules: Sequence[Rule]
    awards: Mapping[RuleKey, Award]
    counts: Counts
    facts: Facts


async def load_badges(context: Context, portfolio: PortfolioIdentity) -> list[BadgeProgress]:
    """The progress of every current rule. Raises PublicError NOT_READY."""
    place = (portfolio.shard, portfolio.portfolio_id)
    mark, standing = await asyncio.gather(context.hot.mark(place), _load_standing(context, portfolio))
    if mark is None:
        raise not_ready()
    return _progress(standing, mark, to_datetime(context.services.clock.now_ns()))


async def badge_events(info: Info, portfolio_id: str, after: str | None = None) -> AsyncIterator[BadgeEvent]:
    context = info.context
    await context.portfolio(portfolio_id)
    badges, signal = context.services.badges, asyncio.Event()
    sent = None if after is None else read_sequence_cursor("badges", after)
    with context.services.hub.watch_badges(portfolio_id, signal):
        if sent is None:
            sent = await badges.last_sequence(portfolio_id)
        while True:
            signal.clear()
            events = await _read_after(context, portfolio_id, sent)
            for event, rule in events:
                sent = event.sequence
                yield _show_event(event, rule)
            if len(events) < EVENT_BATCH_COUNT_MAX:
                with suppress(TimeoutError):
                    async with asyncio.timeout(BADGE_POLL_INTERVAL_S):
                        await signal.wait()


async def badge_progress(
    info: Info, portfolio_id: str, max_rate_hz: float | None = None
) -> AsyncIterator[BadgeProgressUpdate]:
    context = info.context
    portfolio = await context.portfolio(portfolio_id)
    services, signal, awarded = context.services, asyncio.Event(), asyncio.Event()
    pace = make_pace(context, max_rate_hz, signal)
    last: Mark | None = None
    standing: Standing | None = None
    shown: list[BadgeProgress] = []
    stands_for = 0
    hub = services.hub
    with (
        hub.watch_portfolio(portfolio.shard, portfolio_id, signal) as watch,
        hub.watch_badges(portfolio_id, signal),
        hub.watch_badges(portfolio_id, awarded),
    ):
        while True:
            changed = await pace.changed()
            taken = watch.take() if changed else None
            mark = last if taken is None else taken[0]
            if mark is None or not (changed or watch.current):
                continue
            kind = kind_of(last, mark) if changed else StreamKind.HEARTBEAT
            grown = standing is None or mark.ledger_sequence != standing.counts.ledger_sequence
            if grown or awarded.is_set() or not changed:
                awarded.clear()
                try:
                    standing = await _load_standing(context, portfolio)
                except AWAY:
                    # What is known stays; the next change, or the heartbeat, asks again.
                    if standing is None:
                        signal.set()
                        continue
            assert standing is not None
            last, stands_for = mark, stands_for + (0 if taken is None else taken[1])
            badges = _progress(standing, mark, to_datetime(services.clock.now_ns()))
            if kind is StreamKind.UPDATE and badges == shown:
                continue
            conflated = 0 if kind is StreamKind.HEARTBEAT else stands_for or 1
            shown, stands_for = badges, 0
            pace.sending()
            yield BadgeProgressUpdate(kind=kind, portfolio_id=portfolio_id, badges=badges, conflated=conflated)


async def _load_standing(context: Context, portfolio: PortfolioIdentity) -> Standing:
    services, name = context.services, portfolio.portfolio_id
    hot = await services.hot_state.read(sectors=[(portfolio.shard, name)])
    rules, awards, counts = await asyncio.gather(
        services.badges.current_rules(), services.badges.awards(name), services.badges.counts(name)
    )
    daily = await services.daily_figures.of(name, rules, services.clock.now_ns())
    facts = Facts(
        fills=counts.fills,
        streak=counts.streak,
        sectors=hot.sectors[(portfolio.shard, name)],
        held_since=counts.held_since,
        sharpe=daily.sharpe,
        sector_profits=daily.sector_profits,
    )
    return Standing(rules, awards, counts, facts)


def _progress(standing: Standing, mark: Mark, now: datetime) -> list[BadgeProgress]:
    seen = standing.facts
    facts = Facts(
        seen.fills,
        seen.streak,
        None if mark.quality is MarkQuality.MISSING else mark.nav,
        seen.sectors,
        seen.held_since,
        seen.sharpe,
        seen.sector_profits,
    )
    return [
        _show_progress(rule, facts, standing.awards.get((rule.badge_id, rule.version)), now) for rule in standing.rules
    ]


async def _read_after(context: Context, portfolio_id: str, sequence: int) -> list[tuple[BookedEvent, Rule]]:
    badges = context.services.badges
    try:
        events = await badges.after(portfolio_id, sequence, EVENT_BATCH_COUNT_MAX)
        rules = await badges.rules([(event.badge_id, event.version) for event in events])
    except AWAY:
        # The stream outlives the outage: the next round reads from the same place.
        return []
    return [(event, rules[(event.badge_id, event.version)]) for event in events]


def _show_progress(rule: Rule, facts: Facts, award: Award | None, now: datetime) -> BadgeProgress:
    return BadgeProgress(
        badge=_show_badge(rule),
        predicate=rule.predicate,
        figure=figure_of(rule, facts, now),
        threshold=rule.threshold,
        awarded_at=None if award is None else award.awarded_at,
        active=award is not None and award.active,
        evidence=None if award is None else _show_evidence(award.evidence),
    )


def _show_event(event: BookedEvent, rule: Rule) -> BadgeEvent:
    return BadgeEvent(
        kind=event.kind,
        cursor=write_cursor("badges", event.sequence),
        event_id=strawberry.ID(event.event_id),
        at=event.at,
        portfolio_id=event.portfolio_id,
        badge=_show_badge(rule),
        evidence=_show_evidence(event.evidence),
    )


def _show_badge(rule: Rule) -> Badge:
    return Badge(
        badge_id=rule.badge_id,
        version=rule.version,
        name=rule.name,
        description=rule.description,
        rarity=rule.rarity,
    )


def _show_evidence(evidence: Evidence) -> BadgeEvidence:
    return BadgeEvidence(
        predicate=evidence.predicate,
        figure=Decimal(evidence.figure),
        threshold=Decimal(evidence.threshold),
        event_id=None if evidence.event_id is None else strawberry.ID(evidence.event_id),
        ledger_sequence=evidence.ledger_sequence,
        sectors=[
            BadgeEvidenceSector(
                sector=one.sector, value=Decimal(one.value), gross=_decimal(one.gross), weight=_decimal(one.weight)
            )
            for one in evidence.sectors or ()
        ],
        prices=[
            BadgeEvidencePrice(symbol=symbol, price=_decimal(price))
            for symbol, price in sorted((evidence.prices or {}).items())
        ],
        nav=_decimal(evidence.nav),
        symbol=evidence.symbol,
        opened_at=evidence.opened_at,
        since=evidence.since,
        until=evidence.until,
    )


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)
