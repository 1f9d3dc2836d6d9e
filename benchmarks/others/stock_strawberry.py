"""Strawberry as it comes, on FastAPI and uvicorn: `python -m benchmarks.others.stock_strawberry PORT REDIS_URL SHARDS`.

The same frames as navstream's API takes, one slot per subscription, the latest value wins; no access checks, no rates.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal

import strawberry
import uvicorn
from fastapi import FastAPI
from redis.asyncio import Redis
from strawberry.fastapi import GraphQLRouter

from engine.amounts import from_micro
from engine.instants import to_datetime
from engine.marks import MARK, Mark, decode_frame, decode_mark
from engine.stores import redis_keys


class Slot:
    def __init__(self) -> None:
        self.mark: Mark | None = None
        self.signal = asyncio.Event()


watches: dict[bytes, set[Slot]] = {}


@strawberry.type
class NavUpdate:
    nav: Decimal
    cash: Decimal
    positions_value: Decimal
    quality: str
    as_of: datetime
    sequence: int


@strawberry.type
class Query:
    ok: bool = True


@strawberry.type
class Subscription:
    @strawberry.subscription
    async def nav_updates(self, portfolio_id: str, max_rate_hz: float | None = 4) -> AsyncGenerator[NavUpdate, None]:
        slot, slots = Slot(), watches.setdefault(portfolio_id.encode(), set())
        slots.add(slot)
        try:
            while True:
                await slot.signal.wait()
                slot.signal.clear()
                mark = slot.mark
                assert mark is not None
                yield NavUpdate(
                    nav=from_micro(mark.nav),
                    cash=from_micro(mark.cash),
                    positions_value=from_micro(mark.positions_value),
                    quality=mark.quality.name,
                    as_of=to_datetime(mark.as_of_ns),
                    sequence=mark.sequence,
                )
        finally:
            slots.discard(slot)


async def _listen(url: str, shards: int) -> None:
    pubsub = Redis.from_url(url, protocol=3).pubsub()
    await pubsub.ssubscribe(*(redis_keys.marks_channel(shard) for shard in range(shards)))
    while True:
        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=1)
        if message is None:
            continue
        header, groups = decode_frame(message["data"])
        for ids, packed in groups:
            for row, key in enumerate(ids):
                for slot in watches.get(key, ()):
                    slot.mark = decode_mark(packed[row * MARK.itemsize : (row + 1) * MARK.itemsize], header.epoch)
                    slot.signal.set()


def main() -> None:
    port, url, shards = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        listening = asyncio.create_task(_listen(url, shards))
        print("ready", flush=True)
        yield
        listening.cancel()

    app = FastAPI(lifespan=lifespan)
    schema = strawberry.Schema(query=Query, subscription=Subscription)
    app.include_router(GraphQLRouter(schema, path="/graphql"))
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
