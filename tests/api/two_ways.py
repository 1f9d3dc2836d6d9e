"""One subscription by graphql-core and the same one compiled, on one hub, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import orjson

from api.delivery import Deliveries, LiveOperation
from api.hub import Hub
from api.metrics import Metrics
from api.outlets import Outlet
from api.projection import compile_projection
from engine.marks import decode_mark
from engine.runtime.settings import Settings
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, LiveDelivery
from resolvers.schema import make_schema
from tests.builders import MICRO, MarkRow

SHARD, PORTFOLIO_ID = 7, "p-1"
PLACE = (SHARD, PORTFOLIO_ID)
SCHEMA = make_schema()
# No sum of intervals and heartbeats falls on a script's instants, which are multiples of STEP_S.
STEP_S = 0.01
INTERVAL_S = 0.10337
HEARTBEAT_S = 1.01311
SEND_TIMEOUT_S = 60.0
TICK_S = 0.00001

# When it came, in seconds, and the payload.
Message = tuple[float, Any]


class TestOutlet(Outlet):
    """Keeps what is written. `block_after_next`: the socket takes one more write, and is not writable then."""

    __test__ = False

    def __init__(self, deliveries: Deliveries) -> None:
        super().__init__(deliveries)
        self.messages: list[Message] = []
        self.block_after_next = False
        self.given_up = False

    def add(self, prefix: bytes, payload: bytes) -> None:
        self.parts.append(payload + b"\n")

    def write(self, frames: bytes) -> None:
        assert self.is_writable and not self.given_up
        now_s = asyncio.get_running_loop().time()
        self.messages += [(now_s, orjson.loads(line)) for line in frames.splitlines()]
        if self.block_after_next:
            self.block_after_next = False
            self.turn_writable(False)

    def give_up(self) -> None:
        self.given_up = True


@dataclass
class Reader:
    """A client of graphql-core's way that reads on only while it is writable."""

    messages: list[Message] = field(default_factory=list)
    block_after_next: bool = False
    writable: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, results: AsyncIterator[Any]) -> None:
        async for result in results:
            assert result.errors is None, result.errors
            now_s = asyncio.get_running_loop().time()
            self.messages.append((now_s, orjson.loads(orjson.dumps({"data": result.data}))))
            if self.block_after_next:
                self.block_after_next = False
                self.writable.clear()
            await self.writable.wait()


class TwoWays:
    def __init__(self) -> None:
        self.hub = Hub()
        self.metrics = Metrics()
        self.deliveries = Deliveries(
            self.hub, self.metrics, compile_projection, HEARTBEAT_S, SEND_TIMEOUT_S, TICK_S, write_delay_s=0
        )
        self.row = MarkRow()
        self.epoch = 1
        self.sequence = 1
        self.pairs: list[tuple[Reader, TestOutlet]] = []
        self.tasks: list[asyncio.Task[None]] = []

    def subscribe(self, query: str) -> None:
        reader, outlet = Reader(), TestOutlet(self.deliveries)
        reader.writable.set()
        self.pairs.append((reader, outlet))
        live = LiveOperation(self.deliveries, outlet, b"")
        self.tasks.append(asyncio.create_task(self._run(query, None, reader)))
        self.tasks.append(asyncio.create_task(self._run(query, live, Reader())))

    async def _run(self, query: str, live: LiveOperation | None, reader: Reader) -> None:
        results = await SCHEMA.stream(
            query, variable_values={"id": PORTFOLIO_ID, "rate": 1 / INTERVAL_S}, context_value=self._context(live)
        )
        await reader.read(cast(Any, results))
        if live is not None:
            try:
                await live.ended()
            finally:
                live.end()

    def _context(self, live: LiveDelivery | None) -> Context:
        async def find(_: str) -> PortfolioIdentity:
            return PortfolioIdentity(PORTFOLIO_ID, SHARD, "ann", "name", "USD", datetime(2026, 1, 1, tzinfo=UTC))

        settings = Settings().model_copy(update={"heartbeat_interval_s": HEARTBEAT_S})
        services = SimpleNamespace(hub=self.hub, settings=settings, portfolios=SimpleNamespace(find=find))
        access = SimpleNamespace(holds=lambda scope: True, may_see=lambda owner: True)
        return Context(cast(Any, services), cast(Any, None), cast(Any, None), cast(Any, access), "r", True, live)

    # -- what may happen ------------------------------------------------------------------------------------------

    def frame(self, **changes: int) -> None:
        """The next flush, in a frame."""
        self.sequence += 1
        self.row = replace(self.row, sequence=self.sequence, **changes)
        self._deliver(self.epoch, self.row)

    def many_frames(self, first_nav: int) -> None:
        """So many flushes within an interval that the next one is awaited; all before the script goes on."""
        loop = asyncio.get_running_loop()
        for number in range(12):
            loop.call_later(number * STEP_S / 16, lambda nav=first_nav + number: self.frame(nav=nav * MICRO))

    def old_frame(self) -> None:
        self._deliver(self.epoch, replace(self.row, sequence=max(0, self.sequence - 1), nav=1))

    def zombie_frame(self) -> None:
        self._deliver(self.epoch - 1, replace(self.row, sequence=self.sequence + 99, nav=2))

    def read(self) -> None:
        """What is read from Redis: the newest mark."""
        self.hub.deliver_marks([(PLACE, decode_mark(self.row.pack(), self.epoch))])

    def lost_frame(self) -> None:
        """A flush whose frame nobody heard."""
        self.sequence += 1
        self.row = replace(self.row, sequence=self.sequence, nav=self.row.nav + MICRO)

    def take_over(self) -> None:
        self.epoch += 1
        self.sequence = 0
        self.frame()

    def _deliver(self, epoch: int, row: MarkRow) -> None:
        """As the live feed does: what is not listened to is not heard, and what is heard is not silent."""
        if SHARD not in self.hub._live_shards:
            return
        self.hub.shard_heard(SHARD, True)
        self.hub.deliver_rows(SHARD, epoch, [b"other", PORTFOLIO_ID.encode()], MarkRow().pack() + row.pack())

    def block(self) -> None:
        """Every client's next message is its last for now."""
        for reader, outlet in self.pairs:
            reader.block_after_next = outlet.block_after_next = True

    def unblock(self) -> None:
        for reader, outlet in self.pairs:
            reader.block_after_next = outlet.block_after_next = False
            reader.writable.set()
            outlet.turn_writable(True)

    # -- a random script ------------------------------------------------------------------------------------------

    async def play(self, queries: list[str], seed: int, steps_count: int) -> None:
        chance = random.Random(seed)
        self.hub.shard_live(SHARD, True)
        waiting = list(queries)
        self.subscribe(waiting.pop())
        await asyncio.sleep(STEP_S)
        for _ in range(steps_count):
            self._step(chance)
            if waiting and chance.random() < 0.1:
                await asyncio.sleep(STEP_S)
                self.subscribe(waiting.pop())
                await asyncio.sleep(STEP_S)
                self.read()
            await asyncio.sleep(STEP_S * chance.choice([1, 1, 2, 3, 5, 8, 13, 40, 130]))
        self.unblock()
        await asyncio.sleep(STEP_S)
        self._back()
        await asyncio.sleep(3.5 * HEARTBEAT_S)
        await self.end()

    def _step(self, chance: random.Random) -> None:
        actions = [self.frame] * 4 + [self.read, self.old_frame, self.zombie_frame, self.lost_frame, self.take_over]
        actions += [self.block, self.unblock]
        actions += [lambda: self.frame(nav=chance.choice([5, 6, 7]) * MICRO)] * 12
        actions += [lambda: self.many_frames(chance.choice([-6, -5, 20]))] * 3
        actions += [lambda: self.frame(cash=self.row.cash + 1, flows=self.row.flows + 1)] * 2
        actions += [lambda: self.hub.shard_live(SHARD, False), lambda: self.hub.shard_heard(SHARD, False)]
        actions += [self._back] * 3
        chance.choice(actions)()

    def _back(self) -> None:
        self.hub.shard_live(SHARD, True)
        self.hub.shard_heard(SHARD, True)
        self.read()

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
