"""The seed load: 20,000 portfolios × 15 positions in 500 assets, popularity Zipf 0.8; a fixed seed.

`Load` holds it as arrays for the in-process figures; `fill_database` writes it as ledger, positions and accounts
(booked by the engine itself) for those that run the whole system.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import asyncpg
import numpy as np
from numpy.typing import NDArray

from engine.amounts import parse_number
from engine.book import Account, Book, Holding
from engine.entries import draft_event
from engine.messages import CashEvent, FillEvent, OpenEvent
from engine.pnl import DayBase
from engine.portfolio import Portfolio, Present
from engine.stores.ledger_rows import write_entries, write_positions

PORTFOLIOS_COUNT = 20_000
POSITIONS_COUNT = 15
ASSETS_COUNT = 500
ZIPF_EXPONENT = 0.8
SEED = 20_261_122
PORTFOLIOS_AT_ONCE = 50_000  # 200 MB of races
OPENED_AT = datetime(2026, 11, 1, tzinfo=UTC)
ENTRIES_PER_STATEMENT = 10_000
PORTFOLIOS_PER_STATEMENT = 1_000
DEPOSIT = "10000000"
ASSET_COLUMNS = ["symbol", "name", "asset_class", "sector", "industry"]


def portfolio_id(number: int) -> str:
    return f"p-{number:06d}"


@dataclass(frozen=True, slots=True)
class Load:
    """`held[p]` are the asset numbers of portfolio p, `quantities[p]` its whole quantities."""

    held: NDArray[np.int64]
    quantities: NDArray[np.int64]
    prices: list[Decimal]

    def symbol(self, asset: int) -> str:
        return f"A{asset:03d}"

    def portfolio_id(self, number: int) -> str:
        return portfolio_id(number)


_ACCOUNT = Account(0, 0, 0, 0, 0, 0, 0, 0, 1, DayBase(0, 1.0, 0))


def make_load(portfolios_count: int = PORTFOLIOS_COUNT) -> Load:
    random = np.random.default_rng(SEED)
    popularity = 1.0 / np.arange(1, ASSETS_COUNT + 1) ** ZIPF_EXPONENT
    # Exponential races choose without replacement, in proportion to popularity, for many portfolios at once.
    chosen = []
    for first in range(0, portfolios_count, PORTFOLIOS_AT_ONCE):
        races = random.exponential(size=(min(PORTFOLIOS_AT_ONCE, portfolios_count - first), ASSETS_COUNT)) / popularity
        chosen.append(np.argpartition(races, POSITIONS_COUNT, axis=1)[:, :POSITIONS_COUNT])
    held = np.concatenate(chosen)
    quantities = random.integers(1, 500, size=held.shape)
    cents = random.integers(500, 50_000, size=ASSETS_COUNT)
    return Load(held, quantities, [Decimal(int(cent)) / 100 for cent in cents])


def make_book(load: Load) -> Book:
    book = Book()
    for asset, price in enumerate(load.prices):
        book.tick(load.symbol(asset), price, 1)
    for number in range(len(load.held)):
        holdings = [
            Holding(load.symbol(asset), Decimal(int(quantity)), 0, 0)
            for asset, quantity in zip(load.held[number].tolist(), load.quantities[number].tolist(), strict=True)
        ]
        book.open(load.portfolio_id(number), number % 4, _ACCOUNT, holdings)
    return book


def _booked(load: Load, number: int) -> tuple[Portfolio, list[dict[str, object]]]:
    name, common = load.portfolio_id(number), {"currency": "USD"}
    portfolio = Portfolio(name, "USD")
    events: list[OpenEvent | CashEvent | FillEvent] = [
        OpenEvent(
            event_id=f"{name}-open",
            portfolio_id=name,
            owner=f"owner-{number % 5_000}",
            name=name,
            base_currency="USD",
            opened_at=OPENED_AT,
        ),
        CashEvent(
            event_id=f"{name}-cash",
            portfolio_id=name,
            kind="DEPOSIT",
            amount=DEPOSIT,
            effective_at=OPENED_AT,
            **common,
        ),
    ]
    for at, (asset, quantity) in enumerate(
        zip(load.held[number].tolist(), load.quantities[number].tolist(), strict=True)
    ):
        events.append(
            FillEvent(
                event_id=f"{name}-{at}",
                portfolio_id=name,
                symbol=load.symbol(asset),
                side="BUY",
                quantity=str(quantity),
                price=str(load.prices[asset]),
                executed_at=OPENED_AT,
                **common,
            )
        )
    entries = []
    for event in events:
        price = parse_number(event.price, "price") if isinstance(event, FillEvent) else None
        booking = portfolio.book(draft_event(event, OPENED_AT), Present(portfolio.cash, price, price))
        entries.append(booking.entry)
    return portfolio, entries


async def fill_database(postgres_url: str, load: Load, shard_of: dict[str, int]) -> None:
    """COPY the load into a migrated database whose shards exist."""
    accounts, portfolios, entries = [], {}, []
    for number in range(len(load.held)):
        portfolio, booked = _booked(load, number)
        name = portfolio.portfolio_id
        sums = portfolio.cash, 0, 0, 0, portfolio.flows, 0, portfolio.trading, 0
        money = [Decimal(value).scaleb(-6) for value in sums]
        account = (name, shard_of[name], f"owner-{number % 5_000}", name, "USD", "00:00 UTC", OPENED_AT, *money)
        accounts.append((*account, len(booked), portfolio.ledger_hash, portfolio.fills, portfolio.streak))
        portfolios[name] = portfolio
        entries += booked
    connection = await asyncpg.connect(postgres_url)
    assets = [(load.symbol(n), load.symbol(n), "EQUITY", f"Sector {n % 11}", "") for n in range(ASSETS_COUNT)]
    await connection.copy_records_to_table("asset", records=assets, columns=ASSET_COLUMNS)
    await connection.copy_records_to_table("portfolio", records=accounts)
    names = list(portfolios)
    for first in range(0, len(names), PORTFOLIOS_PER_STATEMENT):
        held = {name: portfolios[name].positions for name in names[first : first + PORTFOLIOS_PER_STATEMENT]}
        await write_positions(connection, portfolios, held)
    for first in range(0, len(entries), ENTRIES_PER_STATEMENT):
        await write_entries(connection, entries[first : first + ENTRIES_PER_STATEMENT])
    await connection.execute("ANALYZE")
    await connection.close()
