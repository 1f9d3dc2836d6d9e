"""From what a feed says to what the Book may believe: the normaliser and the filter of quotes.

A feed yields `RawQuote`s. The filter judges each one, in the order of arrival, against bounded state and answers with
exactly one `Verdict`; only ACCEPTED and RENUMBERED ones become `Quote`s. Rules, in this order:

    MALFORMED         the symbol, the source, `ts_event` or `sequence` is not well-formed, or the price is not a
                      finite number above 0 within the exact range of engine.amounts (≤ 15 significant digits)
    FUTURE            `ts_event` is further ahead of now than the tolerance: time travel
    OUT_OF_SESSION    the market of the symbol's class was closed at `ts_event`, and had been for CLOSING_TOLERANCE_NS;
                      only where a filter is given markets, and never a HALTED quote
    TOO_MANY_SYMBOLS  a new symbol that `classes` does not list, while `symbols_count_max` such are known
    TOO_MANY_SOURCES  a new source while SOURCES_COUNT_MAX are known
    DUPLICATE         the newest accepted quote of this source and symbol once more, or the quarantined one, or the
                      last one of a numbering that is not taken yet
    OUT_OF_ORDER      of another source than the symbol's last accepted quote and with an older `ts_event`; or not
                      newer than the newest accepted one of this source and symbol, by `sequence` where both have
                      one, else by `ts_event`
    QUARANTINED       the price lies beyond the band around the last accepted one and nothing has confirmed it; never
                      a HALTED quote
    RENUMBERED        accepted, and the source's numbering of this symbol goes on from this lower sequence
    ACCEPTED          everything else

Order. What is accepted last is the symbol's price: whoever takes accepted quotes in this order needs no order of
their own. Sequences of two sources can not be compared, so between sources `ts_event` decides.

Numbering. A sequence far too high, or a source that begins at 1 again, must not silence a source for good. When
RESTART_QUOTES_COUNT quotes in a row of one source and symbol have sequences below the newest accepted one's, ascending
among themselves, and each a `ts_event` after it, the last of them is RENUMBERED; the ones before are OUT_OF_ORDER. A
late old quote has an old `ts_event` and breaks the row, as does a quote that goes on with the old numbering.

Band. A price is within band b of a reference r when r / (1 + b) ≤ price ≤ r × (1 + b). The first price of a symbol has
no reference and is accepted. A price beyond the band is kept aside, one per symbol. It is confirmed by a newer quote
(of the same source by its order, of another by `ts_event`) within the band of the price kept aside: that second quote
is ACCEPTED. A quote back at the old level clears it; a third level takes its place. What is kept aside does not
advance the order, so that one quote with a corrupt sequence can not lock a symbol.

Condition. A source says HALTED of a symbol whose trading is suspended, DELAYED of a price that it publishes late; what
`delayed_sources` say without a condition counts as DELAYED. A HALTED quote's own price is not believed, and may be
missing: what is handed on is the symbol's last good price with that price's instant, source and sequence, marked
HALTED, so that nothing jumps and a split still finds a price of before it. The next accepted quote that is not HALTED
ends the halt; a price beyond the band is confirmed first, as ever. Where the first quote of a symbol is HALTED there is
nothing better: its price must be well-formed, is handed on marked HALTED, and is no reference for a band. The newest
quote of a source once more but with another condition is news and no DUPLICATE.

Precision. A price given as text claims its digits, and more than the exact range holds is refused. A JSON number claims
none: nearly every writer of one prints a float64, of which 15 significant digits are what was meant and the 16th and
17th are how it was stored. `trim_number` drops those at the feed's boundary, where the feed counts it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Context, Decimal
from enum import StrEnum

from msgspec.structs import replace

from engine.amounts import DECIMALS_MAX, DIGITS_MAX, AmountError, parse_number, plain
from engine.assets import AssetClass
from engine.instants import SECOND_NS
from engine.markets import Markets
from engine.messages import Condition, EventRejected, Quote, check_symbol

SOURCES_COUNT_MAX = 16  # a process reads one feed; a feed that relays others names a handful
# The official close is published a few minutes after a session has closed.
CLOSING_TOLERANCE_NS = 15 * 60 * SECOND_NS
SEQUENCE_MAX = 2**63 - 1  # what a signed 64-bit wire field holds
# One or two may be strays with a wrong instant; a source that began anew is heard again with its third quote.
RESTART_QUOTES_COUNT = 3

# How far one quote may lie from the one before it. Real moves are confirmed by the next quote, so a band
# costs a real move one tick; it is as narrow as ordinary movement between two quotes allows, also of a slow
# feed.
BANDS: Mapping[AssetClass, Decimal] = {
    # In a year of daily open, low, high and close of 504 US equities, 44 of 535,608 steps are wider (17 of
    # them splits and overnight news) and none is still unconfirmed at the close; at 0.20 two are.
    AssetClass.EQUITY: Decimal("0.25"),
    # No exchange halts crypto: drops of a fifth within minutes have happened on every venue.
    AssetClass.CRYPTO: Decimal("0.30"),
    # Futures exchanges limit a session's move in most commodities to well under this.
    AssetClass.COMMODITY: Decimal("0.20"),
    # Nobody has said what it is, so only gross errors are held back.
    AssetClass.UNCLASSIFIED: Decimal("0.50"),
}

HALTED: Condition = "HALTED"
DELAYED: Condition = "DELAYED"
_TRIM = Context(prec=DIGITS_MAX, rounding=ROUND_HALF_EVEN, traps=[])
_SMALLEST = Decimal(1).scaleb(-DECIMALS_MAX)


class Verdict(StrEnum):
    ACCEPTED = "ACCEPTED"
    RENUMBERED = "RENUMBERED"
    DUPLICATE = "DUPLICATE"
    OUT_OF_ORDER = "OUT_OF_ORDER"
    MALFORMED = "MALFORMED"
    FUTURE = "FUTURE"
    OUT_OF_SESSION = "OUT_OF_SESSION"
    QUARANTINED = "QUARANTINED"
    TOO_MANY_SYMBOLS = "TOO_MANY_SYMBOLS"
    TOO_MANY_SOURCES = "TOO_MANY_SOURCES"


@dataclass(frozen=True, slots=True)
class RawQuote:
    """One price as a feed gave it: nothing about it is known to be true. `price` is text, "" where HALTED has none."""

    symbol: str
    price: str
    ts_event_ns: int
    source: str
    sequence: int | None = None
    condition: Condition = ""


@dataclass(slots=True)
class _Restart:
    """Quotes in a row of one source that look like a new numbering: the last one and how many."""

    last: Quote
    count: int


@dataclass(slots=True)
class _Known:
    """What the filter remembers of one symbol: at most two quotes per source, one kept aside and two accepted."""

    reach: Decimal  # 1 + the band
    price: Decimal | None = None  # the band's reference; None as long as no price was believed
    last: Quote | None = None
    """Accepted last, as it came: what decides between sources."""
    shown: Quote | None = None
    """Handed on last: the symbol's price."""
    newest: dict[str, Quote] = field(default_factory=dict)
    restarts: dict[str, _Restart] = field(default_factory=dict)
    aside: Quote | None = None

    def within(self, price: Decimal, reference: Decimal) -> bool:
        # 15 digits times 3 stay below Decimal's 28: these products are exact.
        return price <= reference * self.reach and reference <= price * self.reach

    def accept(self, quote: Quote, price: Decimal) -> Quote:
        """Answers what to hand on."""
        self.last = self.newest[quote.source] = quote
        self.restarts.pop(quote.source, None)
        self.aside = None
        if quote.condition == HALTED:
            self.shown = replace(self.shown or quote, condition=HALTED)
        else:
            self.price, self.shown = price, quote
        return self.shown


class QuoteFilter:
    """Judges quotes; holds at most (the symbols of `classes` + `symbols_count_max` others) × SOURCES_COUNT_MAX × 2.

    The limit counts unheard-of symbols alone, so that a flood of them leaves room for every listed one. With `markets`
    quotes from outside of their sessions are refused.
    """

    def __init__(
        self,
        classes: Mapping[str, AssetClass],
        symbols_count_max: int,
        future_tolerance_ns: int,
        delayed_sources: Collection[str] = (),
        markets: Markets | None = None,
    ) -> None:
        self._listed = frozenset(classes)
        self._classes = classes
        self._symbols_count_max = symbols_count_max
        self._future_tolerance_ns = future_tolerance_ns
        self._delayed_sources = frozenset(delayed_sources)
        self._markets = markets
        self._known: dict[str, _Known] = {}
        self._unheard_of_count = 0
        self._sources: set[str] = set()

    def restore(self, quotes: Iterable[Quote], now_ns: int) -> int:
        """Remember what was accepted before this process began; answers how many quotes were taken.

        One stamped in the future is left out: it comes from another run of a recorded market, and remembering
        it would make every quote of this run look old. The price of a HALTED one is the last good price.
        """
        taken = 0
        for quote in quotes:
            raw = RawQuote(quote.symbol, quote.price, quote.ts_event_ns, quote.source, quote.sequence, quote.condition)
            _, accepted = self._judge(raw, now_ns, None)
            if accepted is not None:
                self._known[quote.symbol].price = Decimal(accepted.price)
                taken += 1
        return taken

    def classify(self, classes: Mapping[str, AssetClass]) -> None:
        """From now on these are the symbols' classes; what else has room stays as it was."""
        self._classes = classes
        for symbol, known in self._known.items():
            known.reach = 1 + BANDS[self._class_of(symbol)]

    def latest(self) -> dict[str, Quote]:
        """The last accepted quote of every symbol, as it was handed on."""
        return {symbol: known.shown for symbol, known in self._known.items() if known.shown is not None}

    @property
    def symbols_count(self) -> int:
        return len(self._known)

    def judge(self, raw: RawQuote, now_ns: int) -> tuple[Verdict, Quote | None]:
        """The verdict on one quote; what is handed on of an accepted one, or None when it is refused."""
        return self._judge(raw, now_ns, self._markets)

    def _judge(self, raw: RawQuote, now_ns: int, markets: Markets | None) -> tuple[Verdict, Quote | None]:
        known = self._known.get(raw.symbol)
        price = self._well_formed_price(raw, known)
        if price is None:
            return Verdict.MALFORMED, None
        if raw.ts_event_ns > now_ns + self._future_tolerance_ns:
            return Verdict.FUTURE, None
        if markets is not None and raw.condition != HALTED and self._out_of_session(raw, markets):
            return Verdict.OUT_OF_SESSION, None
        if known is None and not self._has_room(raw.symbol):
            return Verdict.TOO_MANY_SYMBOLS, None
        if raw.source not in self._sources and len(self._sources) >= SOURCES_COUNT_MAX:
            return Verdict.TOO_MANY_SOURCES, None
        condition = raw.condition or (DELAYED if raw.source in self._delayed_sources else "")
        quote = Quote(raw.symbol, plain(price), raw.ts_event_ns, raw.source, raw.sequence, condition)
        verdict = Verdict.ACCEPTED
        if known is None:
            known = self._add(raw.symbol)
        else:
            verdict = _judge_order(known, quote)
            if verdict not in (Verdict.ACCEPTED, Verdict.RENUMBERED):
                return verdict, None
            if not _passes_band(known, quote, price):
                return Verdict.QUARANTINED, None
        self._sources.add(raw.source)
        return verdict, known.accept(quote, price)

    def _has_room(self, symbol: str) -> bool:
        return symbol in self._listed or self._unheard_of_count < self._symbols_count_max

    def _class_of(self, symbol: str) -> AssetClass:
        return self._classes.get(symbol, AssetClass.UNCLASSIFIED)

    def _out_of_session(self, raw: RawQuote, markets: Markets) -> bool:
        sessions = markets.sessions(self._class_of(raw.symbol))
        if sessions is None or sessions.is_open(raw.ts_event_ns):
            return False
        return raw.ts_event_ns > sessions.last_close(raw.ts_event_ns) + CLOSING_TOLERANCE_NS

    def _add(self, symbol: str) -> _Known:
        self._unheard_of_count += symbol not in self._listed
        known = self._known[symbol] = _Known(1 + BANDS[self._class_of(symbol)])
        return known

    def _well_formed_price(self, raw: RawQuote, known: _Known | None) -> Decimal | None:
        """The price, of a HALTED quote the one known already; None when anything is malformed."""
        if raw.ts_event_ns <= 0:
            return None
        if raw.sequence is not None and not 0 <= raw.sequence <= SEQUENCE_MAX:
            return None
        try:
            # What is known already was checked when it came first.
            if known is None:
                check_symbol(raw.symbol)
            if raw.source not in self._sources:
                check_symbol(raw.source)
            if raw.condition == HALTED and known is not None and known.shown is not None:
                return Decimal(known.shown.price)
            price = parse_number(raw.price, "price")
        except (AmountError, EventRejected):
            return None
        return price if price > 0 else None


def trim_number(number: Decimal) -> Decimal:
    """A JSON number at 15 significant digits and 12 decimals, half-even; one within them is left as it is."""
    if not number.is_finite():
        return number
    trimmed = _TRIM.plus(number)
    exponent = trimmed.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -DECIMALS_MAX:
        trimmed = trimmed.quantize(_SMALLEST, context=_TRIM)
    return number if trimmed == number else trimmed


def _judge_order(known: _Known, quote: Quote) -> Verdict:
    """ACCEPTED or RENUMBERED when the quote's turn has come, else why not."""
    newest = known.newest.get(quote.source)
    if quote in (known.aside, newest):
        return Verdict.DUPLICATE
    last = known.last
    if last is not None and quote.source != last.source and quote.ts_event_ns < last.ts_event_ns:
        return Verdict.OUT_OF_ORDER
    if newest is None or _newer(quote, newest) or _says_otherwise(quote, newest):
        known.restarts.pop(quote.source, None)
        return Verdict.ACCEPTED
    return _judge_numbering(known, quote, newest)


def _judge_numbering(known: _Known, quote: Quote, newest: Quote) -> Verdict:
    """Judge a quote that is not newer than its source's newest one: it may belong to a new numbering.

    The row is kept until a quote is accepted, so that a price beyond the band can be confirmed by the next one.
    """
    row = known.restarts.get(quote.source)
    if row is not None and quote == row.last:
        return Verdict.DUPLICATE
    if not _below(quote, newest) or quote.ts_event_ns <= newest.ts_event_ns:
        known.restarts.pop(quote.source, None)
        return Verdict.OUT_OF_ORDER
    count = row.count + 1 if row is not None and _below(row.last, quote) else 1
    known.restarts[quote.source] = _Restart(quote, count)
    return Verdict.RENUMBERED if count >= RESTART_QUOTES_COUNT else Verdict.OUT_OF_ORDER


def _passes_band(known: _Known, quote: Quote, price: Decimal) -> bool:
    """Whether the price is within the band or confirmed; one that is neither is kept aside."""
    if known.price is None or known.within(price, known.price):
        return True
    aside = known.aside
    if aside is not None and _newer(quote, aside) and known.within(price, Decimal(aside.price)):
        return True
    known.aside = quote
    return False


def _says_otherwise(quote: Quote, newest: Quote) -> bool:
    """The same quote of the same instant under another condition."""
    at = (newest.sequence, newest.ts_event_ns)
    return quote.condition != newest.condition and (quote.sequence, quote.ts_event_ns) == at


def _below(quote: Quote, other: Quote) -> bool:
    return quote.sequence is not None and other.sequence is not None and quote.sequence < other.sequence


def _newer(quote: Quote, other: Quote) -> bool:
    if quote.sequence is not None and other.sequence is not None and quote.source == other.source:
        return quote.sequence > other.sequence
    return quote.ts_event_ns > other.ts_event_ns
