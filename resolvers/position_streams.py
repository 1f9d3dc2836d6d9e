"""Streams of what a portfolio's positions are worth: how they follow fills and quotes, whatever they show of them.

A position is valued anew when it was filled or quoted, from what the watches deliver: Redis is read when the
portfolio's ledger has grown or assets were loaded, not at every tick. `compose` makes a stream's message of what there
is (`Present`), or nothing where nothing of it has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TypeVar

from engine.instants import SECOND_NS
from engine.marks import Mark
from engine.messages import Quote
from engine.positions import HotPosition, PositionValuation, value_position
from engine.sectors import SectorValue
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, QuoteWatch
from resolvers.errors import AWAY
from resolvers.stream_kind import StreamKind
from resolvers.streams import kind_of, make_pace

AWAY_RETRY_INTERVAL_S = 1
# A fill's mark may be flushed a moment before its positions are written: they are read once more after this.
SETTLE_INTERVAL_S = 0.5
# An evaluator learns of loaded assets on its own and writes allocations anew within this: they are read once more.
RECLASSIFIED_INTERVAL_S = 5.0

Update = TypeVar("Update")


@dataclass(frozen=True, slots=True)
class Present:
    """A portfolio's positions beside a mark, by symbol. `changes` are those that differ from what there was before (all
    of them with SNAPSHOT and RESET), `closed` the symbols now flat. `due`: a message is to be sent in any case."""

    kind: StreamKind
    mark: Mark
    positions: Sequence[PositionValuation]
    changes: Sequence[PositionValuation]
    closed: Sequence[str]
    sectors_at_last_fill: Mapping[str, SectorValue]
    conflated: int
    due: bool


async def follow_positions(
    context: Context,
    portfolio: PortfolioIdentity,
    max_rate_hz: float | None,
    compose: Callable[[Present], Update | None],
) -> AsyncGenerator[Update, None]:
    """The messages that `compose` makes of a portfolio's positions, as resolvers.streams paces them."""
    signal = asyncio.Event()
    pace = make_pace(context, max_rate_hz, signal)
    hub = context.services.hub
    with ExitStack() as stack:
        marks = stack.enter_context(hub.watch_portfolio(portfolio.shard, portfolio.portfolio_id, signal))
        quotes = stack.enter_context(hub.watch_quotes((), signal))
        stack.enter_context(context.services.assets.watch(signal))
        held = stack.enter_context(closing(_Held(context, portfolio, quotes, signal)))
        last: Mark | None = None
        mark: Mark | None = None
        conflated = 0
        withheld = False
        while True:
            changed = await pace.changed()
            if not changed:
                withheld = last is not None and not (marks.current and quotes.current)
                if last is not None and not withheld:
                    update = compose(held.present(StreamKind.HEARTBEAT, last, [], [], 0, due=True))
                    if update is not None:
                        pace.sending()
                        yield update
                continue
            taken = marks.take()
            if taken is not None:
                mark, conflated = taken[0], conflated + taken[1]
            if mark is None:
                continue
            kind = kind_of(last, mark)
            try:
                changes, closed = await held.changes(mark, whole=kind is not StreamKind.UPDATE)
            except AWAY:
                # What could not be read is still to be shown: try again, and again, until Redis is back.
                await asyncio.sleep(AWAY_RETRY_INTERVAL_S)
                signal.set()
                continue
            last = mark
            resumed = withheld and marks.current and quotes.current
            due = kind is not StreamKind.UPDATE or resumed
            update = compose(held.present(kind, mark, changes, closed, conflated, due))
            if update is not None:
                withheld = withheld and not resumed
                pace.sending()
                yield update
            conflated = 0


class _Held:
    """The positions and quotes that one stream has shown last."""

    def __init__(
        self, context: Context, portfolio: PortfolioIdentity, quotes: QuoteWatch, signal: asyncio.Event
    ) -> None:
        self._context = context
        self._signal = signal
        self._portfolio = portfolio
        self._watch = quotes
        self._positions: dict[str, HotPosition] = {}
        self._sectors: dict[str, SectorValue] = {}
        self._quotes: dict[str, Quote] = {}
        self._rows: list[PositionValuation] = []
        self._shown: dict[str, tuple[object, ...]] = {}
        self._read_at: tuple[int, int, int] | None = None
        self._settling: dict[float, asyncio.TimerHandle] = {}
        self._settled = True

    def close(self) -> None:
        for timer in self._settling.values():
            timer.cancel()
        self._settling.clear()

    def present(
        self,
        kind: StreamKind,
        mark: Mark,
        changes: Sequence[PositionValuation],
        closed: Sequence[str],
        conflated: int,
        due: bool,
    ) -> Present:
        return Present(kind, mark, self._rows, changes, closed, self._sectors, conflated, due)

    async def changes(self, mark: Mark, whole: bool) -> tuple[list[PositionValuation], list[str]]:
        """The positions that differ from what was shown last (all of them when `whole`), and those now flat."""
        services = self._context.services
        # Before anything is read: what waits now is no newer than what will be read, and what comes meanwhile is.
        self._take_quotes()
        read_at = (mark.epoch, mark.ledger_sequence, services.assets.arrival)
        if self._read_at != read_at:
            await self._read()
            is_reclassified = self._read_at is not None and self._read_at[2] != read_at[2]
            self._read_at = read_at
            self._settle_after(SETTLE_INTERVAL_S)
            if is_reclassified:
                self._settle_after(RECLASSIFIED_INTERVAL_S)
        elif not self._settled:
            await self._read()
            self._settled = True
        self._take_quotes()
        now_ns, stale_after_ns = services.clock.now_ns(), services.settings.stale_after_s * SECOND_NS
        changes: list[PositionValuation] = []
        rows: list[PositionValuation] = []
        shown: dict[str, tuple[object, ...]] = {}
        for symbol in sorted(self._positions):
            held = self._positions[symbol]
            quote, sessions = self._quotes.get(symbol), services.assets.sessions(symbol)
            row = value_position(symbol, held, quote, mark.nav, now_ns, stale_after_ns, sessions)
            rows.append(row)
            shown[symbol] = (held, row.price, row.price_as_of_ns, row.quality)
            if whole or shown[symbol] != self._shown.get(symbol):
                changes.append(row)
        closed = sorted(self._shown.keys() - shown.keys())
        self._rows, self._shown = rows, shown
        return changes, closed

    def _take_quotes(self) -> None:
        taken = self._watch.take()
        if taken is not None:
            self._quotes.update(taken[0])

    def _settle_after(self, delay_s: float) -> None:
        """In place of what was to come after the same delay."""
        before = self._settling.get(delay_s)
        if before is not None:
            before.cancel()
        self._settling[delay_s] = asyncio.get_running_loop().call_later(delay_s, self._settle)

    def _settle(self) -> None:
        self._settled = False
        self._signal.set()

    async def _read(self) -> None:
        services = self._context.services
        place = (self._portfolio.shard, self._portfolio.portfolio_id)
        found = await services.hot_state.read(positions=[place], sectors=[place])
        positions = found.positions[place]
        # Watched before they are read, so that no quote falls between.
        self._watch.change(positions)
        quotes = await services.hot_state.quotes(positions)
        await services.assets.ensure(positions)
        self._positions, self._sectors, self._quotes = positions, found.sectors[place], quotes
