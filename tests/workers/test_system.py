"""What the system checks before it starts its roles."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import asyncpg
import pytest

from engine.runtime.clock import plan_market_clock
from engine.runtime.connections import postgres_dsn
from engine.runtime.settings import Settings
from workers.system import check_time, recording_of

YEAR_START = datetime(2020, 4, 1, tzinfo=UTC)


def settings_at(database: str, day: date | None) -> Settings:
    """On a recorded market that has not begun its only day, or on wall time."""
    far_ns = int((datetime.now(UTC) + timedelta(hours=1)).timestamp()) * 1_000_000_000
    return Settings(postgres_url=database, market_clock="" if day is None else plan_market_clock([day], 1_000, far_ns))


async def written(url: str, recorded_at: datetime | None, cut_at: datetime | None) -> None:
    """A portfolio whose ledger was written last at `recorded_at`, and whose newest baseline is of `cut_at`."""
    connection = await asyncpg.connect(postgres_dsn(url))
    try:
        await connection.execute("INSERT INTO shard (id, log_id, next_offset, epoch) VALUES (0, 'l', 0, 1)")
        await connection.execute(
            "INSERT INTO portfolio (id, shard, owner, name, base_currency, day_cut, opened_at, cash, realized, fees,"
            " income, flows, receivables, trading, corporate, ledger_sequence, ledger_hash)"
            " VALUES ('p', 0, 'o', 'n', 'USD', '00:00 UTC', $1, 0, 0, 0, 0, 0, 0, 0, 0, 2, '')",
            YEAR_START,
        )
        for sequence, at in enumerate((YEAR_START, recorded_at), 1):
            if at is not None:
                await connection.execute(
                    "INSERT INTO ledger_entry (portfolio_id, sequence, event_id, kind, amount, fee, receivable,"
                    " realized, cost, nav_effect, cash_after, effective_at, recorded_at, late, content_hash, hash)"
                    " VALUES ('p', $1, $2, 'OPEN', 0, 0, 0, 0, 0, 0, 0, $3, $3, false, '', '')",
                    sequence,
                    str(sequence),
                    at,
                )
        if cut_at is not None:
            await connection.execute(
                "INSERT INTO day_baseline (portfolio_id, cut_at, nav, ledger_sequence, symbols, position_values,"
                " estimated) VALUES ('p', $1, 0, 1, '{}', '{}', false)",
                cut_at,
            )
    finally:
        await connection.close()


async def test_an_empty_ledger_may_be_anywhere_in_time(fresh_database: str) -> None:
    await check_time(settings_at(fresh_database, date(1999, 1, 4)))


@pytest.mark.parametrize(
    ("recorded_at", "cut_at"),
    [
        (datetime(2020, 4, 2, 15, 30, tzinfo=UTC), None),
        (None, datetime(2020, 4, 2, 15, 30, tzinfo=UTC)),
        (YEAR_START + timedelta(hours=1), datetime(2020, 4, 2, 15, 30, tzinfo=UTC)),
    ],
)
async def test_a_ledger_does_not_go_back_in_time(
    fresh_database: str, recorded_at: datetime | None, cut_at: datetime | None
) -> None:
    await written(fresh_database, recorded_at, cut_at)
    with pytest.raises(ValueError, match=r"has reached 2020-04-02 15:30, the clock says 2020-04-02 00:00"):
        await check_time(settings_at(fresh_database, date(2020, 4, 2)))
    await check_time(settings_at(fresh_database, date(2020, 4, 3)))
    await check_time(settings_at(fresh_database, None))


async def test_clocks_that_differ_by_seconds_tell_one_time(fresh_database: str) -> None:
    await written(fresh_database, datetime(2020, 4, 2, 0, 0, 30, tzinfo=UTC), None)
    await check_time(settings_at(fresh_database, date(2020, 4, 2)))


def test_the_recording_of_a_feed() -> None:
    assert recording_of("replay:bars.csv@5").name == "bars.csv"
    assert not recording_of("simulated:20").name
    assert not recording_of("").name
