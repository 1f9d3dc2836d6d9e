"""Cells by portfolio: dense and bounded whatever was opened and closed, patched in place, multiplied as they lie."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest

from engine.book import Account, Book, Holding
from engine.book_columns import holes_and_movers
from engine.book_holdings import WIDTHS, Holdings
from engine.book_window import Way
from engine.pnl import DayBase

ACCOUNT = Account(0, 0, 0, 0, 0, 0, 0, 0, 1, DayBase(0, 1, 0))
NOTHING = Decimal(0)


def symbol(number: int) -> str:
    return f"S-{number}"


def capacity_bytes(book: Book) -> int:
    """Of everything that grows with positions and portfolios."""
    holdings, shelves = book._holdings, book._holdings.shelves
    arrays = [shelf.slot for shelf in shelves] + [holdings.count, holdings._shelf, holdings._block]
    for shelf in shelves:
        arrays += [shelf.asset, shelf.row, shelf.units, shelf.cost, shelf.day_base]
    for column in book._columns.by_number:
        arrays += [column.holder, column.units, *([] if column.value is None else [column.value])]
    arrays += [getattr(book, name) for name in ("cash", "positions_value", "cost", "dirty", "quality_count")]
    return sum(array.nbytes for array in arrays)


def test_a_book_stays_dense_whatever_is_opened_and_closed() -> None:
    """A million opens and closes at the scale of a test: 300 portfolios of up to 30 positions, turned over 40 times,
    and shards of them dropped and opened again. It is as large as it was after the first round."""
    random, book = np.random.default_rng(3), Book()
    for number in range(40):
        book.tick(symbol(number), Decimal("2.5"), 1)
    opened = 0

    def fill_up() -> None:
        for number in range(300):
            if f"p-{number}" not in book:
                book.open(f"p-{number}", number % 4, ACCOUNT)
            for asset in random.permutation(40)[: 10 + number % 20].tolist():
                book.set_position(f"p-{number}", Holding(symbol(asset), Decimal(1 + asset), 3, 4))

    def close_all() -> int:
        closed = 0
        for number in range(300):
            for name, _ in book.values(f"p-{number}"):
                book.set_position(f"p-{number}", Holding(name, NOTHING, 0, 0))
                closed += 1
        return closed

    fill_up()
    first_bytes = capacity_bytes(book)
    for turn in range(6):
        for number in random.permutation(300)[:200].tolist():
            for asset in random.permutation(40)[:15].tolist():
                quantity = Decimal(int(random.integers(-3, 4)))
                book.set_position(f"p-{number}", Holding(symbol(asset), quantity, 3, 4))
        opened += close_all()
        assert book.positions_count == book._holdings.cells_count == book._holdings.blocks_count == 0
        if turn % 2:
            book.drop_shard(turn % 4)
        fill_up()
        book.check()
        assert book._holdings.cells_count <= 2 * book.positions_count
        # Both kinds of blocks that a portfolio has had may be there, in the most that were in use at a time.
        assert capacity_bytes(book) <= 2 * first_bytes
    assert opened > 20_000
    assert dict(book.revalued()) == {f"p-{number}": book.nav(f"p-{number}") for number in range(300)}


def test_portfolios_that_come_and_go_take_the_slots_of_those_before() -> None:
    book = Book()
    for turn in range(60):
        for number in range(20):
            holdings = [Holding(symbol((turn + at) % 7), Decimal(at + 1), 0, 0) for at in range(number % 6)]
            book.open(f"p-{turn}-{number}", number % 2, ACCOUNT, holdings)
        book.drop_shard(turn % 2)
        if turn % 3 == 2:
            book.drop_shard((turn + 1) % 2)
    assert len(book.cash) <= 96 and len(book._id_of) <= 60
    book.check()


def test_a_portfolio_grows_through_all_widths_and_shrinks_again() -> None:
    book = Book()
    book.open("other", 0, ACCOUNT, [Holding(symbol(5), Decimal(2), 0, 0)])
    book.open("p", 0, ACCOUNT)
    widths = set()
    for number in [*range(200), *range(199, -1, -1)]:
        book.tick(symbol(number), Decimal(number + 1), 1)
        is_held = symbol(number) in dict(book.values("p"))
        book.set_position("p", Holding(symbol(number), NOTHING if is_held else Decimal(number + 1), number, -number))
        held = book.held("p")
        assert all(
            one.value == int(one.symbol[2:]) ** 2 * 10**6 + 2 * 10**6 * int(one.symbol[2:]) + 10**6 for one in held
        )
        assert {one.day_base for one in held} == {-int(one.symbol[2:]) for one in held}
        assert book._holdings.width_max <= max(4, 4 * len(held))
        widths.add(book._holdings.width_max)
        if number % 20 == 0:
            book.check()
    assert widths == {width for width in WIDTHS if width <= 256}
    assert (book.held("p"), book.nav("p"), book._holdings.width_max) == ([], 0, 4)
    book.check()


def test_what_fills_do_to_cells_is_in_the_next_product() -> None:
    """The matrix is the cells' memory: made once, and again when blocks come or go."""
    book = Book()
    for number in range(30):
        book.open(f"p-{number}", 0, ACCOUNT, [Holding(symbol(number % 3), Decimal(1), 0, 0)])
    for step in range(1, 12):
        book.tick_all([(symbol(asset), Decimal(step + asset), step, "") for asset in range(4)], Way.PRODUCT)
        assert dict(book.revalued()) == {f"p-{number}": book.nav(f"p-{number}") for number in range(30)}
        book.set_position(f"p-{step}", Holding(symbol(step % 4), Decimal(step), 0, 0))
        book.set_position(f"p-{step + 1}", Holding(symbol(3), Decimal(7 + step), 0, 0))
        if step % 4 == 0:
            book.set_position(f"p-{step + 9}", Holding(symbol((step + 9) % 3), NOTHING, 0, 0))
    (shelf,) = [shelf for shelf in book._holdings.shelves if shelf.count]
    assert np.shares_memory(shelf._matrix.data, shelf.units) and np.shares_memory(shelf._matrix.indices, shelf.asset)


def test_nothing_held_has_no_cells_and_no_product() -> None:
    holdings = Holdings()
    holdings.reserve(4)
    assert holdings.find(2, 0) is None
    assert list(holdings.product(np.ones(3))) == [] and list(holdings.cells(np.arange(4))) == []
    assert (holdings.width_max, holdings.cells_count, holdings.by_asset(np.arange(4))) == (0, 0, [])


@pytest.mark.parametrize(
    ("count", "removed", "holes", "movers"),
    [
        (5, [4], [], []),
        (5, [0], [0], [4]),
        (5, [1, 3], [1], [4]),
        (5, [0, 1], [0, 1], [3, 4]),
        (5, [0, 4], [0], [3]),
        (5, [0, 1, 2, 3, 4], [], []),
        (5, [], [], []),
    ],
)
def test_the_last_ones_take_the_places_of_those_that_go(
    count: int, removed: list[int], holes: list[int], movers: list[int]
) -> None:
    found = holes_and_movers(count, np.array(removed, np.intp))
    assert [places.tolist() for places in found] == [holes, movers]
