"""The evaluator: owns shards, books their events, values their portfolios, writes hot state.

Five loops share one Book on one thread; it changes only between awaits, so no lock is needed:

    leases    every second: renew, claim up to the fair share, give back what is over it
    events    Kafka → one PostgreSQL transaction per shard and batch → Book → hot positions; likewise corporate actions
    quotes    Redis Pub/Sub → the latest quote per symbol, waiting for the next flush
    interest  Redis Pub/Sub → which portfolios somebody watches
    flushes   every `flush_interval_ms`: apply the waiting quotes, cut the day when it is time, write what is due

A shard is let go when its lease is lost, when a transaction or a flush finds a newer epoch, and at the end. Hot
state that can not be written is written again in full as soon as it can (`OwnedShard.published`).
"""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial

import structlog
import uuid_utils
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from engine.book import Book
from engine.booking import Record
from engine.instants import to_datetime
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from engine.runtime.connections import AWAY, Outage, connect_redis, make_engine, make_producer, stopped_within
from engine.runtime.settings import Settings
from engine.stores.actions_postgres import ActionsStore
from engine.stores.badges_postgres import BadgesStore
from engine.stores.hot_state_former import FormerHotState
from engine.stores.hot_state_redis import HotStateWriter
from engine.stores.ledger_postgres import Fenced, Lease, LedgerWriter, OffsetMoved
from engine.stores.shards_postgres import Shards
from engine.stores.thresholds_postgres import WatchedThresholds
from workers.action_booking import ActionBooking
from workers.badge_proving import BadgeProving
from workers.batch_posting import post_in_steps, slots_in
from workers.corporate_actions import ActionSchedule
from workers.dead_letters import bury
from workers.event_gathering import gather_events
from workers.flusher import Flusher, OwnedShard
from workers.hot_positions import HotPositions
from workers.interest import Interest
from workers.lifecycle import run_together
from workers.quote_intake import QuoteIntake
from workers.reclassification import Reclassification
from workers.sector_map import SectorMap
from workers.split_order import SplitOrder
from workers.take_over import TakeOver
from workers.threshold_watch import ThresholdWatch

HELD_INTERVAL_S = 0.01  # fills that wait for a split are looked at this often
# Kafka answers a fetch as soon as there are records; the embedded broker always lets it wait this long.
FETCH_WAIT_MS = 50
POLL_TIMEOUT_MS = 100  # how long a fetch waits for events; also how soon a claimed shard is taken up
# Booking makes small objects by the hundred thousand and hardly a cycle: looking for cycles after every 700 of them, as
# Python does by itself, takes a tenth of its time. So many new objects are some ten megabytes.
COLLECT_AFTER_COUNT = 50_000
LEAVE_TIMEOUT_S = 5  # giving shards back is a courtesy: they expire anyway

_log = structlog.get_logger(__name__)


class Evaluator:
    def __init__(self, settings: Settings, clock: Clock, taken: Callable[[], None] = lambda: None) -> None:
        """`taken` is called when shards have been taken up."""
        self._taken = taken
        self._settings = settings
        self._clock = clock
        self.owner = f"{socket.gethostname()}-{uuid_utils.uuid7()}"
        self.book = Book()
        self.owned: dict[int, OwnedShard] = {}
        # A process that stands still inside a transaction would keep its shards' rows locked beyond their leases.
        self._engine = make_engine(settings, "evaluator", settings.lease_duration_ms)
        self._redis = connect_redis(settings, "evaluator")
        self._ledger = LedgerWriter(self._engine)
        self.shards = Shards(self._engine, self.owner, settings.lease_duration_ms)
        self.sectors = SectorMap(self._engine)
        self.hot = HotStateWriter(self._redis)
        self.former = FormerHotState(self._redis)
        self.quotes = QuoteIntake(settings)
        actions_store = ActionsStore(self._engine)
        self.actions = ActionSchedule(actions_store)
        self._split_order = SplitOrder(clock, self.actions)
        self.badges = BadgeProving(BadgesStore(self._engine, settings.badge_topic), self)
        self.interest = Interest(settings, self.book, self._shards)
        self.flusher = Flusher(settings, clock, self)
        self.positions = HotPositions(clock, self)
        self._take_over = TakeOver(self, self.positions, self.flusher.time)
        self.booking = ActionBooking(settings, clock, actions_store, self)
        self.thresholds = ThresholdWatch(settings, WatchedThresholds(self._engine), self)
        self.flusher.watchers.append(self.thresholds.look)
        self._reclassification = Reclassification(self)
        self._consumer: AIOKafkaConsumer
        self.producer: AIOKafkaProducer
        self._log_id = ""
        self._claims: list[Lease] = []
        self._leaving: set[int] = set()
        # Shards that were let go, with the day bases that PostgreSQL has not got.
        self._cuts_kept: dict[int, OwnedShard] = {}
        self._settling = Outage("redis or postgresql")
        self._settle_at_s = 0.0

    def lose(self, lease: Lease, reason: str) -> None:
        """Note that a shard is no longer ours under this lease; the events loop lets go of it.

        What is said of an older lease than the one held comes too late to matter.
        """
        held = self.owned.get(lease.shard)
        if held is not None and held.lease.epoch <= lease.epoch and lease.shard not in self._leaving:
            _log.warning("shard_lost", shard=lease.shard, epoch=lease.epoch, reason=reason)
            self._leaving.add(lease.shard)

    def is_leaving(self, shard: int) -> bool:
        """Whether a shard that is owned still is about to be let go."""
        return shard in self._leaving

    def _shards(self) -> set[int]:
        """What is ours, and what will be as soon as it is loaded."""
        return self.owned.keys() | {lease.shard for lease in self._claims}

    async def run(self, stop: asyncio.Event) -> None:
        """Evaluate until `stop` is set, then give all shards back."""
        try:
            if not await self._connect(stop):
                return
            await run_together(
                self._keep_leases(stop),
                self._book_events(stop),
                self.quotes.run(stop),
                self.interest.run(stop),
                self.flusher.run(stop),
                self.thresholds.run(stop),
            )
        finally:
            await self._leave()

    async def _connect(self, stop: asyncio.Event) -> bool:
        outage = Outage("kafka")
        while not stop.is_set():
            self.producer = make_producer(self._settings, "evaluator")
            self._consumer = AIOKafkaConsumer(
                bootstrap_servers=self._settings.kafka_bootstrap,
                client_id="navstream-evaluator",
                enable_auto_commit=False,
                auto_offset_reset="none",
                isolation_level="read_committed",
                fetch_max_wait_ms=FETCH_WAIT_MS,
            )
            try:
                await self.producer.start()
                await self._consumer.start()
                partitions = await self.producer.partitions_for(self._settings.topic)
                self._log_id = await self._identify_log()
                await self.shards.ensure(len(partitions), self._log_id)
                await self.sectors.load()
                await self.badges.open()
                await self.booking.open(self._consumer, self._log_id)
                return True
            except AWAY as error:
                await self.producer.stop()
                await self._consumer.stop()
                await stopped_within(stop, outage.begin_or_continue(error))
        return False

    async def _identify_log(self) -> str:
        """Offsets count within one log: the cluster's own id and the topic, or what the settings name."""
        if self._settings.kafka_log_id:
            return self._settings.kafka_log_id
        admin = AIOKafkaAdminClient(bootstrap_servers=self._settings.kafka_bootstrap)
        await admin.start()
        try:
            cluster = await admin.describe_cluster()
        finally:
            await admin.close()
        return f"{cluster['cluster_id']}/{self._settings.topic}"

    # -- leases ----------------------------------------------------------------------------------------------

    async def _keep_leases(self, stop: asyncio.Event) -> None:
        outage = Outage("postgresql")
        while not stop.is_set():
            try:
                await self._renew()
                outage.end()
            except AWAY as error:
                outage.begin_or_continue(error)
            await stopped_within(stop, self._settings.lease_renewal_interval_ms / 1_000)

    async def _renew(self) -> None:
        held = [shard.lease for shard in self.owned.values()] + self._claims
        tenure = await self.shards.renew(held, self._log_id)
        for lease in held:
            if lease.shard not in tenure.kept:
                self._claims = [claimed for claimed in self._claims if claimed != lease]
                self.lose(lease, "lease expired")
        self._claims += tenure.claimed
        # Those that are about to be let go still count as ours in `tenure`.
        surplus = max(0, tenure.surplus - len(self._leaving & tenure.kept))
        for shard in sorted(self.owned.keys() - self._leaving)[:surplus]:
            _log.info("shard_given_back", shard=shard)
            self._leaving.add(shard)
        telemetry.SHARDS_OWNED.set(len(self.owned))
        telemetry.POSITIONS_HELD.set(self.book.positions_count)

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                # First of all: an evaluator that counts and owns nothing would make the others give shards back.
                await self.shards.leave()
                for lease in [shard.lease for shard in self.owned.values()] + self._claims:
                    await self.shards.release(lease)
        except AWAY:
            _log.warning("leases_left_to_expire", shards=sorted(self.owned))
        for client in ("_consumer", "producer"):
            if hasattr(self, client):
                await getattr(self, client).stop()
        await self._redis.aclose()
        await self._engine.dispose()

    # -- events ----------------------------------------------------------------------------------------------

    async def _book_events(self, stop: asyncio.Event) -> None:
        outage = Outage("kafka or postgresql")
        while not stop.is_set():
            try:
                await self._change_shards()
                await self.booking.book_due()
                await self._reclassification.follow()
                await self.badges.prove_due(self.flusher.as_of_ns)
                await self._poll()
                outage.end()
            except AWAY as error:
                # Nothing was booked: the same records are fetched again from the offsets still held.
                self._assign()
                await stopped_within(stop, outage.begin_or_continue(error))

    async def _change_shards(self) -> None:
        """Let go, take up, and bring every shard what it still lacks."""
        if self._leaving or self._claims:
            for number in list(self._leaving):
                await self._let_go(number)
            # Nothing is valued before the last prices are known.
            while self._claims and self.quotes.ready.is_set():
                lease = self._claims[0]
                await self._take(lease)
                self._claims = [claimed for claimed in self._claims if claimed is not lease]
                # Before anything of it is published: its quantities must be in the shares of the Book's prices.
                await self.booking.book_due()
                await self._settle()  # readers have the first shard while the others are loaded
                self._taken()
            self._assign()
        await self._settle()

    async def _settle(self) -> None:
        """Bring hot state and the ledger what they lack; booking goes on when Redis is away.

        What failed is tried last the next time: of a cluster, one node may be away.
        """
        if time.monotonic() < self._settle_at_s:
            return
        try:
            for owned in sorted(self.owned.values(), key=lambda owned: owned.unsettled):
                owned.unsettled = True
                try:
                    await self._take_over.settle(owned)
                except Fenced as error:
                    self.lose(owned.lease, str(error))
                owned.unsettled = False
        except AWAY as error:
            self._settle_at_s = time.monotonic() + self._settling.begin_or_continue(error)
        else:
            self._settling.end()

    async def _let_go(self, number: int) -> None:
        self._leaving.discard(number)
        if leaving := self.owned.pop(number, None):
            self._cuts_kept[number] = leaving
            self.book.drop_shard(number)
            self.badges.let_go(number)
            self.actions.drop(number)
            await self.shards.release(leaving.lease)

    async def _take(self, lease: Lease) -> None:
        """Load a claimed shard; it is published by the next `settle`."""
        before = self.owned.get(lease.shard)
        try:
            if before is not None:
                before.published = False
                await self._take_over.store_cuts(before)
            await self._store_kept_cuts(lease)
            await self.booking.take(lease.shard)
            owned = await self._take_over.take(lease)
        except Fenced as error:
            _log.warning("shard_lost", shard=lease.shard, epoch=lease.epoch, reason=str(error))
            self.lose(lease, str(error))
            return
        if before is not None and before.lease == lease:
            owned.sequence = before.sequence  # (epoch, sequence) orders marks, so it goes on within an epoch
        self.owned[lease.shard] = owned
        _log.info("shard_taken", shard=lease.shard, epoch=lease.epoch, next_offset=owned.next_offset)

    async def _store_kept_cuts(self, lease: Lease) -> None:
        """Store what was taken at cuts while the shard was ours, if nobody has owned it since: better than to make it
        from the ledger."""
        before = self._cuts_kept.get(lease.shard)
        if before is not None and before.lease.epoch + 1 == lease.epoch:
            await self._take_over.store_cuts(replace(before, lease=lease))
        self._cuts_kept.pop(lease.shard, None)

    def _assign(self) -> None:
        topic = self._settings.topic
        offsets = {TopicPartition(topic, number): shard.next_offset for number, shard in self.owned.items()}
        if 0 in self.owned:
            offsets |= self.booking.offsets
        self._consumer.assign(list(offsets))
        for partition, offset in offsets.items():
            self._consumer.seek(partition, offset)

    async def _poll(self) -> None:
        if not self.owned:
            await asyncio.sleep(POLL_TIMEOUT_MS / 1_000)
            return
        patience_ms = self.booking.patience_ms(POLL_TIMEOUT_MS)
        share = max(1, self._settings.event_batch_count_max // len(self.owned))
        fetched = await gather_events(self._consumer, patience_ms, share)
        self.flusher.catch_up()
        announced = {p.partition: fetched.pop(p) for p in list(fetched) if p.topic == self._settings.actions_topic}
        if announced and 0 in self.owned:
            await self.booking.record(self.owned[0].lease, announced)
        batches = (
            self._book_batch(self.owned[partition.partition], records)
            for partition, records in fetched.items()
            if partition.partition in self.owned and partition.partition not in self._leaving
        )
        # All come to an end before anything is fetched again: a shard never has two batches under way.
        with self.flusher.booking():
            outcomes = await asyncio.gather(*batches, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _book_batch(self, shard: OwnedShard, fetched: Sequence[object]) -> None:
        records = [
            Record(record.offset, record.key, record.value)  # type: ignore[attr-defined]
            for record in fetched
            if record.offset >= shard.next_offset  # type: ignore[attr-defined]
        ]
        bookable = self._split_order.bookable(shard.lease.shard, records)
        if len(bookable) < len(records):
            self._consumer.seek(TopicPartition(self._settings.topic, shard.lease.shard), records[len(bookable)].offset)
            await asyncio.sleep(HELD_INTERVAL_S)
        records = list(bookable)
        if not records:
            return
        prover = self.badges.prover(shard.lease.shard)
        try:
            with telemetry.BOOKING_TIME.time():
                booked = await self._ledger.book(
                    shard.lease,
                    records,
                    shard.next_offset,
                    self.book,
                    self._now(),
                    partial(bury, self.producer, self._settings.topic, shard.lease.shard),
                    self.actions.splits_of_shard(shard.lease.shard),
                    prover,
                )
        except Fenced as error:
            self.lose(shard.lease, str(error))
            return
        except OffsetMoved as error:
            _log.error("ledger_moved", reason=str(error))
            self.load_again(shard)
            return
        except AWAY:
            # The commit may have happened without its answer: only the ledger knows, so the shard is read again.
            self.load_again(shard)
            raise
        shard.next_offset = records[-1].offset + 1
        telemetry.EVENTS.labels("booked").inc(len(booked.entries))
        telemetry.EVENTS.labels("duplicate").inc(booked.duplicates)
        telemetry.UNCLASSIFIED.inc(len(booked.unclassified))
        if self.owned.get(shard.lease.shard) is not shard:
            return
        self.sectors.learn(booked.unclassified)
        await post_in_steps(self, shard, booked)
        self.badges.booked(prover, booked)
        # Flushed meanwhile, before badges knew of them, was what opened.
        opened = [name for name in booked.opened if name in self.book]
        self.badges.look(shard, slots_in(self.book, opened), self.flusher.as_of_ns)

    def load_again(self, shard: OwnedShard) -> None:
        """Read a shard from the ledger anew before anything else is booked on it."""
        if shard.lease not in self._claims:
            self._claims.append(shard.lease)

    def _now(self) -> datetime:
        """Never beyond a cut that has not been taken."""
        return to_datetime(self.flusher.as_of_ns)


async def run_evaluator(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
    """Run one evaluator process until `stop` is set."""
    gc.set_threshold(COLLECT_AFTER_COUNT)
    # What a shard consists of stays for good: to look through 20,000 portfolios for cycles would hold every flush up
    # for a tenth of a second.
    await Evaluator(settings, clock, taken=gc.freeze).run(stop)
