"""The writing half of hot state: marks, positions and sectors of the shards that one evaluator owns.

A flush is two commands in one round trip:

    HSET marks:{n}:<epoch> id mark id mark …       one variadic command for all changed portfolios
    EVAL publish                                    if the pointer still names this epoch: sequence, SPUBLISH frame

What Redis says it has must not lie behind what it has acknowledged: one that came back from an older copy of itself, or
whose replica took over, lacks rows that may not change again for long. Such a flush is LOST like one to an empty Redis.

The frame has those of the marks that somebody watches. A fenced evaluator can neither move a pointer nor publish; what
it wrote lies under an epoch nobody reads.
A snapshot frame goes to the list `snapshots:{n}` by a script that compares the epoch as well.

The bytes of the HSET are laid out once per portfolio as rows of a numpy record array (RESP header, id, mark) and
only the marks are filled in per flush; ids of equal length share one array, because a record has one width.

Positions and sectors are written by a script that compares the epoch inside Redis, all of a batch at once.

In a cluster all of it goes to the master of the shard's slot.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.marks import MARK, FrameHeader, MarkArray, encode_frame, frame_parts
from engine.positions import hot_position_encoder
from engine.posting import PositionsChange
from engine.runtime.connections import RedisClient, run_script
from engine.runtime.lanes import Lane
from engine.runtime.redis_cluster import ClusterClient
from engine.sectors import ranks_of, sector_value_encoder
from engine.stores import redis_keys

TEMPLATE_CAPACITY_MIN = 64
# A mark as opaque bytes: numpy copies those whole, a record it copies field by field.
_PACKED = np.dtype((np.void, MARK.itemsize))
# A script call ends with the portfolio that brings it to this many values: it blocks Redis for a few milliseconds.
VALUES_PER_SCRIPT = 10_000

# A frame per hour and session close: as many as the snapshots worker may lie behind, and a bound on memory.
SNAPSHOT_FRAMES_MAX = 100

# KEYS: pointer, and the marks that the HSET before it wrote: in a cluster both, or neither, while their slot moves.
# ARGV: epoch, sequence, updated_at_ns, channel, the sequence that was acknowledged last, frame.
_PUBLISH = """
local current, sequence = unpack(redis.call('HMGET', KEYS[1], 'epoch', 'sequence'))
if not current then return -1 end
if current ~= ARGV[1] then return 0 end
if tonumber(sequence or 0) < tonumber(ARGV[5]) then return -1 end
redis.call('HSET', KEYS[1], 'sequence', ARGV[2], 'updated_at_ns', ARGV[3])
redis.call('SPUBLISH', ARGV[4], ARGV[6])
return 1
"""

# KEYS: pointer. ARGV: epoch, owner, now_ns. Returns the epoch it replaced, 0 for none, -1 when it may not.
_ADVANCE = """
local current = tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0)
if current > tonumber(ARGV[1]) then return -1 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'owner', ARGV[2], 'sequence', '0', 'updated_at_ns', ARGV[3])
return current
"""

# KEYS: pointer, then positions, sectors, sector_values of each portfolio. ARGV: epoch, then for each portfolio one
# packed list: whether to replace, and four lists: symbols to remove, positions, weights, sector values. One packed
# argument costs both sides a fraction of dozens of plain ones. Lua's stack takes fewer than 8,000 arguments of a call,
# so a longer list is applied in even parts of 4,000. A new owner writes positions before it moves the pointer; its
# epoch is noted, so that the former owner can not write in between.
_POSITIONS = """
for _, name in ipairs({'epoch', 'positions_epoch'}) do
  local current = redis.call('HGET', KEYS[1], name)
  if current and tonumber(current) > tonumber(ARGV[1]) then return 0 end
end
redis.call('HSET', KEYS[1], 'positions_epoch', ARGV[1])
local function apply(command, key, list)
  for first = 1, #list, 4000 do
    redis.call(command, key, unpack(list, first, math.min(first + 3999, #list)))
  end
end
for key = 2, #KEYS, 3 do
  local replace, closed, positions, weights, values = unpack(cmsgpack.unpack(ARGV[(key + 4) / 3]))
  if replace then redis.call('DEL', KEYS[key]) end
  apply('HDEL', KEYS[key], closed)
  apply('HSET', KEYS[key], positions)
  redis.call('DEL', KEYS[key + 1], KEYS[key + 2])
  apply('ZADD', KEYS[key + 1], weights)
  apply('HSET', KEYS[key + 2], values)
end
return 1
"""


# KEYS: pointer, list. ARGV: epoch, frame, how many frames at most. Returns how many were dropped for it, −1 when the
# pointer is not at this epoch yet, −2 when it is beyond it.
_SNAPSHOT = """
local current = tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0)
if current ~= tonumber(ARGV[1]) then return current > tonumber(ARGV[1]) and -2 or -1 end
local surplus = redis.call('RPUSH', KEYS[2], ARGV[2]) - tonumber(ARGV[3])
if surplus > 0 then redis.call('LTRIM', KEYS[2], surplus, -1) end
return math.max(surplus, 0)
"""


_change_encoder = msgspec.msgpack.Encoder()


class FlushOutcome(Enum):
    """What became of a flush. LOST: Redis forgot the shard, or its last state, and all of it is to be written again."""

    WRITTEN = 1
    FENCED = 0
    LOST = -1


@dataclass(slots=True)
class _Template:
    """RESP rows of ids of one length: `$len id $144 mark`, the mark left to fill in."""

    rows: NDArray[np.void]
    count: int = 0

    def append(self, count: int) -> NDArray[np.int64]:
        """More rows, without id and mark; returns their numbers."""
        first, self.count = self.count, self.count + count
        if self.count > len(self.rows):
            grown = np.zeros(max(self.count, 2 * len(self.rows), TEMPLATE_CAPACITY_MIN), self.rows.dtype)
            grown[:first] = self.rows[:first]
            self.rows = grown
        added = self.rows[first : self.count]
        added["head"] = b"$%d\r\n" % self.rows.dtype["id"].itemsize
        added["middle"], added["tail"] = b"\r\n$%d\r\n" % MARK.itemsize, b"\r\n"
        return np.arange(first, self.count)


@dataclass(slots=True)
class MarksLayout:
    """Where in which template each Book slot's row lies; kept up to date as portfolios come."""

    templates: dict[int, _Template] = field(default_factory=dict)
    length_of: NDArray[np.int32] = field(default_factory=lambda: np.zeros(TEMPLATE_CAPACITY_MIN, np.int32))
    row_of: NDArray[np.int64] = field(default_factory=lambda: np.zeros(TEMPLATE_CAPACITY_MIN, np.int64))

    def place(self, slot: int, portfolio_id: str) -> None:
        """Lay out the row of a portfolio that takes `slot`."""
        self.place_many(np.array([slot], np.int64), [portfolio_id])

    def place_many(self, slots: NDArray[np.int64], portfolio_ids: Sequence[str]) -> None:
        """Lay out the rows of portfolios that take these slots."""
        names = [portfolio_id.encode() for portfolio_id in portfolio_ids]
        lengths = np.fromiter(map(len, names), np.int32, len(names))
        more = int(slots.max(initial=-1)) + 1 - len(self.length_of)
        if more > 0:
            more = max(more, len(self.length_of))
            self.length_of, self.row_of = np.pad(self.length_of, (0, more)), np.pad(self.row_of, (0, more))
        for length in np.unique(lengths).tolist():
            chosen = np.flatnonzero(lengths == length)
            taken = slots[chosen]
            # A slot keeps its row while the ids that take it are of one length.
            new = taken[self.length_of[taken] != length]
            template = self.templates.setdefault(length, _Template(np.zeros(0, _row_type(length))))
            self.row_of[new] = template.append(len(new))
            self.length_of[new] = length
            template.rows["id"][self.row_of[taken]] = [names[at] for at in chosen.tolist()]

    def fill(self, slots: NDArray[np.int64], marks: MarkArray) -> list[tuple[int, NDArray[np.void]]]:
        """The filled rows of the slots, grouped by id length."""
        lengths, rows_of = self.length_of[slots], self.row_of[slots]
        packed = marks.view(_PACKED)
        groups, found = [], np.unique(lengths).tolist()
        for length in found:
            chosen = lengths == length if len(found) > 1 else slice(None)
            rows = np.take(self.templates[length].rows, rows_of[chosen])
            rows["mark"] = packed[chosen]
            groups.append((length, rows))
        return groups


def _row_type(id_length: int) -> np.dtype[np.void]:
    head, middle = f"S{len(f'${id_length}') + 2}", f"S{len(f'${MARK.itemsize}') + 4}"
    return np.dtype([("head", head), ("id", f"S{id_length}"), ("middle", middle), ("mark", _PACKED), ("tail", "S2")])


class HotStateWriter:
    """`redis` must not decode responses. One writer per evaluator; one flush per shard at a time."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self.layout = MarksLayout()
        # Of each shard epoch and sequence of the last flush that Redis has acknowledged since the pointer moved.
        self._acknowledged: dict[int, tuple[int, int]] = {}
        self._lanes: dict[int, Lane] = {}

    async def advance(self, shard: int, epoch: int, owner: str, now_ns: int) -> bool:
        """Point readers at `epoch`, unless they are beyond it already (False). Deletes the replaced marks."""
        replaced = int(await run_script(self._redis, _ADVANCE, [redis_keys.shard(shard)], [epoch, owner, now_ns]))
        self._acknowledged.pop(shard, None)
        if 0 < replaced < epoch:
            await self._redis.unlink(redis_keys.marks(shard, replaced))
        return replaced >= 0

    async def write_marks(
        self, shard: int, epoch: int, slots: NDArray[np.int64], marks: MarkArray
    ) -> list[tuple[int, NDArray[np.void]]]:
        """Write marks without publishing them (take-over); returns the filled rows."""
        groups = self.layout.fill(slots, marks)
        if groups:
            key = redis_keys.marks(shard, epoch)
            await self._exchange(key, [_hset(key, groups, len(slots))])
        return groups

    def flush(
        self, header: FrameHeader, slots: NDArray[np.int64], marks: MarkArray, shown_count: int | None = None
    ) -> Coroutine[Any, Any, FlushOutcome]:
        """Write the changed marks and publish the frame of the first `shown_count`, by default all; it may have none.

        It is made at once, and leaves at once, or in a cluster when what is returned is awaited. That raises
        redis.exceptions.RedisError, OSError; the caller then counts the rows as changed again.
        """
        shown_count = len(slots) if shown_count is None else shown_count
        groups = self.layout.fill(slots[:shown_count], marks[:shown_count])
        frame = frame_parts(header, ((n, rows["id"].tobytes(), rows["mark"].tobytes()) for n, rows in groups))
        key = redis_keys.marks(header.shard, header.epoch)
        groups += self.layout.fill(slots[shown_count:], marks[shown_count:])
        commands = [_hset(key, groups, len(slots))] if groups else []
        commands.append(self._publish_command(header, frame))
        return self._flushed(header, self._send(header.shard, key, commands))

    async def _flushed(self, header: FrameHeader, sending: Coroutine[Any, Any, list[Any]]) -> FlushOutcome:
        outcome = FlushOutcome((await sending)[-1])
        if outcome is FlushOutcome.WRITTEN:
            self._acknowledged[header.shard] = (header.epoch, header.sequence)
        return outcome

    def encode(self, header: FrameHeader, slots: NDArray[np.int64], marks: MarkArray) -> bytes:
        """The frame of marks that are not flushed now: those of a boundary."""
        groups = self.layout.fill(slots, marks)
        return encode_frame(header, ((n, rows["id"].tobytes(), rows["mark"].tobytes()) for n, rows in groups))

    async def push_snapshot(self, shard: int, epoch: int, frame: bytes) -> tuple[FlushOutcome, int]:
        """Append a frame to the shard's list; also how many frames, the oldest ones, were dropped for it.

        LOST: nothing was written, because the pointer is not at this epoch yet or Redis forgot it.
        """
        keys = [redis_keys.shard(shard), redis_keys.snapshots(shard)]
        dropped = int(await run_script(self._redis, _SNAPSHOT, keys, [epoch, frame, SNAPSHOT_FRAMES_MAX]))
        if dropped < 0:
            return (FlushOutcome.LOST if dropped == -1 else FlushOutcome.FENCED), 0
        return FlushOutcome.WRITTEN, dropped

    def _publish_command(self, header: FrameHeader, frame: list[bytes]) -> list[bytes]:
        epoch, acknowledged = self._acknowledged.get(header.shard, (0, 0))
        arguments = (
            b"EVAL",
            _PUBLISH.encode(),
            b"2",
            redis_keys.shard(header.shard).encode(),
            redis_keys.marks(header.shard, header.epoch).encode(),
            b"%d" % header.epoch,
            b"%d" % header.sequence,
            b"%d" % header.flushed_at_ns,
            redis_keys.marks_channel(header.shard).encode(),
            b"%d" % (acknowledged if epoch == header.epoch else 0),
        )
        head = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in arguments)
        frame_size = b"$%d\r\n" % sum(map(len, frame))
        return [b"*%d\r\n" % (len(arguments) + 1), head, frame_size, *frame, b"\r\n"]

    def _send(self, shard: int, key: str, commands: list[list[bytes]]) -> Coroutine[Any, Any, list[Any]]:
        """Send a flush's packed commands, to where `key` is, on the shard's lane; brings their answers."""
        if isinstance(self._redis, ClusterClient):
            return self._redis.send(key, commands)
        lane = self._lanes.get(shard)
        if lane is None:
            lane = self._lanes[shard] = Lane(self._redis.connection_pool)
        return lane.send(commands)

    async def _exchange(self, key: str, commands: list[list[bytes]]) -> list[Any]:
        """Send packed commands beside flushes, to where `key` is; their answers."""
        if isinstance(self._redis, ClusterClient):
            return await self._redis.send(key, commands)
        lane = Lane(self._redis.connection_pool)
        try:
            return await lane.send(commands)
        finally:
            await lane.release()

    async def write_positions(self, shard: int, epoch: int, changes: Sequence[PositionsChange]) -> bool:
        """Write positions and sectors of portfolios; False when a newer epoch owns the shard."""
        keys: list[str] = [redis_keys.shard(shard)]
        arguments: list[int | bytes] = [epoch]
        values_count = 0
        for change in changes:
            keys += (
                redis_keys.positions(shard, change.portfolio_id),
                redis_keys.sectors(shard, change.portfolio_id),
                redis_keys.sector_values(shard, change.portfolio_id),
            )
            arguments.append(_packed(change))
            values_count += 3 + len(change.closed) + 2 * len(change.positions) + 4 * len(change.sectors)
            if values_count >= VALUES_PER_SCRIPT or change is changes[-1]:
                if not await run_script(self._redis, _POSITIONS, keys, arguments):
                    return False
                del keys[1:], arguments[1:]
                values_count = 0
        return True


def _hset(key: str, groups: Iterable[tuple[int, NDArray[np.void]]], count: int) -> list[bytes]:
    head = b"*%d\r\n$4\r\nHSET\r\n$%d\r\n%b\r\n" % (2 + 2 * count, len(key), key.encode())
    return [head, *(rows.tobytes() for _, rows in groups)]


def _packed(change: PositionsChange) -> bytes:
    """A change as the script takes it."""
    positions: list[Any] = []
    for symbol, position in change.positions.items():
        positions += (symbol, _text(hot_position_encoder.encode(position)))
    weights: list[Any] = []
    values: list[Any] = []
    for sector, weight in ranks_of(change.sectors).items():
        weights += (repr(weight), sector)
        values += (sector, _text(sector_value_encoder.encode(change.sectors[sector])))
    return _change_encoder.encode((change.replace, change.closed, positions, weights, values))


def _text(data: bytes) -> msgspec.Raw:
    """Bytes as what MessagePack calls a string: Lua's decoder knows no other kind."""
    return msgspec.Raw(b"\xdb%b%b" % (len(data).to_bytes(4, "big"), data))
