"""Interest: what this API process has somebody watching, told to the evaluators that write it.

Watched portfolios reach hot state at the full rate and come in frames; of the others evaluators say nothing on a
channel. So a new watch is told at once (several within TELL_INTERVAL_MS together), and all of them every
`interest_interval_ms`, which is what an evaluator goes by that has just begun to listen or has lost a frame. A process
that says nothing for EXPIRY_INTERVALS intervals is forgotten. Of a cluster one node may be away: the
others are told.

A watch that ends is told by the next complete frame: a portfolio that is written too often for a moment costs little.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from engine.messages import InterestFrame, interest_encoder
from engine.runtime.connections import AWAY, Outage, RedisClient, node_name
from engine.runtime.settings import Settings
from engine.stores import redis_keys

TELL_INTERVAL_MS = 25  # a page opens its subscriptions within this, and a storm of them makes 40 frames a second
EXPIRY_INTERVALS = 3  # two complete frames may be lost


class Watches(Protocol):
    """What is asked of the hub. `watch_signal` is set when something new is watched, and may be set for less."""

    watch_signal: asyncio.Event

    def shards(self) -> set[int]: ...

    def watched(self, shard: int) -> Collection[bytes]: ...


class InterestTeller:
    def __init__(self, redis: RedisClient, hub: Watches, settings: Settings) -> None:
        self._redis = redis
        self._hub = hub
        self._interval_s = settings.interest_interval_ms / 1_000
        self._expires_in_ms = EXPIRY_INTERVALS * settings.interest_interval_ms
        self._node = uuid.uuid4().hex
        self._told: dict[int, set[bytes]] = {}
        self._outage = Outage("redis")

    async def run(self) -> None:
        """Tell until cancelled."""
        complete_at_s = 0.0
        while True:
            self._hub.watch_signal.clear()
            is_complete = time.monotonic() >= complete_at_s
            try:
                await (self._tell_all() if is_complete else self._tell_new())
            except AWAY as error:
                # Nothing counts as told: evaluators may have heard nothing, or be gone.
                complete_at_s = 0.0
                # What was told before is still to hold when it is told again.
                await asyncio.sleep(min(self._outage.begin_or_continue(error), self._interval_s))
                continue
            if is_complete:
                complete_at_s = time.monotonic() + self._interval_s
            await asyncio.sleep(TELL_INTERVAL_MS / 1_000)
            await self._changed_within(complete_at_s - time.monotonic())

    async def _changed_within(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._hub.watch_signal.wait()
        except TimeoutError:
            pass

    async def _tell_all(self) -> None:
        """Also that nothing is watched any more, once."""
        watched = {shard: set(self._hub.watched(shard)) for shard in self._hub.shards()}
        ids_of = {shard: watched.get(shard, set()) for shard in watched.keys() | self._told.keys()}
        untold = await self._publish(True, ids_of)
        self._told = watched | {shard: set() for shard in untold}

    async def _tell_new(self) -> None:
        new = {shard: self._new(shard, self._told.get(shard, set())) for shard in self._hub.shards()}
        added = {shard: ids for shard, ids in new.items() if ids}
        untold = await self._publish(False, added)
        for shard in added.keys() - untold:
            self._told.setdefault(shard, set()).update(added[shard])

    def _new(self, shard: int, told: set[bytes]) -> list[bytes]:
        return [name for name in self._hub.watched(shard) if name not in told]

    async def _publish(self, complete: bool, ids_of: Mapping[int, Iterable[bytes]]) -> set[int]:
        """The shards whose node is away. Raises AWAY errors when all of them are."""
        parts: dict[str, dict[int, Iterable[bytes]]] = {}
        for shard, ids in ids_of.items():
            parts.setdefault(node_name(self._redis, redis_keys.interest_channel(shard)), {})[shard] = ids
        errors = await asyncio.gather(*(self._publish_part(complete, part) for part in parts.values()))
        failures = [error for error in errors if error is not None]
        if not failures:
            self._outage.end()
        elif len(failures) == len(parts):
            raise failures[0]
        else:
            self._outage.begin_or_continue(failures[0])
        return {shard for part, error in zip(parts.values(), errors, strict=True) if error for shard in part}

    async def _publish_part(self, complete: bool, ids_of: Mapping[int, Iterable[bytes]]) -> Exception | None:
        pipe = self._redis.pipeline(transaction=False)
        for shard, ids in ids_of.items():
            frame = InterestFrame(self._node, self._expires_in_ms, complete, [name.decode() for name in ids])
            pipe.spublish(redis_keys.interest_channel(shard), interest_encoder.encode(frame))
        try:
            await pipe.execute()
        except AWAY as error:
            return error
        return None
