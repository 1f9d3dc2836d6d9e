"""The server's side of one connection: uvicorn's protocols, with what they leave open closed.

`SocketProtocol` lets the gateway write ready-made frames to a WebSocket's transport without ASGI's detour through a
task and a message. The socket is put into the scope as `extensions[DIRECT_WRITES]["socket"]`; where it is not, with
another server or a test client, everything is sent the ordinary way.

    writable     nothing waits in the process: what was written is in the kernel's hands. uvicorn's own sends wait for
                 the same, so that a client that stops reading holds one message here, and what the listening socket
                 allows in the kernel
    write        to an open socket, else nothing; frames are those of RFC 6455 without a mask, made by
                 `text_frame_head`
    give_up      for a client that does not read: the close frame waits behind what is stuck, and after
                 ABORT_DELAY_S the connection is dropped
    pings        a client that answers none is closed with 1013, which is worth a reconnect; uvicorn says 1011, which
                 is not. Its own pings are not answered while it does not read, else the answers would heap up

`HttpProtocol` puts `extensions[STREAMING]` into the scope: `drop` ends the connection whatever is still unsent, and
`shutdown` is an event that is set when the server ends, which uvicorn tells nobody whose answer is under way. It lets
an answer's next piece wait until the last is in the kernel's hands. It drops a connection whose request is not whole,
head and body, REQUEST_TIMEOUT_S after it began, or was to begin: uvicorn would keep it, and its few kilobytes, for
ever.
"""

from __future__ import annotations

import asyncio
import struct
from asyncio.transports import BaseTransport
from collections.abc import Callable
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from api.close_codes import TRY_LATER

DIRECT_WRITES = "navstream.direct_writes"
STREAMING = "navstream.streaming"
REQUEST_TIMEOUT_S = 10
ABORT_DELAY_S = 2
_FIN_TEXT = 0x81
_LENGTHS_COUNT = 4_096


class DirectSocket(Protocol):
    """A socket that can be written to directly."""

    @property
    def is_writable(self) -> bool: ...

    def watch(self, changed: Callable[[bool], None]) -> None:
        """Let `changed` be told when the socket becomes writable (True), or is no longer (False)."""

    def write(self, frames: bytes) -> None: ...

    def give_up(self, code: int, reason: str) -> None: ...


class SocketProtocol(WebSocketsSansIOProtocol):
    _changed: Callable[[bool], None] | None = None

    @property
    def is_writable(self) -> bool:
        return self.writable.is_set()

    def watch(self, changed: Callable[[bool], None]) -> None:
        self._changed = changed

    def write(self, frames: bytes) -> None:
        if self.handshake_complete and not (self.close_sent or self.disconnected or self.transport.is_closing()):
            self.transport.write(frames)

    def give_up(self, code: int, reason: str) -> None:
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        self.stop_keepalive()
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(ABORT_DELAY_S, self.transport.abort)

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        # Whatever the kernel does not take at once pauses writing; it is resumed when all of it is taken.
        self.transport.set_write_buffer_limits(high=0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._changed = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._changed is not None:
            self._changed(False)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._changed is not None:
            self._changed(True)

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.handshake_complete:
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[DIRECT_WRITES] = {"socket": self}

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def keepalive_timeout(self) -> None:
        self.pong_timer = None
        self.give_up(TRY_LATER.code, "no answer to a ping")


class HttpProtocol(HttpToolsProtocol):
    _request_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._shutdown = asyncio.Event()
        transport.set_write_buffer_limits(high=0)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_is_whole()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._await_request()
        super().on_message_begin()
        extensions: dict[str, Any] = {STREAMING: {"drop": self.transport.abort, "shutdown": self._shutdown}}
        self.scope["extensions"] = extensions

    def on_message_complete(self) -> None:
        self._request_is_whole()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._request_is_whole()
        super().handle_websocket_upgrade()

    def shutdown(self) -> None:
        self._shutdown.set()
        super().shutdown()

    def _await_request(self) -> None:
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(REQUEST_TIMEOUT_S, self.transport.abort)

    def _request_is_whole(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None


def text_frame_head(length: int) -> bytes:
    """The first bytes of an unmasked text frame of so many bytes."""
    if length < _LENGTHS_COUNT:
        return _HEADS[length]
    if length < 65_536:
        return struct.pack("!BBH", _FIN_TEXT, 126, length)
    return struct.pack("!BBQ", _FIN_TEXT, 127, length)


_HEADS = [bytes((_FIN_TEXT, length)) for length in range(126)]
_HEADS += [struct.pack("!BBH", _FIN_TEXT, 126, length) for length in range(126, _LENGTHS_COUNT)]
