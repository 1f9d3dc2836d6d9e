"""One position at one quote."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

from engine.marks import MarkQuality
from engine.messages import Quote
from engine.positions import HotPosition, hot_position_decoder, hot_position_encoder, value_position
from tests.bookkeeping import SECTORS, Bookkeeping, cash, fill, opening
from tests.oracle import MICRO

SECOND_NS = 10**9


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
    hot = HotPosition("-0.000000000001", -(2**59), 2**59, -5, 2**62)
    assert hot_position_decoder.decode(hot_position_encoder.encode(hot)) == hot


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
