"""One position at one quote."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.instants import SECOND_NS, to_ns
from engine.marks import MarkQuality
from engine.messages import Quote
from engine.positions import (
    HotPosition,
    PositionValuation,
    hot_position_decoder,
    hot_position_encoder,
    quality_shares,
    todays_price,
    value_position,
)
from engine.sessions import sessions_of
from tests.bookkeeping import SECTORS, Bookkeeping, cash, fill, opening
from tests.oracle import MICRO


def quote(price: str, ts_event_ns: int = 0, symbol: str = "AAPL") -> Quote:
    return Quote(symbol, price, ts_event_ns, "test")


def test_a_long_position_and_its_ratios() -> None:
    hot = HotPosition("15", 1_575 * MICRO, 75 * MICRO, 1_700 * MICRO, 5)
    valued = value_position("AAPL", hot, quote("120"), 10_297 * MICRO, SECOND_NS, 2 * SECOND_NS)
    assert (valued.average_cost, valued.value, valued.unrealized) == (105, 1_800 * MICRO, 225 * MICRO)
    assert (valued.realized, valued.day_pnl, valued.quality) == (75 * MICRO, 100 * MICRO, MarkQuality.LIVE)
    assert (valued.unrealized_ratio, valued.weight) == (Decimal("0.1428571429"), Decimal("0.1748081966"))


def test_a_short_position_gains_when_the_price_falls() -> None:
    hot = HotPosition("-5", -550 * MICRO, 0, -550 * MICRO, 5)
    valued = value_position("AAPL", hot, quote("105"), 10_125 * MICRO, 0, 1)
    assert (valued.average_cost, valued.value, valued.unrealized, valued.day_pnl) == (
        110,
        -525 * MICRO,
        25 * MICRO,
        25 * MICRO,
    )
    assert valued.unrealized_ratio == Decimal("0.0454545455")


def test_without_a_price_it_counts_at_cost_and_nothing_has_moved() -> None:
    hot = HotPosition("2", 7 * MICRO, 0, 7 * MICRO, 5)
    valued = value_position("AAPL", hot, None, 0, 0, 1)
    assert (valued.value, valued.unrealized, valued.day_pnl, valued.price) == (7 * MICRO, 0, 0, None)
    assert (valued.quality, valued.weight) == (MarkQuality.MISSING, None)


@pytest.mark.parametrize(("now_ns", "quality"), [(2_000, MarkQuality.LIVE), (2_001, MarkQuality.STALE)])
def test_a_price_is_stale_after_and_not_at_its_time(now_ns: int, quality: MarkQuality) -> None:
    hot = HotPosition("2", 7, 0, 7, 5)
    assert value_position("AAPL", hot, quote("1", 1_000), 1, now_ns, 1_000).quality is quality


def test_a_dust_position_without_cost_has_no_ratio() -> None:
    hot = HotPosition("0.000000000001", 0, 0, 0, 5)
    valued = value_position("DUST", hot, quote("0.5"), 1, 0, 1)
    assert (valued.value, valued.unrealized_ratio, valued.average_cost) == (0, None, 0)


def test_the_hot_position_comes_back_as_it_was_packed() -> None:
    hot = HotPosition("-0.000000000001", -(2**59), 2**59, -5, 2**62, 7, 3, ((5, "3:2"),))
    assert hot_position_decoder.decode(hot_position_encoder.encode(hot)) == hot


# -- splits, sessions and conditions -----------------------------------------------------------------------------

SPLITS = ((1_000_000, "4"), (2_000_000, "1:8"))


@pytest.mark.parametrize(
    ("ts_event_ns", "expected"),
    [(999_999, "200"), (1_000_000, "800"), (1_999_999, "800"), (2_000_000, "100"), (9_000_000, "100")],
)
def test_a_quote_of_before_a_split_is_a_price_of_other_shares(ts_event_ns: int, expected: str) -> None:
    """From its instant on a quote is in the new shares."""
    assert todays_price(quote("100", ts_event_ns), SPLITS) == Decimal(expected)


def test_a_position_after_a_split_is_worth_what_it_was() -> None:
    before = HotPosition("10", 1_000 * MICRO, 0, 1_200 * MICRO, 5)
    after = HotPosition("20", 1_000 * MICRO, 0, 1_200 * MICRO, 5, splits=((1_000_000, "2"),))
    old, new = quote("122", 999_999), quote("61", 1_000_000)
    valued = [value_position("A", *one, 10**9, 0, 1) for one in ((before, old), (after, old), (after, new))]
    assert [one.value for one in valued] == [1_220 * MICRO] * 3
    assert [one.day_pnl for one in valued] == [20 * MICRO] * 3
    assert [one.price for one in valued] == [122, 61, 61]
    assert valued[1].price_as_of_ns == 999_999 and valued[1].average_cost == 50


@pytest.mark.parametrize(("price", "scale"), [("0.000000000001", "1000000"), ("900000000000000", "1:1000000")])
def test_a_price_that_a_split_leaves_nothing_of_is_none(price: str, scale: str) -> None:
    hot = HotPosition("3", 7 * MICRO, 0, 7 * MICRO, 5, splits=((1_000_000, scale),))
    valued = value_position("A", hot, quote(price, 999_999), 1, 0, 1)
    assert (valued.price, valued.price_as_of_ns, valued.quality) == (None, None, MarkQuality.MISSING)
    assert (valued.value, valued.unrealized) == (7 * MICRO, 0)


def test_quality_knows_the_class_s_hours_and_the_quote_s_condition() -> None:
    hot, now_ns = HotPosition("3", 7, 0, 7, 5), to_ns(datetime(2026, 11, 28, 12, tzinfo=UTC))
    friday = quote("1", now_ns - 20 * 3_600 * SECOND_NS)
    halted = Quote("AAPL", "1", friday.ts_event_ns, "test", None, "HALTED")
    found = [
        value_position("AAPL", hot, one, 1, now_ns, 900 * SECOND_NS, sessions).quality
        for one, sessions in ((friday, sessions_of("XNYS")), (friday, None), (halted, sessions_of("XNYS")))
    ]
    assert found == [MarkQuality.CLOSED, MarkQuality.STALE, MarkQuality.HALTED]


def valued_at(quality: MarkQuality, value: int) -> PositionValuation:
    """Worth `value` because of its price alone."""
    hot = HotPosition("1", 0, 0, 0, 5)
    valued = value_position("A", hot, None, 0, 0, 1)
    return msgspec.structs.replace(valued, quality=quality, value=value)


def test_shares_are_of_the_value_without_its_sign() -> None:
    held = [
        valued_at(MarkQuality.STALE, -250 * MICRO),
        valued_at(MarkQuality.LIVE, 500 * MICRO),
        valued_at(MarkQuality.STALE, 250 * MICRO),
    ]
    assert [(share.quality, share.value, share.share) for share in quality_shares(held)] == [
        (MarkQuality.LIVE, 500 * MICRO, Decimal("0.5")),
        (MarkQuality.STALE, 500 * MICRO, Decimal("0.5")),
    ]


def test_positions_worth_nothing_have_no_shares() -> None:
    assert quality_shares([]) == []
    assert quality_shares([valued_at(MarkQuality.LIVE, 0)]) == []


@given(st.lists(st.tuples(st.sampled_from(MarkQuality), st.integers(-(2**59), 2**59)), min_size=1))
def test_shares_sum_to_one(held: list[tuple[MarkQuality, int]]) -> None:
    shares = quality_shares(valued_at(*one) for one in held)
    assert not shares or abs(sum(one.share for one in shares) - 1) < Decimal("1e-20")
    assert sum(one.value for one in shares) == sum(abs(value) for _, value in held)
    assert [one.quality for one in shares] == sorted({one.quality for one in shares})


def test_positions_valued_from_hot_state_are_those_of_the_book_and_of_the_oracle() -> None:
    """The API values positions with `value_position`, the evaluator with the Book: one figure, not two."""
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "5000", "d"))
    for number, symbol in enumerate(SECTORS):
        kept.send(fill("p-1", "SELL" if number % 2 else "BUY", f"{number + 1}.123456789", "3.3", f"b{number}", symbol))
    kept.cut()
    prices = {symbol: f"{number + 2}.0000077" for number, symbol in enumerate(SECTORS) if symbol != "DUST"}
    for symbol, price in prices.items():
        kept.tick(symbol, price)
        kept.send(fill("p-1", "BUY", "0.5", "3.1", f"c-{symbol}", symbol))
        (change,) = kept.changes
        hot, at = change.positions[symbol], kept.oracle.portfolios["p-1"]
        valued = value_position(symbol, hot, quote(price, symbol=symbol), kept.book.nav("p-1"), 0, 1)
        figures = at.figures(kept.oracle.prices)
        assert (valued.value, valued.day_pnl) == (figures.values[symbol], figures.position_day_pnl[symbol])
        assert Fraction(valued.quantity) == at.positions[symbol].quantity
    kept.check()
