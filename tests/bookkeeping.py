"""The write path without servers: events through `engine.booking` and `engine.posting` into a ledger in memory, a Book,
and the oracle beside them, with everything compared after every step.

`Bookkeeping.send` takes events as the JSON objects of the wire. What the PostgreSQL store reads and writes for a
batch is done here by dictionaries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from engine.book import Account, Book, Holding
from engine.booking import Batch, Booked, Known, Record
from engine.ledger import EXTERNAL_FLOWS, LedgerEntry, LedgerKind
from engine.marks import RATIO_SCALE, Mark, MarkQuality, decode_mark
from engine.pnl import day_base_since
from engine.portfolio import Portfolio, check_invariants, fold, value_portfolio
from engine.posting import PositionsChange, post
from tests.oracle import Oracle

AT = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
AT_TEXT = "2026-11-20T15:00:00Z"
SECTORS = {"AAPL": "Tech", "MSFT": "Tech", "XOM": "Energy", "BTC": "Crypto", "DUST": "Crypto"}


def opening(name: str, event_id: str = "") -> dict[str, Any]:
    return {
        "type": "open",
        "event_id": event_id or f"open-{name}",
        "portfolio_id": name,
        "owner": "user-1",
        "name": name,
        "base_currency": "USD",
        "opened_at": AT_TEXT,
    }


def cash(name: str, kind: str, amount: str, event_id: str) -> dict[str, Any]:
    return {
        "type": "cash",
        "event_id": event_id,
        "portfolio_id": name,
        "kind": kind,
        "amount": amount,
        "currency": "USD",
        "effective_at": AT_TEXT,
    }


def fill(
    name: str, side: str, quantity: str, price: str, event_id: str, symbol: str = "AAPL", fee: str = "0"
) -> dict[str, Any]:
    return {
        "type": "fill",
        "event_id": event_id,
        "portfolio_id": name,
        "symbol": symbol,
        "side": side,
        "quantity": quantity,
        "price": price,
        "fee": fee,
        "currency": "USD",
        "executed_at": AT_TEXT,
    }


def record(event: dict[str, Any] | bytes, offset: int = 0, key: str = "") -> Record:
    if isinstance(event, bytes):
        return Record(offset, key.encode(), event)
    return Record(offset, (key or event["portfolio_id"]).encode(), json.dumps(event).encode())


@dataclass
class Baseline:
    nav: int
    sequence: int
    values: dict[str, int]


@dataclass
class Bookkeeping:
    """`shard_of` says where a portfolio lives; each shard's records are booked apart, as by the evaluator."""

    shards_count: int = 1
    oracle: Oracle = field(default_factory=Oracle)
    book: Book = field(default_factory=Book)
    entries: dict[str, list[LedgerEntry]] = field(default_factory=dict)
    hashes: dict[str, bytes] = field(default_factory=dict)
    folded: dict[str, Portfolio] = field(default_factory=dict)
    baselines: dict[str, Baseline] = field(default_factory=dict)
    changes: list[PositionsChange] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)

    def shard_of(self, name: str) -> int:
        return sum(name.encode()) % self.shards_count

    # -- in ----------------------------------------------------------------------------------------------

    def send(self, *events: dict[str, Any]) -> list[Booked]:
        """Book the events in one batch per shard; oracle and engine must agree on each one's fate."""
        fates = [self.oracle.take(event) for event in events]
        by_shard: dict[int, list[dict[str, Any]]] = {}
        for event in events:
            by_shard.setdefault(self.shard_of(event["portfolio_id"]), []).append(event)
        outcomes = [self.send_records(shard, [record(e) for e in sent]) for shard, sent in by_shard.items()]
        counted = [
            sum(len(outcome.entries) for outcome in outcomes),
            sum(outcome.duplicates for outcome in outcomes),
            sum(len(outcome.dead_letters) for outcome in outcomes),
        ]
        booked, duplicates = fates.count("BOOKED"), fates.count("DUPLICATE")
        assert counted == [booked, duplicates, len(fates) - booked - duplicates], fates
        return outcomes

    def send_records(self, shard: int, records: Sequence[Record]) -> Booked:
        batch = Batch(shard, records, self.book, AT)
        outcome = batch.book(self.known(batch))
        for entry in outcome.entries:
            self.entries.setdefault(entry.portfolio_id, []).append(entry)
            self.hashes[entry.event_id] = entry.content_hash
        for name in outcome.touched:
            self.keep(outcome.portfolios[name], outcome.touched[name])
        self.changes = post(self.book, shard, outcome, SECTORS.__getitem__)
        return outcome

    def known(self, batch: Batch) -> Known:
        """What PostgreSQL would hand out: copies, with the positions that the batch names."""
        portfolios = {
            name: replace(held, positions={s: p for s, p in held.positions.items() if s in batch.symbols})
            for name, held in self.folded.items()
            if name in batch.portfolio_ids
        }
        hashes = {i: h for i, h in self.hashes.items() if i in batch.event_ids}
        return Known(hashes, portfolios, {n: self.shard_of(n) for n in portfolios}, frozenset(SECTORS))

    def keep(self, changed: Portfolio, symbols: set[str]) -> None:
        before = self.folded.get(changed.portfolio_id)
        positions = dict(before.positions) if before else {}
        for symbol in symbols:
            positions.pop(symbol, None)
            if symbol in changed.positions:
                positions[symbol] = changed.positions[symbol]
        self.folded[changed.portfolio_id] = replace(changed, positions=positions)

    def tick(self, symbol: str, price: str) -> None:
        self.oracle.tick(symbol, price)
        self.book.tick(symbol, Decimal(price), 1)

    def snapshot(self) -> list[Mark]:
        return [self.mark(name) for name in sorted(self.folded) if name in self.book]

    def cut(self) -> None:
        """The day cut of all shards, its baselines kept as PostgreSQL would."""
        self.oracle.cut()
        for shard in range(self.shards_count):
            self.book.cut(shard)
        for name in self.folded:
            values = {held.symbol: held.value for held in self.book.held(name)}
            self.baselines[name] = Baseline(self.book.nav(name), len(self.entries[name]), values)

    def take_over(self, shard: int) -> None:
        """Forget a shard and build it again from ledger, positions and baselines alone."""
        self.book.drop_shard(shard)
        assert not len(self.book.slots_of(shard))
        for name, held in self.folded.items():
            if self.shard_of(name) == shard:
                assert name not in self.book
                self.reopen(name, held)

    def reopen(self, name: str, held: Portfolio) -> None:
        baseline = self.baselines.get(name, Baseline(0, 0, {}))
        bases, flows = dict(baseline.values), []
        for entry in self.entries[name][baseline.sequence :]:
            if entry.kind is LedgerKind.FILL:
                bases[entry.symbol] = bases.get(entry.symbol, 0) - entry.amount
            elif entry.kind in EXTERNAL_FLOWS:
                flows.append((entry.nav_before, entry.amount))
        account = Account(
            held.cash, held.realized, held.fees, held.ledger_sequence, day_base_since(baseline.nav, flows)
        )
        holdings = [Holding(s, p.quantity, p.cost, bases.pop(s, 0)) for s, p in held.positions.items()]
        self.book.open(name, self.shard_of(name), account, holdings)
        for symbol, base in bases.items():
            self.book.keep_closed_day_base(name, symbol, base)

    # -- out ---------------------------------------------------------------------------------------------

    def mark(self, name: str) -> Mark:
        slots = np.array([self.book.slot(name)], np.int64)
        return decode_mark(self.book.marks(slots, 1, 1).tobytes(), 1)

    def check(self) -> None:
        """Oracle, exact reference, ledger fold and Book say the same, to the micro-unit."""
        self.oracle.check()
        revalued = dict(self.book.revalued())
        assert revalued.keys() == self.oracle.portfolios.keys() == self.folded.keys()
        assert len(self.book) == len(revalued)
        for name in self.folded:
            self.check_portfolio(name)
            mark = self.mark(name)
            assert revalued[name] == mark.positions_value
            self.check_mark(name, mark)
            self.check_positions(name)

    def check_portfolio(self, name: str) -> None:
        expected, held = self.oracle.portfolios[name], self.folded[name]
        prices = {s: Decimal(p.numerator) / Decimal(p.denominator) for s, p in self.oracle.prices.items()}
        check_invariants(held, prices)
        assert fold(name, "USD", self.entries[name]) == held
        assert [entry.sequence for entry in self.entries[name]] == list(range(1, expected.entries + 1))
        assert (held.cash, held.realized, held.fees) == (expected.cash, expected.realized, expected.fees)
        assert (held.income, held.flows) == (expected.income, expected.flows)
        of_engine = {s: (Fraction(p.quantity), p.cost, p.realized) for s, p in held.positions.items()}
        of_oracle = {s: (p.quantity, p.cost, p.realized) for s, p in expected.positions.items()}
        assert of_engine == of_oracle
        valued, figures = value_portfolio(held, prices), expected.figures(self.oracle.prices)
        assert (valued.nav, valued.positions_value) == (figures.nav, figures.positions_value)
        assert (valued.unrealized, valued.values) == (figures.unrealized, figures.values)
        assert bool(valued.missing) == figures.missing

    def check_mark(self, name: str, mark: Mark) -> None:
        expected = self.oracle.portfolios[name]
        figures = expected.figures(self.oracle.prices)
        for field_name in ("nav", "cash", "positions_value", "unrealized", "realized", "fees", "day_pnl"):
            assert getattr(mark, field_name) == getattr(figures, field_name), field_name
        assert mark.ledger_sequence == figures.ledger_sequence
        assert mark.quality is (MarkQuality.MISSING if figures.missing else MarkQuality.LIVE)
        self.check_ratio(mark, expected.day_return(self.oracle.prices), len(expected.day.flows))

    def check_ratio(self, mark: Mark, exact: Fraction | None, flows: int) -> None:
        """Floats: within the roundings of 2 divisions and multiplications per flow."""
        if exact is None or abs(exact) > 999_999:
            assert exact is not None or mark.day_pnl_ratio_e12 is None
            return
        room = 1 + (1 + abs(exact)) * RATIO_SCALE * Fraction(2 * flows + 4, 2**52)
        assert mark.day_pnl_ratio_e12 is not None
        assert abs(mark.day_pnl_ratio_e12 - exact * RATIO_SCALE) <= room

    def check_positions(self, name: str) -> None:
        figures = self.oracle.portfolios[name].figures(self.oracle.prices)
        held = {at.symbol: at for at in self.book.held(name)}
        assert {symbol: at.value for symbol, at in held.items()} == figures.values
        assert {s for s, at in held.items() if at.missing} == {s for s in held if s not in self.oracle.prices}
        for symbol, day_pnl in figures.position_day_pnl.items():
            value = held[symbol].value if symbol in held else 0
            assert value - self.book.position_day_base(name, symbol) == day_pnl, symbol
