"""Lots against what they are by definition: shares that are bought one by one and leave in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.amounts import AmountError, average
from engine.corporate_actions import Step
from engine.entries import draft_split
from engine.ledger import LedgerEntry, LedgerKind, Side
from engine.lots import Lot, LotsMismatchError, change_of, entries_shown, open_lots
from engine.portfolio import Position
from tests.scripted_ledger import HOUR, ScriptedLedger

MICRO = 1_000_000


def lots_of(script: ScriptedLedger, symbol: str = "A") -> list[Lot]:
    held = script.portfolio.positions[symbol]
    return open_lots(cycle_of(script, symbol, held), held.quantity)


def cycle_of(script: ScriptedLedger, symbol: str, held: Position) -> list[LedgerEntry]:
    return [entry for entry in script.entries if entry.symbol == symbol and entry.sequence >= held.opened_sequence]


def plain(lots: Sequence[Lot]) -> list[tuple[int, Decimal, Decimal, Decimal]]:
    return [(lot.ledger_sequence, lot.quantity, lot.remaining, lot.unit_cost) for lot in lots]


def lot(sequence: int, quantity: str, remaining: str, unit_cost: str) -> tuple[int, Decimal, Decimal, Decimal]:
    return sequence, Decimal(quantity), Decimal(remaining), Decimal(unit_cost)


def split(script: ScriptedLedger, scale: Fraction) -> None:
    script.at += HOUR
    script.split("A", scale)


def trade(script: ScriptedLedger, *fills: str) -> ScriptedLedger:
    """Fills like "+10@100"."""
    for text in fills:
        quantity, _, price = text[1:].partition("@")
        script.at += HOUR
        script.fill("A", "BUY" if text[0] == "+" else "SELL", quantity, price)
    return script


# -- hand-checked ---------------------------------------------------------------------------------------------


def test_first_in_first_out() -> None:
    script = trade(ScriptedLedger(), "+10@100", "+10@110", "-15@120", "+1@90")
    second, last = lots_of(script)
    assert plain([second, last]) == [lot(3, "10", "5", "110"), lot(5, "1", "1", "90")]
    assert (second.cost, second.opened_at) == (550 * MICRO, script.entries[2].effective_at)
    # By average cost the same shares cost 105.
    assert script.portfolio.positions["A"].cost == (5 * 105 + 90) * MICRO


def test_a_short_position_has_lots_below_zero() -> None:
    script = trade(ScriptedLedger(), "-10@100", "-4@90", "+12@80")
    (left,) = lots_of(script)
    assert plain([left]) == [lot(3, "-4", "-2", "90")]
    assert left.cost == -180 * MICRO


def test_a_fill_that_crossed_zero_is_a_lot_as_far_as_it_opened() -> None:
    script = trade(ScriptedLedger(), "+10@100", "-15@110", "-1@120")
    assert plain(lots_of(script)) == [lot(3, "-5", "-5", "110"), lot(4, "-1", "-1", "120")]


def test_the_notional_of_a_crossing_fill_is_divided_as_the_portfolio_does() -> None:
    script = trade(ScriptedLedger(), "+0.000001@0.5", "-3.000001@0.333333")
    assert sum(one.cost for one in lots_of(script)) == script.portfolio.positions["A"].cost


def test_a_new_cycle_knows_nothing_of_the_one_before() -> None:
    script = trade(ScriptedLedger(), "+10@100", "-10@110", "+2@95")
    assert plain(lots_of(script)) == [lot(4, "2", "2", "95")]


def test_a_split_scales_what_was_bought_before_it() -> None:
    script = trade(ScriptedLedger(), "+10@100", "-4@100")
    split(script, Fraction(2))
    trade(script, "+3@60")
    assert plain(lots_of(script)) == [lot(2, "20", "12", "50"), lot(5, "3", "3", "60")]


@pytest.mark.parametrize("scale", [Fraction(1, 3), Fraction(3), Fraction(7, 11)])
def test_lots_that_do_not_come_out_even_sum_to_the_position(scale: Fraction) -> None:
    script = trade(ScriptedLedger(), "+10@100", "+0.000000000001@100", "+7.1@100")
    split(script, scale)
    lots = lots_of(script)
    assert sum(one.remaining for one in lots) == script.portfolio.positions["A"].quantity
    assert abs(Fraction(lots[0].quantity) - 10 * scale) < Fraction(1, 10**12)
    assert sum(one.cost for one in lots) == script.portfolio.positions["A"].cost


def test_a_fill_from_before_a_split_that_was_booked_first_is_in_new_shares() -> None:
    script = trade(ScriptedLedger(), "+10@100")
    split(script, Fraction(4))
    script.fill("A", "SELL", "3", "100", scale=Fraction(4))
    assert plain(lots_of(script)) == [lot(2, "40", "28", "25")]


def test_a_late_split_leaves_the_fills_since_its_instant_alone() -> None:
    """100 old shares; the split 2:1 takes effect, and that moment 50 new ones are sold; only later does it arrive."""
    script = trade(ScriptedLedger(), "+100@10")
    effective_at = script.at + HOUR
    trade(script, "-50@6", "+5@6")
    step = Step("late", LedgerKind.SPLIT, "A", effective_at, 1, scale=Fraction(2))
    # The 100 shares that were held at its instant become 200, whatever was done with new ones since.
    script._book(draft_split(step, script.portfolio_id, Decimal(100), script.at, True, b"s"))
    assert script.portfolio.positions["A"].quantity == 155
    assert plain(lots_of(script)) == [lot(2, "200", "150", "5"), lot(4, "5", "5", "6")]


def test_a_reversed_purchase_takes_its_own_lot_and_gives_back_what_sales_took_of_others() -> None:
    script = trade(ScriptedLedger(), "+10@100", "+10@110", "-5@120")
    script.reverse(script.entries[1])
    assert plain(lots_of(script)) == [lot(3, "10", "5", "110")]


def test_a_reversed_sale_gives_its_lots_back() -> None:
    script = trade(ScriptedLedger(), "+10@100", "+10@110", "-15@120")
    script.reverse(script.entries[3])
    assert plain(lots_of(script)) == [lot(2, "10", "10", "100"), lot(3, "10", "10", "110")]


def test_a_reversed_crossing_gives_back_the_position_that_it_closed() -> None:
    script = trade(ScriptedLedger(), "+4@90", "+6@100", "-15@110")
    script.reverse(script.entries[3])
    (back,) = lots_of(script)
    assert plain([back]) == [lot(5, "10", "10", "96")]
    assert back.cost == script.portfolio.positions["A"].cost == 960 * MICRO


def test_reversed_across_a_split() -> None:
    script = trade(ScriptedLedger(), "+10@100", "+10@110")
    split(script, Fraction(2))
    script.reverse(script.entries[1])
    assert plain(lots_of(script)) == [lot(3, "20", "20", "55")]


def test_what_rounding_leaves_of_a_reversed_purchase_is_a_lot_that_cost_nothing() -> None:
    script = trade(ScriptedLedger(), "+0.000001@100")
    split(script, Fraction(11, 3))
    split(script, Fraction(2))
    script.reverse(script.entries[1])
    assert plain(lots_of(script)) == [lot(5, "0.000000000001", "0.000000000001", "0")]


def test_entries_that_do_not_lead_there_are_refused() -> None:
    script = trade(ScriptedLedger(), "+10@100", "+10@110")
    entries = cycle_of(script, "A", script.portfolio.positions["A"])
    for quantity in ("25", "5", "-20", "0"):
        with pytest.raises(LotsMismatchError):
            open_lots(entries, Decimal(quantity))
    with pytest.raises(LotsMismatchError):
        open_lots([], Decimal(1))


# -- what is shown --------------------------------------------------------------------------------------------


def test_entries_shown_are_those_that_a_lagging_position_includes() -> None:
    script = trade(ScriptedLedger(), "+10@100", "+5@100", "-2@100", "+2@100")
    entries = cycle_of(script, "A", script.portfolio.positions["A"])

    def last(quantity: str, sequence: int, head: str | None = "15") -> int | None:
        found = entries_shown(entries, Decimal(quantity), sequence, None if head is None else Decimal(head))
        return found[-1].sequence if found else None

    assert last("15", 5) == 5
    # 15 was the quantity twice: the mark says when it is meant.
    assert last("15", 4) == last("15", 3) == 3
    assert last("13", 4) == 4
    # A position may be written a moment before the mark that includes it, or after.
    assert last("13", 3) == 4
    assert last("10", 4) == 2
    assert last("99", 5) is None
    assert last("13", 4, None) == 4
    assert last("10", 1, None) is None


# -- properties -----------------------------------------------------------------------------------------------


class Shares:
    """Single shares in a row, each with the sequence of its purchase: FIFO without any arithmetic."""

    def __init__(self) -> None:
        self.row: list[int] = []
        self.side = 0

    def trade(self, sequence: int, shares: int) -> None:
        for _ in range(abs(shares)):
            if self.row and self.side != (shares > 0) - (shares < 0):
                self.row.pop(0)
            else:
                self.side = (shares > 0) - (shares < 0)
                self.row.append(sequence)

    def split(self, factor: int) -> None:
        self.row = [sequence for sequence in self.row for _ in range(factor)]

    @property
    def lots(self) -> list[tuple[int, int]]:
        return [(sequence, self.side * len(list(shares))) for sequence, shares in groupby(self.row)]


@given(st.lists(st.one_of(st.integers(-9, 9).filter(bool), st.sampled_from(["x2", "x3"])), max_size=30))
def test_lots_are_the_shares_that_are_left(steps: list[int | str]) -> None:
    script, shares = ScriptedLedger(), Shares()
    for step in steps:
        script.at += HOUR
        if isinstance(step, str):
            script.split("A", Fraction(int(step[1:])))
            shares.split(int(step[1:]))
        else:
            entry = script.fill("A", "BUY" if step > 0 else "SELL", str(abs(step)), "10")
            shares.trade(entry.sequence, step)
    if "A" not in script.portfolio.positions:
        assert shares.lots == []
    else:
        assert [(one.ledger_sequence, int(one.remaining)) for one in lots_of(script)] == shares.lots


QUANTITIES = st.decimals("0.000001", "1000000", places=6).map(lambda number: f"{number:f}")
STEPS = st.one_of(
    st.tuples(st.sampled_from(["BUY", "SELL"]), QUANTITIES, st.sampled_from(["0.01", "3", "99.999999"])),
    st.tuples(st.just("SPLIT"), st.sampled_from([Fraction(2), Fraction(3, 2), Fraction(1, 7), Fraction(11, 3)])),
    st.tuples(st.just("REVERSE"), st.integers(0, 40)),
)


@given(st.lists(STEPS, max_size=25))
def test_whatever_happens_lots_sum_to_the_position(steps: list[tuple[str, ...]]) -> None:
    script, reversed_any = ScriptedLedger(), False
    for kind, *rest in steps:
        script.at += HOUR
        try:
            if kind == "SPLIT":
                script.split("A", Fraction(rest[0]))
            elif kind == "REVERSE":
                reversed_any |= script.reverse(script.entries[int(rest[0]) % len(script.entries)]) is not None
            else:
                script.fill("A", kind, *rest)
        except AmountError:
            continue
        held = script.portfolio.positions.get("A")
        if held is not None:
            check(lots_of(script), held, script.entries, reversed_any)


def check(lots: list[Lot], held: Position, entries: list[LedgerEntry], reversed_any: bool) -> None:
    assert sum(one.remaining for one in lots) == held.quantity
    assert all((one.remaining > 0) == (held.quantity > 0) for one in lots)
    assert all(0 < one.remaining / one.quantity <= 1 for one in lots)
    assert all(one.unit_cost == average(one.cost, one.remaining) for one in lots)
    assert [one.ledger_sequence for one in lots] == sorted({one.ledger_sequence for one in lots}) or reversed_any
    bought_only = all(entry.side is not Side.SELL for entry in entries if entry.sequence >= held.opened_sequence)
    if bought_only and held.quantity > 0 and not reversed_any:
        assert sum(one.cost for one in lots) == held.cost


def test_the_change_of_what_moves_no_position_is_nothing() -> None:
    script = ScriptedLedger()
    assert change_of(script.cash("DEPOSIT", "5")) == 0
