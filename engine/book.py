"""The Book: the columnar state of all portfolios that one evaluator owns, and the reverse index asset → holders.

Per asset a column of its holders, dense and growable:

    holder intp (portfolio slot) | quantity float64 | value, cost, day_base int64 micro-units

and per portfolio, by slot: cash, realized, fees, positions_value, cost, … int64 micro-units. A tick touches the
asset's column and the rows of its holders, nothing else:

    value_new = round(quantity × price × 10⁶)      positions_value += value_new − value_old

Values are absolute and whole, so the delta path equals a full recomputation bit for bit, for ever.

Exactness. `value_new` equals engine.amounts.value_micro for every quantity and price that it admits:

* The float product x carries at most four roundings, |x − exact| ≤ 2⁻⁵⁰ |x|. When quantities and price have at most
  6 decimals together, the exact product is whole, so for |x| < 2⁴⁹ the nearest integer of x is it.
* Otherwise each x whose distance to a half is within that error, or |x| ≥ 2⁴⁹, is computed again in Decimal: the
  float64 of at most 15 digits gives its decimal back (`repr`). With ordinary amounts that is one in 10⁵.

A position that never had a price is carried at its cost, its portfolio's quality is MISSING; one whose value would
leave ±AMOUNT_MAX_MICRO is carried at its cost too, and nobody else's price waits for it. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from engine.amounts import MICRO, MICRO_DIGITS, decimals_of
from engine.marks import MARK, MarkArray, MarkQuality
from engine.pnl import DayBase, day_ratio_e12
from engine.positions import carried_value

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]
Slots = NDArray[np.intp]
Float64s = NDArray[np.float64]

MICRO_SCALE = float(MICRO)
HALF = 0.5
EXACT_PRODUCT_MAX = float(2**49)
PRODUCT_ERROR = float(2**-50)
NAV_MAX_MICRO = 2**62  # twice this would wrap int64
NO_SHARD = -1  # a free slot's
COLUMN_CAPACITY_MIN = 8
SLOTS_CAPACITY_MIN = 64


@dataclass(frozen=True, slots=True)
class Holding:
    """One open position as it enters the Book. Amounts in micro-units."""

    symbol: str
    quantity: Decimal
    cost: int
    day_base: int


@dataclass(frozen=True, slots=True)
class Account:
    """A portfolio's own figures as they enter the Book. Amounts in micro-units."""

    cash: int
    realized: int
    fees: int
    ledger_sequence: int
    day: DayBase


@dataclass(frozen=True, slots=True)
class HeldValue:
    """One position's present value, as the Book holds it."""

    symbol: str
    value: int
    day_base: int
    missing: bool


class _Column:
    """One asset's holders. Rows [0, count) are in use; removing moves the last row into the gap."""

    __slots__ = (
        "cost",
        "count",
        "day_base",
        "decimals_max",
        "holder",
        "price",
        "quantity",
        "quantity_max",
        "stale",
        "symbol",
        "ts_event_ns",
        "value",
    )

    def __init__(self, symbol: str) -> None:
        self.symbol = symbol
        self.count = 0
        self.holder: Slots = np.zeros(COLUMN_CAPACITY_MIN, np.intp)
        self.quantity: Float64s = np.zeros(COLUMN_CAPACITY_MIN, np.float64)
        self.value: Int64s = np.zeros(COLUMN_CAPACITY_MIN, np.int64)
        self.cost: Int64s = np.zeros(COLUMN_CAPACITY_MIN, np.int64)
        self.day_base: Int64s = np.zeros(COLUMN_CAPACITY_MIN, np.int64)
        self.price: Decimal | None = None
        self.ts_event_ns = 0
        self.stale = False
        self.decimals_max = 0  # these two bound what is in the column; too wide is merely slower
        self.quantity_max: float = 0

    def reserve(self, count: int) -> None:
        capacity = len(self.holder)
        if count <= capacity:
            return
        grown = max(count, capacity * 2)
        for name in ("holder", "quantity", "value", "cost", "day_base"):
            old = getattr(self, name)
            new = np.zeros(grown, old.dtype)
            new[: self.count] = old[: self.count]
            setattr(self, name, new)

    def values_at(self, price: Decimal) -> Int64s:
        """round(quantity × price × 10⁶) of all rows, exact; the cost of those beyond the range."""
        scale = float(price) * MICRO_SCALE
        quantity = self.quantity[: self.count]
        product = quantity * scale
        rounded = np.rint(product)
        if self.decimals_max + decimals_of(price) <= MICRO_DIGITS and self.quantity_max * scale < EXACT_PRODUCT_MAX:
            return rounded.astype(np.int64)
        doubtful = np.abs(product - rounded) >= HALF - np.abs(product) * PRODUCT_ERROR
        values = np.where(doubtful, 0, rounded).astype(np.int64)
        for row in np.flatnonzero(doubtful).tolist():
            values[row] = carried_value(Decimal(repr(float(quantity[row]))), int(self.cost[row]), price)
        return values


class Book:
    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}
        self._slot_of: dict[str, int] = {}
        self._id_of: list[str] = []
        self._free: list[int] = []
        # Per slot: symbol → row in that symbol's column.
        self._rows: list[dict[str, int]] = []
        # Day bases of positions closed since the cut; a position reopened the same day goes on from there.
        self._closed_day_base: dict[tuple[int, str], int] = {}
        self._day_cut_at_ns = 0
        self._allocate(SLOTS_CAPACITY_MIN)

    def _allocate(self, capacity: int) -> None:
        for name, dtype in _SLOT_FIELDS:
            old = getattr(self, name, None)
            new = np.zeros(capacity, dtype)
            if old is not None:
                new[: len(old)] = old
            setattr(self, name, new)

    cash: Int64s
    realized: Int64s
    fees: Int64s
    positions_value: Int64s
    cost: Int64s
    ledger_sequence: Int64s
    day_base: Int64s
    day_factor: Float64s
    segment_base: Int64s
    missing_count: Int32s
    stale_count: Int32s
    shard: Int32s
    dirty: NDArray[np.bool_]

    # -- portfolios ------------------------------------------------------------------------------------------

    def __contains__(self, portfolio_id: str) -> bool:
        return portfolio_id in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def positions_count(self) -> int:
        return sum(column.count for column in self._columns.values())

    @property
    def symbols(self) -> Iterable[str]:
        return self._columns.keys()

    @property
    def day_cut_at_ns(self) -> int:
        return self._day_cut_at_ns

    def slot(self, portfolio_id: str) -> int:
        """Raises KeyError when this Book does not hold the portfolio."""
        return self._slot_of[portfolio_id]

    def portfolio_ids(self, slots: Int64s) -> list[str]:
        return [self._id_of[slot] for slot in slots.tolist()]

    def slots_of(self, shard: int) -> Int64s:
        used = np.fromiter(self._slot_of.values(), np.int64, len(self._slot_of))
        return np.sort(used[self.shard[used] == shard])

    def open(self, portfolio_id: str, shard: int, account: Account, holdings: Iterable[Holding] = ()) -> int:
        """Take a portfolio in, with its open positions; returns its slot."""
        if portfolio_id in self._slot_of:
            raise ValueError(f"{portfolio_id} is in the Book already")
        slot = self._new_slot(portfolio_id)
        self.shard[slot] = shard
        for name in ("positions_value", "cost", "missing_count", "stale_count"):
            getattr(self, name)[slot] = 0
        self.set_account(portfolio_id, account)
        for holding in holdings:
            self.set_position(portfolio_id, holding)
        return slot

    def _new_slot(self, portfolio_id: str) -> int:
        if self._free:
            slot = self._free.pop()
            self._id_of[slot], self._rows[slot] = portfolio_id, {}
        else:
            slot = len(self._id_of)
            self._id_of.append(portfolio_id)
            self._rows.append({})
            if slot >= len(self.cash):
                self._allocate(2 * len(self.cash))
        self._slot_of[portfolio_id] = slot
        return slot

    def set_account(self, portfolio_id: str, account: Account) -> None:
        slot = self._slot_of[portfolio_id]
        self.cash[slot] = account.cash
        self.realized[slot] = account.realized
        self.fees[slot] = account.fees
        self.ledger_sequence[slot] = account.ledger_sequence
        self.day_base[slot] = account.day.base
        self.day_factor[slot] = np.nan if account.day.factor is None else account.day.factor
        self.segment_base[slot] = account.day.segment_base
        self.dirty[slot] = True

    def day(self, portfolio_id: str) -> DayBase:
        slot = self._slot_of[portfolio_id]
        factor = float(self.day_factor[slot])
        known = None if np.isnan(factor) else factor
        return DayBase(int(self.day_base[slot]), known, int(self.segment_base[slot]))

    def nav(self, portfolio_id: str) -> int:
        """NAV in micro-units at the last applied prices."""
        slot = self._slot_of[portfolio_id]
        return int(self.cash[slot]) + int(self.positions_value[slot])

    def drop_shard(self, shard: int) -> None:
        """Forget all portfolios of a shard that now belongs to somebody else."""
        for column in self._columns.values():
            self._drop_rows(column, shard)
        dropped = set(self.slots_of(shard).tolist())
        self._closed_day_base = {k: base for k, base in self._closed_day_base.items() if k[0] not in dropped}
        for slot in dropped:
            del self._slot_of[self._id_of[slot]]
            self._rows[slot] = {}
            self.dirty[slot], self.shard[slot] = False, NO_SHARD
            self._free.append(slot)

    def _drop_rows(self, column: _Column, shard: int) -> None:
        count = column.count
        kept = np.flatnonzero(self.shard[column.holder[:count]] != shard)
        if len(kept) == count:
            return
        for name in ("holder", "quantity", "value", "cost", "day_base"):
            array = getattr(column, name)
            array[: len(kept)] = array[kept]
        column.count = len(kept)
        for row, holder in enumerate(column.holder[: column.count].tolist()):
            self._rows[holder][column.symbol] = row

    # -- positions -------------------------------------------------------------------------------------------

    def set_position(self, portfolio_id: str, holding: Holding) -> None:
        """Set a position to `holding` (absolute); quantity 0 closes it."""
        slot = self._slot_of[portfolio_id]
        column = self._columns.get(holding.symbol)
        if column is None:
            column = self._columns[holding.symbol] = _Column(holding.symbol)
        value = carried_value(holding.quantity, holding.cost, column.price)
        row = self._rows[slot].get(holding.symbol)
        if not holding.quantity:
            if row is not None:
                self._remove(column, row)
            self._closed_day_base[slot, holding.symbol] = holding.day_base
        else:
            if row is None:
                row = self._append(column, slot)
            self._move(slot, value - int(column.value[row]), holding.cost - int(column.cost[row]))
            column.quantity[row] = float(holding.quantity)
            column.value[row], column.cost[row] = value, holding.cost
            column.day_base[row] = holding.day_base
            column.decimals_max = max(column.decimals_max, decimals_of(holding.quantity))
            column.quantity_max = max(column.quantity_max, abs(float(holding.quantity)))
        self.dirty[slot] = True

    def _move(self, slot: int, value_change: int, cost_change: int) -> None:
        self.positions_value[slot] += value_change
        self.cost[slot] += cost_change

    def _append(self, column: _Column, slot: int) -> int:
        row = column.count
        column.reserve(row + 1)
        column.holder[row] = slot
        column.value[row] = column.cost[row] = 0
        column.count += 1
        self._rows[slot][column.symbol] = row
        self._closed_day_base.pop((slot, column.symbol), None)
        self.missing_count[slot] += column.price is None
        self.stale_count[slot] += column.stale
        return row

    def _remove(self, column: _Column, row: int) -> None:
        slot = int(column.holder[row])
        self._move(slot, -int(column.value[row]), -int(column.cost[row]))
        self.missing_count[slot] -= column.price is None
        self.stale_count[slot] -= column.stale
        last = column.count - 1
        if row != last:
            for name in ("holder", "quantity", "value", "cost", "day_base"):
                array = getattr(column, name)
                array[row] = array[last]
            self._rows[int(column.holder[row])][column.symbol] = row
        column.count = last
        del self._rows[slot][column.symbol]

    def position_day_base(self, portfolio_id: str, symbol: str) -> int:
        """The day base of a position, open or closed since the cut; 0 when it was not held today."""
        slot = self._slot_of[portfolio_id]
        row = self._rows[slot].get(symbol)
        if row is None:
            return self._closed_day_base.get((slot, symbol), 0)
        return int(self._columns[symbol].day_base[row])

    def keep_closed_day_base(self, portfolio_id: str, symbol: str, day_base: int) -> None:
        """Remember the day base of a position that was closed since the cut (recovery)."""
        self._closed_day_base[self._slot_of[portfolio_id], symbol] = day_base

    def held(self, portfolio_id: str) -> list[HeldValue]:
        """The open positions' present values."""
        return [
            HeldValue(symbol, int(column.value[row]), int(column.day_base[row]), column.price is None)
            for symbol, row in self._rows[self._slot_of[portfolio_id]].items()
            for column in (self._columns[symbol],)
        ]

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        """Σ |value| and Σ |cost| of the open positions, in micro-units."""
        rows = self._rows[self._slot_of[portfolio_id]].items()
        held = [(self._columns[symbol], row) for symbol, row in rows]
        values = sum(abs(int(column.value[row])) for column, row in held)
        return values, sum(abs(int(column.cost[row])) for column, row in held)

    def price(self, symbol: str) -> Decimal | None:
        column = self._columns.get(symbol)
        return column.price if column else None

    # -- prices ----------------------------------------------------------------------------------------------

    def tick(self, symbol: str, price: Decimal, ts_event_ns: int) -> int:
        """Re-value the asset's holders at `price` (a checked number > 0); returns how many positions it touched."""
        column = self._columns.get(symbol)
        if column is None:
            column = self._columns[symbol] = _Column(symbol)
        count = column.count
        holder = column.holder[:count]
        if price != column.price and count:
            values = column.values_at(price)
            # A portfolio holds an asset once, so no slot repeats within a column and += adds every change.
            self.positions_value[holder] += values - column.value[:count]
            column.value[:count] = values
            self.dirty[holder] = True
        if column.price is None:
            self.missing_count[holder] -= 1
        if column.stale:
            self._set_stale(column, False)
        column.price = price
        column.ts_event_ns = ts_event_ns
        return count

    def flag_stale(self, now_ns: int, stale_after_ns: int) -> int:
        """Flag assets whose price is older than `stale_after_ns`; returns how many became stale."""
        aged = [
            column
            for column in self._columns.values()
            if column.price is not None and not column.stale and now_ns - column.ts_event_ns > stale_after_ns
        ]
        for column in aged:
            self._set_stale(column, True)
        return len(aged)

    def _set_stale(self, column: _Column, stale: bool) -> None:
        holder = column.holder[: column.count]
        column.stale = stale
        self.stale_count[holder] += 1 if stale else -1
        self.dirty[holder] = True

    # -- the day cut -----------------------------------------------------------------------------------------

    def begin_day(self, cut_at_ns: int) -> None:
        """Marks carry this cut from now on; `cut` then sets each shard's bases."""
        self._day_cut_at_ns = cut_at_ns

    def cut(self, shard: int) -> None:
        """Every day base of the shard becomes the present value."""
        slots = self.slots_of(shard)
        for column in self._columns.values():
            count = column.count
            mine = self.shard[column.holder[:count]] == shard
            column.day_base[:count][mine] = column.value[:count][mine]
        chosen = set(slots.tolist())
        self._closed_day_base = {key: base for key, base in self._closed_day_base.items() if key[0] not in chosen}
        nav = self.cash[slots] + self.positions_value[slots]
        self.day_base[slots] = self.segment_base[slots] = nav
        self.day_factor[slots] = 1
        self.dirty[slots] = True

    # -- marks -----------------------------------------------------------------------------------------------

    def changed(self) -> Int64s:
        """The slots that changed since they were last cleared, ascending."""
        return np.flatnonzero(self.dirty)

    def clear(self, slots: Int64s) -> None:
        """Count the slots as written."""
        self.dirty[slots] = False

    def touch(self, slots: Int64s) -> None:
        """Count the slots as changed: their marks are to be written (again)."""
        self.dirty[slots] = True

    def marks(self, slots: Int64s, as_of_ns: int, sequence: int) -> MarkArray:
        """The slots' marks (engine.marks.MARK), stamped `as_of_ns` and `sequence`."""
        rows = np.zeros(len(slots), MARK)
        cash, held, cost = self.cash[slots], self.positions_value[slots], self.cost[slots]
        nav = cash + held
        rows["nav"], rows["cash"], rows["positions_value"] = nav, cash, held
        rows["unrealized"] = held - cost
        rows["realized"], rows["fees"] = self.realized[slots], self.fees[slots]
        rows["day_pnl"] = nav - self.day_base[slots]
        rows["day_pnl_ratio_e12"] = day_ratio_e12(nav, self.day_factor[slots], self.segment_base[slots])
        rows["day_cut_at_ns"], rows["as_of_ns"], rows["sequence"] = self._day_cut_at_ns, as_of_ns, sequence
        rows["ledger_sequence"] = self.ledger_sequence[slots]
        rows["quality"] = np.where(
            self.missing_count[slots] > 0,
            MarkQuality.MISSING,
            np.where(self.stale_count[slots] > 0, MarkQuality.STALE, MarkQuality.LIVE),
        )
        return rows

    def out_of_range(self, slots: Int64s) -> NDArray[np.bool_]:
        """Which of the slots have a NAV so large that it may not be shown: |NAV| ≥ NAV_MAX_MICRO."""
        nav = self.cash[slots].astype(np.float64) + self.positions_value[slots]
        return np.abs(nav) >= NAV_MAX_MICRO

    def revalued(self) -> Iterator[tuple[str, int]]:
        """(portfolio id, positions value) recomputed from quantities and prices alone: the delta path's oracle."""
        totals = dict.fromkeys(self._slot_of.values(), 0)
        for column in self._columns.values():
            arrays = (array[: column.count].tolist() for array in (column.holder, column.quantity, column.cost))
            for holder, quantity, cost in zip(*arrays, strict=True):
                totals[holder] += carried_value(Decimal(repr(quantity)), cost, column.price)
        return ((self._id_of[slot], total) for slot, total in totals.items())


_SLOT_FIELDS: tuple[tuple[str, type[np.generic]], ...] = (
    ("cash", np.int64),
    ("realized", np.int64),
    ("fees", np.int64),
    ("positions_value", np.int64),
    ("cost", np.int64),
    ("ledger_sequence", np.int64),
    ("day_base", np.int64),
    ("day_factor", np.float64),
    ("segment_base", np.int64),
    ("missing_count", np.int32),
    ("stale_count", np.int32),
    ("shard", np.int32),
    ("dirty", np.bool_),
)
