"""Where the embedded servers keep their files, and which account may reach them.

A directory is either *temporary* (removed at exit, by the reaper if need be; nothing in it is ever synced
to disk) or *durable* (the user's `--data-dir`). A durable one is held by an exclusive `flock`, whose
descriptor the servers inherit: it is locked for as long as any server process works in it, also after the
parent was killed -9 and until the reaper has stopped them. So whoever has the lock knows that nobody else
writes here.

PostgreSQL refuses to run as root. Started by root it runs as the owner of an existing database, else as
`nobody`, and every directory on the way to its files must let that account pass.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from engine.runtime.embedded_start import EmbeddedError
from engine.runtime.reaper import KILL_GRACE_S, REAP_GRACE_S, Account, ChildProcesses

UNPRIVILEGED_ACCOUNT = "nobody"
TEMPORARY_PREFIX = "navstream-"
# The servers of a parent that was killed are gone after this long; a start meanwhile waits for them.
LOCK_WAIT_S = REAP_GRACE_S + KILL_GRACE_S + 1.0
LOCK_POLL_INTERVAL_S = 0.05
# Others may pass through, to the parts they own, but not list.
_PASSABLE = 0o711


@dataclass(frozen=True, slots=True)
class ServerDirectory:
    path: Path
    durable: bool
    # The descriptor of the lock, which servers inherit; a temporary directory needs none.
    lock_fds: tuple[int, ...] = ()


def open_directory(children: ChildProcesses, data_dir: Path | None) -> ServerDirectory:
    """The temporary directory of this run, or `data_dir`, locked until `children` have stopped.

    Raises EmbeddedError when `data_dir` cannot be made or is in use.
    """
    if data_dir is None:
        base = _reachable_temporary_base(unprivileged_account())
        return ServerDirectory(children.temporary_directory(TEMPORARY_PREFIX, mode=_PASSABLE, base=base), False)
    path = data_dir.expanduser().absolute()
    try:
        _make(path)
        lock_fd = _lock(path)
    except OSError as error:
        raise EmbeddedError(f"the data directory {path} cannot be used: {error.strerror}") from error
    children.after_stop(lambda: os.close(lock_fd))
    return ServerDirectory(path, True, (lock_fd,))


def _make(path: Path) -> None:
    """What we make ourselves is passable whatever the umask; what exists is the user's and stays as it is."""
    if not path.is_dir():
        path.mkdir(parents=True)
        path.chmod(_PASSABLE)


def _lock(path: Path) -> int:
    """Raises EmbeddedError while another parent lives, or when its servers outlive it by LOCK_WAIT_S."""
    lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock_fd, 32, 0).decode(errors="replace").strip()
            alive = holder.isdigit() and psutil.pid_exists(int(holder))
            if not alive and time.monotonic() < deadline_s:
                time.sleep(LOCK_POLL_INTERVAL_S)
                continue
            os.close(lock_fd)
            raise EmbeddedError(
                f"the data directory {path} is in use by process {holder or '?'}: stop it, or use another one"
            ) from None
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
        return lock_fd


def unprivileged_account() -> Account | None:
    """The account that PostgreSQL runs as when we are root; None when it can run as ourselves."""
    if os.geteuid() != 0:
        return None
    try:
        return _account(pwd.getpwnam(UNPRIVILEGED_ACCOUNT))
    except KeyError:
        raise EmbeddedError(
            f"PostgreSQL refuses to run as root, and there is no account {UNPRIVILEGED_ACCOUNT!r}: "
            "run as an ordinary user"
        ) from None


def account_for(directory: Path) -> Account | None:
    """The account that PostgreSQL uses in `directory`: its owner, if any, so that no file changes hands."""
    account = unprivileged_account()
    if account is None or not directory.is_dir() or (owner := directory.stat().st_uid) == 0:
        return account
    try:
        return _account(pwd.getpwuid(owner))
    except KeyError:
        raise EmbeddedError(
            f"{directory} belongs to uid {owner}, which has no account here: "
            f"chown -R {UNPRIVILEGED_ACCOUNT} {directory}"
        ) from None


def _account(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def give(path: Path, account: Account | None) -> None:
    if account is not None:
        os.chown(path, account.uid, account.gid)


def succeeds_as(account: Account | None, script: str, directory: Path) -> bool:
    """Whether `script` (POSIX sh) exits with 0 when `account` runs it in `directory`.

    Trying is the one test that knows of modes, access lists, mount options and security modules alike.
    """
    identity: dict[str, Any] = {}
    if account is not None:
        identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
    trial = subprocess.run(  # noqa: S603 - constant scripts of this package; the directory is an argument.
        ["/bin/sh", "-c", f'cd -- "$1" && {script}', "sh", str(directory)],
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        **identity,
    )
    return bool(trial.returncode == 0)


def require_passable(path: Path, account: Account | None) -> None:
    """Raises EmbeddedError when `account` cannot enter `path`, naming the directory that stops it."""
    if account is None or succeeds_as(account, "true", path):
        return
    ancestors = [*reversed(path.parents), path]
    closed = next((each for each in ancestors if not succeeds_as(account, "true", each)), path)
    mode = stat.S_IMODE(closed.stat().st_mode)
    raise EmbeddedError(
        f"PostgreSQL refuses to run as root, so it runs as {account.name!r}, which cannot pass {closed} "
        f"(mode {mode:04o}): name a data directory elsewhere, chmod o+x {closed}, or run as an ordinary user"
    )


def temporary_bases() -> list[Path]:
    """Where temporary directories may go, the configured place first; root's is often closed to others."""
    return [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]  # noqa: S108 - names in it are random.


def _reachable_temporary_base(account: Account | None) -> Path:
    for base in temporary_bases():
        if base.is_dir() and succeeds_as(account, "true", base):
            return base
    raise EmbeddedError("no temporary directory is open to PostgreSQL's account: set TMPDIR or run as an ordinary user")
