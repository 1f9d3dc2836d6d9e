"""One asset's column in the Book: its holders, dense and growable, and the price that they are valued at.

    holder intp (portfolio slot) | units float64 = quantity × 10^decimals

Rows [0, count) are in use. `decimals` is the column's own, as many as its quantities need, so that units are whole: at
most 10¹⁵, which a float64 holds exactly. Where quantities are too unlike for that (10¹⁴ beside 10⁻¹²) the column is
ragged: its units are the quantities, each the float64 nearest to it.

Values. A column is whole at a price when price × 10^(6 − decimals), its `scale`, is a whole number and the largest
product units × scale is below 2⁵². Then float64 makes every value, and every difference of two, without an error:

    value = units × scale                       change of value = units × (new scale − old scale)

so that nothing is kept of values. Otherwise (scale 0) they are in `value`, int64 micro-units, made by `rounded`: the
quantity units / 10^decimals is the float64 nearest to the decimal (a correctly rounded quotient of two exact numbers),
so the float product x with the price carries at most four roundings, |x − exact| ≤ 2⁻⁵⁰ |x|. An x whose distance to a
half is within that error, or |x| ≥ 2⁴⁹, is computed again in Decimal: the float64 of at most 15 digits gives its
decimal back (`repr`). With ordinary amounts that is one in 10⁵.

`value` is there as well from a split until every holder has its new quantity: then values are not those of the price.

A price of at most 15 digits is told from its float64 f: for whole m ≤ 10¹⁵ and k = 6 − decimals, m / 10^k, correctly
rounded, equals f just when the price is m / 10^k, because two decimals of at most 15 digits never share a float64.
The same goes for quantities and units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.amounts import DIGITS_MAX, MICRO, MICRO_DIGITS
from engine.marks import MarkQuality
from engine.messages import Condition
from engine.positions import carried_value

# Symbol, price (a checked number > 0), instant, what its source says of it.
PriceQuote = tuple[str, Decimal, int, Condition]
Number = TypeVar("Number", bound=np.generic)
Int64s = NDArray[np.int64]
Slots = NDArray[np.intp]
Float64s = NDArray[np.float64]

MICRO_SCALE = float(MICRO)
HALF = 0.5
UNITS_MAX = float(10**DIGITS_MAX)
WHOLE_MAX = float(2**52)
PRODUCT_ERROR = float(2**-50)
ROUNDED_MAX = float(2**49)
WHOLE_SPACING = float(3 * 2**51)  # from 2⁵² to 2⁵³ float64 has whole numbers alone
COLUMN_CAPACITY_MIN = 8
NOT_WHOLE = float(0)
POWERS_OF_TEN = tuple(float(10**k) for k in range(DIGITS_MAX + 1))


@dataclass(frozen=True, slots=True)
class HeldValue:
    """One position's present value, as the Book holds it."""

    symbol: str
    value: int
    day_base: int
    missing: bool


class Columns:
    """The columns by number, their numbers by symbol; and by number what a window of quotes reads and sets of all at
    once: arrays of their counts, scales and so on, and `said`, the last quote of each."""

    def __init__(self) -> None:
        self.number_of: dict[str, int] = {}
        self.by_number: list[Column] = []
        self.said: list[PriceQuote | None] = []
        self.count = np.zeros(COLUMN_CAPACITY_MIN, np.int64)
        self.quality = np.zeros(COLUMN_CAPACITY_MIN, np.int8)
        self.scale: Float64s = np.zeros(COLUMN_CAPACITY_MIN, np.float64)
        self.per_price: Float64s = np.zeros(COLUMN_CAPACITY_MIN, np.float64)
        self.units_max: Float64s = np.zeros(COLUMN_CAPACITY_MIN, np.float64)

    def __len__(self) -> int:
        return len(self.by_number)

    def get(self, symbol: str) -> Column | None:
        number = self.number_of.get(symbol)
        return None if number is None else self.by_number[number]

    def of(self, symbol: str) -> Column:
        """The symbol's column, new when there was none."""
        number = self.number_of.get(symbol)
        return self._new(symbol) if number is None else self.by_number[number]

    def _new(self, symbol: str) -> Column:
        number = len(self)
        if number == len(self.scale):
            for name in ("count", "quality", "scale", "per_price", "units_max"):
                setattr(self, name, resized(getattr(self, name), 2 * number))
        self.number_of[symbol] = number
        self.said.append(None)
        column = Column(symbol, number, self)
        self.by_number.append(column)
        return column

    def numbers(self, symbols: Sequence[str]) -> list[int]:
        """The numbers of the symbols' columns, which are new where there were none."""
        try:
            return list(map(self.number_of.__getitem__, symbols))
        except KeyError:
            return [self.of(symbol).number for symbol in symbols]

    def is_twice_in(self, numbers: Slots) -> bool:
        """Whether a column occurs more than once."""
        occurs = np.zeros(len(self), np.bool_)
        occurs[numbers] = True
        return int(np.count_nonzero(occurs)) < len(numbers)

    def say(self, numbers: Iterable[int], quotes: Iterable[PriceQuote]) -> None:
        """Keep the quotes that the columns of these numbers are valued at from now on."""
        said = self.said
        for number, quote in zip(numbers, quotes, strict=True):
            said[number] = quote


class Column:
    """`quality` is that of the price, one for all holders; MISSING until there is one."""

    __slots__ = (
        "_columns",
        "_count",
        "_per_price",
        "_quality",
        "_units_max",
        "decimals",
        "holder",
        "is_ragged",
        "number",
        "symbol",
        "units",
        "value",
    )

    def __init__(self, symbol: str, number: int, columns: Columns) -> None:
        self.symbol = symbol
        self.number = number
        self._columns = columns
        self.scale = NOT_WHOLE
        self.count = 0
        self.holder: Slots = np.zeros(COLUMN_CAPACITY_MIN, np.intp)
        self.units: Float64s = np.zeros(COLUMN_CAPACITY_MIN, np.float64)
        self.value: Int64s | None = np.zeros(COLUMN_CAPACITY_MIN, np.int64)
        self.quality = MarkQuality.MISSING
        self._forget_quantities()

    def _forget_quantities(self) -> None:
        self.is_ragged, self.decimals = False, 0
        self.units_max, self.per_price = float(0), POWERS_OF_TEN[MICRO_DIGITS]

    @property
    def quote(self) -> PriceQuote | None:
        """The last one; its price is in the shares of today."""
        return self._columns.said[self.number]

    @quote.setter
    def quote(self, quote: PriceQuote) -> None:
        self._columns.said[self.number] = quote

    @property
    def price(self) -> Decimal | None:
        quote = self._columns.said[self.number]
        return None if quote is None else quote[1]

    @property
    def count(self) -> int:
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        self._count = self._columns.count[self.number] = count

    @property
    def quality(self) -> MarkQuality:
        return self._quality

    @quality.setter
    def quality(self, quality: MarkQuality) -> None:
        self._quality = self._columns.quality[self.number] = quality

    @property
    def scale(self) -> float:
        """By which units become values; NOT_WHOLE where values are kept."""
        return self._columns.scale.item(self.number)

    @scale.setter
    def scale(self, scale: float) -> None:
        self._columns.scale[self.number] = scale

    @property
    def per_price(self) -> float:
        """scale / price; 0 where no price makes a whole scale."""
        return self._per_price

    @per_price.setter
    def per_price(self, per_price: float) -> None:
        self._per_price = self._columns.per_price[self.number] = per_price

    @property
    def units_max(self) -> float:
        """Bounds the units in the column; too wide is merely slower."""
        return self._units_max

    @units_max.setter
    def units_max(self, units_max: float) -> None:
        self._units_max = self._columns.units_max[self.number] = units_max

    # -- rows --------------------------------------------------------------------------------------------------

    def append(self, holder: int) -> int:
        """A new row, without units; returns it."""
        row, self.count = self.count, self.count + 1
        self._reserve(self.count)
        self.holder[row] = holder
        return row

    def append_many(self, holders: Slots, units: Float64s, values: Int64s) -> int:
        """New rows, whose units have been admitted; returns the first."""
        first, self.count = self.count, self.count + len(holders)
        self._reserve(self.count)
        rows = slice(first, self.count)
        self.holder[rows], self.units[rows] = holders, units
        if self.value is not None:
            self.value[rows] = values
        return first

    def set(self, row: int, units: float, value: int) -> None:
        self.units[row] = units
        if self.value is not None:
            self.value[row] = value

    def remove(self, row: int) -> int | None:
        """Give a row up; the last one takes its place. Returns the holder that moved, if one did."""
        last = self.count = self.count - 1
        moved = None
        if row != last:
            self.holder[row], self.units[row] = moved, _ = self.holder.item(last), self.units.item(last)
            if self.value is not None:
                self.value[row] = self.value[last]
        self._look_whether_empty()
        return moved

    def remove_many(self, rows: Slots) -> tuple[Slots, Slots]:
        """Give rows up (ascending); others take their places. Returns where to, and the holders that moved there."""
        holes, movers = holes_and_movers(self.count, rows)
        self.holder[holes], self.units[holes] = self.holder[movers], self.units[movers]
        if self.value is not None:
            self.value[holes] = self.value[movers]
        self.count -= len(rows)
        self._look_whether_empty()
        return holes, self.holder[holes]

    def _look_whether_empty(self) -> None:
        if not self.count:
            self._keep_values()
            self._forget_quantities()
            self._forget_values()

    def _reserve(self, count: int) -> None:
        if count > len(self.holder):
            grown = max(count, len(self.holder) * 3 // 2)
            self.holder, self.units = resized(self.holder, grown), resized(self.units, grown)
            if self.value is not None:
                self.value = resized(self.value, grown)

    # -- quantities ----------------------------------------------------------------------------------------------

    def units_of(self, quantity: float) -> float | None:
        """The quantity in the column's units; None when these can not express it (`widen`)."""
        if self.is_ragged:
            return quantity
        tens = POWERS_OF_TEN[self.decimals]
        units = nearest(quantity * tens)
        return units if abs(units) <= UNITS_MAX and units / tens == quantity else None

    def many_units_of(self, quantities: Float64s) -> Float64s | None:
        """As `units_of`; None when there is one that the units can not express."""
        if self.is_ragged:
            return quantities
        tens = POWERS_OF_TEN[self.decimals]
        units = np.rint(quantities * tens)
        fits = (np.abs(units) <= UNITS_MAX) & (units / tens == quantities)
        return units if fits.all() else None

    def widen(self, decimals: int, quantity_max: float) -> None:
        """Make units smaller, for quantities with so many decimals; where units grow too large, ragged."""
        was_whole = self.value is None
        self._keep_values()
        decimals = max(decimals, self.decimals)
        tens = POWERS_OF_TEN[decimals - self.decimals]
        if max(nearest(quantity_max * POWERS_OF_TEN[decimals]), self.units_max * tens) <= UNITS_MAX:
            self.units[: self.count] *= tens
            self.decimals, self.units_max = decimals, self.units_max * tens
            self.per_price = POWERS_OF_TEN[MICRO_DIGITS - decimals] if decimals <= MICRO_DIGITS else NOT_WHOLE
        else:
            self.units[: self.count] = self.quantities()
            self.is_ragged, self.decimals, self.per_price = True, 0, NOT_WHOLE
        if was_whole:
            self._forget_values()

    def admit(self, units_max: float) -> None:
        """Units of this magnitude are about to come in."""
        if units_max > self.units_max:
            self.units_max = units_max
            if units_max * self.scale >= WHOLE_MAX:
                self._keep_values()

    def quantities(self) -> Float64s:
        quantities: Float64s = self.units[: self.count] / POWERS_OF_TEN[self.decimals]
        return quantities

    def quantity_of(self, units: float) -> Decimal:
        return Decimal(repr(units / POWERS_OF_TEN[self.decimals]))

    # -- values --------------------------------------------------------------------------------------------------

    def value_at(self, row: int) -> int:
        return int(self.units[row] * self.scale) if self.value is None else int(self.value[row])

    def values(self) -> Int64s:
        """The present values of all rows."""
        if self.value is not None:
            return self.value[: self.count]
        return (self.units[: self.count] * self.scale).astype(np.int64)

    def values_of(self, units: Float64s, costs: Int64s) -> Int64s:
        """What units that have been admitted are worth at the present price."""
        if self.value is None:
            return (units * self.scale).astype(np.int64)
        if self.price is None:
            return costs
        return rounded(units / POWERS_OF_TEN[self.decimals], self.price, lambda place: int(costs[place]))

    def _keep_values(self) -> None:
        if self.value is None:
            self.value = resized(self.values(), len(self.holder))
            self.scale = NOT_WHOLE

    def _forget_values(self) -> None:
        """Where values are those of the price: they need not be kept if the column is whole."""
        scale = NOT_WHOLE if self.price is None else self.scale_at(float(self.price))
        if scale:
            self.scale, self.value = scale, None

    def rescale(self, price: Decimal) -> None:
        """The same price in new shares; the values stay."""
        self._keep_values()
        if self.quote is not None:
            symbol, _, ts_event_ns, condition = self.quote
            self.quote = (symbol, price, ts_event_ns, condition)

    def scale_at(self, price: float) -> float:
        """The scale at a price; NOT_WHOLE when the column is not whole at it."""
        per_price = self.per_price
        scale = nearest(price * per_price)
        whole = scale and scale <= UNITS_MAX and scale / per_price == price
        return scale if whole and scale * self.units_max < WHOLE_MAX else NOT_WHOLE

    def reprice(self, price: Decimal, scale: float, cost_of: Callable[[int], int]) -> Int64s:
        """Value all rows at a price and its `scale_at`; returns by how much each value changed.

        Where a value leaves the range, its holder's `cost_of` is asked for.
        """
        if self.value is None and scale:
            change: Int64s = (self.units[: self.count] * (scale - self.scale)).astype(np.int64)
        else:
            before, self.scale, self.value = self.values(), scale, None
            if not scale:
                values = rounded(self.quantities(), price, lambda row: cost_of(int(self.holder[row])))
                self.value = resized(values, len(self.holder))
            change = self.values() - before
        self.scale = scale
        return change


def nearest(number: float) -> float:
    """The whole number next to one below 2⁵¹, to the even one at a tie; beyond, some number as large."""
    return (number + WHOLE_SPACING) - WHOLE_SPACING


def rounded(quantities: Float64s, price: Decimal, cost_of: Callable[[int], int]) -> Int64s:
    """round(quantity × price × 10⁶) of all, exact; beyond the range `cost_of` the place."""
    product = quantities * (float(price) * MICRO_SCALE)
    nearest = np.rint(product)
    magnitude = np.abs(product)
    doubtful = (np.abs(product - nearest) >= HALF - magnitude * PRODUCT_ERROR) | (magnitude >= ROUNDED_MAX)
    values = np.where(doubtful, 0, nearest).astype(np.int64)
    for place in np.flatnonzero(doubtful).tolist():
        values[place] = carried_value(Decimal(repr(float(quantities[place]))), cost_of(place), price)
    return values


def holes_and_movers(count: int, removed: Slots) -> tuple[Slots, Slots]:
    """To keep `count` rows dense when some are removed: the places to fill, and the rows that fill them."""
    left = count - len(removed)
    stays = np.ones(len(removed), np.bool_)
    beyond = removed[removed >= left] - left
    stays[beyond] = False
    return removed[removed < left], np.flatnonzero(stays) + left


def resized(array: NDArray[Number], capacity: int) -> NDArray[Number]:
    """As much of an array as there is, and zeros beyond it; memory that was never written to costs nothing."""
    new = np.zeros(capacity, array.dtype)
    new[: len(array)] = array
    return new
