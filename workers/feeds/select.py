"""Which feed a specification names.

simulated[:RATE]        invented prices of the catalogue, RATE quotes per second in total (200)
replay:FILE[@SPEED]     recorded daily bars, SPEED market days per second (1); needs the market clock
ws:URL                  JSON quotes from a WebSocket server; ws://… and wss://… alone mean the same
coinbase[:URL]          the exchange's tickers for the catalogue's crypto assets
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.assets import Asset, AssetClass, load_catalogue
from engine.runtime.clock import Clock, MarketClock
from workers.feeds import Feed
from workers.feeds.coinbase import PUBLIC_URL, CoinbaseFeed
from workers.feeds.replay import ReplayFeed, parse_replay
from workers.feeds.simulated import QUOTES_PER_S, SimulatedFeed
from workers.feeds.websocket import WebSocketFeed

SEED = 7  # of a simulation that was given none: the same one every time


def make_feed(spec: str, clock: Clock, seed: int | None = None) -> Feed:
    """The feed that `spec` names. Raises ValueError with a message for the user."""
    if spec.startswith(("ws://", "wss://")):
        return WebSocketFeed(spec)
    kind, _, rest = spec.partition(":")
    if kind == "simulated":
        return _simulated(rest, clock, SEED if seed is None else seed)
    if kind == "replay":
        return _replay(rest, clock)
    if kind == "ws" and rest:
        return WebSocketFeed(rest)
    if kind == "coinbase":
        return CoinbaseFeed(rest or PUBLIC_URL, coinbase_products(load_catalogue().values()))
    raise ValueError(f"unknown feed {spec!r}: simulated[:RATE], replay:FILE[@SPEED], ws:URL or coinbase[:URL]")


def coinbase_products(assets: Iterable[Asset]) -> list[str]:
    """The catalogue names crypto assets as the exchange does."""
    return [asset.symbol for asset in assets if asset.asset_class is AssetClass.CRYPTO]


def _simulated(rate: str, clock: Clock, seed: int) -> Feed:
    if rate and not (rate.isascii() and rate.isdigit()):
        raise ValueError(f"a simulated feed's rate is a whole number of quotes per second, not {rate!r}")
    return SimulatedFeed(list(load_catalogue().values()), clock, seed, int(rate) if rate else QUOTES_PER_S)


def _replay(rest: str, clock: Clock) -> Feed:
    path, _ = parse_replay(rest)
    if not isinstance(clock, MarketClock):
        raise ValueError("this system runs on wall time: start it with `navstream up --feed replay:FILE[@SPEED]`")
    try:
        return ReplayFeed(path, clock)
    except OSError as error:
        raise ValueError(f"can not read {path}: {error.strerror or error}") from None
