"""An open position and its valuation at a quote.

    value          = round(quantity × price × 10⁶)                      signed like the quantity
    cost           = Σ signed notionals of the open quantity            average cost = cost / quantity
    unrealized     = value − cost
    day_pnl        = value − day_base,  day_base = value at the cut + Σ signed notionals traded since
    weight         = value / NAV

A position that never had a price is carried at its cost and flagged MISSING: its price is None, its P&L 0 because
nothing is known to have moved. A position opened today has a day base of its notional alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import msgspec

from engine.amounts import AmountError, average, ratio, value_micro
from engine.marks import MarkQuality
from engine.messages import Quote


class HotPosition(msgspec.Struct, frozen=True, array_like=True):
    """A position as hot state keeps it. `quantity` is plain decimal text; amounts are micro-units."""

    quantity: str
    cost: int
    realized: int
    day_base: int
    opened_at_ns: int


hot_position_encoder = msgspec.msgpack.Encoder()
hot_position_decoder: msgspec.msgpack.Decoder[HotPosition] = msgspec.msgpack.Decoder(HotPosition)


@dataclass(frozen=True, slots=True)
class PositionValuation:
    """One position at one quote. Amounts in micro-units; ratios are fractions; None is unknown."""

    symbol: str
    quantity: Decimal
    average_cost: Decimal
    price: Decimal | None
    price_as_of_ns: int | None
    quality: MarkQuality
    cost: int
    value: int
    unrealized: int
    unrealized_ratio: Decimal | None
    realized: int
    day_pnl: int
    weight: Decimal | None


def value_position(
    symbol: str, hot: HotPosition, quote: Quote | None, nav: int, now_ns: int, stale_after_ns: int
) -> PositionValuation:
    """Value `hot` at `quote`; `nav` (micro-units) is the whole that its weight is a part of."""
    quantity = Decimal(hot.quantity)
    price = Decimal(quote.price) if quote else None
    value = carried_value(quantity, hot.cost, price)
    return PositionValuation(
        symbol=symbol,
        quantity=quantity,
        average_cost=average(hot.cost, quantity),
        price=price,
        price_as_of_ns=quote.ts_event_ns if quote else None,
        quality=quality_of(quote.ts_event_ns if quote else None, now_ns, stale_after_ns),
        cost=hot.cost,
        value=value,
        unrealized=value - hot.cost,
        unrealized_ratio=ratio(value - hot.cost, abs(hot.cost)),
        realized=hot.realized,
        day_pnl=value - hot.day_base,
        weight=ratio(value, nav),
    )


def carried_value(quantity: Decimal, cost: int, price: Decimal | None) -> int:
    """What a position counts for: its value, or its cost without a price or at one beyond the exact range."""
    if price is None:
        return cost
    try:
        return value_micro(quantity, price)
    except AmountError:
        return cost


def quality_of(ts_event_ns: int | None, now_ns: int, stale_after_ns: int) -> MarkQuality:
    """The quality of a price stamped `ts_event_ns` (None: there never was one), seen at `now_ns`."""
    if ts_event_ns is None:
        return MarkQuality.MISSING
    return MarkQuality.STALE if now_ns - ts_event_ns > stale_after_ns else MarkQuality.LIVE
