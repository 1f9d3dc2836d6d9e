"""How a window's quotes reach the Book: each asset's holders by themselves (slices), or all assets by one product.

A window has at most one quote per symbol. Where a column is whole before and after (engine.book_columns), its holders'
values change by units × (new scale − old scale), so one product of all cells with those differences, 0 for the assets
that did not tick, is what every portfolio's positions_value changes by: whole numbers added exactly
(engine.book_holdings), the same to the last bit as slice after slice. The other columns are valued by slices.

    slices     Σ over the ticked columns of SLICE_NS + ROW_NS × holders
    product    PRODUCT_NS + CELL_NS × cells + BLOCK_NS × portfolios

whichever is less. The constants were measured at the seed load by `benchmarks/book.py` on one core of a Xeon with 2 MB
of second-level cache; a machine twice as fast chooses the same.

A slice counts all holders as changed, the product those whose positions_value changed: where parts move and cancel to
the last micro-unit, no figure of the mark is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from engine.book_columns import NOT_WHOLE, UNITS_MAX, WHOLE_MAX, Column, Float64s
from engine.book_holdings import SUM_MAX, Holdings
from engine.messages import Condition

SLICE_NS = 4_000
ROW_NS = 5
PRODUCT_NS = 40_000
CELL_NS = 1
BLOCK_NS = 5

# Symbol, price (a checked number > 0), instant, what its source says of it.
PriceQuote = tuple[str, Decimal, int, Condition]
Bools = NDArray[np.bool_]


class Way(Enum):
    SLICES = auto()
    PRODUCT = auto()


def scales_at(columns: Sequence[Column], prices: Sequence[Decimal]) -> Float64s:
    """Each column's `scale_at` its price."""
    of = np.array([float(price) for price in prices])
    per_price = np.array([column.whole_per_price for column in columns])
    units_max = np.array([column.units_max for column in columns])
    scales = np.rint(of * per_price)
    possible = per_price > 0
    whole = np.divide(scales, per_price, out=np.zeros(len(of)), where=possible) == of
    return np.where(whole & possible & (scales <= UNITS_MAX) & (scales * units_max < WHOLE_MAX), scales, NOT_WHOLE)


def by_product(columns: Sequence[Column], scales: Float64s, holdings: Holdings, way: Way | None) -> Bools:
    """Which of the columns are to be brought to these scales by the product: all that can be, or none."""
    before = np.array([column.scale for column in columns])
    units_max = np.array([column.units_max for column in columns])
    able = (before != NOT_WHOLE) & (scales != NOT_WHOLE) & (scales != before)
    able &= np.maximum(before, scales) * units_max * holdings.width_max <= SUM_MAX
    if way is None:
        counts = np.array([column.count for column in columns])[able]
        slices_ns = SLICE_NS * len(counts) + ROW_NS * int(counts.sum())
        product_ns = PRODUCT_NS + CELL_NS * holdings.cells_count + BLOCK_NS * holdings.blocks_count
        way = Way.PRODUCT if product_ns < slices_ns else Way.SLICES
    return able if way is Way.PRODUCT else np.zeros(len(columns), np.bool_)
