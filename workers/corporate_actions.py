"""Corporate actions as an evaluator sees them: what is due, what its shards have booked, and in which shares it counts.

The evaluator that owns shard 0 records what the topic brings (engine.stores.actions_postgres); all of them read the
table every second and book each step on each of their shards, in the order of (instant, arrival).

A step's boundary is 1 ns before its instant. Once the flusher has everything up to there in the Book it waits
(`holds`), at most for HOLD_MAX_S, until the step is booked on every shard that the evaluator owns; quotes stamped at or
after the instant follow. So no NAV is ever made of new shares at an old price, or the other way round.

A quote stamped before a split that the Book has is in old shares and not applied (`adjusted`); one stamped at or after
a split that is due and not booked yet, because the ledger was away for too long, is withheld.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from hashlib import blake2b

import msgspec

from engine.amounts import plain
from engine.booking import AppliedSplit, StepPrices
from engine.corporate_actions import Split, Step, price_after
from engine.instants import to_ns
from engine.ledger import LedgerKind
from engine.messages import Quote
from engine.runtime import telemetry
from engine.stores.actions_postgres import ActionsStore, KnownAction, applied_splits, step_order

NO_SPLITS: tuple[Split, ...] = ()


class ActionSchedule:
    """Pure state; `ActionsStore` is only asked by `refresh` and `take`."""

    def __init__(self, store: ActionsStore) -> None:
        self._store = store
        self._actions: dict[str, KnownAction] = {}
        self._arrival = 0
        self._applied: dict[int, dict[tuple[str, LedgerKind], datetime]] = {}
        self._splits: dict[int, dict[str, list[AppliedSplit]]] = {}
        # Of all symbols: the splits in the Book's prices, the splits not booked by every shard of ours.
        self._in_book: dict[str, tuple[Split, ...]] = {}
        self._unbooked_splits: dict[str, int] = {}
        self._pending: list[Step] = []
        self._pending_at_ns: list[int] = []
        self._reached_ns = 0

    # -- asked by the flusher --------------------------------------------------------------------------------

    def next_boundary_ns(self, after_ns: int) -> int | None:
        """The first boundary after `after_ns` of a step that is not booked yet; None when there is none."""
        at = bisect_right(self._pending_at_ns, after_ns + 1)
        return self._pending_at_ns[at] - 1 if at < len(self._pending_at_ns) else None

    def holds(self, boundary_ns: int) -> bool:
        """Whether `boundary_ns`, up to which all quotes are in the Book now, may not be passed yet."""
        self.reach(boundary_ns)
        return bool(self._applied) and bool(self._pending_at_ns) and self._pending_at_ns[0] - 1 <= boundary_ns

    def adjusted(self, quote: Quote, first: bool) -> Quote | None:
        """The quote as the Book may take it; None when it is not to be applied.

        `first`: the Book has no price of the symbol yet, so an old one counts, in today's shares.
        """
        splits = self._in_book.get(quote.symbol, NO_SPLITS)
        if splits and splits[-1].effective_at_ns > quote.ts_event_ns:
            # A halt repeats the last good price, which the Book has already, in today's shares.
            counts = first or quote.condition == "HALTED"
            price = price_after(Decimal(quote.price), quote.ts_event_ns, splits) if counts else Decimal(0)
            if price:
                return msgspec.structs.replace(quote, price=plain(price))
            telemetry.QUOTES_BEFORE_SPLIT.inc()
            return None
        due_ns = self._unbooked_splits.get(quote.symbol)
        if due_ns is not None and due_ns <= quote.ts_event_ns and not first:
            telemetry.QUOTES_WITHHELD.inc()
            return None
        return quote

    def unbooked_splits(self, now_ns: int) -> dict[str, int]:
        """By symbol the instant of its first split that is due and that some shard of ours lacks."""
        return {symbol: at_ns for symbol, at_ns in self._unbooked_splits.items() if at_ns <= now_ns}

    # -- asked by the evaluator ------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Learn what arrived since. Raises AWAY errors."""
        arrived = await self._store.known(self._arrival)
        for action in arrived:
            self._actions[action.action_id] = action
            self._arrival = action.arrival
        if arrived:
            self._recount()

    async def take(self, shard: int) -> dict[str, list[Split]]:
        """Begin to own a shard; returns the splits, by symbol, that it brings and the Book's prices lack.

        Raises AWAY errors.
        """
        await self.refresh()
        applied = await self._store.applied(shard)
        before, self._applied[shard] = self._in_book, applied
        self._recount()
        brought = {s: [one for one in of if one not in before.get(s, NO_SPLITS)] for s, of in self._in_book.items()}
        return {symbol: splits for symbol, splits in brought.items() if splits}

    def drop(self, shard: int) -> None:
        if self._applied.pop(shard, None) is not None:
            self._recount()

    def reach(self, ns: int) -> None:
        """All quotes stamped up to `ns` are in the Book."""
        self._reached_ns = max(self._reached_ns, ns)

    def due(self) -> list[tuple[KnownAction, Step, list[int]]]:
        """The steps to book now, in order, each with the shards that lack it."""
        if not self._applied:
            return []
        due = self._pending[: bisect_right(self._pending_at_ns, self._reached_ns + 1)]
        return [(self._actions[step.action_id], step, self._lacking(step)) for step in due]

    def _lacking(self, step: Step) -> list[int]:
        return [shard for shard, applied in self._applied.items() if _key(step) not in applied]

    @property
    def next_pending_ns(self) -> int | None:
        """The instant of the first step that some shard lacks."""
        return self._pending_at_ns[0] if self._pending_at_ns else None

    def prices(self, step: Step, price: Decimal | None, ts_event_ns: int) -> StepPrices:
        """What the step does to the Book's `price` of its symbol, stamped `ts_event_ns`.

        A price of the step's instant or later is in new shares already, whether the step is late or not.
        """
        if step.scale is None or price is None or ts_event_ns >= to_ns(step.at):
            return StepPrices(price, price)
        split = Split(step.at, step.scale)
        if split in self._in_book.get(step.symbol, NO_SPLITS):
            return StepPrices(price_after(price, ts_event_ns, (Split(step.at, 1 / step.scale),)), price)
        return StepPrices(price, price_after(price, ts_event_ns, (split,)) or None)

    def booked(self, shard: int, step: Step, at: datetime) -> None:
        """The shard's ledger has the step."""
        self._applied[shard][_key(step)] = at
        if step.scale is not None:
            self._recount()
        elif not self._lacking(step):
            place = self._pending.index(step)
            del self._pending[place], self._pending_at_ns[place]

    def splits_of_shard(self, shard: int) -> Mapping[str, Sequence[AppliedSplit]]:
        return self._splits.get(shard, {})

    def splits_of(self, symbol: str) -> tuple[Split, ...]:
        """The splits of a symbol that are in quantities and prices of the Book."""
        return self._in_book.get(symbol, NO_SPLITS)

    def splits_digest(self) -> str:
        """Equal where the splits in quantities and prices of the Book are."""
        known = [(symbol, one.effective_at_ns, one.scale) for symbol, of in self._in_book.items() for one in of]
        return blake2b(repr(sorted(known)).encode(), digest_size=8).hexdigest()

    def _recount(self) -> None:
        """Derive everything else from the actions and what each shard has booked."""
        actions = self._actions.values()
        self._splits = {shard: applied_splits(actions, applied) for shard, applied in self._applied.items()}
        # Once in the Book's prices always in them, whatever becomes of the shard it came with.
        self._in_book = _union(self._in_book, self._splits.values())
        steps = (step for action in actions for step in action.steps)
        open_steps = [s for s in steps if any(_key(s) not in applied for applied in self._applied.values())]
        self._pending = sorted(open_steps, key=step_order)
        self._pending_at_ns = [to_ns(step.at) for step in self._pending]
        unbooked = [step for step in self._pending if step.scale is not None]
        self._unbooked_splits = {step.symbol: to_ns(step.at) for step in reversed(unbooked)}


def _key(step: Step) -> tuple[str, LedgerKind]:
    return step.action_id, step.kind


def _union(
    known: Mapping[str, Sequence[Split]], of_shards: Iterable[Mapping[str, Sequence[AppliedSplit]]]
) -> dict[str, tuple[Split, ...]]:
    found = {symbol: set(splits) for symbol, splits in known.items()}
    for splits in of_shards:
        for symbol, applied in splits.items():
            found.setdefault(symbol, set()).update(one.split for one in applied)
    return {symbol: tuple(sorted(splits, key=lambda one: one.effective_at)) for symbol, splits in found.items()}
