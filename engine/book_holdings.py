"""What each portfolio holds, by slot: the Book's cells, and their product with a number for each asset.

A cell is one open position:

    asset int32 (its column's number) | row int32 (in that column) | units float64 (as the column's) |
    cost, day_base int64 micro-units

A portfolio's cells lie side by side at the start of a block, and the block on a shelf, whose blocks are of one width.
Blocks [0, count) of a shelf are in use, in no order: the last one takes the place of one that is given up. So shelves
are dense whatever was opened and closed, and each is a sparse matrix (blocks × assets, CSR with rows of equal length)
as it lies there, patched in place by every fill. Cells beyond a portfolio's last have row UNUSED and 0 units.

The product is scipy's, in half the time of numpy's gather and multiply. It is exact when every units × number is whole
and |units × number| × width ≤ 2⁵³ for the widest block in use: all partial sums of a block are whole then and at
most 2⁵³, and float64 adds such numbers without an error, in whatever order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.book_columns import Float64s, Int64s, Slots, holes_and_movers, resized

Int32s = NDArray[np.int32]

SUM_MAX = float(2**53)
UNUSED = -1
BLOCKS_MIN = 16
WIDTHS = (4, 8, *(part << power for power in range(3, 18) for part in (2, 3)))  # 4, 8, 16, 24, 32, 48, …
SHRINK_STEPS = 2  # a block of 16 is left for a smaller one when 4 positions remain
_CELL_FIELDS = ("asset", "row", "units", "cost", "day_base")


class Shelf:
    """Blocks of `width` cells. `slot[b]` is whose block b is; its cells begin at b × width."""

    __slots__ = (*_CELL_FIELDS, "_matrix", "count", "slot", "width")

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self.slot: Slots = np.zeros(0, np.intp)
        self.asset: Int32s = np.zeros(0, np.int32)
        self.row: Int32s = np.zeros(0, np.int32)
        self.units: Float64s = np.zeros(0, np.float64)
        self.cost: Int64s = np.zeros(0, np.int64)
        self.day_base: Int64s = np.zeros(0, np.int64)
        self._matrix: Any = None

    def add(self, slots: Slots | Sequence[int]) -> int:
        """New blocks, empty; returns the first."""
        first, self.count = self.count, self.count + len(slots)
        if self.count > len(self.slot):
            capacity = max(self.count, len(self.slot) * 3 // 2, BLOCKS_MIN)
            self.slot = resized(self.slot, capacity)
            for name in _CELL_FIELDS:
                setattr(self, name, resized(getattr(self, name), capacity * self.width))
        self.slot[first : self.count] = slots
        self.row[first * self.width : self.count * self.width] = UNUSED
        self._matrix = None
        return first

    def remove(self, block: int) -> int | None:
        """Give a block up; the last one takes its place. Returns the slot whose block moved, if one did."""
        last, width = self.count - 1, self.width
        self.count, self._matrix = last, None
        moved = None
        if block != last:
            self.slot[block] = moved = self.slot.item(last)
            for name in _CELL_FIELDS:
                array = getattr(self, name)
                array[block * width : (block + 1) * width] = array[last * width : (last + 1) * width]
        self._clear(last, last + 1)
        return moved

    def remove_many(self, blocks: Slots) -> tuple[Slots, Slots]:
        """Give blocks up (ascending), others take their places. Returns where to, and the slots whose blocks moved."""
        holes, movers = holes_and_movers(self.count, blocks)
        self.slot[holes] = self.slot[movers]
        for name in _CELL_FIELDS:
            of_blocks = getattr(self, name).reshape(-1, self.width)
            of_blocks[holes] = of_blocks[movers]
        left, count = self.count - len(blocks), self.count
        self.count, self._matrix = left, None
        self._clear(left, count)
        return holes, self.slot[holes]

    def _clear(self, first: int, end: int) -> None:
        cells = slice(first * self.width, end * self.width)
        self.asset[cells] = 0
        self.units[cells] = 0

    def product(self, of_assets: Float64s, csr_array: Any) -> Float64s:
        """Σ units × the asset's number, of each block."""
        if self._matrix is None or self._matrix.shape[1] != len(of_assets):
            cells, shape = self.count * self.width, (self.count, len(of_assets))
            ends = np.arange(0, cells + 1, self.width, dtype=np.int32)
            units, assets = self.units[:cells], self.asset[:cells]
            self._matrix = csr_array((units, assets, ends), shape)
            # The constructor copies views of larger arrays; shared with the cells, it has what fills do to them.
            self._matrix.data, self._matrix.indices = units, assets
        sums: Float64s = self._matrix @ of_assets
        return sums


Cell = tuple[Shelf, int]


class Holdings:
    def __init__(self) -> None:
        # Here, as a Book is made by evaluators alone and other processes only import its types.
        from scipy.sparse import csr_array

        self._csr_array = csr_array
        self.shelves = [Shelf(width) for width in WIDTHS]
        # Of each slot: how many positions, on which shelf, in which block of it.
        self.count: Int32s = np.zeros(0, np.int32)
        self._shelf: NDArray[np.int8] = np.zeros(0, np.int8)
        self._block: Int32s = np.zeros(0, np.int32)

    def reserve(self, slots_count: int) -> None:
        self.count, self._shelf, self._block = (
            resized(self.count, slots_count),
            resized(self._shelf, slots_count),
            resized(self._block, slots_count),
        )

    @property
    def cells_count(self) -> int:
        return sum(shelf.count * shelf.width for shelf in self.shelves)

    @property
    def blocks_count(self) -> int:
        return sum(shelf.count for shelf in self.shelves)

    @property
    def width_max(self) -> int:
        """The width of the widest block in use."""
        return max((shelf.width for shelf in self.shelves if shelf.count), default=0)

    # -- one portfolio -----------------------------------------------------------------------------------------

    def of(self, slot: int) -> tuple[Shelf, slice]:
        """Where the cells of a slot are."""
        shelf = self.shelves[self._shelf.item(slot)]
        start = self._block.item(slot) * shelf.width
        return shelf, slice(start, start + self.count.item(slot))

    def find(self, slot: int, asset: int) -> Cell | None:
        shelf = self.shelves[self._shelf.item(slot)]
        start = self._block.item(slot) * shelf.width
        assets = shelf.asset[start : start + self.count.item(slot)].tolist()
        return (shelf, start + assets.index(asset)) if asset in assets else None

    def append(self, slot: int, asset: int, row: int) -> Cell:
        """A new cell, without units, cost and day base."""
        count = self.count.item(slot)
        if not count:
            self._settle(slot, 0)
        elif count == self.shelves[self._shelf.item(slot)].width:
            self._move(slot, self._shelf.item(slot) + 1)
        self.count[slot] = count + 1
        shelf, cells = self.of(slot)
        at = cells.stop - 1
        shelf.asset[at], shelf.row[at], shelf.units[at], shelf.cost[at], shelf.day_base[at] = asset, row, 0, 0, 0
        return shelf, at

    def remove(self, slot: int, at: int) -> None:
        """Give a cell up; the slot's last one takes its place."""
        shelf, cells = self.of(slot)
        last = cells.stop - 1
        if at != last:
            for name in _CELL_FIELDS:
                array = getattr(shelf, name)
                array[at] = array.item(last)
        shelf.asset[last], shelf.row[last], shelf.units[last] = 0, UNUSED, 0
        self.count[slot] = left = last - cells.start
        number = self._shelf.item(slot)
        if not left:
            self._leave(slot, number)
        elif number >= SHRINK_STEPS and left <= WIDTHS[number - SHRINK_STEPS]:
            self._move(slot, bisect_left(WIDTHS, left))

    def _settle(self, slot: int, number: int) -> None:
        self._shelf[slot], self._block[slot] = number, self.shelves[number].add((slot,))

    def _move(self, slot: int, number: int) -> None:
        """To a block on another shelf."""
        (shelf, cells), left = self.of(slot), self._shelf.item(slot)
        kept = [getattr(shelf, name)[cells].copy() for name in _CELL_FIELDS]
        self._leave(slot, left)
        self._settle(slot, number)
        shelf, cells = self.of(slot)
        for name, array in zip(_CELL_FIELDS, kept, strict=True):
            getattr(shelf, name)[cells] = array

    def _leave(self, slot: int, number: int) -> None:
        block = self._block.item(slot)
        moved = self.shelves[number].remove(block)
        if moved is not None:
            self._block[moved] = block

    # -- many portfolios ---------------------------------------------------------------------------------------

    def cells(self, slots: Slots) -> Iterator[tuple[Shelf, Slots, Slots]]:
        """By shelf, the cells of these slots and which of them each is of: places in `slots`, ascending."""
        shelf_of, count_of = self._shelf[slots], self.count[slots]
        for number in np.unique(shelf_of[count_of > 0]).tolist():
            shelf, mine = self.shelves[number], np.flatnonzero((shelf_of == number) & (count_of > 0))
            places = np.arange(shelf.width)
            used = places < count_of[mine][:, None]
            cells = (self._block[slots[mine]].astype(np.intp) * shelf.width)[:, None] + places
            yield shelf, cells[used], np.repeat(mine, count_of[mine])

    def drop(self, slots: Slots) -> None:
        """Forget all that these slots hold."""
        held = slots[self.count[slots] > 0]
        for number in np.unique(self._shelf[held]).tolist():
            blocks = np.sort(self._block[held[self._shelf[held] == number]]).astype(np.intp)
            moved_to, moved = self.shelves[number].remove_many(blocks)
            self._block[moved] = moved_to
        self.count[slots] = 0

    def add(self, slots: Slots, holder: Slots, **cells: NDArray[Any]) -> None:
        """Positions of slots that hold nothing yet: their cells' fields, the n-th of slot `slots[holder[n]]`."""
        order = np.argsort(holder, kind="stable")
        counts = np.bincount(holder, minlength=len(slots))
        shelf_of = np.searchsorted(np.array(WIDTHS), counts)
        start = np.zeros(len(slots), np.intp)
        for number in np.unique(shelf_of[counts > 0]).tolist():
            mine, shelf = np.flatnonzero((shelf_of == number) & (counts > 0)), self.shelves[number]
            blocks = shelf.add(slots[mine]) + np.arange(len(mine))
            self._block[slots[mine]], start[mine] = blocks, blocks * shelf.width
        self._shelf[slots], self.count[slots] = shelf_of, counts
        rank = np.arange(len(holder)) - np.repeat(np.cumsum(counts) - counts, counts)
        of_sorted = holder[order]
        places, shelves = start[of_sorted] + rank, shelf_of[of_sorted]
        for number in np.unique(shelves).tolist():
            chosen = shelves == number
            for name, array in cells.items():
                getattr(self.shelves[number], name)[places[chosen]] = array[order[chosen]]

    def by_asset(self, slots: Slots) -> list[tuple[int, Slots]]:
        """What the slots hold: assets, and of each the rows in its column, ascending."""
        parts = [(shelf.asset[cells], shelf.row[cells]) for shelf, cells, _ in self.cells(slots)]
        if not parts:
            return []
        assets, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return [(asset, np.sort(rows[of]).astype(np.intp)) for asset, of in grouped(assets)]

    def put_row(self, slot: int, asset: int, row: int) -> None:
        """A position has moved to another row of its asset's column."""
        cell = self.find(slot, asset)
        assert cell is not None
        shelf, at = cell
        shelf.row[at] = row

    def cost_of(self, slot: int, asset: int) -> int:
        cell = self.find(slot, asset)
        assert cell is not None
        shelf, at = cell
        return shelf.cost.item(at)

    def put_rows(self, asset: int, slots: Slots, rows: Slots) -> None:
        """As `put_row`, for many slots."""
        for number in np.unique(self._shelf[slots]).tolist():
            mine, shelf = self._shelf[slots] == number, self.shelves[number]
            blocks = self._block[slots[mine]]
            found = (shelf.asset.reshape(-1, shelf.width)[blocks] == asset).argmax(axis=1)
            shelf.row[blocks.astype(np.intp) * shelf.width + found] = rows[mine]

    def put_units(self, asset: int, units_of_rows: Float64s) -> None:
        """A column has other units; its rows are as they were."""
        for shelf in self.shelves:
            cells = shelf.count * shelf.width
            found = np.flatnonzero((shelf.asset[:cells] == asset) & (shelf.row[:cells] != UNUSED))
            shelf.units[found] = units_of_rows[shelf.row[found]]

    def product(self, of_assets: Float64s) -> Iterator[tuple[Slots, Float64s]]:
        """By shelf: slots, and Σ units × the asset's number of each."""
        for shelf in self.shelves:
            if shelf.count:
                yield shelf.slot[: shelf.count], shelf.product(of_assets, self._csr_array)


def grouped(numbers: NDArray[np.integer[Any]]) -> list[tuple[int, Slots]]:
    """The numbers that occur, ascending, each with its places, ascending."""
    order = np.argsort(numbers, kind="stable")
    found, first = np.unique(numbers[order], return_index=True)
    # Of nothing `split` makes one part that is empty.
    return list(zip(found.tolist(), np.split(order, first[1:])[: len(found)], strict=True))
