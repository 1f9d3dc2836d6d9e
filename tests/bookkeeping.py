"""The write path without servers: events and corporate actions through `engine.booking` and `engine.posting` into a
ledger in memory, a Book, and the oracle beside them, with everything compared after every step.

`Bookkeeping.send` takes events as the JSON objects of the wire, `split`, `accrue` and `pay` the steps of corporate
actions. What the PostgreSQL store reads and writes for them is done here by dictionaries. Time is `now`; every step
takes a minute.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from engine.amounts import parse_number, scale_number
from engine.book import Book, Holding
from engine.booking import AppliedSplit, Batch, Booked, DueStep, Holder, Known, Record, StepPrices, book_step
from engine.corporate_actions import Split, Step, parse_scale, price_after, scale_since
from engine.instants import to_ns
from engine.ledger import EXTERNAL_FLOWS, LedgerEntry, LedgerKind, Side
from engine.marks import RATIO_SCALE, Mark, MarkQuality, decode_mark
from engine.pnl import day_base_since
from engine.portfolio import ClosedPosition, Portfolio, check_invariants, fold, value_portfolio
from engine.posting import PositionsChange, account, post
from tests.oracle import Cycle, Oracle

AT = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
AT_TEXT = "2026-11-20T15:00:00Z"
STEP = timedelta(minutes=1)
MARK_FIELDS = ("nav", "cash", "receivables", "positions_value", "unrealized", "realized", "fees", "income", "flows")
MARK_FIELDS += ("trading", "corporate", "day_pnl")
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
    name: str,
    side: str,
    quantity: str,
    price: str,
    event_id: str,
    symbol: str = "AAPL",
    fee: str = "0",
    executed_at: str = AT_TEXT,
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
        "executed_at": executed_at,
    }


def reversal(name: str, reverses: str, event_id: str) -> dict[str, Any]:
    return {
        "type": "reversal",
        "event_id": event_id,
        "portfolio_id": name,
        "reverses": reverses,
        "effective_at": AT_TEXT,
    }


def split(symbol: str, ratio: str, at: datetime, action_id: str) -> dict[str, Any]:
    effective_at = at.isoformat().replace("+00:00", "Z")
    return {"type": "split", "action_id": action_id, "symbol": symbol, "ratio": ratio, "effective_at": effective_at}


def dividend(symbol: str, amount: str, action_id: str) -> dict[str, Any]:
    return {"type": "dividend", "action_id": action_id, "symbol": symbol, "amount": amount, "currency": "USD"}


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
    closed: dict[str, list[ClosedPosition]] = field(default_factory=dict)
    splits: dict[int, dict[str, list[AppliedSplit]]] = field(default_factory=dict)
    owed: dict[tuple[str, str], int] = field(default_factory=dict)
    now: datetime = AT

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
        batch = Batch(shard, records, self.book, self.now)
        outcome = batch.book(self.known(batch, shard))
        for entry in outcome.entries:
            self.hashes[entry.event_id] = entry.content_hash
        self.posted(shard, outcome)
        self.now += STEP
        return outcome

    def sector_of(self, symbol: str) -> str:
        return SECTORS.get(symbol, "UNCLASSIFIED")

    def posted(self, shard: int, outcome: Booked) -> None:
        for entry in outcome.entries:
            self.entries.setdefault(entry.portfolio_id, []).append(entry)
        for name in outcome.touched:
            self.keep(outcome.portfolios[name], outcome.touched[name])
        for name, cycle in outcome.closed:
            self.closed.setdefault(name, []).append(cycle)
        self.changes = list(post(self.book, shard, outcome, self.sector_of, self.splits_in_book))

    def splits_in_book(self, symbol: str) -> Sequence[Split]:
        taken = {applied.split for of_shard in self.splits.values() for applied in of_shard.get(symbol, ())}
        return sorted(taken, key=lambda split: split.effective_at)

    def known(self, batch: Batch, shard: int) -> Known:
        """What PostgreSQL would hand out: copies, with the positions that the batch names."""
        originals = {
            e.event_id: e for entries in self.entries.values() for e in entries if e.event_id in batch.reverses
        }
        touched = batch.positions(originals)
        portfolios = {
            name: replace(held, positions={s: p for s, p in held.positions.items() if (name, s) in touched})
            for name, held in self.folded.items()
            if name in batch.portfolio_ids
        }
        hashes = {i: h for i, h in self.hashes.items() if i in batch.event_ids}
        return Known(
            hashes,
            portfolios,
            {n: self.shard_of(n) for n in portfolios},
            frozenset(SECTORS),
            originals,
            frozenset(self.reversed_ids() & batch.reverses),
            self.splits.get(shard, {}),
        )

    def reversed_ids(self) -> set[str]:
        return {e.reverses for entries in self.entries.values() for e in entries if e.reverses is not None}

    # -- corporate actions -------------------------------------------------------------------------------

    def split(self, symbol: str, ratio: str, at: datetime, action_id: str) -> None:
        """A split on every shard, as one evaluator that owns them all does it."""
        self.oracle.split(split(symbol, ratio, at, action_id))
        of_symbol = Split(at, parse_scale(ratio))
        step = Step(action_id, LedgerKind.SPLIT, symbol, at, 0, scale=of_symbol.scale)
        before = self.book.price(symbol)
        after = (before and price_after(before, self.book.price_as_of_ns(symbol), (of_symbol,))) or None
        for shard in range(self.shards_count):
            outcome = self.book_step(shard, step, StepPrices(before, after))
            if after is not None:
                self.book.rescale(symbol, after)
            applied = self.splits.setdefault(shard, {}).setdefault(symbol, [])
            applied.append(AppliedSplit(of_symbol, self.now))
            self.posted(shard, outcome)
        self.book.revalue(symbol)
        self.now += STEP

    def accrue(self, symbol: str, amount: str, at: datetime, action_id: str) -> None:
        """The ex-date of a dividend, whose session opens at `at`."""
        self.oracle.accrue(dividend(symbol, amount, action_id), at)
        per_share = parse_number(amount, "amount")
        step = Step(action_id, LedgerKind.DIVIDEND_ACCRUED, symbol, at, 0, "USD", per_share=per_share)
        price = self.book.price(symbol)
        for shard in range(self.shards_count):
            outcome = self.book_step(shard, step, StepPrices(price, price))
            self.owed |= {(entry.portfolio_id, action_id): entry.receivable for entry in outcome.entries}
            self.posted(shard, outcome)
        self.now += STEP

    def pay(self, symbol: str, amount: str, action_id: str) -> None:
        """What was accrued becomes cash."""
        self.oracle.pay(dividend(symbol, amount, action_id))
        step = Step(action_id, LedgerKind.DIVIDEND_PAID, symbol, self.now, 0, "USD", per_share=Decimal(amount))
        price = self.book.price(symbol)
        for shard in range(self.shards_count):
            outcome = self.book_step(shard, step, StepPrices(price, price))
            for entry in outcome.entries:
                del self.owed[entry.portfolio_id, action_id]
            self.posted(shard, outcome)
        self.now += STEP

    def book_step(self, shard: int, step: Step, prices: StepPrices) -> Booked:
        holders = [self.holder(name, step) for name in sorted(self.folded) if self.shard_of(name) == shard]
        concerned = [holder for holder in holders if holder is not None]
        outcome = Booked()
        book_step(outcome, DueStep(step, prices, self.now > step.at, b""), concerned, self.now)
        return outcome

    def holder(self, name: str, step: Step) -> Holder | None:
        held = self.folded[name]
        copied = replace(held, positions={s: p for s, p in held.positions.items() if s == step.symbol})
        if step.kind is LedgerKind.DIVIDEND_PAID:
            owed = self.owed.get((name, step.action_id))
            return None if owed is None else Holder(copied, owed=owed)
        applied = [one.split for one in self.splits.get(self.shard_of(name), {}).get(step.symbol, ())]
        return Holder(copied, self.bought_since(name, step), scale_since(to_ns(step.at), applied))

    def bought_since(self, name: str, step: Step) -> Decimal:
        """The shares of fills executed at the step's instant or later, in today's; those taken back are none."""
        bought, taken_back = Decimal(0), self.reversed_ids()
        applied = [one.split for one in self.splits.get(self.shard_of(name), {}).get(step.symbol, ())]
        for entry in self.entries[name]:
            mine = entry.kind is LedgerKind.FILL and entry.symbol == step.symbol and entry.effective_at >= step.at
            if mine and entry.reverses is None and entry.event_id not in taken_back:
                assert entry.quantity is not None
                scale = scale_since(to_ns(entry.effective_at), applied)
                shares = scale_number(entry.quantity, scale, "quantity")
                bought += shares if entry.side is Side.BUY else -shares
        return bought

    def keep(self, changed: Portfolio, symbols: set[str]) -> None:
        before = self.folded.get(changed.portfolio_id)
        positions = dict(before.positions) if before else {}
        for symbol in symbols:
            positions.pop(symbol, None)
            if symbol in changed.positions:
                positions[symbol] = changed.positions[symbol]
        self.folded[changed.portfolio_id] = replace(changed, positions=positions)

    def tick(self, symbol: str, price: str, at: datetime | None = None) -> None:
        """A quote stamped `at`, or of now; one of before a split that the Book has is not applied."""
        at = self.now if at is None else at
        self.oracle.tick(symbol, price, at)
        if not any(one.effective_at_ns > to_ns(at) for one in self.splits_in_book(symbol)):
            self.book.tick(symbol, Decimal(price), to_ns(at))
        self.now += STEP

    def snapshot(self) -> list[Mark]:
        return [self.mark(name) for name in sorted(self.folded) if name in self.book]

    def cut(self) -> None:
        """The day cut of all shards, its baselines kept as PostgreSQL would."""
        self.oracle.cut()
        for shard in range(self.shards_count):
            self.book.cut(self.book.slots_of(shard), to_ns(self.now))
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
        figures = account(held, day_base_since(baseline.nav, flows))
        holdings = [Holding(s, p.quantity, p.cost, bases.pop(s, 0)) for s, p in held.positions.items()]
        self.book.open(name, self.shard_of(name), figures, holdings)
        for symbol, base in bases.items():
            self.book.keep_closed_day_base(name, symbol, base)

    # -- out ---------------------------------------------------------------------------------------------

    def mark(self, name: str) -> Mark:
        slots = np.array([self.book.slot(name)], np.int64)
        return decode_mark(self.book.marks(slots, 1, 1).tobytes(), 1)

    def check(self) -> None:
        """Oracle, exact reference, ledger fold and Book say the same, to the micro-unit."""
        self.oracle.check()
        self.book.check()
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
        assert (held.income, held.flows, held.receivables) == (expected.income, expected.flows, expected.receivables)
        assert (held.trading, held.corporate) == (expected.trading, expected.corporate)
        self.check_cycles(name)
        valued, figures = value_portfolio(held, prices), expected.figures(self.oracle.prices)
        assert (valued.nav, valued.positions_value) == (figures.nav, figures.positions_value)
        assert (valued.unrealized, valued.values) == (figures.unrealized, figures.values)
        assert bool(valued.missing) == figures.missing

    def check_cycles(self, name: str) -> None:
        """The open positions and those that are over, and what each entry did to NAV adds up."""
        expected, held = self.oracle.portfolios[name], self.folded[name]
        assert {
            s: (Fraction(p.quantity), p.cost, p.realized, p.fees, p.opened_sequence) for s, p in held.positions.items()
        } == {s: (p.quantity, p.cost, p.realized, p.fees, p.opened_sequence) for s, p in expected.positions.items()}
        assert expected.cycles == [
            Cycle(c.symbol, c.is_long, c.realized, c.fees, c.opened_sequence, c.closed_sequence)
            for c in self.closed.get(name, ())
        ]
        effects = dict.fromkeys(LedgerKind, 0)
        for entry in self.entries[name]:
            effects[entry.kind] += entry.nav_effect + (entry.fee if entry.kind is LedgerKind.FILL else 0)
        assert effects[LedgerKind.FILL] == held.trading
        assert effects[LedgerKind.SPLIT] == held.corporate
        assert effects[LedgerKind.DIVIDEND_PAID] == 0

    def check_mark(self, name: str, mark: Mark) -> None:
        expected = self.oracle.portfolios[name]
        figures = expected.figures(self.oracle.prices)
        for field_name in MARK_FIELDS:
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
