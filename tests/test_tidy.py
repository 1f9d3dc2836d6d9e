"""House rules, each with its reason. A rule that is broken names the file and the line."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "workers", "api", "resolvers")
PROGRAM = [*sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")), ROOT / "navstream.py"]
EVERYTHING = sorted([*PROGRAM, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
EVERYTHING += sorted([*(ROOT / "alembic").rglob("*.py"), *(ROOT / "web").glob("*/*.py")])
CORE = sorted((ROOT / "engine").glob("*.py"))

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

# Money is integers and Decimals here. A float that is needed (an error bound, a scale) is a named constant.
MONEY = ("amounts", "as_of", "book", "booking", "explain", "ledger", "lots", "pnl", "portfolio", "positions", "posting")
MONEY += ("sectors", "baselines", "book_accounts", "book_columns", "book_holdings", "book_positions", "book_window")
MONEY_STORES = (
    "as_of_reads",
    "ledger_postgres",
    "shards_postgres",
    "shard_loading",
    "ledger_reads",
    "ledger_chain",
    "ledger_export",
    "ledger_selection",
)
MONEY_MODULES = [ROOT / "engine" / f"{name}.py" for name in MONEY]
MONEY_MODULES += [ROOT / "engine" / "stores" / f"{name}.py" for name in MONEY_STORES]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def at(path: Path, node: ast.AST | int) -> str:
    line = node if isinstance(node, int) else getattr(node, "lineno", 0)
    return f"{path.relative_to(ROOT)}:{line}"


def imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def importing(paths: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    names = tuple(f"{name}." for name in forbidden)
    return sorted({at(path, node) for path in paths for name, node in imports(path) if f"{name}.".startswith(names)})


def under(package: str) -> list[Path]:
    return [path for path in PROGRAM if path.is_relative_to(ROOT / package)]


# -- layers ---------------------------------------------------------------------------------------------------


def test_the_core_does_no_input_or_output() -> None:
    """What decides about money is tested without a loop, a socket or a sleep."""
    libraries = ("redis", "asyncio", "sqlalchemy", "aiokafka", "asyncpg", "socket", "threading", "subprocess")
    assert importing(CORE, (*libraries, "engine.stores", "engine.runtime", "structlog", "prometheus_client")) == []


def test_the_core_reads_no_clock() -> None:
    """Time is an argument, so that every instant can be tested and replayed."""
    found = importing(CORE, ("time",))
    for path in CORE:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today", "time_ns", "monotonic"):
                found.append(at(path, node))
    assert found == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("engine", ("workers", "api", "resolvers", "navstream")),
        ("workers", ("api", "resolvers", "navstream")),
        ("resolvers", ("api", "workers", "navstream")),
        ("api", ("workers", "navstream")),
    ],
)
def test_imports_point_inwards(package: str, forbidden: tuple[str, ...]) -> None:
    """workers → engine and api → resolvers → engine: each process is built of its own half only."""
    assert importing(under(package), forbidden) == []


def test_the_program_imports_no_tests() -> None:
    """What ships runs without what does not."""
    assert importing(PROGRAM, ("tests", "benchmarks", "pytest", "hypothesis")) == []


# -- names and sizes ------------------------------------------------------------------------------------------


def test_no_module_is_a_drawer_for_everything() -> None:
    """A module is named for what it is about; a drawer grows without end."""
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "shared", "base", "lib"}
    assert [at(path, 1) for path in EVERYTHING if drawers & {path.stem, *path.relative_to(ROOT).parts[:-1]}] == []


def test_modules_and_functions_stay_small_enough_to_be_read() -> None:
    found = []
    for path in EVERYTHING:
        if len(path.read_text(encoding="utf-8").splitlines()) > MODULE_LINES_MAX and path in PROGRAM:
            found.append(at(path, MODULE_LINES_MAX))
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= FUNCTION_LINES_MAX:
                    found.append(at(path, node))
    assert found == []


def test_every_module_says_what_it_is() -> None:
    """The module docstring is the specification."""
    shipped = [path for path in EVERYTHING if not path.is_relative_to(ROOT / "tests")]
    spoken = [path for path in shipped if path.name != "__init__.py" or path.stat().st_size]
    assert [at(path, 1) for path in spoken if not ast.get_docstring(parsed(path))] == []


def test_alembic_is_no_package() -> None:
    """An `__init__.py` there would shadow the installed alembic."""
    assert not (ROOT / "alembic" / "__init__.py").exists()


# -- time and money -------------------------------------------------------------------------------------------


def test_every_datetime_has_a_time_zone() -> None:
    """A naive one means another instant on another machine."""
    found = []
    for path in EVERYTHING:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                aware = node.args or any(keyword.arg in ("tz", "tzinfo") for keyword in node.keywords)
                if node.func.attr in ("utcnow", "utcfromtimestamp"):
                    found.append(at(path, node))
                if node.func.attr == "now" and ast.unparse(node.func.value).endswith("datetime") and not aware:
                    found.append(at(path, node))
    assert found == []


def test_money_is_not_a_float_literal() -> None:
    """0.1 is not 0.1. A float in money code is a module-level constant with a name and a reason."""
    found = []
    for path in MONEY_MODULES:
        tree = parsed(path)
        named = [
            node
            for statement in tree.body
            if isinstance(statement, ast.Assign | ast.AnnAssign)
            for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
            if isinstance(target, ast.Name) and target.id.lstrip("_").isupper()
            for node in ast.walk(statement)
        ]
        found += [
            at(path, node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, float) and node not in named
        ]
    assert found == []


def test_only_amounts_rounds_money() -> None:
    """One place decides how; `round` and `quantize` elsewhere in money code would be a second."""
    found = []
    for path in MONEY_MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and path.stem != "amounts":
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("round", "quantize", "to_integral_value"):
                    found.append(at(path, node))
    assert found == []


# -- one place for each -----------------------------------------------------------------------------------------

_REDIS_KEY = re.compile(r"^(prices|quotes)$|\b(marks|shard|positions|sectors|sector_values):\{")


def test_redis_keys_are_built_in_one_place() -> None:
    """A key spelled twice is a key that one day differs; and only with its hash tag a shard is one Cluster slot."""
    calls = {"hset", "hget", "hgetall", "hmget", "spublish", "ssubscribe", "delete", "unlink", "zadd", "get", "set"}
    found = []
    for path in PROGRAM:
        if path.name == "redis_keys.py":
            continue
        tree = parsed(path)
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = literal_text(node)
            if text is not None and id(node) not in documentation and _REDIS_KEY.search(text) and ":{" in text:
                found.append(at(path, node))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls:
                first = literal_text(node.args[0]) if node.args else None
                if first is not None and _REDIS_KEY.search(first):
                    found.append(at(path, node))
    assert found == []


def literal_text(node: ast.AST) -> str | None:
    """The text of a string or of an f-string, its braces included."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


# -- what is committed -------------------------------------------------------------------------------------------

_TEXT_SUFFIXES = {".py", ".toml", ".md", ".txt", ".yaml", ".yml", ".json", ".graphql", ".mako", ".csv", ".ini", ".html"}
_IGNORED = {".venv", ".git", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", "results"}
_IGNORED |= {"graphiql", ".hypothesis", "build", "dist", "data"}
# A lock file names packages and hashes; where they come from is the reader's affair.
_REGISTRY_HOST = re.compile(
    r"(files\.pythonhosted\.org|pypi\.org/simple|registry\.npmjs\.org|--index-url|--extra-index-url|artifactory)"
)
_MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt|opt/[a-z]+/venv)/[A-Za-z0-9_.-]+")


def committed() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        is_text = path.suffix in _TEXT_SUFFIXES or path.name in ("Makefile", "Dockerfile", "run")
        if is_text and path.is_file() and not _IGNORED & set(parts):
            yield path


@pytest.mark.parametrize(
    ("pattern", "own"), [(_REGISTRY_HOST, "_REGISTRY_HOST"), (_MACHINE_PATH, "_MACHINE_PATH")], ids=["host", "path"]
)
def test_nothing_committed_knows_one_machine(pattern: re.Pattern[str], own: str) -> None:
    """A clone works anywhere: no package host of ours, no path of ours."""
    found = []
    for path in committed():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [at(path, n) for n, line in enumerate(lines, 1) if pattern.search(line) and path != Path(__file__)]
    assert found == []


def test_every_marker_is_declared_with_its_reason() -> None:
    """`--strict-markers` refuses others; a declared one says what it needs."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert all(": needs " in marker for marker in settings["markers"])
    assert "--strict-markers" in settings["addopts"]
