"""What a resolver gets: who asks, the process's services, and loaders that live as long as one operation.

The protocols below are what resolvers need of the API; `api` implements them, so that resolvers never import it.
A socket carries many operations: a `Context` is made anew for each, because what a loader has read stays read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import strawberry

from engine.marks import Mark
from engine.messages import Quote
from engine.runtime.addresses import HostNames
from engine.runtime.clock import Clock
from engine.runtime.settings import Settings
from engine.stores.badge_reads import BadgeReads
from engine.stores.daily_figures import DailyFigureReads
from engine.stores.events_kafka import EventProducer
from engine.stores.hot_state_reads import HotStateReads
from engine.stores.ledger_reads import LedgerReads, PortfolioIdentity
from engine.stores.reconciliation_reads import ReconciliationReads
from engine.stores.snapshots_reads import SnapshotsReads
from engine.stores.thresholds_postgres import PortfolioThresholds
from engine.stores.webhooks_postgres import Webhooks
from resolvers.as_of import PastLoader, PastReads
from resolvers.errors import ErrorCode, PublicError, not_found
from resolvers.loaders import AssetCatalogue, HotLoader, PortfolioDirectory
from resolvers.lots import LotsLoader

SCOPE_PORTFOLIO_READ = "portfolio:read"
SCOPE_LEDGER_READ = "ledger:read"
SCOPE_LEDGER_WRITE = "ledger:write"
SCOPE_WEBHOOKS_WRITE = "webhooks:write"


class Access(Protocol):
    """The caller's identity and rights. api/auth.py decides; resolvers ask."""

    @property
    def subject(self) -> str: ...

    @property
    def scopes(self) -> frozenset[str]: ...

    @property
    def sees_all(self) -> bool:
        """True for an administrator, who sees everybody's portfolios."""

    def holds(self, scope: str) -> bool: ...

    def may_see(self, owner: str) -> bool: ...


class MarkWatch(Protocol):
    @property
    def current(self) -> bool:
        """Whether what was taken last still holds: its shard's channel is listened to and not silent. When it
        becomes so again, there is something to take, if only the same mark."""

    def waiting_count(self) -> int:
        """How many marks came since the last take."""

    def take(self) -> tuple[Mark, int] | None:
        """The newest mark since the last take and how many it stands for; None when there was none."""

    def latency_ms(self, now_ns: int) -> float | None:
        """How long before `now_ns`, wall time, the oldest quote was that moved the mark taken last; None when it is not
        known, or none did."""


class QuoteWatch(Protocol):
    @property
    def current(self) -> bool:
        """As MarkWatch.current; what there is to take then may be no quote at all."""

    def take(self) -> tuple[dict[str, Quote], int] | None:
        """The newest quote of each symbol quoted since the last take and how many quotes there were; None when
        there was nothing. The first is the snapshot: complete, and empty where nothing was ever quoted."""

    def change(self, symbols: Collection[str]) -> None:
        """Watch these symbols from now on instead."""


class Hub(Protocol):
    """Fans hot state out inside this process. A watch sets `signal` when there is something to take."""

    def watch_portfolio(
        self, shard: int, portfolio_id: str, signal: asyncio.Event
    ) -> AbstractContextManager[MarkWatch]: ...

    def watch_badges(self, portfolio_id: str, signal: asyncio.Event) -> AbstractContextManager[None]:
        """Set `signal` when there may be new badge events; also when it is not known."""

    def watch_quotes(self, symbols: Collection[str], signal: asyncio.Event) -> AbstractContextManager[QuoteWatch]: ...


class LiveDelivery(Protocol):
    """Takes over a stream of marks whose selection it can compile, and sends its messages past graphql-core."""

    def compile(self, info: Info) -> object | None:
        """What the operation shows of a mark; None when graphql-core has to make its messages."""

    async def deliver(self, portfolio: PortfolioIdentity, projection: object, interval_s: float) -> None:
        """Send the operation's messages, `interval_s` between two, until it ends: it is cancelled."""


@dataclass(frozen=True, slots=True)
class Services:
    """What a process has one of."""

    settings: Settings
    clock: Clock
    hot_state: HotStateReads
    ledger: LedgerReads
    snapshots: SnapshotsReads
    assets: AssetCatalogue
    portfolios: PortfolioDirectory
    events: EventProducer
    hub: Hub
    past: PastReads
    reconciliations: ReconciliationReads
    badges: BadgeReads
    daily_figures: DailyFigureReads
    webhooks: Webhooks
    host_names: HostNames
    thresholds: PortfolioThresholds


@dataclass(frozen=True, slots=True)
class Context:
    """One operation's context. `access` is None for a caller without a token, who gets introspection only.

    `hot` is the present state, or under `asOf` one portfolio's past.
    """

    services: Services
    hot: HotLoader | PastLoader
    lots: LotsLoader
    access: Access | None
    request_id: str
    streaming: bool  # whether answers may follow each other, which takes a WebSocket
    live: LiveDelivery | None = None

    def require(self, scope: str) -> Access:
        """The caller, when it holds `scope`. Raises PublicError UNAUTHENTICATED, FORBIDDEN."""
        if self.access is None:
            raise PublicError(ErrorCode.UNAUTHENTICATED, "a token is needed")
        if not self.access.holds(scope):
            raise PublicError(ErrorCode.FORBIDDEN, f"the token lacks the scope {scope}")
        return self.access

    async def portfolio(self, portfolio_id: str, scope: str = SCOPE_PORTFOLIO_READ) -> PortfolioIdentity:
        """A portfolio that the caller may see. Raises PublicError NOT_FOUND, UNAUTHENTICATED, FORBIDDEN."""
        access = self.require(scope)
        identity = await self.services.portfolios.find(portfolio_id)
        if identity is None or not access.may_see(identity.owner):
            raise not_found("portfolio")
        return identity


Info = strawberry.Info[Context, None]
