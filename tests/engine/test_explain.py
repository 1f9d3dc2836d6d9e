"""Explain: the parts sum, spans add up, and hand-made stories have the parts that anybody would name."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.as_of import NOTHING, effects_of
from engine.explain import Explanation, Parts, Row, Worth, between, explain, grouped, largest, settle, sum_parts
from engine.ledger import LedgerKind
from engine.marks import Mark, decode_mark
from tests.builders import MICRO, MarkRow
from tests.scripted_ledger import Moment, ScriptedLedger

SYMBOLS = ("AAPL", "TSLA", "BTC-USD")


def over(script: ScriptedLedger, begin: Moment, end: Moment) -> Explanation:
    span = script.entries[begin.ledger_sequence : end.ledger_sequence]
    return explain(begin.worth, end.worth, effects_of(span))


def row_of(explanation: Explanation, symbol: str | None) -> Row:
    return next(row for row in explanation.rows if row.symbol == symbol)


def parts(**whole_units: float) -> Parts:
    return Parts(**{name: round(amount * MICRO) for name, amount in whole_units.items()})


# -- stories -------------------------------------------------------------------------------------------------------


def funded(cash: str = "10000") -> ScriptedLedger:
    script = ScriptedLedger()
    script.cash("DEPOSIT", cash)
    return script


def test_a_fill_is_trading_and_a_tick_is_price() -> None:
    """Golden vector 6: position 10 marked 100; fill +5@101; tick 102."""
    script = funded()
    script.quote("AAPL", "100")
    script.fill("AAPL", "BUY", "10", "100")
    begin = script.moment()
    script.fill("AAPL", "BUY", "5", "101")
    filled = script.moment()
    script.quote("AAPL", "102")
    end = script.moment()
    assert over(script, begin, filled).total == parts(trading=-5)
    assert over(script, filled, end).total == parts(price=30)
    assert over(script, begin, end).total == parts(trading=-5, price=30)


def test_a_split_explains_nothing() -> None:
    """Golden vector 4: 10@100, price at the cut 120; split 2:1; mark 61: 20 by price, nothing by the split."""
    script = funded()
    script.quote("AAPL", "100")
    script.fill("AAPL", "BUY", "10", "100")
    script.quote("AAPL", "120")
    begin = script.wait()
    script.split("AAPL", Fraction(2))
    assert script.nav() == begin.nav
    assert over(script, begin, script.moment()).total == Parts()
    script.quote("AAPL", "61")
    explanation = over(script, begin, script.wait())
    assert explanation.total == parts(price=20)
    assert row_of(explanation, "AAPL") == Row("AAPL", 1_200 * MICRO, 1_220 * MICRO, parts(price=20))


def test_a_dividend_is_income_that_the_price_gives() -> None:
    """Golden vector 5: 10 shares, mark 100; dividend 1, ex-date, mark 99, not paid yet."""
    script = funded()
    script.quote("AAPL", "100")
    script.fill("AAPL", "BUY", "10", "100")
    begin = script.wait()
    script.accrue("AAPL", "1")
    script.quote("AAPL", "99")
    owed = script.wait()
    explanation = over(script, begin, owed)
    assert (explanation.nav_to - explanation.nav_from, explanation.total) == (0, parts(income=10, price=-10))
    assert row_of(explanation, "AAPL").parts == parts(income=10, price=-10)
    script.pay()
    assert over(script, owed, script.wait()).total == Parts()


def test_cash_has_a_row_of_its_own() -> None:
    script = funded("1000")
    begin = script.moment()
    script.cash("DEPOSIT", "500")
    script.cash("WITHDRAWAL", "20")
    script.cash("REWARD", "5")
    script.cash("FEE", "3")
    script.cash("INTEREST", "2")
    script.cash("DIVIDEND", "1")
    explanation = over(script, begin, script.wait())
    (row,) = explanation.rows
    assert (row.symbol, row.value_from, row.value_to) == (None, 1_000 * MICRO, 1_485 * MICRO)
    assert row.parts == explanation.total == parts(flows=485, fees=-3, income=3)
    assert explanation.total.pnl == 0


def test_a_fee_belongs_to_what_was_traded() -> None:
    script = funded()
    begin = script.moment()
    script.quote("AAPL", "100")
    script.fill("AAPL", "SELL", "3", "100", fee="1.5")
    explanation = over(script, begin, script.moment())
    assert row_of(explanation, "AAPL").parts == explanation.total == parts(fees=-1.5)


def test_a_reversal_takes_the_parts_back() -> None:
    script = funded()
    script.quote("AAPL", "100")
    begin = script.moment()
    entry = script.fill("AAPL", "BUY", "5", "103", fee="2")
    assert over(script, begin, script.moment()).total == parts(trading=-15, fees=-2)
    script.reverse(entry)
    assert over(script, begin, script.moment()).total == Parts()


def test_a_late_split_is_corporate() -> None:
    """Quotes were in new shares for an hour while the ledger had old ones: what the split gives back is its own."""
    script = funded()
    script.quote("AAPL", "100")
    script.fill("AAPL", "BUY", "10", "100")
    begin = script.wait()
    script.wait()
    script.quote("AAPL", "25")
    fallen = script.wait(timedelta(minutes=10))
    script.split("AAPL", Fraction(4), late_by=timedelta(minutes=30))
    end = script.moment()
    assert over(script, begin, fallen).total == parts(price=-750)
    assert over(script, fallen, end).total == parts(corporate=750)
    assert over(script, begin, end).total == parts(price=-750, corporate=750)


def test_what_was_never_priced_moves_nothing() -> None:
    script = funded()
    begin = script.moment()
    script.fill("NEVER1", "BUY", "2", "40")
    assert over(script, begin, script.wait()).total == Parts()
    # Its first price makes the cost a value: that is price.
    script.quote("NEVER1", "41")
    assert over(script, begin, script.wait()).total == parts(price=2)


# -- properties ----------------------------------------------------------------------------------------------------

_scales = st.sampled_from([Fraction(2), Fraction(3, 2), Fraction(1, 8), Fraction(7), Fraction(20, 3)])
_prices = st.decimals(min_value=1, max_value=400, places=3).map(str)
_quantities = st.decimals(min_value="0.001", max_value=60, places=3).map(str)
_symbols = st.sampled_from(SYMBOLS)
_amounts = st.decimals(min_value="0.000001", max_value=900, places=6).map(str)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("quote"), _symbols, _prices),
        st.tuples(st.just("fill"), _symbols, st.sampled_from(["BUY", "SELL"]), _quantities, _prices, _amounts),
        st.tuples(
            st.just("cash"),
            st.sampled_from(["DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND"]),
            _amounts,
        ),
        st.tuples(st.just("split"), _symbols, _scales, st.sampled_from([timedelta(), timedelta(minutes=90)])),
        st.tuples(st.just("accrue"), _symbols, st.decimals("0.01", 3, places=3).map(str)),
        st.tuples(st.just("pay")),
        st.tuples(st.just("reverse"), st.integers(0, 10**6)),
        st.tuples(st.just("wait")),
    ),
    max_size=40,
)


def play(script: ScriptedLedger, step: tuple[object, ...]) -> None:
    name, *arguments = step
    if name == "reverse":
        script.reverse(script.entries[int(str(arguments[0])) % len(script.entries)])
    else:
        getattr(script, str(name))(*arguments)


def lived(steps: list[tuple[object, ...]]) -> tuple[ScriptedLedger, list[Moment]]:
    script = ScriptedLedger()
    moments = [script.moment()]
    for step in steps:
        play(script, step)
        moments.append(script.moment())
    return script, moments


@given(_steps, st.data())
def test_parts_sum_and_spans_add_up(steps: list[tuple[object, ...]], data: st.DataObject) -> None:
    script, moments = lived(steps)
    first, middle, last = sorted(data.draw(st.tuples(*[st.integers(0, len(moments) - 1)] * 3)))
    a, b, c = moments[first], moments[middle], moments[last]
    whole, one, other = over(script, a, c), over(script, a, b), over(script, b, c)
    for explanation, begin, end in ((whole, a, c), (one, a, b), (other, b, c)):
        assert (explanation.nav_from, explanation.nav_to) == (begin.nav, end.nav)
        assert explanation.total.nav_change == end.nav - begin.nav
        assert sum_parts(row.parts for row in explanation.rows) == explanation.total
        assert sum(row.value_from for row in explanation.rows) == begin.nav
        assert sum(row.value_to for row in explanation.rows) == end.nav
        assert row_of(explanation, None).parts.price == row_of(explanation, None).parts.trading == 0
    assert one.total + other.total == whole.total
    for row in whole.rows:
        halves = [half.parts for part in (one, other) for half in part.rows if half.symbol == row.symbol]
        assert sum_parts(halves) == row.parts


@given(_steps, st.data())
def test_two_marks_tell_the_same_parts_as_the_entries_between(
    steps: list[tuple[object, ...]], data: st.DataObject
) -> None:
    script, moments = lived(steps)
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(moments) - 1)] * 2)))
    begin, end = moments[first], moments[last]
    assert between(mark_of(begin), mark_of(end)) == over(script, begin, end).total


@given(_steps)
def test_nothing_but_quotes_is_all_price(steps: list[tuple[object, ...]]) -> None:
    script, _ = lived(steps)
    begin = script.wait()
    for symbol in SYMBOLS:
        script.quote(symbol, "17.125")
    end = script.moment()
    assert over(script, begin, end).total == Parts(price=end.nav - begin.nav)


def mark_of(moment: Moment) -> Mark:
    mark = decode_mark(MarkRow().pack(), 1)
    names = ("cash", "receivables", "realized", "fees", "income", "flows", "trading", "corporate")
    return replace(mark, nav=moment.nav, **{name: moment.figures[name] for name in names})


# -- showing -------------------------------------------------------------------------------------------------------


def rows(**pnl: int) -> list[Row]:
    held = [Row(symbol, 1, 2, Parts(price=amount, trading=1)) for symbol, amount in pnl.items()]
    return [*held, Row(None, 5, 6, Parts(fees=-2, flows=90), symbols_count=0)]


def test_the_largest_come_first_and_the_rest_is_one_row() -> None:
    asked = rows(A=-10, B=3, C=40, D=4)
    assert [row.symbol for row in largest(asked, 9)] == ["C", "A", "D", "B", None]
    shown = largest(asked, 2)
    assert [(row.symbol, row.symbols_count) for row in shown] == [("C", 1), ("A", 1), (None, 2), (None, 0)]
    assert shown[2] == Row(None, 2, 4, Parts(price=7, trading=2), symbols_count=2)
    assert sum_parts(row.parts for row in shown) == sum_parts(row.parts for row in asked)


def test_groups_sum_to_the_whole_and_cash_is_last() -> None:
    groups = grouped(rows(A=-10, B=3, C=40, D=4), {"A": "x", "B": "y", "C": "x", "D": "z"}.__getitem__)
    assert groups == [("x", 32), ("z", 5), ("y", 4), (None, -2)]


def test_what_moved_since_the_mark_gets_the_difference() -> None:
    values = {"A": 100, "B": 300, "C": -200}
    assert settle(values, 207, ["B"]) == {"A": 100, "B": 307, "C": -200}
    assert settle(values, 207, ["A", "B"]) == {"A": 101, "B": 306, "C": -200}
    assert settle(values, 200, []) == values
    assert sum(settle(values, -1_003, []).values()) == -1_003
    assert settle({}, 0, []) == {}
    assert settle({"A": 0, "B": 0}, 7, ["B"]) == {"A": 7, "B": 0}


@given(
    st.dictionaries(st.sampled_from("ABCDEF"), st.integers(-(2**59), 2**59), min_size=1),
    st.integers(-(2**59), 2**59),
    st.sets(st.sampled_from("ABCDEF")),
)
def test_settled_values_sum_exactly(values: dict[str, int], total: int, moved: set[str]) -> None:
    settled = settle(values, total, moved)
    assert sum(settled.values()) == total
    if any(values.get(symbol) for symbol in moved):
        assert all(settled[symbol] == values[symbol] for symbol in values if symbol not in moved)


def test_an_empty_span_explains_nothing() -> None:
    assert explain(Worth(0, {}), Worth(0, {}), {}).total == Parts()
    assert NOTHING.value_change == 0
    assert LedgerKind.SPLIT not in effects_of([])


@pytest.mark.parametrize("name", ["price", "trading", "fees", "income", "flows", "corporate"])
def test_every_part_counts(name: str) -> None:
    one = Parts(**{name: 3})
    assert one.nav_change == 3
    assert one.pnl == (0 if name == "flows" else 3)
    assert (one + one).nav_change == 6
