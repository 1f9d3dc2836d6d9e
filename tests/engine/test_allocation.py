"""The allocation that hot state is told equals one made from scratch, after any sequence of fills and prices.

From scratch: the fills of all time summed by hand, valued at the newest prices, grouped; nothing of the Book's.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from engine.posting import allocation
from engine.sectors import SectorValue, ranks_of
from tests.bookkeeping import SECTORS, Bookkeeping, cash, fill, opening
from tests.oracle import MICRO

PRICES = st.integers(1, 10**9).map(lambda micro: Decimal(micro) / 1_000)
FILLS = st.tuples(st.sampled_from(sorted(SECTORS)), st.sampled_from(["BUY", "SELL"]), st.integers(1, 900), PRICES)
TICKS = st.tuples(st.sampled_from(sorted(SECTORS)), PRICES)


class FromScratch:
    def __init__(self) -> None:
        self.fills: list[tuple[str, int]] = []
        self.prices: dict[str, Decimal] = {}

    def sectors(self) -> dict[str, SectorValue]:
        quantities = {symbol: sum(signed for of, signed in self.fills if of == symbol) for symbol, _ in self.fills}
        values = {symbol: int(self.prices[symbol] * held * MICRO) for symbol, held in quantities.items() if held}
        names = {SECTORS[symbol] for symbol in values}
        return {name: self._sum([values[symbol] for symbol in values if SECTORS[symbol] == name]) for name in names}

    def _sum(self, values: list[int]) -> SectorValue:
        return SectorValue(sum(values), sum(map(abs, values)))


@examples(max_examples=60)
@given(st.lists(st.one_of(FILLS, TICKS), max_size=25))
def test_it_equals_one_from_scratch_after_every_step(
    steps: list[tuple[str, Decimal] | tuple[str, str, int, Decimal]],
) -> None:
    kept, scratch = Bookkeeping(), FromScratch()
    kept.send(opening("p-1"), cash("p-1", "DEPOSIT", "1000", "d"))
    for symbol in SECTORS:
        kept.tick(symbol, "7.25")
        scratch.prices[symbol] = Decimal("7.25")
    for number, step in enumerate(steps):
        if len(step) == 2:
            symbol, price = step
            kept.tick(symbol, str(price))
            scratch.prices[symbol] = price
        else:
            symbol, side, quantity, price = step
            kept.send(fill("p-1", side, str(quantity), str(price), f"f-{number}", symbol=symbol))
            scratch.fills.append((symbol, quantity if side == "BUY" else -quantity))
            (change,) = kept.changes
            assert change.sectors == scratch.sectors()
        found = allocation(kept.book, "p-1", kept.sector_of)
        assert found == scratch.sectors()
        ranks = ranks_of(found)
        assert bool(ranks) == bool(found)
        assert not ranks or abs(sum(map(Fraction, ranks.values())) - 1) <= Fraction(1, 10**12)
