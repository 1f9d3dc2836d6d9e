"""Ownership of shards in a real PostgreSQL: fair shares, leases that expire, epochs that fence, logs that change.

Rounds are simulated by calling what each evaluator calls every second, in random order; time is made to pass by
moving the instants stored in the database back.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.baselines import Baseline
from engine.booking import Record
from engine.instants import to_ns
from engine.runtime.connections import make_engine, postgres_dsn
from engine.runtime.settings import Settings
from engine.stores.ledger_postgres import Fenced, Lease, LedgerWriter
from engine.stores.shards_postgres import ShardCountChanged, Shards
from tests.bookkeeping import AT, opening, record

LOG = "cluster/topic"
LEASE_MS = 60_000  # time passes only where a test moves it
CUT_AT = datetime(2026, 11, 20, tzinfo=UTC)


@dataclass
class Member:
    """An evaluator as far as shards are concerned."""

    shards: Shards
    owned: dict[int, Lease] = field(default_factory=dict)
    moves: int = 0

    async def round(self) -> None:
        """Renew, take what was claimed, give back the surplus at once."""
        tenure = await self.shards.renew(self.owned.values(), LOG)
        self.owned = {shard: lease for shard, lease in self.owned.items() if shard in tenure.kept}
        self.owned |= {lease.shard: lease for lease in tenure.claimed}
        for shard in sorted(tenure.kept)[: tenure.surplus]:
            await self.shards.release(self.owned.pop(shard))
        self.moves += len(tenure.claimed) + tenure.surplus


@dataclass
class Cluster:
    engine: AsyncEngine
    admin: asyncpg.Connection
    members: list[Member] = field(default_factory=list)

    async def start(self, shards_count: int) -> None:
        await self.admin.execute("DELETE FROM shard")
        await self.admin.execute("DELETE FROM evaluator")
        self.members = []
        await Shards(self.engine, "setup", LEASE_MS).ensure(shards_count, LOG)

    def join(self, count: int = 1) -> list[Member]:
        joined = [Member(Shards(self.engine, f"m-{len(self.members) + n}", LEASE_MS)) for n in range(count)]
        self.members += joined
        return joined

    async def rounds(self, count: int, chance: random.Random) -> None:
        for _ in range(count):
            for member in chance.sample(self.members, len(self.members)):
                await member.round()

    async def pass_time(self, ms: int) -> None:
        by = timedelta(milliseconds=ms)
        await self.admin.execute("UPDATE shard SET lease_until = lease_until - $1::interval", by)
        await self.admin.execute("UPDATE evaluator SET seen_at = seen_at - $1::interval", by)

    def assert_fair(self, shards_count: int) -> None:
        """Every shard has one owner, and shares differ by at most one."""
        owned = [shard for member in self.members for shard in member.owned]
        assert sorted(owned) == list(range(shards_count))
        shares = [len(member.owned) for member in self.members]
        assert max(shares) - min(shares) <= 1, shares

    async def assert_still(self, chance: random.Random) -> None:
        """Nothing moves any more."""
        before = [member.moves for member in self.members]
        await self.rounds(3, chance)
        assert [member.moves for member in self.members] == before


@pytest.fixture
async def cluster(fresh_database: str) -> AsyncIterator[Cluster]:
    engine = make_engine(Settings(postgres_url=fresh_database), "test-shards")
    admin = await asyncpg.connect(postgres_dsn(fresh_database))
    yield Cluster(engine, admin)
    await admin.close()
    await engine.dispose()


# -- fair shares ---------------------------------------------------------------------------------------------


async def test_shares_are_fair_and_then_nothing_moves_for_any_number_of_shards_and_evaluators(
    cluster: Cluster,
) -> None:
    chance = random.Random(5)
    for shards_count in (1, 2, 3, 4, 7, 12):
        for live in (1, 2, 3, 4, 5):
            await cluster.start(shards_count)
            cluster.join(live)
            await cluster.rounds(4, chance)
            cluster.assert_fair(shards_count)
            await cluster.assert_still(chance)


async def test_evaluators_that_come_one_by_one_and_die_end_in_fair_shares(cluster: Cluster) -> None:
    chance = random.Random(6)
    for shards_count in (3, 4, 8, 11):
        await cluster.start(shards_count)
        for _ in range(5):
            cluster.join()
            await cluster.rounds(4, chance)
            cluster.assert_fair(shards_count)
            await cluster.assert_still(chance)
        while len(cluster.members) > 1:
            cluster.members.pop(chance.randrange(len(cluster.members)))
            await cluster.pass_time(LEASE_MS + 1)
            # The dead one's leases are gone; the living lost theirs too by this leap and claim what they can.
            for member in cluster.members:
                await cluster.admin.execute(
                    "UPDATE shard SET lease_until = now() + interval '1 hour' WHERE owner = $1", member.shards.owner
                )
                await cluster.admin.execute(
                    "UPDATE evaluator SET seen_at = now() WHERE owner = $1", member.shards.owner
                )
            before = {member.shards.owner: set(member.owned) for member in cluster.members}
            await cluster.rounds(4, chance)
            cluster.assert_fair(shards_count)
            assert all(before[member.shards.owner] <= set(member.owned) for member in cluster.members)


async def test_one_that_leaves_makes_nobody_give_shards_back(cluster: Cluster) -> None:
    chance = random.Random(7)
    await cluster.start(5)
    cluster.join(2)
    await cluster.rounds(4, chance)
    poorer, richer = sorted(cluster.members, key=lambda member: len(member.owned))
    await poorer.shards.leave()
    for lease in poorer.owned.values():
        await richer.round()
        await poorer.shards.release(lease)
    await richer.round()
    assert (len(richer.owned), richer.moves) == (5, 5)


async def test_a_lease_is_kept_by_renewal_and_lost_without(cluster: Cluster) -> None:
    await cluster.start(2)
    first, second = cluster.join(2)
    await first.round()
    assert len(first.owned) == 2
    await cluster.pass_time(LEASE_MS - 1_000)
    await first.round()
    await cluster.pass_time(LEASE_MS - 1_000)
    await second.round()
    assert not second.owned
    await cluster.pass_time(2_000)
    await second.round()
    assert len(second.owned) == 2
    tenure = await first.shards.renew(first.owned.values(), LOG)
    assert (tenure.kept, tenure.claimed) == (frozenset(), [])


async def test_a_given_back_shard_is_free_at_once_and_only_its_owner_can_give_it_back(cluster: Cluster) -> None:
    await cluster.start(1)
    first, second = cluster.join(2)
    await first.round()
    lease = first.owned[0]
    await second.shards.release(lease)
    await first.shards.release(Lease(0, lease.epoch - 1, LOG))
    assert (await first.shards.renew([lease], LOG)).kept == {0}
    await first.shards.release(lease)
    await second.round()
    assert second.owned[0].epoch == lease.epoch + 1
    assert not (await first.shards.renew([lease], LOG)).kept


async def test_the_epoch_grows_with_every_change_of_owner_and_with_no_renewal(cluster: Cluster) -> None:
    await cluster.start(1)
    first, second = cluster.join(2)
    epochs = []
    for member in (first, second, first, first):
        await member.round()
        await member.round()
        epochs.append(member.owned[0].epoch)
        await member.shards.release(member.owned.pop(0))
    assert epochs == [1, 2, 3, 4]


# -- logs and shard counts ------------------------------------------------------------------------------------


async def test_offsets_go_on_within_a_log_and_begin_anew_in_another(cluster: Cluster) -> None:
    await cluster.start(1)
    await cluster.admin.execute("UPDATE shard SET next_offset = 41")
    (member,) = cluster.join()
    await member.round()
    assert (await member.shards.load(member.owned[0], last_cut, no_quote)).next_offset == 41
    await member.shards.release(member.owned.pop(0))
    tenure = await member.shards.renew([], "another cluster/topic")
    assert tenure.claimed == [Lease(0, 2, "another cluster/topic")]
    assert (await member.shards.load(tenure.claimed[0], last_cut, no_quote)).next_offset == 0


async def test_a_shard_may_take_longer_to_load_than_a_transaction_may_stand_still(
    cluster: Cluster, fresh_database: str
) -> None:
    await cluster.start(1)
    (member,) = cluster.join()
    await member.round()
    await book(cluster, member.owned[0], record(opening("p-1")))
    engine = make_engine(Settings(postgres_url=fresh_database), "test-shards", idle_timeout_ms=100)

    def slow_last_cut(day_cut: str) -> int:
        time.sleep(0.4)
        return last_cut(day_cut)

    loaded = await Shards(engine, "slow", LEASE_MS).load(member.owned[0], slow_last_cut, no_quote)
    assert loaded.next_offset == 1
    await engine.dispose()


async def test_a_topic_of_another_size_is_refused_once_there_are_portfolios(cluster: Cluster) -> None:
    await cluster.start(2)
    (member,) = cluster.join()
    await member.round()
    await book(cluster, member.owned[0], record(opening("p-1")))
    await member.shards.ensure(2, LOG)
    for count in (1, 3):
        with pytest.raises(ShardCountChanged):
            await member.shards.ensure(count, LOG)


async def test_an_empty_ledger_takes_the_shape_of_any_topic(cluster: Cluster) -> None:
    await cluster.start(4)
    (member,) = cluster.join()
    for count in (6, 2, 3):
        await member.shards.ensure(count, LOG)
        ids = [row["id"] for row in await cluster.admin.fetch("SELECT id FROM shard ORDER BY id")]
        assert ids == list(range(count))


# -- day cuts ---------------------------------------------------------------------------------------------------


class Marks:
    def nav(self, portfolio_id: str) -> int:
        return 0

    def price(self, symbol: str) -> Decimal | None:
        return None

    def exposure(self, portfolio_id: str) -> tuple[int, int]:
        return 0, 0

    def position_day_base(self, portfolio_id: str, symbol: str) -> int:
        return 0


async def book(cluster: Cluster, lease: Lease, *records: Record) -> None:
    async def bury(letters: object) -> None:
        raise AssertionError(letters)

    await LedgerWriter(cluster.engine).book(lease, records, records[0].offset, Marks(), AT, bury, {})


def last_cut(_: str) -> int:
    return to_ns(CUT_AT)


def no_quote(_: str) -> None:
    return None


async def test_a_portfolios_cut_is_stored_once(cluster: Cluster) -> None:
    await cluster.start(1)
    (member,) = cluster.join()
    await member.round()
    lease = member.owned[0]
    await book(cluster, lease, record(opening("p-1")), record(opening("p-2"), 1))
    taken, again = Baseline("p-1", 5, 1, {"AAPL": 6}), Baseline("p-1", 7, 1, {}, estimated=True)
    await member.shards.store_cut(lease, CUT_AT, [taken])
    await member.shards.store_cut(lease, CUT_AT, [again, Baseline("p-2", 8, 1, {}, estimated=True)])
    rows = await cluster.admin.fetch("SELECT portfolio_id, nav, symbols, estimated FROM day_baseline ORDER BY 1")
    assert [tuple(row) for row in rows] == [
        ("p-1", Decimal("0.000005"), ["AAPL"], False),
        ("p-2", Decimal("0.000008"), [], True),
    ]


async def test_a_former_owner_neither_loads_nor_cuts(cluster: Cluster) -> None:
    await cluster.start(1)
    first, second = cluster.join(2)
    await first.round()
    former = first.owned[0]
    await book(cluster, former, record(opening("p-1")))
    await first.shards.release(former)
    await second.round()
    with pytest.raises(Fenced):
        await first.shards.load(former, last_cut, no_quote)
    with pytest.raises(Fenced):
        await first.shards.store_cut(former, CUT_AT, [Baseline("p-1", 5, 1, {})])
    assert not await cluster.admin.fetchval("SELECT count(*) FROM day_baseline")
    assert (await second.shards.load(second.owned[0], last_cut, no_quote)).next_offset == 1
