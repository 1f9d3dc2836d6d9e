"""A Redis Cluster of three masters from the embedded wheel, on loopback, for tests; each can be killed and come back.

Masters keep nothing but the cluster's topology: one that comes back is empty. Slots without a master leave the others'
in service, as production should have it (cluster-require-full-coverage no).
"""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from engine.runtime.embedded_start import START_ATTEMPTS_MAX, free_port
from engine.runtime.embedded_valkey import server_binary
from engine.runtime.reaper import ChildProcesses

SLOTS_COUNT = 16_384
MASTERS_COUNT = 3
START_TIMEOUT_S = 20
# So long without an answer, and a master counts as failed to the others.
NODE_TIMEOUT_MS = 1_000
_CONFIGURATION = """
bind 127.0.0.1
protected-mode yes
daemonize no
loglevel warning
save ""
appendonly no
cluster-enabled yes
cluster-require-full-coverage no
"""


class Master:
    def __init__(self, children: ChildProcesses, home: Path, password: str) -> None:
        self._children, self._home, self._password = children, home, password
        home.mkdir(mode=0o700)
        self.port = 0

    def start(self) -> None:
        """On a free port; once that is taken, on that one always."""
        for _ in range(START_ATTEMPTS_MAX):
            port, bus_port = (self.port, self.bus_port) if self.port else (free_port(), free_port())
            lines = f"port {port}\ncluster-port {bus_port}\ncluster-node-timeout {NODE_TIMEOUT_MS}\n"
            (self._home / "valkey.conf").write_text(f"{_CONFIGURATION}{lines}requirepass {self._password}\n")
            with (self._home / "valkey.log").open("ab") as log:
                argv = [str(server_binary()), "valkey.conf"]
                self._process = self._children.spawn("valkey", argv, cwd=self._home, stdout=log, stderr=log)
            if self._answers(port):
                self.port, self.bus_port = port, bus_port
                return
            self._children.forget(self._process)
        raise RuntimeError((self._home / "valkey.log").read_text())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._children.forget(self._process)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def ask(self, *command: str | int | bytes) -> object:
        with redis.Redis(port=self.port, password=self._password, socket_timeout=5) as client:
            return client.execute_command(*command)

    def _answers(self, port: int) -> bool:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline_s:
            try:
                with redis.Redis(port=port, password=self._password, socket_timeout=1) as client:
                    return bool(client.ping())
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
                time.sleep(0.01)
        return False


class RedisClusterServers:
    """`url` names all masters; slots are theirs in even parts, in their order."""

    def __init__(self, children: ChildProcesses, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.password = secrets.token_hex(16)
        self.masters = [Master(children, directory / f"master-{n}", self.password) for n in range(MASTERS_COUNT)]
        for master in self.masters:
            master.start()
        first = self.masters[0]
        for n, master in enumerate(self.masters):
            bounds = [SLOTS_COUNT * at // MASTERS_COUNT for at in (n, n + 1)]
            master.ask("CLUSTER", "ADDSLOTSRANGE", bounds[0], bounds[1] - 1)
            master.ask("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            if master is not first:
                first.ask("CLUSTER", "MEET", "127.0.0.1", master.port, master.bus_port)
        self.wait_until_whole()

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{master.port}" for master in self.masters)
        return f"redis+cluster://:{self.password}@{hosts}"

    def wait_until_whole(self) -> None:
        """Until every master sees all slots in service."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not all(self._sees_all(master) for master in self.masters):
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"no cluster: {[master.ask('CLUSTER', 'INFO') for master in self.masters]}")
            time.sleep(0.02)

    def flush(self) -> None:
        for master in self.masters:
            master.ask("FLUSHALL")

    def owner(self, key: str) -> Master:
        slot = int(str(self.masters[0].ask("CLUSTER", "KEYSLOT", key)))
        slots = self.masters[0].ask("CLUSTER", "SLOTS")
        assert isinstance(slots, list | dict)
        for low, high, node, *_ in slots if isinstance(slots, list) else ():
            if low <= slot <= high:
                return next(master for master in self.masters if master.port == node[1])
        raise LookupError(f"nobody has the slot of {key}")

    def move(self, key: str, target: Master, each_ms: int = 0) -> None:
        """Move the key's slot to another master, key by key, waiting so long after each."""
        with self.moving(key, target, each_ms):
            pass

    @contextmanager
    def moving(self, key: str, target: Master, each_ms: int = 0) -> Iterator[None]:
        """The slot's keys are at the target inside, the slot itself afterwards."""
        slot, source = int(str(target.ask("CLUSTER", "KEYSLOT", key))), self.owner(key)
        names = {master: bytes(master.ask("CLUSTER", "MYID")).decode() for master in (source, target)}  # type: ignore[call-overload]
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target])
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1):
            assert isinstance(keys, list)
            migrate = ("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "AUTH", self.password, "KEYS", *keys)
            source.ask(*migrate)
            time.sleep(each_ms / 1_000)
        yield
        for master in (target, source, *self.masters):
            master.ask("CLUSTER", "SETSLOT", slot, "NODE", names[target])

    @staticmethod
    def _sees_all(master: Master) -> bool:
        try:
            answer = master.ask("CLUSTER", "INFO")
        except redis.exceptions.RedisError:
            return False
        told = (
            {str(k): str(v) for k, v in answer.items()}
            if isinstance(answer, dict)
            else dict(line.split(":", 1) for line in bytes(answer).decode().split() if ":" in line)  # type: ignore[call-overload]
        )
        return (told["cluster_state"], told["cluster_slots_ok"], told["cluster_known_nodes"]) == (
            "ok",
            str(SLOTS_COUNT),
            str(MASTERS_COUNT),
        )
