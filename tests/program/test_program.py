"""The program as a person runs it: the commands in processes of their own, the whole system, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from tests.running_program import END_TIMEOUT_S, RECORDING, all_gone, ask, navstream, system, wait_until


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
        assert (tmp_path / "ready.json").stat().st_mode & 0o077 == 0, "it holds passwords"
        produced = navstream("events", str(one_event_file), "--ready-file", file)
        assert (produced.returncode, produced.stdout.strip()) == (0, "3 of 3 events acknowledged")
        query = '{ portfolio(portfolioId: "p-1") { name valuation { nav } } }'

        def booked() -> bool:
            with suppress(AssertionError):
                return ask(file, query)["portfolio"]["valuation"]["nav"] == "1000.5"
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


def test_a_split_and_a_dividend_from_a_file_reach_who_holds(tmp_path: Path, one_event_file: Path) -> None:
    """Sent twice: taken once."""
    fill = {
        "type": "fill",
        "event_id": "f",
        "portfolio_id": "p-1",
        "symbol": "AAPL",
        "side": "BUY",
        "quantity": "2",
        "price": "100",
        "currency": "USD",
        "executed_at": "2020-08-03T15:00:00Z",
    }
    with one_event_file.open("a") as file:
        file.write(json.dumps(fill) + "\n")
    actions = tmp_path / "actions.jsonl"
    split = {"type": "split", "action_id": "s", "symbol": "AAPL", "ratio": "4", "effective_at": "2020-08-31T13:30:00Z"}
    dates = {"ex_date": "2020-08-07", "pay_date": "2020-08-13"}
    paid = {"type": "dividend", "action_id": "d", "symbol": "AAPL", "amount": "0.82", **dates}
    actions.write_text("".join(json.dumps(action) + "\n" for action in (paid, split)) + "nonsense\n")
    with system(tmp_path, "up"):
        file_name = str(tmp_path / "ready.json")
        assert navstream("events", str(one_event_file), "--ready-file", file_name).returncode == 0
        query = """{ portfolio(portfolioId: "p-1") { valuation { cash receivables }
            positions(first: 5) { edges { node { quantity averageCost } } } } }"""

        def seen() -> tuple[str, str, str, str] | None:
            with suppress(AssertionError, IndexError):
                portfolio = ask(file_name, query)["portfolio"]
                node = portfolio["positions"]["edges"][0]["node"]
                valuation = portfolio["valuation"]
                return valuation["cash"], valuation["receivables"], node["quantity"], node["averageCost"]
            return None

        wait_until(lambda: seen() == ("800.5", "0", "2", "100"), 20)
        for _ in range(2):
            produced = navstream("actions", str(actions), "--ready-file", file_name)
            assert (produced.returncode, produced.stdout.strip()) == (0, "3 of 3 actions acknowledged")
        wait_until(lambda: seen() == ("802.14", "0", "8", "25"), 20)
        checked = navstream("reconcile", "--ready-file", file_name)
        assert (checked.returncode, checked.stdout.strip()) == (0, "1 portfolios, 6 ledger entries, 0 differences")


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
    """Weeks of the recorded year at two days a second, 30 portfolios × 15 positions."""
    with system(tmp_path, "demo", "--replay", f"{RECORDING}@2", "--portfolios", "30"):
        file = str(tmp_path / "ready.json")
        query = """{ portfolio(portfolioId: "demo-0001") {
            valuation { nav cash receivables positionsValue asOf dayCutAt quality }
            equityCurve(range: ALL) { points { at nav } } } }"""

        def a_month_in() -> bool:
            with suppress(AssertionError):
                return ask(file, query)["portfolio"]["valuation"]["asOf"] > "2020-05-15"
            return False

        wait_until(a_month_in, 60)
        seen = ask(file, query)["portfolio"]
        points = seen["equityCurve"]["points"]
        assert len(points) > 8
        assert len({point["nav"] for point in points}) > 8, "a curve of a moving market moves"
        assert [point["at"] for point in points] == sorted(point["at"] for point in points)
        valuation = seen["valuation"]
        parts = [Decimal(valuation[name]) for name in ("cash", "receivables", "positionsValue")]
        assert Decimal(valuation["nav"]) == sum(parts)
        assert valuation["dayCutAt"][:10] == valuation["asOf"][:10]
        # An evaluator that is behind this market's days has not drifted; what has drifted stays so.
        reports: list[str] = []

        def agreed() -> bool:
            checked = navstream("reconcile", "--ready-file", file)
            reports.append(checked.stdout)
            return checked.returncode == 0

        wait_until(agreed, 90)
        assert reports[-1].startswith("30 portfolios")


def test_commands_say_what_is_missing() -> None:
    for command in ("api", "evaluator", "snapshots", "reconcile", "reconciler"):
        answer = navstream(command)
        assert answer.returncode == 2
        assert "NAVSTREAM_REDIS_URL" in answer.stderr
    assert "NAVSTREAM_KAFKA_BOOTSTRAP" in navstream("actions", __file__).stderr
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
    [
        "demo",
        "up",
        "api",
        "quotes",
        "evaluator",
        "snapshots",
        "reconcile",
        "reconciler",
        "webhooks",
        "replay",
        "events",
        "actions",
        "token",
        "schema",
    ],
)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    shown = navstream(command, "--help", COLUMNS="200", TERM="dumb")
    assert shown.returncode == 0
    assert f"navstream {command}" in shown.stdout.partition("Example")[2]
