"""The simulated feed: correlated geometric Brownian motion over the catalogue. Invented, and repeatable by seed.

Every STEP_MS each asset's logarithmic price takes a step

    Δ ln S = −σ²Δt/2 + σ √Δt (√m · M + √s · Z_sector + √(1 − m − s) · Z_asset)        M, Z: standard normal

with σ the class's yearly volatility, m = MARKET_SHARE_PERCENT and s = SECTOR_SHARE_PERCENT of the variance;
so two assets of one sector correlate by m + s, any two by m. A year is 365 × 24 h of wall time for every
class: the simulated market never closes. `liveliness` multiplies Δt: at 1 a calm day's prices hardly move
while one watches, so the default makes a minute look like LIVELINESS minutes.

Who is quoted in a step is drawn too: as many assets as the total rate asks for, the k-th of the catalogue
with weight 1/√k, each at most once per step. At 200 quotes a second over 60 assets the first ticks about ten
times a second and the last about once or twice.

Sequences begin at the microseconds of the clock and grow by one per quote, so a restarted feed is newer than
the one before it. Prices start at round numbers of the right magnitude (START_PRICES) or, with `resume`,
where they were. Same seed, same clock and same restarts: same quotes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.assets import Asset, AssetClass
from engine.messages import Quote
from engine.quotes import RawQuote
from engine.runtime.clock import Clock
from workers.feeds import Batch

STEP_MS = 50
QUOTES_PER_S = 200
LIVELINESS = 60
MARKET_SHARE_PERCENT = 30
SECTOR_SHARE_PERCENT = 20
VOLATILITY_PERCENT = {
    AssetClass.EQUITY: 28,
    AssetClass.CRYPTO: 70,
    AssetClass.COMMODITY: 24,
    AssetClass.UNCLASSIFIED: 40,
}
START_PRICE = "100"  # of an asset that START_PRICES does not list
START_PRICES_TEXT = """
    AAPL 230 MSFT 430 NVDA 140 AVGO 180 ORCL 170 GOOGL 175 META 570 NFLX 700 DIS 100 AMZN 200 TSLA 250 HD 400
    MCD 300 WMT 80 PG 170 KO 65 COST 900 JPM 220 V 280 BRK.B 460 GS 500 LLY 850 JNJ 160 UNH 550 PFE 28 XOM 120
    CVX 150 CAT 390 BA 155 UPS 135 GE 180 LIN 460 FCX 46 NEM 48 NEE 80 DUK 115 AMT 220 PLD 115
    BTC-USD 68000 ETH-USD 2600 SOL-USD 165 ADA-USD 0.36 AVAX-USD 27 DOT-USD 4.2 ARB-USD 0.55 UNI-USD 7.8
    AAVE-USD 150 LINK-USD 11 XRP-USD 0.52 LTC-USD 70 DOGE-USD 0.14
    XAU-USD 2700 XAG-USD 33 XPT-USD 1000 COPPER-USD 4.3 WTI-USD 70 BRENT-USD 75 NATGAS-USD 2.3 WHEAT-USD 5.7
    COFFEE-USD 2.5
"""
START_PRICES = dict(zip(START_PRICES_TEXT.split()[::2], START_PRICES_TEXT.split()[1::2], strict=True))
_YEAR_MS = 365 * 86_400 * 1_000

Floats = NDArray[np.float64]


class SimulatedFeed:
    """Invented quotes for `assets`; `quotes_per_s` in total. Raises ValueError for a rate it can not reach."""

    name = "simulated"

    def __init__(self, assets: Sequence[Asset], clock: Clock, seed: int, quotes_per_s: int = QUOTES_PER_S) -> None:
        quotes_per_s_max = len(assets) * 1_000 // STEP_MS
        if not 1 <= quotes_per_s <= quotes_per_s_max:
            raise ValueError(f"a simulated feed of {len(assets)} assets makes 1 to {quotes_per_s_max} quotes/s")
        self._clock = clock
        self._random = np.random.default_rng(seed)
        self._symbols = [asset.symbol for asset in assets]
        self._logs = np.log([float(START_PRICES.get(symbol, START_PRICE)) for symbol in self._symbols])
        self._volatility = np.array([VOLATILITY_PERCENT[asset.asset_class] for asset in assets]) / 100
        self._sector_of = np.unique([asset.sector for asset in assets], return_inverse=True)[1]
        self._log_weights = -np.log(np.arange(1, len(assets) + 1)) / 2
        self._quotes_per_step = quotes_per_s * STEP_MS / 1_000
        self._owed = 0.0
        self._sequence = 0

    def resume(self, quotes: Mapping[str, Quote]) -> None:
        """Go on from the prices of the process before."""
        for index, symbol in enumerate(self._symbols):
            if symbol in quotes:
                self._logs[index] = math.log(float(quotes[symbol].price))

    def settled_ns(self) -> int | None:
        """Not known: prices are drawn when they are sent."""
        return None

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """One batch per step, for ever. A loop that was held up goes on without making the lost steps up."""
        step_s = STEP_MS / 1_000
        due_s = time.monotonic()
        while True:
            yield self.step()
            due_s = max(due_s + step_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    def step(self) -> Batch:
        """Move every price by one step and quote some of them."""
        self._logs += self._moves()
        now_ns = self._clock.now_ns()
        self._sequence = max(self._sequence, now_ns // 1_000)
        batch = []
        for index in self._drawn():
            self._sequence += 1
            price = price_text(math.exp(self._logs[index]))
            batch.append(RawQuote(self._symbols[index], price, now_ns, self.name, self._sequence))
        return batch

    def _moves(self) -> Floats:
        years = STEP_MS * LIVELINESS / _YEAR_MS
        market = self._random.standard_normal()
        sector = self._random.standard_normal(int(self._sector_of.max()) + 1)[self._sector_of]
        own = self._random.standard_normal(len(self._symbols))
        own_share_percent = 100 - MARKET_SHARE_PERCENT - SECTOR_SHARE_PERCENT
        shock = (
            math.sqrt(MARKET_SHARE_PERCENT / 100) * market
            + math.sqrt(SECTOR_SHARE_PERCENT / 100) * sector
            + math.sqrt(own_share_percent / 100) * own
        )
        moves: Floats = self._volatility * math.sqrt(years) * shock - self._volatility**2 * years / 2
        return moves

    def _drawn(self) -> list[int]:
        """Weighted draw without replacement (Gumbel top-k): the largest of log weight + Gumbel noise."""
        self._owed += self._quotes_per_step
        count = int(self._owed)
        self._owed -= count
        keys = self._log_weights + self._random.gumbel(size=len(self._symbols))
        drawn: list[int] = np.argsort(-keys)[:count].tolist()
        return drawn


def price_text(price: float) -> str:
    """A simulated price as a market prints it: cents from 1 upwards, six decimals below."""
    return f"{price:.2f}" if price >= 1 else f"{price:.6f}"
