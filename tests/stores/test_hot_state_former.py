"""What a former owner left, on a real Valkey: claims fence, marks tell how far positions are."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
from redis.asyncio import Redis

from engine.marks import MARK
from engine.posting import PositionsChange
from engine.stores import hot_state_former, redis_keys
from engine.stores.hot_state_former import FormerHotState, FormerState
from engine.stores.hot_state_redis import HotStateWriter

SHARD = 3


@pytest.fixture
async def client(redis_db: str) -> AsyncIterator[Redis]:
    redis = Redis.from_url(redis_db, protocol=3)
    yield redis
    await redis.aclose()


@pytest.fixture
def former(client: Redis) -> FormerHotState:
    return FormerHotState(client)


async def test_a_claim_says_what_there_is(client: Redis, former: FormerHotState) -> None:
    assert await former.claim(SHARD, 4) == FormerState(None, "")
    await HotStateWriter(client).advance(SHARD, 4, "me", 1)
    assert await former.set_basis(SHARD, 4, "1/a/2")
    assert await former.claim(SHARD, 4) == FormerState(4, "1/a/2")
    assert await former.claim(SHARD, 5) == FormerState(4, "1/a/2")


async def test_a_claim_keeps_everybody_older_from_writing_positions_and_their_basis(
    client: Redis, former: FormerHotState
) -> None:
    writer, change = HotStateWriter(client), PositionsChange("p-1", True, (), {}, {})
    assert await writer.write_positions(SHARD, 4, [change])
    await former.claim(SHARD, 5)
    assert not await writer.write_positions(SHARD, 4, [change])
    assert not await former.set_basis(SHARD, 4, "1/a/2")
    assert await former.claim(SHARD, 4) is None
    assert await former.set_basis(SHARD, 5, "1/b/2")
    assert (await former.claim(SHARD, 6)) == FormerState(None, "1/b/2")
    assert not await former.set_basis(SHARD, 5, "1/a/2")


async def test_a_claim_behind_the_pointer_is_refused(client: Redis, former: FormerHotState) -> None:
    await HotStateWriter(client).advance(SHARD, 9, "other", 1)
    assert await former.claim(SHARD, 8) is None


async def test_marks_tell_their_ledger_sequences(
    client: Redis, former: FormerHotState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_state_former, "MARKS_PER_READ_MAX", 2)
    marks = np.zeros(3, MARK)
    marks["ledger_sequence"], marks["nav"] = (7, 0, 2**40), 99
    stored = {name: row.tobytes() for name, row in zip(("a", "b", "c"), marks, strict=True)}
    await client.hset(redis_keys.marks(SHARD, 4), mapping=stored | {"short": b"x"})
    sequences = await former.ledger_sequences(SHARD, 4, ["c", "nobody", "a", "short", "b"])
    assert sequences.tolist() == [2**40, -1, 7, -1, 0]
    assert (await former.ledger_sequences(SHARD, 5, ["a"])).tolist() == [-1]
    assert (await former.ledger_sequences(SHARD, 4, [])).tolist() == []
