"""Keeps worker processes running.

A role whose process exits, with whatever status, is started again after a backoff: `BACKOFF_INITIAL_S`,
doubled with each exit up to `BACKOFF_MAX_S`, and back to the start once a process has lived for
`HEALTHY_AFTER_S`. A restart is safe because workers keep nothing that their stores do not (their leases run
out and are taken anew).

`run_until_signal` returns at the first SIGINT or SIGTERM and leaves stopping to the owner of the children:

    with ChildProcesses() as children:
        supervisor = Supervisor(children)
        supervisor.add("evaluator-0", [sys.executable, "-m", "navstream", "evaluator"], environment)
        supervisor.run_until_signal()
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import structlog

from engine.runtime.reaper import ChildProcesses

BACKOFF_INITIAL_S = 1.0
BACKOFF_MAX_S = 30.0
HEALTHY_AFTER_S = 60.0
# How late an exit may be noticed.
POLL_INTERVAL_S = 0.2

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Worker:
    """One role: running since `changed_at_s`, or, without a process, to be started at `changed_at_s`."""

    role: str
    argv: Sequence[str]
    env: Mapping[str, str]
    backoff_s: float
    changed_at_s: float
    process: subprocess.Popen[bytes] | None
    restart_count: int = 0


class ServerEnded(RuntimeError):
    """An embedded server has ended: its data or its address are gone, so the system can not go on."""


class Supervisor:
    """Not for use from several threads: `add`, `tick` and `run_until_signal` belong to one."""

    def __init__(
        self,
        children: ChildProcesses,
        *,
        backoff_initial_s: float = BACKOFF_INITIAL_S,
        backoff_max_s: float = BACKOFF_MAX_S,
        healthy_after_s: float = HEALTHY_AFTER_S,
    ) -> None:
        self._children = children
        self._backoff_initial_s = backoff_initial_s
        self._backoff_max_s = backoff_max_s
        self._healthy_after_s = healthy_after_s
        self._workers: dict[str, _Worker] = {}

    @property
    def pids(self) -> dict[str, int]:
        """The running processes by role; a role that waits for its restart has none."""
        workers = self._workers.values()
        return {worker.role: worker.process.pid for worker in workers if worker.process is not None}

    @property
    def restart_counts(self) -> dict[str, int]:
        return {worker.role: worker.restart_count for worker in self._workers.values()}

    def add(self, role: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Start a worker and keep it running; `env` is its whole environment.

        Raises ValueError when the role is known already.
        """
        if role in self._workers:
            raise ValueError(f"there is a worker {role!r} already")
        process = self._children.spawn(role, argv, env=env)
        worker = _Worker(role, tuple(argv), dict(env), self._backoff_initial_s, time.monotonic(), process)
        self._workers[role] = worker
        log.info("worker_started", role=role, pid=process.pid)

    def tick(self, now_s: float) -> None:
        """Notice exits and start what is due, at `now_s` of the monotonic clock."""
        for worker in self._workers.values():
            if worker.process is not None and self._children.has_exited(worker.process):
                self._note_exit(worker, worker.process, now_s)
            if worker.process is None and now_s >= worker.changed_at_s:
                self._restart(worker, now_s)

    def run_until_signal(self) -> signal.Signals:
        """Supervise until SIGINT or SIGTERM arrives, and return it. Must be called in the main thread.

        Raises ServerEnded when a server that this process started has ended.
        """
        with _stop_signals() as readable:
            while True:
                ready, _, _ = select.select([readable], [], [], POLL_INTERVAL_S)
                if ready:
                    received = signal.Signals(os.read(readable, 1)[0])
                    log.info("stopping", signal=received.name)
                    return received
                if ended := self._children.ended_servers():
                    raise ServerEnded(
                        f"the embedded {' and '.join(ended)} has ended; navstream ends too, start it again"
                    )
                self.tick(time.monotonic())

    def _note_exit(self, worker: _Worker, process: subprocess.Popen[bytes], now_s: float) -> None:
        lived_s = now_s - worker.changed_at_s
        if lived_s >= self._healthy_after_s:
            worker.backoff_s = self._backoff_initial_s
        self._children.forget(process)
        worker.process = None
        worker.changed_at_s = now_s + worker.backoff_s
        log.warning(
            "worker_exited",
            role=worker.role,
            pid=process.pid,
            status=process.returncode,
            lived_s=round(lived_s, 3),
            restart_in_s=worker.backoff_s,
        )
        worker.backoff_s = min(worker.backoff_s * 2, self._backoff_max_s)

    def _restart(self, worker: _Worker, now_s: float) -> None:
        worker.process = self._children.spawn(worker.role, worker.argv, env=worker.env)
        worker.changed_at_s = now_s
        worker.restart_count += 1
        pid, count = worker.process.pid, worker.restart_count
        log.info("worker_restarted", role=worker.role, pid=pid, restart_count=count)


@contextmanager
def _stop_signals() -> Iterator[int]:
    """While inside, SIGINT and SIGTERM each write their number to the pipe whose read end this yields.

    A pipe, because a signal handler may interrupt any line of Python, a lock's holder included.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)

    def note(number: int, _: FrameType | None) -> None:
        os.write(writable, bytes([number]))

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield readable
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(readable)
        os.close(writable)
