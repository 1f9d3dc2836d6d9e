"""Hot state as readers see it: marks, positions, sector values, quotes and assets, from Redis.

A shard's pointer (`shard:{n}`, field `epoch`) says which `marks:{n}:<epoch>` hash is valid. The pointer is
remembered and read again in the same round trip as the marks: when it has moved meanwhile, the marks just read
belong to an owner that is gone, and are read once more under the new epoch. A reader therefore pays one round
trip, and never sees a mark of an epoch older than the pointer it was told.

`read` takes everything that one operation needs and sends it as one pipeline. What is not there is absent from the
answer (a portfolio without positions, a symbol without a quote) or None (a portfolio without a mark), never zero.
A value that does not decode raises ValueError or msgspec.MsgspecError: a defect, not an outage. Redis away, frozen
or slower than `timeout_s` raises redis.exceptions.RedisError or TimeoutError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.assets import Asset, classification_decoder
from engine.marks import Mark, decode_mark
from engine.messages import Quote, quote_decoder
from engine.positions import HotPosition, hot_position_decoder
from engine.runtime.connections import RedisClient, node_name
from engine.sectors import SectorValue, sector_value_decoder
from engine.stores import redis_keys

# A pointer moves once per take-over. One that moves at every try is not a race but a fault, and is reported.
POINTER_READS_MAX = 4

# A portfolio's place in hot state: its shard and its id.
Place = tuple[int, str]


class PointerUnsettledError(RuntimeError):
    """A shard's epoch moved during each of POINTER_READS_MAX consecutive reads."""


@dataclass(frozen=True, slots=True)
class HotState:
    """What one read found. Every place asked for has an entry; only symbols with a quote have one in `quotes`."""

    marks: dict[Place, Mark | None] = field(default_factory=dict)
    positions: dict[Place, dict[str, HotPosition]] = field(default_factory=dict)
    sectors: dict[Place, dict[str, SectorValue]] = field(default_factory=dict)
    quotes: dict[str, Quote] = field(default_factory=dict)


class HotStateReads:
    def __init__(self, redis: RedisClient, timeout_s: float) -> None:
        self._redis = redis
        self._timeout_s = timeout_s
        self._epochs: dict[int, int] = {}

    async def read(
        self,
        marks: Iterable[Place] = (),
        positions: Iterable[Place] = (),
        sectors: Iterable[Place] = (),
        quotes: Iterable[str] = (),
    ) -> HotState:
        """Read all of it in one round trip, or one more for each shard whose owner changed meanwhile."""
        state = HotState()
        wanted = _by_shard(marks)
        position_places, sector_places = list(dict.fromkeys(positions)), list(dict.fromkeys(sectors))
        symbols = list(dict.fromkeys(quotes))
        async with asyncio.timeout(self._timeout_s):
            pipeline = self._redis.pipeline(transaction=False)
            tried = self._ask_marks(pipeline, wanted)
            for shard, portfolio_id in position_places:
                pipeline.hgetall(redis_keys.positions(shard, portfolio_id))
            for shard, portfolio_id in sector_places:
                pipeline.hgetall(redis_keys.sector_values(shard, portfolio_id))
            if symbols:
                pipeline.hmget(redis_keys.PRICES, symbols)
            answers = iter(await pipeline.execute() if len(pipeline) else [])
            moved = self._take_marks(state, wanted, tried, answers)
            for place in position_places:
                state.positions[place] = _positions(next(answers))
            for place in sector_places:
                state.sectors[place] = _sectors(next(answers))
            if symbols:
                state.quotes.update(_quotes(symbols, next(answers)))
            await self._read_moved(state, moved)
        return state

    def by_node(
        self, marks: Iterable[Place], quotes: Iterable[str]
    ) -> dict[str, tuple[Collection[Place], Collection[str]]]:
        """What one node has, as far as that is known, by the node's name: one may be away while others can be read."""
        parts: dict[str, tuple[list[Place], list[str]]] = {}
        for place in marks:
            parts.setdefault(node_name(self._redis, redis_keys.shard(place[0])), ([], []))[0].append(place)
        for symbol in quotes:
            parts.setdefault(node_name(self._redis, redis_keys.PRICES), ([], []))[1].append(symbol)
        return {node: (places, symbols) for node, (places, symbols) in parts.items()}

    async def mark(self, shard: int, portfolio_id: str) -> Mark | None:
        """The portfolio's mark, None when it has none yet."""
        place = (shard, portfolio_id)
        return (await self.read(marks=[place])).marks[place]

    async def marks(self, shard: int, portfolio_ids: Sequence[str]) -> dict[str, Mark | None]:
        found = await self.read(marks=[(shard, portfolio_id) for portfolio_id in portfolio_ids])
        return {portfolio_id: mark for (_, portfolio_id), mark in found.marks.items()}

    async def positions(self, shard: int, portfolio_id: str) -> dict[str, HotPosition]:
        """The open positions by symbol."""
        place = (shard, portfolio_id)
        return (await self.read(positions=[place])).positions[place]

    async def sectors(self, shard: int, portfolio_id: str) -> dict[str, SectorValue]:
        """The exact sector values at the last fill. Their weights are a ratio of these (engine.sectors), so the
        doubles of the sorted set, which are for ranking, are not read."""
        place = (shard, portfolio_id)
        return (await self.read(sectors=[place])).sectors[place]

    async def quotes(self, symbols: Iterable[str]) -> dict[str, Quote]:
        return (await self.read(quotes=symbols)).quotes

    async def assets(self, symbols: Sequence[str]) -> dict[str, Asset]:
        """The loaded ones of these assets, as they were last written."""
        async with asyncio.timeout(self._timeout_s):
            packed: list[Any] = await self._redis.hmget(redis_keys.ASSETS, list(symbols)) if symbols else []
        pairs = zip(symbols, packed, strict=True)
        return {symbol: classification_decoder.decode(one).asset(symbol) for symbol, one in pairs if one is not None}

    def _ask_marks(self, pipeline: Any, wanted: dict[int, list[str]]) -> dict[int, int]:
        tried = {shard: self._epochs.get(shard, 0) for shard in wanted}
        for shard, portfolio_ids in wanted.items():
            pipeline.hget(redis_keys.shard(shard), "epoch")
            pipeline.hmget(redis_keys.marks(shard, tried[shard]), portfolio_ids)
        return tried

    def _take_marks(
        self, state: HotState, wanted: dict[int, list[str]], tried: dict[int, int], answers: Any
    ) -> dict[int, list[str]]:
        """Take the marks read under a pointer that still holds; answer the shards whose pointer has moved."""
        moved: dict[int, list[str]] = {}
        for shard, portfolio_ids in wanted.items():
            pointer, packed = next(answers), next(answers)
            epoch = 0 if pointer is None else int(pointer)
            self._epochs[shard] = epoch
            if epoch != tried[shard]:
                moved[shard] = portfolio_ids
                continue
            for portfolio_id, mark in zip(portfolio_ids, packed, strict=True):
                state.marks[shard, portfolio_id] = None if mark is None else decode_mark(mark, epoch)
        return moved

    async def _read_moved(self, state: HotState, moved: dict[int, list[str]]) -> None:
        for _ in range(POINTER_READS_MAX):
            if not moved:
                return
            pipeline = self._redis.pipeline(transaction=False)
            tried = self._ask_marks(pipeline, moved)
            moved = self._take_marks(state, moved, tried, iter(await pipeline.execute()))
        if moved:
            raise PointerUnsettledError(f"shards {sorted(moved)} changed owner {POINTER_READS_MAX} times in one read")


def _by_shard(places: Iterable[Place]) -> dict[int, list[str]]:
    wanted: dict[int, list[str]] = {}
    for shard, portfolio_id in dict.fromkeys(places):
        wanted.setdefault(shard, []).append(portfolio_id)
    return wanted


def _positions(packed: dict[bytes, bytes]) -> dict[str, HotPosition]:
    return {symbol.decode(): hot_position_decoder.decode(value) for symbol, value in packed.items()}


def _sectors(packed: dict[bytes, bytes]) -> dict[str, SectorValue]:
    return {sector.decode(): sector_value_decoder.decode(value) for sector, value in packed.items()}


def _quotes(symbols: Sequence[str], packed: Sequence[bytes | None]) -> dict[str, Quote]:
    pairs = zip(symbols, packed, strict=True)
    return {symbol: quote_decoder.decode(value) for symbol, value in pairs if value is not None}
