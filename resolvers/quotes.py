"""Quotes as a stream: the last accepted price of up to 200 symbols."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal

import strawberry

from engine.instants import SECOND_NS, to_datetime
from engine.markets import quality_of
from engine.messages import EventRejected, check_symbol
from engine.messages import Quote as EngineQuote
from resolvers.context import SCOPE_PORTFOLIO_READ, Context, Info
from resolvers.enums import MarkQuality
from resolvers.errors import ErrorCode, PublicError
from resolvers.stream_kind import StreamKind
from resolvers.streams import RATE_HZ_DEFAULT, make_pace

SYMBOLS_COUNT_MAX = 200


@strawberry.type(description="The last accepted price of an asset.")
class Quote:
    symbol: str = strawberry.field(description="What is priced.")
    price: Decimal = strawberry.field(description="Price per unit in the quote's currency, above 0.")
    as_of: datetime = strawberry.field(description="When it was quoted, as its source says.")
    source: str = strawberry.field(description="The feed that it came from.")
    quality: MarkQuality = strawberry.field(description="How good the price is now, by the asset's class and hours.")


@strawberry.type(description="A message of quotes: the newest quote of each symbol quoted since the last message.")
class QuoteUpdate:
    kind: StreamKind = strawberry.field(description="Why this message was sent.")
    quotes: list[Quote] = strawberry.field(
        description=(
            "The quotes that are new, by symbol; all known ones with SNAPSHOT, none with HEARTBEAT, and perhaps none "
            "with an UPDATE after an outage."
        )
    )
    conflated: int = strawberry.field(description="How many quotes this message stands for; 0 for HEARTBEAT.")


async def quote_updates(
    info: Info, symbols: list[str], max_rate_hz: float | None = RATE_HZ_DEFAULT
) -> AsyncIterator[QuoteUpdate]:
    context = info.context
    context.require(SCOPE_PORTFOLIO_READ)
    wanted = _check_symbols(symbols)
    signal = asyncio.Event()
    pace = make_pace(context, max_rate_hz, signal)
    kind = StreamKind.SNAPSHOT
    withheld = False
    with context.services.hub.watch_quotes(wanted, signal) as watch:
        while True:
            changed = await pace.changed()
            taken = watch.take() if changed else None
            resumed = withheld and watch.current
            if taken is not None and (taken[0] or kind is StreamKind.SNAPSHOT or resumed):
                withheld = withheld and not resumed
                pace.sending()
                yield QuoteUpdate(kind=kind, quotes=_show(context, taken[0]), conflated=taken[1])
                kind = StreamKind.UPDATE
            elif not changed and not watch.current:
                withheld = kind is StreamKind.UPDATE
            elif not changed and kind is StreamKind.UPDATE:
                pace.sending()
                yield QuoteUpdate(kind=StreamKind.HEARTBEAT, quotes=[], conflated=0)


def _check_symbols(symbols: list[str]) -> list[str]:
    """Raises PublicError TOO_MANY_SYMBOLS, BAD_IDENTIFIER."""
    if not 1 <= len(symbols) <= SYMBOLS_COUNT_MAX:
        raise PublicError(ErrorCode.TOO_MANY_SYMBOLS, f"symbols has 1 to {SYMBOLS_COUNT_MAX} entries")
    try:
        for symbol in symbols:
            check_symbol(symbol)
    except EventRejected as error:
        raise PublicError(error.code, str(error)) from None
    return sorted(set(symbols))


def _show(context: Context, quotes: dict[str, EngineQuote]) -> list[Quote]:
    services = context.services
    now_ns, stale_after_ns = services.clock.now_ns(), services.settings.stale_after_s * SECOND_NS
    sessions = services.assets.sessions
    return [
        Quote(
            symbol=symbol,
            price=Decimal(quote.price),
            as_of=to_datetime(quote.ts_event_ns),
            source=quote.source,
            quality=quality_of(quote.ts_event_ns, quote.condition, sessions(symbol), now_ns, stale_after_ns),
        )
        for symbol, quote in sorted(quotes.items())
    ]
