"""Numbers are read exactly or refused with a code, and rounding is half-even, once."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.amounts import (
    AMOUNT_MAX_MICRO,
    AmountError,
    average,
    decimals_of,
    from_micro,
    parse_amount,
    parse_number,
    plain,
    ratio,
    share_micro,
    to_micro,
    value_micro,
)
from tests.oracle import half_even

decimals = st.decimals(allow_nan=True, allow_infinity=True) | st.decimals(-(10**15), 10**15, places=12)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10", "10"),
        ("1e14", "100000000000000"),
        ("0.10", "0.1"),
        ("-2.50", "-2.5"),
        ("1E-12", "0.000000000001"),
        ("999999999999999", "999999999999999"),
        ("0e999999999", "0"),
        ("-0", "0"),
        ("123456789012345.0", "123456789012345"),
    ],
)
def test_a_number_within_the_range_is_read_exactly(text: str, number: str) -> None:
    assert plain(parse_number(text, "x")) == number


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "NOT_A_NUMBER"),
        ("1_000", "NOT_A_NUMBER"),
        (" 1", "NOT_A_NUMBER"),
        ("١", "NOT_A_NUMBER"),
        ("0x10", "NOT_A_NUMBER"),
        ("1" * 65, "NOT_A_NUMBER"),
        ("NaN", "NOT_FINITE"),
        ("sNaN123", "NOT_FINITE"),
        ("-Infinity", "NOT_FINITE"),
        ("1000000000000000", "TOO_LARGE"),
        ("-1e15", "TOO_LARGE"),
        ("1e999999999", "TOO_LARGE"),
        ("-9e1000000", "TOO_LARGE"),
        ("1e999999999999999999", "TOO_LARGE"),
        ("1e-13", "TOO_PRECISE"),
        ("1e-999999999", "TOO_PRECISE"),
        ("1234567890.123456", "TOO_PRECISE"),
    ],
)
def test_a_number_outside_the_range_is_refused_with_its_code(text: str, code: str) -> None:
    with pytest.raises(AmountError) as refused:
        parse_number(text, "x")
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("0.0000001", "TOO_PRECISE"),
        ("1e-999999999", "TOO_PRECISE"),
        ("1e999999999", "TOO_LARGE"),
        ("576460752303.423488", "TOO_LARGE"),
        ("-576460752303.423488", "TOO_LARGE"),
        ("NaN", "NOT_FINITE"),
        ("one", "NOT_A_NUMBER"),
    ],
)
def test_money_is_never_rounded_on_arrival(text: str, code: str) -> None:
    with pytest.raises(AmountError) as refused:
        parse_amount(text, "x")
    assert refused.value.code == code
    assert parse_amount("576460752303.423487", "x") == AMOUNT_MAX_MICRO - 1


@given(st.text(max_size=70) | decimals.map(str) | st.from_regex(r"-?[0-9]{0,20}\.?[0-9]{0,20}(e-?[0-9]{1,9})?"))
def test_whatever_the_text_it_is_read_exactly_or_refused(text: str) -> None:
    for parse, scale in ((parse_number, 1), (parse_amount, 10**6)):
        try:
            read = parse(text, "x")
        except AmountError:
            continue
        exact = Decimal(text)
        # Fraction() would write a zero of exponent 10⁹ out in full.
        assert Fraction(read) == (Fraction(exact) * scale if exact else 0)


@given(st.integers(1, 10**15 - 1), st.integers(0, 12), st.integers(1, 10**15 - 1), st.integers(0, 12), st.booleans())
def test_a_value_is_the_product_rounded_half_even_or_refused(q: int, qe: int, p: int, pe: int, short: bool) -> None:
    quantity, price = Decimal(-q if short else q).scaleb(-qe), Decimal(p).scaleb(-pe)
    expected = half_even(Fraction(quantity) * Fraction(price) * 10**6)
    if abs(expected) < AMOUNT_MAX_MICRO:
        assert value_micro(quantity, price) == expected
    else:
        with pytest.raises(AmountError):
            value_micro(quantity, price)


@pytest.mark.parametrize(("price", "micro"), [("0.5", 0), ("1.5", 2), ("2.5", 2), ("2.500000000001", 3), ("3.5", 4)])
def test_ties_go_to_the_even_micro_unit(price: str, micro: int) -> None:
    tiny = Decimal("0.000001")
    assert value_micro(tiny, Decimal(price)) == micro
    assert value_micro(-tiny, Decimal(price)) == -micro


@given(st.integers(0, AMOUNT_MAX_MICRO - 1), st.integers(1, 10**15 - 1), st.integers(1, 10**15 - 1))
def test_a_share_is_rounded_half_even_and_the_whole_is_all(total: int, part: int, whole: int) -> None:
    part, whole = min(part, whole), max(part, whole)
    expected = half_even(Fraction(total * part, whole))
    assert share_micro(total, Decimal(part), Decimal(whole)) == expected
    assert share_micro(total, Decimal(whole), Decimal(whole)) == total


@pytest.mark.parametrize(("total", "released"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_half_a_cost_of_odd_micro_units_goes_to_the_even_one(total: int, released: int) -> None:
    assert share_micro(total, Decimal(1), Decimal(2)) == released


@given(st.integers(-(2**63), 2**63))
def test_micro_units_and_decimals_are_one_to_one(micro: int) -> None:
    assert to_micro(from_micro(micro)) == micro
    assert from_micro(micro) * 10**6 == micro


def test_an_amount_of_more_than_six_decimals_has_no_micro_units() -> None:
    with pytest.raises(AmountError):
        to_micro(Decimal("0.0000005"))


def test_what_is_shown_is_plain_and_unknown_is_none() -> None:
    assert average(1_575_000_000, Decimal(15)) == 105
    assert (ratio(1, 3), ratio(1, 0), ratio(-1, 4)) == (Decimal("0.3333333333"), None, Decimal("-0.25"))
    assert [plain(Decimal(text)) for text in ("-0.00", "1E+3", "0.1000", "-5")] == ["0", "1000", "0.1", "-5"]
    assert [decimals_of(Decimal(text)) for text in ("1E+3", "1.50", "0.000001")] == [0, 1, 6]
