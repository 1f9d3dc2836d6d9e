"""Reads shared by the resolvers.

`HotLoader` lives as long as one operation: what its resolvers ask of hot state in the same turn of the loop
becomes one pipeline, and one portfolio's mark, positions and quotes are read once, so that the figures of one
answer belong together. `AssetCatalogue` and `PortfolioDirectory` live as long as the process and remember what
rarely changes.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Literal, cast

from strawberry.dataloader import DataLoader

from engine.assets import Asset, AssetClass, load_catalogue, unclassified
from engine.instants import SECOND_NS
from engine.markets import Markets
from engine.marks import Mark
from engine.messages import Quote
from engine.positions import HotPosition, PositionValuation, value_position
from engine.runtime.clock import Clock
from engine.sectors import SectorValue
from engine.sessions import Sessions
from engine.stores.assets_postgres import classified_at, get_assets, list_assets, versions_after
from engine.stores.hot_state_reads import HotStateReads, Place
from engine.stores.ledger_reads import LedgerReads, PoolSource, PortfolioIdentity
from resolvers.errors import AWAY

CATALOGUE_REFRESH_INTERVAL_S = 4  # a reclassified asset shows this late at most
CATALOGUE_MISS_INTERVAL_S = 1  # unknown symbols are looked up together, and no oftener than this
CATALOGUE_COUNT_MAX = 20_000
DIRECTORY_COUNT_MAX = 50_000
DIRECTORY_PAGE_COUNT = 2_000
# A portfolio opened through this process a moment ago may not be booked yet: how long a write to it waits.
BOOKING_WAIT_S = 5
BOOKING_POLL_INTERVAL_MS = 50
EXPECTED_COUNT_MAX = 1_000

_Part = Literal["mark", "positions", "sectors"]


class ValuedPositions:
    """The positions of a portfolio at one set of quotes, beside the mark they belong to. Each is valued when asked."""

    def __init__(
        self,
        mark: Mark,
        held: dict[str, HotPosition],
        quotes: Mapping[str, Quote],
        now_ns: int,
        stale_after_ns: int,
        sessions: Callable[[str], Sessions | None],
    ) -> None:
        self.mark = mark
        self.symbols = sorted(held)
        self._held = held
        self._quotes = quotes
        self._now_ns = now_ns
        self._stale_after_ns = stale_after_ns
        self._sessions = sessions
        self._valued: dict[str, PositionValuation] = {}

    def value(self, symbol: str) -> PositionValuation:
        """Raises KeyError for a symbol that is not held."""
        valued = self._valued.get(symbol)
        if valued is None:
            held, quote, sessions = self._held[symbol], self._quotes.get(symbol), self._sessions(symbol)
            valued = value_position(symbol, held, quote, self.mark.nav, self._now_ns, self._stale_after_ns, sessions)
            self._valued[symbol] = valued
        return valued


class HotLoader:
    def __init__(self, hot_state: HotStateReads, clock: Clock, stale_after_s: int, assets: AssetCatalogue) -> None:
        self._clock = clock
        self._stale_after_ns = stale_after_s * SECOND_NS
        self._assets = assets
        # Their functions do not know the loader: it and all that an operation read would be a cycle, and those are
        # looked for and freed by the thousand, with everybody waiting.
        self._loader: DataLoader[tuple[_Part, Place], object] = DataLoader(partial(_load, hot_state))
        self._quotes: DataLoader[tuple[str, ...], Mapping[str, Quote]] = DataLoader(partial(_load_quotes, hot_state))
        self._valued: dict[Place, asyncio.Task[ValuedPositions | None]] = {}

    async def mark(self, place: Place) -> Mark | None:
        return cast(Mark | None, await self._loader.load(("mark", place)))

    async def sectors(self, place: Place) -> dict[str, SectorValue]:
        return cast(dict[str, SectorValue], await self._loader.load(("sectors", place)))

    async def assets(self, symbols: Collection[str]) -> dict[str, Asset]:
        """Of each symbol the asset as it is classified at present."""
        await self._assets.ensure(symbols)
        return {symbol: self._assets.get(symbol) for symbol in symbols}

    async def valued_positions(self, place: Place) -> ValuedPositions | None:
        """The portfolio's positions at the latest quotes; None as long as it has no mark."""
        if place not in self._valued:
            self._valued[place] = asyncio.ensure_future(self._value(place))
        return await asyncio.shield(self._valued[place])

    async def _value(self, place: Place) -> ValuedPositions | None:
        keys: list[tuple[_Part, Place]] = [("mark", place), ("positions", place)]
        mark, positions = await self._loader.load_many(keys)
        if mark is None:
            return None
        mark, held = cast(Mark, mark), cast(dict[str, HotPosition], positions)
        quotes = await self._quotes.load(tuple(held))
        await self._assets.ensure(held)
        now_ns = self._clock.now_ns()
        return ValuedPositions(mark, held, quotes, now_ns, self._stale_after_ns, self._assets.sessions)


async def _load_quotes(hot_state: HotStateReads, wanted: list[tuple[str, ...]]) -> Sequence[Mapping[str, Quote]]:
    """One read for all portfolios: most hold the same symbols, and each read takes a connection."""
    quotes = await hot_state.quotes(symbol for symbols in wanted for symbol in symbols)
    return [quotes] * len(wanted)


async def _load(hot_state: HotStateReads, keys: list[tuple[_Part, Place]]) -> Sequence[object]:
    wanted: dict[_Part, list[Place]] = {"mark": [], "positions": [], "sectors": []}
    for part, place in keys:
        wanted[part].append(place)
    found = await hot_state.read(marks=wanted["mark"], positions=wanted["positions"], sectors=wanted["sectors"])
    by_part: dict[_Part, Mapping[Place, object]] = {
        "mark": found.marks,
        "positions": found.positions,
        "sectors": found.sectors,
    }
    return [by_part[part][place] for part, place in keys]


class AssetCatalogue:
    """Assets by symbol, beginning with the catalogue that ships with the program.

    PostgreSQL says what was loaded; `refresh` asks it for what is new. Symbols that are not remembered are looked up in
    Redis first, which has what was loaded too, and goes on having it while PostgreSQL is away. At most
    CATALOGUE_COUNT_MAX are remembered. A symbol that nobody knows is UNCLASSIFIED, as the ledger books it.
    """

    def __init__(self, pool: PoolSource, hot_state: HotStateReads, markets: Markets) -> None:
        self._pool = pool
        self._hot_state = hot_state
        self._markets = markets
        self._assets: dict[str, Asset] = load_catalogue()
        self._arrival = 0
        self._unknown: set[str] = set()
        self._lookup_at_s = 0.0
        self._watching: list[asyncio.Event] = []

    def get(self, symbol: str) -> Asset:
        """The asset as it is known at present, without a read."""
        return self._assets.get(symbol) or unclassified(symbol)

    def sessions(self, symbol: str) -> Sessions | None:
        """Those that the asset's class trades in, as far as it is known at present; None: always open."""
        return self._markets.sessions(self.get(symbol).asset_class)

    async def ensure(self, symbols: Iterable[str]) -> None:
        """Look up those of `symbols` that are not known yet, unless a look-up was just made."""
        self._unknown.update(symbol for symbol in symbols if symbol not in self._assets)
        if not self._unknown or time.monotonic() - self._lookup_at_s < CATALOGUE_MISS_INTERVAL_S:
            return
        self._lookup_at_s = time.monotonic()
        unknown, self._unknown = list(self._unknown)[:CATALOGUE_COUNT_MAX], set()
        await self._look_up(unknown)

    async def find(self, symbol: str) -> Asset | None:
        """The asset if there is one, looked up when it is not known."""
        return self._assets.get(symbol) or (await self._look_up([symbol])).get(symbol)

    async def in_force(self, symbols: Collection[str], at: datetime) -> dict[str, Asset]:
        """Of each symbol the asset as it was classified at an instant."""
        then = await classified_at(self._pool(), symbols, at) if symbols else {}
        return {symbol: then.get(symbol) or self.get(symbol) for symbol in symbols}

    async def page(self, count_max: int, after: str, asset_class: AssetClass | None, sector: str | None) -> list[Asset]:
        return await list_assets(self._pool(), count_max, after, asset_class, sector)

    async def refresh(self) -> None:
        """Learn what was loaded since the last time. Raises what asyncpg raises when PostgreSQL is away."""
        arrived = await versions_after(self._pool(), self._arrival)
        if arrived:
            self._remember(one.asset for one in arrived)
            self._arrival = arrived[-1].arrival
            for signal in self._watching:
                signal.set()

    @property
    def arrival(self) -> int:
        """Grows when assets were loaded."""
        return self._arrival

    @contextmanager
    def watch(self, signal: asyncio.Event) -> Iterator[None]:
        """Set `signal` when assets were loaded, or came into being."""
        self._watching.append(signal)
        try:
            yield
        finally:
            self._watching.remove(signal)

    async def _look_up(self, symbols: Sequence[str]) -> dict[str, Asset]:
        found: dict[str, Asset] = {}
        with suppress(*AWAY):
            found = await self._hot_state.assets(symbols)
        if missing := [symbol for symbol in symbols if symbol not in found]:
            found |= await get_assets(self._pool(), missing)
        self._remember(found.values())
        return found

    def _remember(self, assets: Iterable[Asset]) -> None:
        for asset in assets:
            if asset.symbol in self._assets or len(self._assets) < CATALOGUE_COUNT_MAX:
                self._assets[asset.symbol] = asset


class PortfolioDirectory:
    """Portfolio identities, which never change: DIRECTORY_COUNT_MAX of them are remembered, others asked for."""

    def __init__(self, ledger: LedgerReads) -> None:
        self._ledger = ledger
        self._known: OrderedDict[str, PortfolioIdentity] = OrderedDict()
        self._expected: OrderedDict[str, None] = OrderedDict()

    async def fill(self) -> None:
        """Remember as many as there is room for, before anybody asks. Raises what asyncpg raises when PostgreSQL is
        away."""
        after = ""
        while len(self._known) <= DIRECTORY_COUNT_MAX - DIRECTORY_PAGE_COUNT:
            page = await self._ledger.portfolios(None, DIRECTORY_PAGE_COUNT, after)
            for identity in page:
                self.remember(identity)
            if len(page) < DIRECTORY_PAGE_COUNT:
                return
            after = page[-1].portfolio_id

    async def find(self, portfolio_id: str) -> PortfolioIdentity | None:
        known = self._known.get(portfolio_id)
        if known is not None:
            self._known.move_to_end(portfolio_id)
            return known
        # A text with NUL is no identifier, and PostgreSQL refuses to even compare it.
        identity = None if "\0" in portfolio_id else await self._ledger.portfolio(portfolio_id)
        if identity is not None:
            self.remember(identity)
        return identity

    def expect(self, portfolio_id: str) -> None:
        """The portfolio's opening was acknowledged by Kafka; it is about to be booked."""
        self._expected[portfolio_id] = None
        if len(self._expected) > EXPECTED_COUNT_MAX:
            self._expected.popitem(last=False)

    async def find_expected(self, portfolio_id: str) -> PortfolioIdentity | None:
        """`find`, but waiting up to BOOKING_WAIT_S for a portfolio that is about to be booked.

        Only PostgreSQL says whose a portfolio is: an opening that Kafka took may still be refused.
        """
        identity = await self.find(portfolio_id)
        patience_ends_s = time.monotonic() + BOOKING_WAIT_S
        while identity is None and portfolio_id in self._expected and time.monotonic() < patience_ends_s:
            await asyncio.sleep(BOOKING_POLL_INTERVAL_MS / 1_000)
            identity = await self.find(portfolio_id)
        self._expected.pop(portfolio_id, None)
        return identity

    def remember(self, identity: PortfolioIdentity) -> None:
        self._known[identity.portfolio_id] = identity
        self._known.move_to_end(identity.portfolio_id)
        if len(self._known) > DIRECTORY_COUNT_MAX:
            self._known.popitem(last=False)
