"""Outlets: how the messages of compiled streams (api/delivery.py) leave the process, one outlet for each socket.

What a pass has for an outlet leaves in one write. While it is not writable it is given nothing; the members that have
something for it wait in `waiting` and are served when it is writable again. One that is not for `send_timeout_s` is
given up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import orjson

from api.socket_protocol import DirectSocket, text_frame_head

if TYPE_CHECKING:
    from api.delivery import Deliveries
    from api.groups import Member


class Outlet(ABC):
    """The way out of one socket or stream: collects what a pass has for it, and writes it in one piece.

    `waiting` are the members to be served when it is writable.
    """

    def __init__(self, deliveries: Deliveries) -> None:
        self._deliveries = deliveries
        self._blocked_tick = -1
        self.is_writable = True
        self.parts: list[bytes] = []
        self.waiting: dict[Member, None] = {}

    @abstractmethod
    def add(self, prefix: bytes, payload: bytes) -> None:
        """Frame one message: `parts` grows."""

    @abstractmethod
    def write(self, frames: bytes) -> None: ...

    @abstractmethod
    def give_up(self) -> None:
        """It was not writable for too long."""

    def flush(self) -> None:
        """Write what was added, if it was not closed meanwhile."""
        if self.parts:
            frames = b"".join(self.parts)
            self.parts.clear()
            self.write(frames)

    def turn_writable(self, is_writable: bool) -> None:
        """It can be written to again, or can not any more."""
        if is_writable == self.is_writable:
            return
        self.is_writable = is_writable
        if is_writable:
            self._deliveries.unwatch_blocked(self._blocked_tick, self)
            self._deliveries.writable(self)
        else:
            self._blocked_tick = self._deliveries.watch_blocked(self)

    def close(self) -> None:
        """Nothing is written any more; its members are left by those who joined them."""
        self._deliveries.unwatch_blocked(self._blocked_tick, self)
        self.parts.clear()


class SocketOutlet(Outlet):
    """A WebSocket's, by direct writes. A prefix is the head of a `next` message (graphql-transport-ws)."""

    def __init__(self, deliveries: Deliveries, socket: DirectSocket, given_up: Callable[[], None]) -> None:
        super().__init__(deliveries)
        self._socket = socket
        self._given_up = given_up
        self.is_writable = socket.is_writable
        socket.watch(self.turn_writable)

    def add(self, prefix: bytes, payload: bytes) -> None:
        self.parts += (text_frame_head(len(prefix) + len(payload) + 1), prefix, payload, b"}")

    def write(self, frames: bytes) -> None:
        self._socket.write(frames)

    def give_up(self) -> None:
        self._given_up()


def next_prefix(operation_id: str) -> bytes:
    """What a `next` message of graphql-transport-ws begins with: all before its payload."""
    return b'{"id":' + orjson.dumps(operation_id) + b',"type":"next","payload":'
