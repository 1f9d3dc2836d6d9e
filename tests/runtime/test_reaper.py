"""Children and temporary directories go with their parent, however it goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engine.runtime.reaper import Account, ChildProcesses, Tier, _alive

PROJECT = Path(__file__).parents[2]
PYTHON = sys.executable
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)\n"
)
GONE_WITHIN_S = 5.0

# A parent with all three servers, a worker that ignores SIGTERM, and a worker's own child.
PARENT = f"""
import json, signal, subprocess, sys, time
from pathlib import Path
from engine.runtime.embedded import start_embedded
from engine.runtime.reaper import ChildProcesses

def main():
    # Tests that were started in the background of a shell, or by nohup, have these ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    children = ChildProcesses()
    try:
        servers = start_embedded(children)
        stubborn = children.spawn("stubborn", [sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
        stubborn.stdout.readline()
        nested = children.spawn("nested", ["/bin/sh", "-c", "sleep 61 & echo $!; wait"], stdout=subprocess.PIPE)
        pids = [*servers.pids.values(), stubborn.pid, nested.pid, int(nested.stdout.readline())]
        directories = [message["directory"] for message in children._messages.values() if "directory" in message]
        reaper = children._reaper.pid
        print(json.dumps({{"pids": pids, "directories": directories, "reaper": reaper}}), flush=True)
        time.sleep(60)
    finally:
        children.stop_all(workers_stop_timeout_s=1.0)

main()
"""


def _eventually(condition: Callable[[], bool], within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def _living(pids: list[int]) -> list[psutil.Process]:
    """The processes with these pids and all below them, PostgreSQL's backends among them."""
    processes = [psutil.Process(pid) for pid in pids]
    return [*processes, *(below for process in processes for below in process.children(recursive=True))]


def _sleeper(children: ChildProcesses, **options: object) -> subprocess.Popen[bytes]:
    return children.spawn("sleeper", ["sleep", "60"], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_outlives_the_parent(how: signal.Signals) -> None:
    with subprocess.Popen(
        [PYTHON, "-c", PARENT], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        told = json.loads(parent.stdout.readline())
        processes = _living([*told["pids"], told["reaper"]])
        directories = [Path(directory) for directory in told["directories"]]
        assert len(processes) > 8, "PostgreSQL's own processes are among those watched"
        assert directories
        assert all(directory.is_dir() for directory in directories)
        parent.send_signal(how)
        assert _eventually(lambda: not any(map(_alive, processes)), GONE_WITHIN_S), processes
        assert _eventually(lambda: not any(directory.exists() for directory in directories), 1.0)


def test_a_child_of_a_parent_killed_while_spawning_never_runs_its_program(tmp_path: Path) -> None:
    """The parent dies after the fork and before the reaper knows: the worst moment there is."""
    program = (
        "import os, signal, sys\n"
        "from engine.runtime.reaper import ChildProcesses\n"
        "class Dying(ChildProcesses):\n"
        "    def _tell(self, key, message): os.kill(os.getpid(), signal.SIGKILL)\n"
        "Dying().spawn('child', ['touch', sys.argv[1]])\n"
    )
    ran = tmp_path / "ran"
    died = subprocess.run([PYTHON, "-c", program, ran], cwd=PROJECT, check=False)
    assert died.returncode == -signal.SIGKILL
    time.sleep(0.5)
    assert not ran.exists()


def test_the_reaper_ignores_the_signals_of_the_terminal() -> None:
    with ChildProcesses() as children:
        child = _sleeper(children)
        reaper = children._reaper
        assert reaper is not None
        assert os.getsid(reaper.pid) != os.getsid(0)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            reaper.send_signal(each)
        time.sleep(0.1)
        assert reaper.poll() is None
        assert child.poll() is None


def test_a_killed_reaper_is_replaced_and_knows_everything() -> None:
    program = (
        "import os, sys, time\n"
        "from engine.runtime.reaper import ChildProcesses\n"
        "children = ChildProcesses()\n"
        "first = children.spawn('first', ['sleep', '60'])\n"
        "children._reaper.kill(); children._reaper.wait()\n"
        "second = children.spawn('second', ['sleep', '60'])\n"
        "print(first.pid, second.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([PYTHON, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        processes = _living([int(pid) for pid in parent.stdout.readline().split()])
        assert all(map(_alive, processes))
        parent.kill()
        assert _eventually(lambda: not any(map(_alive, processes)), GONE_WITHIN_S)


def test_a_forked_copy_of_the_parent_does_not_keep_the_reaper_waiting() -> None:
    program = (
        "import os, time\n"
        "from engine.runtime.reaper import ChildProcesses\n"
        "children = ChildProcesses()\n"
        "child = children.spawn('child', ['sleep', '60'])\n"
        "copy = os.fork()\n"
        "if copy == 0: time.sleep(20); os._exit(0)\n"
        "print(child.pid, copy, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([PYTHON, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child, copy = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
        parent.kill()
        assert _eventually(lambda: not _alive(child), GONE_WITHIN_S)
        assert _alive(copy), "a bare fork is not a child that anyone asked to watch"
        copy.kill()


def test_a_forgotten_child_is_not_signalled_again() -> None:
    """Its pid may belong to someone else by then: here to a process that the reaper must leave alone."""
    with ChildProcesses() as children:
        short = children.spawn("short", ["true"])
        children.forget(short)
        assert f"pid {short.pid}" not in children._messages
        assert children._children == []


def test_a_reused_pid_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        with ChildProcesses() as children:
            earlier_s = psutil.Process(stranger.pid).create_time() - 10.0
            children._tell("pid", {"pid": stranger.pid, "created_s": earlier_s, "signal": signal.SIGKILL})
            children._messages.clear()
            reaper = children._reaper
        assert reaper is not None
        assert reaper.poll() == 0
        assert stranger.poll() is None
        stranger.kill()


def test_stop_all_stops_workers_while_servers_still_answer() -> None:
    worker = (
        "import signal, socket, sys\n"
        "def stop(*_):\n"
        "    socket.create_connection(('127.0.0.1', int(sys.argv[1])), 1); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); print('up', flush=True); signal.pause()\n"
    )
    server = (
        "import socket, time\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print(listener.getsockname()[1], flush=True); time.sleep(60)\n"
    )
    with ChildProcesses() as children:
        serving = children.spawn("server", [PYTHON, "-c", server], stdout=subprocess.PIPE, tier=Tier.SERVER)
        assert serving.stdout is not None
        port = serving.stdout.readline().decode().strip()
        working = children.spawn("worker", [PYTHON, "-c", worker, port], stdout=subprocess.PIPE)
        assert working.stdout is not None
        working.stdout.readline()
    assert working.returncode == 0
    assert serving.returncode == -signal.SIGTERM


def test_stop_all_kills_those_over_their_time_with_their_group() -> None:
    children = ChildProcesses()
    stubborn = children.spawn("stubborn", [PYTHON, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    started_s = time.monotonic()
    children.stop_all(workers_stop_timeout_s=0.3)
    assert 0.3 <= time.monotonic() - started_s < 2.0
    assert stubborn.returncode == -signal.SIGKILL
    children.stop_all()
    with pytest.raises(RuntimeError, match="have been stopped"):
        _sleeper(children)


def test_a_child_leads_its_own_session_and_reads_what_it_is_given() -> None:
    with ChildProcesses() as children:
        child = _sleeper(children)
        assert os.getsid(child.pid) == child.pid
        status, output = children.run("cat", ["cat"], timeout_s=5, stdin=b"first line\nsecond\n")
        assert (status, output) == (0, "first line\nsecond\n")


def test_arguments_reach_a_child_unchanged_and_failures_are_statuses() -> None:
    with ChildProcesses() as children:
        words = ["a b", "$HOME", "*", "'", '"', ""]
        script = "import json, sys; print(json.dumps(sys.argv[1:]))"
        _, output = children.run("echo", [PYTHON, "-c", script, *words], timeout_s=10)
        assert json.loads(output) == words
        status, output = children.run("missing", ["/no/such/program"], timeout_s=5)
        assert status == 127
        assert "/no/such/program" in output
        with pytest.raises(subprocess.TimeoutExpired):
            children.run("slow", ["sleep", "60"], timeout_s=0.1)
        assert children._children == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a child as another account")
def test_a_child_can_be_another_account_without_our_groups() -> None:
    with ChildProcesses() as children:
        account = Account("nobody", 65534, 65534)
        _, output = children.run("id", ["id", "-u"], timeout_s=5, account=account, cwd=Path("/"))
        assert output.strip() == "65534"
        _, groups = children.run("id", ["id", "-G"], timeout_s=5, account=account, cwd=Path("/"))
        assert groups.split() == ["65534"]


def test_temporary_directories_are_private_and_removed_with_their_content() -> None:
    with ChildProcesses() as children:
        first, second = (children.temporary_directory("navstream-test-") for _ in range(2))
        assert first != second
        assert first.parent == Path(tempfile.gettempdir())
        assert first.stat().st_mode & 0o777 == 0o700
        (first / "below").mkdir()
        (first / "below" / "file").write_text("x")
    assert not first.exists()
    assert not second.exists()


def test_what_is_to_be_done_after_the_stop_is_done_then() -> None:
    order: list[str] = []
    with ChildProcesses() as children:
        child = _sleeper(children)
        children.after_stop(lambda: order.append("first registered"))
        children.after_stop(lambda: order.append(f"last registered, child {child.poll()}"))
    assert order == [f"last registered, child {-signal.SIGTERM}", "first registered"]


def test_what_a_child_left_running_in_its_group_goes_with_it() -> None:
    with ChildProcesses() as children:
        child = children.spawn("nested", ["/bin/sh", "-c", "sleep 61 & echo $!"], stdout=subprocess.PIPE)
        assert child.stdout is not None
        left = psutil.Process(int(child.stdout.readline()))
        assert _eventually(lambda: children.has_exited(child), 5.0)
        assert _eventually(lambda: not _alive(left), 1.0)
        children.forget(child)


def test_without_a_reaper_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    ran = tmp_path / "ran"
    children = ChildProcesses()
    with pytest.raises(RuntimeError, match="did not start"):
        children.spawn("child", ["touch", str(ran)])
    children.stop_all()
    assert not ran.exists()
