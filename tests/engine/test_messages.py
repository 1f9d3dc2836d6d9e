"""Decoding an event answers the event or EventRejected with a code: never anything else, whatever the bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import EVENT_BYTES_MAX, EventRejected, content_hash, decode_event, encode_event
from tests.bookkeeping import cash, fill, opening

DEPOSIT = cash("p-1", "DEPOSIT", "1", "d")
BUY = fill("p-1", "BUY", "1", "2", "b")
OPEN = opening("p-1")


def code_of(event: dict[str, Any] | bytes | None) -> str:
    data = json.dumps(event).encode() if isinstance(event, dict) else event
    try:
        decode_event(data)
    except EventRejected as error:
        str(error).encode()  # becomes a header of the dead letter
        return error.code
    return "TAKEN"


@pytest.mark.parametrize("event", [DEPOSIT, BUY, OPEN])
def test_an_event_survives_its_own_encoding(event: dict[str, Any]) -> None:
    decoded = decode_event(json.dumps(event).encode())
    assert decode_event(encode_event(decoded)) == decoded


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (None, "EMPTY"),
        (b"", "EMPTY"),
        (b"\xff\xfe", "MALFORMED"),
        (b"[" * 60_000, "MALFORMED"),
        (b" " * (EVENT_BYTES_MAX + 1), "TOO_LONG"),
        ({**DEPOSIT, "v": 2}, "MALFORMED"),
        ({**DEPOSIT, "type": "loan"}, "MALFORMED"),
        ({**DEPOSIT, "amount": 1}, "MALFORMED"),
        ({**DEPOSIT, "kind": "GIFT"}, "MALFORMED"),
        ({**DEPOSIT, "extra": 1}, "MALFORMED"),
        ({**DEPOSIT, "effective_at": "yesterday"}, "MALFORMED"),
        ({**DEPOSIT, "event_id": ""}, "BAD_IDENTIFIER"),
        ({**DEPOSIT, "event_id": "a b"}, "BAD_IDENTIFIER"),
        ({**DEPOSIT, "portfolio_id": "p\n"}, "BAD_IDENTIFIER"),
        ({**DEPOSIT, "portfolio_id": "p" * 65}, "BAD_IDENTIFIER"),
        ({**DEPOSIT, "reference": "x" * 201}, "BAD_TEXT"),
        ({**DEPOSIT, "reference": "\x00"}, "BAD_TEXT"),
        ({**DEPOSIT, "currency": "XXX"}, "BAD_CURRENCY"),
        ({**DEPOSIT, "effective_at": "2026-11-20T15:00:00"}, "BAD_INSTANT"),
        ({**DEPOSIT, "effective_at": "1969-12-31T23:59:59Z"}, "BAD_INSTANT"),
        ({**DEPOSIT, "effective_at": "2200-01-01T00:00:00Z"}, "BAD_INSTANT"),
        ({**DEPOSIT, "effective_at": "0001-01-01T00:00:00+14:00"}, "BAD_INSTANT"),
        ({**DEPOSIT, "effective_at": "9999-12-31T23:59:59-14:00"}, "BAD_INSTANT"),
        ({**DEPOSIT, "effective_at": "1969-12-31T23:59:59-01:00"}, "TAKEN"),
        ({**DEPOSIT, "effective_at": "2200-01-01T00:59:59+01:00"}, "TAKEN"),
        ({**DEPOSIT, "amount": "0"}, "NOT_POSITIVE"),
        ({**DEPOSIT, "amount": "-1"}, "NOT_POSITIVE"),
        ({**DEPOSIT, "amount": "NaN"}, "NOT_FINITE"),
        ({**DEPOSIT, "amount": "1e999999999"}, "TOO_LARGE"),
        ({**DEPOSIT, "amount": "0.0000001"}, "TOO_PRECISE"),
        ({**BUY, "quantity": "-1"}, "NOT_POSITIVE"),
        ({**BUY, "price": "0"}, "NOT_POSITIVE"),
        ({**BUY, "price": "1e-999999999"}, "TOO_PRECISE"),
        ({**BUY, "quantity": "1e12", "price": "1e12"}, "TOO_LARGE"),
        ({**BUY, "fee": "-0.01"}, "NEGATIVE_FEE"),
        ({**BUY, "symbol": "../x"}, "BAD_IDENTIFIER"),
        ({**BUY, "side": "buy"}, "MALFORMED"),
        ({**BUY, "venue": "\u2028"}, "BAD_TEXT"),
        ({**OPEN, "name": "  "}, "BAD_TEXT"),
        ({**OPEN, "day_cut": "16:00 New York"}, "BAD_DAY_CUT"),
        ({**OPEN, "owner": ""}, "BAD_IDENTIFIER"),
    ],
)
def test_every_rule_has_its_code(event: dict[str, Any] | bytes | None, code: str) -> None:
    assert code_of(event) == code


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
fields = st.sampled_from(sorted(DEPOSIT.keys() | BUY.keys() | OPEN.keys()))
values = (
    scalars
    | st.lists(scalars, max_size=3)
    | st.from_regex(r"-?[0-9]{1,17}(\.[0-9]{1,14})?(e[+-]?[0-9]{1,10})?", fullmatch=True)
    | st.from_regex(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9](Z|[+-][01][0-9]:[0-5][0-9])")
)


@given(st.sampled_from([DEPOSIT, BUY, OPEN]), st.dictionaries(fields, values, max_size=4))
@settings(max_examples=600)
def test_any_change_of_an_event_is_taken_or_refused(event: dict[str, Any], changes: dict[str, Any]) -> None:
    code_of({**event, **changes})


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    assert code_of(data) != "TAKEN"


@given(st.sampled_from([DEPOSIT, BUY, OPEN]), st.data())
def test_any_cut_or_flipped_byte_is_taken_or_refused(event: dict[str, Any], data: st.DataObject) -> None:
    whole = bytearray(json.dumps(event).encode())
    at = data.draw(st.integers(0, len(whole) - 1))
    code_of(bytes(whole[:at]))
    whole[at] = data.draw(st.integers(0, 255))
    code_of(bytes(whole))


def test_the_content_hash_is_of_what_is_said_and_not_of_how_it_is_spelled() -> None:
    spaced = json.dumps({**dict(reversed(BUY.items())), "v": 1}, indent=3).encode()
    first, second = decode_event(json.dumps(BUY).encode()), decode_event(spaced)
    assert content_hash(first) == content_hash(second)
    for field, value in {"quantity": "2", "price": "3", "side": "SELL", "symbol": "B", "fee": "1"}.items():
        assert content_hash(decode_event(json.dumps({**BUY, field: value}).encode())) != content_hash(first)
