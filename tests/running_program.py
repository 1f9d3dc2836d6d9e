"""The program as a person runs it: its commands as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from engine.runtime.embedded_start import free_port
from engine.runtime.settings import ReadyFile, read_ready_file

RECORDING = Path(__file__).parents[2] / "shared/market/us_equities_daily_2020-04_2021-04.csv.gz"
START_TIMEOUT_S = 60
END_TIMEOUT_S = 25


def navstream(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "navstream", *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        env=clean_environment() | environment,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("NAVSTREAM_")}


@contextmanager
def system(directory: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], ReadyFile]]:
    """A running system; ends it if the test has not."""
    ready, log = directory / "ready.json", directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "navstream", *arguments, "--port", str(free_port()), "--ready-file", str(ready)],
            env=clean_environment(),
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, START_TIMEOUT_S)
        assert ready.exists(), log.read_text()[-4_000:]
        yield process, read_ready_file(ready)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(END_TIMEOUT_S)


def wait_until(holds: Any, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.05)


def ask(file: str, query: str, subject: str = "demo") -> dict[str, Any]:
    """The data that the system of a ready file answers `subject` with."""
    ready = read_ready_file(Path(file))
    token = navstream("token", "--sub", subject, "--scope", "portfolio:read ledger:read", "--ready-file", file)
    headers = {"Authorization": f"Bearer {token.stdout.strip()}"}
    answer = httpx.post(ready.graphql_url, json={"query": query}, headers=headers, timeout=10).json()
    assert "errors" not in answer, answer
    return answer["data"]


def all_gone(pids: dict[str, int]) -> bool:
    for pid in pids.values():
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True
