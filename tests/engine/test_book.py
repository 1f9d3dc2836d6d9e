"""The Book, the exact reference, the ledger's fold and the oracle agree to the micro-unit at every step.

A state machine sends random fills (long, short, flips, dust, up to the limits), cash movements, duplicates, quotes,
day cuts and take-overs through `engine.booking` and `engine.posting`; after each step `Bookkeeping.check` compares
every figure of every portfolio. Beside it: the float valuation is the Decimal one over the whole admitted range,
and what lies outside is refused and changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.amounts import AMOUNT_MAX_MICRO, AmountError, plain, value_micro
from engine.book import NAV_MAX_MICRO, Account, Book, Holding
from engine.book_accounts import account_at
from engine.marks import Mark, MarkQuality, decode_mark
from engine.pnl import DayBase
from tests.bookkeeping import SECTORS, Bookkeeping, cash, fill, opening

NAMES = ("p-1", "p-22", "p-333")
SYMBOLS = tuple(SECTORS)
ACCOUNT = Account(0, 0, 0, 0, 0, 0, 0, 0, 1, DayBase(0, 1, 0))
CUT_NS = 1_795_305_600_000_000_000


def numbers(digits_max: int, decimals_max: int) -> st.SearchStrategy[str]:
    """Numbers > 0 of 1 to `digits_max` digits whose last stands at most `decimals_max` behind the point."""
    digits = st.integers(1, digits_max).flatmap(lambda n: st.integers(1, 10**n - 1))
    return st.builds(lambda d, e: plain(Decimal(d).scaleb(-e)), digits, st.integers(0, decimals_max))


quantities = st.one_of(numbers(3, 0), numbers(6, 2), numbers(9, 8), numbers(15, 12), st.just("0.000000000001"))
prices = st.one_of(numbers(4, 2), numbers(6, 4), numbers(15, 12))
amounts = st.one_of(numbers(5, 2), numbers(12, 6), numbers(17, 6))


class Ledger(RuleBasedStateMachine):
    """Three portfolios in two shards, five symbols."""

    @initialize()
    def begin(self) -> None:
        self.kept = Bookkeeping(shards_count=2)
        self.sent: list[dict[str, Any]] = []
        self.send([opening(name) for name in NAMES])

    def send(self, events: list[dict[str, Any]]) -> None:
        self.sent += events
        self.kept.send(*events)

    def fresh_id(self) -> str:
        return f"e-{len(self.sent)}"

    @rule(
        name=st.sampled_from(NAMES),
        side=st.sampled_from(("BUY", "SELL")),
        quantity=quantities,
        price=prices,
        symbol=st.sampled_from(SYMBOLS),
        fee=st.sampled_from(("0", "1", "0.000001")),
    )
    def trade(self, name: str, side: str, quantity: str, price: str, symbol: str, fee: str) -> None:
        self.send([fill(name, side, quantity, price, self.fresh_id(), symbol, fee)])

    @rule(data=st.data(), share=st.sampled_from(("0.5", "1", "1.5", "3")), price=prices, name=st.sampled_from(NAMES))
    def trade_against(self, data: st.DataObject, share: str, price: str, name: str) -> None:
        """Reduce, close or flip what is held."""
        held = self.kept.folded[name].positions
        assume(held)
        symbol = data.draw(st.sampled_from(sorted(held)))
        quantity = plain(abs(held[symbol].quantity) * Decimal(share))
        side = "SELL" if held[symbol].quantity > 0 else "BUY"
        self.send([fill(name, side, quantity, price, self.fresh_id(), symbol)])

    @rule(
        name=st.sampled_from(NAMES),
        kind=st.sampled_from(("DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND")),
        amount=amounts,
    )
    def move_cash(self, name: str, kind: str, amount: str) -> None:
        self.send([cash(name, kind, amount, self.fresh_id())])

    @rule(name=st.sampled_from(NAMES), quantity=numbers(4, 2), price=numbers(4, 2), amount=numbers(5, 2))
    def one_batch(self, name: str, quantity: str, price: str, amount: str) -> None:
        """Bought, a flow in between, sold and sold short, all in one batch."""
        self.send(
            [
                fill(name, "BUY", quantity, price, self.fresh_id() + "a"),
                cash(name, "DEPOSIT", amount, self.fresh_id() + "b"),
                fill(name, "SELL", quantity, price, self.fresh_id() + "c"),
                fill(name, "SELL", quantity, amount, self.fresh_id() + "d"),
            ]
        )

    @rule(data=st.data(), changed=st.booleans())
    def repeat(self, data: st.DataObject, changed: bool) -> None:
        """A redelivered event, or its id with other content."""
        event = dict(data.draw(st.sampled_from(self.sent)))
        if changed and event["type"] == "cash":
            event["amount"] = "12345.5"
        self.send([event, event])

    @rule(symbol=st.sampled_from(SYMBOLS), price=prices)
    def quote(self, symbol: str, price: str) -> None:
        self.kept.tick(symbol, price)

    @rule()
    def cut(self) -> None:
        self.kept.cut()

    @rule(shard=st.sampled_from((0, 1)))
    def take_over(self, shard: int) -> None:
        self.kept.take_over(shard)

    @invariant()
    def all_agree(self) -> None:
        if hasattr(self, "kept"):
            self.kept.check()


TestLedger = Ledger.TestCase
TestLedger.settings = settings(
    max_examples=120, stateful_step_count=30, suppress_health_check=[HealthCheck.filter_too_much]
)


# -- the float valuation -------------------------------------------------------------------------------------


def held(*quantities: str, symbol: str = "AAPL", cost: int = 0) -> Book:
    """A Book whose n-th portfolio holds the n-th quantity."""
    book = Book()
    for number, quantity in enumerate(quantities):
        book.open(f"p-{number}", 0, ACCOUNT, [Holding(symbol, Decimal(quantity), cost, 0)])
    return book


def assert_exact(quantities: list[str], price: str) -> None:
    book = held(*quantities)
    expected = [value_micro(Decimal(quantity), Decimal(price)) for quantity in quantities]
    book.tick("AAPL", Decimal(price), 1)
    values = [book.nav(f"p-{number}") for number in range(len(quantities))]
    assert values == expected
    assert list(dict(book.revalued()).values()) == expected


@st.composite
def valued_near(draw: st.DrawFn, low_bits: int, high_bits: int) -> tuple[list[str], str]:
    """A price and quantities, 15 digits each, whose values lie between 2^low and 2^high micro-units."""
    price = Decimal(draw(st.integers(10**14, 10**15 - 1))).scaleb(draw(st.integers(-12, -1)))
    quantities = []
    for _ in range(3):
        micro = draw(st.integers(2**low_bits, 2**high_bits - 1))
        exact = Decimal(micro).scaleb(-6) / price
        decimals = min(12, 14 - exact.adjusted())
        quantity = exact.quantize(Decimal(1).scaleb(-decimals))
        quantities.append(plain(quantity * draw(st.sampled_from((1, -1)))))
    assume(all(0 < abs(Decimal(q)) < 10**15 and in_range(q, price) for q in quantities))
    return quantities, plain(price)


def in_range(quantity: str, price: Decimal) -> bool:
    try:
        value_micro(Decimal(quantity), price)
    except AmountError:
        return False
    return len(Decimal(quantity).normalize().as_tuple().digits) <= 15


@st.composite
def whole_products(draw: st.DrawFn) -> tuple[list[str], str]:
    """At most 6 decimals together, so that the product is a whole number of micro-units, of 2⁴⁷ to 2⁵⁹."""
    decimals = draw(st.integers(0, 6))
    price = Decimal(2 * draw(st.integers(10**6, 10**8)) + 1).scaleb(-decimals)
    quantities = []
    for _ in range(3):
        exact = Decimal(draw(st.integers(2**47, 2**59 - 1))).scaleb(-6) / price
        quantities.append(plain(exact.quantize(Decimal(1).scaleb(decimals - 6))))
    assume(all(Decimal(q) > 0 and in_range(q, price) for q in quantities))
    return quantities, plain(price)


@given(whole_products())
@settings(max_examples=300)
def test_a_whole_product_needs_no_rounding_and_gets_none(case: tuple[list[str], str]) -> None:
    assert_exact(*case)


@given(valued_near(1, 59))
@settings(max_examples=300)
def test_the_float_valuation_is_the_decimal_one(case: tuple[list[str], str]) -> None:
    assert_exact(*case)


@given(valued_near(48, 50))
@settings(max_examples=300)
def test_the_float_valuation_is_exact_where_its_error_reaches_one_half(case: tuple[list[str], str]) -> None:
    assert_exact(*case)


@given(valued_near(58, 59))
@settings(max_examples=200)
def test_the_float_valuation_is_exact_up_to_the_limit(case: tuple[list[str], str]) -> None:
    assert_exact(*case)


@st.composite
def near_tie(draw: st.DrawFn) -> tuple[list[str], str]:
    """Products that are a tie exactly, or miss one by their last digit: price = odd / 2ᵏ, quantity a multiple."""
    halves = draw(st.integers(0, 20))
    price = Decimal(2 * draw(st.integers(0, 2**20)) + 1) / Decimal(2**halves)
    odd = 2 * draw(st.integers(0, 2**18)) + 1
    tie = Decimal(odd * 2 ** max(0, halves - 1)).scaleb(-6)
    last = Decimal(1).scaleb(-12)
    quantities = [plain(q) for q in (tie, tie + last, tie - last, -tie)]
    assume(all(len(Decimal(q).normalize().as_tuple().digits) <= 15 for q in [*quantities, plain(price)]))
    assume(all(in_range(q, price) for q in quantities) and -price.normalize().as_tuple().exponent <= 12)
    return quantities, plain(price)


@given(near_tie())
@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
def test_ties_go_to_the_even_micro_unit(case: tuple[list[str], str]) -> None:
    assert_exact(*case)


def test_the_error_bound_holds_on_ten_thousand_worst_cases() -> None:
    """Numbers just above a power of two carry the largest relative rounding error; all factors chosen so."""
    random = np.random.default_rng(7)
    for _ in range(40):
        price = plain(Decimal(2) ** int(random.integers(0, 12)) + Decimal(int(random.integers(1, 999))).scaleb(-9))
        quantities = [
            plain(Decimal(2) ** int(random.integers(0, 24)) + Decimal(int(random.integers(1, 9_999))).scaleb(-7))
            for _ in range(250)
        ]
        assert_exact([q for q in quantities if in_range(q, Decimal(price))], price)


@pytest.mark.parametrize("price", ["0.000001", "0.000000000001", "999999999999999"])
def test_a_whole_product_is_exact_at_the_ends_of_the_range(price: str) -> None:
    quantities = [q for q in ("1", "0.000000000001", "123456789012345", "576", "0.5") if in_range(q, Decimal(price))]
    assert_exact(quantities, price)


# -- outside the range -----------------------------------------------------------------------------------------


def test_the_largest_value_is_taken_and_beyond_it_the_position_is_carried_at_cost() -> None:
    largest = plain(Decimal(AMOUNT_MAX_MICRO - 1).scaleb(-6))  # 18 digits: no quantity, but a value
    assert largest == "576460752303.423487"
    book = held("131071", "-131071", cost=17)  # 2¹⁷ − 1
    highest = Decimal(4398080)  # × 131071 = 576,460,743,680: just inside
    book.tick("AAPL", highest, 1)
    assert book.nav("p-0") == -book.nav("p-1") == 131071 * 4398080 * 10**6
    book.tick("AAPL", highest + 1, 2)
    assert book.nav("p-0") == book.nav("p-1") == 17
    book.tick("AAPL", highest, 3)
    assert book.nav("p-0") == 131071 * 4398080 * 10**6


@given(st.integers(-(2**12), 2**12), st.integers(1, 5))
def test_at_the_limit_float_and_decimal_decide_alike(distance: int, decimals: int) -> None:
    """quantity × price steps over ±2⁵⁹ micro-units in steps far below the float's own."""
    quantity = Decimal(2) ** 19  # 524288
    price = (Decimal(2**59).scaleb(-6) / quantity).quantize(Decimal(1).scaleb(-decimals))
    price += Decimal(distance).scaleb(-decimals)
    book = held(plain(quantity), cost=17)
    try:
        expected = value_micro(quantity, price)
    except AmountError:
        expected = 17
    book.tick("AAPL", price, 1)
    assert book.nav("p-0") == expected


def test_one_absurd_position_delays_nobody_elses_price() -> None:
    book = held("999999999999999", "10")
    book.tick("AAPL", Decimal("0.0000001"), 1)
    book.tick("AAPL", Decimal(190), 2)
    assert (book.price("AAPL"), book.nav("p-1")) == (Decimal(190), 1_900 * 10**6)
    assert dict(book.revalued()) == {"p-0": book.nav("p-0"), "p-1": 1_900 * 10**6}


def test_a_position_beyond_the_range_at_the_present_price_is_carried_at_cost() -> None:
    book = held("10")
    book.tick("AAPL", Decimal(1000), 1)
    book.set_position("p-0", Holding("AAPL", Decimal(10) ** 12, 5, 0))
    assert book.nav("p-0") == 5
    assert dict(book.revalued()) == {"p-0": 5}
    book.tick("AAPL", Decimal("0.5"), 2)
    assert book.nav("p-0") == 5 * 10**17


def test_a_nav_that_int64_could_not_hold_twice_is_withheld() -> None:
    book = held("1")
    book.set_account("p-0", replace(ACCOUNT, cash=AMOUNT_MAX_MICRO - 1))
    slots = np.array([book.slot("p-0")], np.int64)
    assert not book.out_of_range(slots).any()
    for number in range(8):
        symbol = f"S-{number}"
        book.set_position("p-0", Holding(symbol, Decimal(2**19), 0, 0))
        book.tick(symbol, Decimal(1_000_000), 1)
    assert book.nav("p-0") > 2**61
    for number in range(8):
        book.tick(f"S-{number}", Decimal(1_099_511), 2)
    assert book.nav("p-0") >= NAV_MAX_MICRO
    assert book.out_of_range(slots).all()


# -- the index ---------------------------------------------------------------------------------------------


def test_opening_twice_is_refused() -> None:
    book = held("1")
    with pytest.raises(ValueError, match="in the Book already"):
        book.open("p-0", 0, ACCOUNT)


def test_a_tick_touches_its_holders_and_nobody_else() -> None:
    book = held("1", "2")
    book.open("p-x", 0, ACCOUNT, [Holding("MSFT", Decimal(1), 7, 0)])
    book.clear(book.changed())
    assert book.tick("AAPL", Decimal(3), 1) == 2
    assert book.portfolio_ids(book.changed()) == ["p-0", "p-1"]
    book.clear(book.changed())
    book.tick("AAPL", Decimal(3), 2)
    assert not len(book.changed())


def test_a_book_that_grows_and_shrinks_keeps_everybodys_figures_apart() -> None:
    book = Book()
    for number in range(300):
        account = Account(*range(number, number + 8), number, DayBase(number, 1, number))
        book.open(f"p-{number}", number % 3, account, [Holding("AAPL", Decimal(number + 1), 0, 0)])
    book.tick("AAPL", Decimal(2), 1)
    book.drop_shard(1)
    for number in range(300):
        if number % 3 == 1:
            assert f"p-{number}" not in book
            continue
        mark = shown(book, f"p-{number}")
        value = 2 * (number + 1) * 10**6
        assert (mark.cash, mark.receivables, mark.realized, mark.fees) == tuple(range(number, number + 4))
        assert (mark.income, mark.flows, mark.trading, mark.corporate) == tuple(range(number + 4, number + 8))
        assert (mark.positions_value, mark.nav) == (value, value + 2 * number + 1)
        assert mark.day_pnl == mark.nav - number
        assert mark.ledger_sequence == number


def test_what_is_owed_to_a_portfolio_counts_in_its_nav_and_its_range() -> None:
    book = held("1")
    book.tick("AAPL", Decimal(3), 1)
    book.set_account("p-0", replace(ACCOUNT, receivables=7))
    assert book.nav("p-0") == shown(book, "p-0").nav == 3 * 10**6 + 7
    book.cut(book.slots_of(0), CUT_NS)
    assert shown(book, "p-0").day_pnl == 0
    book.set_account("p-0", replace(ACCOUNT, receivables=NAV_MAX_MICRO))
    assert book.out_of_range(book.slots_of(0)).all()


# -- quality -----------------------------------------------------------------------------------------------


def shown(book: Book, name: str) -> Mark:
    return decode_mark(book.marks(np.array([book.slot(name)], np.int64), 1, 1).tobytes(), 1)


def quality_in(book: Book, name: str) -> MarkQuality:
    return shown(book, name).quality


def test_a_portfolio_without_positions_is_live() -> None:
    book = Book()
    book.open("p-0", 0, ACCOUNT)
    assert quality_in(book, "p-0") is MarkQuality.LIVE


@pytest.mark.parametrize("better", list(MarkQuality)[1:-1])
def test_a_mark_carries_the_worst_quality_of_its_positions(better: MarkQuality) -> None:
    symbols = {MarkQuality.LIVE: "LIVE", better: "BETTER", MarkQuality(better + 1): "WORSE"}
    book = Book()
    book.open("p-0", 0, ACCOUNT, [Holding(symbol, Decimal(1), 1, 0) for symbol in symbols.values()])
    for quality, symbol in symbols.items():
        if quality is not MarkQuality.MISSING:
            book.tick(symbol, Decimal(1), 1)
            book.set_quality(symbol, quality)
    assert quality_in(book, "p-0") == better + 1
    book.set_position("p-0", Holding("WORSE", Decimal(0), 0, 0))
    assert quality_in(book, "p-0") is better
    book.set_position("p-0", Holding("BETTER", Decimal(0), 0, 0))
    assert quality_in(book, "p-0") is MarkQuality.LIVE


def test_a_quote_says_at_once_what_it_is_worth() -> None:
    book = held("1")
    assert quality_in(book, "p-0") is MarkQuality.MISSING
    for condition, quality in (("HALTED", "HALTED"), ("", "LIVE"), ("DELAYED", "DELAYED"), ("", "LIVE")):
        book.clear(book.changed())
        book.tick("AAPL", Decimal(3), 1, condition)
        assert quality_in(book, "p-0") is MarkQuality[quality]
        assert len(book.changed()) == 1
        assert list(book.prices()) == [("AAPL", 1, condition, MarkQuality[quality])]


def test_a_prices_quality_reaches_its_holders_alone_also_those_that_come_later() -> None:
    book = held("1", "2")
    book.open("p-x", 0, ACCOUNT, [Holding("MSFT", Decimal(1), 7, 0)])
    for symbol in ("AAPL", "MSFT"):
        book.tick(symbol, Decimal(3), 1_000)
    book.clear(book.changed())
    book.set_quality("AAPL", MarkQuality.STALE)
    assert book.portfolio_ids(book.changed()) == ["p-0", "p-1"]
    book.clear(book.changed())
    book.set_quality("AAPL", MarkQuality.STALE)
    assert not len(book.changed())
    book.open("p-y", 0, ACCOUNT, [Holding("AAPL", Decimal(1), 7, 0)])
    names = ("p-0", "p-x", "p-y")
    assert [quality_in(book, name).name for name in names] == ["STALE", "LIVE", "STALE"]
    book.tick("AAPL", Decimal(3), 3_000)
    assert [quality_in(book, name).name for name in names] == ["LIVE", "LIVE", "LIVE"]


def test_a_slots_next_portfolio_starts_with_no_ones_qualities() -> None:
    book = held("1")
    book.drop_shard(0)
    book.open("p-next", 0, ACCOUNT)
    assert quality_in(book, "p-next") is MarkQuality.LIVE
    book.tick("AAPL", Decimal(3), 1)
    assert not book.quality_count.any()


def test_shards_come_and_go_and_everything_else_stays_right() -> None:
    """Sixteen shards, 160 portfolios, a symbol held by all and three by some; shards dropped and opened again."""
    kept = Bookkeeping(shards_count=16)
    names = [f"p-{number:04}" for number in range(160)]
    for number, name in enumerate(names):
        own = SYMBOLS[number % len(SYMBOLS)]
        kept.send(
            opening(name),
            cash(name, "DEPOSIT", "1000", f"d-{name}"),
            fill(name, "BUY", str(number + 1), "3.5", f"a-{name}"),
            fill(name, "SELL", "2", "1.25", f"b-{name}", symbol=own),
        )
    random = np.random.default_rng(11)
    for step in range(24):
        kept.tick(SYMBOLS[step % len(SYMBOLS)], str(1 + step / 4))
        gone = {int(shard) for shard in random.integers(0, 16, 3)}
        for shard in gone:
            kept.book.drop_shard(shard)
        kept.tick("AAPL", str(2 + step))
        left = {name for name in names if kept.shard_of(name) not in gone}
        assert len(kept.book) == len(left)
        assert {kept.book.portfolio_ids(kept.book.slots_of(s))[0] in left for s in set(range(16)) - gone} == {True}
        assert all(total == kept.mark(name).positions_value for name, total in kept.book.revalued())
        for shard in gone:
            kept.take_over(shard)
    kept.check()


def test_a_dropped_shards_slots_belong_to_no_shard() -> None:
    """A flush that was under way when the shard went must not write its rows under whoever comes next."""
    book = held("1", "2")
    slots = book.slots_of(0)
    book.drop_shard(0)
    book.touch(slots)
    assert not (book.shard[book.changed()] == 0).any()
    book.open("p-new", 3, ACCOUNT)
    assert book.portfolio_ids(book.slots_of(3)) == ["p-new"]


# -- the day cut -------------------------------------------------------------------------------------------


def test_values_that_are_kept_move_with_their_rows_when_a_shard_is_dropped() -> None:
    book = Book()
    for number in range(6):  # those of shard 1 stand before those that stay, which take their rows
        holding = Holding("AAPL", Decimal(number + 1), cost=0, day_base=0)
        book.open(f"p-{number}", 1 if number < 3 else 0, ACCOUNT, [holding])
    book.tick("AAPL", Decimal("1.2345678"), 1)  # no whole scale: the column keeps its values
    book.drop_shard(1)
    book.check()
    for number in range(3, 6):
        name, quantity = f"p-{number}", Decimal(number + 1)
        assert book.values(name) == [("AAPL", value_micro(quantity, Decimal("1.2345678")))]
    book.tick("AAPL", Decimal("2.2345678"), 2)
    book.check()
    assert all(value == book.nav(name) for name, value in book.revalued())


def test_positions_closed_and_reopened_on_the_same_day_keep_their_day_pnl() -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "1000", "d"), fill("p-1", "BUY", "10", "100", "b1"))
    kept.tick("AAPL", "120")
    kept.cut()
    kept.send(fill("p-1", "SELL", "10", "125", "s1"))
    kept.check()
    assert kept.mark("p-1").day_pnl == 50 * 10**6
    kept.send(fill("p-1", "BUY", "4", "130", "b2"))
    kept.tick("AAPL", "131")
    kept.check()
    assert kept.mark("p-1").day_pnl == 54 * 10**6
    kept.take_over(0)
    kept.check()
    kept.cut()
    assert kept.book.position_day_base("p-1", "AAPL") == 524 * 10**6
    kept.check()


def test_a_cut_forgets_the_positions_closed_before_it() -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), fill("p-1", "BUY", "10", "100", "b1"), fill("p-1", "SELL", "10", "90", "s1"))
    assert kept.book.position_day_base("p-1", "AAPL") == 100 * 10**6
    kept.cut()
    assert kept.book.position_day_base("p-1", "AAPL") == 0
    kept.check()


def test_a_slots_next_portfolio_inherits_nothing_of_the_day() -> None:
    book = held("1")
    book.set_position("p-0", Holding("AAPL", Decimal(0), 0, 77))
    book.drop_shard(0)
    book.open("p-other", 0, ACCOUNT)
    assert book.position_day_base("p-other", "AAPL") == 0


def test_a_cut_of_some_portfolios_leaves_the_others_alone() -> None:
    kept = Bookkeeping(shards_count=2)
    kept.send(opening("a"), opening("b"))
    for name in "ab":
        kept.send(cash(name, "DEPOSIT", "10", f"d-{name}"), cash(name, "INTEREST", "1", f"i-{name}"))
        kept.send(fill(name, "BUY", "1", "10", f"f-{name}"), fill(name, "SELL", "1", "9", f"g-{name}", symbol="XOM"))
        kept.send(fill(name, "BUY", "1", "8", f"h-{name}", symbol="XOM"))
    kept.tick("AAPL", "12")
    kept.book.cut(np.array([kept.book.slot("a")], np.int64), CUT_NS)
    cut, other = kept.mark("a"), kept.mark("b")
    assert (cut.day_pnl, cut.day_cut_at_ns) == (0, CUT_NS)
    assert (other.day_pnl, other.day_cut_at_ns) == (4 * 10**6, 0)
    bases = [[kept.book.position_day_base(name, symbol) for symbol in ("AAPL", "XOM")] for name in "ab"]
    assert bases == [[12 * 10**6, 0], [10 * 10**6, -(10**6)]]


def test_each_group_of_portfolios_has_its_own_cut() -> None:
    book = held("1", "1", "1")
    for name, day_cut in (("p-0", "00:00 UTC"), ("p-1", "close:XNYS"), ("p-2", "00:00 UTC")):
        book.begin_day(name, day_cut, CUT_NS)
    assert book.day_cuts == ["00:00 UTC", "close:XNYS"]
    assert book.portfolio_ids(book.due("00:00 UTC", CUT_NS + 1)) == ["p-0", "p-2"]
    assert not len(book.due("00:00 UTC", CUT_NS)) and not len(book.due("12:00 UTC", CUT_NS + 1))
    book.cut(book.due("00:00 UTC", CUT_NS + 1), CUT_NS + 1)
    assert not len(book.due("00:00 UTC", CUT_NS + 1))
    assert [shown(book, f"p-{n}").day_cut_at_ns - CUT_NS for n in range(3)] == [1, 0, 1]


def test_a_group_ends_with_its_last_portfolio_and_a_dropped_slot_is_in_none() -> None:
    book = held("1")
    book.begin_day("p-0", "00:00 UTC", CUT_NS)
    book.begin_day("p-0", "12:00 UTC", CUT_NS)
    assert book.day_cuts == ["12:00 UTC"]
    book.drop_shard(0)
    assert book.day_cuts == [] and not len(book.due("12:00 UTC", CUT_NS + 1))
    book.open("p-next", 0, ACCOUNT)
    assert book.day_cuts == [] and shown(book, "p-next").day_cut_at_ns == 0


# -- splits ------------------------------------------------------------------------------------------------


def test_a_rescaled_price_moves_nobody_until_the_new_quantity_comes() -> None:
    book = held("10", "7")
    book.tick("AAPL", Decimal(120), 1)
    before = [book.nav(name) for name in ("p-0", "p-1")]
    book.clear(book.changed())
    book.rescale("AAPL", Decimal(30))
    assert (book.price("AAPL"), book.price_as_of_ns("AAPL")) == (Decimal(30), 1)
    assert [book.nav(name) for name in ("p-0", "p-1")] == before and not len(book.changed())
    for name, quantity in (("p-0", 40), ("p-1", 28)):
        book.set_position(name, Holding("AAPL", Decimal(quantity), 0, 0))
    assert [book.nav(name) for name in ("p-0", "p-1")] == before
    assert list(dict(book.revalued()).values()) == before
    book.tick("AAPL", Decimal(31), 2)
    assert [book.nav(name) for name in ("p-0", "p-1")] == [1_240 * 10**6, 868 * 10**6]


def test_who_bought_in_new_shares_before_the_split_was_booked_is_valued_at_the_new_price() -> None:
    """There is no entry that would bring a new quantity, and the next quote may be at that very price."""
    book = held("10", "28")
    book.tick("AAPL", Decimal(120), 1)
    book.rescale("AAPL", Decimal(30))
    book.set_position("p-0", Holding("AAPL", Decimal(40), 0, 0))
    book.clear(book.changed())
    book.revalue("AAPL")
    assert [book.nav(name) for name in ("p-0", "p-1")] == [1_200 * 10**6, 840 * 10**6]
    assert dict(book.revalued()) == {"p-0": 1_200 * 10**6, "p-1": 840 * 10**6}
    assert book.slot("p-1") in book.changed()
    book.revalue("MSFT")


def test_a_split_of_a_symbol_without_a_price_leaves_it_without() -> None:
    book = held("1", cost=7)
    book.rescale("AAPL", Decimal(30))
    book.rescale("MSFT", Decimal(30))
    assert (book.price("AAPL"), book.price("MSFT"), book.nav("p-0")) == (None, None, 7)
    assert (book.price_as_of_ns("AAPL"), book.price_as_of_ns("MSFT")) == (0, 0)


# -- many at once ------------------------------------------------------------------------------------------


def random_accounts(random: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    fields = ("cash", "receivables", "realized", "fees", "income", "flows", "trading", "corporate", "ledger_sequence")
    accounts = {name: random.integers(-(10**9), 10**9, count) for name in (*fields, "day_base", "segment_base")}
    return accounts | {"day_factor": np.where(random.random(count) < 0.3, np.nan, random.random(count))}


def test_many_portfolios_opened_at_once_are_as_if_opened_one_by_one() -> None:
    random = np.random.default_rng(5)
    one_by_one, at_once = Book(), Book()
    for book in (one_by_one, at_once):
        book.tick("S-1", Decimal("3.25"), 1, "HALTED")
        book.open("p-before", 7, ACCOUNT, [Holding("S-0", Decimal(3), 1, 2), Holding("S-1", Decimal(4), 3, 4)])
        book.open("p-gone", 8, ACCOUNT, [Holding("S-1", Decimal(4), 3, 4)])
        book.drop_shard(8)
    names, symbols = [f"p-{number}" for number in range(40)], [f"S-{number}" for number in range(30)]
    accounts = random_accounts(random, 40)
    pairs = [(p, s) for p in range(40) for s in range(30) if random.random() < p / 40]
    random.shuffle(pairs)
    held = [Decimal(int(random.integers(-(10**6), 10**6)) or 1).scaleb(-int(random.integers(0, 13))) for _ in pairs]
    cost, day_base = random.integers(-(10**9), 10**9, (2, len(pairs)))
    holder, asset = np.array(pairs).T
    decimals = np.array([-one.as_tuple().exponent for one in held])
    quantity = np.array([float(one) for one in held])
    slots = at_once.open_many(2, names, accounts, symbols, holder, asset, quantity, decimals, cost, day_base)
    assert at_once.portfolio_ids(slots) == names
    for place, name in enumerate(names):
        one_by_one.open(name, 2, account_at(accounts, place))
    for row, (place, number) in enumerate(pairs):
        one_by_one.set_position(names[place], Holding(symbols[number], held[row], int(cost[row]), int(day_base[row])))
    for step in range(3):
        for book in (one_by_one, at_once):
            book.tick(f"S-{step + 1}", Decimal("17.0625"), step)
        for name in [*names, "p-before"]:
            assert shown(at_once, name) == shown(one_by_one, name)
            assert sorted(at_once.held(name), key=str) == sorted(one_by_one.held(name), key=str)
            assert at_once.exposure(name) == one_by_one.exposure(name)
        assert dict(at_once.revalued()) == dict(one_by_one.revalued())
        at_once.check()
        one_by_one.check()
        assert at_once.portfolio_ids(at_once.changed()) == one_by_one.portfolio_ids(one_by_one.changed())
        for book in (one_by_one, at_once):
            book.clear(book.changed())


def test_of_many_portfolios_none_may_be_open_already() -> None:
    book = held("1")
    accounts, nothing = random_accounts(np.random.default_rng(1), 2), np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="in the Book already"):
        book.open_many(0, ["p-0", "p-new"], accounts, [], nothing, nothing, nothing * 1.0, nothing, nothing, nothing)
    assert "p-new" not in book


def test_many_portfolios_without_a_position_among_them_are_opened_at_once() -> None:
    book = held("1")
    accounts, nothing = random_accounts(np.random.default_rng(1), 2), np.zeros(0, np.int64)
    book.open_many(0, ["p-1", "p-2"], accounts, [], nothing, nothing, nothing * 1.0, nothing, nothing, nothing)
    assert book.held("p-2") == []
    book.check()
