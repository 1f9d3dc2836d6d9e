"""The Book: the columnar state of all portfolios that one evaluator owns, and the reverse index asset → holders.

Per portfolio, by slot: cash, receivables, realized, fees, positions_value, cost, … int64 micro-units, and its positions
(engine.book_positions), which are rows of their assets' columns as well. A tick touches the asset's column and the
slots of its holders, nothing else; a window in which many assets ticked may take all positions at once:

    value_new = round(quantity × price × 10⁶)      positions_value += value_new − value_old
    NAV       = cash + receivables + positions_value

Values are absolute and whole, so the delta path equals a full recomputation bit for bit, for ever. `value_new` equals
engine.amounts.value_micro for every quantity and price that it admits; engine.book_columns says why.

Quality. A column has one (MISSING before its first price) and a portfolio counts its positions by quality; its mark
carries the worst.

Days. A portfolio belongs to the group of its day cut's text and carries the cut that its day bases count from; `cut`
sets the day bases of the portfolios that it is given and of nobody else.

A position that never had a price is carried at its cost; one whose value would leave ±AMOUNT_MAX_MICRO is carried at
its cost too, and nobody else's price waits for it. Slots that were given up are taken again. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.book_accounts import Account as Account
from engine.book_accounts import AccountArrays
from engine.book_accounts import Holding as Holding
from engine.book_columns import Float64s, HeldValue, Int64s
from engine.book_holdings import Int32s
from engine.book_positions import PricedPositions
from engine.marks import MARK, MarkArray, MarkQuality
from engine.pnl import DayBase, day_ratio_e12

NAV_MAX_MICRO = 2**62  # twice this would wrap int64
NO_SHARD = -1  # a free slot's
NO_GROUP = -1  # of a portfolio whose day has not begun
SLOTS_CAPACITY_MIN = 64


class Book(PricedPositions):
    def __init__(self) -> None:
        super().__init__()
        self._slot_of: dict[str, int] = {}
        self._id_of: list[str] = []
        self._free: list[int] = []
        # Day bases of positions closed since the cut; a position reopened the same day goes on from there.
        self._closed_day_base: dict[tuple[int, str], int] = {}
        # Day cut text → number of its group; how many portfolios each group has.
        self._group_of: dict[str, int] = {}
        self._group_sizes: list[int] = []
        self._allocate(SLOTS_CAPACITY_MIN)

    def _allocate(self, capacity: int) -> None:
        for name, dtype in _SLOT_FIELDS:
            old = getattr(self, name, None)
            new = np.full(capacity, _FREE.get(name, 0), dtype)
            if old is not None:
                new[: len(old)] = old
            setattr(self, name, new)
        self._reserve(capacity)

    cash: Int64s
    receivables: Int64s
    realized: Int64s
    fees: Int64s
    income: Int64s
    flows: Int64s
    trading: Int64s
    corporate: Int64s
    ledger_sequence: Int64s
    day_base: Int64s
    day_factor: Float64s
    segment_base: Int64s
    day_cut_at_ns: Int64s
    group: Int32s
    shard: Int32s

    # -- portfolios ------------------------------------------------------------------------------------------

    def __contains__(self, portfolio_id: str) -> bool:
        return portfolio_id in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def slot(self, portfolio_id: str) -> int:
        """Raises KeyError when this Book does not hold the portfolio."""
        return self._slot_of[portfolio_id]

    def portfolio_ids(self, slots: Int64s) -> list[str]:
        return [self._id_of[slot] for slot in slots.tolist()]

    def slots_of(self, shard: int) -> Int64s:
        return np.flatnonzero(self.shard == shard)

    def open(self, portfolio_id: str, shard: int, account: Account, holdings: Iterable[Holding] = ()) -> int:
        """Take a portfolio in, with its open positions; returns its slot."""
        if portfolio_id in self._slot_of:
            raise ValueError(f"{portfolio_id} is in the Book already")
        slot = self._new_slot(portfolio_id)
        self._begin(np.array([slot]), shard)
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
        if any(name in self._slot_of for name in ids):
            raise ValueError("a portfolio is in the Book already")
        slots = np.array([self._new_slot(name) for name in ids], np.int64)
        self._begin(slots, shard)
        for name in (*_ACCOUNT_FIELDS, "day_base", "day_factor", "segment_base"):
            getattr(self, name)[slots] = accounts[name]
        self._add(slots, holder, symbols, asset, quantity, quantity_decimals, cost, day_base)
        return slots

    def _begin(self, slots: Int64s, shard: int) -> None:
        self.shard[slots], self.group[slots] = shard, NO_GROUP
        self.positions_value[slots] = self.cost[slots] = self.day_cut_at_ns[slots] = 0
        self.quality_count[:, slots] = 0
        self.dirty[slots] = True

    def _new_slot(self, portfolio_id: str) -> int:
        if self._free:
            slot = self._free.pop()
            self._id_of[slot] = portfolio_id
        else:
            slot = len(self._id_of)
            self._id_of.append(portfolio_id)
            if slot >= len(self.cash):
                self._allocate(len(self.cash) * 3 // 2)
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
        slots = self.slots_of(shard)
        self._drop_positions(slots)
        dropped = set(slots.tolist())
        self._closed_day_base = {k: base for k, base in self._closed_day_base.items() if k[0] not in dropped}
        for slot in dropped:
            del self._slot_of[self._id_of[slot]]
            self._leave_group(slot)
        self.dirty[slots], self.shard[slots] = False, NO_SHARD
        self._free += dropped

    # -- positions -------------------------------------------------------------------------------------------

    def set_position(self, portfolio_id: str, holding: Holding) -> None:
        """Set a position to `holding` (absolute); quantity 0 closes it."""
        slot = self._slot_of[portfolio_id]
        self._set(slot, holding)
        key = (slot, holding.symbol)
        if not holding.quantity:
            self._closed_day_base[key] = holding.day_base
        elif key in self._closed_day_base:
            del self._closed_day_base[key]
        self.dirty[slot] = True

    def position_day_base(self, portfolio_id: str, symbol: str) -> int:
        """The day base of a position, open or closed since the cut; 0 when it was not held today."""
        slot, column = self._slot_of[portfolio_id], self._columns.get(symbol)
        cell = None if column is None else self._holdings.find(slot, column.number)
        if cell is None:
            return self._closed_day_base.get((slot, symbol), 0)
        shelf, at = cell
        return shelf.day_base.item(at)

    def keep_closed_day_base(self, portfolio_id: str, symbol: str, day_base: int) -> None:
        """Remember the day base of a position that was closed since the cut (recovery)."""
        self._closed_day_base[self._slot_of[portfolio_id], symbol] = day_base

    def held(self, portfolio_id: str) -> list[HeldValue]:
        """The open positions' present values."""
        slot = self._slot_of[portfolio_id]
        shelf, cells = self._holdings.of(slot)
        return [
            HeldValue(column.symbol, value, day_base, column.price is None)
            for (column, value), day_base in zip(self._valued(slot), shelf.day_base[cells].tolist(), strict=True)
        ]

    def values(self, portfolio_id: str) -> list[tuple[str, int]]:
        """The open positions' present values: symbol and micro-units."""
        return [(column.symbol, value) for column, value in self._valued(self._slot_of[portfolio_id])]

    def values_of(self, slots: Int64s) -> list[dict[str, int]]:
        """Of each slot the open positions' present values by symbol, in micro-units."""
        values: list[dict[str, int]] = [{} for _ in range(len(slots))]
        symbols = [column.symbol for column in self._columns.by_number]
        for shelf, cells, places in self._holdings.cells(slots):
            of_cells = zip(
                places.tolist(), shelf.asset[cells].tolist(), self._values_at(shelf, cells).tolist(), strict=True
            )
            for place, number, value in of_cells:
                values[place][symbols[number]] = value
        return values

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        """Σ |value| and Σ |cost| of the open positions, in micro-units."""
        slot = self._slot_of[portfolio_id]
        shelf, cells = self._holdings.of(slot)
        return sum(abs(value) for _, value in self._valued(slot)), sum(map(abs, shelf.cost[cells].tolist()))

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
        for shelf, cells, _ in self._holdings.cells(slots):
            shelf.day_base[cells] = self._values_at(shelf, cells)
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
        return ((portfolio_id, self._revalued(slot)) for portfolio_id, slot in self._slot_of.items())


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
    *((name, np.int64) for name in (*_ACCOUNT_FIELDS, "day_cut_at_ns")),
    ("day_base", np.int64),
    ("day_factor", np.float64),
    ("segment_base", np.int64),
    ("group", np.int32),
    ("shard", np.int32),
)
