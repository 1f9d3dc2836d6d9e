"""What `make setup` relies on: hash-locked requirement files, and GraphiQL's files as its page wants them."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).parents[2]
LOCKS = sorted(PROJECT.glob("requirements*.txt"))


@pytest.fixture
def graphiql() -> ModuleType:
    path = PROJECT / "web" / "graphiql" / "fetch.py"
    spec = importlib.util.spec_from_file_location("graphiql_fetch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "graphiql_fetch", module)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_locked_requirement_has_a_version_and_hashes(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    requirements = re.split(r"\n(?=\S)", text.strip())
    assert requirements
    for requirement in requirements:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+", requirement), requirement
        assert "--hash=sha256:" in requirement, requirement
    assert "://" not in text, "a lock names no host: the registry is the installer's business"


def test_the_pinned_packages_are_those_that_the_page_loads(graphiql: ModuleType) -> None:
    """An upgrade of Strawberry that changes its page fails here, not silently at set-up."""
    files = graphiql.page_files()
    assert len(files) == 7
    pinned = json.loads((PROJECT / "web" / "graphiql" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert {file.package: file.version for file in files} == pinned


def test_a_file_that_differs_from_its_hash_is_refused(
    graphiql: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, other = b"genuine", b"tampered"
    integrity = "sha384-" + base64.b64encode(hashlib.sha384(genuine).digest()).decode()
    file = graphiql.PageFile("react", "18.2.0", "umd/react.production.min.js", integrity)
    assert file.matches(genuine)
    content = other

    def pack(argv: list[str], cwd: Path, timeout_s: int) -> None:
        with tarfile.open(cwd / "tarballs" / "react-18.2.0.tgz", "w:gz") as tarball:
            member = tarfile.TarInfo("package/umd/react.production.min.js")
            member.size = len(content)
            tarball.addfile(member, io.BytesIO(content))

    monkeypatch.setattr(graphiql, "_run", pack)
    monkeypatch.setattr(graphiql, "TARGET", tmp_path / "static" / "graphiql")
    with pytest.raises(graphiql.FetchError, match="integrity"):
        graphiql.fetch([file])
    assert not (tmp_path / "static").exists()
    content = genuine
    graphiql.fetch([file])
    assert graphiql.is_complete([file])
    assert (tmp_path / "static" / "graphiql" / "react@18.2.0" / file.path).read_bytes() == genuine


def test_set_up_goes_on_without_the_files(
    graphiql: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str], cwd: Path, timeout_s: int) -> None:
        raise graphiql.FetchError("npm failed (1): no network")

    monkeypatch.setattr(graphiql, "_run", fail)
    monkeypatch.setattr(graphiql, "TARGET", tmp_path / "graphiql")
    graphiql.main()
    said = capsys.readouterr().err
    assert "no network" in said
    assert said.count("\n") == 1
