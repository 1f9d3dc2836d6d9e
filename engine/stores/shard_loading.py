"""What a new owner of a shard reads to go on: accounts, positions, and the day since each portfolio's cut, as arrays.

The cut that a portfolio's day counts from is the last one of its kind. When its baseline is stored, day bases follow
from it and from the entries beyond its ledger sequence:

    position    value at the cut + Σ signed notionals traded since, summed by PostgreSQL
    portfolio   engine.pnl.day_base_since, over the external flows since

When nobody took it, it is made (engine.stores.estimated_cuts) and handed over to be stored. A portfolio without an
entry at the cut has no baseline: its day began with nothing.

Portfolios are numbered by place, in the order of their ids, assets likewise; rows travel as numbers by COPY
(engine.stores.copied_rows), because one object per position costs several times what PostgreSQL takes to read it. A
quantity of at most 15 digits is its float64 (engine.book); amounts are whole micro-units. Everything is read in the
transaction that the caller has begun, so that a place means the same portfolio in all of it. Arrays of a whole shard
are sorted in a thread: meanwhile the caller's leases are renewed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray
from sqlalchemy.ext.asyncio import AsyncConnection

from engine.badges import Rule, States
from engine.baselines import Baseline
from engine.book_columns import Float64s, Int64s
from engine.instants import to_datetime
from engine.ledger import EXTERNAL_FLOWS
from engine.pnl import day_base_since
from engine.stores.badges_postgres import states_of_shard
from engine.stores.copied_rows import READ_TIMEOUT_S, Rows, copy_rows
from engine.stores.estimated_cuts import PORTFOLIOS_PER_STEP, Missed, MissedCut, QuoteOf
from engine.stores.ledger_rows import driver_of

__all__ = ["LastCut", "LoadedPositions", "LoadedShard", "QuoteOf", "load_shard"]

# The last cut of a day cut's text.
LastCut = Callable[[str], int]
Integers = NDArray[np.signedinteger[Any]]
Estimated = list[tuple[int, list[Baseline]]]

_SUMS = ("cash", "receivables", "realized", "fees", "income", "flows", "trading", "corporate")
_ACCOUNT_FIELDS = (*_SUMS, "ledger_sequence")
_PORTFOLIOS = 'SELECT id, day_cut FROM portfolio WHERE shard = $1 ORDER BY id COLLATE "C"'
_ACCOUNTS = f"""
    SELECT {", ".join(f"({name} * 1000000)::bigint" for name in _SUMS)}, ledger_sequence
    FROM portfolio WHERE shard = $1 ORDER BY id COLLATE "C"
"""  # noqa: S608 - the columns are ours
# The places of a shard's portfolios, and of all assets.
_HELD = """
    held AS (
        SELECT id, day_cut, (row_number() OVER (ORDER BY id COLLATE "C") - 1)::integer AS place
        FROM portfolio WHERE shard = $1)
"""
_LISTED = """
    listed AS (SELECT symbol, (row_number() OVER (ORDER BY symbol COLLATE "C") - 1)::integer AS asset FROM asset)
"""
_SYMBOLS = 'SELECT symbol FROM asset ORDER BY symbol COLLATE "C"'
_POSITIONS = f"""
    WITH {_HELD}, {_LISTED}
    SELECT place, asset, quantity::float8, scale(trim_scale(quantity))::smallint, (cost * 1000000)::bigint,
        held_since
    FROM position JOIN held ON held.id = portfolio_id JOIN listed USING (symbol)
"""  # noqa: S608
_POSITION_COLUMNS = {
    "holder": "i4",
    "asset": "i4",
    "quantity": "f8",
    "decimals": "i2",
    "cost": "i8",
    "held_since_us": "i8",
}
# Without a baseline, `sequence` is that of the last entry at the cut: found from the newest one backwards.
_DAYS = f"""
    WITH {_HELD}
    SELECT (base.portfolio_id IS NOT NULL)::integer, coalesce((base.nav * 1000000)::bigint, 0),
        CASE WHEN base.portfolio_id IS NOT NULL THEN base.ledger_sequence ELSE coalesce((
            SELECT sequence FROM ledger_entry AS entry
            WHERE entry.portfolio_id = held.id AND entry.recorded_at <= cut.cut_at
            ORDER BY sequence DESC LIMIT 1), 0) END
    FROM held JOIN unnest($2::text[], $3::timestamptz[]) AS cut (day_cut, cut_at) USING (day_cut)
    LEFT JOIN day_baseline AS base ON base.portfolio_id = held.id AND base.cut_at = cut.cut_at
    ORDER BY place
"""  # noqa: S608
_DAY_COLUMNS = {"is_stored": "i4", "nav": "i8", "sequence": "i8"}
_VALUES = f"""
    WITH {_HELD}, {_LISTED}
    SELECT place, asset, (of.value * 1000000)::bigint
    FROM held JOIN unnest($2::text[], $3::timestamptz[]) AS cut (day_cut, cut_at) USING (day_cut)
    JOIN day_baseline AS base ON base.portfolio_id = held.id AND base.cut_at = cut.cut_at
    CROSS JOIN unnest(base.symbols, base.position_values) AS of (symbol, value) JOIN listed USING (symbol)
"""  # noqa: S608
_TRADED = f"""
    WITH {_LISTED}
    SELECT place, asset, (-sum(amount) * 1000000)::bigint
    FROM unnest($1::integer[], $2::text[], $3::bigint[]) AS base (place, portfolio_id, after)
    JOIN ledger_entry AS entry ON entry.portfolio_id = base.portfolio_id AND sequence > base.after AND kind = 'FILL'
    JOIN listed USING (symbol) GROUP BY place, asset
"""  # noqa: S608
_VALUE_COLUMNS = {"holder": "i4", "asset": "i4", "value": "i8"}
_FLOWS = """
    SELECT place, coalesce((nav_before * 1000000)::bigint, 0) AS nav_before, (amount * 1000000)::bigint AS amount
    FROM unnest($1::integer[], $2::text[], $3::bigint[]) AS base (place, portfolio_id, after)
    JOIN ledger_entry AS entry ON entry.portfolio_id = base.portfolio_id AND sequence > base.after
        AND kind = ANY($4::text[])
    ORDER BY place, sequence
"""
_IS_UNDER_REPAIR = "SELECT EXISTS (SELECT FROM repair WHERE shard = $1 AND done_at IS NULL)"
_POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class LoadedPositions:
    """Open positions, ordered by holder: rows [first[p], first[p + 1]) are those of the portfolio at place p.

    `asset` is a place in LoadedShard.symbols, `decimals` are the quantity's; `holder`, `asset` and `decimals` are
    narrower than 8 bytes.
    """

    first: Int64s
    holder: Integers
    asset: Integers
    quantity: Float64s
    decimals: Integers
    cost: Int64s
    day_base: Int64s


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """`accounts` has the Book's fields of a portfolio, by name. `closed_day_bases`: (place, symbol, day base) of what
    was closed since the cut. `cuts`: the last cut of each of `day_cuts`. `estimated`: baselines to store, by their cut.
    `badges`: what portfolios have met of the rules that were asked for, by portfolio and badge. `is_under_repair`: hot
    state was found to differ from the ledger."""

    next_offset: int
    portfolio_ids: Sequence[str]
    accounts: Mapping[str, NDArray[Any]]
    day_cuts: Sequence[str]
    day_cut_of: Int64s
    held_since_us: Int64s
    symbols: Sequence[str]
    positions: LoadedPositions
    closed_day_bases: Sequence[tuple[int, str, int]]
    cuts: Mapping[str, int]
    estimated: Sequence[tuple[int, list[Baseline]]]
    badges: Mapping[str, States]
    is_under_repair: bool

    def oldest(self, place: int) -> datetime | None:
        """Since when a portfolio has held its oldest open position."""
        held_since_us = int(self.held_since_us[place])
        return None if held_since_us == _NEVER else _POSTGRES_EPOCH + timedelta(microseconds=held_since_us)


async def load_shard(
    connection: AsyncConnection,
    shard: int,
    next_offset: int,
    last_cut: LastCut,
    quote_of: QuoteOf,
    rules: Sequence[Rule] = (),
) -> LoadedShard:
    """Read all of a shard, with what its portfolios have met of these rules."""
    read = await _Reading.begin(await driver_of(connection), shard, last_cut)
    estimated = await read.estimate(quote_of)
    bases = await read.bases(estimated)
    held = await asyncio.to_thread(read.assemble, bases)
    return LoadedShard(
        next_offset=next_offset,
        portfolio_ids=read.names,
        accounts={name: np.ascontiguousarray(read.accounts[name]) for name in _ACCOUNT_FIELDS} | await read.days(),
        day_cuts=list(read.cuts),
        day_cut_of=read.day_cut_of,
        held_since_us=held.since_us,
        symbols=held.symbols,
        positions=held.positions,
        closed_day_bases=held.closed_day_bases,
        cuts=read.cuts,
        estimated=estimated,
        badges=await states_of_shard(read.driver, shard, rules) if rules else {},
        is_under_repair=await read.driver.fetchval(_IS_UNDER_REPAIR, shard),
    )


@dataclass(frozen=True, slots=True)
class _Held:
    """Of LoadedShard what is about positions."""

    positions: LoadedPositions
    symbols: list[str]
    since_us: Int64s
    closed_day_bases: list[tuple[int, str, int]]


@dataclass(slots=True)
class _Reading:
    """What has been read so far. `day` is, by place, the baseline's NAV and ledger sequence, if it is stored."""

    driver: asyncpg.Connection
    shard: int
    names: list[str]
    cuts: dict[str, int]
    day_cut_of: Int64s
    accounts: Rows
    held: Rows
    first: Int64s
    listed: list[str]
    day: Rows

    @classmethod
    async def begin(cls, driver: asyncpg.Connection, shard: int, last_cut: LastCut) -> _Reading:
        named = await driver.fetch(_PORTFOLIOS, shard, timeout=READ_TIMEOUT_S)
        names = [row["id"] for row in named]
        cuts = {text: last_cut(text) for text in dict.fromkeys(row["day_cut"] for row in named)}
        number_of = {text: number for number, text in enumerate(cuts)}
        day_cut_of = np.fromiter((number_of[row["day_cut"]] for row in named), np.int64, len(named))
        held = await copy_rows(driver, _POSITIONS, shard, columns=_POSITION_COLUMNS)
        listed = [row["symbol"] for row in await driver.fetch(_SYMBOLS)]
        held = await asyncio.to_thread(_ordered, held, len(listed))
        return cls(
            driver,
            shard,
            names,
            cuts,
            day_cut_of,
            await copy_rows(driver, _ACCOUNTS, shard, columns=dict.fromkeys(_ACCOUNT_FIELDS, "i8")),
            held,
            np.searchsorted(held["holder"], np.arange(len(names) + 1)),
            listed,
            await copy_rows(driver, _DAYS, shard, *_instants(cuts), columns=_DAY_COLUMNS),
        )

    async def estimate(self, quote_of: QuoteOf) -> Estimated:
        """Make the baselines that nobody took; returns them by their cut."""
        missed: Estimated = []
        lacking = (self.day["is_stored"] == 0) & (self.day["sequence"] > 0)
        for number, cut_at_ns in enumerate(self.cuts.values()):
            places = np.flatnonzero(lacking & (self.day_cut_of == number))
            cut = MissedCut(self.driver, self.shard, cut_at_ns, quote_of)
            baselines: list[Baseline] = []
            for start in range(0, len(places), PORTFOLIOS_PER_STEP):
                part = places[start : start + PORTFOLIOS_PER_STEP].tolist()
                baselines += await cut.estimate([self._missed(place) for place in part])
            self.day["nav"][places] = [baseline.nav for baseline in baselines]
            if baselines:
                missed.append((cut_at_ns, baselines))
        return missed

    def _missed(self, place: int) -> Missed:
        account, rows = self.accounts[place], self.held[self.first[place] : self.first[place + 1]]
        holdings = zip(rows["asset"].tolist(), rows["quantity"].tolist(), rows["cost"].tolist(), strict=True)
        return Missed(
            self.names[place],
            int(account["cash"]),
            int(account["receivables"]),
            [(self.listed[asset], quantity, cost) for asset, quantity, cost in holdings],
            int(self.day["sequence"][place]),
        )

    async def bases(self, estimated: Estimated) -> Rows:
        """What positions were worth at the cut and what was traded in them since, to be added up."""
        stored = await copy_rows(self.driver, _VALUES, self.shard, *_instants(self.cuts), columns=_VALUE_COLUMNS)
        place_of = {name: place for place, name in enumerate(self.names)} if estimated else {}
        asset_of = {symbol: asset for asset, symbol in enumerate(self.listed)} if estimated else {}
        made = [
            (place_of[baseline.portfolio_id], asset_of[symbol], value)
            for _, baselines in estimated
            for baseline in baselines
            for symbol, value in baseline.values.items()
        ]
        traded = await copy_rows(self.driver, _TRADED, *self._moved(), columns=_VALUE_COLUMNS)
        return np.concatenate([stored, np.array(made, stored.dtype), traded])

    async def days(self) -> dict[str, NDArray[Any]]:
        """The day bases of portfolios, by the Book's names."""
        base, factor, segment = self.day["nav"].copy(), np.ones(len(self.names)), self.day["nav"].copy()
        flows: dict[int, list[tuple[int, int]]] = {}
        kinds = sorted(kind.value for kind in EXTERNAL_FLOWS)
        for row in await self.driver.fetch(_FLOWS, *self._moved(), kinds, timeout=READ_TIMEOUT_S):
            flows.setdefault(row["place"], []).append((row["nav_before"], row["amount"]))
        for place, since in flows.items():
            day = day_base_since(int(self.day["nav"][place]), since)
            base[place], segment[place] = day.base, day.segment_base
            factor[place] = np.nan if day.factor is None else day.factor
        return {"day_base": base, "day_factor": factor, "segment_base": segment}

    def _moved(self) -> tuple[list[int], list[str], list[int]]:
        """The portfolios that have entries beyond their cut's, and what these come after."""
        places = np.flatnonzero(self.accounts["ledger_sequence"] > self.day["sequence"]).tolist()
        return places, [self.names[place] for place in places], self.day["sequence"][places].tolist()

    def assemble(self, bases: Rows) -> _Held:
        """Positions with their day bases, symbols counted among those that are held."""
        held, listed = self.held, self.listed
        keys, values = _summed(bases, len(listed))
        wanted = _keys(held, len(listed))
        at = np.searchsorted(keys, wanted)
        at[at == len(keys)] = 0
        is_known = keys[at] == wanted if len(keys) else np.zeros(len(held), np.bool_)
        day_base = np.zeros(len(held), np.int64)
        day_base[is_known] = values[at[is_known]]
        is_open = np.zeros(len(keys), np.bool_)
        is_open[at[is_known]] = True
        places, assets = np.divmod(keys[~is_open], max(len(listed), 1))
        closed = zip(places.tolist(), assets.tolist(), values[~is_open].tolist(), strict=True)
        is_held = np.bincount(held["asset"], minlength=len(listed)) > 0
        asset = (np.cumsum(is_held, dtype=np.int32) - 1)[held["asset"]]
        since_us = np.full(len(self.names), _NEVER)
        np.minimum.at(since_us, held["holder"], held["held_since_us"])
        columns = {name: held[name] for name in ("holder", "quantity", "decimals", "cost")}
        return _Held(
            LoadedPositions(self.first, asset=asset, day_base=day_base, **columns),
            [listed[one] for one in np.flatnonzero(is_held).tolist()],
            since_us,
            [(place, listed[one], value) for place, one, value in closed],
        )


def _instants(cuts: Mapping[str, int]) -> tuple[list[str], list[datetime]]:
    return list(cuts), [to_datetime(cut_at_ns) for cut_at_ns in cuts.values()]


def _keys(rows: Rows, assets_count: int) -> Int64s:
    """One number for portfolio and asset."""
    keys: Int64s = rows["holder"].astype(np.int64) * assets_count + rows["asset"]
    return keys


def _ordered(rows: Rows, assets_count: int) -> Rows:
    """Rows by portfolio, then asset."""
    ordered: Rows = rows[np.argsort(_keys(rows, assets_count), kind="stable")]
    return ordered


def _summed(rows: Rows, assets_count: int) -> tuple[Int64s, Int64s]:
    """The keys of some values, each once and ascending, and the sum of each one's values."""
    keys = _keys(rows, assets_count)
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], rows["value"][order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(values, first) if len(first) else values[:0]
