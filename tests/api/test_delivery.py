"""Compiled delivery: the same messages as graphql-core's way, one encoding for many, and nothing left behind."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import orjson
import pytest

from api.delivery import LiveOperation
from api.groups import Member, Projection, State
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.streams import await_s
from tests.api.two_ways import HEARTBEAT_S, INTERVAL_S, PLACE, SEND_TIMEOUT_S, STEP_S, TestOutlet, TwoWays
from tests.builders import MICRO, MarkRow
from tests.virtual_time import run_virtually

PNL = """subscription($id: String!, $rate: Float) {
  pnlUpdates(portfolioId: $id, maxRateHz: $rate) { kind conflated dayPnl change { nav price flows } } }"""
NAV = "subscription($id: String!, $rate: Float) { navUpdates(portfolioId: $id, maxRateHz: $rate) { %s } }"
SELECTIONS = [
    "kind nav conflated",
    "kind conflated cash",
    "kind epoch sequence",
    "k: kind worth: nav quality conflated asOf",
    "kind nav conflated",
]


@pytest.mark.parametrize("seed", range(60))
def test_both_ways_send_the_same_messages(seed: int) -> None:
    async def play() -> None:
        ways = TwoWays()
        await ways.play([*(NAV % selection for selection in SELECTIONS), PNL], seed, steps_count=150)
        for reader, outlet in ways.pairs:
            assert [value for _, value in outlet.messages] == [value for _, value in reader.messages]
            for (sent_s, _), (expected_s, _) in zip(outlet.messages, reader.messages, strict=True):
                assert sent_s == pytest.approx(expected_s, abs=0.002)
            assert len(reader.messages) > 5
        assert ways.hub.watches_count == 0 and not ways.deliveries._groups and not len(ways.deliveries._wheel)

    run_virtually(play())


class Counting:
    """A projection that counts what it is asked."""

    key = "counting"
    compares_before = False
    shows_latency = False

    def __init__(self) -> None:
        self.encoded: list[tuple[int, str, int]] = []
        self.compared_count = 0

    def values(self, row: tuple[int, ...]) -> int:
        self.compared_count += 1
        return row[0]

    def encode(
        self,
        portfolio_id: str,
        row: tuple[int, ...],
        epoch: int,
        kind: str,
        conflated: int,
        latency_ms: float | None,
        before: tuple[int, ...] | None,
    ) -> bytes:
        self.encoded.append((row[0] // MICRO, str(kind), conflated))
        return orjson.dumps(self.encoded[-1])


def join(ways: TwoWays, projection: Projection) -> tuple[TestOutlet, Member]:
    outlet = TestOutlet(ways.deliveries)
    return outlet, ways.deliveries.join(outlet, b"", PLACE, projection, INTERVAL_S)


def values_of(outlet: TestOutlet) -> list[list[object]]:
    return [value for _, value in outlet.messages]


def test_equal_subscriptions_share_one_encoding() -> None:
    async def play() -> None:
        ways, projection = TwoWays(), Counting()
        ways.hub.shard_live(PLACE[0], True)
        outlets = [join(ways, projection)[0] for _ in range(50)]
        ways.frame(nav=5 * MICRO)
        await asyncio.sleep(1.001 * INTERVAL_S)
        ways.frame(nav=6 * MICRO)
        await asyncio.sleep(STEP_S)
        assert projection.encoded == [(5, "SNAPSHOT", 1), (6, "UPDATE", 1)]
        assert all(values_of(outlet) == [[5, "SNAPSHOT", 1], [6, "UPDATE", 1]] for outlet in outlets)
        # While all wait for their trailing edge a mark is neither compared nor encoded.
        ways.frame(nav=7 * MICRO)
        compared_count = projection.compared_count
        for nav in range(8, 11):
            ways.frame(nav=nav * MICRO)
        assert projection.compared_count == compared_count
        await asyncio.sleep(INTERVAL_S)
        assert projection.encoded[2:] == [(10, "UPDATE", 4)]
        assert all(values_of(outlet)[-1] == [10, "UPDATE", 4] for outlet in outlets)

    run_virtually(play())


@pytest.mark.parametrize(
    ("many", "comes", "after"), [(5, True, 1.1), (5, False, 1.5), (20, True, 1.1), (20, False, 1.25)]
)
def test_where_many_marks_come_the_next_one_is_awaited(many: int, comes: bool, after: float) -> None:
    async def play() -> None:
        ways, projection = TwoWays(), Counting()
        ways.hub.shard_live(PLACE[0], True)
        outlet, member = join(ways, projection)
        ways.frame(nav=5 * MICRO)
        await asyncio.sleep(STEP_S)
        for nav in range(6, 16):
            ways.frame(nav=nav * MICRO)
        [(sent_s, _)] = outlet.messages
        await asyncio.sleep(INTERVAL_S)
        assert values_of(outlet) == [[5, "SNAPSHOT", 1]]
        if comes:
            ways.frame(nav=16 * MICRO)
        await asyncio.sleep(0.6 * INTERVAL_S)
        expected, after_s = (
            ([16, "UPDATE", 11], INTERVAL_S + STEP_S) if comes else ([15, "UPDATE", 10], 1.5 * INTERVAL_S)
        )
        assert values_of(outlet)[1:] == [expected]
        assert outlet.messages[1][0] - sent_s == pytest.approx(after_s, abs=0.001)
        ways.deliveries.leave(member)
        assert not len(ways.deliveries._wheel)

    run_virtually(play())


def test_a_process_that_is_late_does_not_wait_on() -> None:
    assert await_s(20, INTERVAL_S + 0.01, INTERVAL_S) == pytest.approx((INTERVAL_S + 0.01) / 4)
    assert await_s(20, INTERVAL_S + 0.03, INTERVAL_S) == 0


@pytest.mark.parametrize("leaves", [True, False])
def test_who_leaves_or_is_blocked_while_it_awaits_is_sent_nothing(leaves: bool) -> None:
    async def play() -> None:
        ways, projection = TwoWays(), Counting()
        ways.hub.shard_live(PLACE[0], True)
        outlet, member = join(ways, projection)
        for nav in range(5, 16):
            ways.frame(nav=nav * MICRO)
        await asyncio.sleep(1.1 * INTERVAL_S)
        assert member.state is State.AWAITING
        if leaves:
            ways.deliveries.leave(member)
        else:
            outlet.turn_writable(False)
        ways.frame(nav=16 * MICRO)
        await asyncio.sleep(INTERVAL_S)
        assert values_of(outlet) == [[5, "SNAPSHOT", 1]]
        if not leaves:
            ways.frame(nav=17 * MICRO)
            outlet.turn_writable(True)
            await asyncio.sleep(STEP_S)
            assert values_of(outlet)[1:] == [[17, "UPDATE", 12]]
            ways.deliveries.leave(member)
        assert not ways.deliveries._groups and not len(ways.deliveries._wheel)

    run_virtually(play())


def test_a_blocked_socket_keeps_one_value_and_is_given_up_in_the_end() -> None:
    async def play() -> None:
        ways, projection = TwoWays(), Counting()
        ways.hub.shard_live(PLACE[0], True)
        (slow, _), (quick, _) = join(ways, projection), join(ways, projection)
        slow.turn_writable(False)
        for nav in range(100):
            ways.frame(nav=nav * MICRO)
            await asyncio.sleep(1.001 * INTERVAL_S)
        assert not slow.messages and not slow.parts and len(slow.waiting) == 1
        assert values_of(quick)[1:] == [[nav, "UPDATE", 1] for nav in range(1, 100)]
        slow.turn_writable(True)
        await asyncio.sleep(STEP_S)
        assert values_of(slow) == [[99, "SNAPSHOT", 100]]
        await asyncio.sleep(SEND_TIMEOUT_S)
        assert not slow.given_up
        slow.turn_writable(False)
        await asyncio.sleep(SEND_TIMEOUT_S + STEP_S)
        assert slow.given_up and not quick.given_up

    run_virtually(play())


def test_who_leaves_is_sent_nothing_more_and_leaves_nothing() -> None:
    async def play() -> None:
        ways, projection = TwoWays(), Counting()
        ways.hub.shard_live(PLACE[0], True)
        members = [join(ways, projection) for _ in range(4)]
        (fresh, fresh_member), *others = members
        ways.deliveries.leave(fresh_member)
        ways.frame(nav=5 * MICRO)
        (idle, idle_member), (pending, pending_member), (waiting, waiting_member) = others
        ways.deliveries.leave(idle_member)
        waiting.turn_writable(False)
        ways.frame(nav=6 * MICRO)
        ways.deliveries.leave(pending_member)
        ways.deliveries.leave(waiting_member)
        ways.deliveries.leave(waiting_member)
        waiting.turn_writable(True)
        await asyncio.sleep(2 * HEARTBEAT_S)
        assert [len(outlet.messages) for outlet in (fresh, idle, pending, waiting)] == [0, 1, 1, 1]
        assert ways.hub.watches_count == 0 and ways.hub.shards() == set()
        assert not ways.deliveries._groups and len(ways.deliveries._wheel) == 0

    run_virtually(play())


def test_what_was_made_before_an_operation_ends_is_written_before_it_ends() -> None:
    """Whoever takes its id next must not be shown it."""

    async def play() -> None:
        ways, projection = TwoWays(), Counting()
        ways.hub.shard_live(PLACE[0], True)
        outlet, other = TestOutlet(ways.deliveries), TestOutlet(ways.deliveries)
        live = LiveOperation(ways.deliveries, outlet, b"")
        identity = PortfolioIdentity(PLACE[1], PLACE[0], "ann", "name", "USD", datetime(2026, 1, 1, tzinfo=UTC))
        await live.deliver(identity, projection, INTERVAL_S)
        ways.deliveries.join(other, b"", PLACE, projection, INTERVAL_S)
        ways.frame(nav=5 * MICRO)
        live.end()
        assert values_of(outlet) == [[5, "SNAPSHOT", 1]] and not outlet.parts
        await asyncio.sleep(STEP_S)
        assert len(outlet.messages) == len(other.messages) == 1

    run_virtually(play())


def test_a_defect_of_one_silences_nobody_else() -> None:
    """One can not be encoded, another one's socket fails as none should."""

    class Broken(Counting):
        key = "broken"

        def encode(self, *_: object) -> bytes:
            raise RuntimeError("a defect")

    class BrokenOutlet(TestOutlet):
        def write(self, frames: bytes) -> None:
            raise RuntimeError("another defect")

    async def play() -> None:
        ways = TwoWays()
        ways.hub.shard_live(PLACE[0], True)
        ways.deliveries.join(TestOutlet(ways.deliveries), b"", PLACE, Broken(), INTERVAL_S)
        ways.deliveries.join(BrokenOutlet(ways.deliveries), b"", PLACE, Counting(), INTERVAL_S)
        outlet, _ = join(ways, Counting())
        for nav in (5, 6):
            ways.frame(nav=nav * MICRO)
            await asyncio.sleep(2 * INTERVAL_S)
        assert [nav for nav, _, _ in values_of(outlet)] == [5, 6]

    run_virtually(play())


def test_late_subscribers_are_shown_what_is_known_however_old_the_read() -> None:
    async def play() -> None:
        ways, projection = TwoWays(), Counting()
        ways.hub.shard_live(PLACE[0], True)
        join(ways, projection)
        ways.frame(nav=5 * MICRO)
        late, _ = join(ways, projection)
        # Read before the frame was written, delivered after it.
        ways.row, ways.sequence = MarkRow(nav=4 * MICRO, sequence=1), 1
        ways.read()
        await asyncio.sleep(STEP_S)
        assert values_of(late) == [[5, "SNAPSHOT", 1]]

    run_virtually(play())


def test_a_rate_below_the_heartbeat_s_does_not_silence_it() -> None:
    async def play() -> None:
        ways, projection = TwoWays(), Counting()
        ways.hub.shard_live(PLACE[0], True)
        outlet = TestOutlet(ways.deliveries)
        ways.deliveries.join(outlet, b"", PLACE, projection, interval_s=3.5 * HEARTBEAT_S)
        ways.frame(nav=5 * MICRO)
        await asyncio.sleep(2.2 * HEARTBEAT_S)
        assert [kind for _, kind, _ in values_of(outlet)] == ["SNAPSHOT", "HEARTBEAT", "HEARTBEAT"]
        # A change waits for its interval, and no heartbeat says meanwhile that the old value is current.
        ways.frame(nav=6 * MICRO)
        await asyncio.sleep(3.2 * HEARTBEAT_S)
        assert len(outlet.messages) == 3
        await asyncio.sleep(0.5 * HEARTBEAT_S)
        assert values_of(outlet)[3:] == [[6, "UPDATE", 1]]

    run_virtually(play())
