"""Exact amounts, and the only place that rounds.

Representation
    Decimal       quantities, prices and amounts wherever they are exact (ledger, wire, answers).
    micro-units   `int`, 10⁻⁶ of the currency: cash, cost, value, NAV, P&L. Sums of them are exact.
    float64       quantity and price inside the Book, for one thing only: valuing a position.

Rounding is half-even, once, when a product of quantity and price becomes an amount:

    value = round_half_even(quantity × price × 10⁶)                                [micro-units]

Range. A quantity or a price has at most 15 significant digits (`DIGITS_MAX`), so that its nearest float64
determines it (IEEE 754: 15 decimal digits survive a round trip), at most 12 decimals, and lies below
`MAGNITUDE_MAX`; an amount lies within ±`AMOUNT_MAX_MICRO` (576 billion currency units), a sixteenth of int64, so
that a NAV has room for several such amounts (the Book withholds one that has not). What lies outside is refused
with `AmountError`, never wrapped or rounded away.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal, DivisionByZero, InvalidOperation, Overflow
from fractions import Fraction
from functools import lru_cache

MICRO = 1_000_000
MICRO_DIGITS = 6
DIGITS_MAX = 15
DECIMALS_MAX = 12
MAGNITUDE_MAX = Decimal(10) ** 15
AMOUNT_MAX_MICRO = 2**59
TEXT_LENGTH_MAX = 64
EXPONENT_MAX = 64  # beyond it Decimal's own arithmetic overflows, or rounds to zero without a word

# 15 + 15 digits multiply to 30; the rest is room for sums and for the scale of 10⁶.
EXACT = Context(prec=76, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation, DivisionByZero, Overflow])
_MICRO_QUANTUM = Decimal(1).scaleb(-MICRO_DIGITS)
_ZERO = Decimal(0)
_MICRO_DECIMAL = Decimal(MICRO)
# An event is read when it is checked and again when it is booked: the numbers of a few batches of them.
_PARSED_COUNT_MAX = 8_192


class AmountError(ValueError):
    """A number outside the range in which navstream is exact. `code` is stable and machine-readable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@lru_cache(_PARSED_COUNT_MAX)
def parse_number(text: str, name: str) -> Decimal:
    """Read a quantity or a price: a finite decimal of at most 15 significant digits and 12 decimals.

    Raises AmountError: NOT_A_NUMBER, NOT_FINITE, TOO_PRECISE, TOO_LARGE.
    """
    return check_number(_parse(text, name), name)


def check_number(value: Decimal, name: str) -> Decimal:
    """Normalise `value` (no trailing zeros) and refuse it outside the exact range of quantities and prices."""
    if not value.is_finite():
        raise AmountError("NOT_FINITE", f"{name} is not finite")
    if not value:
        return _ZERO
    value = value.normalize(EXACT)
    _, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    if abs(value) >= MAGNITUDE_MAX:
        raise AmountError("TOO_LARGE", f"{name} is not below {MAGNITUDE_MAX}")
    if len(digits) > DIGITS_MAX or -exponent > DECIMALS_MAX:
        raise AmountError(
            "TOO_PRECISE", f"{name} has more than {DIGITS_MAX} significant digits or {DECIMALS_MAX} decimals"
        )
    return value if exponent <= 0 else value.quantize(Decimal(1), context=EXACT)


@lru_cache(_PARSED_COUNT_MAX)
def parse_amount(text: str, name: str) -> int:
    """Read an amount of money as micro-units. More than 6 decimals is refused: money is not rounded on arrival.

    Raises AmountError: NOT_A_NUMBER, NOT_FINITE, TOO_PRECISE, TOO_LARGE.
    """
    value = _parse(text, name)
    if not value.is_finite():
        raise AmountError("NOT_FINITE", f"{name} is not finite")
    if abs(value) >= MAGNITUDE_MAX:
        raise AmountError("TOO_LARGE", f"{name} is not below {MAGNITUDE_MAX}")
    micro = EXACT.multiply(value, _MICRO_DECIMAL)
    if micro != micro.to_integral_value():
        raise AmountError("TOO_PRECISE", f"{name} has more than {MICRO_DIGITS} decimals")
    return check_amount(int(micro), name)


def check_amount(micro: int, name: str) -> int:
    """Refuse an amount outside ±AMOUNT_MAX_MICRO (code TOO_LARGE)."""
    if not -AMOUNT_MAX_MICRO < micro < AMOUNT_MAX_MICRO:
        raise AmountError("TOO_LARGE", f"{name} is beyond ±{AMOUNT_MAX_MICRO} micro-units")
    return micro


def value_micro(quantity: Decimal, price: Decimal) -> int:
    """quantity × price in micro-units, half-even. Signed like the quantity. Raises AmountError TOO_LARGE."""
    product = EXACT.multiply(EXACT.multiply(quantity, price), _MICRO_DECIMAL)
    return check_amount(int(product.to_integral_value(ROUND_HALF_EVEN)), "value")


def share_micro(total_micro: int, part: Decimal, whole: Decimal) -> int:
    """total × part / whole in micro-units, half-even: the cost that a partly closed position releases."""
    share = EXACT.divide(EXACT.multiply(Decimal(total_micro), part), whole)
    return int(share.to_integral_value(ROUND_HALF_EVEN))


def scale_number(value: Decimal, scale: Fraction, name: str) -> Decimal:
    """A quantity or price × scale, half-even to the exact range (12 decimals, 15 digits). Raises AmountError TOO_LARGE.

    A result that rounds to zero is zero: a position so small is gone, a price so small is none.
    """
    product = EXACT.divide(EXACT.multiply(value, Decimal(scale.numerator)), Decimal(scale.denominator))
    decimals = min(DECIMALS_MAX, DIGITS_MAX - 1 - product.adjusted()) if product else 0
    return check_number(present(product, decimals), name)


def from_micro(micro: int) -> Decimal:
    """Micro-units as an exact Decimal with six decimals."""
    return EXACT.multiply(micro, _MICRO_QUANTUM)


def to_micro(amount: Decimal) -> int:
    """An exact amount (NUMERIC(38,6) from the ledger) as micro-units. Raises AmountError when it is not exact."""
    micro = EXACT.multiply(amount, _MICRO_DECIMAL)
    if micro != micro.to_integral_value():
        raise AmountError("TOO_PRECISE", f"{amount} has more than {MICRO_DIGITS} decimals")
    return int(micro)


def average(total_micro: int, quantity: Decimal) -> Decimal:
    """total / quantity, rounded for presentation to 10 decimals: the average cost of a position."""
    return present(EXACT.divide(from_micro(total_micro), quantity), 10)


def ratio(part: Decimal | int, whole: Decimal | int) -> Decimal | None:
    """part / whole as a fraction with 10 decimals; None when the whole is zero."""
    if not whole:
        return None
    return present(EXACT.divide(Decimal(part), Decimal(whole)), 10)


def present(value: Decimal, decimals: int) -> Decimal:
    """Round half-even for showing."""
    return value.quantize(Decimal(1).scaleb(-decimals), context=EXACT)


def plain(value: Decimal) -> str:
    """The decimal as plain text: no exponent, no trailing zeros, no negative zero."""
    if not value:
        return "0"
    text = str(value)
    if "E" in text:
        text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def scaled_text(number: int, digits: int) -> str:
    """`plain` of number × 10^−digits, without making a Decimal of it; digits ≥ 1."""
    text = str(number)
    if len(text) <= digits + 1:
        text = text.zfill(digits + 2 if number < 0 else digits + 1)
    return f"{text[:-digits]}.{text[-digits:]}".rstrip("0").rstrip(".")


def decimals_of(value: Decimal) -> int:
    """How many decimals the value has once trailing zeros are gone; 0 for whole numbers."""
    exponent = value.normalize(EXACT).as_tuple().exponent
    assert isinstance(exponent, int)
    return max(0, -exponent)


def _parse(text: str, name: str) -> Decimal:
    if len(text) > TEXT_LENGTH_MAX:
        raise AmountError("NOT_A_NUMBER", f"{name} is longer than {TEXT_LENGTH_MAX} characters")
    try:
        # Decimal() also takes underscores, surrounding blanks and other scripts' digits; a wire number has none.
        if not text.isascii() or "_" in text or text != text.strip():
            raise InvalidOperation
        value = Decimal(text)
    except InvalidOperation:
        raise AmountError("NOT_A_NUMBER", f"{name} is not a decimal number: {text!r}") from None
    if value and value.adjusted() > EXPONENT_MAX:
        raise AmountError("TOO_LARGE", f"{name} is not below {MAGNITUDE_MAX}")
    if value and value.adjusted() < -EXPONENT_MAX:
        raise AmountError("TOO_PRECISE", f"{name} has more than {DECIMALS_MAX} decimals")
    return value
