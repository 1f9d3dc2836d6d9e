"""The past as resolvers see it (engine.as_of): the same figures as at present, by the same code, of an earlier state.

`PastLoader` stands in for the operation's `HotLoader`: where that reads a portfolio's mark and positions from hot
state, this one makes them from the ledger and the recorded prices. What a resolver does with them is the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from engine.as_of import NOTHING_BEFORE, Cycle, DayStart, LedgerState, hot_positions, mark_at
from engine.assets import Asset
from engine.day_cuts import parse_day_cut
from engine.explain import Worth
from engine.instants import SECOND_NS, to_datetime, to_ns
from engine.marks import Mark, MarkQuality
from engine.messages import Quote
from engine.positions import HotPosition, PositionValuation, value_position
from engine.runtime.clock import Clock
from engine.sectors import SectorValue
from engine.stores.as_of_reads import AsOfReads, Baseline, PastLedger
from engine.stores.hot_state_reads import HotStateReads, Place
from engine.stores.ledger_reads import PortfolioIdentity
from engine.stores.price_closes import PriceCloses
from resolvers.errors import ErrorCode, PublicError
from resolvers.loaders import AssetCatalogue, ValuedPositions


@dataclass(frozen=True, slots=True)
class PricedState:
    """A past state at the prices of an instant; `quotes` are those it is valued at, by symbol."""

    state: LedgerState
    held: dict[str, HotPosition]
    quotes: Mapping[str, Quote]
    valued: list[PositionValuation]

    @property
    def worth(self) -> Worth:
        cash = self.state.cash + self.state.receivables
        return Worth(cash, {one.symbol: one.value for one in self.valued})

    @property
    def quality(self) -> MarkQuality:
        return max((one.quality for one in self.valued), default=MarkQuality.LIVE)


@dataclass(frozen=True, slots=True)
class PastReads:
    """What a process reads the past from."""

    ledger: AsOfReads
    closes: PriceCloses
    hot_state: HotStateReads
    assets: AssetCatalogue
    clock: Clock
    stale_after_s: int

    def check(self, portfolio: PortfolioIdentity, at: datetime) -> None:
        """Raises PublicError AS_OF_BEFORE_OPENING, AS_OF_IN_FUTURE."""
        if at < portfolio.opened_at:
            raise PublicError(ErrorCode.AS_OF_BEFORE_OPENING, f"the portfolio was opened at {portfolio.opened_at}")
        if to_ns(at) > self.clock.now_ns():
            raise PublicError(ErrorCode.AS_OF_IN_FUTURE, "the instant lies in the future")

    async def priced(self, portfolio_id: str, ledger_sequence: int, at_ns: int, live: bool = False) -> PricedState:
        """The state after `ledger_sequence` entries at the prices of an instant: what it is worth, no more.

        `live`: the instant is now, and the latest quotes are its prices whatever clock stamped them.
        """
        state = await self.ledger.state(portfolio_id, ledger_sequence)
        return await self._price(portfolio_id, state, at_ns, {}, NOTHING_BEFORE, live)

    async def priced_in_full(self, portfolio_id: str, past: PastLedger, at_ns: int) -> tuple[PricedState, DayStart]:
        """As `priced`, with the positions' cycles and since when the day's P&L counts."""
        sequence = past.ledger_sequence
        state, day = await asyncio.gather(
            self.ledger.state(portfolio_id, sequence), self._day(portfolio_id, past, at_ns)
        )
        cycles = await self.ledger.cycles(portfolio_id, sequence, state.positions)
        return await self._price(portfolio_id, state, at_ns, cycles, day), day

    async def _price(
        self,
        portfolio_id: str,
        state: LedgerState,
        at_ns: int,
        cycles: Mapping[str, Cycle],
        day: DayStart,
        live: bool = False,
    ) -> PricedState:
        if not state.positions:
            return PricedState(state, {}, {}, [])
        symbols = list(state.positions)
        quotes, splits, _ = await asyncio.gather(
            self.hot_state.quotes(symbols) if live else self.closes.closes_at(symbols, to_datetime(at_ns)),
            self.ledger.splits(portfolio_id, symbols, state.ledger_sequence, to_datetime(at_ns)),
            self.assets.ensure(symbols),
        )
        held, stale_after_ns = hot_positions(state, splits, cycles, day), self.stale_after_s * SECOND_NS
        valued = [
            value_position(
                symbol, held[symbol], quotes.get(symbol), 0, at_ns, stale_after_ns, self.assets.sessions(symbol)
            )
            for symbol in sorted(symbols)
        ]
        return PricedState(state, held, quotes, valued)

    async def _day(self, portfolio_id: str, past: PastLedger, at_ns: int) -> DayStart:
        # The first use of an exchange reads its calendar, for longer than the loop may wait.
        cut = await asyncio.to_thread(parse_day_cut, past.day_cut)
        cut_ns = cut.last(at_ns)
        cut_at = to_datetime(cut_ns)
        start = await self.ledger.baseline(portfolio_id, cut_at)
        if start is None:
            before = await self.ledger.ledger_at(portfolio_id, cut_at)
            at_cut = await self.priced(portfolio_id, before.ledger_sequence, cut_ns)
            start = Baseline(at_cut.worth.nav, before.ledger_sequence, at_cut.worth.values)
        return await self.ledger.since(portfolio_id, start, cut_at, past.ledger_sequence)


class PastLoader:
    """One portfolio's mark and positions as of an instant, read once for an operation."""

    def __init__(self, reads: PastReads, portfolio: PortfolioIdentity, at: datetime) -> None:
        self.at = at
        self._reads = reads
        self._portfolio = portfolio
        self._past: asyncio.Task[PastLedger] | None = None
        self._valued: asyncio.Task[ValuedPositions] | None = None

    async def ledger_sequence(self) -> int:
        """How many entries the portfolio had then."""
        return (await self._ledger()).ledger_sequence

    async def mark(self, place: Place) -> Mark | None:
        return (await self.valued_positions(place)).mark

    async def sectors(self, place: Place) -> dict[str, SectorValue]:
        """None: what the allocation was at the last fill is kept for the present alone."""
        return {}

    async def assets(self, symbols: Collection[str]) -> dict[str, Asset]:
        """Of each symbol the asset as it was classified then."""
        return await self._reads.assets.in_force(symbols, self.at)

    async def valued_positions(self, place: Place) -> ValuedPositions:
        assert place == (self._portfolio.shard, self._portfolio.portfolio_id), "one loader, one portfolio"
        if self._valued is None:
            self._valued = asyncio.ensure_future(self._value())
        return await asyncio.shield(self._valued)

    async def _ledger(self) -> PastLedger:
        if self._past is None:
            reading = self._reads.ledger.ledger_at(self._portfolio.portfolio_id, self.at)
            self._past = asyncio.ensure_future(reading)
        return await asyncio.shield(self._past)

    async def _value(self) -> ValuedPositions:
        at_ns, reads = to_ns(self.at), self._reads
        past = await self._ledger()
        priced, day = await reads.priced_in_full(self._portfolio.portfolio_id, past, at_ns)
        mark = mark_at(priced.state, priced.valued, day, at_ns)
        stale_after_ns = reads.stale_after_s * SECOND_NS
        return ValuedPositions(mark, priced.held, priced.quotes, at_ns, stale_after_ns, reads.assets.sessions)
