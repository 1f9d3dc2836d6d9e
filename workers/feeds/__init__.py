"""Feeds: where quotes come from. A feed is an asynchronous iterable of batches of raw quotes.

A feed reconnects by itself, counts what it can not read (PROBLEMS) and never raises for what came over a
wire. It ends when there is nothing more to come; it may be silent for as long as it likes. The quotes it
yields are not checked: engine.quotes does that.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from prometheus_client import Counter

from engine.messages import Quote
from engine.quotes import RawQuote

# Both labels come from constants of this package, never from a wire.
PROBLEMS = Counter("navstream_feed_problems_total", "What a feed could not read, or did not", ["feed", "problem"])

Batch = Sequence[RawQuote]


class Feed(Protocol):
    name: str
    """What kind of feed it is: a word from a short list, used as a metric's label."""

    def resume(self, quotes: Mapping[str, Quote]) -> None:
        """Told once, before the first batch: the last accepted quotes by symbol. A feed that makes its prices
        up goes on from them; others need not care."""

    def settled_ns(self) -> int | None:
        """No quote stamped up to this instant is still to come; None when it can not be known."""

    def batches(self) -> AsyncGenerator[Batch, None]:
        """The quotes, in order; closed with `aclose()` when nobody wants more."""
