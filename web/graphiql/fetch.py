"""Fetches the files of Strawberry's GraphiQL page, so that the API serves them itself instead of a foreign host.

The page names each file as `<host>/<package>@<version>/<path>` with its integrity hash (SRI). The npm packages in
package.json contain the very same files: their tarballs are fetched with npm (the system's, else one installed
on demand from requirements-node.txt), and each file that matches its hash is written to
`api/static/graphiql/<package>@<version>/<path>`. All or nothing, and never a reason for set-up to fail: when it
cannot be done, one line says so, the status is 0, and the API falls back to the page as it is.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
TARGET = PROJECT / "api" / "static" / "graphiql"
NODE_REQUIREMENTS = PROJECT / "requirements-node.txt"
NPM_TIMEOUT_S = 90
NODE_INSTALL_TIMEOUT_S = 180
FILE_BYTES_MAX = 16 * 1024 * 1024


class FetchError(Exception):
    """The files cannot be had; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file that the page loads: `path` within `package` at `version`, and its SRI hash."""

    package: str
    version: str
    path: str
    integrity: str

    @property
    def location(self) -> Path:
        return Path(f"{self.package}@{self.version}") / self.path

    def matches(self, content: bytes) -> bool:
        algorithm, _, expected = self.integrity.partition("-")
        return base64.b64encode(hashlib.new(algorithm, content).digest()).decode() == expected


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.files: list[PageFile] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        url, integrity = attributes.get("src") or attributes.get("href"), attributes.get("integrity")
        if url and integrity:
            # "/@scope/name@1.2.3/dist/file.js": the version follows the last @ before the path.
            head, _, tail = urlsplit(url).path.lstrip("/").rpartition("@")
            version, _, path = tail.partition("/")
            self.files.append(PageFile(head, version, path, integrity))


def page_files() -> list[PageFile]:
    """What Strawberry's page loads under an integrity hash."""
    spec = importlib.util.find_spec("strawberry")
    for location in (spec and spec.submodule_search_locations) or ():
        page = _Page()
        page.feed((Path(location) / "static" / "graphiql.html").read_text(encoding="utf-8"))
        return page.files
    raise FetchError("strawberry-graphql is not installed")


def is_complete(files: list[PageFile]) -> bool:
    return all(
        (TARGET / file.location).is_file() and file.matches((TARGET / file.location).read_bytes()) for file in files
    )


def fetch(files: list[PageFile]) -> None:
    """Put all files in place, verified. Raises FetchError."""
    pinned = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    specs = sorted({f"{file.package}@{file.version}" for file in files})
    if strange := [spec for spec in specs if spec not in {f"{name}@{pin}" for name, pin in pinned.items()}]:
        raise FetchError(f"package.json does not pin {', '.join(strange)}")
    with tempfile.TemporaryDirectory(prefix="navstream-graphiql-") as temporary:
        tarballs, staged = Path(temporary) / "tarballs", Path(temporary) / "staged"
        tarballs.mkdir()
        npm = shutil.which("npm") or _install_npm()
        options = [
            "--loglevel=error",
            "--ignore-scripts",
            "--no-update-notifier",
            "--fetch-retries=1",
            "--fetch-timeout=20000",
        ]
        _run([npm, "pack", *options, "--pack-destination", str(tarballs), *specs], Path(temporary), NPM_TIMEOUT_S)
        for file in files:
            content = _extract(tarballs, file)
            if not file.matches(content):
                raise FetchError(f"{file.location} does not match the page's integrity hash")
            (staged / file.location).parent.mkdir(parents=True, exist_ok=True)
            (staged / file.location).write_bytes(content)
        shutil.rmtree(TARGET, ignore_errors=True)
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staged, TARGET)


def _extract(tarballs: Path, file: PageFile) -> bytes:
    """One file out of npm's tarball, whose name is the package's without @ and with - for /."""
    name = f"{file.package.removeprefix('@').replace('/', '-')}-{file.version}.tgz"
    try:
        with tarfile.open(tarballs / name) as tarball:
            member = tarball.extractfile(f"package/{file.path}")
            if member is None:
                raise FetchError(f"{file.location} is not a file in its package")
            return member.read(FILE_BYTES_MAX)
    except (OSError, KeyError, tarfile.TarError) as error:
        raise FetchError(f"{file.location} is not in {name}: {error}") from error


def _install_npm() -> str:
    """npm out of a Python wheel, into this environment."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    pip = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    _run([*pip, "--quiet", "--require-hashes", "-r", str(NODE_REQUIREMENTS)], PROJECT, NODE_INSTALL_TIMEOUT_S)
    return str(Path(sys.executable).parent / "npm")


def _run(argv: list[str], cwd: Path, timeout_s: int) -> None:
    # npm is a script that looks for `node` on the path, which is beside it when it came from the wheel.
    search_path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    environment = {**os.environ, "PATH": search_path}
    try:
        done = subprocess.run(  # noqa: S603 - npm and pip with arguments made here.
            argv, cwd=cwd, env=environment, timeout=timeout_s, capture_output=True, text=True, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"{Path(argv[0]).name}: {error.__class__.__name__}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise FetchError(f"{Path(argv[0]).name} failed ({done.returncode}): {said[0]}")


def main() -> None:
    try:
        files = page_files()
        if not is_complete(files):
            fetch(files)
    except (FetchError, OSError) as error:
        sys.stderr.write(f"GraphiQL's files were not fetched, its page will load them from elsewhere: {error}\n")


if __name__ == "__main__":
    main()
