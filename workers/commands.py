"""Commands of the program that are done with one piece of work of a worker's; navstream.py gives them their places."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from engine.runtime.command_line import Ready, away_ends, console, counting, fail, settings_of


def reconcile(ready_file: Ready = None) -> None:
    """Compare hot state with a Decimal fold of the ledger for every portfolio; exit 1 on any difference, 3 when a
    server is away.

    Example: `navstream reconcile --ready-file ready.json`
    """
    from workers.reconciler import reconcile_once

    settings = settings_of(ready_file, "redis_url", "postgres_url")
    with away_ends("reconcile"):
        report = asyncio.run(reconcile_once(settings))
    for difference in report.differences[:100]:
        console.print(
            f"{difference.portfolio_id} {difference.figure}: expected {difference.expected}, found {difference.found}",
            highlight=False,
            markup=False,
        )
    console.print(
        f"{report.portfolios_count} portfolios, {report.entries_count} ledger entries, "
        f"{len(report.differences)} differences",
        highlight=False,
    )
    raise typer.Exit(1 if report.differences else 0)


def events(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="One JSON event a line.")],
    ready_file: Ready = None,
) -> None:
    """Produce portfolio events and report how many were acknowledged; exit 1 when not all were.

    Example: `navstream events fills.jsonl --ready-file ready.json`
    """
    from workers.producing import produce_events

    produce_file(file, "events", partial(produce_events, settings_of(ready_file, "kafka_bootstrap")))


def actions(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="One JSON split or dividend a line.")],
    ready_file: Ready = None,
) -> None:
    """Produce corporate actions and report how many were acknowledged; exit 1 when not all were.

    Each takes effect for every holder at its instant; one that comes later than that does so on arrival, flagged late.

    Example: `navstream actions splits.jsonl --ready-file ready.json`
    """
    from workers.producing import produce_actions

    produce_file(file, "actions", partial(produce_actions, settings_of(ready_file, "kafka_bootstrap")))


def produce_file(file: Path, name: str, produce: Callable[..., Coroutine[Any, Any, int]]) -> NoReturn:
    """Produce the lines of a file, with progress; ends the program."""
    with file.open("rb") as lines:
        total = sum(1 for line in lines if line.strip())
    with away_ends("produce"), counting("acknowledged") as progress, file.open("rb") as lines:
        acknowledged = asyncio.run(produce(lines, lambda count: progress(count, total)))
    console.print(f"{acknowledged} of {total} {name} acknowledged", highlight=False)
    raise typer.Exit(0 if acknowledged == total else 1)


def load(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="symbol,name,asset_class,sector,industry")],
    ready_file: Ready = None,
) -> None:
    """Add assets to the catalogue, or change their classification, which then counts from now on and not for before.

    Loading the same file again changes nothing. Example: `navstream assets load my_assets.csv`
    """
    from workers.catalogue import load_assets

    settings = settings_of(ready_file, "postgres_url")
    try:
        with away_ends("load"):
            loaded = asyncio.run(load_assets(settings, file.read_text()))
    except ValueError as error:
        fail(f"{file}: {error}")
    unchanged = loaded.count - loaded.added - loaded.reclassified
    figures = f"{loaded.added} added, {loaded.reclassified} reclassified, {unchanged} unchanged"
    console.print(f"{loaded.count} assets: {figures}", highlight=False)


def verify_awards(
    portfolio: Annotated[str | None, typer.Option(help="Only this one.")] = None, ready_file: Ready = None
) -> None:
    """Derive every award again from the ledger, the prices of its evidence, classifications and snapshots; name what
    was awarded without proof, what does not come out, and what is deserved and missing. Exit 1 when there is any, 3
    when the server is away.

    Example: `navstream badges verify --ready-file ready.json`
    """
    from workers.badge_commands import print_fault, print_verified, verify_badges

    settings, began_s = settings_of(ready_file, "postgres_url"), time.monotonic()
    try:
        with away_ends("read the awards"), counting("portfolios") as progress:
            verified = asyncio.run(verify_badges(settings, portfolio, print_fault, progress))
    except KeyError:
        fail(f"there is no portfolio {portfolio}")
    print_verified(verified, time.monotonic() - began_s)
    raise typer.Exit(1 if verified.faults_count else 0)
