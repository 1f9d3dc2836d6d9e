"""`navstream ledger export` and `verify`, as typed."""

from __future__ import annotations

import csv
import errno
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import pyarrow.parquet
import pytest
from click.testing import Result
from typer.testing import CliRunner

from navstream import app
from tests.builders import LedgerBuilder
from tests.conftest import run_apart
from tests.scripted_ledger import BEGIN, HOUR, ScriptedLedger
from workers import ledger_commands

ID = "p/1"
NOBODY = "postgresql://127.0.0.1:1/none"


@pytest.fixture(scope="module")
def script(database: str) -> ScriptedLedger:
    """Five entries an hour apart."""
    script = ScriptedLedger(ID)
    for kind, amount in (("DEPOSIT", "10"), ("FEE", "1"), ("INTEREST", "2"), ("FEE", "3")):
        script.at += HOUR
        script.cash(kind, amount)

    async def write() -> None:
        async with asyncpg.create_pool(database, min_size=1, max_size=1) as pool:
            await LedgerBuilder(pool).portfolio(ID, opened_at=BEGIN)
            await script.write(pool)

    run_apart(write())
    return script


def typed(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["ledger", *arguments], env={"NAVSTREAM_POSTGRES_URL": url})


def export(url: str, *arguments: str) -> Result:
    return typed(url, "export", *arguments)


def sequences(text: str) -> list[int]:
    return [int(row["sequence"]) for row in csv.DictReader(io.StringIO(text))]


def test_export_to_a_file(database: str, script: ScriptedLedger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    path.write_text("older")
    result = export(database, ID, "--output", str(path))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines()[-1] == "5 entries"
    assert sequences(path.read_text()) == [1, 2, 3, 4, 5]
    assert [found.name for found in tmp_path.iterdir()] == ["ledger.csv"]


def test_export_as_parquet(database: str, script: ScriptedLedger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    assert export(database, ID, "--format", "parquet", "--output", str(path)).exit_code == 0
    assert pyarrow.parquet.read_table(path).column("hash").to_pylist() == [one.hash.hex() for one in script.entries]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [1, 2, 3, 4, 5]),
        (("--kind", "FEE", "--kind", "OPEN"), [1, 3, 5]),
        (("--from", "2026-03-02T10:30:00Z", "--to", "2026-03-02T12:30:00Z"), [2, 3]),
        (("--symbol", "A"), []),
    ],
)
def test_export_to_standard_output(
    database: str, script: ScriptedLedger, options: tuple[str, ...], expected: list[int]
) -> None:
    result = export(database, ID, "--output", "-", *options)
    assert result.exit_code == 0
    assert sequences(result.stdout) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "--output", "-"), "there is no portfolio none"),
        ((ID, "--output", "-", "--from", "yesterday"), "not an RFC 3339 date and time"),
        ((ID, "--output", "-", "--from", "2026-03-02T10:30:00Z", "--to", "2026-03-02T10:30:00Z"), "holds nothing"),
        ((ID, "--output", "-", "--kind", "GIFT"), "GIFT"),
        ((ID, "--output", "missing/ledger.csv"), "No such file or directory"),
        ((ID, "--output", "-", "--format", "xml"), "xml"),
    ],
)
def test_what_is_wrong_is_said(
    database: str,
    script: ScriptedLedger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export(database, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_is_3(tmp_path: Path) -> None:
    assert export(NOBODY, ID, "--output", str(tmp_path / "x")).exit_code == 3
    assert typed(NOBODY, "verify").exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_what_is_cut_short_leaves_what_was_there(
    database: str, script: ScriptedLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.csv"
    path.write_text("older")

    async def cut(connection: object, plan: object, write: object, progress: object) -> int:
        await write(b"half")  # type: ignore[operator]
        raise OSError(errno.ECONNRESET, "the server went away")

    monkeypatch.setattr(ledger_commands, "export_ledger", cut)
    result = export(database, ID, "--output", str(path))
    assert (result.exit_code, path.read_text()) == (3, "older")
    assert [found.name for found in tmp_path.iterdir()] == ["ledger.csv"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_not_the_servers_fault(database: str, script: ScriptedLedger) -> None:
    result = export(database, ID, "--output", "/dev/full")
    assert result.exit_code == 2
    assert "/dev/full: No space left on device" in result.stderr.splitlines()
    assert Path("/dev/full").is_char_device()


def test_a_pipe_is_written_to(database: str, script: ScriptedLedger, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(max_workers=1) as thread:
        read = thread.submit(pipe.read_text)
        assert export(database, ID, "--output", str(pipe)).exit_code == 0
        assert sequences(read.result(timeout=10)) == [1, 2, 3, 4, 5]
    assert pipe.is_fifo()


def test_verify(database: str, script: ScriptedLedger) -> None:
    clean = typed(database, "verify")
    assert clean.exit_code == 0
    assert clean.stdout.startswith("1 portfolios, 5 ledger entries (")
    assert clean.stdout.endswith(" a second), 0 faults\n")
    assert typed(database, "verify", "--portfolio", "none").exit_code == 2

    async def tamper(change: str) -> None:
        connection = await asyncpg.connect(database)
        await connection.execute("ALTER TABLE ledger_entry DISABLE TRIGGER ledger_entry_append_only")
        await connection.execute(f"UPDATE ledger_entry SET {change} WHERE sequence = 3")
        await connection.execute("ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_entry_append_only")
        await connection.close()

    run_apart(tamper("late = true"))
    try:
        for options in ((), ("--portfolio", ID)):
            bad = typed(database, "verify", *options)
            assert bad.exit_code == 1
            named, figures = bad.stdout.splitlines()
            assert named == f"{ID} entry 3: HASH: its hash does not follow from its content and entry 2"
            assert figures.endswith("1 faults")
    finally:
        run_apart(tamper("late = false"))
