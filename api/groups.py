"""Groups: who shows the same of one portfolio, what each is sent, and when.

It is exactly what resolvers/streams.py says, which does the same for whatever can not be compiled:

    fresh      has seen no mark yet; the next one that its group is given is its SNAPSHOT, at once
    idle       shows the group's newest values; a change is sent at once when the interval since the last message is
               over (leading edge), else it is
    pending    until then (trailing edge), in the timer wheel, or until its socket is writable
    awaiting   the interval is over, and the next mark is near: it or the end of `await_s` is waited for
    heartbeat  `heartbeat_s` after the last message, when the group's mark still holds; where it does not the heartbeat
               is withheld, and the first mark that holds again is sent even if nothing selected changed

The newest mark of the portfolio and how many there were are in its cell (api/shard_marks.py), where the group looks
when it has something to send; a member remembers the count at its last message, so that `conflated` is a difference and
a mark costs nothing for those who wait. A mark is encoded once for all that are sent it with the same kind,
`conflated`, mark before and latency. Whoever comes when the process knows a newer mark than the one that is read for it
is shown the newer.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from api.heard import Heard
from api.outlets import Outlet
from engine.marks import SEQUENCE_AT, Row
from engine.stores.hot_state_reads import Place
from resolvers.stream_kind import StreamKind
from resolvers.streams import await_s

if TYPE_CHECKING:
    from api.delivery import Deliveries
    from api.hub import Hub

_SNAPSHOT, _UPDATE, _RESET, _HEARTBEAT = StreamKind.SNAPSHOT, StreamKind.UPDATE, StreamKind.RESET, StreamKind.HEARTBEAT


class Projection(Protocol):
    """What of a mark a subscription shows (api/projection.py)."""

    @property
    def key(self) -> Hashable: ...

    @property
    def compares_before(self) -> bool: ...

    @property
    def shows_latency(self) -> bool: ...

    def values(self, row: Row) -> Hashable: ...

    def encode(
        self,
        portfolio_id: str,
        row: Row,
        epoch: int,
        kind: StreamKind,
        conflated: int,
        latency_ms: float | None,
        before: Row | None,
    ) -> bytes: ...


class State(Enum):
    FRESH = auto()
    IDLE = auto()
    PENDING = auto()
    AWAITING = auto()
    GONE = auto()


class Member:
    """One subscription. `prefix` is what goes before each payload on its socket.

    base_count     the group's count of marks at the last message
    epoch, shown   those of the last message; the epoch is -1 before the first
    before         the mark of the last message, where the projection compares with it
    edge_tick      where it waits in the wheel for its trailing edge, or for the end of awaiting; -1 when it does not
    beat_tick      where it waits in the wheel for its heartbeat. It is not moved with every message: when it falls due,
                   it is put to where it should be by then
    """

    __slots__ = (
        "base_count",
        "beat_s",
        "beat_tick",
        "before",
        "edge_tick",
        "epoch",
        "group",
        "interval_s",
        "outlet",
        "prefix",
        "sent_s",
        "shown",
        "state",
        "withheld",
    )

    def __init__(self, group: Group, outlet: Outlet, prefix: bytes, interval_s: float, now_s: float) -> None:
        self.group = group
        self.outlet = outlet
        self.prefix = prefix
        self.interval_s = interval_s
        self.sent_s = now_s - interval_s
        self.beat_s = now_s
        self.base_count = 0
        self.epoch = -1
        self.shown: Hashable = None
        self.before: Row | None = None
        self.state = State.FRESH
        self.withheld = False
        self.edge_tick = -1
        self.beat_tick = -1


class Group:
    """The members that show the same of one portfolio. `row`, `epoch`, `heard` and `values` are of the mark that it
    looked at last, the one that made the cell's `count`."""

    __slots__ = (
        "awaited_count",
        "awaiting",
        "cache",
        "cache_latency_ms",
        "cell",
        "compares_before",
        "count",
        "deliveries",
        "epoch",
        "fresh",
        "heard",
        "idle",
        "members_count",
        "place",
        "projection",
        "row",
        "shows_latency",
        "values",
        "withheld_count",
    )

    def __init__(self, deliveries: Deliveries, hub: Hub, place: Place, projection: Projection) -> None:
        self.deliveries = deliveries
        self.place = place
        self.projection = projection
        self.compares_before = projection.compares_before
        self.shows_latency = projection.shows_latency
        self.epoch = self.count = -1
        self.row: Row = ()
        self.values: Hashable = None
        self.heard: Heard | None = None
        self.members_count = 0
        self.withheld_count = 0
        self.fresh: list[Member] = []
        self.idle: list[Member] = []
        self.awaiting: list[Member] = []
        self.awaited_count = -1
        self.cache: dict[tuple[StreamKind, int, int], bytes] = {}
        self.cache_latency_ms: float | None = None
        self.cell = hub.add_receiver(place, self)

    @property
    def current(self) -> bool:
        return self.cell.current

    def news(self, resumed: bool) -> None:
        if self._look():
            self._offer()
        elif self.withheld_count and self.current:
            self._resume()
        if self.awaiting and (self.count > self.awaited_count or resumed):
            self._take_awaited()
        if self.fresh:
            self._begin()
        if self.idle or self.awaiting:
            self.cell.tell()

    def _look(self) -> bool:
        """Look at the newest mark. Whether something selected changed, or the owner; not when it was known."""
        cell, count = self.cell, self.cell.count
        if count == self.count:
            return False
        row, epoch = cell.row, cell.epoch
        values = self.projection.values(row)
        changed = values != self.values or epoch != self.epoch
        self.count, self.row, self.epoch, self.heard, self.values = count, row, epoch, cell.heard, values
        if self.cache:
            self.cache.clear()
        return changed

    def begin(self, member: Member) -> None:
        """One more member, which is to see the next mark."""
        self.fresh.append(member)
        self.members_count += 1
        self.cell.tell()

    def _begin(self) -> None:
        """What is put now is the first mark of those who are fresh."""
        fresh, self.fresh = self.fresh, []
        now_s = self.deliveries.now_s()
        for member in fresh:
            member.base_count = self.count - 1
            self._take_or_wait(member, now_s)

    def _offer(self) -> None:
        """Something selected changed: everyone who is idle is shown it, now or when the interval is over."""
        now_s = self.deliveries.now_s()
        offered, self.idle = self.idle, []
        for member in offered:
            self._take_or_wait(member, now_s)

    def _resume(self) -> None:
        """The values hold again: those who were told nothing for that reason are told now."""
        now_s = self.deliveries.now_s()
        offered = [member for member in self.idle if member.withheld]
        self.idle = [member for member in self.idle if not member.withheld]
        for member in offered:
            self._take_or_wait(member, now_s)

    def _take_or_wait(self, member: Member, now_s: float) -> None:
        edge_s = member.sent_s + member.interval_s
        if not member.outlet.is_writable:
            member.state = State.PENDING
            member.outlet.waiting[member] = None
        elif now_s < edge_s:
            member.state = State.PENDING
            member.edge_tick = self.deliveries.schedule(edge_s, member)
        else:
            self._send(member, now_s)

    def fall_due(self, member: Member, now_s: float) -> None:
        """A pending member's interval is over, or an awaiting one has waited long enough."""
        if member.state is State.AWAITING:
            self.awaiting.remove(member)
            self._take_when_writable(member, now_s)
            return
        wait_s = await_s(self.cell.count - member.base_count, now_s - member.sent_s, member.interval_s)
        if not wait_s:
            self._take_when_writable(member, now_s)
            return
        # Of one count for all: a newer mark ends everybody's wait.
        self.awaited_count = self.cell.count
        member.state = State.AWAITING
        member.edge_tick = self.deliveries.schedule(now_s + wait_s, member)
        self.awaiting.append(member)
        self.cell.tell()

    def _take_awaited(self) -> None:
        now_s = self.deliveries.now_s()
        awaiting, self.awaiting = self.awaiting, []
        for member in awaiting:
            self.deliveries.drop_edge(member)
            self._take_when_writable(member, now_s)

    def _take_when_writable(self, member: Member, now_s: float) -> None:
        member.state = State.PENDING
        if member.outlet.is_writable:
            self.take(member, now_s)
        else:
            member.outlet.waiting[member] = None

    def take(self, member: Member, now_s: float) -> None:
        """A pending member's interval is over and its socket is writable."""
        self._look()
        resumed = member.withheld and self.current
        if member.epoch == self.epoch and member.shown == self.values and not resumed:
            self._rest(member)
        else:
            self._send(member, now_s)

    def _send(self, member: Member, now_s: float) -> None:
        kind, before = _UPDATE, member.before
        if member.epoch != self.epoch:
            kind, before = (_SNAPSHOT if member.epoch < 0 else _RESET), None
            member.epoch = self.epoch
        payload = self._encode(kind, self.count - member.base_count or 1, before)
        self.deliveries.send(member, payload, self.heard)
        member.base_count = self.count
        member.shown = self.values
        if self.compares_before:
            member.before = self.row
        if member.withheld and self.current:
            self._withhold(member, False)
        member.sent_s = member.beat_s = now_s
        self._rest(member)

    def _rest(self, member: Member) -> None:
        member.state = State.IDLE
        self.idle.append(member)
        self.cell.tell()
        if member.beat_tick < 0:
            member.beat_tick = self.deliveries.schedule_beat(member)

    def beat(self, member: Member, now_s: float) -> None:
        """An idle member was sent nothing for long, and its socket is writable."""
        if self.current:
            payload = self._encode(_HEARTBEAT, 0, None)
            self.deliveries.send(member, payload, None)
            member.sent_s = now_s
        else:
            self._withhold(member, True)
        member.beat_s = now_s
        member.beat_tick = self.deliveries.schedule_beat(member)

    def _withhold(self, member: Member, withheld: bool) -> None:
        self.withheld_count += withheld - member.withheld
        member.withheld = withheld

    def _encode(self, kind: StreamKind, conflated: int, before: Row | None) -> bytes:
        latency_ms = None
        if self.shows_latency and (kind is _UPDATE or kind is _RESET):
            latency_ms = self.deliveries.latency_ms(self.heard)
            if latency_ms != self.cache_latency_ms:
                self.cache.clear()
                self.cache_latency_ms = latency_ms
        if self.members_count == 1:
            return self.projection.encode(self.place[1], self.row, self.epoch, kind, conflated, latency_ms, before)
        # Within an epoch a sequence names a mark; -1 is none.
        key = (kind, conflated, -1 if before is None else before[SEQUENCE_AT])
        payload = self.cache.get(key)
        if payload is None:
            payload = self.projection.encode(self.place[1], self.row, self.epoch, kind, conflated, latency_ms, before)
            self.cache[key] = payload
        return payload

    def forget(self, member: Member) -> None:
        self._withhold(member, False)
        self.members_count -= 1
        if member.state is State.IDLE:
            self.idle.remove(member)
        elif member.state is State.FRESH:
            self.fresh.remove(member)
        elif member.state is State.AWAITING:
            self.awaiting.remove(member)
