"""How a window's quotes reach the Book: each asset's holders by themselves (slices), or all assets by one product.

A window has at most one quote per symbol. Where a column is whole before and after (engine.book_columns), its holders'
values change by units × (new scale − old scale), so one product of all cells with those differences, 0 for the assets
that did not tick, is what every portfolio's positions_value changes by: whole numbers added exactly
(engine.book_holdings), the same to the last bit as slice after slice. The other columns are valued by slices.

    slices     SLICE_NS × columns + ROW_NS × Σ holders                  of the ticked columns that can do without
    product    PRODUCT_NS + QUOTE_NS × quotes + cells / CELLS_PER_NS + BLOCK_NS × portfolios with positions

whichever is less. The constants are fits to what ticks and windows of 500 to 60,000 portfolios × 15 positions in 500
assets took on one core of a Xeon with 2 MB of second-level cache. They are about ratios: what a machine twice as fast
would choose is the same. At the seed load some 70 quotes in a window are where the ways meet.

A slice counts all holders as changed, the product those whose positions_value changed: where parts move and cancel to
the last micro-unit, no figure of the mark is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from engine.book_columns import NOT_WHOLE, UNITS_MAX, WHOLE_MAX, Columns, Float64s, Slots
from engine.book_columns import PriceQuote as PriceQuote
from engine.book_holdings import SUM_MAX, Holdings

SLICE_NS = 4_000
ROW_NS = 3
PRODUCT_NS = 30_000
QUOTE_NS = 350
CELLS_PER_NS = 2
BLOCK_NS = 10

Bools = NDArray[np.bool_]


class Way(Enum):
    SLICES = auto()
    PRODUCT = auto()


def slices_ns(columns_count: int, holders_count: int) -> int:
    """What slices of so many columns cost that have so many holders together."""
    return SLICE_NS * columns_count + ROW_NS * holders_count


def product_ns(quotes_count: int, holdings: Holdings) -> int:
    """What the product costs for so many quotes."""
    cells_ns = holdings.cells_count // CELLS_PER_NS
    return PRODUCT_NS + QUOTE_NS * quotes_count + cells_ns + BLOCK_NS * holdings.blocks_count


def moves(columns: Columns, numbers: Slots, prices: Sequence[Decimal], width_max: int) -> tuple[Float64s, Bools]:
    """The `scale_at` its price of each of the columns, and which of them the product can bring from their scale to that
    in blocks of up to `width_max` cells."""
    price = np.fromiter(map(float, prices), np.float64, len(prices))
    per_price, units_max, before = columns.per_price[numbers], columns.units_max[numbers], columns.scale[numbers]
    after = np.rint(price * per_price)
    largest = after * units_max
    # A column that no price makes whole has 0 per price, and 0 is not what any price is.
    whole = (after / np.maximum(per_price, 1) == price) & (after <= UNITS_MAX) & (largest < WHOLE_MAX)
    after[~whole] = NOT_WHOLE
    able = whole & (before != NOT_WHOLE) & (before != after)
    able &= np.maximum(before * units_max, largest) <= SUM_MAX / max(1, width_max)
    return after, able
