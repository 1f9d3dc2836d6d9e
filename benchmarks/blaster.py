"""A WebSocket server that acknowledges and then sends as fast as it is read: `python -m benchmarks.blaster PORT`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sys
from typing import cast

import uvloop

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_UPDATE = (
    b'{"id":"0","type":"next","payload":{"data":{"navUpdates":{"nav":"10250.123456","cash":"250.25",'
    b'"positionsValue":"9999.873206","quality":"LIVE","asOf":"2026-11-22T10:15:30.123456Z","sequence":123456}}}}'
)


def _frame(payload: bytes) -> bytes:
    size = len(payload)
    return (bytes((0x81, size)) if size < 126 else bytes((0x81, 126)) + size.to_bytes(2)) + payload


class Blaster(asyncio.Protocol):
    """Writes while the transport takes it; four messages at a time, as a socket with four subscriptions gets them."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's
        self._paused = False
        self._shaken = False
        self._parcel = _frame(_UPDATE) * 4

    def data_received(self, data: bytes) -> None:
        if self._shaken or b"Sec-WebSocket-Key: " not in data:
            return
        self._shaken = True
        key = data.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
        accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
        self._transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Protocol: graphql-transport-ws\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        self._transport.write(_frame(b'{"type":"connection_ack"}'))
        asyncio.get_running_loop().call_soon(self._send)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._send()

    def _send(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._transport.write(self._parcel)
            asyncio.get_running_loop().call_soon(self._send)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Blaster, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
