"""What a new owner reads of a shard, portfolio by portfolio, with an object for each: the oracle of array loading.

`portfolios_of` shows what was loaded as arrays in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from math import isnan

import asyncpg
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.amounts import decimals_of
from engine.baselines import Baseline, Moved, Since, day_bases, estimate, held_at, price_in_shares_at
from engine.book import Account, Holding
from engine.booking import AppliedSplit
from engine.corporate_actions import Split
from engine.instants import to_datetime, to_ns
from engine.ledger import LedgerKind, Side
from engine.pnl import DayBase
from engine.portfolio import Portfolio, Position
from engine.posting import account
from engine.stores.ledger_rows import driver_of, portfolio_of, read_scale
from engine.stores.shard_loading import LastCut, LoadedShard, QuoteOf
from engine.stores.tables import portfolio

_POSITIONS = """
    SELECT portfolio_id, symbol, quantity, (position.cost * 1000000)::bigint AS cost,
        (position.realized * 1000000)::bigint AS realized, (position.fees * 1000000)::bigint AS fees,
        position.opened_at, opened_sequence, held_since
    FROM position JOIN portfolio ON portfolio.id = portfolio_id WHERE portfolio.shard = $1
"""
# Without a baseline, `sequence` is that of the last entry at the cut: found from the newest one backwards.
_BASELINES = """
    SELECT portfolio.id, (base.nav * 1000000)::bigint AS nav, base.symbols,
        ARRAY(SELECT (value * 1000000)::bigint FROM unnest(base.position_values) WITH ORDINALITY AS of (value, place)
            ORDER BY place) AS values,
        base.portfolio_id IS NOT NULL AS is_stored,
        CASE WHEN base.portfolio_id IS NOT NULL THEN base.ledger_sequence ELSE coalesce((
            SELECT sequence FROM ledger_entry AS entry
            WHERE entry.portfolio_id = portfolio.id AND entry.recorded_at <= cut.cut_at
            ORDER BY sequence DESC LIMIT 1), 0) END AS sequence
    FROM portfolio JOIN unnest($2::text[], $3::timestamptz[]) AS cut (day_cut, cut_at) USING (day_cut)
    LEFT JOIN day_baseline AS base ON base.portfolio_id = portfolio.id AND base.cut_at = cut.cut_at
    WHERE portfolio.shard = $1
"""
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
class LoadedPortfolio:
    """A portfolio as the Book takes it in, and the day bases of positions closed since the cut."""

    portfolio_id: str
    day_cut: str
    day_cut_at_ns: int
    account: Account
    holdings: Sequence[Holding]
    closed_day_bases: Mapping[str, int]
    oldest: datetime | None


def portfolios_of(loaded: LoadedShard) -> list[LoadedPortfolio]:
    """What was loaded as arrays, portfolio by portfolio."""
    return [_portfolio(loaded, place) for place in range(len(loaded.portfolio_ids))]


def _portfolio(loaded: LoadedShard, place: int) -> LoadedPortfolio:
    account = {name: of[place].item() for name, of in loaded.accounts.items()}
    base, factor, segment = (account.pop(name) for name in ("day_base", "day_factor", "segment_base"))
    day = DayBase(base, None if isnan(factor) else factor, segment)
    held, day_cut = loaded.positions, loaded.day_cuts[loaded.day_cut_of[place]]
    rows = range(held.first[place], held.first[place + 1])
    assert all(held.holder[row] == place for row in rows)
    holdings = [
        Holding(
            loaded.symbols[held.asset[row]],
            Decimal(repr(float(held.quantity[row]))),
            int(held.cost[row]),
            int(held.day_base[row]),
        )
        for row in rows
    ]
    decimals = [decimals_of(holding.quantity.normalize()) for holding in holdings]
    assert decimals == held.decimals[rows.start : rows.stop].tolist()
    return LoadedPortfolio(
        loaded.portfolio_ids[place],
        day_cut,
        loaded.cuts[day_cut],
        Account(**account, day=day),
        sorted(holdings, key=lambda holding: holding.symbol),
        {symbol: base for at, symbol, base in loaded.closed_day_bases if at == place},
        loaded.oldest(place),
    )


@dataclass(slots=True)
class _Day:
    """Of one portfolio: its cut, the baseline if it is stored, the last entry before, and what moved since."""

    cut_at_ns: int
    baseline: Baseline | None
    sequence: int
    since: Since = field(default_factory=Since)


async def load_slowly(
    connection: AsyncConnection, shard: int, last_cut: LastCut, quote_of: QuoteOf
) -> tuple[list[LoadedPortfolio], list[tuple[int, list[Baseline]]]]:
    """All portfolios of a shard by id, and the baselines that nobody took."""
    rows = (await connection.execute(select(portfolio).where(portfolio.c.shard == shard))).all()
    driver = await driver_of(connection)
    portfolios = {row.id: portfolio_of(row) for row in rows}
    for of in await driver.fetch(_POSITIONS, shard):
        portfolios[of["portfolio_id"]].positions[of["symbol"]] = _position(of)
    cuts = {row.day_cut: last_cut(row.day_cut) for row in rows}
    days = await _days(driver, shard, {row.id: cuts[row.day_cut] for row in rows}, cuts)
    await _read_since(driver, portfolios, days)
    estimated = await _estimate(driver, shard, portfolios, days, quote_of)
    loaded = [_loaded(portfolios[row.id], row.day_cut, days[row.id]) for row in rows]
    return sorted(loaded, key=lambda of: of.portfolio_id), estimated


def _position(row: asyncpg.Record) -> Position:
    return Position(
        row["quantity"].normalize(),
        row["cost"],
        row["realized"],
        row["fees"],
        row["opened_at"],
        row["opened_sequence"],
        row["held_since"],
    )


async def _days(
    driver: asyncpg.Connection, shard: int, cut_of: Mapping[str, int], cuts: Mapping[str, int]
) -> dict[str, _Day]:
    found = {}
    for row in await driver.fetch(_BASELINES, shard, list(cuts), [to_datetime(cut_ns) for cut_ns in cuts.values()]):
        name, sequence, baseline = row["id"], row["sequence"], None
        if row["is_stored"]:
            values = dict(zip(row["symbols"], row["values"], strict=True))
            baseline = Baseline(name, row["nav"], sequence, values)
        found[name] = _Day(cut_of[name], baseline, sequence)
    return found


async def _read_since(
    driver: asyncpg.Connection, portfolios: Mapping[str, Portfolio], days: Mapping[str, _Day]
) -> None:
    """Count every entry beyond the cut's."""
    moved = [name for name, held in portfolios.items() if held.ledger_sequence > days[name].sequence]
    for row in await driver.fetch(_SINCE, moved, [days[name].sequence for name in moved]):
        days[row["portfolio_id"]].since.add(
            Moved(
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
        )


async def _estimate(
    driver: asyncpg.Connection,
    shard: int,
    portfolios: Mapping[str, Portfolio],
    days: Mapping[str, _Day],
    quote_of: QuoteOf,
) -> list[tuple[int, list[Baseline]]]:
    """Fill in the baselines that nobody took; returns them by their cut."""
    missed: dict[int, list[str]] = {}
    for name, day in days.items():
        if day.baseline is None and day.sequence:
            missed.setdefault(day.cut_at_ns, []).append(name)
    estimated = []
    for cut_at_ns, names in missed.items():
        symbols = sorted({symbol for name in names for symbol in held_at(portfolios[name], days[name].since)})
        prices, recorded = await _prices_at(driver, shard, cut_at_ns, symbols, quote_of)
        for name in names:
            day = days[name]
            day.baseline = estimate(portfolios[name], day.since, day.sequence, prices.get, recorded)
        estimated.append((cut_at_ns, [baseline for name in names if (baseline := days[name].baseline)]))
    return estimated


async def _prices_at(
    driver: asyncpg.Connection, shard: int, cut_at_ns: int, symbols: Sequence[str], quote_of: QuoteOf
) -> tuple[dict[str, Decimal], set[str]]:
    """The prices at a cut, in the shares that the ledger counted then; and the symbols whose prices were recorded at
    it, or have not changed since."""
    cut_at = to_datetime(cut_at_ns)
    splits: dict[str, list[AppliedSplit]] = {}
    for row in await driver.fetch(_SPLITS, shard, symbols):
        scale = read_scale(row["terms"])
        assert scale is not None
        applied = AppliedSplit(Split(row["effective_at"], scale), row["applied_at"])
        splits.setdefault(row["symbol"], []).append(applied)
    prices, recorded = {}, set()
    closes = {row["symbol"]: row for row in await driver.fetch(_CLOSES, symbols, cut_at)}
    for symbol in symbols:
        quote, close = quote_of(symbol), closes.get(symbol)
        is_unchanged = quote is not None and quote[1] <= cut_at_ns
        if is_unchanged or (close is not None and close["is_of_cut"]):
            recorded.add(symbol)
        priced = quote
        if close is not None and (close["is_of_cut"] or not is_unchanged):
            priced = close["price"], to_ns(close["ts_event"])
        price = None if priced is None else price_in_shares_at(cut_at, priced, splits.get(symbol, ()))
        if price is not None:
            prices[symbol] = price
    return prices, recorded


def _loaded(held: Portfolio, day_cut: str, day: _Day) -> LoadedPortfolio:
    base, bases = day_bases(day.baseline, day.since)
    holdings = [
        Holding(symbol, position.quantity, position.cost, bases.pop(symbol, 0))
        for symbol, position in sorted(held.positions.items())
    ]
    oldest = min((position.held_since for position in held.positions.values()), default=None)
    return LoadedPortfolio(held.portfolio_id, day_cut, day.cut_at_ns, account(held, base), holdings, bases, oldest)
