"""The writing half of hot state against a real Valkey, a server and a cluster: exact bytes, fencing by epoch, and what
a lost Redis answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import RedisError

from engine.marks import MARK, FrameHeader, MarkArray, decode_frame, decode_mark
from engine.positions import HotPosition, hot_position_decoder
from engine.posting import PositionsChange
from engine.runtime.connections import RedisClient, connect_redis
from engine.runtime.settings import Settings
from engine.runtime.subscriber import Notice, NoticeKind, Subscriber
from engine.sectors import SectorValue, sector_value_decoder
from engine.stores import redis_keys
from engine.stores.hot_state_redis import SNAPSHOT_FRAMES_MAX, FlushOutcome, HotStateWriter, MarksLayout
from tests.redis_cluster import RedisClusterServers

SHARD = 3
NOW_NS = 1_700_000_000_000_000_000


@pytest.fixture
async def client(either_redis: str) -> AsyncIterator[RedisClient]:
    client = connect_redis(Settings(redis_url=either_redis, redis_timeout_s=5), "test")
    yield client
    await client.aclose()


@pytest.fixture
async def frames_heard(client: RedisClient) -> AsyncIterator[Subscriber]:
    """Listens to the shard's channel."""
    subscriber = Subscriber(client)
    subscriber.listen_to({redis_keys.marks_channel(SHARD)})
    confirmed = await subscriber.next(5)
    assert confirmed is not None and confirmed.kind is NoticeKind.CONFIRMED
    yield subscriber
    await subscriber.aclose()


def marks_of(count: int, first: int = 0) -> MarkArray:
    """Marks that differ in every field and row."""
    rows = np.zeros(count, MARK)
    for column, name in enumerate(MARK.names[:-1]):
        rows[name] = (np.arange(count) + first) * 1_000 + column + 1
    return rows


def place(writer: HotStateWriter, names: list[str]) -> np.ndarray:
    for slot, name in enumerate(names):
        writer.layout.place(slot, name)
    return np.arange(len(names), dtype=np.int64)


def header(epoch: int, sequence: int) -> FrameHeader:
    return FrameHeader(SHARD, epoch, sequence, sequence - 1, NOW_NS, 0)


def holding(quantity: str, symbol: str = "AAPL", *, replace: bool = False, name: str = "p-1") -> PositionsChange:
    sectors = {"Tech": SectorValue(7, 7)}
    return PositionsChange(name, replace, [], {symbol: HotPosition(quantity, 5, 6, 7, 8)}, sectors)


async def quantities(client: RedisClient, name: str = "p-1") -> dict[str, str]:
    packed = await client.hgetall(redis_keys.positions(SHARD, name))
    return {symbol.decode(): hot_position_decoder.decode(value).quantity for symbol, value in packed.items()}


# -- marks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], [1, 64, 1, 9, 10, 11, 64], list(range(1, 65))])
async def test_a_flush_writes_each_mark_under_its_id_whatever_the_ids_lengths(
    client: RedisClient, lengths: list[int]
) -> None:
    writer = HotStateWriter(client)
    names = [f"{number:x}".rjust(length, "p")[-length:] for number, length in enumerate(lengths)]
    slots = place(writer, names)
    await writer.advance(SHARD, 1, "me", NOW_NS)
    marks = marks_of(len(names))
    assert await writer.flush(header(1, 1), slots, marks) is FlushOutcome.WRITTEN
    stored = await client.hgetall(redis_keys.marks(SHARD, 1))
    assert stored == {name.encode(): row.tobytes() for name, row in zip(names, marks, strict=True)}


async def test_a_flush_of_some_slots_leaves_the_other_marks(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    names = [f"p-{10**number}" for number in range(6)] * 40
    names = [f"{name}-{number}" for number, name in enumerate(names)]
    slots = place(writer, names)
    await writer.advance(SHARD, 1, "me", NOW_NS)
    await writer.flush(header(1, 1), slots, marks_of(len(names)))
    chosen = slots[::7]
    await writer.flush(header(1, 2), chosen, marks_of(len(chosen), first=5_000))
    stored = await client.hgetall(redis_keys.marks(SHARD, 1))
    expected = dict(zip(names, marks_of(len(names)), strict=True))
    expected |= dict(zip([names[slot] for slot in chosen], marks_of(len(chosen), first=5_000), strict=True))
    assert stored == {name.encode(): row.tobytes() for name, row in expected.items()}


async def test_a_flush_to_a_server_is_there_before_anybody_waits(redis_db: str) -> None:
    client = connect_redis(Settings(redis_url=redis_db, redis_timeout_s=5), "test")
    writer = HotStateWriter(client)
    slots = place(writer, [f"p-{number:06d}" for number in range(600)])  # more than an event loop keeps back
    await writer.advance(SHARD, 1, "me", NOW_NS)
    assert await writer.flush(header(1, 1), slots[:1], marks_of(1)) is FlushOutcome.WRITTEN
    flushing = writer.flush(header(1, 2), slots, marks_of(600), 0)
    with redis.Redis.from_url(redis_db) as other:
        # The event loop has no turn meanwhile.
        assert any(other.hlen(redis_keys.marks(SHARD, 1)) == 600 for _ in range(1_000))
    assert await flushing is FlushOutcome.WRITTEN
    await client.aclose()


@given(st.permutations(range(200)), st.lists(st.integers(1, 20), min_size=200, max_size=200))
@settings(max_examples=20)
def test_slots_may_be_laid_out_in_any_order_and_again_under_other_names(order: list[int], lengths: list[int]) -> None:
    layout, names = MarksLayout(), {}
    for again in range(2):
        for slot in order:
            length = lengths[slot - again]
            names[slot] = f"{slot}".rjust(length, "x")[-length:]
            layout.place(slot, names[slot])
    slots = np.arange(200, dtype=np.int64)
    marks, found = marks_of(200), []
    for _, rows in layout.fill(slots, marks):
        found += [(row["id"], row["mark"].tobytes()) for row in rows]
    expected = [(names[slot].encode(), marks[slot].tobytes()) for slot in range(200)]
    assert sorted(found) == sorted(expected)


async def test_a_frame_carries_the_rows_that_were_written(client: RedisClient, frames_heard: Subscriber) -> None:
    writer = HotStateWriter(client)
    slots = place(writer, ["p-1", "p-22", "q-1"])
    await writer.advance(SHARD, 1, "me", NOW_NS)
    await writer.flush(header(1, 9), slots, marks_of(3))
    heard = await frames_heard.next(5)
    assert heard is not None
    found, groups = decode_frame(heard.data)
    assert found == header(1, 9)
    rows = {}
    for ids, packed in groups:
        for at, name in enumerate(ids):
            rows[name] = bytes(packed[at * MARK.itemsize : (at + 1) * MARK.itemsize])
    assert rows == await client.hgetall(redis_keys.marks(SHARD, 1))
    pointer = await client.hgetall(redis_keys.shard(SHARD))
    assert (pointer[b"sequence"], pointer[b"updated_at_ns"]) == (b"9", b"%d" % NOW_NS)


async def test_a_flush_without_slots_is_a_heartbeat_and_writes_no_mark(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    await writer.advance(SHARD, 1, "me", NOW_NS)
    assert await writer.flush(header(1, 1), np.zeros(0, np.int64), marks_of(0)) is FlushOutcome.WRITTEN
    assert not await client.exists(redis_keys.marks(SHARD, 1))


async def test_a_fenced_flush_publishes_nothing_and_its_marks_are_not_the_pointers(
    client: RedisClient, frames_heard: Subscriber
) -> None:
    writer = HotStateWriter(client)
    slots = place(writer, ["p-1"])
    await writer.advance(SHARD, 2, "newer", NOW_NS)
    await writer.flush(header(2, 1), slots, marks_of(1, first=70))
    assert (await frames_heard.next(5)) is not None
    assert await writer.flush(header(1, 8), slots, marks_of(1)) is FlushOutcome.FENCED
    assert await frames_heard.next(0.2) is None
    assert await client.hget(redis_keys.shard(SHARD), "sequence") == b"1"
    packed = await client.hget(redis_keys.marks(SHARD, 2), "p-1")
    assert decode_mark(packed, 2).nav == 70_001


async def test_a_redis_that_forgot_everything_answers_lost(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    slots = place(writer, ["p-1"])
    await writer.advance(SHARD, 1, "me", NOW_NS)
    await client.flushall()
    assert await writer.flush(header(1, 1), slots, marks_of(1)) is FlushOutcome.LOST
    assert not await client.exists(redis_keys.shard(SHARD))


async def test_a_redis_that_came_back_from_an_older_copy_answers_lost(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    slots = place(writer, ["p-1"])
    await writer.advance(SHARD, 1, "me", NOW_NS)
    assert await writer.flush(header(1, 1), slots, marks_of(1)) is FlushOutcome.WRITTEN
    keys = (redis_keys.shard(SHARD), redis_keys.marks(SHARD, 1))
    copies = [await client.dump(key) for key in keys]
    assert await writer.flush(header(1, 2), slots, marks_of(1)) is FlushOutcome.WRITTEN
    for key, copy in zip(keys, copies, strict=True):
        await client.restore(key, 0, copy, replace=True)
    nobody = np.zeros(0, np.int64)
    for sequence in (3, 4):
        assert await writer.flush(header(1, sequence), nobody, marks_of(0)) is FlushOutcome.LOST
    # Written again, it counts from there; and a new owner, who has not written yet, has nothing to miss.
    await writer.advance(SHARD, 1, "me", NOW_NS)
    assert await writer.flush(header(1, 6), slots, marks_of(1)) is FlushOutcome.WRITTEN
    await writer.advance(SHARD, 2, "me", NOW_NS)
    assert await writer.flush(header(2, 1), slots, marks_of(1)) is FlushOutcome.WRITTEN


async def test_an_error_reply_leaves_no_answer_behind_for_the_next_command(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    slots = place(writer, ["p-1"])
    await writer.advance(SHARD, 1, "me", NOW_NS)
    await client.set(redis_keys.marks(SHARD, 1), "no hash")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await writer.flush(header(1, 1), slots, marks_of(1))
    assert await client.hget(redis_keys.shard(SHARD), "owner") == b"me"
    await client.delete(redis_keys.marks(SHARD, 1))
    assert await writer.flush(header(1, 2), slots, marks_of(1)) is FlushOutcome.WRITTEN


async def test_a_slot_that_moves_while_shards_are_flushed_loses_nothing(
    cluster_db: RedisClusterServers,
) -> None:
    """Key by key, as `valkey-cli --cluster reshard` does it, to and fro."""
    client = connect_redis(Settings(redis_url=cluster_db.url, redis_timeout_s=5), "test")
    writer, shown = HotStateWriter(client), Subscriber(client)
    slots, key = place(writer, ["p-1", "p-22"]), redis_keys.shard(SHARD)
    await writer.advance(SHARD, 1, "me", NOW_NS)
    await writer.write_positions(SHARD, 1, [holding("1", name=f"p-{number}") for number in range(20)])
    shown.listen_to({redis_keys.marks_channel(SHARD)})
    notices: list[Notice] = []

    async def hear(kind: NoticeKind) -> None:
        async with asyncio.timeout(10):
            while not notices or notices[-1].kind is not kind:
                if (notice := await shown.next(1)) is not None and notice.kind is not NoticeKind.MESSAGE:
                    notices.append(notice)

    async def move() -> None:
        await hear(NoticeKind.CONFIRMED)
        for _ in range(2):
            target = next(master for master in cluster_db.masters if master is not cluster_db.owner(key))
            await asyncio.to_thread(cluster_db.move, key, target, 3)
            # At its new place the channel is confirmed again, so that what was missed is read.
            await hear(NoticeKind.LOST)
            await hear(NoticeKind.CONFIRMED)

    moving, outcomes, sequence = asyncio.create_task(move()), Counter[str](), 0
    while not moving.done() or sequence < 10:
        sequence += 1
        try:
            outcome = await writer.flush(header(1, sequence), slots, marks_of(2, first=sequence))
            outcomes[outcome.name] += 1
        except RedisError as error:
            outcomes[type(error).__name__] += 1
    await moving
    # What could not be flushed at once (the pointer here, the marks there) is flushed again, and then it is there.
    assert await writer.flush(header(1, sequence + 1), slots, marks_of(2, first=sequence + 1)) is FlushOutcome.WRITTEN
    assert outcomes.keys() <= {"WRITTEN", "TryAgainError"}
    assert outcomes["WRITTEN"] > 10
    stored = await client.hgetall(redis_keys.marks(SHARD, 1))
    assert [decode_mark(stored[name], 1).nav for name in (b"p-1", b"p-22")] == [
        1_000 * (sequence + 1) + 1,
        1_000 * (sequence + 2) + 1,
    ]
    assert [await quantities(client, f"p-{number}") for number in range(20)] == [{"AAPL": "1"}] * 20
    # While masters disagree about the slot, it may be lost and confirmed more than once.
    while (notice := await shown.next(0.2)) is not None:
        notices.append(notice)
    assert [notice.kind for notice in notices if notice.kind is not NoticeKind.MESSAGE][-1] is NoticeKind.CONFIRMED
    await writer.flush(header(1, sequence + 2), slots, marks_of(2))
    last = await shown.next(5)
    assert last is not None
    assert decode_frame(last.data)[0].sequence == sequence + 2
    await shown.aclose()
    await client.aclose()


# -- the pointer -------------------------------------------------------------------------------------------


async def test_the_pointer_only_moves_forward(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    assert await writer.advance(SHARD, 9, "nine", NOW_NS)
    assert await writer.advance(SHARD, 10, "ten", NOW_NS)
    assert not await writer.advance(SHARD, 9, "nine", NOW_NS)
    assert await writer.advance(SHARD, 10, "ten", NOW_NS)
    pointer = await client.hgetall(redis_keys.shard(SHARD))
    assert (pointer[b"epoch"], pointer[b"owner"]) == (b"10", b"ten")


async def test_moving_on_deletes_the_replaced_marks_and_no_others(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    slots = place(writer, ["p-1"])
    await writer.advance(SHARD, 1, "me", NOW_NS)
    for epoch in (1, 2):
        await writer.write_marks(SHARD, epoch, slots, marks_of(1))
    await writer.advance(SHARD, 2, "me", NOW_NS)
    assert not await client.exists(redis_keys.marks(SHARD, 1))
    await writer.advance(SHARD, 2, "me", NOW_NS)
    assert await client.exists(redis_keys.marks(SHARD, 2))


# -- snapshot frames ---------------------------------------------------------------------------------------


async def frames(client: RedisClient) -> list[bytes]:
    return await client.lrange(redis_keys.snapshots(SHARD), 0, -1)


async def test_snapshot_frames_lie_in_order_and_read_as_they_were_made(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    slots = place(writer, ["p-1", "p-22"])
    await writer.advance(SHARD, 4, "me", NOW_NS)
    made = [writer.encode(header(4, n), slots, marks_of(2, first=n)) for n in range(3)]
    for frame in made:
        assert await writer.push_snapshot(SHARD, 4, frame) == (FlushOutcome.WRITTEN, 0)
    assert await frames(client) == made
    found, groups = decode_frame(made[2])
    assert found == header(4, 2)
    navs = {ids[0]: decode_mark(packed, 4).nav for ids, packed in groups}
    assert navs == {b"p-1": 2_001, b"p-22": 3_001}


async def test_a_snapshot_frame_of_a_former_owner_is_refused(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    await writer.advance(SHARD, 5, "newer", NOW_NS)
    assert await writer.push_snapshot(SHARD, 4, b"frame") == (FlushOutcome.FENCED, 0)
    assert await frames(client) == []


@pytest.mark.parametrize("pointer", [None, 9])
async def test_a_snapshot_frame_before_its_epoch_is_published_is_not_taken_yet(
    client: RedisClient, pointer: int | None
) -> None:
    writer = HotStateWriter(client)
    if pointer is not None:
        await writer.advance(SHARD, pointer, "former", NOW_NS)
    assert await writer.push_snapshot(SHARD, 10, b"frame") == (FlushOutcome.LOST, 0)
    assert await frames(client) == []
    await writer.advance(SHARD, 10, "me", NOW_NS)
    assert await writer.push_snapshot(SHARD, 10, b"frame") == (FlushOutcome.WRITTEN, 0)


async def test_beyond_the_bound_the_oldest_snapshot_frames_are_dropped_and_counted(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    await writer.advance(SHARD, 1, "me", NOW_NS)
    await client.rpush(redis_keys.snapshots(SHARD), *(b"%d" % n for n in range(SNAPSHOT_FRAMES_MAX - 1)))
    assert await writer.push_snapshot(SHARD, 1, b"last that fits") == (FlushOutcome.WRITTEN, 0)
    assert await writer.push_snapshot(SHARD, 1, b"one too many") == (FlushOutcome.WRITTEN, 1)
    kept = await frames(client)
    assert (len(kept), kept[0], kept[-1]) == (SNAPSHOT_FRAMES_MAX, b"1", b"one too many")


# -- positions and sectors ---------------------------------------------------------------------------------


async def test_positions_and_sectors_are_written_whole_and_replaced(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    before = PositionsChange(
        "p-1",
        True,
        [],
        {"AAPL": HotPosition("1", 2, 3, 4, 5), "XOM": HotPosition("-9", 2, 3, 4, 5)},
        {"Tech": SectorValue(5, 5), "Energy": SectorValue(-15, 15)},
    )
    assert await writer.write_positions(SHARD, 1, [before])
    assert await quantities(client) == {"AAPL": "1", "XOM": "-9"}
    ranked = await client.zrange(redis_keys.sectors(SHARD, "p-1"), 0, -1, withscores=True)
    assert [(name, score) for name, score in ranked] == [(b"Tech", 0.25), (b"Energy", 0.75)]
    values = await client.hgetall(redis_keys.sector_values(SHARD, "p-1"))
    assert sector_value_decoder.decode(values[b"Energy"]) == SectorValue(-15, 15)
    changed = PositionsChange("p-1", False, ["XOM", "gone"], {"MSFT": HotPosition("4", 2, 3, 4, 5)}, {})
    assert await writer.write_positions(SHARD, 1, [changed])
    assert await quantities(client) == {"AAPL": "1", "MSFT": "4"}
    assert not await client.exists(redis_keys.sectors(SHARD, "p-1"), redis_keys.sector_values(SHARD, "p-1"))
    assert await writer.write_positions(SHARD, 1, [holding("7", "NEW", replace=True)])
    assert await quantities(client) == {"NEW": "7"}


async def test_positions_of_an_older_epoch_are_refused(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    await writer.advance(SHARD, 2, "newer", NOW_NS)
    await writer.write_positions(SHARD, 2, [holding("2")])
    assert not await writer.write_positions(SHARD, 1, [holding("1")])
    assert await quantities(client) == {"AAPL": "2"}


async def test_a_former_owner_can_not_write_between_the_new_ones_positions_and_its_pointer(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    await writer.advance(SHARD, 1, "former", NOW_NS)
    assert await writer.write_positions(SHARD, 2, [holding("2", replace=True)])
    assert not await writer.write_positions(SHARD, 1, [holding("1")])
    assert await quantities(client) == {"AAPL": "2"}


async def test_positions_written_before_the_pointer_do_not_make_one(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    slots = place(writer, ["p-1"])
    await writer.write_positions(SHARD, 2, [holding("2")])
    assert await writer.flush(header(2, 1), slots, marks_of(1)) is FlushOutcome.LOST


@pytest.mark.parametrize("count", [3_999, 4_000, 4_001, 9_500])
async def test_a_portfolio_of_thousands_of_positions_is_written_and_closed(client: RedisClient, count: int) -> None:
    writer = HotStateWriter(client)
    symbols = [f"S-{number}" for number in range(count)]
    positions = {symbol: HotPosition(symbol[2:], 1, 2, 3, 4) for symbol in symbols}
    sectors = dict.fromkeys(symbols, SectorValue(1, 1))
    assert await writer.write_positions(SHARD, 1, [PositionsChange("p-1", True, [], positions, sectors)])
    assert await quantities(client) == {symbol: symbol[2:] for symbol in symbols}
    assert await client.zcard(redis_keys.sectors(SHARD, "p-1")) == count
    assert await writer.write_positions(SHARD, 1, [PositionsChange("p-1", False, symbols, {}, {})])
    assert await quantities(client) == {}


async def test_more_portfolios_than_one_script_call_takes_are_all_written(client: RedisClient) -> None:
    writer = HotStateWriter(client)
    names = [f"p-{number}" for number in range(450)]
    assert await writer.write_positions(SHARD, 1, [holding(name[2:], name=name) for name in names])
    assert [await quantities(client, name) for name in names] == [{"AAPL": name[2:]} for name in names]
