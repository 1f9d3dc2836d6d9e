"""The Book: the columnar state of all portfolios that one evaluator owns, and the reverse index asset → holders.

Per asset a column of its holders (engine.book_columns), and per portfolio, by slot: cash, receivables, realized,
fees, positions_value, cost, … int64 micro-units. A tick touches the asset's column and the rows of its holders,
nothing else:

    value_new = round(quantity × price × 10⁶)      positions_value += value_new − value_old
    NAV       = cash + receivables + positions_value

Values are absolute and whole, so the delta path equals a full recomputation bit for bit, for ever.

Quality. A column has one (MISSING before its first price) and a portfolio counts its positions by quality; its mark
carries the worst.

Days. A portfolio belongs to the group of its day cut's text and carries the cut that its day bases count from; `cut`
sets the day bases of the portfolios that it is given and of nobody else.

Exactness. `value_new` equals engine.amounts.value_micro for every quantity and price that it admits:

* The float product x carries at most four roundings, |x − exact| ≤ 2⁻⁵⁰ |x|. When quantities and price have at most
  6 decimals together, the exact product is whole, so for |x| < 2⁴⁹ the nearest integer of x is it.
* Otherwise each x whose distance to a half is within that error, or |x| ≥ 2⁴⁹, is computed again in Decimal: the
  float64 of at most 15 digits gives its decimal back (`repr`). With ordinary amounts that is one in 10⁵.

A position that never had a price is carried at its cost; one whose value would leave ±AMOUNT_MAX_MICRO is carried at
its cost too, and nobody else's price waits for it. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from engine.amounts import check_number, decimals_of
from engine.book_accounts import Account as Account
from engine.book_accounts import AccountArrays, account_at
from engine.book_accounts import Holding as Holding
from engine.book_columns import Column, Float64s, HeldValue, Int64s, values_of
from engine.marks import MARK, MarkArray, MarkQuality
from engine.messages import Condition
from engine.pnl import DayBase, day_ratio_e12
from engine.positions import carried_value

Int32s = NDArray[np.int32]

NAV_MAX_MICRO = 2**62  # twice this would wrap int64
NO_SHARD = -1  # a free slot's
NO_GROUP = -1  # of a portfolio whose day has not begun
SLOTS_CAPACITY_MIN = 64
# What a source says of its price; what becomes of it with time is for engine.sessions to say.
_SAID = {"": MarkQuality.LIVE, "DELAYED": MarkQuality.DELAYED, "HALTED": MarkQuality.HALTED}


class Book:
    def __init__(self) -> None:
        self._columns: dict[str, Column] = {}
        self._slot_of: dict[str, int] = {}
        self._id_of: list[str] = []
        self._free: list[int] = []
        # Per slot: symbol → row in that symbol's column.
        self._rows: list[dict[str, int]] = []
        # Day bases of positions closed since the cut; a position reopened the same day goes on from there.
        self._closed_day_base: dict[tuple[int, str], int] = {}
        # Day cut text → number of its group; how many portfolios each group has.
        self._group_of: dict[str, int] = {}
        self._group_sizes: list[int] = []
        # [quality, slot]: how many of the slot's positions have a price of that quality.
        self.quality_count: Int32s = np.zeros((len(MarkQuality), 0), np.int32)
        self._allocate(SLOTS_CAPACITY_MIN)

    def _allocate(self, capacity: int) -> None:
        for name, dtype in _SLOT_FIELDS:
            old = getattr(self, name, None)
            new = np.full(capacity, _FREE.get(name, 0), dtype)
            if old is not None:
                new[: len(old)] = old
            setattr(self, name, new)
        more = capacity - self.quality_count.shape[1]
        self.quality_count = np.pad(self.quality_count, ((0, 0), (0, more)))

    cash: Int64s
    receivables: Int64s
    realized: Int64s
    fees: Int64s
    income: Int64s
    flows: Int64s
    trading: Int64s
    corporate: Int64s
    positions_value: Int64s
    cost: Int64s
    ledger_sequence: Int64s
    day_base: Int64s
    day_factor: Float64s
    segment_base: Int64s
    day_cut_at_ns: Int64s
    group: Int32s
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
        self.shard[slot], self.group[slot] = shard, NO_GROUP
        self.positions_value[slot] = self.cost[slot] = self.day_cut_at_ns[slot] = 0
        self.quality_count[:, slot] = 0
        self.set_account(portfolio_id, account)
        for holding in holdings:
            self.set_position(portfolio_id, holding)
        return slot

    def open_many(
        self,
        shard: int,
        ids: Sequence[str],
        accounts: AccountArrays,
        symbols: Sequence[str],
        holder: Int64s,
        asset: Int64s,
        quantity: Float64s,
        quantity_decimals: Int64s,
        cost: Int64s,
        day_base: Int64s,
    ) -> Int64s:
        """As `open` for many portfolios of a shard; returns their slots. The n-th position is of portfolio
        `ids[holder[n]]` in `symbols[asset[n]]`; its quantity has at most `quantity_decimals[n]` decimals."""
        slots = [self.open(name, shard, account_at(accounts, place)) for place, name in enumerate(ids)]
        arrays = (of.tolist() for of in (holder, asset, quantity, cost, day_base))
        for place, number, held, paid, base in zip(*arrays, strict=True):
            self.set_position(ids[place], Holding(symbols[number], check_number(Decimal(repr(held)), ""), paid, base))
        return np.array(slots, np.int64)

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
        for name in _ACCOUNT_FIELDS:
            getattr(self, name)[slot] = getattr(account, name)
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
        return int(self.cash[slot]) + int(self.receivables[slot]) + int(self.positions_value[slot])

    def drop_shard(self, shard: int) -> None:
        """Forget all portfolios of a shard that now belongs to somebody else."""
        for column in self._columns.values():
            self._drop_rows(column, shard)
        dropped = set(self.slots_of(shard).tolist())
        self._closed_day_base = {k: base for k, base in self._closed_day_base.items() if k[0] not in dropped}
        for slot in dropped:
            del self._slot_of[self._id_of[slot]]
            self._rows[slot] = {}
            self._leave_group(slot)
            self.dirty[slot], self.shard[slot] = False, NO_SHARD
            self._free.append(slot)

    def _drop_rows(self, column: Column, shard: int) -> None:
        kept = np.flatnonzero(self.shard[column.holder[: column.count]] != shard)
        if len(kept) == column.count:
            return
        column.keep(kept)
        for row, holder in enumerate(column.holder[: column.count].tolist()):
            self._rows[holder][column.symbol] = row

    # -- positions -------------------------------------------------------------------------------------------

    def set_position(self, portfolio_id: str, holding: Holding) -> None:
        """Set a position to `holding` (absolute); quantity 0 closes it."""
        slot = self._slot_of[portfolio_id]
        column = self._column(holding.symbol)
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

    def _column(self, symbol: str) -> Column:
        column = self._columns.get(symbol)
        if column is None:
            column = self._columns[symbol] = Column(symbol)
        return column

    def _move(self, slot: int, value_change: int, cost_change: int) -> None:
        self.positions_value[slot] += value_change
        self.cost[slot] += cost_change

    def _append(self, column: Column, slot: int) -> int:
        row = column.append(slot)
        self._rows[slot][column.symbol] = row
        self._closed_day_base.pop((slot, column.symbol), None)
        self.quality_count[column.quality, slot] += 1
        return row

    def _remove(self, column: Column, row: int) -> None:
        slot = int(column.holder[row])
        self._move(slot, -int(column.value[row]), -int(column.cost[row]))
        self.quality_count[column.quality, slot] -= 1
        del self._rows[slot][column.symbol]
        moved = column.remove(row)
        if moved is not None:
            self._rows[moved][column.symbol] = row

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

    def holders(self, symbol: str) -> Int64s:
        """The slots that hold a symbol, in no order."""
        column = self._columns.get(symbol)
        return np.zeros(0, np.int64) if column is None else column.holder[: column.count].astype(np.int64)

    def values(self, portfolio_id: str) -> list[tuple[str, int]]:
        """The open positions' present values: symbol and micro-units."""
        columns = self._columns
        return [(at, columns[at].value.item(row)) for at, row in self._rows[self._slot_of[portfolio_id]].items()]

    def values_of(self, slots: Int64s) -> list[dict[str, int]]:
        """Of each slot the open positions' present values by symbol, in micro-units."""
        return values_of(self._columns.values(), slots, len(self._id_of))

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        """Σ |value| and Σ |cost| of the open positions, in micro-units."""
        rows = self._rows[self._slot_of[portfolio_id]].items()
        held = [(self._columns[symbol], row) for symbol, row in rows]
        values = sum(abs(int(column.value[row])) for column, row in held)
        return values, sum(abs(int(column.cost[row])) for column, row in held)

    def price(self, symbol: str) -> Decimal | None:
        column = self._columns.get(symbol)
        return column.price if column else None

    def price_as_of_ns(self, symbol: str) -> int:
        """The instant of the symbol's price; 0 without one."""
        column = self._columns.get(symbol)
        return column.ts_event_ns if column else 0

    # -- prices ----------------------------------------------------------------------------------------------

    def tick(self, symbol: str, price: Decimal, ts_event_ns: int, condition: Condition = "") -> int:
        """Re-value the asset's holders at `price` (a checked number > 0); returns how many positions it touched.

        The price is taken for fresh: its quality is what `condition` says, else LIVE, until `set_quality`.
        """
        column = self._columns.get(symbol)
        if column is None:
            column = self._columns[symbol] = Column(symbol)
        count = column.count
        if price != column.price and count:
            self._revalue(column, price)
        column.price, column.ts_event_ns, column.condition = price, ts_event_ns, condition
        quality = _SAID[condition]
        if column.quality is not quality:
            self._change_quality(column, quality)
        return count

    def rescale(self, symbol: str, price: Decimal) -> None:
        """A split: the same price, of the same instant, in new shares. The rows keep their values until
        `set_position` brings each its new quantity, `revalue` the others; without a price there is nothing to do."""
        column = self._columns.get(symbol)
        if column is not None and column.price is not None:
            column.price = price

    def revalue(self, symbol: str) -> None:
        """Value every row at the present price: after a split, also those whose quantity it left as it was."""
        column = self._columns.get(symbol)
        if column is not None and column.price is not None:
            self._revalue(column, column.price)

    def _revalue(self, column: Column, price: Decimal) -> None:
        holder = column.holder[: column.count]
        values = column.values_at(price)
        # A portfolio holds an asset once, so no slot repeats within a column and += adds every change.
        self.positions_value[holder] += values - column.value[: column.count]
        column.value[: column.count] = values
        self.dirty[holder] = True

    def prices(self) -> Iterator[tuple[str, int, Condition, MarkQuality]]:
        """(symbol, instant, condition, quality) of every price."""
        for column in self._columns.values():
            if column.price is not None:
                yield column.symbol, column.ts_event_ns, column.condition, column.quality

    def set_quality(self, symbol: str, quality: MarkQuality) -> None:
        """What the symbol's price is worth now. MISSING is for symbols without one."""
        column = self._columns[symbol]
        if column.quality is not quality:
            self._change_quality(column, quality)

    def _change_quality(self, column: Column, quality: MarkQuality) -> None:
        holder = column.holder[: column.count]
        self.quality_count[column.quality][holder] -= 1
        self.quality_count[quality][holder] += 1
        column.quality = quality
        self.dirty[holder] = True

    # -- the day cut -----------------------------------------------------------------------------------------

    def begin_day(self, portfolio_id: str, day_cut: str, cut_at_ns: int) -> None:
        """Put a portfolio into the group of `day_cut`; its day bases count from `cut_at_ns`."""
        self.begin_days(np.array([self._slot_of[portfolio_id]]), day_cut, cut_at_ns)

    def begin_days(self, slots: Int64s, day_cut: str, cut_at_ns: int) -> None:
        """As `begin_day`, for the portfolios at these slots."""
        for slot in slots[self.group[slots] != NO_GROUP].tolist():
            self._leave_group(slot)
        group = self._group_of.setdefault(day_cut, len(self._group_of))
        if group == len(self._group_sizes):
            self._group_sizes.append(0)
        self._group_sizes[group] += len(slots)
        self.group[slots], self.day_cut_at_ns[slots] = group, cut_at_ns
        self.dirty[slots] = True

    def _leave_group(self, slot: int) -> None:
        if self.group[slot] != NO_GROUP:
            self._group_sizes[self.group[slot]] -= 1
            self.group[slot] = NO_GROUP

    @property
    def day_cuts(self) -> list[str]:
        """The day cuts that portfolios have."""
        return [day_cut for day_cut, group in self._group_of.items() if self._group_sizes[group]]

    def due(self, day_cut: str, cut_at_ns: int) -> Int64s:
        """The slots of a group whose day began before `cut_at_ns`, ascending."""
        group = self._group_of.get(day_cut)
        if group is None:
            return np.zeros(0, np.int64)
        used = len(self._id_of)  # a slot that was given up is in no group
        return np.flatnonzero((self.group[:used] == group) & (self.day_cut_at_ns[:used] < cut_at_ns))

    def cut(self, slots: Int64s, cut_at_ns: int) -> None:
        """Every day base of the portfolios becomes the present value; their day began at `cut_at_ns`."""
        chosen = np.zeros(len(self.shard), np.bool_)
        chosen[slots] = True
        for column in self._columns.values():
            count = column.count
            mine = chosen[column.holder[:count]]
            column.day_base[:count][mine] = column.value[:count][mine]
        gone = set(slots.tolist())
        self._closed_day_base = {key: base for key, base in self._closed_day_base.items() if key[0] not in gone}
        nav = self._nav(slots)
        self.day_base[slots] = self.segment_base[slots] = nav
        self.day_factor[slots] = 1
        self.day_cut_at_ns[slots] = cut_at_ns
        self.dirty[slots] = True

    def _nav(self, slots: Int64s) -> Int64s:
        nav: Int64s = self.cash[slots] + self.receivables[slots] + self.positions_value[slots]
        return nav

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
        for name in _SHOWN_FIELDS:
            rows[name] = getattr(self, name)[slots]
        nav = self._nav(slots)
        rows["nav"] = nav
        rows["unrealized"] = rows["positions_value"] - self.cost[slots]
        rows["day_pnl"] = nav - self.day_base[slots]
        rows["day_pnl_ratio_e12"] = day_ratio_e12(nav, self.day_factor[slots], self.segment_base[slots])
        rows["as_of_ns"], rows["sequence"] = as_of_ns, sequence
        for quality in MarkQuality:  # ascending, so that the worst is left
            rows["quality"][self.quality_count[quality][slots] > 0] = quality
        return rows

    def out_of_range(self, slots: Int64s) -> NDArray[np.bool_]:
        """Which of the slots have a NAV so large that it may not be shown: |NAV| ≥ NAV_MAX_MICRO."""
        nav = self.cash[slots].astype(np.float64) + self.receivables[slots] + self.positions_value[slots]
        return np.abs(nav) >= NAV_MAX_MICRO

    def revalued(self) -> Iterator[tuple[str, int]]:
        """(portfolio id, positions value) recomputed from quantities and prices alone: the delta path's oracle."""
        totals = dict.fromkeys(self._slot_of.values(), 0)
        for column in self._columns.values():
            arrays = (array[: column.count].tolist() for array in (column.holder, column.quantity, column.cost))
            for holder, quantity, cost in zip(*arrays, strict=True):
                totals[holder] += carried_value(Decimal(repr(quantity)), cost, column.price)
        return ((self._id_of[slot], total) for slot, total in totals.items())


_ACCOUNT_FIELDS = (
    "cash",
    "receivables",
    "realized",
    "fees",
    "income",
    "flows",
    "trading",
    "corporate",
    "ledger_sequence",
)
_SHOWN_FIELDS = (*_ACCOUNT_FIELDS, "positions_value", "day_cut_at_ns")
# What a slot says that nobody has, where that is not 0.
_FREE = {"shard": NO_SHARD, "group": NO_GROUP}
_SLOT_FIELDS: tuple[tuple[str, type[np.generic]], ...] = (
    *((name, np.int64) for name in _SHOWN_FIELDS),
    ("cost", np.int64),
    ("day_base", np.int64),
    ("day_factor", np.float64),
    ("segment_base", np.int64),
    ("group", np.int32),
    ("shard", np.int32),
    ("dirty", np.bool_),
)
