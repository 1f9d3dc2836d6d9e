"""Child processes and temporary directories that cannot outlive the process that made them.

`ChildProcesses` starts children and stops them. Beside it runs a *reaper*: a tiny process in a session of
its own that holds the read end of a pipe whose only write end is here. Everything started is told to it
over the pipe, one JSON object a line. However this process ends, kill -9 included, the kernel closes the
write end; the reaper reads end-of-file, and within `REAP_GRACE_S` + `KILL_GRACE_S` seconds it

1. sends each child still alive its stop signal (SIGTERM; for PostgreSQL SIGINT, its fast shutdown),
2. after `REAP_GRACE_S` seconds sends SIGKILL to what is left of them and of their descendants,
3. removes the temporary directories.

A child is known by pid *and* creation time, so a reused pid is never signalled. Nothing here is Linux-only.

Invariants:
- A child runs its program only after the reaper has been told about it: it waits on its standard input
  until then, and when the parent dies meanwhile it reads end-of-file instead and exits. There is no moment
  at which a kill -9 could leave a child behind.
- No child holds the write end: it is closed on exec, and after a bare fork it is closed here.
- A child leads its own session, so the terminal's Ctrl-C reaches the parent only, which then stops it in
  order.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import psutil

# What the reaper gives the children of a dead parent before SIGKILL, and then the kernel to finish.
REAP_GRACE_S = 3.0
KILL_GRACE_S = 1.0
# What an orderly stop gives all workers together, and then all servers together.
WORKERS_STOP_TIMEOUT_S = 10.0
SERVERS_STOP_TIMEOUT_S = 5.0
# Creation times count from a boot time that the kernel itself reports differently by a second at times.
CREATE_TIME_TOLERANCE_S = 2.0
POLL_INTERVAL_S = 0.02
REAPER_START_TIMEOUT_S = 20.0
_READY = b"ready\n"
# `read` takes one byte at a time, so the program finds the rest of its standard input untouched.
_WAIT_THEN_EXEC = 'read -r go && exec "$@"'


class Tier(enum.IntEnum):
    """Who is stopped first: workers, all together, while the servers that they write to still answer."""

    SERVER = 0
    WORKER = 1


@dataclass(frozen=True, slots=True)
class Account:
    """The operating system account a child runs as. Only root may name one."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Child:
    role: str
    process: subprocess.Popen[bytes]
    tier: Tier
    stop_signal: signal.Signals


class ChildProcesses:
    """The children and temporary directories of this process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._children: list[Child] = []
        self._messages: dict[str, dict[str, object]] = {}
        self._reaper: subprocess.Popen[bytes] | None = None
        self._after_stop = contextlib.ExitStack()
        self._stopped = False
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(this()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_all()

    def spawn(
        self,
        role: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        account: Account | None = None,
        stdin: bytes = b"",
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        pass_fds: Sequence[int] = (),
        stop_signal: signal.Signals = signal.SIGTERM,
        tier: Tier = Tier.WORKER,
    ) -> subprocess.Popen[bytes]:
        """Start `argv` as a child in its own session; `env` None means this process's environment.

        `stdin` must fit into a pipe (4 KiB everywhere). Raises RuntimeError after `stop_all`. A program that
        cannot be executed is not an exception but an exit status of 126 or 127.
        """
        privileges: dict[str, Any] = {}
        if account is not None:
            privileges = {"user": account.uid, "group": account.gid, "extra_groups": []}
        with self._lock:
            if self._stopped:
                raise RuntimeError(f"cannot start {role}: the child processes have been stopped")
            process = subprocess.Popen(  # noqa: S603 - the caller's argv, and no shell sees it as text.
                ["/bin/sh", "-c", _WAIT_THEN_EXEC, role, *argv],
                env=env,
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                pass_fds=pass_fds,
                start_new_session=True,
                **privileges,
            )
            self._children.append(Child(role, process, tier, stop_signal))
            with contextlib.suppress(psutil.NoSuchProcess):
                created_s = psutil.Process(process.pid).create_time()
                self._tell(f"pid {process.pid}", {"pid": process.pid, "created_s": created_s, "signal": stop_signal})
        self._release(process, stdin)
        return process

    def run(self, role: str, argv: Sequence[str], *, timeout_s: float, **options: Any) -> tuple[int, str]:
        """Start, wait, return (exit status, output). Raises subprocess.TimeoutExpired, having killed it."""
        process = self.spawn(role, argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except BaseException:
            _kill_group(process)
            raise
        finally:
            self.forget(process)
        return process.returncode, output.decode(errors="replace")

    def has_exited(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether a child has exited; what it left running in its process group is killed then."""
        try:
            _wait_for(process, 0.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ended_servers(self) -> list[str]:
        """The roles of servers that have exited although nobody stopped them."""
        with self._lock:
            servers = [child for child in self._children if child.tier is Tier.SERVER]
        return [child.role for child in servers if self.has_exited(child.process)]

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a child and drop it; its pid may be reused from here on."""
        _wait_for(process, None)
        if process.stdout is not None:
            process.stdout.close()
        with self._lock:
            self._children = [child for child in self._children if child.process is not process]
            self._untell(f"pid {process.pid}")

    def temporary_directory(self, prefix: str, *, mode: int = 0o700, base: Path | None = None) -> Path:
        """A new directory that is removed by `stop_all`, or by the reaper."""
        path = (base or Path(tempfile.gettempdir())).absolute() / f"{prefix}{secrets.token_hex(8)}"
        with self._lock:
            # The reaper is told first: a directory that was not made yet is nothing to remove.
            self._tell(f"directory {path}", {"directory": str(path)})
            path.mkdir(mode=0o700)
            path.chmod(mode)
        return path

    def after_stop(self, callback: Callable[[], object]) -> None:
        """Call this once everything has stopped, the latest first."""
        self._after_stop.callback(callback)

    def stop_all(
        self,
        workers_stop_timeout_s: float = WORKERS_STOP_TIMEOUT_S,
        servers_stop_timeout_s: float = SERVERS_STOP_TIMEOUT_S,
    ) -> None:
        """Stop workers, then servers, SIGKILL to those over their time; remove directories. Idempotent."""
        with self._lock:
            self._stopped = True
        self._stop(Tier.WORKER, workers_stop_timeout_s)
        self._stop(Tier.SERVER, servers_stop_timeout_s)
        for message in list(self._messages.values()):
            if "directory" in message:
                shutil.rmtree(str(message["directory"]), ignore_errors=True)
        self._messages.clear()
        self._after_stop.close()
        self._end_reaper()

    def _stop(self, tier: Tier, stop_timeout_s: float) -> None:
        """Latest first, all signalled before the first is waited for."""
        children = [child for child in reversed(self._children) if child.tier is tier]
        for child in children:
            child.process.send_signal(child.stop_signal)
        deadline_s = time.monotonic() + stop_timeout_s
        for child in children:
            try:
                _wait_for(child.process, max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill_group(child.process)
            self.forget(child.process)

    def _release(self, process: subprocess.Popen[bytes], stdin: bytes) -> None:
        """Let the child go on to its program, which reads `stdin` and then end-of-file."""
        pipe, process.stdin = process.stdin, None
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError), pipe:
                pipe.write(b"\n" + stdin)

    def _tell(self, key: str, message: dict[str, object]) -> None:
        self._messages[key] = message
        self._write([message])

    def _untell(self, key: str) -> None:
        message = self._messages.pop(key, None)
        if message is not None and self._reaper is not None:
            self._write([{**message, "forget": True}])

    def _write(self, messages: Iterable[dict[str, object]]) -> None:
        """Tell the reaper; one that has been killed is replaced and told everything anew."""
        if self._reaper is None:
            self._reaper = _start_reaper()
        try:
            _send(self._reaper, messages)
        except BrokenPipeError:
            self._end_reaper()
            self._reaper = _start_reaper()
            _send(self._reaper, self._messages.values())

    def _end_reaper(self) -> None:
        """Close the write end; the reaper, with nothing left to do or already dead, exits at once."""
        reaper, self._reaper = self._reaper, None
        if reaper is not None and reaper.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                reaper.stdin.close()
            try:
                reaper.wait(REAP_GRACE_S + KILL_GRACE_S)
            except subprocess.TimeoutExpired:
                reaper.kill()
                reaper.wait()


def _let_go(children: ChildProcesses | None) -> None:
    """In a forked copy of the parent: the children are not its own, and it must not hold the write end."""
    if children is not None:
        children._stopped = True
        children._children, children._messages = [], {}
        reaper, children._reaper = children._reaper, None
        if reaper is not None and reaper.stdin is not None:
            reaper.stdin.close()


def _start_reaper() -> subprocess.Popen[bytes]:
    """Start one and wait until it ignores the signals that would end it. Raises RuntimeError.

    It is run by its path, so that whatever the working directory holds cannot take this module's place.
    """
    reaper = subprocess.Popen(  # noqa: S603 - this very interpreter and this very file.
        [sys.executable, "-P", __file__],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        bufsize=0,
    )
    assert reaper.stdout is not None
    with reaper.stdout:
        readable, _, _ = select.select([reaper.stdout], [], [], REAPER_START_TIMEOUT_S)
        if not readable or reaper.stdout.read(len(_READY)) != _READY:
            reaper.kill()
            reaper.wait()
            raise RuntimeError(f"the reaper of child processes did not start: {sys.executable} {__file__}")
    return reaper


def _send(reaper: subprocess.Popen[bytes], messages: Iterable[dict[str, object]]) -> None:
    assert reaper.stdin is not None
    for message in messages:
        reaper.stdin.write(json.dumps(message).encode() + b"\n")


def _wait_for(process: subprocess.Popen[bytes], timeout_s: float | None) -> None:
    """Wait for a child, then kill what it left running in its group. Raises subprocess.TimeoutExpired.

    A process group keeps its number from being reused, and one that ended with its leader was free for
    microseconds only; so the group is killed by whoever waited successfully, and never later.
    """
    if process.returncode is None:
        process.wait(timeout_s)
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # macOS reports a group in which only zombies are left as one that may not be signalled.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


# From here on: what runs in the reaper's process.


class Reaper:
    """What is to be stopped and removed when the parent is gone."""

    def __init__(self) -> None:
        self._watched: dict[int, tuple[psutil.Process, int]] = {}
        self._directories: dict[str, None] = {}

    def apply(self, line: bytes) -> None:
        """Take one line from the parent; a line cut short by its death says nothing that can be acted on."""
        try:
            message = json.loads(line)
        except ValueError:
            return
        forget = "forget" in message
        if "directory" in message:
            if forget:
                self._directories.pop(message["directory"], None)
            else:
                self._directories[message["directory"]] = None
        elif forget:
            self._watched.pop(message["pid"], None)
        elif (process := _find(message["pid"], message["created_s"])) is not None:
            self._watched[message["pid"]] = (process, message["signal"])

    def reap(self) -> None:
        """Stop every child, then remove every directory."""
        processes = {process for process, _ in self._watched.values() if _alive(process)}
        for process, stop_signal in self._watched.values():
            if process in processes:
                processes |= _descendants(process)
                with contextlib.suppress(psutil.Error):
                    process.send_signal(stop_signal)
        _wait(processes, REAP_GRACE_S)
        for process in list(processes):
            processes |= _descendants(process)
        for process in processes:
            if _alive(process):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        _wait(processes, KILL_GRACE_S)
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)


def _find(pid: int, created_s: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created_s) <= CREATE_TIME_TOLERANCE_S
    except psutil.Error:
        return None
    return process if same else None


def _alive(process: psutil.Process) -> bool:
    """False for a zombie too: nobody may ever wait for an orphan where process 1 does not do so."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _descendants(process: psutil.Process) -> set[psutil.Process]:
    try:
        return set(process.children(recursive=True))
    except psutil.Error:
        return set()


def _wait(processes: set[psutil.Process], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while any(_alive(process) for process in processes) and time.monotonic() < deadline_s:
        time.sleep(POLL_INTERVAL_S)


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.write(sys.stdout.fileno(), _READY)
    reaper = Reaper()
    for line in sys.stdin.buffer:
        reaper.apply(line)
    reaper.reap()


if __name__ == "__main__":
    main()
