"""Recorded prices: what was last quoted at any past instant, on both kinds of tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from engine.instants import to_ns
from engine.messages import Quote
from engine.stores.price_closes import LOOK_BACK, PriceCloses
from tests.history_twins import Twin, twin

__all__ = ["twin"]

START = datetime(2024, 3, 4, tzinfo=UTC)
HOUR, DAY, MICROSECOND = timedelta(hours=1), timedelta(days=1), timedelta(microseconds=1)


def closes(twin: Twin) -> PriceCloses:
    return PriceCloses(lambda: twin.pool)


def quote(symbol: str, price: str, at: datetime) -> Quote:
    return Quote(symbol, price, to_ns(at), "feed")


async def test_a_quote_comes_back_as_it_was_but_for_its_number(twin: Twin) -> None:
    stored = closes(twin)
    ns = to_ns(START) - 1_234_567_890_999
    halted = Quote("BRK.B", "123456789012.000000000001", ns, "a feed", 17, "HALTED")
    delayed = Quote("X", "0.5", to_ns(START), "", None, "DELAYED")
    assert await stored.write(START, [halted, delayed]) == 2
    assert await stored.closes_at(["BRK.B", "X"], START) == {
        "BRK.B": Quote("BRK.B", "123456789012.000000000001", ns // 1_000 * 1_000, "a feed", None, "HALTED"),
        "X": delayed,
    }
    row = await twin.pool.fetchrow("SELECT at, price FROM price_close WHERE symbol = 'BRK.B'")
    assert tuple(row) == (START, Decimal(halted.price))


async def test_the_row_before_an_instant_counts(twin: Twin) -> None:
    stored = closes(twin)
    for hour in range(4):
        at = START + hour * HOUR
        await stored.write(at, [quote("A", str(hour + 1), at), quote("B", str(hour + 51), at)])
    for compressed in (False, True):
        if compressed:
            await twin.compress()
        for at, price in (
            (START, "1"),
            (START + HOUR - MICROSECOND, "1"),
            (START + HOUR, "2"),
            (START + 9 * HOUR, "4"),
        ):
            assert (await stored.closes_at(["A"], at))["A"].price == price
        assert await stored.closes_at(["A", "B"], START - MICROSECOND) == {}
        found = await stored.closes_at(["B", "nobody", "A", "B"], START + 2 * HOUR)
        assert {symbol: one.price for symbol, one in found.items()} == {"A": "3", "B": "53"}
        assert await stored.closes_at([], START) == {}


async def test_what_is_longer_ago_than_usual_is_found_too(twin: Twin) -> None:
    stored = closes(twin)
    await stored.write(START, [quote("OLD", "1", START), quote("BOTH", "2", START)])
    await stored.write(START + 300 * DAY, [quote("BOTH", "3", START + 300 * DAY)])
    for at in (START + LOOK_BACK, START + LOOK_BACK - MICROSECOND, START + 299 * DAY):
        found = await stored.closes_at(["OLD", "BOTH"], at)
        assert (found["OLD"].price, found["BOTH"].price) == ("1", "2")
    found = await stored.closes_at(["OLD", "BOTH", "NEVER"], START + 300 * DAY)
    assert {symbol: one.price for symbol, one in found.items()} == {"OLD": "1", "BOTH": "3"}


async def test_the_first_row_of_an_instant_stays(twin: Twin) -> None:
    stored = closes(twin)
    assert await stored.write(START, [quote("A", "1", START)]) == 1
    assert await stored.write(START, [quote("A", "2", START), quote("B", "3", START)]) == 1
    assert await stored.write(START, []) == 0
    found = await stored.closes_at(["A", "B"], START)
    assert {symbol: one.price for symbol, one in found.items()} == {"A": "1", "B": "3"}


async def test_a_late_row_of_a_compressed_chunk_is_found(twin: Twin) -> None:
    stored = closes(twin)
    for day in range(3):
        await stored.write(START + day * DAY, [quote("A", str(day + 1), START + day * DAY)])
    await twin.compress()
    late = START + DAY + HOUR
    assert await stored.write(late, [quote("A", "77", late)]) == 1
    assert await stored.write(START + DAY, [quote("A", "88", late)]) == 0
    assert [(await stored.closes_at(["A"], at))["A"].price for at in (START + DAY, late, START + 2 * DAY)] == [
        "2",
        "77",
        "3",
    ]
