"""Sharded channels: one connection to each Redis node that has any of those listened to, whichever node that is today.

Every channel is a sharded one (SPUBLISH, SSUBSCRIBE), on a single server as in a cluster, where a message then goes to
the node of the channel's slot alone. What is heard is one stream:

    CONFIRMED   from here on nothing published to the channel is missed; what came before is to be read
    MESSAGE     a message
    LOST        the channel is not listened to any more: its node is away, or its slot has moved. It is subscribed to
                again, wherever it is then, and confirmed

A connection that breaks is made again at once. `next` raises when that can not be done and there is no other; then a
new Subscriber is to be made, in the caller's time. While other nodes speak, one that is away is tried again with
growing delays.

A connection on which nothing is heard for a socket timeout is pinged, and lost when that goes unanswered for another.
A channel may be silent for as long as it likes.

Not for more than one task: `listen_to` and `next` are called by the one that listens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from enum import Enum
from typing import Any, NamedTuple

from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MovedError
from redis.exceptions import TimeoutError as RedisTimeoutError

from engine.runtime.connections import AWAY, Backoff, RedisClient
from engine.runtime.redis_cluster import ClusterClient

# Messages that wait for the listener; beyond it they wait in the connections, then at the server, which gives up.
NOTICES_COUNT_MAX = 1_000
REST_MS_MAX = 1_000  # a node that is away is tried again at least so often


class NoticeKind(Enum):
    CONFIRMED = 1
    MESSAGE = 2
    LOST = 3


class Notice(NamedTuple):
    kind: NoticeKind
    channel: str
    data: bytes = b""


class _Link:
    """A connection to one node, and the channels that it is to have."""

    def __init__(self, connection: AbstractConnection) -> None:
        self.connection = connection
        # redis-py's own handler makes a text of every message, for a log that nobody reads.
        connection._parser.set_pubsub_push_handler(_as_it_is)  # type: ignore[attr-defined]
        self.channels: set[str] = set()
        self.confirmed: set[str] = set()
        self.task: asyncio.Task[None] | None = None
        self.is_open = False
        self.has_served = False
        self.was_heard = True

    async def open(self) -> None:
        await self.connection.connect()  # type: ignore[no-untyped-call]
        self.is_open = True
        await self._send("SSUBSCRIBE", self.channels)

    async def adjust(self, channels: set[str]) -> None:
        """Have these and no others. An error is the reader's to find."""
        added, dropped = channels - self.channels, self.channels - channels
        self.channels = channels
        self.confirmed &= channels
        if self.is_open:
            try:
                await self._send("SSUBSCRIBE", added)
                await self._send("SUNSUBSCRIBE", dropped)
            except AWAY:
                await self.connection.disconnect(nowait=True)

    async def ping(self) -> None:
        self.was_heard = False
        try:
            await self.connection.send_command("PING")
        except AWAY:
            await self.connection.disconnect(nowait=True)

    async def _send(self, command: str, channels: Collection[str]) -> None:
        # One command for each: the channels of one node may be of many slots.
        if channels:
            packed = self.connection.pack_commands([(command, channel) for channel in sorted(channels)])
            await self.connection.send_packed_command(packed)


class Subscriber:
    """Uses `redis` for its settings and topology, never its connections."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._wanted: frozenset[str] = frozenset()
        self._links: dict[str, _Link] = {}
        # Nodes that just failed, left alone for a while.
        self._resting: dict[str, asyncio.TimerHandle] = {}
        self._backoffs: dict[str, Backoff] = {}
        self._notices: asyncio.Queue[Notice | Exception] = asyncio.Queue(NOTICES_COUNT_MAX)
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._timeout_s: float = _options(redis)["socket_timeout"]

    def listen_to(self, channels: Collection[str]) -> None:
        """Listen to these channels and to no others, from when each is confirmed."""
        if self._wanted != channels:
            self._wanted = frozenset(channels)
            self._changed.set()
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())

    async def next(self, timeout_s: float) -> Notice | None:
        """What comes next; None when nothing does in time. Raises an AWAY error when no connection is left."""
        try:
            notice = self._notices.get_nowait()
        except asyncio.QueueEmpty:
            try:
                async with asyncio.timeout(timeout_s):
                    notice = await self._notices.get()
            except TimeoutError:
                return None
        if isinstance(notice, Exception):
            raise notice
        return notice

    async def aclose(self) -> None:
        tasks = [task for task in (self._keeper, *(link.task for link in self._links.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for timer in self._resting.values():
            timer.cancel()
        self._links.clear()

    async def _keep(self) -> None:
        """Bring connections and channels in line with what is wanted, again and again."""
        looked_at_s = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
            try:
                if self._changed.is_set():
                    self._changed.clear()
                    await self._place()
            except Exception as error:
                if not self._links or not isinstance(error, AWAY):
                    await self._notices.put(error)
                    return
                self._rest("")
            if time.monotonic() - looked_at_s >= self._timeout_s:
                looked_at_s = time.monotonic()
                await self._look_after()

    async def _place(self) -> None:
        """Every channel to its node. Raises AWAY errors when the topology can not be told."""
        if isinstance(self._redis, ClusterClient) and self._wanted:
            await self._redis.ready()
        placed: dict[str, set[str]] = {name: set() for name in self._links}
        for channel in self._wanted:
            placed.setdefault(self._node_name(channel), set()).add(channel)
        for name, channels in placed.items():
            link = self._links.get(name)
            if link is not None:
                await link.adjust(channels)
            elif name not in self._resting:
                link = self._links[name] = _Link(self._connection(next(iter(channels))))
                link.channels = channels
                link.task = asyncio.create_task(self._listen(name, link))

    async def _look_after(self) -> None:
        """Ping what has been silent, and give up what did not answer."""
        for name, link in list(self._links.items()):
            if not link.channels:
                await self._close(name, link)
            elif link.is_open and not link.was_heard:
                await self._close(name, link)
                await self._fail(name, link, RedisTimeoutError("a subscriber's connection does not answer"))
            elif link.is_open:
                await link.ping()

    async def _listen(self, name: str, link: _Link) -> None:
        try:
            await link.open()
            while True:
                try:
                    answer = await link.connection.read_response(
                        disable_decoding=True, timeout=float("inf"), disconnect_on_error=False, push_request=True
                    )
                except MovedError as error:
                    await self._follow(link, error)
                    continue
                link.was_heard = True
                if isinstance(answer, list):
                    await self._take(name, link, answer)
        except Exception as error:
            await self._fail(name, link, error)
        finally:
            await link.connection.disconnect(nowait=True)

    async def _take(self, name: str, link: _Link, answer: list[Any]) -> None:
        kind, channel = answer[0], answer[1].decode()
        if kind == b"smessage":
            await self._notices.put(Notice(NoticeKind.MESSAGE, channel, answer[2]))
        elif kind == b"ssubscribe":
            self._backoffs.pop(name, None)
            link.confirmed.add(channel)
            link.has_served = True
            await self._notices.put(Notice(NoticeKind.CONFIRMED, channel))
        elif kind == b"sunsubscribe" and channel in link.channels:
            # Not asked for: the slot has moved.
            link.channels = link.channels - {channel}
            await self._lose(link, {channel})
            self._look_again(None)

    async def _follow(self, link: _Link, error: MovedError) -> None:
        """A subscription was refused, because the slot is another node's."""
        if not isinstance(self._redis, ClusterClient):
            raise error
        await self._redis.nodes_manager.move_slot(error)
        link.channels = {channel for channel in link.channels if self._redis.keyslot(channel) != error.slot_id}
        self._rest("")

    async def _fail(self, name: str, link: _Link, error: Exception) -> None:
        if self._links.get(name) is link:
            del self._links[name]
        await self._lose(link, link.channels)
        if not isinstance(error, AWAY) or not (self._links or link.has_served):
            await self._notices.put(error)
            return
        self._look_again(name)
        if not link.has_served:
            self._rest(name)

    async def _lose(self, link: _Link, channels: set[str]) -> None:
        for channel in link.confirmed & channels:
            await self._notices.put(Notice(NoticeKind.LOST, channel))
        link.confirmed -= channels

    def _look_again(self, failed: str | None) -> None:
        if isinstance(self._redis, ClusterClient):
            self._redis.note_failure(failed)
        self._changed.set()

    def _rest(self, name: str) -> None:
        """Leave a node alone for a while, then place its channels again."""

        def go_on() -> None:
            self._resting.pop(name, None)
            self._changed.set()

        if name not in self._resting:
            delay_s = self._backoffs.setdefault(name, Backoff(longest_ms=REST_MS_MAX)).next_s()
            self._resting[name] = asyncio.get_running_loop().call_later(delay_s, go_on)

    async def _close(self, name: str, link: _Link) -> None:
        del self._links[name]
        if link.task is not None:
            link.task.cancel()
            await asyncio.gather(link.task, return_exceptions=True)

    def _node_name(self, channel: str) -> str:
        if not isinstance(self._redis, ClusterClient):
            return "server"
        node = self._redis.get_node_from_key(channel)
        assert node is not None
        return str(node.name)

    def _connection(self, channel: str) -> AbstractConnection:
        """One that nobody else can close, and that does not make itself anew."""
        retry = Retry(NoBackoff(), 0)
        if isinstance(self._redis, ClusterClient):
            node = self._redis.get_node_from_key(channel)
            assert node is not None
            return node.connection_class(**{**node.connection_kwargs, "retry": retry})
        pool = self._redis.connection_pool
        return pool.connection_class(**{**pool.connection_kwargs, "retry": retry})


async def _as_it_is(answer: Any) -> Any:
    return answer


def _options(redis: RedisClient) -> dict[str, Any]:
    return redis.connection_kwargs if isinstance(redis, ClusterClient) else redis.connection_pool.connection_kwargs
