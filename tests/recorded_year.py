"""The recorded year through the whole program, run once for all tests that look at what it has written down.

`NAVSTREAM_YEAR_SPEED` (market days a second) and `NAVSTREAM_YEAR_PORTFOLIOS` make it longer and larger.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg

from engine.runtime.connections import postgres_dsn
from engine.runtime.settings import ReadyFile
from tests.running_program import RECORDING, navstream, system

SPEED = os.environ.get("NAVSTREAM_YEAR_SPEED", "5")
PORTFOLIOS = int(os.environ.get("NAVSTREAM_YEAR_PORTFOLIOS", "60"))
SESSIONS = 266
SETTLE_TIMEOUT_S = 240  # a machine that is behind gets there all the same
TIMEOUT_S = 360 + int(SESSIONS / float(SPEED))

Row = asyncpg.Record


@dataclass(frozen=True)
class Recorded:
    """All that the program has written down."""

    ledger: dict[str, list[Row]]
    snapshots: dict[tuple[str, datetime], Row]
    portfolios: dict[str, Row]
    applied_at: dict[tuple[int, str, str], datetime]
    late_count: int
    rules: Sequence[Row]
    awards: dict[tuple[str, str], Row]
    badge_events: Sequence[Row]


async def read_recorded(url: str) -> Recorded:
    connection = await asyncpg.connect(postgres_dsn(url))
    try:
        ledger: dict[str, list[Row]] = defaultdict(list)
        for row in await connection.fetch("SELECT * FROM ledger_entry ORDER BY portfolio_id, sequence"):
            ledger[row["portfolio_id"]].append(row)
        snapshots = await connection.fetch("SELECT * FROM equity_snapshot")
        portfolios = await connection.fetch("SELECT * FROM portfolio")
        steps = await connection.fetch("SELECT * FROM shard_action")
        rules = await connection.fetch("SELECT * FROM badge_rule")
        awards = await connection.fetch("SELECT * FROM badge_award")
        events = await connection.fetch("SELECT * FROM badge_event ORDER BY portfolio_id, sequence")
    finally:
        await connection.close()
    return Recorded(
        ledger=dict(ledger),
        snapshots={(row["portfolio_id"], row["at"]): row for row in snapshots},
        portfolios={row["id"]: row for row in portfolios},
        applied_at={(row["shard"], row["action_id"], row["step"]): row["applied_at"] for row in steps},
        late_count=sum(row["late"] for row in steps),
        rules=rules,
        awards={(row["portfolio_id"], row["badge_id"]): row for row in awards},
        badge_events=events,
    )


def wait_for_the_end(ready: ReadyFile) -> None:
    """Until the recorded market is over and the ledger rests."""
    plan = json.loads(ready.market_clock)
    ends_at_s = plan["wall_start_ns"] / 1e9 + len(plan["days"]) * 1_000 / plan["speed_milli"]
    time.sleep(max(0, ends_at_s - time.time()))
    deadline_s, seen = time.monotonic() + SETTLE_TIMEOUT_S, (0,)
    while True:
        time.sleep(2)
        now = asyncio.run(counts(ready.postgres_url))
        if now == seen:
            return
        assert time.monotonic() < deadline_s, f"the market is over and the ledger goes on: {seen} {now}"
        seen = now


async def counts(url: str) -> tuple[int, ...]:
    connection = await asyncpg.connect(postgres_dsn(url))
    try:
        return (
            await connection.fetchval("SELECT count(*) FROM ledger_entry"),
            await connection.fetchval("SELECT count(*) FROM equity_snapshot"),
            await connection.fetchval("SELECT count(*) FROM badge_event"),
        )
    finally:
        await connection.close()


def run_year(directory: Path) -> Recorded:
    """Run the year; while the program still runs, it is asked to check itself."""
    with system(directory, "demo", "--replay", f"{RECORDING}@{SPEED}", "--portfolios", str(PORTFOLIOS)) as (_, ready):
        wait_for_the_end(ready)
        file = str(directory / "ready.json")
        checks: list[Any] = [
            navstream(*command, "--ready-file", file)
            for command in (("ledger", "verify"), ("reconcile",), ("badges", "verify"))
        ]
        found = asyncio.run(read_recorded(ready.postgres_url))
    for check in checks:
        assert check.returncode == 0, check.stdout + check.stderr
    assert checks[1].stdout.startswith(f"{PORTFOLIOS} portfolios")
    return found
