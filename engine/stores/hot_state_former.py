"""What a shard's former owner left in hot state, as far as a new one can go on with it.

    claim      notes the new epoch: from then on nobody older can write the shard's positions; says what there is
    sequences  of the former marks: how many ledger entries each portfolio's positions stand for, at least

A mark is never ahead of its positions, and the ledger only grows. So where the ledger is where a mark has it, the
positions beside it are those of the ledger, and need not be written again. What else is in them (day bases, splits,
sectors) the ledger sequence does not tell; all of it is of the shard's `positions_basis`, if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.book_columns import Int64s
from engine.marks import MARK
from engine.runtime.connections import RedisClient, run_script
from engine.stores import redis_keys

# One answer is of at most this many marks: 720 kB.
MARKS_PER_READ_MAX = 5_000
_NO_MARK = np.full(1, -1, np.int64).astype(MARK).tobytes()

# KEYS: pointer. ARGV: epoch. Returns nothing when a newer epoch has the shard, else the pointer's epoch and the basis.
_CLAIM = """
for _, name in ipairs({'epoch', 'positions_epoch'}) do
  local current = redis.call('HGET', KEYS[1], name)
  if current and tonumber(current) > tonumber(ARGV[1]) then return false end
end
redis.call('HSET', KEYS[1], 'positions_epoch', ARGV[1])
return {redis.call('HGET', KEYS[1], 'epoch') or '', redis.call('HGET', KEYS[1], 'positions_basis') or ''}
"""

# KEYS: pointer. ARGV: epoch, basis. Returns 1, or 0 when another epoch has claimed the positions.
_SET_BASIS = """
if redis.call('HGET', KEYS[1], 'positions_epoch') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'positions_basis', ARGV[2])
return 1
"""


@dataclass(frozen=True, slots=True)
class FormerState:
    """The epoch that readers follow, None without one; and what all positions were written with, empty when that can
    not be said."""

    epoch: int | None
    basis: str


class FormerHotState:
    """`redis` must not decode responses. Raises redis.exceptions.RedisError, OSError."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    async def claim(self, shard: int, epoch: int) -> FormerState | None:
        """Keep former owners from writing positions; None when a newer epoch has the shard."""
        found = await run_script(self._redis, _CLAIM, [redis_keys.shard(shard)], [epoch])
        if found is None:
            return None
        former, basis = found
        return FormerState(int(former) if former else None, basis.decode())

    async def ledger_sequences(self, shard: int, epoch: int, portfolio_ids: Sequence[str]) -> Int64s:
        """Those of the portfolios' marks under an epoch; −1 without a mark."""
        marks: list[bytes] = []
        for start in range(0, len(portfolio_ids), MARKS_PER_READ_MAX):
            names = list(portfolio_ids[start : start + MARKS_PER_READ_MAX])
            found: list[Any] = await self._redis.hmget(redis_keys.marks(shard, epoch), names)
            marks += (mark if mark and len(mark) == MARK.itemsize else _NO_MARK for mark in found)
        return np.frombuffer(b"".join(marks), MARK)["ledger_sequence"].astype(np.int64)

    async def set_basis(self, shard: int, epoch: int, basis: str) -> bool:
        """Say what all positions of a shard were written with; False when another epoch has claimed them."""
        return bool(await run_script(self._redis, _SET_BASIS, [redis_keys.shard(shard)], [epoch, basis]))
