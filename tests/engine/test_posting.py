"""What a committed batch does to the Book and tells hot state."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

from engine.corporate_actions import Split
from engine.instants import to_ns
from engine.portfolio import Position
from engine.positions import HotPosition
from engine.posting import hot_position
from engine.sectors import SectorValue
from tests.bookkeeping import AT, Bookkeeping, cash, fill, opening
from tests.oracle import MICRO


def test_golden_vector_6_the_spread_is_paid_at_the_fill_and_the_tick_moves_all() -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "10000", "d"), fill("p-1", "BUY", "10", "100", "b1"))
    kept.tick("AAPL", "100")
    before = kept.mark("p-1").nav
    kept.send(fill("p-1", "BUY", "5", "101", "b2"))
    filled = kept.mark("p-1").nav
    kept.tick("AAPL", "102")
    assert (filled - before, kept.mark("p-1").nav - filled) == (-5 * MICRO, 30 * MICRO)
    kept.check()


def test_one_change_per_portfolio_names_what_moved_and_what_closed() -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), fill("p-1", "BUY", "1", "10", "a"), fill("p-1", "BUY", "1", "20", "b", symbol="XOM"))
    (change,) = kept.changes
    assert (change.replace, change.closed, set(change.positions)) == (False, [], {"AAPL", "XOM"})
    kept.send(
        fill("p-1", "SELL", "1", "12", "c"),
        fill("p-1", "BUY", "2", "30", "d", symbol="BTC"),
        fill("p-1", "SELL", "3", "30", "e", symbol="BTC", fee="1"),
    )
    (change,) = kept.changes
    assert change.closed == ["AAPL"]
    assert change.positions == {"BTC": HotPosition("-1", -30 * MICRO, 0, -30 * MICRO, to_ns(AT), 0, 6)}
    assert change.sectors == {
        "Crypto": SectorValue(-30 * MICRO, 30 * MICRO),
        "Energy": SectorValue(20 * MICRO, 20 * MICRO),
    }


def test_a_batch_without_effect_changes_nothing() -> None:
    kept = Bookkeeping()
    deposit = cash("p-1", "DEPOSIT", "1", "d")
    kept.send(opening("p-1"), deposit)
    kept.book.clear(kept.book.changed())
    kept.send(deposit, cash("nobody", "DEPOSIT", "1", "x"))
    assert (kept.changes, len(kept.book.changed())) == ([], 0)


def test_instants_are_kept_to_the_microsecond() -> None:
    instant = datetime(2026, 11, 20, 15, 0, 0, 999_999, tzinfo=UTC)
    held = Position(Decimal(1), 2, 3, 5, instant, 6, instant)
    split = Split(instant, Fraction(3, 2))
    assert hot_position(held, 4, (split,)) == HotPosition(
        "1", 2, 3, 4, to_ns(instant), 5, 6, ((to_ns(instant), "3:2"),)
    )
