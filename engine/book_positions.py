"""The positions of the Book, by slot: what each portfolio holds (engine.book_holdings), what each asset's holders hold
of it (engine.book_columns), and what that is worth at the assets' prices.

    positions_value = Σ values      cost = Σ costs      quality_count[q] = how many have a price of quality q

A position is a cell of its portfolio and a row of its asset's column; the cell knows the row. Both have its units.
A tick changes what the asset's holders are worth and marks them `dirty`, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from engine.amounts import decimals_of
from engine.book_accounts import Holding
from engine.book_columns import NOT_WHOLE, Column, Columns, Float64s, Int64s, Slots, resized
from engine.book_holdings import UNUSED, Cell, Holdings, Int32s, Shelf, grouped
from engine.book_window import PriceQuote, Way, moves, product_ns, slices_ns
from engine.marks import MarkQuality
from engine.messages import Condition
from engine.positions import carried_value

# What a source says of its price; what becomes of it with time is for engine.markets to say.
_LIVE = int(MarkQuality.LIVE)
_SAID = {"": MarkQuality.LIVE, "DELAYED": MarkQuality.DELAYED, "HALTED": MarkQuality.HALTED}


class PricedPositions:
    positions_value: Int64s
    cost: Int64s
    dirty: NDArray[np.bool_]
    # [quality, slot]
    quality_count: Int32s

    def __init__(self) -> None:
        self._columns = Columns()
        self._holdings = Holdings()
        self.positions_value = self.cost = np.zeros(0, np.int64)
        self.dirty = np.zeros(0, np.bool_)
        self.quality_count = np.zeros((len(MarkQuality), 0), np.int32)

    def _reserve(self, slots_count: int) -> None:
        self._holdings.reserve(slots_count)
        self.positions_value, self.cost = resized(self.positions_value, slots_count), resized(self.cost, slots_count)
        self.dirty = resized(self.dirty, slots_count)
        more = slots_count - self.quality_count.shape[1]
        self.quality_count = np.pad(self.quality_count, ((0, 0), (0, more)))

    @property
    def positions_count(self) -> int:
        return sum(column.count for column in self._columns.by_number)

    @property
    def symbols(self) -> Iterable[str]:
        return self._columns.number_of.keys()

    # -- positions -------------------------------------------------------------------------------------------

    def _set(self, slot: int, holding: Holding) -> None:
        column = self._columns.of(holding.symbol)
        cell = self._holdings.find(slot, column.number)
        if holding.quantity:
            self._put(column, slot, cell, holding)
        elif cell is not None:
            self._remove(column, slot, *cell)

    def _put(self, column: Column, slot: int, cell: Cell | None, holding: Holding) -> None:
        quantity = float(holding.quantity)
        units = column.units_of(quantity)
        if units is None:
            self._widen(column, decimals_of(holding.quantity), abs(quantity))
            units = column.units_of(quantity)
            assert units is not None
        column.admit(abs(units))
        if cell is None:
            before, (shelf, at) = 0, self._append(column, slot)
            row = shelf.row.item(at)
        else:
            shelf, at = cell
            row = shelf.row.item(at)
            before = column.value_at(row)
        if column.value is None:
            value = int(units * column.scale)
        else:
            value = carried_value(holding.quantity, holding.cost, column.price)
        self.positions_value[slot] += value - before
        self.cost[slot] += holding.cost - shelf.cost.item(at)
        column.set(row, units, value)
        shelf.units[at], shelf.cost[at], shelf.day_base[at] = units, holding.cost, holding.day_base

    def _widen(self, column: Column, decimals: int, quantity_max: float) -> None:
        column.widen(decimals, quantity_max)
        self._holdings.put_units(column.number, column.units)

    def _append(self, column: Column, slot: int) -> Cell:
        self.quality_count[column.quality, slot] += 1
        return self._holdings.append(slot, column.number, column.append(slot))

    def _remove(self, column: Column, slot: int, shelf: Shelf, at: int) -> None:
        row = shelf.row.item(at)
        self.positions_value[slot] -= column.value_at(row)
        self.cost[slot] -= shelf.cost.item(at)
        self.quality_count[column.quality, slot] -= 1
        self._holdings.remove(slot, at)
        moved = column.remove(row)
        if moved is not None:
            self._holdings.put_row(moved, column.number, row)

    def _add(
        self,
        slots: Int64s,
        holder: Int64s,
        symbols: Sequence[str],
        asset: Int64s,
        quantity: Float64s,
        quantity_decimals: Int64s,
        cost: Int64s,
        day_base: Int64s,
    ) -> None:
        """The positions of slots that hold nothing yet, the n-th of `slots[holder[n]]` in `symbols[asset[n]]`."""
        assets = np.array([self._columns.of(symbol).number for symbol in symbols], np.int64)[asset]
        units, rows, owner = np.zeros(len(holder)), np.zeros(len(holder), np.intp), slots[holder]
        for number, mine in grouped(assets):
            column = self._columns.by_number[number]
            units[mine] = self._admit(column, quantity[mine], quantity_decimals[mine])
            values = column.values_of(units[mine], cost[mine])
            rows[mine] = column.append_many(owner[mine], units[mine], values) + np.arange(len(mine))
            self.positions_value[owner[mine]] += values
            self.quality_count[column.quality, owner[mine]] += 1
        np.add.at(self.cost, owner, cost)
        self._holdings.add(slots, holder, asset=assets, row=rows, units=units, cost=cost, day_base=day_base)

    def _admit(self, column: Column, quantity: Float64s, decimals: Int64s) -> Float64s:
        units = column.many_units_of(quantity)
        if units is None:
            self._widen(column, int(decimals.max()), float(np.abs(quantity).max()))
            units = column.many_units_of(quantity)
            assert units is not None
        column.admit(float(np.abs(units).max()))
        return units

    def _drop_positions(self, slots: Slots) -> None:
        for number, rows in self._holdings.by_asset(slots):
            moved_to, moved = self._columns.by_number[number].remove_many(rows)
            self._holdings.put_rows(number, moved, moved_to)
        self._holdings.drop(slots)

    def _valued(self, slot: int) -> list[tuple[Column, int]]:
        """The columns of the open positions, with their present values."""
        shelf, cells = self._holdings.of(slot)
        assets, columns = shelf.asset[cells], self._columns.by_number
        found = zip(assets.tolist(), self._columns.scale[assets].tolist(), strict=True)
        units, rows = shelf.units[cells].tolist(), shelf.row[cells].tolist()
        return [
            (columns[number], int(of * scale) if scale else columns[number].value_at(row))
            for (number, scale), of, row in zip(found, units, rows, strict=True)
        ]

    def _values_at(self, shelf: Shelf, cells: Slots) -> Int64s:
        assets, rows = shelf.asset[cells], shelf.row[cells]
        scales = self._columns.scale[assets]
        values: Int64s = (shelf.units[cells] * scales).astype(np.int64)
        kept = np.flatnonzero(scales == NOT_WHOLE)
        for number in np.unique(assets[kept]).tolist():
            mine, of = kept[assets[kept] == number], self._columns.by_number[number].value
            assert of is not None
            values[mine] = of[rows[mine]]
        return values

    def holders(self, symbol: str) -> Int64s:
        """The slots that hold a symbol, in no order."""
        column = self._columns.get(symbol)
        return np.zeros(0, np.int64) if column is None else column.holder[: column.count].copy()

    def price(self, symbol: str) -> Decimal | None:
        column = self._columns.get(symbol)
        return column.price if column else None

    def price_as_of_ns(self, symbol: str) -> int:
        """The instant of the symbol's price; 0 without one."""
        column = self._columns.get(symbol)
        return 0 if column is None or column.quote is None else column.quote[2]

    # -- prices ----------------------------------------------------------------------------------------------

    def tick(self, symbol: str, price: Decimal, ts_event_ns: int, condition: Condition = "") -> int:
        """Re-value the asset's holders at `price` (a checked number > 0); returns how many positions it touched.

        The price is taken for fresh: its quality is what `condition` says, else LIVE, until `set_quality`.
        """
        column = self._columns.of(symbol)
        if price != column.price:
            self._reprice(column, price, column.scale_at(float(price)))
        column.quote = (symbol, price, ts_event_ns, condition)
        self._change_quality(column, _SAID[condition])
        return column.count

    def tick_all(self, quotes: Sequence[PriceQuote], way: Way | None = None) -> list[int]:
        """As `tick` for each of a window's quotes, by the cheaper way (engine.book_window) unless one is given."""
        if not quotes:
            return []
        columns = self._columns
        symbols, prices, _, conditions = zip(*quotes, strict=True)
        listed = columns.numbers(symbols)
        numbers = np.array(listed, np.intp)
        counts = columns.count[numbers]
        limit_ns = product_ns(len(quotes), self._holdings)
        is_small = way is None and slices_ns(len(quotes), int(counts.sum())) <= limit_ns
        if is_small or way is Way.SLICES or columns.is_twice_in(numbers):
            return [self.tick(*quote) for quote in quotes]
        after, able = moves(columns, numbers, prices, self._holdings.width_max)
        unable = np.flatnonzero(~able)
        if way is Way.PRODUCT or slices_ns(len(quotes) - len(unable), int(counts[able].sum())) > limit_ns:
            self._move_all(*((numbers[able], after[able]) if len(unable) else (numbers, after)))
            alone: Iterable[int] = unable.tolist()
        else:
            alone = range(len(quotes))
        for at in alone:
            column = columns.by_number[listed[at]]
            if prices[at] != column.price:
                self._reprice(column, prices[at], float(after[at]))
        columns.say(listed, quotes)
        if conditions.count("") < len(conditions) or np.count_nonzero(columns.quality[numbers] != _LIVE):
            for number, condition in zip(listed, conditions, strict=True):
                self._change_quality(columns.by_number[number], _SAID[condition])
        touched: list[int] = counts.tolist()
        return touched

    def _reprice(self, column: Column, price: Decimal, scale: float) -> None:
        holder = column.holder[: column.count]
        change = column.reprice(price, scale, lambda slot: self._holdings.cost_of(slot, column.number))
        # A portfolio holds an asset once, so no slot repeats within a column.
        np.add.at(self.positions_value, holder, change)
        self.dirty[holder] = True

    def _move_all(self, numbers: Slots, scales: Float64s) -> None:
        changes = np.zeros(len(self._columns))
        changes[numbers] = scales - self._columns.scale[numbers]
        self._columns.scale[numbers] = scales
        for slots, sums in self._holdings.product(changes):
            np.add.at(self.positions_value, slots, sums.astype(np.int64))
            moved = sums != 0
            self.dirty[slots if moved.all() else slots[moved]] = True

    def rescale(self, symbol: str, price: Decimal) -> None:
        """A split: the same price, of the same instant, in new shares. The rows keep their values until
        `set_position` brings each its new quantity, `revalue` the others; without a price there is nothing to do."""
        column = self._columns.get(symbol)
        if column is not None and column.price is not None:
            column.rescale(price)

    def revalue(self, symbol: str) -> None:
        """Value every row at the present price: after a split, also those whose quantity it left as it was."""
        column = self._columns.get(symbol)
        if column is not None and column.price is not None:
            self._reprice(column, column.price, column.scale_at(float(column.price)))

    def prices(self) -> Iterator[tuple[str, int, Condition, MarkQuality]]:
        """(symbol, instant, condition, quality) of every price."""
        for column in self._columns.by_number:
            if column.quote is not None:
                symbol, _, ts_event_ns, condition = column.quote
                yield symbol, ts_event_ns, condition, column.quality

    def set_quality(self, symbol: str, quality: MarkQuality) -> None:
        """What the symbol's price is worth now. MISSING is for symbols without one."""
        self._change_quality(self._columns.by_number[self._columns.number_of[symbol]], quality)

    def _change_quality(self, column: Column, quality: MarkQuality) -> None:
        if column.quality is quality:
            return
        holder = column.holder[: column.count]
        self.quality_count[column.quality][holder] -= 1
        self.quality_count[quality][holder] += 1
        column.quality = quality
        self.dirty[holder] = True

    def _revalued(self, slot: int) -> int:
        """The positions' value by the definition."""
        shelf, cells = self._holdings.of(slot)
        total = 0
        for number, units, cost in zip(
            *(of[cells].tolist() for of in (shelf.asset, shelf.units, shelf.cost)), strict=True
        ):
            column = self._columns.by_number[number]
            total += carried_value(column.quantity_of(units), cost, column.price)
        return total

    def check(self) -> None:
        """Cells and rows say the same of every position, sums are sums, nothing lies about."""
        rows = 0
        for shelf in self._holdings.shelves:
            assert not shelf.units[shelf.count * shelf.width :].any()
            for block, slot in enumerate(shelf.slot[: shelf.count].tolist()):
                found, cells = self._holdings.of(slot)
                assert found is shelf and cells.start == block * shelf.width and cells.stop > cells.start
                assert (shelf.row[cells.stop : cells.start + shelf.width] == UNUSED).all()
                for number, row, units in zip(
                    *(of[cells].tolist() for of in (shelf.asset, shelf.row, shelf.units)), strict=True
                ):
                    column = self._columns.by_number[number]
                    assert (column.holder[row], column.units[row]) == (slot, units) and row < column.count
                    rows += 1
                assert self.positions_value[slot] == sum(value for _, value in self._valued(slot))
                assert self.cost[slot] == shelf.cost[cells].sum()
        assert rows == self.positions_count == self._holdings.count.sum()
        for column in self._columns.by_number:
            assert (column.value is None) == (column.scale != NOT_WHOLE)
            assert column.is_ragged or np.abs(column.units[: column.count]).max(initial=0) <= column.units_max
