"""Delivery: from a mark to the bytes on many sockets, without waking a task.

    hub ──row──► Group (portfolio, projection): encodes once ──► Member (one subscription) ──► Outlet (one socket)

A subscription whose selection was compiled (api/projection.py) becomes a `Member` of the `Group` of all that show the
same of the same portfolio (api/groups.py, which says who is sent what, and when). Its execution ends there, and with it
all that it held; its own task waits to be cancelled.

All that one pass (a frame, a tick of the wheel, a socket becoming writable) has for one socket leaves in one write,
WRITE_DELAY_S after the first of it. A socket that is not writable is written nothing and nothing is encoded for it; its
members wait, each with its group's mark as its one slot, and no one else notices. One that stays so for
`send_timeout_s` is given up: closed with 1013.

Deadlines, which are trailing edges, heartbeats and sockets that are stuck, wait in one timer wheel.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from typing import cast

import structlog

from api.groups import Group, Member, Projection, State
from api.heard import Heard
from api.hub import Hub
from api.metrics import Metrics
from api.outlets import Outlet
from api.wheel import Wheel
from engine.stores.hot_state_reads import Place
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Info

# A trailing edge is this late at most; what falls due within it shares its writes.
TICK_S = 0.005
# What several frames that come together have for one socket shares its write, which costs more than all before it.
WRITE_DELAY_S = 0.001
# By so much a sum of instants may miss the instant that it means.
_CLOCK_ERROR_S = 1e-4

_log = structlog.get_logger(__name__)


class Deliveries:
    """What a process has one of: the groups, the wheel, and what the current pass has to write."""

    def __init__(
        self,
        hub: Hub,
        metrics: Metrics,
        compile_projection: Callable[[Info], Projection | None],
        heartbeat_s: float,
        send_timeout_s: float,
        tick_s: float = TICK_S,
        write_delay_s: float = WRITE_DELAY_S,
    ) -> None:
        self.compile_projection = compile_projection
        self._hub = hub
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._send_timeout_s = send_timeout_s
        self._groups: dict[tuple[Place, Hashable], Group] = {}
        # By its key, and how many groups have it: a few are shared by thousands, and stay in the processor's cache.
        self._projections: dict[Hashable, tuple[Projection, int]] = {}
        self._write_delay_s = write_delay_s
        self._wheel: Wheel[Member | Outlet] = Wheel(tick_s)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._touched: list[Outlet] = []
        self._heard: list[Heard] = []
        self._written_ns = 0
        self._messages_count = 0

    def join(self, outlet: Outlet, prefix: bytes, place: Place, projection: Projection, interval_s: float) -> Member:
        """Begin a subscription. It must be left."""
        group = self._groups.get((place, projection.key))
        if group is None:
            group = self._begin_group(place, projection)
        member = Member(group, outlet, prefix, interval_s, self.now_s())
        group.begin(member)
        self._hub.begin_watch(place)
        return member

    def leave(self, member: Member) -> None:
        """End a subscription; nothing of it is left. Leaving twice is no fault."""
        if member.state is State.GONE:
            return
        group = member.group
        group.forget(member)
        member.state = State.GONE
        self.drop_edge(member)
        self._wheel.drop(member.beat_tick, member)
        member.beat_tick = -1
        member.outlet.waiting.pop(member, None)
        if not group.members_count:
            self._end_group(group)
        self._hub.end_watch()

    def _begin_group(self, place: Place, projection: Projection) -> Group:
        known, groups_count = self._projections.get(projection.key, (projection, 0))
        self._projections[known.key] = (known, groups_count + 1)
        group = self._groups[place, known.key] = Group(self, self._hub, place, known)
        return group

    def _end_group(self, group: Group) -> None:
        key = group.projection.key
        del self._groups[group.place, key]
        self._hub.drop_receiver(group.place, group)
        known, groups_count = self._projections.pop(key)
        if groups_count > 1:
            self._projections[key] = (known, groups_count - 1)

    def writable(self, outlet: Outlet) -> None:
        """A socket can be written to again: those who waited for it are served."""
        waiting, outlet.waiting = outlet.waiting, {}
        now_s = self.now_s()
        for member in waiting:
            edge_s = member.sent_s + member.interval_s
            if member.state is State.IDLE:
                self._beat(member, now_s)
            elif now_s < edge_s:
                member.edge_tick = self.schedule(edge_s, member)
            else:
                member.group.take(member, now_s)

    def watch_blocked(self, outlet: Outlet) -> int:
        """A socket can not be written to: it is given up unless `unwatch_blocked` comes in time."""
        return self.schedule(self.now_s() + self._send_timeout_s, outlet)

    def unwatch_blocked(self, tick: int, outlet: Outlet) -> None:
        self._wheel.drop(tick, outlet)

    def send(self, member: Member, payload: bytes, heard: Heard | None) -> None:
        outlet = member.outlet
        if not outlet.parts:
            if not self._touched:
                self._written_ns = time.time_ns()
                self._running_loop().call_later(self._write_delay_s, self._flush)
            self._touched.append(outlet)
        outlet.add(member.prefix, payload)
        self._messages_count += 1
        if heard is not None:
            if not heard.written_count:
                self._heard.append(heard)
            heard.written_count += 1

    def latency_ms(self, heard: Heard | None) -> float | None:
        """As of this pass; None for a mark that was read, or that no quote moved."""
        if heard is None:
            return None
        return heard.latency_ms(self._written_ns if self._touched else time.time_ns())

    def now_s(self) -> float:
        return self._running_loop().time()

    def schedule(self, due_s: float, entry: Member | Outlet) -> int:
        tick = self._wheel.add(due_s, entry)
        if self._timer is None or due_s < self._timer_s:
            self._arm()
        return tick

    def drop_edge(self, member: Member) -> None:
        self._wheel.drop(member.edge_tick, member)
        member.edge_tick = -1

    def schedule_beat(self, member: Member) -> int:
        return self.schedule(max(member.beat_s + self._heartbeat_s, self.now_s()), member)

    def _arm(self) -> None:
        due_s = self._wheel.next_due_s()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due_s is not None:
            self._timer_s = due_s
            self._timer = self._running_loop().call_at(due_s, self._turn)

    def _turn(self) -> None:
        """Serve all that is due."""
        self._timer = None
        now_s = self.now_s()
        tick = self._wheel.tick_of(now_s)
        for entry in self._wheel.take(now_s):
            try:
                if isinstance(entry, Member):
                    self._fall_due(entry, tick, now_s)
                else:
                    entry.give_up()
            except Exception:  # a defect of one is not to hold up the others
                _log.exception("entry_failed")
        self._arm()

    def _fall_due(self, member: Member, tick: int, now_s: float) -> None:
        if 0 <= member.edge_tick <= tick:
            member.edge_tick = -1
            member.group.fall_due(member, now_s)
        if 0 <= member.beat_tick <= tick:
            member.beat_tick = -1
            if member.state is State.IDLE:
                self._beat(member, now_s)

    def _beat(self, member: Member, now_s: float) -> None:
        if now_s < member.beat_s + self._heartbeat_s - _CLOCK_ERROR_S:
            member.beat_tick = self.schedule_beat(member)
        elif member.outlet.is_writable:
            member.group.beat(member, now_s)
        else:
            member.outlet.waiting[member] = None

    def _flush(self) -> None:
        """Write what the pass has. What the kernel does not take at once counts as written all the same."""
        touched, self._touched = self._touched, []
        for outlet in touched:
            try:
                outlet.flush()
            except Exception:
                _log.exception("outlet_failed")
        self._metrics.deliveries.inc(self._messages_count)
        self._messages_count = 0
        heard, self._heard = self._heard, []
        now_ns = time.time_ns()
        for one in heard:
            self._metrics.observe_written(now_ns, one.heard_ns, one.event_ns, one.written_count)
            one.written_count = 0

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop


class LiveOperation:
    """One operation's way to its outlet: what resolvers know as LiveDelivery.

    `deliver` only begins: graphql-core's execution ends there, and all that it held is let go. Whoever runs the
    operation waits in `ended`.
    """

    def __init__(self, deliveries: Deliveries, outlet: Outlet, prefix: bytes) -> None:
        self._deliveries = deliveries
        self._prefix = prefix
        self._outlet: Outlet | None = outlet
        self._member: Member | None = None

    def compile(self, info: Info) -> object | None:
        return self._deliveries.compile_projection(info)

    async def deliver(self, portfolio: PortfolioIdentity, projection: object, interval_s: float) -> None:
        if self._outlet is None:
            return
        place = (portfolio.shard, portfolio.portfolio_id)
        self._member = self._deliveries.join(
            self._outlet, self._prefix, place, cast(Projection, projection), interval_s
        )

    async def ended(self) -> None:
        """Wait for as long as something is delivered: until the operation is cancelled, if anything is."""
        if self._member is not None:
            await asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """Send nothing more, without waiting for the operation's task to be cancelled.

        What was made for it already leaves now: the next operation may have its id, and nothing of this one may come
        after that has begun.

        Timers that were begun meanwhile, such as those of a pool of connections, hold the operation's context for
        minutes, and with it this; so it lets go of what it had.
        """
        if self._member is not None:
            self._deliveries.leave(self._member)
            self._member.outlet.flush()
        self._member = self._outlet = None
