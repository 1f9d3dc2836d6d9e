"""From the topic `corporate-actions` to the ledger and the Book of one evaluator.

The owner of shard 0 reads the whole topic and records each action once; a bad one, and one whose id is taken by other
content, goes to `corporate-actions.dlq`. Every evaluator books the steps that are due on its shards: one transaction
per shard, then the Book. All of it runs in the evaluator's events loop, between batches of events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Protocol

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import ConsumerRecord

from engine.book import Book
from engine.booking import Booked, DeadLetter, DueStep, Record
from engine.corporate_actions import CorporateAction, Step, decode_action, price_after
from engine.instants import HOUR_NS, to_datetime
from engine.messages import EventRejected
from engine.runtime import telemetry
from engine.runtime.clock import Clock
from engine.runtime.connections import AWAY
from engine.runtime.settings import Settings
from engine.stores.actions_postgres import ActionsStore, KnownAction
from engine.stores.badges_postgres import BatchProver
from engine.stores.ledger_postgres import Fenced, Lease
from workers.badge_proving import BadgeProving
from workers.batch_posting import post_in_steps, slots_in
from workers.corporate_actions import ActionSchedule
from workers.dead_letters import bury
from workers.flusher import Flusher, OwnedShard
from workers.hot_positions import HotPositions
from workers.sector_map import SectorMap

REFRESH_INTERVAL_S = 1.0
# Events wait for their turn at most this long when a step may become due meanwhile: quotes wait for the step.
PATIENCE_MS = 10
# A backlog of steps is booked in transactions of this many.
STEPS_PER_TRANSACTION_MAX = 100

_log = structlog.get_logger(__name__)


class Host(Protocol):
    """What booking actions needs of the evaluator it belongs to."""

    book: Book
    owned: dict[int, OwnedShard]
    producer: AIOKafkaProducer
    actions: ActionSchedule
    flusher: Flusher
    positions: HotPositions
    sectors: SectorMap
    badges: BadgeProving

    def lose(self, lease: Lease, reason: str) -> None: ...

    def is_leaving(self, shard: int) -> bool: ...

    def load_again(self, shard: OwnedShard) -> None: ...


class ActionBooking:
    def __init__(self, settings: Settings, clock: Clock, store: ActionsStore, host: Host) -> None:
        self._topic = settings.actions_topic
        self._clock = clock
        self._store = store
        self._host = host
        self._log_id = ""
        self._refreshed_at_s = 0.0
        # Where to read on, of all the topic's partitions.
        self.offsets: dict[TopicPartition, int] = {}

    async def open(self, consumer: AIOKafkaConsumer, log_id: str) -> None:
        """Find the topic's partitions and how far they have been read. Raises AWAY errors."""
        self._log_id = f"{log_id}/{self._topic}"
        partitions = [TopicPartition(self._topic, p) for p in await self._host.producer.partitions_for(self._topic)]
        first = await consumer.beginning_offsets(partitions)
        read = await self._store.offsets(self._log_id)
        self.offsets = {of: max(first[of], read.get(of.partition, 0)) for of in partitions}

    def patience_ms(self, otherwise_ms: int) -> int:
        """How long the events loop may wait for events before it looks for due steps again."""
        next_ns = self._host.actions.next_pending_ns
        return PATIENCE_MS if next_ns is not None and next_ns - self._clock.now_ns() < HOUR_NS else otherwise_ms

    async def record(self, lease: Lease, fetched: Mapping[int, Sequence[ConsumerRecord]]) -> None:
        """Keep what the topic brought. Raises AWAY errors: then the same records are fetched again."""
        actions: list[CorporateAction] = []
        origin: dict[int, tuple[int, Record]] = {}
        bad: dict[int, list[DeadLetter]] = {}
        for partition, records in fetched.items():
            for one in records:
                record = Record(one.offset, one.key, one.value)
                try:
                    action = decode_action(record.value)
                    actions.append(action)
                    origin[id(action)] = (partition, record)
                except EventRejected as error:
                    bad.setdefault(partition, []).append(DeadLetter(record, error.code, str(error)))
        moved = {partition: records[-1].offset + 1 for partition, records in fetched.items()}
        try:
            new, reused = await self._store.record(lease, self._log_id, moved, actions, self._now())
        except Fenced as error:
            self._host.lose(lease, str(error))
            return
        for action in reused:
            partition, record = origin[id(action)]
            reason = f"action {action.action_id} is recorded with other content"
            bad.setdefault(partition, []).append(DeadLetter(record, "ACTION_ID_REUSED", reason))
        for partition, letters in bad.items():
            telemetry.ACTIONS.labels("dead_letter").inc(len(letters))
            await bury(self._host.producer, self._topic, partition, letters)
        telemetry.ACTIONS.labels("recorded").inc(new)
        telemetry.ACTIONS.labels("duplicate").inc(len(actions) - new - len(reused))
        self.offsets |= {TopicPartition(self._topic, partition): offset for partition, offset in moved.items()}
        await self._host.actions.refresh()

    async def take(self, shard: int) -> None:
        """Begin to own a shard: prices that came before its splits go into its shares. Raises AWAY errors."""
        book = self._host.book
        for symbol, splits in (await self._host.actions.take(shard)).items():
            price = book.price(symbol)
            if price is not None and (after := price_after(price, book.price_as_of_ns(symbol), splits)):
                book.rescale(symbol, after)

    async def book_due(self) -> None:
        """Book every step that is due on every shard that lacks it. Raises AWAY errors."""
        now_s = time.monotonic()
        if now_s - self._refreshed_at_s >= REFRESH_INTERVAL_S:
            self._refreshed_at_s = now_s
            await self._host.actions.refresh()
        self._host.actions.reach(self._host.flusher.reached_ns)
        due = self._host.actions.due()[:STEPS_PER_TRANSACTION_MAX]
        if due:
            steps = self._priced(due)
            shards = sorted({shard for _, _, lacking in due for shard in lacking})
            lacking = {shard: [steps[at] for at, one in enumerate(due) if shard in one[2]] for shard in shards}
            # All come to an end before anything else is booked.
            with self._host.flusher.booking():
                outcomes = await asyncio.gather(*(self._book(of, lacking[of]) for of in shards), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            for symbol in {one.step.symbol for one in steps if one.step.scale is not None}:
                # Holders without an entry (they bought in new shares) are to have the new price's value as well.
                self._host.book.revalue(symbol)

    def _priced(self, due: Sequence[tuple[KnownAction, Step, list[int]]]) -> list[DueStep]:
        """The steps with the prices around each; of two splits of a symbol the second begins where the first ends."""
        book, moved = self._host.book, dict[str, Decimal | None]()
        steps = []
        for action, step, _ in due:
            price = moved.get(step.symbol, book.price(step.symbol))
            prices = self._host.actions.prices(step, price, book.price_as_of_ns(step.symbol))
            moved[step.symbol] = prices.after
            steps.append(DueStep(step, prices, action.recorded_at > step.at, action.content_hash))
        return steps

    async def _book(self, shard: int, due: Sequence[DueStep]) -> None:
        owned = self._host.owned.get(shard)
        if owned is None or self._host.is_leaving(shard):
            return
        at, prover = self._now(), self._host.badges.prover(shard)
        try:
            splits = self._host.actions.splits_of_shard(shard)
            booked, new = await self._store.book(owned.lease, due, at, splits, prover)
        except Fenced as error:
            self._host.lose(owned.lease, str(error))
            return
        except AWAY:
            # The commit may have happened without its answer: only the ledger knows, so the shard is read again.
            self._host.load_again(owned)
            raise
        if len(new) < len(due) or self._host.owned.get(shard) is not owned:
            self._host.load_again(owned)  # Somebody booked a step whom we did not know of.
            return
        for one in due:
            self._host.actions.booked(shard, one.step, at)
            # Another shard's posting may have done it, or a quote in new shares may have come, which counts more.
            book, symbol, after = self._host.book, one.step.symbol, one.prices.after
            if after is not None and book.price(symbol) == one.prices.before:
                book.rescale(symbol, after)
        await self._post(owned, due, booked, prover)

    async def _post(self, owned: OwnedShard, due: Sequence[DueStep], booked: Booked, prover: BatchProver) -> None:
        for letter in booked.dead_letters:
            telemetry.ACTION_HOLDERS_PASSED.inc()
            _log.error("holder_passed_over", code=letter.code, reason=letter.reason)
        # Positions without an entry (they were opened in new shares) are to name the split as well.
        owned.positions_due |= any(one.step.scale is not None for one in due)
        # A quote in new shares may come before all have their new quantities: nobody sees a worth of both.
        with self._host.flusher.holding(owned, slots_in(self._host.book, booked.touched)):
            await post_in_steps(self._host, owned, booked, cash_alone=False)
        self._host.badges.booked(prover, booked)
        for one in due:
            telemetry.ACTION_STEPS.labels(one.step.kind.value).inc()
        actions = [f"{one.step.action_id} {one.step.kind}" + " late" * one.late for one in due]
        _log.info("corporate_actions_booked", shard=owned.lease.shard, steps=actions, entries=len(booked.entries))

    def _now(self) -> datetime:
        return to_datetime(self._host.flusher.as_of_ns)
