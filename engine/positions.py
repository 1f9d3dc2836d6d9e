"""An open position and its valuation at a quote.

    value          = round(quantity × price × 10⁶)                      signed like the quantity
    cost           = Σ signed notionals of the open quantity            average cost = cost / quantity
    unrealized     = value − cost
    day_pnl        = value − day_base,  day_base = value at the cut + Σ signed notionals traded since
    weight         = value / NAV

A position that never had a price is carried at its cost and flagged MISSING: its price is None, its P&L 0 because
nothing is known to have moved. A position opened today has a day base of its notional alone.

The quantity is in the shares of today. A quote stamped before a split is a price of other shares and divided by the
split's ratio; one that vanishes by that, or leaves the exact range, is none.

Quality is engine.markets'. The share of a quality is Σ |value| of its positions / Σ |value| of all, so shares are ≥ 0
and sum to 1 also with short positions; positions worth nothing have no shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

import msgspec

from engine.amounts import EXACT, AmountError, average, ratio, value_micro
from engine.corporate_actions import Split, parse_scale, price_after
from engine.instants import to_datetime
from engine.markets import quality_of
from engine.marks import MarkQuality
from engine.messages import Quote
from engine.sessions import Sessions


class HotPosition(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A position as hot state keeps it. `quantity` is plain decimal text; amounts are micro-units.

    `realized` and `fees` are of the cycle that began with the ledger entry `opened_sequence`. `splits` are those in
    `quantity` already, (effective instant in ns, new:old): a quote stamped before one is divided by its ratio.
    """

    quantity: str
    cost: int
    realized: int
    day_base: int
    opened_at_ns: int
    fees: int = 0
    opened_sequence: int = 0
    splits: tuple[tuple[int, str], ...] = ()


hot_position_encoder = msgspec.msgpack.Encoder()
hot_position_decoder: msgspec.msgpack.Decoder[HotPosition] = msgspec.msgpack.Decoder(HotPosition)


class PositionValuation(msgspec.Struct, frozen=True, gc=False):
    """One position at one quote, of a portfolio worth `nav`. Amounts in micro-units; ratios are fractions; None is
    unknown."""

    symbol: str
    opened_sequence: int
    quantity: Decimal
    price: Decimal | None
    price_as_of_ns: int | None
    quality: MarkQuality
    cost: int
    value: int
    realized: int
    day_pnl: int
    nav: int

    @property
    def average_cost(self) -> Decimal:
        return average(self.cost, self.quantity)

    @property
    def unrealized(self) -> int:
        return self.value - self.cost

    @property
    def unrealized_ratio(self) -> Decimal | None:
        return ratio(self.unrealized, abs(self.cost))

    @property
    def weight(self) -> Decimal | None:
        return ratio(self.value, self.nav)


@dataclass(frozen=True, slots=True)
class QualityShare:
    """The positions whose price is of one quality: Σ |value| in micro-units, and its part of the whole."""

    quality: MarkQuality
    value: int
    share: Decimal


def value_position(
    symbol: str,
    hot: HotPosition,
    quote: Quote | None,
    nav: int,
    now_ns: int,
    stale_after_ns: int,
    sessions: Sessions | None = None,
) -> PositionValuation:
    """Value `hot` at `quote`; `nav` (micro-units) is the whole that its weight is a part of.

    `sessions` are those of the asset's class; without them its market never closes.
    """
    quantity = Decimal(hot.quantity)
    price = None if quote is None else todays_price(quote, hot.splits)
    if quote is None or price is None:
        price_as_of_ns, quality = None, MarkQuality.MISSING
    else:
        price_as_of_ns = quote.ts_event_ns
        quality = quality_of(price_as_of_ns, quote.condition, sessions, now_ns, stale_after_ns)
    value = carried_value(quantity, hot.cost, price)
    return PositionValuation(
        symbol=symbol,
        opened_sequence=hot.opened_sequence,
        quantity=quantity,
        price=price,
        price_as_of_ns=price_as_of_ns,
        quality=quality,
        cost=hot.cost,
        value=value,
        realized=hot.realized,
        day_pnl=value - hot.day_base,
        nav=nav,
    )


def todays_price(quote: Quote, splits: tuple[tuple[int, str], ...]) -> Decimal | None:
    """The quote's price in shares after `splits` (of HotPosition); None when nothing is left of it."""
    price = Decimal(quote.price)
    if not splits:
        return price
    try:
        return price_after(price, quote.ts_event_ns, _parse_splits(splits)) or None
    except AmountError:
        return None


@lru_cache(maxsize=4_096)
def _parse_splits(splits: tuple[tuple[int, str], ...]) -> tuple[Split, ...]:
    return tuple(Split(to_datetime(effective_at_ns), parse_scale(scale)) for effective_at_ns, scale in splits)


def quality_shares(positions: Iterable[PositionValuation]) -> list[QualityShare]:
    """The shares of the qualities that occur, best first; none when the positions are worth nothing."""
    sums: dict[MarkQuality, int] = {}
    for position in positions:
        sums[position.quality] = sums.get(position.quality, 0) + abs(position.value)
    whole = Decimal(sum(sums.values()))
    if not whole:
        return []
    return [
        QualityShare(quality, value, EXACT.divide(Decimal(value), whole)) for quality, value in sorted(sums.items())
    ]


def carried_value(quantity: Decimal, cost: int, price: Decimal | None) -> int:
    """What a position counts for: its value, or its cost without a price or at one beyond the exact range."""
    if price is None:
        return cost
    try:
        return value_micro(quantity, price)
    except AmountError:
        return cost
