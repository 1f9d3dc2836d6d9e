"""The command line: the composition root of every process, and the only module that knows both workers and API.

`up` and `demo` start servers that the settings do not name (embedded), bring the database to the newest schema,
start the workers and the API as child processes and keep them running. All other commands are one process each;
they find a running system by the same settings or by its ready file.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import structlog
import typer
import uvloop

from engine.ledger import LedgerKind
from engine.runtime.clock import Clock, make_clock
from engine.runtime.command_line import Ready, away_ends, console, counting, errors, fail, settings_of
from engine.runtime.settings import ReadyFile, Settings
from engine.runtime.telemetry import start_telemetry
from engine.stores.ledger_export import ExportFormat
from workers import commands

app = typer.Typer(
    help="Real-time portfolio intelligence: NAV, P&L and allocation, live over GraphQL.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)
assets_app = typer.Typer(help="The asset catalogue.", no_args_is_help=True)
app.add_typer(assets_app, name="assets")
ledger_app = typer.Typer(help="The ledger as a file, and as evidence.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
badges_app = typer.Typer(invoke_without_command=True)
app.add_typer(badges_app, name="badges")
Outcome = TypeVar("Outcome")
Worker = Callable[[Settings, Clock, asyncio.Event], Coroutine[Any, Any, object]]


DEMO_OWNER = "demo"
DEMO_TOKEN_TTL_S = 24 * 3600
DEMO_OPERATIONS = (
    """subscription Nav { navUpdates(portfolioId: "demo-0001") { kind nav quality asOf sequence conflated } }""",
    """subscription Pnl { pnlUpdates(portfolioId: "demo-0001") { kind dayPnl unrealizedPnl realizedPnl asOf } }""",
    """subscription Badges { badgeEvents(portfolioId: "demo-0001") { kind at badge { name rarity } cursor } }""",
    """query Dashboard {
  portfolio(portfolioId: "demo-0001") {
    name
    valuation { nav cash positionsValue unrealizedPnl dayPnl quality asOf }
    sectorAllocation { sector value weight weightAtLastFill }
    positions(first: 15) { edges { node { asset { symbol sector } quantity price marketValue unrealizedPnl } } }
    equityCurve(range: DAYS_7) { points { at nav } }
    badges { badge { name rarity } figure threshold awardedAt active }
  }
}""",
)
SERVERS = ("redis_url", "postgres_url", "kafka_bootstrap")


def run_worker(role: str, settings: Settings, worker: Worker) -> None:
    """Run one worker on this process's loop until SIGINT or SIGTERM."""
    from workers.lifecycle import stop_on_signal

    start_telemetry(settings, role)

    async def run() -> None:
        await worker(settings, make_clock(settings.market_clock), stop_on_signal())

    uvloop.run(run())


@app.command()
def up(
    port: Annotated[int, typer.Option(help="Where the API listens, on loopback.")] = 8000,
    data_dir: Annotated[
        Path | None, typer.Option(help="Keep PostgreSQL and Valkey here; without it nothing outlives the run.")
    ] = None,
    evaluators: Annotated[int, typer.Option(min=1, max=64, help="How many evaluator processes.")] = 1,
    feed: Annotated[
        str, typer.Option(help="simulated[:RATE], replay:FILE[@SPEED], ws:URL or coinbase[:URL]; none by default.")
    ] = "",
    ready_file: Annotated[Path | None, typer.Option(help="Written, as JSON, when all is ready.")] = None,
) -> None:
    """Start the whole system, without invented data.

    Servers that NAVSTREAM_REDIS_URL, NAVSTREAM_POSTGRES_URL and NAVSTREAM_KAFKA_BOOTSTRAP do not name are embedded.

    Example: `navstream up --port 8080 --data-dir ./data --feed coinbase: --ready-file ready.json`
    """
    from workers.system import SystemOptions, run_system

    settings = settings_of(None).model_copy(update={"port": port})
    run_system(settings, SystemOptions(data_dir, evaluators, feed, ready_file), fail, print_addresses)


@app.command()
def demo(
    port: Annotated[int, typer.Option(help="Where the API listens, on loopback.")] = 8000,
    replay: Annotated[
        str,
        typer.Option(
            help="FILE[@SPEED]: recorded daily bars with their splits and dividends (paid 14 days after their "
            "ex-date), SPEED market days a second, in place of invented prices."
        ),
    ] = "",
    portfolios: Annotated[int, typer.Option(min=1, max=20_000, help="How many portfolios of 15 positions.")] = 500,
    evaluators: Annotated[int, typer.Option(min=1, max=64, help="How many evaluator processes.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything that is invented.")] = 7,
    data_dir: Annotated[Path | None, typer.Option(help="Keep PostgreSQL and Valkey here.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Written, as JSON, when all is ready.")] = None,
) -> None:
    """Start everything with invented portfolios and moving prices, and say what to open in a browser.

    Example: `navstream demo --replay bars.csv.gz@2 --portfolios 500`
    """
    from workers.system import SystemOptions, run_system

    # The demo's terminal is for what it prints; its processes speak up when something is wrong.
    quiet = {} if "NAVSTREAM_LOG_LEVEL" in os.environ else {"log_level": "WARNING"}
    settings = settings_of(None).model_copy(update={"port": port} | quiet)
    feed = f"replay:{replay}" if replay else "simulated"
    options = SystemOptions(data_dir, evaluators, feed, ready_file, demo_portfolios=portfolios, seed=seed)
    run_system(settings, options, fail, print_demo)


def print_addresses(ready: ReadyFile, settings: Settings) -> None:
    console.print(f"navstream is ready: {ready.graphql_url}", highlight=False)


def print_demo(ready: ReadyFile, settings: Settings) -> None:
    """Where to look, as whom, and what to ask."""
    from api.auth import issue_token

    signed = issue_token(
        settings, DEMO_OWNER, "portfolio:read ledger:read ledger:write", DEMO_TOKEN_TTL_S, datetime.now(UTC)
    )
    console.rule("navstream demo")
    console.print("Open in a browser (the token is in the link and stays in the browser):")
    sys.stdout.write(f"\n  {ready.graphql_url}#token={signed}\n\n")
    console.print("Development token, for the headers pane or `Authorization: Bearer …`:")
    sys.stdout.write(f"\n{signed}\n\n")
    console.print("Operations to paste:")
    # Written plainly: what is to be pasted must not be cut at the terminal's width.
    sys.stdout.write("\n" + "\n\n".join(DEMO_OPERATIONS) + "\n\n")
    console.print("Ctrl-C ends everything.")


@app.command()
def api(ready_file: Ready = None, port: Annotated[int | None, typer.Option(help="Where to listen.")] = None) -> None:
    """Serve GraphQL. Example: `navstream api --ready-file ready.json --port 8001`"""
    from api.app import serve

    settings = settings_of(ready_file, *SERVERS)
    if port is not None:
        settings = settings.model_copy(update={"port": port})
    start_telemetry(settings, "api")
    serve(settings, make_clock(settings.market_clock))


@app.command()
def quotes(
    feed: Annotated[str, typer.Option(help="simulated[:RATE], replay:FILE[@SPEED], ws:URL or coinbase[:URL].")],
    ready_file: Ready = None,
    seed: Annotated[int | None, typer.Option(help="Of a simulated feed.")] = None,
) -> None:
    """Bring a feed's quotes into Redis. Example: `navstream quotes --feed ws:ws://127.0.0.1:9000`"""
    from workers.feeds.select import make_feed
    from workers.quotes import run_quotes

    settings = settings_of(ready_file, "redis_url")

    async def run(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
        await run_quotes(settings, make_feed(feed, clock, seed), clock, stop)

    try:
        run_worker("quotes", settings, run)
    except ValueError as error:
        fail(str(error))


@app.command()
def replay(
    recording: Annotated[str, typer.Argument(help="FILE[@SPEED] of daily bars.")], ready_file: Ready = None
) -> None:
    """Replay recorded bars into a running system that was started with the same recording's clock.

    All splits and dividends of the bars are announced first. Bars have no pay dates: a dividend is paid 14 days after
    its ex-date.

    Example: `navstream replay bars.csv.gz@2 --ready-file ready.json`
    """
    from workers.replay import run_replay

    async def run(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
        await run_replay(settings, recording, clock, stop)

    try:
        run_worker("quotes", settings_of(ready_file, "redis_url", "kafka_bootstrap"), run)
    except ValueError as error:
        fail(str(error))


@app.command()
def evaluator(ready_file: Ready = None) -> None:
    """Own shards: book their events, value their portfolios. Example: `navstream evaluator --ready-file ready.json`"""
    from workers.evaluator import run_evaluator

    run_worker("evaluator", settings_of(ready_file, *SERVERS), run_evaluator)


@app.command()
def snapshots(ready_file: Ready = None) -> None:
    """Take equity snapshots on the hourly grid. Example: `navstream snapshots --ready-file ready.json`"""
    from workers.snapshots import run_snapshots

    run_worker("snapshots", settings_of(ready_file, "redis_url", "postgres_url"), run_snapshots)


@app.command()
def reconciler(ready_file: Ready = None) -> None:
    """Check all portfolios in rotation, and have shards published anew where hot state is not what the ledger says.

    Example: `navstream reconciler --ready-file ready.json`
    """
    from workers.reconciler import run_reconciler

    run_worker("reconciler", settings_of(ready_file, "redis_url", "postgres_url"), run_reconciler)


@badges_app.callback()
def badges(context: typer.Context, ready_file: Ready = None) -> None:
    """Bring proved badges to Kafka, award them, judge each session close; or, with a command, look at the awards.

    Example: `navstream badges --ready-file ready.json`
    """
    from workers.badges import run_badges

    if context.invoked_subcommand is None:
        run_worker("badges", settings_of(ready_file, *SERVERS), run_badges)


@app.command()
def webhooks(ready_file: Ready = None) -> None:
    """Deliver badge and threshold events to the endpoints of third parties.

    Example: `navstream webhooks --ready-file ready.json`
    """
    from workers.webhooks import run_webhooks

    run_worker("webhooks", settings_of(ready_file, "postgres_url"), run_webhooks)


@app.command(hidden=True)
def traders(
    portfolios: int, seed: int, recording: Annotated[str, typer.Option()] = "", ready_file: Ready = None
) -> None:
    """The demo's invented portfolios and their trading."""
    from workers.demo import run_demo_traders

    settings = settings_of(ready_file, *SERVERS)

    async def run(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
        await run_demo_traders(settings, clock, stop, portfolios, seed, recording)

    run_worker("traders", settings, run)


for command in (commands.reconcile, commands.events, commands.actions):
    app.command()(command)
assets_app.command("load")(commands.load)
badges_app.command("verify")(commands.verify_awards)


@app.command()
def token(
    sub: Annotated[str, typer.Option(help="The subject: whose portfolios it opens.")],
    scope: Annotated[
        str,
        typer.Option(help="Separated by blanks: portfolio:read ledger:read ledger:write webhooks:write admin."),
    ],
    ttl: Annotated[int, typer.Option(min=1, help="Seconds until it expires.")] = 3600,
    ready_file: Ready = None,
) -> None:
    """Print a JWT signed with NAVSTREAM_JWT_SECRET.

    Example: `navstream token --sub demo --scope "portfolio:read ledger:read" --ttl 600`
    """
    from api.auth import issue_token

    settings = settings_of(ready_file, "jwt_secret")
    try:
        sys.stdout.write(issue_token(settings, sub, scope, ttl, datetime.now(UTC)) + "\n")
    except ValueError as error:
        fail(str(error))


@app.command()
def schema(
    check: Annotated[bool, typer.Option("--check", help="Exit 1 when schema.graphql is stale.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Bring schema.graphql up to date.")] = False,
) -> None:
    """Print the GraphQL schema in SDL. Example: `navstream schema > schema.graphql`"""
    from resolvers.schema import print_schema

    sdl, path = print_schema(), Path(__file__).with_name("schema.graphql")
    if write:
        path.write_text(sdl)
    elif check:
        if not path.exists() or path.read_text() != sdl:
            fail("schema.graphql is stale: run `navstream schema --write` and look at the difference", 1)
        console.print("schema.graphql is what the code says")
    else:
        sys.stdout.write(sdl)


def run_ledger(portfolio: str | None, work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """Run a command on the ledger to its end, or end the program with one line that says why not."""
    from workers.ledger_commands import OutputError

    try:
        with away_ends("read the ledger"):
            return asyncio.run(work)
    except KeyError:
        fail(f"there is no portfolio {portfolio}")
    except OutputError as error:
        fail(str(error))


@ledger_app.command("export")
def ledger_export(
    portfolio: Annotated[str, typer.Argument(help="The portfolio's id.")],
    output: Annotated[Path, typer.Option(help="The file to write; - for standard output.")],
    file_format: Annotated[ExportFormat, typer.Option("--format", help="csv or parquet.")] = ExportFormat.CSV,
    begin: Annotated[str, typer.Option("--from", help="Only entries effective at or after this instant.")] = "",
    end: Annotated[str, typer.Option("--to", help="Only entries effective before this instant.")] = "",
    kind: Annotated[list[LedgerKind] | None, typer.Option(help="Only entries of this kind; may be repeated.")] = None,
    symbol: Annotated[str | None, typer.Option(help="Only entries of this symbol.")] = None,
    ready_file: Ready = None,
) -> None:
    """Write a portfolio's ledger to a file, oldest entry first; exit 3 when the server is away.

    Example: `navstream ledger export demo-0001 --output ledger.parquet --format parquet --from 2026-01-01T00:00:00Z`
    """
    from engine.stores.ledger_export import ExportPlan
    from engine.stores.ledger_selection import LedgerSelection, check_selection
    from resolvers.scalars import read_instant
    from workers.ledger_commands import export_file

    settings = settings_of(ready_file, "postgres_url")
    try:
        instants = [read_instant(text) if text else None for text in (begin, end)]
        selection = LedgerSelection(kind or None, symbol, effective_from=instants[0], effective_to=instants[1])
        check_selection(selection)
    except ValueError as error:
        fail(str(error))
    with counting("entries") as progress:
        plan = ExportPlan(portfolio, selection, file_format)
        count = run_ledger(portfolio, export_file(settings, plan, output, progress))
    errors.print(f"{count} entries", highlight=False)


@ledger_app.command("verify")
def ledger_verify(
    portfolio: Annotated[str | None, typer.Option(help="Only this one.")] = None, ready_file: Ready = None
) -> None:
    """Recompute the hash chain of every portfolio's ledger, name each entry that was changed behind the program's back;
    exit 1 when there is one, 3 when the server is away.

    Example: `navstream ledger verify --ready-file ready.json`
    """
    from engine.stores.ledger_chain import Fault
    from workers.ledger_commands import verify_chains

    def print_fault(fault: Fault) -> None:
        text = f"{fault.portfolio_id} entry {fault.sequence}: {fault.kind}: {fault.detail}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    settings, start_s = settings_of(ready_file, "postgres_url"), time.monotonic()
    with counting("portfolios") as progress:
        report = run_ledger(portfolio, verify_chains(settings, portfolio, print_fault, progress))
    rate = report.entries_count / max(time.monotonic() - start_s, 1e-3)
    figures = f"{report.portfolios_count} portfolios, {report.entries_count} ledger entries ({rate:,.0f} a second), "
    console.print(f"{figures}{report.faults_count} faults", highlight=False)
    raise typer.Exit(1 if report.faults_count else 0)


def main() -> None:
    """Entry point of the `navstream` program."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    app()


if __name__ == "__main__":
    main()
