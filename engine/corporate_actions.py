"""Corporate actions: what the topic `corporate-actions` says about all holders of a symbol.

    {"type":"split","v":1,"action_id":"…","symbol":"AAPL","ratio":"4","effective_at":"2020-08-31T04:00:00Z"}
    {"type":"dividend","v":1,"action_id":"…","symbol":"AAPL","amount":"0.82","currency":"USD",
     "ex_date":"2020-08-07","pay_date":"2020-08-13"}

A ratio is new shares per old one: a decimal ("4", "1.5", "0.125") or two whole numbers new:old ("3:2", "1:8").
A dividend is `amount` per share, owed to who holds when its ex-date's session opens and owed by who is short, and paid
when the session of its pay date opens. A session opens at 09:30 in New York: from that instant on prices are without
the dividend, so NAV does not move.

Per holder an action becomes ledger entries, each step once (their event ids hold `#`, which no identifier does):

    SPLIT              quantity × ratio, cost unchanged, so average ÷ ratio; nothing else moves
    DIVIDEND_ACCRUED   receivable and income + quantity × amount
    DIVIDEND_PAID      cash + receivable, receivable − the same

All steps of all actions are taken in the order of (effective instant, arrival). One whose instant has passed when it
arrives is taken at once and flagged `late`; entries before it stay as they are. A late split multiplies only what was
held before its instant: fills executed since then were in new shares already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from fractions import Fraction
from typing import Literal
from zoneinfo import ZoneInfo

import msgspec

from engine.amounts import AmountError, parse_number, plain, scale_number
from engine.instants import to_ns
from engine.ledger import LedgerKind, write_scale
from engine.messages import (
    CURRENCIES,
    EVENT_BYTES_MAX,
    EventRejected,
    check_identifier,
    check_instant,
    check_symbol,
)

SCALE_TERM_MAX = 1_000_000
YEARS = range(1970, 2200)
_EXCHANGE_ZONE = ZoneInfo("America/New_York")
_OPEN = time(9, 30)


class _Action(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", kw_only=True):
    action_id: str
    symbol: str
    v: Literal[1] = 1


class SplitAction(_Action, frozen=True, tag="split", kw_only=True):
    ratio: str
    effective_at: datetime


class DividendAction(_Action, frozen=True, tag="dividend", kw_only=True):
    amount: str
    ex_date: date
    pay_date: date
    currency: str = "USD"


CorporateAction = SplitAction | DividendAction

_decoder: msgspec.json.Decoder[CorporateAction] = msgspec.json.Decoder(CorporateAction)
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Split:
    """Of one symbol: from `effective_at` on quantities are × scale and prices ÷ scale."""

    effective_at: datetime
    scale: Fraction

    @property
    def effective_at_ns(self) -> int:
        return to_ns(self.effective_at)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that an action does to every holder at one instant. `scale` of splits, `per_share` of dividends."""

    action_id: str
    kind: LedgerKind
    symbol: str
    at: datetime
    arrival: int
    currency: str | None = None
    scale: Fraction | None = None
    per_share: Decimal | None = None

    @property
    def terms(self) -> str:
        return write_scale(self.scale) if self.scale is not None else plain(self.per_share or Decimal(0))


def decode_action(data: bytes | None) -> CorporateAction:
    """Decode and check one Kafka value. Raises EventRejected: EMPTY, TOO_LONG, MALFORMED, BAD_IDENTIFIER, BAD_INSTANT,
    BAD_RATIO, BAD_CURRENCY, NOT_POSITIVE, PAID_BEFORE_EX, and the codes of AmountError."""
    if not data:
        raise EventRejected("EMPTY", "the message has no value")
    if len(data) > EVENT_BYTES_MAX:
        raise EventRejected("TOO_LONG", f"the message has more than {EVENT_BYTES_MAX} bytes")
    try:
        action = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EventRejected("MALFORMED", str(error)) from None
    check_identifier(action.action_id, "action_id")
    check_symbol(action.symbol)
    if isinstance(action, SplitAction):
        parse_scale(action.ratio)
        check_instant(action.effective_at, "effective_at")
    else:
        _check_dividend(action)
    return action


def encode_action(action: CorporateAction) -> bytes:
    return _encoder.encode(action)


def action_hash(action: CorporateAction) -> bytes:
    """32 bytes over what the action says."""
    return hashlib.sha256(_encoder.encode(action)).digest()


def parse_scale(text: str) -> Fraction:
    """A ratio new:old, or the decimal new / old. Raises EventRejected BAD_RATIO: not one, 0, 1 or beyond 10⁶."""
    new, colon, old = text.partition(":")
    try:
        if colon:
            if not (new.isascii() and new.isdigit() and old.isascii() and old.isdigit()) or len(text) > 20:
                raise ValueError
            scale = Fraction(int(new), int(old))
        else:
            scale = Fraction(parse_number(text, "ratio"))
    except (AmountError, ValueError, ZeroDivisionError):
        raise EventRejected("BAD_RATIO", f"ratio {text[:40]!r} is neither a number nor new:old") from None
    if scale <= 0 or scale == 1 or max(scale.numerator, scale.denominator) > SCALE_TERM_MAX:
        raise EventRejected("BAD_RATIO", f"ratio {text[:40]!r} is not above 0, is 1, or has terms beyond 10⁶")
    return scale


def opens_at(day: date) -> datetime:
    """When the session of a date opens where the equities are listed, in UTC."""
    return datetime.combine(day, _OPEN, _EXCHANGE_ZONE).astimezone(UTC)


def scale_since(ts_event_ns: int, splits: Iterable[Split]) -> Fraction:
    """What turns shares of `ts_event_ns` into today's: the product of the splits after it. Prices are divided by it."""
    scale = Fraction(1)
    for split in splits:
        if split.effective_at_ns > ts_event_ns:
            scale *= split.scale
    return scale


def price_after(price: Decimal, ts_event_ns: int, splits: Iterable[Split]) -> Decimal:
    """A price stamped `ts_event_ns` in today's shares, half-even to 12 decimals and 15 digits; 0 when it vanishes."""
    scale = scale_since(ts_event_ns, splits)
    return price if scale == 1 else scale_number(price, 1 / scale, "price")


def _check_dividend(action: DividendAction) -> None:
    try:
        per_share = parse_number(action.amount, "amount")
    except AmountError as error:
        raise EventRejected(error.code, str(error)) from None
    if per_share <= 0:
        raise EventRejected("NOT_POSITIVE", "amount is not positive")
    if action.currency not in CURRENCIES:
        raise EventRejected("BAD_CURRENCY", f"currency {action.currency[:10]!r} is not known")
    for day, name in ((action.ex_date, "ex_date"), (action.pay_date, "pay_date")):
        if day.year not in YEARS:
            raise EventRejected("BAD_INSTANT", f"{name} is out of range")
    if action.pay_date < action.ex_date:
        raise EventRejected("PAID_BEFORE_EX", f"pay_date {action.pay_date} is before ex_date {action.ex_date}")
