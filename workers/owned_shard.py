"""A shard that this evaluator owns, and the evaluator as what moves and writes its Book sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.badges import Rule
from engine.baselines import Baseline
from engine.book import Book
from engine.book_columns import Int64s
from engine.stores.hot_state_former import FormerHotState
from engine.stores.hot_state_redis import HotStateWriter
from engine.stores.ledger_postgres import Lease
from engine.stores.shard_loading import LoadedShard
from engine.stores.shards_postgres import Shards
from workers.corporate_actions import ActionSchedule
from workers.quote_intake import QuoteIntake
from workers.sector_map import SectorMap


@dataclass(slots=True)
class SnapshotFrame:
    """All marks of a shard at a boundary, on their way to Redis. `made_at_s` is wall time."""

    boundary_ns: int
    data: bytes
    made_at_s: float


@dataclass(slots=True)
class Rewriting:
    """Positions that are being written again, and what all of them have once none is `left`."""

    basis: str
    left: list[str]


@dataclass(slots=True)
class OwnedShard:
    """A shard of ours: its lease, where to read on, its last frame, and what others still lack of it."""

    lease: Lease
    next_offset: int
    # The number of the newest marks, and of the newest ones that readers were told of.
    sequence: int = 0
    flushed_sequence: int = 0
    flushed_at_s: float = 0.0
    published: bool = False
    # The last attempt to bring hot state and the ledger what they lack failed.
    unsettled: bool = False
    # Redis did not take the last flush; no other before this (monotonic). 0: it did.
    away_until_s: float = 0.0
    # Of all positions: whether they are to be written again, since when they are, and what hot state says they have.
    positions_due: bool = False
    positions_written_at_s: float = -math.inf
    rewriting: Rewriting | None = None
    basis: str = ""
    basis_checked_at_s: float = -math.inf
    # Hot state was found to differ from the ledger: nothing in it counts.
    is_under_repair: bool = False
    # Slots whose marks are to be written in the next flush, watched or not: what was booked is shown at once.
    booked: list[Int64s] = field(default_factory=list)
    # The oldest quote that moved marks which could not be written: its instant, and when it was received.
    unwritten: tuple[int, int] = (0, 0)
    looked_at_s: float = 0.0
    cuts_due: list[tuple[int, list[Baseline]]] = field(default_factory=list)
    frames_due: list[SnapshotFrame] = field(default_factory=list)


class Badges(Protocol):
    """What is told of every portfolio that is loaded, and of every row that is about to be flushed or snapped."""

    @property
    def rules(self) -> Sequence[Rule]: ...

    def take(self, shard: int, loaded: LoadedShard, start: int, slots: Int64s) -> None: ...

    def drop(self, shard: int) -> None: ...

    def look(self, owned: OwnedShard, slots: Int64s, as_of_ns: int) -> None: ...


class Watched(Protocol):
    """Which slots somebody watches (workers.interest)."""

    changed: Callable[[], None]

    def slots_of(self, shard: int) -> Int64s | None: ...

    def is_watched(self, slots: Int64s) -> NDArray[np.bool_]: ...

    def opened(self, shard: int, portfolio_id: str) -> None: ...

    def taken(self, shard: int) -> None: ...


class Host(Protocol):
    """What the flusher needs of the evaluator it belongs to."""

    book: Book
    owned: dict[int, OwnedShard]
    quotes: QuoteIntake
    hot: HotStateWriter
    former: FormerHotState
    shards: Shards
    sectors: SectorMap
    actions: ActionSchedule

    @property
    def interest(self) -> Watched: ...

    @property
    def badges(self) -> Badges: ...

    def lose(self, lease: Lease, reason: str) -> None: ...
