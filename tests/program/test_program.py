"""The program as a person runs it: the commands in processes of their own, the whole system, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.runtime.embedded_start import free_port
from engine.runtime.settings import ReadyFile, read_ready_file

RECORDING = Path(__file__).parents[3] / "shared/market/us_equities_daily_2020-04_2021-04.csv.gz"
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


def ask(ready: ReadyFile, query: str, subject: str = "demo") -> dict[str, Any]:
    file = ready_path(ready)
    token = navstream("token", "--sub", subject, "--scope", "portfolio:read ledger:read", "--ready-file", file)
    headers = {"Authorization": f"Bearer {token.stdout.strip()}"}
    answer = httpx.post(ready.graphql_url, json={"query": query}, headers=headers, timeout=10).json()
    assert "errors" not in answer, answer
    return answer["data"]


_paths: dict[str, str] = {}


def ready_path(ready: ReadyFile) -> str:
    return _paths[ready.graphql_url]


def all_gone(pids: dict[str, int]) -> bool:
    for pid in pids.values():
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@pytest.fixture
def one_event_file(tmp_path: Path) -> Path:
    lines = [
        {
            "type": "open",
            "event_id": "o",
            "portfolio_id": "p-1",
            "owner": "demo",
            "name": "Mine",
            "base_currency": "USD",
            "opened_at": "2026-11-20T10:00:00Z",
        },
        {
            "type": "cash",
            "event_id": "c",
            "portfolio_id": "p-1",
            "kind": "DEPOSIT",
            "amount": "1000.50",
            "currency": "USD",
            "effective_at": "2026-11-20T10:00:00Z",
        },
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not an event\n")
    return path


def counted(metrics: str, name: str) -> float:
    """The value of one sample; 0 when nothing was counted yet."""
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith(name))


def test_up_events_reconcile_and_an_orderly_end(tmp_path: Path, one_event_file: Path) -> None:
    with system(tmp_path, "up", "--evaluators", "2") as (process, ready):
        file = str(tmp_path / "ready.json")
        _paths[ready.graphql_url] = file
        assert (tmp_path / "ready.json").stat().st_mode & 0o077 == 0, "it holds passwords"
        produced = navstream("events", str(one_event_file), "--ready-file", file)
        assert (produced.returncode, produced.stdout.strip()) == (0, "3 of 3 events acknowledged")
        query = '{ portfolio(portfolioId: "p-1") { name valuation { nav } } }'

        def booked() -> bool:
            with suppress(AssertionError):
                return ask(ready, query)["portfolio"]["valuation"]["nav"] == "1000.5"
            return False

        wait_until(booked, 15)
        checked = navstream("reconcile", "--ready-file", file)
        assert (checked.returncode, checked.stdout.strip()) == (0, "1 portfolios, 2 ledger entries, 0 differences")
        assert set(ready.pids) >= {"valkey", "postgres", "broker", "evaluator-0", "evaluator-1", "api", "snapshots"}
        evaluators = [httpx.get(ready.metrics_urls[f"evaluator-{n}"]).text for n in range(2)]
        assert sum(counted(text, 'navstream_events_total{outcome="booked"}') for text in evaluators) == 2
        assert sum(counted(text, 'navstream_dead_letters_total{code="MALFORMED"}') for text in evaluators) == 1
        process.send_signal(signal.SIGINT)
        process.wait(END_TIMEOUT_S)
        wait_until(lambda: all_gone(ready.pids), 10)
        assert not (tmp_path / "ready.json").exists()


def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    with system(tmp_path, "up") as (process, ready):
        process.kill()
        process.wait(END_TIMEOUT_S)
        wait_until(lambda: all_gone(ready.pids), 15)


@pytest.fixture
def kept_directory() -> Iterator[Path]:
    """A directory that the account of an embedded PostgreSQL reaches, also when the tests run as root."""
    with tempfile.TemporaryDirectory(prefix="navstream-kept-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path / "data"


@pytest.mark.parametrize("server", ["valkey", "postgres", "broker"])
def test_an_embedded_server_that_ends_takes_the_system_with_it_and_says_so(tmp_path: Path, server: str) -> None:
    with system(tmp_path, "up") as (process, ready):
        os.kill(ready.pids[server], signal.SIGKILL)
        assert process.wait(END_TIMEOUT_S) == 2
        assert f"the embedded {server} has ended" in (tmp_path / "log").read_text()
        wait_until(lambda: all_gone(ready.pids), 15)


def test_a_kept_directory_goes_on_where_it_stopped(tmp_path: Path, kept_directory: Path, one_event_file: Path) -> None:
    keep = ("up", "--data-dir", str(kept_directory))
    with system(tmp_path, *keep) as (process, ready):
        file = str(tmp_path / "ready.json")
        navstream("events", str(one_event_file), "--ready-file", file)
        _paths[ready.graphql_url] = file
        wait_until(lambda: "1 portfolios" in navstream("reconcile", "--ready-file", file).stdout, 20)
        process.kill()
        process.wait(END_TIMEOUT_S)
        wait_until(lambda: all_gone(ready.pids), 15)
    (tmp_path / "ready.json").unlink()
    with system(tmp_path, *keep) as (_, ready):
        file = str(tmp_path / "ready.json")
        more = tmp_path / "more.jsonl"
        deposit = json.loads(one_event_file.read_text().splitlines()[1]) | {"event_id": "c2", "amount": "1"}
        more.write_text(json.dumps(deposit))
        navstream("events", str(more), "--ready-file", file)
        wait_until(lambda: "3 ledger entries, 0 diff" in navstream("reconcile", "--ready-file", file).stdout, 30)


@pytest.mark.skipif(not RECORDING.exists(), reason=f"the recorded year is not at {RECORDING.name}'s usual place")
@pytest.mark.timeout(180)
def test_a_recorded_market_through_the_whole_system(tmp_path: Path) -> None:
    """A quarter of the recorded year at ten days a second, 30 portfolios × 15 positions."""
    with system(tmp_path, "demo", "--replay", f"{RECORDING}@10", "--portfolios", "30") as (_, ready):
        file = str(tmp_path / "ready.json")
        _paths[ready.graphql_url] = file
        query = """{ portfolio(portfolioId: "demo-0001") {
            valuation { nav cash positionsValue asOf dayCutAt quality }
            equityCurve(range: ALL) { points { at nav } } } }"""

        def a_month_in() -> bool:
            with suppress(AssertionError):
                return ask(ready, query)["portfolio"]["valuation"]["asOf"] > "2020-07-01"
            return False

        wait_until(a_month_in, 60)
        seen = ask(ready, query)["portfolio"]
        points = seen["equityCurve"]["points"]
        assert len(points) > 8
        assert len({point["nav"] for point in points}) > 8, "a curve of a moving market moves"
        assert [point["at"] for point in points] == sorted(point["at"] for point in points)
        valuation = seen["valuation"]
        assert Decimal(valuation["nav"]) == Decimal(valuation["cash"]) + Decimal(valuation["positionsValue"])
        assert valuation["dayCutAt"][:10] == valuation["asOf"][:10]
        checked = navstream("reconcile", "--ready-file", file)
        assert checked.returncode == 0, checked.stdout
        assert checked.stdout.startswith("30 portfolios")


def test_commands_say_what_is_missing() -> None:
    for command in ("api", "evaluator", "snapshots", "reconcile"):
        answer = navstream(command)
        assert answer.returncode == 2
        assert "NAVSTREAM_REDIS_URL" in answer.stderr
    assert "NAVSTREAM_KAFKA_BOOTSTRAP" in navstream("events", __file__).stderr
    assert "JWT_SECRET" in navstream("token", "--sub", "s", "--scope", "portfolio:read").stderr


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = navstream("up", "--port", str(port))
    assert answer.returncode == 2
    assert answer.stderr.strip() == f"port {port} on 127.0.0.1 is taken: choose another one with --port"


def test_a_server_that_is_away_is_told_from_a_difference(tmp_path: Path) -> None:
    away = {"NAVSTREAM_REDIS_URL": "redis://127.0.0.1:1", "NAVSTREAM_POSTGRES_URL": "postgresql://a:b@127.0.0.1:1/c"}
    answer = navstream("reconcile", **away)
    assert (answer.returncode, "Traceback" in answer.stderr) == (3, False)
    assert answer.stderr.startswith("could not reconcile")


def test_bad_arguments_end_with_one_clear_line(tmp_path: Path) -> None:
    assert "unknown feed" in navstream("quotes", "--feed", "nonsense", NAVSTREAM_REDIS_URL="redis://127.0.0.1:1").stderr
    assert "is not a ready file" in navstream("api", "--ready-file", str(tmp_path / "absent.json")).stderr
    weak = navstream("token", "--sub", "s", "--scope", "portfolio:read", NAVSTREAM_JWT_SECRET="short")
    assert weak.returncode == 2
    unknown = navstream("token", "--sub", "s", "--scope", "everything", NAVSTREAM_JWT_SECRET="x" * 40)
    assert "unknown scope" in unknown.stderr
    broken = navstream("up", NAVSTREAM_FLUSH_INTERVAL_MS="0")
    assert "FLUSH_INTERVAL_MS" in broken.stderr


@pytest.mark.parametrize(
    "command",
    ["demo", "up", "api", "quotes", "evaluator", "snapshots", "reconcile", "replay", "events", "token", "schema"],
)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    shown = navstream(command, "--help", COLUMNS="200", TERM="dumb")
    assert shown.returncode == 0
    assert f"navstream {command}" in shown.stdout.partition("Example")[2]
