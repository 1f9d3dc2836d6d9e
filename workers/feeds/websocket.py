"""The WebSocket feed: quotes as JSON from any server, and what every feed over a WebSocket needs.

A text message holds one quote or an array of them:

    {"symbol": "AAPL", "price": "189.23", "ts_event": "2026-11-22T10:15:30.123456Z", "sequence": 7, "source": "x"}

    price     a string, or a JSON number (read as a decimal, never as a float, then engine.quotes.trim_number)
    ts_event  RFC 3339 with a zone, or a number since 1970 (UTC) whose magnitude tells its unit: below 10¹¹
              seconds, below 10¹⁴ milliseconds, below 10¹⁷ microseconds, else nanoseconds
    sequence  an integer ≥ 0; absent or null where the source numbers nothing
    source    absent or null means the feed's name
    condition "DELAYED" for a price published late on purpose, "HALTED" while trading is suspended: then `price` is not
              believed and may be absent or null; absent, null or "" for neither

Other fields are ignored.

What can not be read is counted by kind and dropped, an array's other quotes are kept. A message of more than
MESSAGE_BYTES_MAX ends the connection (that is how the library keeps memory bounded) and the feed connects again.

Connecting again: after a session that brought a message the delays begin anew, otherwise they double, with jitter;
a server that accepts and hangs up is not hammered. Silence is not an error, a peer that answers no ping is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, get_args

import structlog
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.uri import parse_uri

from engine.instants import SECOND_NS, to_ns
from engine.messages import Condition, Quote
from engine.quotes import HALTED, RawQuote, trim_number
from engine.runtime.connections import Outage
from workers.feeds import PROBLEMS, Batch

NAME = "ws"
MESSAGE_BYTES_MAX = 256 * 1024  # about 2,000 quotes in one array
QUEUE_MESSAGES_MAX = 64  # beyond it the library stops reading, and TCP slows the server down
OPEN_TIMEOUT_S = 10
PING_INTERVAL_S = 10
PING_TIMEOUT_S = 10
CLOSE_TIMEOUT_S = 1  # a server that goes on sending never reads our close frame; it must not hold up the exit

# A number since 1970 and the nanoseconds that its unit has.
_UNITS_NS = ((10**11, SECOND_NS), (10**14, 1_000_000), (10**17, 1_000))

_CONDITIONS: Mapping[str, Condition] = {condition: condition for condition in get_args(Condition)}

Parser = Callable[[str], Sequence[RawQuote]]

_log = structlog.get_logger(__name__)


class NotAQuote(ValueError):
    """What a message holds is not a quote; the text is the problem's name, one of a few."""


class WebSocketFeed:
    """Quotes from the server at `url`. Raises ValueError when it is not a WebSocket URL."""

    name = NAME

    def __init__(self, url: str) -> None:
        self._url = check_url(url)

    def resume(self, quotes: Mapping[str, Quote]) -> None:
        """Nothing to do: the server knows its prices."""

    def settled_ns(self) -> int | None:
        """Not known: a source sends as late as it likes."""
        return None

    def batches(self) -> AsyncGenerator[Batch, None]:
        return read_messages(self._url, self.name, parse_message, [])


def check_url(url: str) -> str:
    """Raises ValueError when `url` is not a WebSocket URL."""
    try:
        parse_uri(url)
    except InvalidURI as error:
        raise ValueError(f"not a WebSocket URL (ws://… or wss://…): {url!r}") from error
    return url


async def read_messages(url: str, name: str, parse: Parser, greetings: Sequence[str]) -> AsyncGenerator[Batch, None]:
    """Connect, send `greetings`, yield what `parse` makes of each text message; again and again."""
    outage = Outage(f"feed {name}")
    while True:
        try:
            async with connect(
                url,
                open_timeout=OPEN_TIMEOUT_S,
                ping_interval=PING_INTERVAL_S,
                ping_timeout=PING_TIMEOUT_S,
                close_timeout=CLOSE_TIMEOUT_S,
                max_size=MESSAGE_BYTES_MAX,
                max_queue=QUEUE_MESSAGES_MAX,
            ) as connection:
                for greeting in greetings:
                    await connection.send(greeting)
                while True:
                    message = await connection.recv()
                    outage.end()
                    batch = read_message(message, name, parse)
                    if batch:
                        yield batch
        except (OSError, TimeoutError, ConnectionClosed, InvalidHandshake) as error:
            PROBLEMS.labels(name, "disconnected").inc()
            await asyncio.sleep(outage.begin_or_continue(error))


def read_message(message: str | bytes, name: str, parse: Parser) -> Batch:
    """The quotes of one message; none when it is binary or `parse` refuses it whole, which is counted."""
    if isinstance(message, bytes):
        PROBLEMS.labels(name, "binary").inc()
        return ()
    try:
        return parse(message)
    except NotAQuote as error:
        PROBLEMS.labels(name, str(error)).inc()
        return ()


def parse_message(text: str) -> list[RawQuote]:
    """One quote or an array of them; an array's unreadable items are counted. Raises NotAQuote."""
    body = parse_json(text)
    if not isinstance(body, list):
        return [parse_quote(body)]
    return list(_readable(body))


def _readable(items: list[Any]) -> Iterator[RawQuote]:
    for item in items:
        try:
            yield parse_quote(item)
        except NotAQuote as error:
            PROBLEMS.labels(NAME, str(error)).inc()


def parse_quote(item: object) -> RawQuote:
    """One quote of the module's format. Raises NotAQuote."""
    if not isinstance(item, dict):
        raise NotAQuote("not_an_object")
    symbol, source, sequence = item.get("symbol"), item.get("source"), item.get("sequence")
    source = NAME if source is None else source
    if not isinstance(symbol, str) or not isinstance(source, str):
        raise NotAQuote("bad_field")
    if sequence is not None and (not isinstance(sequence, int) or isinstance(sequence, bool)):
        raise NotAQuote("bad_sequence")
    price, condition = item.get("price"), _parse_condition(item.get("condition"))
    text = "" if price is None and condition == HALTED else _price_text(price)
    return RawQuote(symbol, text, parse_instant(item.get("ts_event")), source, sequence, condition)


def _parse_condition(value: object) -> Condition:
    condition = _CONDITIONS.get("" if value is None else value) if isinstance(value, str | None) else None
    if condition is None:
        raise NotAQuote("bad_condition")
    return condition


def parse_json(text: str) -> object:
    """JSON with exact numbers: a fraction is a Decimal. Raises NotAQuote."""
    try:
        # Python's own reader, because it also takes the NaN and Infinity that some writers emit, here as text: one
        # such price is then refused by itself, and not with everything else in its array.
        return json.loads(text, parse_float=Decimal, parse_constant=str)
    except (ValueError, ArithmeticError, RecursionError):
        # ArithmeticError: a fraction whose exponent no Decimal has.
        raise NotAQuote("not_json") from None


def parse_instant(value: object) -> int:
    """`ts_event` as nanoseconds since 1970. Raises NotAQuote."""
    try:
        if isinstance(value, str):
            return to_ns(datetime.fromisoformat(value))
        if isinstance(value, int | Decimal) and not isinstance(value, bool):
            number = Decimal(value)
            unit_ns = next((unit for bound, unit in _UNITS_NS if abs(number) < bound), 1)
            return int(number * unit_ns)
    except (ValueError, TypeError, ArithmeticError):
        # TypeError: an instant without a zone can not be subtracted from one with a zone.
        raise NotAQuote("bad_instant") from None
    raise NotAQuote("bad_instant")


def _price_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise NotAQuote("bad_price")
    number = Decimal(value)
    trimmed = trim_number(number)
    if trimmed is not number:
        PROBLEMS.labels(NAME, "price_trimmed").inc()
    return str(trimmed)
