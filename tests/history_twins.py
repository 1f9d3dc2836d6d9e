"""History's two kinds of tables, plain and TimescaleDB's, each in a new database; and what is written into them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import asyncpg
import pytest

from engine.instants import to_ns
from engine.marks import FrameHeader, encode_frame
from engine.stores.migrate import upgrade
from engine.stores.snapshots_reads import has_daily_aggregate
from engine.stores.snapshots_timescale import SnapshotStore, read_snapshot
from tests.builders import MarkRow
from tests.conftest import create_database, drop_database

TIMESCALE_URL = os.environ.get("NAVSTREAM_TEST_TIMESCALE_URL", "")
NO_TIMESCALE = "NAVSTREAM_TEST_TIMESCALE_URL names no PostgreSQL server with the timescaledb extension"
MICRO = 1_000_000
OPENED_AT = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["plain", pytest.param("timescale", marks=pytest.mark.timescale)])
async def twin(request: pytest.FixtureRequest) -> AsyncIterator[Twin]:
    """One contract, both kinds: the second where a server with TimescaleDB is named."""
    is_plain = request.param == "plain"
    if not is_plain and not TIMESCALE_URL:
        pytest.skip(NO_TIMESCALE)
    server = request.getfixturevalue("postgres_url") if is_plain else TIMESCALE_URL
    url = create_database(server, request.getfixturevalue("migrated_template") if is_plain else "template0")
    try:
        if not is_plain:
            await upgrade(url)
        async with asyncpg.create_pool(url, min_size=1, max_size=3) as pool:
            has_aggregate = await has_daily_aggregate(pool)
            license_name = await pool.fetchval("SELECT current_setting('timescaledb.license', true)")
            assert has_aggregate is (not is_plain and license_name == "timescale")
            yield Twin(pool, url, not has_aggregate)
    finally:
        drop_database(server, url)


@dataclass(frozen=True)
class Twin:
    """`is_plain`: no continuous aggregate and no compression."""

    pool: asyncpg.Pool
    url: str
    is_plain: bool

    async def portfolios(self, *names: str) -> None:
        await self.pool.execute("INSERT INTO shard VALUES (0, 'l', 0, 1, NULL, NULL) ON CONFLICT DO NOTHING")
        await self.pool.execute(
            "INSERT INTO portfolio (id, shard, owner, name, base_currency, day_cut, opened_at, cash, realized, fees,"
            " income, flows, receivables, trading, corporate, ledger_sequence, ledger_hash)"
            " SELECT name, 0, 'ann', name, 'USD', '00:00 UTC', $2, 0, 0, 0, 0, 0, 0, 0, 0, 0, ''"
            " FROM unnest($1::text[]) AS name",
            list(names),
            OPENED_AT,
        )

    async def entry(
        self, name: str, sequence: int, amount: int, nav_before: int | None = None, kind: str = "DEPOSIT"
    ) -> None:
        """A ledger entry; amounts in micro-units."""
        await self.pool.execute(
            "INSERT INTO ledger_entry (portfolio_id, sequence, event_id, kind, amount, fee, receivable, realized, cost,"
            " nav_effect, cash_after, nav_before, effective_at, recorded_at, late, content_hash, hash)"
            " VALUES ($1, $2, $3, $4, $5, 0, 0, 0, 0, 0, 0, $6, $7, $7, false, '', '')",
            name,
            sequence,
            f"{name}-{sequence}",
            kind,
            money(amount),
            None if nav_before is None else money(nav_before),
            OPENED_AT,
        )

    async def snapshot(self, at: datetime, navs: Mapping[str, int | tuple[int, int]]) -> int:
        """Write what a frame says: NAV in micro-units, and the ledger sequence (0 unless given)."""
        rows = {}
        for name, nav in navs.items():
            nav, sequence = nav if isinstance(nav, tuple) else (nav, 0)
            rows[name] = MarkRow(nav=nav, cash=0, ledger_sequence=sequence, flows=await self.flows(name, sequence))
        return await SnapshotStore(self.pool).write(read_snapshot(snapshot_frame(at, rows)))

    async def flows(self, name: str, sequence: int) -> int:
        """The external flows up to a ledger sequence, as a mark says them."""
        amount = await self.pool.fetchval(
            "SELECT coalesce(sum(amount), 0) FROM ledger_entry WHERE portfolio_id = $1 AND sequence <= $2"
            " AND kind IN ('DEPOSIT', 'WITHDRAWAL', 'REWARD')",
            name,
            sequence,
        )
        return int(amount * MICRO)

    async def intervals(self, name: str) -> list[tuple[int, float | None]]:
        """Flows in micro-units and TWR factor of each row, by instant."""
        rows = await self.pool.fetch(
            "SELECT flows, twr_factor FROM equity_snapshot WHERE portfolio_id = $1 ORDER BY at", name
        )
        return [(int(row["flows"] * MICRO), row["twr_factor"]) for row in rows]

    async def daily(self, name: str) -> list[tuple[object, ...]]:
        rows = await self.pool.fetch(
            "SELECT day, at, nav, quality, ledger_sequence, flows, twr_factor FROM equity_snapshot_daily"
            " WHERE portfolio_id = $1 ORDER BY day",
            name,
        )
        return [tuple(row) for row in rows]

    async def compress(self) -> None:
        """All chunks there are, at once; a plain table has none."""
        if not self.is_plain:
            for table in ("equity_snapshot", "price_close"):
                await self.pool.execute(
                    "SELECT compress_chunk(chunk, true) FROM show_chunks($1::text::regclass) AS chunk", table
                )

    async def refresh(self, until: datetime) -> None:
        if not self.is_plain:
            statement = "CALL refresh_continuous_aggregate('equity_snapshot_daily', NULL, $1::timestamptz)"
            await self.pool.execute(statement, until)


def money(micro: int) -> Decimal:
    return Decimal(micro).scaleb(-6)


def snapshot_frame(
    at: datetime, rows: Mapping[str, MarkRow], shard: int = 0, epoch: int = 7, sequence: int = 1
) -> bytes:
    """What an evaluator appends for a grid instant."""
    groups: dict[int, tuple[list[bytes], list[bytes]]] = {}
    for name, row in rows.items():
        names, marks = groups.setdefault(len(name.encode()), ([], []))
        names.append(name.encode())
        marks.append(row.pack())
    header = FrameHeader(shard, epoch, sequence, sequence - 1, to_ns(at), 0)
    joined: Sequence[tuple[int, bytes, bytes]] = [
        (length, b"".join(names), b"".join(marks)) for length, (names, marks) in groups.items()
    ]
    return encode_frame(header, joined)
