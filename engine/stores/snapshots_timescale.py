"""Equity snapshots: the marks of a shard's portfolios at one grid instant, on their way into `equity_snapshot`.

`equity_snapshot` is a hypertable where TimescaleDB is installed and a plain table otherwise; nothing here differs.
A snapshot is idempotent: (portfolio, instant) is its key and the first one stays. Beside the mark a row says what
happened since the portfolio's row before (the last one by `at`), by ledger sequence:

    flows        Σ external flows with sequence before < sequence ≤ this row's
    twr_factor   engine.equity_curve.interval_factor from the NAV before to this one; NULL where undefined

The first row's interval begins at the opening, at NAV 0. A row that comes late splits the interval that it falls
into: the row after it then counts from the late one. NAVs are never changed.

Rows travel as arrays (unnest): 20,000 of them take a fraction of a second and no temporary table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg
import numpy as np
from asyncpg.pool import PoolConnectionProxy

from engine.equity_curve import Flow, interval_factor
from engine.instants import to_datetime
from engine.ledger import EXTERNAL_FLOWS
from engine.marks import MARK, MarkArray, decode_frame

# Rows of one transaction: what a second writes, so that a time limit on statements is far away.
WRITE_COUNT_MAX = 20_000
# A system that runs has a row an hour: what is not found within two days is looked for in all chunks.
LOOK_BACK = timedelta(days=2)

_ROW = "at, (nav * 1000000)::bigint, ledger_sequence"
_LAST = f"""
    SELECT id, found.* FROM unnest($1::text[]) AS id, LATERAL (
        SELECT {_ROW} FROM equity_snapshot WHERE portfolio_id = id AND at >= $2 ORDER BY at DESC LIMIT 1
    ) AS found
"""  # noqa: S608 -- constants of this module only
_BEFORE = f"""
    SELECT id, found.* FROM unnest($1::text[]) AS id, LATERAL (
        SELECT {_ROW} FROM equity_snapshot WHERE portfolio_id = id AND at < $2 ORDER BY at DESC LIMIT 1
    ) AS found
"""  # noqa: S608
_NEXT = f"""
    SELECT id, found.* FROM unnest($1::text[]) AS id, LATERAL (
        SELECT {_ROW} FROM equity_snapshot WHERE portfolio_id = id AND at > $2 ORDER BY at LIMIT 1
    ) AS found
"""  # noqa: S608
_FLOWS = """
    SELECT asked.id, entry.sequence, (entry.amount * 1000000)::bigint, (entry.nav_before * 1000000)::bigint
    FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS asked (id, after, last)
    JOIN ledger_entry AS entry ON entry.portfolio_id = asked.id
        AND entry.sequence > asked.after AND entry.sequence <= asked.last
    WHERE entry.kind = ANY($4::text[]) AND entry.nav_before IS NOT NULL ORDER BY asked.id, entry.sequence
"""
_FLOWED = """
    SELECT id FROM unnest($1::text[], $2::bigint[]) AS asked (id, last) WHERE EXISTS (
        SELECT FROM ledger_entry WHERE portfolio_id = id AND sequence <= last AND kind = ANY($3::text[])
    )
"""
# Micro-units are whole, so × 10⁻⁶ is exact; an interval of microseconds is exact below 2⁵³ of them (285 years).
_INSERT = """
    INSERT INTO equity_snapshot (portfolio_id, at, nav, cash, receivables, positions_value, flows, twr_factor, quality,
        marked_at, epoch, sequence, ledger_sequence)
    SELECT id, $1, nav * 0.000001, cash * 0.000001, receivables * 0.000001, positions_value * 0.000001,
        flows * 0.000001, twr_factor, quality, 'epoch'::timestamptz + marked_us * interval '1 microsecond', $2,
        sequence, ledger_sequence
    FROM unnest($3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[], $9::float8[],
        $10::smallint[], $11::bigint[], $12::bigint[], $13::bigint[])
        AS mark (id, nav, cash, receivables, positions_value, flows, twr_factor, quality, marked_us, sequence,
        ledger_sequence)
    ON CONFLICT DO NOTHING RETURNING portfolio_id
"""
_SPLIT = """
    UPDATE equity_snapshot SET flows = asked.flows * 0.000001, twr_factor = asked.twr_factor
    FROM unnest($1::text[], $2::timestamptz[], $3::bigint[], $4::float8[]) AS asked (id, at, flows, twr_factor)
    WHERE portfolio_id = asked.id AND equity_snapshot.at = asked.at
"""
_KINDS = sorted(kind.value for kind in EXTERNAL_FLOWS)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The marks of a shard's portfolios, `ids[i]` having `marks[i]`, at the grid instant `at`."""

    at: datetime
    epoch: int
    ids: list[str]
    marks: MarkArray

    def part(self, begin: int, end: int) -> Snapshot:
        return Snapshot(self.at, self.epoch, self.ids[begin:end], self.marks[begin:end])


@dataclass(frozen=True, slots=True)
class Row:
    """A stored row, as much of it as an interval's end needs; NAV in micro-units."""

    at: datetime
    nav: int
    ledger_sequence: int


@dataclass(frozen=True, slots=True)
class Interval:
    """From a portfolio's row (None: its opening) to the NAV and ledger sequence of the next one.

    `flows_total`: its external flows from the opening to the interval's end, where that is known.
    """

    portfolio_id: str
    before: Row | None
    nav: int
    ledger_sequence: int
    flows_total: int | None = None

    @property
    def after(self) -> int:
        return self.before.ledger_sequence if self.before else 0


def read_snapshot(frame: bytes) -> Snapshot:
    """The snapshot in a frame, whose `flushed_at_ns` is the grid instant. Raises ValueError when it is none."""
    header, groups = decode_frame(frame)
    ids: list[str] = []
    marks = [np.zeros(0, MARK)]
    for names, packed in groups:
        ids += [name.decode() for name in names]
        marks.append(np.frombuffer(packed, MARK))
    return Snapshot(to_datetime(header.flushed_at_ns), header.epoch, ids, np.concatenate(marks))


class SnapshotStore:
    """Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def write(self, snapshot: Snapshot) -> int:
        """Write a snapshot, at most WRITE_COUNT_MAX rows to a transaction; returns how many rows were new."""
        written = 0
        for begin in range(0, len(snapshot.ids), WRITE_COUNT_MAX):
            async with self._pool.acquire() as connection, connection.transaction():
                written += await _write(connection, snapshot.part(begin, begin + WRITE_COUNT_MAX))
        return written


async def _write(connection: PoolConnectionProxy, snapshot: Snapshot) -> int:
    before = await _rows(connection, _LAST, snapshot.ids, snapshot.at - LOOK_BACK)
    # Ahead of us: a redelivered frame, or a late one.
    passed = [name for name, row in before.items() if row.at >= snapshot.at]
    unseen = [name for name in snapshot.ids if name not in before]
    for name in passed:
        del before[name]
    before |= await _rows(connection, _BEFORE, passed + unseen, snapshot.at)
    following = await _rows(connection, _NEXT, passed, snapshot.at)
    inserted = await _insert(connection, snapshot, before)
    late = [at for at, name in enumerate(snapshot.ids) if name in following and name in inserted]
    await _split(connection, snapshot, late, following)
    return len(inserted)


async def _rows(connection: PoolConnectionProxy, statement: str, ids: Sequence[str], at: datetime) -> dict[str, Row]:
    if not ids:
        return {}
    return {name: Row(*row) for name, *row in await connection.fetch(statement, ids, at)}


async def _insert(connection: PoolConnectionProxy, snapshot: Snapshot, before: Mapping[str, Row]) -> set[str]:
    """The portfolios whose row is new."""
    ids, marks = snapshot.ids, snapshot.marks
    navs, ledger_sequences = marks["nav"].tolist(), marks["ledger_sequence"].tolist()
    ends = zip(ids, navs, ledger_sequences, marks["flows"].tolist(), strict=True)
    flows, factors = await _measure(
        connection, [Interval(name, before.get(name), nav, sequence, total) for name, nav, sequence, total in ends]
    )
    rows = await connection.fetch(
        _INSERT,
        snapshot.at,
        snapshot.epoch,
        ids,
        navs,
        marks["cash"].tolist(),
        marks["receivables"].tolist(),
        marks["positions_value"].tolist(),
        flows,
        factors,
        marks["quality"].tolist(),
        (marks["as_of_ns"] // 1_000).tolist(),
        marks["sequence"].tolist(),
        ledger_sequences,
    )
    return {row[0] for row in rows}


async def _split(
    connection: PoolConnectionProxy, snapshot: Snapshot, late: Sequence[int], following: Mapping[str, Row]
) -> None:
    """Let the rows after late ones count from those."""
    if not late:
        return
    intervals, instants = [], []
    for at in late:
        name, mark = snapshot.ids[at], snapshot.marks[at]
        row = Row(snapshot.at, int(mark["nav"]), int(mark["ledger_sequence"]))
        intervals.append(Interval(name, row, following[name].nav, following[name].ledger_sequence))
        instants.append(following[name].at)
    flows, factors = await _measure(connection, intervals)
    await connection.execute(_SPLIT, [one.portfolio_id for one in intervals], instants, flows, factors)


async def _measure(
    connection: PoolConnectionProxy, intervals: Sequence[Interval]
) -> tuple[list[int], list[float | None]]:
    """Each interval's flows in micro-units and TWR factor."""
    moved = [one for one in intervals if one.ledger_sequence > one.after]
    found: dict[str, list[Flow]] = {}
    arrays = [one.portfolio_id for one in moved], [one.after for one in moved], [one.ledger_sequence for one in moved]
    for name, sequence, amount, nav_before in await connection.fetch(_FLOWS, *arrays, _KINDS) if moved else ():
        found.setdefault(name, []).append(Flow(0, sequence, amount, nav_before))
    sums = [sum(flow.amount for flow in found.get(one.portfolio_id, ())) for one in intervals]
    flowed = await _flowed_before(connection, intervals, sums)
    factors = []
    for one in intervals:
        nav_before, flows = one.before.nav if one.before else 0, found.get(one.portfolio_id, ())
        factors.append(interval_factor(nav_before, one.nav, flows, one.portfolio_id in flowed))
    return sums, factors


async def _flowed_before(
    connection: PoolConnectionProxy, intervals: Sequence[Interval], sums: Sequence[int]
) -> set[str]:
    """The portfolios that had an external flow before their interval, whose own flows have `sums`.

    Flows that do not sum to 0 have been; only where they do the ledger has to be asked.
    """
    flowed, doubtful = set(), []
    for one, flows in zip(intervals, sums, strict=True):
        if one.after and one.flows_total is not None and one.flows_total != flows:
            flowed.add(one.portfolio_id)
        elif one.after:
            doubtful.append(one)
    if doubtful:
        arrays = [one.portfolio_id for one in doubtful], [one.after for one in doubtful]
        flowed |= {row[0] for row in await connection.fetch(_FLOWED, *arrays, _KINDS)}
    return flowed
