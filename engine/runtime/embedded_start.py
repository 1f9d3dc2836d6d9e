"""What starting any embedded server takes: a port, its last words when it fails, and the error that says so."""

from __future__ import annotations

import socket
from pathlib import Path

# Servers that lose the race for a port are started again on another this many times.
START_ATTEMPTS_MAX = 5
_DEADLY = ("FATAL", "PANIC")


class EmbeddedError(RuntimeError):
    """An embedded server cannot be started; the message is one line that says what to do."""


def free_port() -> int:
    """A loopback port that was free a moment ago; who binds it must be ready to lose the race."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_words(log: Path) -> str:
    """Why a server gave up, on one line: its log from the last deadly line on, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    deadly = [index for index, line in enumerate(lines) if any(word in line for word in _DEADLY)]
    return " ".join(lines[deadly[-1] if deadly else -1 :]) or "it said nothing"
