"""What crosses a process boundary: frozen, typed, made once.

Portfolio events arrive over Kafka as JSON (decimals are strings, instants RFC 3339). Decoding is strict: an
unknown field, a wrong type or a broken rule raises `EventRejected` with a stable code, which becomes the reason
of the dead letter. Quotes travel over Redis Pub/Sub as batched msgpack frames.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal

import msgspec

from engine.amounts import AmountError, check_amount, parse_amount, parse_number, value_micro
from engine.day_cuts import BadDayCutError, parse_day_cut

EVENT_BYTES_MAX = 64 * 1024  # a fill is under 1 KiB; anything larger is not one of ours
IDENTIFIER_LENGTH_MAX = 64
TEXT_LENGTH_MAX = 200
CURRENCIES = frozenset({"USD", "EUR", "GBP", "CHF", "JPY", "CAD", "AUD"})

_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=^@-]{0,63}")

CashKind = Literal["DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST", "DIVIDEND"]
Side = Literal["BUY", "SELL"]


class EventRejected(ValueError):
    """An event that will never be booked; `code` says why and is the dead letter's reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", kw_only=True):
    event_id: str
    portfolio_id: str
    v: Literal[1] = 1


class FillEvent(_Event, frozen=True, tag="fill", kw_only=True):
    """An execution: `quantity` > 0 at `price` > 0, `fee` ≥ 0 on top; `side` gives the sign."""

    symbol: str
    side: Side
    quantity: str
    price: str
    currency: str
    executed_at: datetime
    fee: str = "0"
    order_id: str | None = None
    venue: str | None = None


class CashEvent(_Event, frozen=True, tag="cash", kw_only=True):
    """A cash movement of `amount` > 0; `kind` gives the sign (WITHDRAWAL and FEE leave the portfolio)."""

    kind: CashKind
    amount: str
    currency: str
    effective_at: datetime
    reference: str | None = None


class OpenEvent(_Event, frozen=True, tag="open", kw_only=True):
    """A portfolio begins to exist. Its days end at `day_cut` (engine.day_cuts)."""

    owner: str
    name: str
    base_currency: str
    opened_at: datetime
    day_cut: str = "00:00 UTC"


class ReversalEvent(_Event, frozen=True, tag="reversal", kw_only=True):
    """The fill or cash movement `reverses` should not have been: its effects are taken back."""

    reverses: str
    effective_at: datetime
    reference: str | None = None


PortfolioEvent = FillEvent | CashEvent | OpenEvent | ReversalEvent

_decoder: msgspec.json.Decoder[PortfolioEvent] = msgspec.json.Decoder(PortfolioEvent)
_encoder = msgspec.json.Encoder()


def decode_event(data: bytes | None) -> PortfolioEvent:
    """Decode and check one Kafka value. Raises EventRejected with one of the codes

    EMPTY, TOO_LONG, MALFORMED, BAD_IDENTIFIER, BAD_TEXT, BAD_CURRENCY, BAD_INSTANT, BAD_DAY_CUT, NOT_POSITIVE,
    NEGATIVE_FEE, and those of AmountError.
    """
    if not data:
        raise EventRejected("EMPTY", "the message has no value")
    if len(data) > EVENT_BYTES_MAX:
        raise EventRejected("TOO_LONG", f"the message has more than {EVENT_BYTES_MAX} bytes")
    try:
        event = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EventRejected("MALFORMED", str(error)) from None
    check_event(event)
    return event


def encode_event(event: PortfolioEvent) -> bytes:
    return _encoder.encode(event)


def check_event(event: PortfolioEvent) -> None:
    """Every rule that needs no state. Raises EventRejected."""
    check_identifier(event.event_id, "event_id")
    check_identifier(event.portfolio_id, "portfolio_id")
    try:
        if isinstance(event, FillEvent):
            _check_fill(event)
        elif isinstance(event, CashEvent):
            check_instant(event.effective_at, "effective_at")
            _check_currency(event.currency)
            _check_text(event.reference, "reference")
            _check_positive(parse_amount(event.amount, "amount"), "amount")
        elif isinstance(event, ReversalEvent):
            check_identifier(event.reverses, "reverses")
            check_instant(event.effective_at, "effective_at")
            _check_text(event.reference, "reference")
        else:
            _check_open(event)
    except AmountError as error:
        raise EventRejected(error.code, str(error)) from None


def content_hash(event: PortfolioEvent) -> bytes:
    """32 bytes over what the event says, so that a redelivery is told from the same id with other content."""
    return hashlib.sha256(_encoder.encode(event)).digest()


def _check_fill(event: FillEvent) -> None:
    check_symbol(event.symbol)
    _check_currency(event.currency)
    check_instant(event.executed_at, "executed_at")
    _check_text(event.order_id, "order_id")
    _check_text(event.venue, "venue")
    quantity = parse_number(event.quantity, "quantity")
    price = parse_number(event.price, "price")
    _check_positive(quantity, "quantity")
    _check_positive(price, "price")
    check_amount(value_micro(quantity, price), "quantity × price")
    if parse_amount(event.fee, "fee") < 0:
        raise EventRejected("NEGATIVE_FEE", "fee is negative")


def _check_open(event: OpenEvent) -> None:
    check_identifier(event.owner, "owner")
    _check_currency(event.base_currency)
    check_instant(event.opened_at, "opened_at")
    _check_text(event.name, "name")
    if not event.name.strip():
        raise EventRejected("BAD_TEXT", "name is empty")
    try:
        parse_day_cut(event.day_cut)
    except BadDayCutError as error:
        raise EventRejected("BAD_DAY_CUT", str(error)) from None


def check_symbol(symbol: str) -> None:
    """A symbol is 1 to 64 ASCII letters, digits and ``. _ : / = ^ @ -``, beginning with a letter or digit."""
    check_identifier(symbol, "symbol")


def check_identifier(value: str, name: str) -> None:
    if not _IDENTIFIER.fullmatch(value):
        raise EventRejected("BAD_IDENTIFIER", f"{name} is not an identifier: {value[:80]!r}")


def _check_text(value: str | None, name: str) -> None:
    if value is not None and (len(value) > TEXT_LENGTH_MAX or not value.isprintable()):
        raise EventRejected("BAD_TEXT", f"{name} is longer than {TEXT_LENGTH_MAX} or not printable")


def _check_currency(value: str) -> None:
    if value not in CURRENCIES:
        raise EventRejected("BAD_CURRENCY", f"currency {value[:10]!r} is not known")


def check_instant(value: datetime, name: str) -> None:
    if value.tzinfo is None:
        raise EventRejected("BAD_INSTANT", f"{name} has no time zone")
    # The plain year first: at the calendar's ends the conversion to UTC overflows.
    if not 1969 <= value.year <= 2200 or not 1970 <= value.astimezone(UTC).year < 2200:
        raise EventRejected("BAD_INSTANT", f"{name} is out of range")


def _check_positive(value: Decimal | int, name: str) -> None:
    if value <= 0:
        raise EventRejected("NOT_POSITIVE", f"{name} is not positive")


# What a source says of its own price, beside the price.
Condition = Literal["", "DELAYED", "HALTED"]


class Quote(msgspec.Struct, frozen=True, array_like=True):
    """One accepted price. `price` is plain decimal text; `sequence` is None where the source numbers nothing.

    `condition` DELAYED: the source publishes late on purpose; HALTED: trading is suspended, and `price` the last good
    one.
    """

    symbol: str
    price: str
    ts_event_ns: int
    source: str
    sequence: int | None = None
    condition: Condition = ""


class QuoteFrame(msgspec.Struct, frozen=True, array_like=True):
    """What travels on the channel `quotes`, in the order in which it counts: of each symbol the latest quote, and the
    latest of every second before.

    `sequence` grows by one per frame of one `publisher` (a process's random id); a gap means that frames were
    lost and `prices` is to be read again. An empty frame is a heartbeat. Time is settled up to `settled_ns`: a quote
    stamped up to there that comes in a later frame is late, for everybody alike. `received_ns` is the wall instant at
    which the first of the frame's quotes was taken in; 0 when it has none.
    """

    publisher: str
    sequence: int
    settled_ns: int
    quotes: list[Quote]
    received_ns: int = 0


quote_frame_encoder = msgspec.msgpack.Encoder()
quote_frame_decoder: msgspec.msgpack.Decoder[QuoteFrame] = msgspec.msgpack.Decoder(QuoteFrame)
quote_encoder = msgspec.msgpack.Encoder()
quote_decoder: msgspec.msgpack.Decoder[Quote] = msgspec.msgpack.Decoder(Quote)


class InterestFrame(msgspec.Struct, frozen=True, array_like=True):
    """What travels on the channels `interest:{n}`: portfolios of shard n that `node`, an API process's random id, has
    somebody watching.

    `complete`: these are all of them, in place of those told before; otherwise they come on top. All are forgotten when
    nothing more was heard of the node for `expires_in_ms`.
    """

    node: str
    expires_in_ms: int
    complete: bool
    portfolio_ids: list[str]


interest_encoder = msgspec.msgpack.Encoder()
interest_decoder: msgspec.msgpack.Decoder[InterestFrame] = msgspec.msgpack.Decoder(InterestFrame)
