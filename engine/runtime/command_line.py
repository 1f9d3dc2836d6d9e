"""What all commands of the program have in common: where they print, how they find a system, how they fail.

Exit statuses: 0 done; 1 done, and what was looked for is not as it should be; 2 asked wrongly; 3 a server is away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from engine.runtime.session_files import read_session_file
from engine.runtime.settings import Settings, read_ready_file

console = Console()
errors = Console(stderr=True)

READY_FILE = typer.Option("--ready-file", help="The ready file of a running system, in place of settings.")
Ready = Annotated[Path | None, READY_FILE]


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one clear line."""
    errors.print(message, style="bold red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def settings_of(ready_file: Path | None, *needed: str) -> Settings:
    """Settings from the environment, pointed at a ready file's system; `needed` ones must not be empty."""
    try:
        settings = Settings()
    except ValidationError as error:
        fail("\n".join(f"NAVSTREAM_{item['loc'][0]}: {item['msg']}".upper() for item in error.errors()))
    if ready_file is not None:
        try:
            settings = settings.using(read_ready_file(ready_file))
        except (OSError, msgspec.MsgspecError) as error:
            fail(f"{ready_file} is not a ready file: {error}")
    if settings.sessions_file:
        read_session_file(Path(settings.sessions_file))
    missing = [f"NAVSTREAM_{name.upper()}" for name in needed if not getattr(settings, name)]
    if missing:
        fail(f"set {', '.join(missing)}, or name a running system with --ready-file")
    return settings


@contextmanager
def counting(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, beside standard output, that is told how much is done and of how much."""
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors) as shown:
        task = shown.add_task(unit, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


@contextmanager
def away_ends(what: str) -> Iterator[None]:
    """When a server is away, end with status 3 and one line that says what could not be done."""
    try:
        yield
    except Exception as error:
        # Drivers take a second to load, which a command that only answers need not wait for.
        from engine.runtime.connections import AWAY

        if not isinstance(error, AWAY):
            raise
        fail(f"could not {what}: {type(error).__name__}: {error}", 3)
