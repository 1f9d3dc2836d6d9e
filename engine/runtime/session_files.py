"""Trading sessions made once for all processes of a system.

Making them takes a library that takes a second and 95 MB to import (engine.sessions). `python -m
engine.runtime.session_files FILE EXCHANGE …` writes those of some exchanges to a file, in a process that then ends;
`read_session_file` lets this process use them. Whoever needs another exchange, or has no file, makes it himself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import structlog

from engine.sessions import dump_sessions, use_sessions

_log = structlog.get_logger(__name__)


def write_session_file(path: Path, exchanges: list[str]) -> None:
    """The file appears whole or not at all. Raises OSError, UnknownExchangeError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(dump_sessions(exchanges))
    partial.replace(path)


def read_session_file(path: Path) -> None:
    """Use the sessions of a file; one that is not there or not readable is left alone, which costs time only."""
    try:
        use_sessions(path.read_bytes())
    except (OSError, ValueError) as error:
        _log.info("session_file_unread", reason=str(error)[:200])


if __name__ == "__main__":
    write_session_file(Path(sys.argv[1]), sys.argv[2:])
