"""Workers that exit come back, ever more slowly; a signal ends the watch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from engine.runtime.reaper import ChildProcesses
from engine.runtime.supervisor import (
    BACKOFF_INITIAL_S,
    BACKOFF_MAX_S,
    HEALTHY_AFTER_S,
    POLL_INTERVAL_S,
    Supervisor,
)

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = {"PATH": os.environ["PATH"]}


def _end(supervisor: Supervisor, role: str, how: signal.Signals = signal.SIGKILL) -> None:
    """Kill a worker and wait until it is a zombie, which only the supervisor may wait for."""
    pid = supervisor.pids[role]
    os.kill(pid, how)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_worker_that_exits_is_started_again_after_the_backoff() -> None:
    with ChildProcesses() as children:
        supervisor = Supervisor(children)
        supervisor.add("quotes", ["sleep", "60"], ENVIRONMENT)
        supervisor.add("evaluator-0", ["sleep", "60"], ENVIRONMENT)
        first = supervisor.pids
        _end(supervisor, "quotes")
        now_s = time.monotonic()
        supervisor.tick(now_s)
        assert supervisor.pids == {"evaluator-0": first["evaluator-0"]}
        supervisor.tick(now_s + BACKOFF_INITIAL_S - 0.001)
        assert "quotes" not in supervisor.pids
        supervisor.tick(now_s + BACKOFF_INITIAL_S)
        assert supervisor.pids["quotes"] != first["quotes"]
        assert supervisor.pids["evaluator-0"] == first["evaluator-0"]
        assert supervisor.restart_counts == {"quotes": 1, "evaluator-0": 0}


def test_the_backoff_doubles_to_its_limit_and_health_resets_it() -> None:
    with ChildProcesses() as children, capture_logs() as logs:
        supervisor = Supervisor(children)
        supervisor.add("quotes", ["sleep", "60"], ENVIRONMENT)
        now_s = time.monotonic()
        for _ in range(7):
            _end(supervisor, "quotes")
            supervisor.tick(now_s)
            now_s += BACKOFF_MAX_S
            supervisor.tick(now_s)
        now_s += HEALTHY_AFTER_S
        _end(supervisor, "quotes")
        supervisor.tick(now_s)
    backoffs_s = [entry["restart_in_s"] for entry in logs if entry["event"] == "worker_exited"]
    assert backoffs_s == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 1.0]


def test_every_start_exit_and_restart_is_one_log_line() -> None:
    with ChildProcesses() as children, capture_logs() as logs:
        supervisor = Supervisor(children, backoff_initial_s=0.0)
        supervisor.add("quotes", ["sleep", "60"], ENVIRONMENT)
        first = supervisor.pids["quotes"]
        _end(supervisor, "quotes", signal.SIGTERM)
        supervisor.tick(time.monotonic())
        second = supervisor.pids["quotes"]
    assert [(entry["event"], entry["role"], entry["pid"]) for entry in logs] == [
        ("worker_started", "quotes", first),
        ("worker_exited", "quotes", first),
        ("worker_restarted", "quotes", second),
    ]
    assert logs[1]["status"] == -signal.SIGTERM
    assert logs[2]["restart_count"] == 1


def test_an_exit_with_status_0_is_an_exit_too() -> None:
    with ChildProcesses() as children:
        supervisor = Supervisor(children, backoff_initial_s=0.0)
        supervisor.add("short", ["true"], ENVIRONMENT)
        os.waitid(os.P_PID, supervisor.pids["short"], os.WEXITED | os.WNOWAIT)
        supervisor.tick(time.monotonic())
        assert supervisor.restart_counts["short"] == 1


def test_a_worker_gets_the_environment_it_was_given_each_time(tmp_path: Path) -> None:
    with ChildProcesses() as children:
        supervisor = Supervisor(children, backoff_initial_s=0.0)
        seen = tmp_path / "seen"
        argv = ["/bin/sh", "-c", f'echo "$NAVSTREAM_SHARD,$UNRELATED" >> {seen}']
        os.environ["UNRELATED"] = "leak"
        try:
            supervisor.add("evaluator", argv, {**ENVIRONMENT, "NAVSTREAM_SHARD": "3"})
            for _ in range(2):
                os.waitid(os.P_PID, supervisor.pids["evaluator"], os.WEXITED | os.WNOWAIT)
                supervisor.tick(time.monotonic())
        finally:
            del os.environ["UNRELATED"]
    assert set(seen.read_text().split()) == {"3,"}
    assert len(seen.read_text().split()) >= 2


def test_a_role_exists_once() -> None:
    with ChildProcesses() as children:
        supervisor = Supervisor(children)
        supervisor.add("quotes", ["sleep", "60"], ENVIRONMENT)
        with pytest.raises(ValueError, match="'quotes' already"):
            supervisor.add("quotes", ["sleep", "60"], ENVIRONMENT)
        assert len(children._children) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_supervises_until_a_signal_and_restores_the_handlers(how: signal.Signals) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with ChildProcesses() as children:
        supervisor = Supervisor(children, backoff_initial_s=0.0)
        supervisor.add("quotes", ["sleep", "60"], ENVIRONMENT)
        _end(supervisor, "quotes")
        timer = threading.Timer(4 * POLL_INTERVAL_S, os.kill, (os.getpid(), how))
        timer.start()
        assert supervisor.run_until_signal() is how
        timer.join()
        assert supervisor.restart_counts["quotes"] == 1
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_whole_program_ends_in_order_on_a_signal(how: signal.Signals) -> None:
    program = (
        "import os, sys\n"
        "from engine.runtime.reaper import ChildProcesses\n"
        "from engine.runtime.supervisor import Supervisor\n"
        "with ChildProcesses() as children:\n"
        "    supervisor = Supervisor(children)\n"
        "    supervisor.add('quotes', ['sleep', '60'], dict(os.environ))\n"
        "    sys.stderr.write(f'{supervisor.pids[\"quotes\"]}\\n'); sys.stderr.flush()\n"
        "    supervisor.run_until_signal()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stderr is not None
        worker_pid = int(parent.stderr.readline())
        time.sleep(3 * POLL_INTERVAL_S)
        parent.send_signal(how)
        assert parent.wait(timeout=5) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(worker_pid, 0)
