"""Baselines of cuts that nobody took, made from the ledger (engine.baselines) by who reads the shard next, at

    the price recorded at the cut
    else the price that the Book has, when it is of before the cut
    else, as an estimate, the last price recorded before the cut, or the price that the Book has

It is done portfolio by portfolio, PORTFOLIOS_PER_STEP at a time: an evaluator was away at a cut, which is seldom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal

import asyncpg

from engine.baselines import Baseline, Moved, Priced, Since, estimate, held_at, price_in_shares_at
from engine.booking import AppliedSplit
from engine.corporate_actions import Split
from engine.instants import to_datetime, to_ns
from engine.ledger import LedgerKind, Side
from engine.portfolio import Portfolio, Position
from engine.stores.ledger_rows import read_scale

# The Book's price of a symbol with its instant, in the shares of that instant.
QuoteOf = Callable[[str], Priced | None]

PORTFOLIOS_PER_STEP = 500
_UNKNOWN_AT = datetime(1970, 1, 1, tzinfo=UTC)

_SINCE = """
    SELECT entry.portfolio_id, kind, symbol, side, quantity, scale, (amount * 1000000)::bigint AS amount,
        (fee * 1000000)::bigint AS fee, (receivable * 1000000)::bigint AS receivable,
        (cost * 1000000)::bigint AS cost, coalesce((nav_before * 1000000)::bigint, 0) AS nav_before
    FROM unnest($1::text[], $2::bigint[]) AS base (portfolio_id, after)
    JOIN ledger_entry AS entry ON entry.portfolio_id = base.portfolio_id AND sequence > base.after
    ORDER BY entry.portfolio_id, sequence
"""
_CLOSES = """
    SELECT asked.symbol, price, ts_event, at = $2 AS is_of_cut FROM unnest($1::text[]) AS asked (symbol)
    CROSS JOIN LATERAL (
        SELECT at, price, ts_event FROM price_close AS close WHERE close.symbol = asked.symbol AND at <= $2
        ORDER BY at DESC LIMIT 1) AS last
"""
_SPLITS = """
    SELECT symbol, terms, effective_at, applied_at FROM corporate_action JOIN shard_action USING (action_id)
    WHERE shard = $1 AND step = 'SPLIT' AND symbol = ANY($2::text[])
"""


@dataclass(frozen=True, slots=True)
class Missed:
    """A portfolio as it is now, and how many of its entries were booked at the cut. `holdings`: symbol, quantity,
    cost."""

    portfolio_id: str
    cash: int
    receivables: int
    holdings: Sequence[tuple[str, float, int]]
    sequence: int

    def portfolio(self) -> Portfolio:
        """As far as a cut's worth goes. The float64 of a quantity gives its decimal back (engine.book)."""
        positions = {
            symbol: Position(Decimal(repr(quantity)), cost, 0, 0, _UNKNOWN_AT, 0, _UNKNOWN_AT)
            for symbol, quantity, cost in self.holdings
        }
        return Portfolio(self.portfolio_id, "", self.cash, self.receivables, positions=positions)


@dataclass(slots=True)
class MissedCut:
    """One cut of one shard, in the transaction that is under way; it is asked for no price twice."""

    driver: asyncpg.Connection
    shard: int
    cut_at_ns: int
    quote_of: QuoteOf
    _asked: set[str] = field(default_factory=set)
    _prices: dict[str, Decimal] = field(default_factory=dict)
    _recorded: set[str] = field(default_factory=set)

    async def estimate(self, missed: Sequence[Missed]) -> list[Baseline]:
        """The baselines of some portfolios."""
        since: dict[str, Since] = {of.portfolio_id: Since() for of in missed}
        arrays = [of.portfolio_id for of in missed], [of.sequence for of in missed]
        for row in await self.driver.fetch(_SINCE, *arrays):
            since[row["portfolio_id"]].add(_moved(row))
        held = [(of, of.portfolio(), since[of.portfolio_id]) for of in missed]
        await self._price({symbol for _, portfolio, moved in held for symbol in held_at(portfolio, moved)})
        return [
            estimate(portfolio, moved, of.sequence, self._prices.get, self._recorded) for of, portfolio, moved in held
        ]

    async def _price(self, wanted: set[str]) -> None:
        """Find the prices at the cut, in the shares that the ledger counted then; and the symbols whose prices were
        recorded at it, or have not changed since."""
        symbols = sorted(wanted - self._asked)
        self._asked |= wanted
        cut_at = to_datetime(self.cut_at_ns)
        splits: dict[str, list[AppliedSplit]] = {}
        for row in await self.driver.fetch(_SPLITS, self.shard, symbols):
            scale = read_scale(row["terms"])
            assert scale is not None
            applied = AppliedSplit(Split(row["effective_at"], scale), row["applied_at"])
            splits.setdefault(row["symbol"], []).append(applied)
        closes = {row["symbol"]: row for row in await self.driver.fetch(_CLOSES, symbols, cut_at)}
        for symbol in symbols:
            quote, close = self.quote_of(symbol), closes.get(symbol)
            is_unchanged = quote is not None and quote[1] <= self.cut_at_ns
            if is_unchanged or (close is not None and close["is_of_cut"]):
                self._recorded.add(symbol)
            priced = quote
            if close is not None and (close["is_of_cut"] or not is_unchanged):
                priced = close["price"], to_ns(close["ts_event"])
            price = None if priced is None else price_in_shares_at(cut_at, priced, splits.get(symbol, ()))
            if price is not None:
                self._prices[symbol] = price


def _moved(row: asyncpg.Record) -> Moved:
    return Moved(
        LedgerKind(row["kind"]),
        row["symbol"],
        Side(row["side"]) if row["side"] else None,
        row["quantity"],
        read_scale(row["scale"]),
        row["amount"],
        row["fee"],
        row["receivable"],
        row["cost"],
        row["nav_before"],
    )
