"""Many subscribers in one process, with as little work of the client's own as can be.

`python -m benchmarks.subscribers < task`, where the task is the JSON of a `Task`; answers with the JSON of a `Tally`.
Server frames are told apart by their headers alone. Each is counted as it comes; a part of them (one socket in
SAMPLED_SOCKETS) is read, for the ages that messages say of themselves.
"""

from __future__ import annotations

import asyncio
import base64
import os
import resource
import struct
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import cast

import msgspec
import orjson
import uvloop

SAMPLED_SOCKETS = 20
SAMPLES_PER_SOCKET_MAX = 5_000
WARM_UP_TIMEOUT_S = 60
_TEXT, _CLOSE, _PING = 0x81, 0x88, 0x89


class Task(msgspec.Struct):
    """`sockets[n]` are the portfolios that socket n subscribes to, in the order of its subscriptions.

    It says `subscribed` on standard error when everything has been asked for, and `warm` when every subscription has
    had `warm_up_count` messages; then it counts for `seconds`.
    """

    port: int
    token: str
    query: str
    sockets: list[list[str]]
    seconds: float
    warm_up_count: int = 2
    connect_per_s: int = 200


class Tally(msgspec.Struct):
    """`as_of_ages_s` and `latencies_s`: of sampled messages the time since `asOf`, and their `latencyMs`."""

    deliveries: int
    bytes_count: int
    seconds: float
    client_cpu_s: float
    subscriptions: int
    as_of_ages_s: list[float]
    latencies_s: list[float]
    failures: list[str]


class Socket(asyncio.Protocol):
    """One WebSocket, spoken by hand: a handshake, masked frames out, unmasked frames in."""

    def __init__(self, task: Task, names: list[str], sampled: bool, count: Callable[[int, int], None]) -> None:
        self._task = task
        self.names = names
        self.sampled = sampled
        self._count = count
        self._buffer = b""
        self._shaken = False
        self.messages_count = 0
        self.sampling = False
        self.samples: list[tuple[float, bytes]] = []
        self.failure = ""
        self.subscribed = asyncio.Event()  # or failed
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET /graphql HTTP/1.1\r\nHost: 127.0.0.1:{self._task.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Protocol: graphql-transport-ws\r\n\r\n".encode()
        )

    def close(self) -> None:
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(self.failure or "the server closed the connection")

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.subscribed.set()

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        if not self._shaken:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._buffer = head
                return
            if b" 101 " not in head.partition(b"\r\n")[0]:
                self._fail(head.decode(errors="replace"))
                self._transport.close()
                return
            self._shaken = True
            payload = {"authorization": f"Bearer {self._task.token}"} if self._task.token else {}
            self._say({"type": "connection_init", "payload": payload})
        at, size, messages = 0, len(data), 0
        while at + 2 <= size:
            length, begins = data[at + 1], at + 2
            if length == 126:
                begins += 2
                if begins > size:
                    break
                length = int.from_bytes(data[at + 2 : begins])
            if begins + length > size:
                break
            if data[at] == _TEXT and self.messages_count:
                messages += 1
                if self.sampling and len(self.samples) < SAMPLES_PER_SOCKET_MAX:
                    self.samples.append((time.time(), data[begins : begins + length]))
            elif data[at] == _TEXT:
                self._acknowledged(data[begins : begins + length])
            elif data[at] == _PING:
                self._frame(0x8A, data[begins : begins + length])
            elif data[at] == _CLOSE:
                self._fail(repr(data[begins : begins + length]))
            at = begins + length
        self._buffer = data[at:]
        if messages:
            self.messages_count += messages
            self._count(messages, at)

    def _acknowledged(self, message: bytes) -> None:
        """The first message: every subscription is asked for."""
        if orjson.loads(message)["type"] != "connection_ack":
            self._fail(message.decode())
            return
        self.messages_count = 1
        for number, name in enumerate(self.names):
            payload = {"query": self._task.query, "variables": {"id": name}}
            self._say({"id": str(number), "type": "subscribe", "payload": payload})
        self.subscribed.set()

    def _say(self, message: object) -> None:
        self._frame(_TEXT, orjson.dumps(message))

    def _frame(self, opcode: int, payload: bytes) -> None:
        # A mask of zeros is a mask, and leaves the payload as it is.
        size = len(payload)
        head = struct.pack("!BB", opcode, 0x80 | size) if size < 126 else struct.pack("!BBH", opcode, 0xFE, size)
        self._transport.write(head + b"\0\0\0\0" + payload)


async def measure(task: Task) -> Tally:
    totals = [0, 0]

    def count(messages: int, size: int) -> None:
        totals[0] += messages
        totals[1] += size

    loop = asyncio.get_running_loop()
    sockets = []
    for number, names in enumerate(task.sockets):
        socket = Socket(task, names, number % SAMPLED_SOCKETS == 0, count)
        sockets.append(socket)
        await loop.create_connection(lambda made=socket: made, "127.0.0.1", task.port)  # type: ignore[misc]
        await asyncio.sleep(1 / task.connect_per_s)
    await asyncio.gather(*(one.subscribed.wait() for one in sockets))
    print("subscribed", file=sys.stderr, flush=True)
    give_up_s = time.monotonic() + WARM_UP_TIMEOUT_S
    while cold := [one for one in sockets if one.messages_count <= len(one.names) * task.warm_up_count]:
        failures = {one.failure for one in sockets if one.failure}
        if failures or time.monotonic() > give_up_s:
            sys.exit(
                f"{len(cold)} of {len(sockets)} sockets are cold, with {cold[0].messages_count} messages: {failures}"
            )
        await asyncio.sleep(0.05)
    print("warm", file=sys.stderr, flush=True)
    for socket in sockets:
        socket.sampling = socket.sampled
    before, cpu_before_s, started_s = list(totals), _cpu_s(), time.monotonic()
    await asyncio.sleep(task.seconds)
    seconds, cpu_s = time.monotonic() - started_s, _cpu_s() - cpu_before_s
    deliveries, size = totals[0] - before[0], totals[1] - before[1]
    ages, latencies = _ages([sample for socket in sockets for sample in socket.samples])
    failures = [socket.failure for socket in sockets if socket.failure]
    for socket in sockets:
        socket.close()
    subscriptions = sum(map(len, task.sockets))
    return Tally(deliveries, size, seconds, cpu_s, subscriptions, ages, latencies, failures[:3])


def _ages(samples: list[tuple[float, bytes]]) -> tuple[list[float], list[float]]:
    ages, latencies = [], []
    for at_s, message in samples:
        update = next(iter((orjson.loads(message).get("payload") or {}).get("data", {"": {}}).values()))
        if update.get("kind", "UPDATE") != "UPDATE":
            continue
        if "asOf" in update:
            ages.append(at_s - datetime.fromisoformat(update["asOf"]).timestamp())
        if update.get("latencyMs") is not None:
            latencies.append(update["latencyMs"] / 1e3)
    return ages, latencies


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(measure(task))))


if __name__ == "__main__":
    main()
