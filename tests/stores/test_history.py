"""History, one contract for plain tables and TimescaleDB's: what is written, read back, made daily and let go of.

Where the named server has TimescaleDB's Apache edition, the contract is run on hypertables with a plain view.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import asyncpg
import pytest

from engine.equity_curve import EquityPoint, Flow, Resolution, curve, opening
from engine.instants import to_datetime
from engine.marks import MarkQuality
from engine.stores.history_retention import HistoryRetention
from engine.stores.migrate import upgrade
from engine.stores.snapshots_reads import SnapshotsReads
from engine.stores.snapshots_timescale import SnapshotStore, read_snapshot
from tests.builders import MarkRow
from tests.conftest import create_database, drop_database
from tests.history_twins import NO_TIMESCALE, TIMESCALE_URL, Twin, money, snapshot_frame, twin

__all__ = ["twin"]

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
START = datetime(2024, 3, 4, tzinfo=UTC)
NAV_MAX = 2**62


async def points(twin: Twin, begin: datetime, resolution: Resolution, name: str = "p") -> list[tuple[datetime, int]]:
    found = await SnapshotsReads(lambda: twin.pool).points(name, begin, resolution)
    return [(to_datetime(point.at_ns), point.nav) for point in found]


# -- rows -------------------------------------------------------------------------------------------------------


async def test_a_row_says_exactly_what_the_mark_said(twin: Twin) -> None:
    as_of_ns = 1_795_342_800_123_457_999
    rows = {
        "p": MarkRow(
            nav=NAV_MAX - 1,
            cash=-3,
            receivables=17,
            as_of_ns=as_of_ns,
            sequence=2**40,
            ledger_sequence=5,
            quality=MarkQuality.HALTED,
        ),
        "portfolio-é": MarkRow(nav=-1, cash=-1),
    }
    assert await SnapshotStore(twin.pool).write(read_snapshot(snapshot_frame(START, rows, epoch=2**33))) == 2
    row = await twin.pool.fetchrow("SELECT * FROM equity_snapshot WHERE portfolio_id = 'p'")
    assert tuple(row) == (
        "p",
        START,
        money(NAV_MAX - 1),
        money(-3),
        money(17),
        money(NAV_MAX - 1 + 3 - 17),
        Decimal(0),
        1,
        MarkQuality.HALTED,
        to_datetime(as_of_ns),
        2**33,
        2**40,
        5,
    )
    assert await points(twin, START, Resolution.HOURLY, "portfolio-é") == [(START, -1)]


async def test_the_first_row_of_an_instant_stays(twin: Twin) -> None:
    assert await twin.snapshot(START, {"p": 100, "q": 1}) == 2
    assert await twin.snapshot(START, {"p": 999, "r": 3}) == 1
    assert await twin.snapshot(START + HOUR, {"p": 110}) == 1
    assert await twin.snapshot(START, {"p": 999, "q": 999}) == 0
    assert await points(twin, START, Resolution.HOURLY) == [(START, 100), (START + HOUR, 110)]


async def test_a_frame_of_more_rows_than_one_transaction_takes(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.stores.snapshots_timescale.WRITE_COUNT_MAX", 3)
    assert await twin.snapshot(START, {f"p-{n}": n for n in range(10)}) == 10
    assert await twin.pool.fetchval("SELECT sum(nav) FROM equity_snapshot") == money(45)
    assert await twin.snapshot(START, {}) == 0


@pytest.mark.parametrize("data", [b"", b"NVM3", b"\0" * 48])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="frame"):
        read_snapshot(data)


# -- intervals --------------------------------------------------------------------------------------------------


async def test_flows_and_factors_are_of_the_interval_since_the_row_before(twin: Twin) -> None:
    await twin.portfolios("p", "q")
    await twin.entry("p", 1, 0, kind="OPEN")
    await twin.entry("p", 2, 100, nav_before=0)
    await twin.entry("p", 3, 50, nav_before=110)
    await twin.entry("p", 4, -7, kind="FEE")
    await twin.entry("p", 5, 44, nav_before=176)
    await twin.entry("p", 6, -20, nav_before=242, kind="WITHDRAWAL")
    await twin.entry("q", 2, 12_345, nav_before=0)
    await twin.snapshot(START, {"p": (0, 1)})
    await twin.snapshot(START + HOUR, {"p": (100, 2)})
    await twin.snapshot(START + 2 * HOUR, {"p": (176, 4)})
    await twin.snapshot(START + 9 * HOUR, {"p": (222, 6)})
    await twin.snapshot(START + 10 * HOUR, {"p": (111, 6)})
    (opened, funded, traded, flowed, fallen) = await twin.intervals("p")
    assert opened == (0, 1)
    assert funded == (100, 1)
    assert traded == (50, pytest.approx(110 / 100 * 176 / 160, rel=1e-15))
    assert flowed == (24, pytest.approx(176 / 176 * 242 / 220 * 222 / 222, rel=1e-15))
    assert fallen == (0, 0.5)


async def test_the_first_interval_begins_at_the_opening(twin: Twin) -> None:
    await twin.portfolios("p")
    await twin.entry("p", 1, 100, nav_before=0)
    await twin.entry("p", 2, 100, nav_before=150, kind="REWARD")
    await twin.snapshot(START, {"p": (500, 2)})
    assert await twin.intervals("p") == [(200, pytest.approx(1.5 * 2, rel=1e-15))]


async def test_a_factor_without_definition_is_null(twin: Twin) -> None:
    await twin.portfolios("p", "q", "r")
    for name, nav_before in (("p", 0), ("q", 0), ("r", 0)):
        await twin.entry(name, 1, 100, nav_before)
    await twin.entry("q", 2, 40, nav_before=-20)
    await twin.snapshot(START, {"p": (-5, 1), "q": (100, 1), "r": (0, 1)})
    await twin.snapshot(START + HOUR, {"p": (10, 1), "q": (20, 2), "r": (0, 1)})
    await twin.snapshot(START + 2 * HOUR, {"p": (20, 1), "q": (30, 2), "r": (3, 1)})
    assert [factor for _, factor in await twin.intervals("p")] == [pytest.approx(-0.05), None, 2]
    assert [factor for _, factor in await twin.intervals("q")] == [1, None, 1.5]
    assert [factor for _, factor in await twin.intervals("r")] == [0, 1, None], "lost all; still nothing; from nothing"


async def test_before_the_first_flow_nothing_is_a_return(twin: Twin) -> None:
    await twin.portfolios("p")
    await twin.entry("p", 1, -5, kind="FEE")
    await twin.entry("p", 2, 100, nav_before=-5)
    await twin.snapshot(START, {"p": (-5, 1)})
    await twin.snapshot(START + HOUR, {"p": (-5, 1)})
    await twin.snapshot(START + 2 * HOUR, {"p": (190, 2)})
    assert await twin.intervals("p") == [(0, 1), (0, 1), (100, 2)]


async def test_flows_that_cancelled_each_other_have_been_all_the_same(twin: Twin) -> None:
    """From a NAV of 0 that was paid out there is no return, unlike from one before the first deposit."""
    await twin.portfolios("p")
    await twin.entry("p", 1, 100, nav_before=0)
    await twin.entry("p", 2, -100, nav_before=100, kind="WITHDRAWAL")
    await twin.snapshot(START, {"p": (0, 2)})
    await twin.snapshot(START + HOUR, {"p": (3, 2)})
    assert await twin.intervals("p") == [(0, 1), (0, None)]


async def test_the_row_before_may_be_long_ago(twin: Twin) -> None:
    await twin.portfolios("p")
    await twin.entry("p", 1, 100, nav_before=0)
    await twin.entry("p", 2, 50, nav_before=180)
    await twin.snapshot(START, {"p": (100, 1)})
    await twin.snapshot(START + 300 * DAY, {"p": (150, 1), "q": 1})
    await twin.snapshot(START + 600 * DAY, {"p": (345, 2)})
    assert await twin.intervals("p") == [(100, 1), (0, 1.5), (50, pytest.approx(180 / 150 * 345 / 230))]
    assert await twin.intervals("q") == [(0, 1)]


@pytest.mark.parametrize("compressed", [False, True])
async def test_a_late_row_splits_the_interval_that_it_falls_into(twin: Twin, compressed: bool) -> None:
    await twin.portfolios("p", "q")
    for name in ("p", "q"):
        await twin.entry(name, 1, 100, nav_before=0)
        await twin.entry(name, 2, 60, nav_before=150)
        await twin.entry(name, 3, -20, nav_before=240, kind="WITHDRAWAL")
    await twin.snapshot(START, {"p": (100, 1), "q": (100, 1)})
    await twin.snapshot(START + 4 * HOUR, {"p": (330, 3), "q": (330, 3)})
    before = await twin.intervals("p")
    if compressed:
        await twin.compress()
    assert await twin.snapshot(START + 2 * HOUR, {"p": (180, 2), "new": 7}) == 2
    after = await twin.intervals("p")
    assert [flows for flows, _ in after] == [100, 60, -20]
    assert sum(flows for flows, _ in after) == sum(flows for flows, _ in before)
    assert math.prod(factor or 0 for _, factor in after) == pytest.approx(before[0][1] * before[1][1], rel=1e-14)
    assert await twin.intervals("q") == before, "what had no late row"
    assert await twin.snapshot(START + 2 * HOUR, {"p": (1, 3)}) == 0
    assert await twin.intervals("p") == after


async def test_a_row_before_all_others_begins_at_the_opening(twin: Twin) -> None:
    await twin.portfolios("p")
    await twin.entry("p", 1, 100, nav_before=0)
    await twin.entry("p", 2, 100, nav_before=200)
    await twin.snapshot(START, {"p": (300, 2)})
    await twin.snapshot(START - DAY, {"p": (160, 1)})
    assert await twin.intervals("p") == [(100, 1.6), (100, pytest.approx(1.25))]


@pytest.mark.parametrize("seed", range(4))
async def test_the_product_of_factors_is_the_curves_index(twin: Twin, seed: int) -> None:
    chosen = random.Random(seed)
    await twin.portfolios("p")
    nav, sequence, flows, measured = 0, 0, [], []
    for hour in range(60):
        for _ in range(chosen.choice((0, 0, 1, 3))):
            sequence += 1
            amount = chosen.randint(1, 10**12) if nav < 10**9 else chosen.randint(-nav // 2, nav)
            flows.append(Flow(0, sequence, amount, nav))
            await twin.entry("p", sequence, amount, nav_before=nav)
            nav += amount
            nav = nav * chosen.randint(900, 1_100) // 1_000
        nav = nav * chosen.randint(990, 1_010) // 1_000
        measured.append(EquityPoint(hour, nav, MarkQuality.LIVE, sequence))
        await twin.snapshot(START + hour * HOUR, {"p": (nav, sequence)})
    indexes = [point.index for point in curve([opening(0), *measured], flows)][1:]
    intervals = await twin.intervals("p")
    product = 1.0
    for index, (_, factor) in zip(indexes, intervals, strict=True):
        assert factor is not None and index is not None
        product *= factor
        assert product == pytest.approx(index, rel=1e-12)
    assert sum(amount for amount, _ in intervals) == sum(flow.amount for flow in flows)


# -- points -----------------------------------------------------------------------------------------------------


async def fill_days(twin: Twin, days: int, hours: Sequence[int] = (0, 9, 23)) -> list[tuple[datetime, int]]:
    """Rows at some hours of each day, but for one day that is missing; returns them."""
    rows = [
        (START + day * DAY + hour * HOUR, 1_000 * day + hour + 1) for day in range(days) if day != 3 for hour in hours
    ]
    for at, nav in rows:
        await twin.snapshot(at, {"p": nav, "other": 5})
    return rows


async def test_hourly_points_are_all_since_the_beginning(twin: Twin) -> None:
    rows = await fill_days(twin, 3)
    assert await points(twin, START, Resolution.HOURLY) == rows
    assert await points(twin, START + DAY + HOUR, Resolution.HOURLY) == rows[4:]
    assert await points(twin, START + 9 * DAY, Resolution.HOURLY) == []


@pytest.mark.parametrize("refreshed_days", [0, 4, 5, 6])
async def test_daily_points_are_the_last_of_each_day_the_running_one_included(twin: Twin, refreshed_days: int) -> None:
    rows = await fill_days(twin, 5)
    if refreshed_days:
        await twin.refresh(START + refreshed_days * DAY)
    lasts = [row for row in rows if row[0].hour == 23]
    assert await points(twin, START, Resolution.DAILY) == lasts
    running = [(START + 5 * DAY + 2 * HOUR, 77), (START + 5 * DAY + 3 * HOUR, 78)]
    for at, nav in running:
        await twin.snapshot(at, {"p": nav})
        assert await points(twin, START, Resolution.DAILY) == [*lasts, (at, nav)]
    # A range that begins within a day has that day's last row.
    assert await points(twin, START + DAY + 12 * HOUR, Resolution.DAILY) == [*lasts[1:], running[-1]]
    assert await points(twin, lasts[1][0] + timedelta(microseconds=1), Resolution.DAILY) == [*lasts[2:], running[-1]]
    assert await points(twin, START, Resolution.DAILY, "nobody") == []


async def test_a_late_row_of_a_compressed_day_is_in_the_daily_points(twin: Twin) -> None:
    await fill_days(twin, 12, hours=(5,))
    await twin.refresh(START + 10 * DAY)
    await twin.compress()
    late = START + DAY + 7 * HOUR
    await twin.snapshot(late, {"p": 4_242})
    await twin.refresh(START + 10 * DAY)
    assert (late, 4_242) in await points(twin, START, Resolution.DAILY)
    assert (late, 4_242) in await points(twin, START, Resolution.HOURLY)
    assert len(await points(twin, START, Resolution.DAILY)) == 11


async def test_days_are_utcs_whatever_the_sessions_zone(twin: Twin) -> None:
    rows = await fill_days(twin, 2)
    for zone in ("Pacific/Auckland", "America/New_York"):
        async with asyncpg.create_pool(twin.url, min_size=1, max_size=1, server_settings={"TimeZone": zone}) as pool:
            found = await SnapshotsReads(lambda pool=pool: pool).points("p", START, Resolution.DAILY)
            assert [to_datetime(point.at_ns) for point in found] == [rows[2][0], rows[5][0]]
            assert [
                row["day"]
                for row in await pool.fetch(
                    "SELECT day FROM equity_snapshot_daily WHERE portfolio_id = 'p' ORDER BY day"
                )
            ] == [START, START + DAY]


# -- days -------------------------------------------------------------------------------------------------------


async def put(twin: Twin, at: datetime, factor: float | None, flows: int = 0, nav: int = 1, name: str = "p") -> None:
    """A row with an interval of one's own."""
    await twin.pool.execute(
        "INSERT INTO equity_snapshot VALUES ($1, $2, $3, 0, 0, 0, $4, $5, $6, $2, 1, 1, $7)",
        name, at, money(nav), money(flows), factor, at.hour % 5, at.hour,
    )  # fmt: skip


async def test_a_day_says_its_last_row_its_flows_and_its_factor(twin: Twin) -> None:
    for hour, factor, flows in ((1, 1.5, 10), (7, 0.5, -3), (22, 1.1, 0)):
        await put(twin, START + hour * HOUR, factor, flows, nav=hour)
    await put(twin, START + DAY, 2)
    expected = (START, START + 22 * HOUR, money(22), 2, 22, money(7), pytest.approx(1.5 * 0.5 * 1.1, rel=1e-15))
    for _ in range(2):
        first, second = await twin.daily("p")
        assert first == expected
        assert second[-1] == 2
        await twin.refresh(START + 2 * DAY)


@pytest.mark.parametrize(
    ("factors", "product"),
    [
        ([1.1, None, 1.2], None),
        ([None, 0], None),
        ([0, None], None),
        ([0, 5.5], 0),
        ([5.5, 0, 0], 0),
        ([-0.5, 3], -1.5),
        ([1e200, 1e200], None),
        ([1e-200, 1e-200], None),
        ([1.0000000000000002], 1.0000000000000002),
    ],
)
async def test_a_days_factor_is_null_where_it_is_undefined(
    twin: Twin, factors: list[float | None], product: float | None
) -> None:
    for hour, factor in enumerate(factors):
        await put(twin, START + hour * HOUR, factor)
    assert [row[-1] for row in await twin.daily("p")] == [product]
    await twin.refresh(START + DAY)
    assert [row[-1] for row in await twin.daily("p")] == [product]


# -- retention --------------------------------------------------------------------------------------------------

KEPT_DAYS = 400


def retention(twin: Twin) -> HistoryRetention:
    return HistoryRetention(twin.pool, KEPT_DAYS, KEPT_DAYS)


async def fill_years(twin: Twin) -> None:
    """A row every 6 hours of 30 days, 500 days ago and now: `START` is now."""
    for begin in (START - 500 * DAY, START - 30 * DAY):
        await twin.pool.execute(
            "INSERT INTO equity_snapshot SELECT name, $1::timestamptz + n * interval '6 hours', 1000 + n, 0, 0, 0, n,"
            " 1 + n * 0.001, 0, $1, 1, 1, n FROM generate_series(0, 119) AS n, unnest($2::text[]) AS name",
            begin,
            ["p", "q"],
        )
        await twin.pool.execute(
            "INSERT INTO price_close SELECT 'A', $1::timestamptz + n * interval '6 hours', 1, $1, 's', ''"
            " FROM generate_series(0, 119) AS n",
            begin,
        )


async def test_what_is_old_is_kept_by_day_for_ever(twin: Twin) -> None:
    await twin.portfolios("p", "q")
    await fill_years(twin)
    daily, curve_points = await twin.daily("p"), await points(twin, START - 600 * DAY, Resolution.DAILY)
    recent = await points(twin, START - 30 * DAY, Resolution.HOURLY)
    assert len(daily) == len(curve_points) == 60
    keeper = retention(twin)
    for now in (START, START + HOUR, START + 3 * DAY):
        await keeper.apply(now)
        kept = await twin.daily("p")
        assert [row[:-1] for row in kept] == [row[:-1] for row in daily]
        assert [row[-1] for row in kept] == pytest.approx([row[-1] for row in daily], rel=1e-14)
        assert await points(twin, START - 600 * DAY, Resolution.DAILY) == curve_points
        assert await points(twin, START - 30 * DAY, Resolution.HOURLY) == recent
        # At most one row a day is left of what is old; a hypertable has none.
        old = await twin.pool.fetchval("SELECT count(*) FROM equity_snapshot WHERE at < $1", START - 450 * DAY)
        assert old == (60 if twin.is_plain else 0)
    closes = await twin.pool.fetchrow("SELECT count(*), min(at) FROM price_close")
    assert tuple(closes) == (120, START - 30 * DAY)


async def test_a_restarted_worker_and_a_late_row_find_what_is_kept(twin: Twin) -> None:
    await twin.portfolios("p", "q")
    await fill_years(twin)
    await retention(twin).apply(START)
    daily = await twin.daily("q")
    await retention(twin).apply(START + DAY)
    assert await twin.daily("q") == daily
    await twin.snapshot(START, {"q": 5})
    await retention(twin).apply(START + 2 * DAY)
    assert (await twin.daily("q"))[:-1] == daily


async def test_what_came_late_to_the_days_before_the_last_run_is_folded_too(twin: Twin) -> None:
    await twin.portfolios("p")
    keeper, day = retention(twin), START - 402 * DAY
    await keeper.apply(START)
    await twin.snapshot(day, {"p": 1})
    await twin.snapshot(day + HOUR, {"p": 2})
    await keeper.apply(START)
    assert await points(twin, day, Resolution.DAILY) == [(day + HOUR, 2)]
    if twin.is_plain:
        assert await points(twin, day, Resolution.HOURLY) == [(day + HOUR, 2)]


async def test_what_a_years_curve_and_its_hours_need_stays(twin: Twin) -> None:
    await twin.portfolios("p")
    await twin.pool.execute(
        "INSERT INTO equity_snapshot SELECT 'p', $1::timestamptz - n * interval '8 hours', n, 0, 0, 0, 0,"
        " 1, 0, $1, 1, 1, 1 FROM generate_series(1, 3 * 420) AS n",
        START,
    )
    begin = START - 366 * DAY
    hourly, daily = await points(twin, begin, Resolution.HOURLY), await points(twin, begin, Resolution.DAILY)
    await HistoryRetention(twin.pool, 367, 367).apply(START)
    assert len(hourly) == 3 * 366
    assert await points(twin, begin, Resolution.HOURLY) == hourly
    assert await points(twin, begin, Resolution.DAILY) == daily


async def test_history_is_as_old_as_the_programs_clock_says(twin: Twin) -> None:
    """A replay of years ago: nothing of it is old, and whole days go into the aggregate."""
    await twin.portfolios("p")
    rows = await fill_days(twin, 4)
    await retention(twin).apply(START + 2 * DAY + 12 * HOUR)
    assert await points(twin, START, Resolution.HOURLY) == rows
    if not twin.is_plain:
        assert (
            await twin.pool.fetchval(
                "SELECT _timescaledb_functions.to_timestamp(_timescaledb_functions.cagg_watermark(mat_hypertable_id))"
                " FROM _timescaledb_catalog.continuous_agg AS made"
                " JOIN _timescaledb_catalog.hypertable ON mat_hypertable_id = hypertable.id"
            )
            == START + 2 * DAY
        )


async def test_retention_of_nothing(twin: Twin) -> None:
    await retention(twin).apply(START)
    assert await twin.pool.fetchval("SELECT count(*) FROM equity_snapshot") == 0


# -- TimescaleDB alone ------------------------------------------------------------------------------------------


@pytest.mark.timescale
async def test_timescaledb_compresses_aggregates_and_shows_the_running_day() -> None:
    if not TIMESCALE_URL:
        pytest.skip(NO_TIMESCALE)
    url = create_database(TIMESCALE_URL)
    try:
        await upgrade(url)
        connection = await asyncpg.connect(url)
        if await connection.fetchval("SELECT current_setting('timescaledb.license')") != "timescale":
            pytest.skip("this server has the Apache edition")
        tables = await connection.fetch(
            "SELECT hypertable_name, attname, segmentby_column_index, orderby_column_index, orderby_asc"
            " FROM timescaledb_information.compression_settings ORDER BY 1, 2"
        )
        assert [tuple(row) for row in tables] == [
            ("equity_snapshot", "at", None, 1, True),
            ("equity_snapshot", "portfolio_id", 1, None, None),
            ("price_close", "at", None, 1, True),
            ("price_close", "symbol", 1, None, None),
        ]
        jobs = await connection.fetch(
            "SELECT hypertable_name, config->>'compress_after', config->>'start_offset', config->>'end_offset'"
            " FROM timescaledb_information.jobs WHERE hypertable_name IS NOT NULL ORDER BY 1"
        )
        assert [tuple(row) for row in jobs] == [
            ("equity_snapshot", "7 days", None, None),
            ("equity_snapshot_daily", None, "366 days", "1 day"),
            ("price_close", "7 days", None, None),
        ]
        materialized_only = "SELECT materialized_only FROM timescaledb_information.continuous_aggregates"
        assert await connection.fetchval(materialized_only) is False
        await connection.close()
    finally:
        drop_database(TIMESCALE_URL, url)
