"""One asset's column in the Book: its holders, dense and growable, and the price that they are valued at.

    holder intp (portfolio slot) | quantity float64 | value, cost, day_base int64 micro-units

Rows [0, count) are in use. `values_at` is where quantities meet a price; engine.book says why its floats are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from engine.amounts import MICRO, MICRO_DIGITS, decimals_of
from engine.marks import MarkQuality
from engine.messages import Condition
from engine.positions import carried_value

Int64s = NDArray[np.int64]
Slots = NDArray[np.intp]
Float64s = NDArray[np.float64]

MICRO_SCALE = float(MICRO)
HALF = 0.5
EXACT_PRODUCT_MAX = float(2**49)
PRODUCT_ERROR = float(2**-50)
COLUMN_CAPACITY_MIN = 8
_ROW_FIELDS = ("holder", "quantity", "value", "cost", "day_base")


@dataclass(frozen=True, slots=True)
class HeldValue:
    """One position's present value, as the Book holds it."""

    symbol: str
    value: int
    day_base: int
    missing: bool


class Column:
    """`quality` is that of the price, one for all holders; MISSING until there is one."""

    __slots__ = (
        "condition",
        "cost",
        "count",
        "day_base",
        "decimals_max",
        "holder",
        "price",
        "quality",
        "quantity",
        "quantity_max",
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
        self.condition: Condition = ""
        self.quality = MarkQuality.MISSING
        self.decimals_max = 0  # these two bound what is in the column; too wide is merely slower
        self.quantity_max: float = 0

    def append(self, slot: int) -> int:
        """A new row for a holder, without value and cost; returns it."""
        row = self.count
        self._reserve(row + 1)
        self.holder[row] = slot
        self.value[row] = self.cost[row] = 0
        self.count += 1
        return row

    def remove(self, row: int) -> int | None:
        """Give a row up; the last one takes its place. Returns the holder that moved, if one did."""
        last = self.count - 1
        self.count = last
        if row == last:
            return None
        for name in _ROW_FIELDS:
            array = getattr(self, name)
            array[row] = array[last]
        return int(self.holder[row])

    def keep(self, rows: Slots) -> None:
        """Give up all rows but these, ascending."""
        for name in _ROW_FIELDS:
            array = getattr(self, name)
            array[: len(rows)] = array[rows]
        self.count = len(rows)

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

    def _reserve(self, count: int) -> None:
        capacity = len(self.holder)
        if count <= capacity:
            return
        grown = max(count, capacity * 2)
        for name in _ROW_FIELDS:
            old = getattr(self, name)
            new = np.zeros(grown, old.dtype)
            new[: self.count] = old[: self.count]
            setattr(self, name, new)


def values_of(columns: Iterable[Column], slots: Int64s, slots_count: int) -> list[dict[str, int]]:
    """Of each of these slots, of `slots_count` that there are, its positions' values by symbol, in micro-units."""
    values: list[dict[str, int]] = [{} for _ in range(len(slots))]
    place_of = np.full(slots_count, -1, np.int64)
    place_of[slots] = np.arange(len(slots))
    for column in columns:
        places = place_of[column.holder[: column.count]]
        rows = np.flatnonzero(places >= 0)
        for place, value in zip(places[rows].tolist(), column.value[rows].tolist(), strict=True):
            values[place][column.symbol] = value
    return values
