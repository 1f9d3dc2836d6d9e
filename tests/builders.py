"""State as the evaluator leaves it, written directly in the documented formats: Redis keys, frames, ledger rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import asyncpg
import numpy as np

from engine.assets import Asset
from engine.marks import MARK, UNKNOWN, FrameHeader, MarkQuality, encode_frame
from engine.messages import Quote, QuoteFrame, quote_encoder, quote_frame_encoder
from engine.positions import HotPosition, hot_position_encoder
from engine.runtime.connections import RedisClient
from engine.sectors import SectorValue, sector_value_encoder
from engine.stores import redis_keys
from engine.stores.assets_postgres import upsert_assets

OPENED_AT = datetime(2026, 1, 5, 9, 30, tzinfo=UTC)
MICRO = 1_000_000


@dataclass(frozen=True)
class MarkRow:
    """One mark's fields in micro-units and nanoseconds; what a test does not name is dull but consistent."""

    nav: int = 10_000 * MICRO
    cash: int = 4_000 * MICRO
    receivables: int = 0
    unrealized: int = 250 * MICRO
    realized: int = 75 * MICRO
    fees: int = 3 * MICRO
    income: int = 0
    flows: int = 0
    trading: int = 0
    corporate: int = 0
    day_pnl: int = 120 * MICRO
    day_pnl_ratio_e12: int | None = 12_000_000_000
    day_cut_at_ns: int = 1_795_305_600_000_000_000
    as_of_ns: int = 1_795_342_800_123_456_000
    sequence: int = 1
    ledger_sequence: int = 1
    quality: MarkQuality = MarkQuality.LIVE

    def pack(self) -> bytes:
        row = np.zeros(1, MARK)
        for name in MARK.names or ():
            if name == "positions_value":
                row[name] = self.nav - self.cash - self.receivables
            elif name == "day_pnl_ratio_e12":
                row[name] = UNKNOWN if self.day_pnl_ratio_e12 is None else self.day_pnl_ratio_e12
            else:
                row[name] = getattr(self, name)
        return row.tobytes()

    def at(self, sequence: int, **changes: int) -> MarkRow:
        return replace(self, sequence=sequence, **changes)


def frame(
    shard: int, epoch: int, sequence: int, rows: Mapping[str, MarkRow] | None = None, previous: int | None = None
) -> bytes:
    """A marks frame; `previous` is the flush before it unless a test makes a gap."""
    groups: dict[int, list[tuple[bytes, bytes]]] = {}
    for portfolio_id, row in (rows or {}).items():
        groups.setdefault(len(portfolio_id), []).append((portfolio_id.encode(), row.pack()))
    header = FrameHeader(shard, epoch, sequence, sequence - 1 if previous is None else previous, 1, 1)
    joined = [
        (length, b"".join(key for key, _ in pairs), b"".join(packed for _, packed in pairs))
        for length, pairs in groups.items()
    ]
    return encode_frame(header, joined)


class HotStateBuilder:
    """Writes hot state the way an evaluator does, and publishes its frames."""

    def __init__(self, redis: RedisClient) -> None:
        self.redis = redis

    async def point(self, shard: int, epoch: int) -> None:
        """Move the shard's pointer."""
        await self.redis.hset(redis_keys.shard(shard), mapping={"epoch": epoch, "owner": "test"})

    async def marks(self, shard: int, epoch: int, rows: Mapping[str, MarkRow]) -> None:
        packed = {portfolio_id: row.pack() for portfolio_id, row in rows.items()}
        await self.redis.hset(redis_keys.marks(shard, epoch), mapping=packed)

    async def flush(
        self,
        shard: int,
        epoch: int,
        sequence: int,
        rows: Mapping[str, MarkRow],
        previous: int | None = None,
    ) -> None:
        """Write the rows and publish them in one frame."""
        await self.marks(shard, epoch, rows)
        await self.publish(shard, frame(shard, epoch, sequence, rows, previous))

    async def publish(self, shard: int, data: bytes) -> int:
        return int(await self.redis.spublish(redis_keys.marks_channel(shard), data))

    async def positions(self, shard: int, portfolio_id: str, held: Mapping[str, HotPosition]) -> None:
        key = redis_keys.positions(shard, portfolio_id)
        await self.redis.delete(key)
        if held:
            packed = {symbol: hot_position_encoder.encode(position) for symbol, position in held.items()}
            await self.redis.hset(key, mapping=packed)

    async def sectors(self, shard: int, portfolio_id: str, values: Mapping[str, SectorValue]) -> None:
        packed = {sector: sector_value_encoder.encode(value) for sector, value in values.items()}
        await self.redis.hset(redis_keys.sector_values(shard, portfolio_id), mapping=packed)

    async def quotes(self, quotes: Sequence[Quote]) -> None:
        await self.redis.hset(
            redis_keys.PRICES, mapping={quote.symbol: quote_encoder.encode(quote) for quote in quotes}
        )

    async def quote(self, publisher: str, sequence: int, quotes: Sequence[Quote]) -> None:
        """Write quotes and publish them in one frame."""
        if quotes:
            await self.quotes(quotes)
        data = quote_frame_encoder.encode(QuoteFrame(publisher, sequence, 1, list(quotes)))
        await self.redis.spublish(redis_keys.QUOTES_CHANNEL, data)


def held(quantity: str, cost: int, realized: int = 0, day_base: int | None = None) -> HotPosition:
    """A hot position; amounts in whole currency units. Its day base is its cost unless named."""
    base = cost if day_base is None else day_base
    return HotPosition(quantity, cost * MICRO, realized * MICRO, base * MICRO, 1_795_000_000_000_000_000)


class LedgerBuilder:
    """Writes portfolios, ledger entries and snapshots as rows."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self.pool = pool

    async def portfolio(
        self, portfolio_id: str, owner: str = "ann", shard: int = 0, opened_at: datetime = OPENED_AT
    ) -> None:
        await self.pool.execute(
            "INSERT INTO shard (id, log_id, next_offset, epoch) VALUES ($1, 'l', 0, 1) ON CONFLICT DO NOTHING",
            shard,
        )
        await self.pool.execute(
            "INSERT INTO portfolio (id, shard, owner, name, base_currency, day_cut, opened_at, cash, realized, fees,"
            " income, flows, receivables, trading, corporate, ledger_sequence, ledger_hash)"
            " VALUES ($1, $2, $3, $4, 'USD', '00:00 UTC', $5, 0, 0, 0, 0, 0, 0, 0, 0, 0, '')",
            portfolio_id,
            shard,
            owner,
            f"{owner}'s {portfolio_id}",
            opened_at,
        )

    async def leases(self, lasting_s: int) -> None:
        """Let the lease of every shard end in so many seconds."""
        await self.pool.execute("UPDATE shard SET lease_until = now() + $1 * interval '1 second'", lasting_s)

    async def deposit(self, portfolio_id: str, sequence: int, amount: str = "100.25") -> None:
        await self._entry(portfolio_id, sequence, kind="DEPOSIT", amount=Decimal(amount), reference="wire-77")

    async def flow(
        self, portfolio_id: str, sequence: int, amount: str, nav_before: str, at: datetime, kind: str = "DEPOSIT"
    ) -> None:
        """An external flow, booked at `at` when the NAV was `nav_before`."""
        await self._entry(
            portfolio_id, sequence, kind=kind, amount=Decimal(amount), nav_before=Decimal(nav_before), recorded_at=at
        )

    async def fill(
        self,
        portfolio_id: str,
        sequence: int,
        symbol: str = "AAPL",
        side: str = "BUY",
        quantity: str = "10",
        realized: str = "0",
    ) -> None:
        await self._entry(
            portfolio_id,
            sequence,
            kind="FILL",
            amount=Decimal(quantity) * (-1 if side == "BUY" else 1) * 100,
            symbol=symbol,
            side=side,
            quantity=Decimal(quantity),
            price=Decimal(100),
            realized=Decimal(realized),
        )

    async def _entry(
        self,
        portfolio_id: str,
        sequence: int,
        kind: str,
        amount: Decimal,
        symbol: str | None = None,
        side: str | None = None,
        quantity: Decimal | None = None,
        price: Decimal | None = None,
        reference: str | None = None,
        realized: Decimal = Decimal(0),
        nav_before: Decimal | None = None,
        recorded_at: datetime | None = None,
    ) -> None:
        event_id = f"{portfolio_id}-e{sequence}"
        instant = OPENED_AT + timedelta(minutes=sequence)
        await self.pool.execute(
            "INSERT INTO ledger_entry (portfolio_id, sequence, event_id, kind, symbol, side, quantity, price, amount,"
            " fee, realized, cash_after, nav_before, effective_at, recorded_at, reference, content_hash, receivable,"
            " cost, nav_effect, late, hash) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 1, $15, $10, $16, $11, $12,"
            " $13, $14, 0, CASE WHEN $4 = 'FILL' THEN $15::numeric - $9::numeric ELSE 0 END, $9::numeric - 1, false,"
            " $14)",
            portfolio_id,
            sequence,
            event_id,
            kind,
            symbol,
            side,
            quantity,
            price,
            amount,
            Decimal(sequence),
            instant,
            recorded_at or instant + timedelta(seconds=1),
            reference,
            hashlib.sha256(event_id.encode()).digest(),
            realized,
            nav_before,
        )

    async def snapshots(self, portfolio_id: str, navs: Mapping[datetime, str], ledger_sequence: int = 1) -> None:
        await self.pool.executemany(
            "INSERT INTO equity_snapshot (portfolio_id, at, nav, cash, positions_value, quality, marked_at, epoch,"
            " sequence, ledger_sequence, receivables, flows) VALUES ($1, $2, $3, 0, $3, 0, $2, 1, 1, $4, 0, 0)",
            [(portfolio_id, at, Decimal(nav), ledger_sequence) for at, nav in navs.items()],
        )

    async def assets(self, assets: Sequence[Asset]) -> None:
        await upsert_assets(self.pool, assets, OPENED_AT)
