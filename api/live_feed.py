"""The live feed: one Redis Pub/Sub connection per process and Redis node, from which the hub gets marks and quotes.

It listens to `marks:{n}` for the shards that somebody watches, to `quotes` while somebody watches quotes, and to
`badges` while somebody watches badges, who also look for themselves: that channel may be silent for long. A
frame may be lost at any time, and nothing may depend on every one arriving: whatever hints at a loss makes the feed
read the watched values from Redis again, and until then no mark of the shard counts as current.

    a frame's previous_sequence is above the last one seen       frames between were lost
    a frame of a newer epoch                                     the shard has a new owner: its streams are reset
    a frame of an older epoch                                    a zombie's; dropped and counted
    a quote frame of a new publisher, or with a sequence skipped quotes were lost
    a channel's subscription is confirmed (again)                the connection was lost and made anew, or moved
    no frame, not even a heartbeat, for `feed_silence_max_ms`    the connection may be dead: made anew

As long as a channel is not subscribed to, or is silent, the hub is told that what is watched on it is not current. An
outage is over with the first frame: a connection without frames is as good as none.

Two tasks: one listens, one reads; each outlives Redis being away. Where one node of a cluster is away, its channels
alone are not current.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

import msgspec
from redis.exceptions import RedisError

from api.heard import Heard
from api.hub import Hub
from api.metrics import Metrics
from engine.marks import decode_frame
from engine.messages import quote_frame_decoder
from engine.runtime.connections import Backoff, Outage, RedisClient
from engine.runtime.subscriber import Notice, NoticeKind, Subscriber
from engine.stores import redis_keys
from engine.stores.hot_state_reads import HotStateReads, Place
from resolvers.errors import AWAY

# Also how late a first watch of a shard is subscribed to: the listener looks for new watches between messages.
LISTEN_INTERVAL_MS = 25
CLOSE_TIMEOUT_S = 1  # closing a connection to a frozen server must not hang
PUBLISHERS_COUNT_MAX = 16
_AWAY: tuple[type[BaseException], ...] = (*AWAY, RedisError)
_portfolio_ids_decoder = msgspec.msgpack.Decoder(list[str])


class FeedLostError(ConnectionError):
    """The connection broke. One type for all causes, so that an outage that changes its face is still one."""


class FeedSilentError(FeedLostError):
    """Nothing was heard for too long."""


@dataclass(slots=True)
class _ShardFrames:
    """The last frame seen of a shard; `epoch` is -1 before the first."""

    seen_at_s: float
    epoch: int = -1
    sequence: int = -1


class LiveFeed:
    def __init__(
        self,
        connect: Callable[[], RedisClient],
        hot_state: HotStateReads,
        hub: Hub,
        metrics: Metrics,
        silence_max_ms: int,
        in_wall_time: bool,
    ) -> None:
        self._connect = connect
        self._hot_state = hot_state
        self._hub = hub
        self._metrics = metrics
        self._silence_max_s = silence_max_ms / 1_000
        self._in_wall_time = in_wall_time
        self._shards: dict[int, _ShardFrames] = {}
        self._publishers: OrderedDict[str, int] = OrderedDict()
        self._quotes_seen_at_s = 0.0
        self._subscribed: set[str] = set()
        self._outage = Outage("live_feed")

    async def run(self) -> None:
        """Feed the hub until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._read())

    async def _listen(self) -> None:
        while True:
            try:
                await self._listen_once()
            except FeedSilentError as error:
                # Waiting for the silence was delay enough.
                self._outage.begin_or_continue(FeedLostError(str(error)))
            except _AWAY as error:
                await asyncio.sleep(self._outage.begin_or_continue(FeedLostError(repr(error))))

    async def _listen_once(self) -> None:
        """Listen until no connection is left or all are silent."""
        redis = self._connect()
        subscriber = Subscriber(redis)
        try:
            while True:
                self._adjust(subscriber)
                if not self._subscribed:
                    if not self._wanted():
                        # Not before: others wait for it as well, and are not to miss a new watch.
                        self._hub.watch_signal.clear()
                        await self._hub.watch_signal.wait()
                    continue
                notice = await subscriber.next(LISTEN_INTERVAL_MS / 1_000)
                if notice is not None:
                    self._take(notice)
                if self._silent():
                    self._metrics.gaps.labels("silence").inc()
                    raise FeedSilentError("no frame on any channel")
        finally:
            self._forget()
            await subscriber.aclose()
            with suppress(*_AWAY):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await redis.aclose()

    def _wanted(self) -> set[str]:
        wanted = {redis_keys.marks_channel(shard) for shard in self._hub.shards()}
        wanted |= {redis_keys.QUOTES_CHANNEL} if self._hub.watches_quotes() else set()
        return wanted | {redis_keys.BADGES_CHANNEL} if self._hub.watches_badges() else wanted

    def _adjust(self, subscriber: Subscriber) -> None:
        """Subscribe to what is watched and to nothing else."""
        wanted = self._wanted()
        added, dropped = wanted - self._subscribed, self._subscribed - wanted
        subscriber.listen_to(wanted)
        self._subscribed = wanted
        if added:
            self._begin(added)
        for channel in dropped:
            self._not_live(channel)

    def _begin(self, channels: set[str]) -> None:
        """The watch for silence begins with the subscription, confirmed or not."""
        now_s = asyncio.get_running_loop().time()
        for shard in self._hub.shards():
            if redis_keys.marks_channel(shard) in channels:
                self._shards[shard] = _ShardFrames(now_s)
        if redis_keys.QUOTES_CHANNEL in channels:
            self._quotes_seen_at_s = now_s

    def _forget(self) -> None:
        for channel in self._subscribed:
            self._not_live(channel)
        self._subscribed = set()
        self._publishers.clear()

    def _not_live(self, channel: str) -> None:
        if channel == redis_keys.QUOTES_CHANNEL:
            self._hub.quotes_live(False)
            return
        for shard in [shard for shard in self._shards if redis_keys.marks_channel(shard) == channel]:
            del self._shards[shard]
            self._hub.shard_live(shard, False)

    def _silent(self) -> bool:
        """Whether every channel listened to has been silent for too long; those that are get read again."""
        now_s = asyncio.get_running_loop().time()
        latest_s = now_s - self._silence_max_s
        seen = [frames.seen_at_s for frames in self._shards.values()]
        seen += [self._quotes_seen_at_s] if redis_keys.QUOTES_CHANNEL in self._subscribed else []
        for shard, frames in self._shards.items():
            if frames.seen_at_s < latest_s:
                frames.seen_at_s = now_s
                self._hub.shard_heard(shard, False)
                self._gap("silence", shard)
        if redis_keys.QUOTES_CHANNEL in self._subscribed and self._quotes_seen_at_s < latest_s:
            self._quotes_seen_at_s = now_s
            self._hub.quotes_heard(False)
            self._gap("silence", None)
        return bool(seen) and max(seen) < latest_s

    def _take(self, notice: Notice) -> None:
        if notice.kind is NoticeKind.CONFIRMED:
            self._confirmed(notice.channel)
        elif notice.kind is NoticeKind.LOST:
            self._lost(notice.channel)
        elif notice.channel == redis_keys.QUOTES_CHANNEL:
            self._take_quotes(notice.data)
        elif notice.channel == redis_keys.BADGES_CHANNEL:
            self._take_badges(notice.data)
        else:
            self._take_marks(notice.data)

    def _lost(self, channel: str) -> None:
        """Not current until the channel is confirmed again."""
        if channel == redis_keys.QUOTES_CHANNEL:
            self._hub.quotes_live(False)
        for shard in self._shards:
            if redis_keys.marks_channel(shard) == channel:
                self._hub.shard_live(shard, False)

    def _confirmed(self, channel: str) -> None:
        """From here on nothing is missed; what came before is read."""
        if channel not in self._subscribed:
            return
        if channel == redis_keys.QUOTES_CHANNEL:
            self._publishers.clear()
            self._hub.quotes_live(True)
            return
        if channel == redis_keys.BADGES_CHANNEL:
            self._hub.badges_live()
            return
        for shard, frames in self._shards.items():
            if redis_keys.marks_channel(shard) == channel:
                frames.epoch = frames.sequence = -1
                self._hub.shard_live(shard, True)

    def _take_marks(self, data: bytes) -> None:
        self._metrics.frames.labels("marks").inc()
        try:
            header, groups = decode_frame(data)
            seen = self._shards.get(header.shard)
            if seen is None:
                return
            if header.epoch < seen.epoch:
                self._metrics.frames_dropped.labels("marks").inc()
                return
            seen.seen_at_s = asyncio.get_running_loop().time()
            self._outage.end()
            self._hub.shard_heard(header.shard, True)
            if header.epoch == seen.epoch and header.sequence <= seen.sequence:
                return
            if header.epoch > seen.epoch >= 0:
                self._gap("epoch", header.shard)
            elif seen.epoch >= 0 and header.previous_sequence > seen.sequence:
                self._gap("sequence", header.shard)
            seen.epoch, seen.sequence = header.epoch, header.sequence
            heard = Heard(time.time_ns(), header.oldest_event_ns if self._in_wall_time else 0)
            self._metrics.observe_heard(heard.heard_ns, header.sent_at_ns)
            for ids, packed in groups:
                self._hub.deliver_rows(header.shard, header.epoch, ids, packed, heard)
        except (ValueError, struct.error):
            self._metrics.frames_dropped.labels("marks").inc()

    def _take_quotes(self, data: bytes) -> None:
        self._metrics.frames.labels("quotes").inc()
        try:
            frame = quote_frame_decoder.decode(data)
        except msgspec.MsgspecError:
            self._metrics.frames_dropped.labels("quotes").inc()
            return
        self._quotes_seen_at_s = asyncio.get_running_loop().time()
        self._outage.end()
        self._hub.quotes_heard(True)
        last = self._publishers.get(frame.publisher)
        if (last is None and self._publishers) or (last is not None and frame.sequence > last + 1):
            self._gap("publisher" if last is None else "sequence", None)
        self._publishers[frame.publisher] = frame.sequence
        if len(self._publishers) > PUBLISHERS_COUNT_MAX:
            self._publishers.popitem(last=False)
        self._hub.deliver_quotes(frame.quotes)

    def _take_badges(self, data: bytes) -> None:
        self._metrics.frames.labels("badges").inc()
        try:
            portfolio_ids = _portfolio_ids_decoder.decode(data)
        except msgspec.MsgspecError:
            self._metrics.frames_dropped.labels("badges").inc()
            return
        self._outage.end()
        self._hub.deliver_badges(portfolio_ids)

    def _gap(self, cause: str, shard: int | None) -> None:
        self._metrics.gaps.labels(cause).inc()
        if shard is None:
            self._hub.reread_quotes()
        else:
            self._hub.miss_shard(shard)

    async def _read(self) -> None:
        backoffs: dict[str, Backoff] = {}
        while True:
            await self._hub.unread_signal.wait()
            places, symbols = self._hub.take_unread()
            parts = self._hot_state.by_node(places, symbols)
            read = await asyncio.gather(*(self._read_part(*part) for part in parts.values()))
            for (node, part), is_read in zip(parts.items(), read, strict=True):
                if is_read:
                    backoffs.pop(node, None)
                    continue
                # Again in a while; what other nodes have does not wait for it.
                delay_s = backoffs.setdefault(node, Backoff()).next_s()
                asyncio.get_running_loop().call_later(delay_s, self._hub.put_back, *part)

    async def _read_part(self, places: Collection[Place], symbols: Collection[str]) -> bool:
        """False when it can not be read now."""
        try:
            found = await self._hot_state.read(marks=places, quotes=symbols)
        except _AWAY:
            return False
        self._metrics.rereads.inc(len(places) + len(symbols))
        self._hub.deliver_marks((place, mark) for place, mark in found.marks.items() if mark is not None)
        self._hub.fill_quotes(symbols, found.quotes)
        return True
