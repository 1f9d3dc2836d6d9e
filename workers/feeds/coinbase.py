"""The Coinbase feed: the exchange's public `ticker` channel, one quote per trade.

Subscribes to each product by a message of its own, so that one delisted product does not take the others with it.
A ticker frame becomes a quote of the symbol `product_id` (BTC-USD) at `price`, ordered by the product's
`sequence`. Other frames that belong to the protocol (subscriptions, heartbeat…) are passed over; an `error` is
counted and logged. Frames: https://docs.cdp.coinbase.com/exchange/websocket-feed/channels
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping, Sequence

import structlog

from engine.messages import Quote
from engine.quotes import RawQuote
from workers.feeds import Batch
from workers.feeds.websocket import NotAQuote, check_url, parse_instant, parse_json, read_messages

NAME = "coinbase"
PUBLIC_URL = "wss://ws-feed.exchange.coinbase.com"
PRODUCTS_COUNT_MAX = 20  # the exchange takes a burst of 20 messages from a client

_log = structlog.get_logger(__name__)


class CoinbaseFeed:
    """Tickers of `products` from the server at `url`. Raises ValueError for a bad URL or number of products."""

    name = NAME

    def __init__(self, url: str, products: Sequence[str]) -> None:
        if not 1 <= len(products) <= PRODUCTS_COUNT_MAX:
            raise ValueError(f"a coinbase feed has 1 to {PRODUCTS_COUNT_MAX} products, not {len(products)}")
        self._url = check_url(url)
        self._products = products

    def resume(self, quotes: Mapping[str, Quote]) -> None:
        """Nothing to do: the exchange sends each product's last trade on subscription."""

    def settled_ns(self) -> int | None:
        """Not known: a source sends as late as it likes."""
        return None

    def batches(self) -> AsyncGenerator[Batch, None]:
        greetings = [
            json.dumps({"type": "subscribe", "product_ids": [product], "channels": ["ticker"]})
            for product in self._products
        ]
        return read_messages(self._url, self.name, parse_frame, greetings)


def parse_frame(text: str) -> list[RawQuote]:
    """The quote of a ticker frame, none of another frame of the protocol. Raises NotAQuote."""
    frame = parse_json(text)
    if not isinstance(frame, dict):
        raise NotAQuote("not_an_object")
    if frame.get("type") == "error":
        _log.warning("coinbase_error", message=str(frame.get("message"))[:200], reason=str(frame.get("reason"))[:200])
        raise NotAQuote("error_frame")
    if frame.get("type") != "ticker":
        return []
    symbol, price, sequence = frame.get("product_id"), frame.get("price"), frame.get("sequence")
    if not isinstance(symbol, str) or not isinstance(price, str) or not isinstance(sequence, int):
        raise NotAQuote("bad_field")
    return [RawQuote(symbol, price, parse_instant(frame.get("time")), NAME, sequence)]
