"""Day P&L and its flow-adjusted ratio."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pnl import DayBase, day_base_since
from tests.bookkeeping import Bookkeeping, cash, fill, opening
from tests.oracle import MICRO

navs = st.integers(1, 10**15)


def test_golden_vector_3_a_deposit_is_no_gain() -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "10000", "d1"), fill("p-1", "BUY", "100", "100", "b"))
    kept.tick("AAPL", "100")
    kept.cut()
    kept.tick("AAPL", "101")
    assert kept.mark("p-1").nav == 10_100 * MICRO
    kept.send(cash("p-1", "DEPOSIT", "5000", "d2"))
    kept.tick("AAPL", "102")
    mark = kept.mark("p-1")
    assert (mark.nav, mark.day_pnl) == (15_200 * MICRO, 200 * MICRO)
    assert mark.day_pnl_ratio_e12 is not None
    assert round(mark.day_pnl_ratio_e12 / 100) == 166887417
    kept.check()


def test_golden_vector_10_a_reward_moves_nav_and_no_return() -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "10000", "d1"))
    kept.cut()
    before = kept.mark("p-1")
    kept.send(cash("p-1", "REWARD", "500", "r"))
    after = kept.mark("p-1")
    assert (after.nav - before.nav, after.day_pnl, after.day_pnl_ratio_e12) == (500 * MICRO, 0, 0)
    kept.check()


@pytest.mark.parametrize(("kind", "day_pnl"), [("INTEREST", 7), ("DIVIDEND", 7), ("FEE", -7), ("WITHDRAWAL", 0)])
def test_income_and_fees_are_p_and_l_and_a_withdrawal_is_not(kind: str, day_pnl: int) -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "100", "d1"))
    kept.cut()
    kept.send(cash("p-1", kind, "7", "c"))
    mark = kept.mark("p-1")
    assert (mark.day_pnl, mark.day_pnl_ratio_e12) == (day_pnl * MICRO, day_pnl * 10**10)
    kept.check()


def test_a_portfolio_opened_today_begins_with_its_first_deposit() -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"))
    assert (kept.mark("p-1").day_pnl, kept.mark("p-1").day_pnl_ratio_e12) == (0, 0)
    kept.send(cash("p-1", "DEPOSIT", "100", "d"), cash("p-1", "INTEREST", "5", "i"))
    assert (kept.mark("p-1").day_pnl, kept.mark("p-1").day_pnl_ratio_e12) == (5 * MICRO, 5 * 10**10)


def test_a_sub_period_that_starts_below_zero_has_no_return_until_the_next_cut() -> None:
    kept = Bookkeeping()
    kept.send(opening("p-1"), cash("p-1", "FEE", "5", "f"))
    kept.cut()
    assert kept.mark("p-1").day_pnl_ratio_e12 is None
    kept.send(cash("p-1", "DEPOSIT", "100", "d"))
    assert kept.mark("p-1").day_pnl_ratio_e12 is None
    kept.take_over(0)
    assert kept.mark("p-1").day_pnl_ratio_e12 is None
    kept.cut()
    assert kept.mark("p-1").day_pnl_ratio_e12 == 0


@given(navs, st.lists(st.tuples(navs, st.integers(-(10**14), 10**15)), max_size=6))
def test_the_factor_is_the_product_of_the_closed_sub_periods(cut_nav: int, flows: list[tuple[int, int]]) -> None:
    base = day_base_since(cut_nav, flows)
    assert base.base == cut_nav + sum(amount for _, amount in flows)
    product, start = Fraction(1), cut_nav
    for nav, amount in flows:
        if start < 0:
            assert base.factor is None
            return
        product *= Fraction(nav, start) if start else 1
        start = nav + amount
    assert base.segment_base == start
    assert base.factor == pytest.approx(float(product), rel=1e-14)


@given(navs, navs, st.integers(1, 10**12))
def test_a_flow_changes_no_return(cut_nav: int, nav: int, amount: int) -> None:
    before = DayBase(cut_nav, 1, cut_nav)
    after = before.after_flow(nav, amount)
    assert after.factor is not None
    assert after.factor * (nav + amount) / after.segment_base == pytest.approx(nav / cut_nav, rel=1e-15)
