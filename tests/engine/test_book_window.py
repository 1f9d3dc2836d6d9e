"""A window by slices, by the product or by what is cheaper: the same to the last bit, whatever the numbers.

Three Books are taken through the same random opens, closes, fills, windows of few, many and all quotes, splits, dropped
shards, qualities and cuts, each by its own way; after every step they agree in every figure, and with the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine import book_window
from engine.amounts import AmountError, check_number, value_micro
from engine.book import Account, Book, Holding
from engine.book_columns import Column
from engine.book_holdings import SUM_MAX, WIDTHS
from engine.book_window import Way
from engine.marks import MarkQuality
from engine.pnl import DayBase

ACCOUNT = Account(0, 0, 0, 0, 0, 0, 0, 0, 1, DayBase(0, 1, 0))
SHARDS = 3
SYMBOLS = tuple(f"S-{number}" for number in range(12))
WAYS = (Way.SLICES, Way.PRODUCT, None)
NO_HOLDING = Decimal(0)


def number(digits: int, decimals: int) -> Decimal:
    return check_number(Decimal(digits).scaleb(-decimals), "number")


def numbers(digits_max: int, decimals_max: int) -> st.SearchStrategy[Decimal]:
    return st.builds(number, st.integers(1, 10**digits_max - 1), st.integers(0, decimals_max))


# Ordinary ones, those with many decimals, huge ones, and those whose products stand just at a bound.
quantities = st.one_of(
    numbers(3, 0), numbers(4, 2), numbers(6, 4), numbers(9, 8), numbers(15, 0), numbers(15, 12), st.just(Decimal(2**31))
)
prices = st.one_of(numbers(4, 2), numbers(4, 2), numbers(6, 4), numbers(6, 6), numbers(15, 12), st.just(Decimal(2)))


class Windows(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.books = {way: Book() for way in WAYS}
        self.names: dict[str, int] = {}
        self.opened = 0
        self.instant = 0

    def each(self, act: Callable[[Book], object]) -> None:
        outcomes = [act(book) for book in self.books.values()]
        assert outcomes.count(outcomes[0]) == len(outcomes)

    @rule(shard=st.integers(0, SHARDS - 1), held=st.dictionaries(st.sampled_from(SYMBOLS), quantities, max_size=9))
    def open(self, shard: int, held: dict[str, Decimal]) -> None:
        self.opened += 1
        name = f"p-{self.opened}"
        self.names[name] = shard
        holdings = [Holding(symbol, quantity, 7, 11) for symbol, quantity in held.items()]
        self.each(lambda book: book.open(name, shard, ACCOUNT, holdings))

    @rule(data=st.data(), quantity=quantities, is_short=st.booleans(), cost=st.integers(-(10**9), 10**9))
    def fill(self, data: st.DataObject, quantity: Decimal, is_short: bool, cost: int) -> None:
        assume(self.names)
        name, symbol = data.draw(st.sampled_from(sorted(self.names))), data.draw(st.sampled_from(SYMBOLS))
        holding = Holding(symbol, -quantity if is_short else quantity, cost, 5)
        self.each(lambda book: book.set_position(name, holding))

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        assume(self.names)
        name = data.draw(st.sampled_from(sorted(self.names)))
        held = [symbol for symbol, _ in self.books[None].values(name)]
        for symbol in data.draw(st.lists(st.sampled_from(held), unique=True)) if held else ():
            self.each(lambda book, symbol=symbol: book.set_position(name, Holding(symbol, NO_HOLDING, 0, 3)))

    @rule(
        few=st.dictionaries(st.sampled_from(SYMBOLS), prices, max_size=4),
        condition=st.sampled_from(("", "", "HALTED")),
    )
    def few_tick(self, few: dict[str, Decimal], condition: str) -> None:
        self.window(few, condition)

    @rule(digits=st.integers(1, 10**6), decimals=st.integers(0, 6))
    def all_tick(self, digits: int, decimals: int) -> None:
        self.window({symbol: number(digits + 37 * at, decimals) for at, symbol in enumerate(SYMBOLS)}, "")

    @rule(price=prices)
    def all_tick_at_one_price(self, price: Decimal) -> None:
        self.window(dict.fromkeys(SYMBOLS, price), "")

    def window(self, window: dict[str, Decimal], condition: str) -> None:
        self.instant += 1
        quotes = [(symbol, price, self.instant, condition) for symbol, price in window.items()]
        before = [dict(self.shown(book)) for book in self.books.values()]
        for book in self.books.values():
            book.clear(book.changed())
        outcomes = [book.tick_all(quotes, way) for way, book in self.books.items()]
        assert outcomes.count(outcomes[0]) == len(outcomes)
        assert outcomes[0] == [len(self.books[None].holders(symbol)) for symbol in window]
        for (_, book), was in zip(self.books.items(), before, strict=True):
            now = dict(self.shown(book))
            assert set(book.portfolio_ids(book.changed())) >= {name for name in now if now[name] != was[name]}

    @rule(symbol=st.sampled_from(SYMBOLS), ratio=st.sampled_from((2, 3, 10)), moved=st.floats(0, 1))
    def split(self, symbol: str, ratio: int, moved: float) -> None:
        """Some of the holders get their new shares before the others are valued again."""
        book = self.books[None]
        price = book.price(symbol)
        try:
            after = None if price is None else check_number((price / ratio).quantize(Decimal(1).scaleb(-6)), "price")
        except AmountError:
            after = None
        assume(after)
        assert after is not None
        held = book.portfolio_ids(book.holders(symbol))
        before = [list(self.shown(one)) for one in self.books.values()]
        self.each(lambda book: book.rescale(symbol, after))
        assert [list(self.shown(one)) for one in self.books.values()] == before
        self.check_books(is_split=True)
        for name in held[: int(len(held) * moved)]:
            holding = Holding(symbol, Decimal(4 * ratio), 1, 1)
            self.each(lambda book, name=name, holding=holding: book.set_position(name, holding))
        self.each(lambda book: book.revalue(symbol))

    @rule(shard=st.integers(0, SHARDS - 1))
    def drop(self, shard: int) -> None:
        self.each(lambda book: book.drop_shard(shard))
        self.names = {name: of for name, of in self.names.items() if of != shard}

    @rule(symbol=st.sampled_from(SYMBOLS), quality=st.sampled_from([MarkQuality.STALE, MarkQuality.LIVE]))
    def quality(self, symbol: str, quality: MarkQuality) -> None:
        if self.books[None].price(symbol) is not None:
            self.each(lambda book: book.set_quality(symbol, quality))

    @rule(shard=st.integers(0, SHARDS - 1))
    def cut(self, shard: int) -> None:
        self.instant += 1
        self.each(lambda book: book.cut(book.slots_of(shard), self.instant))

    def shown(self, book: Book) -> list[tuple[str, bytes]]:
        slots = np.array([book.slot(name) for name in self.names], np.int64)
        return list(zip(self.names, [row.tobytes() for row in book.marks(slots, 1, 1)], strict=True))

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "books"):
            self.check_books()

    def check_books(self, is_split: bool = False) -> None:
        first = self.books[None]
        for book in self.books.values():
            book.check()
            assert self.shown(book) == self.shown(first)
            for name in self.names:
                assert book.held(name) == first.held(name)
                assert dict(book.values(name)) == book.values_of(np.array([book.slot(name)]))[0]
            if not is_split:
                revalued = dict(book.revalued())
                assert revalued == {name: book.positions_value[book.slot(name)] for name in self.names}


TestWindows = Windows.TestCase
TestWindows.settings = settings(max_examples=120, stateful_step_count=25)


# -- where the product is exact ------------------------------------------------------------------------------


def held_by_one(quantities: Sequence[Decimal], price: Decimal) -> Book:
    """A portfolio that holds the n-th quantity of the n-th symbol, each at `price`."""
    book = Book()
    holdings = [Holding(f"S-{at}", quantity, 0, 0) for at, quantity in enumerate(quantities)]
    book.tick_all([(holding.symbol, price, 1, "") for holding in holdings])
    book.open("p", 0, ACCOUNT, holdings)
    return book


@given(st.integers(1, 40), st.integers(-3, 3), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_at_its_bound_the_product_is_exact_and_beyond_it_is_not_taken(
    count: int, beyond: int, mixed: bool, random
) -> None:
    """Odd values as large as the product takes, which float64 would round in a sum a little larger."""
    width = min(width for width in WIDTHS if width >= count)
    largest = int(SUM_MAX) // width + beyond
    quantities = [
        Decimal(largest - random.randrange(3)) * (random.choice((1, -1)) if mixed else 1) for _ in range(count)
    ]
    price, next_price = Decimal("0.000001"), Decimal("0.000002")
    book = held_by_one(quantities, next_price)
    book.tick_all([(f"S-{at}", price, 2, "") for at in range(count)], Way.PRODUCT)
    assert book.positions_value[0] == sum(value_micro(quantity, price) for quantity in quantities)
    book.tick_all([(f"S-{at}", next_price, 3, "") for at in range(count)], Way.PRODUCT)
    assert book.positions_value[0] == sum(value_micro(quantity, next_price) for quantity in quantities)


def able(quantities: Sequence[str], price: str, next_price: str) -> list[bool]:
    book = held_by_one([Decimal(quantity) for quantity in quantities], Decimal(price))
    numbers = np.array([book._columns.of(f"S-{at}").number for at in range(len(quantities))])
    return book_window.moves(book._columns, numbers, [Decimal(next_price)] * len(numbers), book._holdings.width_max)[
        1
    ].tolist()


def test_what_the_product_takes() -> None:
    """Decimals of quantity and price up to 6 together, before and after; and no value beyond 2⁵³ / width."""
    quantities = ["1", "0.1", "0.0001", "0.00001", "0.00000001", "-3.1415"]
    assert able(quantities, "2.25", "2.27") == [True, True, True, False, False, True]
    assert able(quantities, "2.25", "2.271") == [True, True, False, False, False, False]
    assert able(quantities, "2.251", "2.27") == [True, True, False, False, False, False]
    assert able(quantities, "2", "3") == [True, True, True, True, False, True]
    assert able(quantities, "2", "2") == [False] * 6
    bound = SUM_MAX / 8 / 10**6  # six positions lie in a block of eight
    assert able([str(int(bound)), str(int(bound) + 1), *"1111"], "0.5", "1") == [True, False] + [True] * 4
    assert able([str(int(bound)), str(int(bound) + 1), *"1111"], "1", "0.5") == [True, False] + [True] * 4


def test_a_column_whose_quantities_are_too_unlike_for_one_unit_is_exact_too() -> None:
    unlike = [Decimal(10**14), Decimal("0.000000000001"), Decimal("-0.333333333333"), Decimal(123_456_789_012_345)]
    book = Book()
    for at, quantity in enumerate(unlike):
        book.open(f"p-{at}", 0, ACCOUNT, [Holding("S", quantity, 0, 0)])
    for price in (Decimal("0.000000000007"), Decimal("0.5"), Decimal("0.001"), Decimal("570.3")):
        book.tick_all([("S", price, 1, "")], Way.PRODUCT)
        book.check()
        assert dict(book.revalued()) == {f"p-{at}": book.nav(f"p-{at}") for at in range(4)}
    for at in range(4):
        book.set_position(f"p-{at}", Holding("S", NO_HOLDING, 0, 0))
    book.set_position("p-0", Holding("S", Decimal(3), 0, 0))
    book.tick("S", Decimal("2.5"), 2)
    assert book._columns.of("S").scale != 0  # an empty column begins anew


@given(st.lists(st.tuples(numbers(15, 12), st.booleans()), min_size=1, max_size=12))
def test_units_give_their_quantities_back(drawn: list[tuple[Decimal, bool]]) -> None:
    book = Book()
    held = {f"p-{at}": -one if is_short else one for at, (one, is_short) in enumerate(drawn)}
    for name, quantity in held.items():
        book.open(name, 0, ACCOUNT, [Holding("S", quantity, 0, 0)])
        book.check()
    column = book._columns.of("S")
    units = column.units[: column.count].tolist()
    assert [check_number(column.quantity_of(one), "q") for one in units] == list(held.values())


def test_parts_that_move_and_cancel_change_nothing_that_a_mark_says() -> None:
    """By slices the portfolio counts as changed, by the product it does not; its mark is the same."""
    for way, changed in ((Way.SLICES, 1), (Way.PRODUCT, 0)):
        book = held_by_one([Decimal(3), Decimal(-3)], Decimal(10))
        before = book.marks(book.slots_of(0), 1, 1).tobytes()
        book.clear(book.changed())
        assert book.tick_all([("S-0", Decimal(11), 2, ""), ("S-1", Decimal(11), 2, "")], way) == [1, 1]
        assert len(book.changed()) == changed
        assert book.marks(book.slots_of(0), 1, 1).tobytes() == before


# -- the choice ----------------------------------------------------------------------------------------------


def test_a_few_quotes_go_by_slices_and_all_of_them_by_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    book = Book()
    symbols = [f"S-{at}" for at in range(60)]
    for name in range(400):
        holdings = [Holding(symbols[(name + at) % 60], Decimal(1 + at), 0, 0) for at in range(15)]
        book.open(f"p-{name}", 0, ACCOUNT, holdings)
    sliced: list[str] = []
    reprice = Column.reprice
    monkeypatch.setattr(Column, "reprice", lambda column, *of: (sliced.append(column.symbol), reprice(column, *of))[1])
    for step, expected in ((1, 60), (2, 0)):  # before its first price a column has nothing to differ from
        book.tick_all([(symbol, Decimal(step), step, "") for symbol in symbols])
        assert len(sliced) == expected
        sliced.clear()
    book.tick_all([(symbol, Decimal(3), 3, "") for symbol in symbols[:5]])
    assert sliced == symbols[:5]
    sliced.clear()
    book.set_position("p-0", Holding("S-7", Decimal("0.123456789"), 0, 0))
    book.tick_all([(symbol, Decimal("4.01"), 4, "") for symbol in symbols])
    assert sliced == ["S-7"]
    book.check()
    assert dict(book.revalued()) == {f"p-{name}": book.nav(f"p-{name}") for name in range(400)}


def test_of_two_quotes_of_a_symbol_the_later_counts() -> None:
    for way in WAYS:
        book = held_by_one([Decimal(2)], Decimal(1))
        quotes = [("S-0", Decimal(5), 2, "HALTED"), ("S-0", Decimal(7), 3, ""), ("S-9", Decimal(1), 3, "")]
        assert book.tick_all(quotes, way) == [1, 1, 0]
        assert (book.nav("p"), book.price_as_of_ns("S-0"), book.price("S-9")) == (14 * 10**6, 3, Decimal(1))
        assert next(iter(book.prices())) == ("S-0", 3, "", MarkQuality.LIVE)
