"""State streams over a real socket: snapshot, edges, conflation, heartbeat, gaps, resets, quotes and positions."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from engine.messages import Quote
from engine.stores.hot_state_reads import HotState
from resolvers.position_streams import SETTLE_INTERVAL_S
from tests.builders import MICRO, MarkRow, frame, held
from tests.gateway import Gateway, Stream

NAV = "subscription($id: String!, $rate: Float) { navUpdates(portfolioId: $id, maxRateHz: $rate) { %s } }"
NAV_FIELDS = "kind nav epoch sequence conflated"
FAST_HZ = 20


async def begin(gateway: Gateway, shard: int, portfolio_id: str, **fields: int) -> MarkRow:
    row = MarkRow(**fields)
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: row})
    return row


def nav_query(fields: str = NAV_FIELDS) -> str:
    return NAV % fields


async def test_snapshot_then_updates(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id, nav=5 * MICRO)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query(), {"id": portfolio_id, "rate": FAST_HZ})
        assert await stream.next() == {"kind": "SNAPSHOT", "nav": "5", "epoch": 1, "sequence": 1, "conflated": 1}
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, nav=6 * MICRO)})
        assert await stream.next() == {"kind": "UPDATE", "nav": "6", "epoch": 1, "sequence": 2, "conflated": 1}
    await gateway.watches(0)


async def test_nav_updates_say_what_the_nav_is_made_of(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await begin(gateway, shard, portfolio_id, nav=10 * MICRO, cash=3 * MICRO, receivables=-2 * MICRO)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query("nav cash receivables positionsValue"), {"id": portfolio_id})
        assert await stream.next() == {"nav": "10", "cash": "3", "receivables": "-2", "positionsValue": "9"}


async def test_quotes_say_their_condition_s_quality(gateway: Gateway) -> None:
    now_ns = time.time_ns()
    halted, delayed = (Quote(name, "5", now_ns - 10**12, "SIM", 1, name) for name in ("HALTED", "DELAYED"))
    await gateway.redis.quotes([halted, delayed])
    query = "subscription($symbols: [String!]!) { quotes(symbols: $symbols) { quotes { symbol quality } } }"
    async with gateway.socket() as socket:
        stream = await socket.subscribe(query, {"symbols": ["DELAYED", "HALTED"]})
        shown = (await stream.next())["quotes"]
    assert shown == [{"symbol": name, "quality": name} for name in ("DELAYED", "HALTED")]


async def test_pnl_updates(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await begin(gateway, shard, portfolio_id)
    query = """subscription($id: String!) { pnlUpdates(portfolioId: $id) {
        kind portfolioId unrealizedPnl realizedPnl fees dayPnl dayPnlRatio dayCutAt quality } }"""
    async with gateway.socket() as socket:
        stream = await socket.subscribe(query, {"id": portfolio_id})
        assert await stream.next() == {
            "kind": "SNAPSHOT",
            "portfolioId": portfolio_id,
            "unrealizedPnl": "250",
            "realizedPnl": "75",
            "fees": "3",
            "dayPnl": "120",
            "dayPnlRatio": "0.012",
            "dayCutAt": "2026-11-22T00:00:00Z",
            "quality": "LIVE",
        }


async def test_a_portfolio_without_a_mark_waits_for_its_first(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query(), {"id": portfolio_id, "rate": FAST_HZ})
        await gateway.watches(1)
        # Longer than the heartbeat: a stream that has nothing to show sends none.
        assert await stream.silent(1.3)
        await gateway.redis.point(shard, 1)
        await gateway.redis.flush(shard, 1, 1, {portfolio_id: MarkRow(nav=3 * MICRO)})
        update = await stream.next()
        assert (update["kind"], update["nav"]) == ("SNAPSHOT", "3")


async def test_changes_within_the_interval_are_conflated_and_the_last_is_sent(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query(), {"id": portfolio_id, "rate": 2})
        await stream.next()
        await asyncio.sleep(0.6)
        begun = time.monotonic()
        for sequence in range(2, 12):
            await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row.at(sequence, nav=sequence * MICRO)})
        leading = await stream.next()
        leading_s = time.monotonic() - begun
        trailing = await stream.next()
        trailing_s = time.monotonic() - begun
    assert leading_s < 0.3  # at once after silence
    assert 0.4 < trailing_s < 1.2  # when the interval is over
    assert (trailing["nav"], trailing["sequence"]) == ("11", 11)
    assert leading["conflated"] + trailing["conflated"] == 10


async def test_nothing_selected_changed_is_no_message(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query("kind conflated cash"), {"id": portfolio_id, "rate": FAST_HZ})
        await stream.next()
        for sequence in (2, 3):
            await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row.at(sequence, nav=sequence)})
        assert await stream.silent(0.4)
        await gateway.redis.flush(shard, 1, 4, {portfolio_id: row.at(4, cash=7 * MICRO)})
        assert await stream.next() == {"kind": "UPDATE", "cash": "7", "conflated": 3}


async def test_selections_in_fragments_and_under_aliases_count(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    query = nav_query("kind ...Rest") + " fragment Rest on NavUpdate { ... on NavUpdate { worth: nav } }"
    async with gateway.socket() as socket:
        stream = await socket.subscribe(query, {"id": portfolio_id, "rate": FAST_HZ})
        await stream.next()
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, nav=9 * MICRO)})
        assert await stream.next() == {"kind": "UPDATE", "worth": "9"}


async def test_silence_ends_in_a_heartbeat(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await begin(gateway, shard, portfolio_id, nav=5 * MICRO)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query(), {"id": portfolio_id})
        await stream.next()
        begun = time.monotonic()
        beat = await stream.next()
        assert 0.7 < time.monotonic() - begun < 2
        assert beat == {"kind": "HEARTBEAT", "nav": "5", "epoch": 1, "sequence": 1, "conflated": 0}


async def test_a_lost_frame_is_read_again(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query(), {"id": portfolio_id, "rate": FAST_HZ})
        await stream.next()
        await gateway.listening(shard)
        await gateway.redis.publish(shard, frame(shard, 1, 1))
        # Flush 2 is written but its frame is lost; an empty heartbeat tells of it.
        await gateway.redis.marks(shard, 1, {portfolio_id: row.at(2, nav=8 * MICRO)})
        await gateway.redis.publish(shard, frame(shard, 1, 3))
        update = await stream.next()
        assert (update["kind"], update["nav"], update["sequence"]) == ("UPDATE", "8", 2)


async def test_no_heartbeat_vouches_for_a_value_whose_successor_was_lost(
    gateway: Gateway, shard: int, portfolio_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel speaks, but what was lost on it can not be read for a while."""
    row = await begin(gateway, shard, portfolio_id, nav=5 * MICRO)
    hot_state = gateway.application.services.hot_state
    read, away = hot_state.read, False

    async def sometimes(*arguments: Any, **named: Any) -> HotState:
        if away:
            raise TimeoutError
        return await read(*arguments, **named)

    monkeypatch.setattr(hot_state, "read", sometimes)
    compiled = [None, gateway.application.gateway.deliveries.compile_projection]  # one of each way
    monkeypatch.setattr(
        gateway.application.gateway.deliveries,
        "compile_projection",
        lambda info: None if (compile_it := compiled.pop(0)) is None else compile_it(info),
    )
    async with gateway.socket() as socket:
        variables = {"id": portfolio_id, "rate": FAST_HZ}
        streams = [await socket.subscribe(nav_query("kind nav"), variables) for _ in range(2)]
        for stream in streams:
            assert await stream.next() == {"kind": "SNAPSHOT", "nav": "5"}
        await gateway.listening(shard)
        await gateway.redis.publish(shard, frame(shard, 1, 1))
        away = True
        await gateway.redis.marks(shard, 1, {portfolio_id: row.at(2, nav=8 * MICRO)})
        await gateway.redis.publish(shard, frame(shard, 1, 3))
        assert await streams[0].silent(1.5) and await streams[1].silent(0.1)
        away = False
        for stream in streams:
            assert await stream.next() == {"kind": "UPDATE", "nav": "8"}
            assert await stream.next() == {"kind": "HEARTBEAT", "nav": "8"}


async def test_new_owner_resets_and_the_old_ones_frames_are_dropped(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    row = await begin(gateway, shard, portfolio_id, nav=5 * MICRO)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query("kind nav epoch"), {"id": portfolio_id, "rate": FAST_HZ})
        await stream.next()
        await gateway.redis.publish(shard, frame(shard, 1, 1))
        await gateway.redis.marks(shard, 2, {portfolio_id: row})
        await gateway.redis.point(shard, 2)
        await gateway.redis.publish(shard, frame(shard, 2, 1, {portfolio_id: row}))
        # The value is the same: a reset is sent whatever it is.
        assert await stream.next() == {"kind": "RESET", "nav": "5", "epoch": 2}
        await gateway.redis.publish(shard, frame(shard, 1, 99, {portfolio_id: row.at(99, nav=1)}))
        await gateway.redis.flush(shard, 2, 2, {portfolio_id: row.at(2, nav=6 * MICRO)})
        assert await stream.next() == {"kind": "UPDATE", "nav": "6", "epoch": 2}


async def test_reset_is_sent_when_only_a_frame_without_our_row_tells_of_it(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query("kind epoch"), {"id": portfolio_id, "rate": FAST_HZ})
        await stream.next()
        await gateway.redis.publish(shard, frame(shard, 1, 1))
        await gateway.redis.marks(shard, 5, {portfolio_id: row})
        await gateway.redis.point(shard, 5)
        await gateway.redis.publish(shard, frame(shard, 5, 2))
        assert await stream.next() == {"kind": "RESET", "epoch": 5}


@pytest.mark.parametrize("junk", [b"", b"junk", b"NVM1", frame(0, 1, 9)[:30]])
async def test_junk_on_the_channel_is_dropped(gateway: Gateway, shard: int, portfolio_id: str, junk: bytes) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query(), {"id": portfolio_id, "rate": FAST_HZ})
        await stream.next()
        await gateway.redis.publish(shard, junk)
        cut_short = frame(shard, 1, 2, {portfolio_id: row.at(2)})[:-1]
        await gateway.redis.publish(shard, cut_short)
        await gateway.redis.flush(shard, 1, 3, {portfolio_id: row.at(3, nav=1 * MICRO)})
        assert (await stream.next())["nav"] == "1"


async def test_many_streams_of_one_portfolio_are_independent(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as first, gateway.socket() as second:
        variables = {"id": portfolio_id, "rate": FAST_HZ}
        streams = [await socket.subscribe(nav_query(), variables) for socket in (first, first, second)]
        for stream in streams:
            assert (await stream.next())["kind"] == "SNAPSHOT"
        await streams[0].stop()
        await gateway.watches(2)
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, nav=2 * MICRO)})
        for stream in streams[1:]:
            assert (await stream.next())["nav"] == "2"
    await gateway.watches(0)


QUOTES = """subscription($symbols: [String!]!, $rate: Float) { quotes(symbols: $symbols, maxRateHz: $rate) {
    kind conflated quotes { symbol price source quality asOf } } }"""


async def quotes_of(stream: Stream) -> tuple[str, dict[str, str], int]:
    update = await stream.next()
    return update["kind"], {quote["symbol"]: quote["price"] for quote in update["quotes"]}, update["conflated"]


async def test_quotes_snapshot_update_gap_and_new_publisher(gateway: Gateway, shard: int) -> None:
    now_ns = time.time_ns()
    known, other, unknown = f"K{shard}", f"O{shard}", f"U{shard}"

    def quote(symbol: str, price: str, after_ns: int = 0) -> Quote:
        return Quote(symbol, price, now_ns + after_ns, "SIM", 1)

    await gateway.redis.quotes([quote(known, "1"), quote(other, "2")])
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUOTES, {"symbols": [known, other, unknown], "rate": FAST_HZ})
        assert await quotes_of(stream) == ("SNAPSHOT", {known: "1", other: "2"}, 2)
        await gateway.redis.quote("feed-a", 1, [quote(known, "1.5", 1), quote("ELSE", "9")])
        assert await quotes_of(stream) == ("UPDATE", {known: "1.5"}, 1)
        # Frame 2 is lost; frame 3 does not concern us but shows the gap.
        await gateway.redis.quotes([quote(unknown, "3", 2)])
        await gateway.redis.quote("feed-a", 3, [])
        assert await quotes_of(stream) == ("UPDATE", {unknown: "3"}, 1)
        await gateway.redis.quotes([quote(other, "4", 3)])
        await gateway.redis.quote("feed-b", 1, [])
        assert await quotes_of(stream) == ("UPDATE", {other: "4"}, 1)
        assert await quotes_of(stream) == ("HEARTBEAT", {}, 0)


async def test_quotes_of_symbols_nobody_quoted_begin_empty(gateway: Gateway, shard: int) -> None:
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUOTES, {"symbols": [f"NONE{shard}"]})
        assert await quotes_of(stream) == ("SNAPSHOT", {}, 0)


@pytest.mark.parametrize(
    ("symbols", "code"),
    [([], "TOO_MANY_SYMBOLS"), ([f"S{n}" for n in range(201)], "TOO_MANY_SYMBOLS"), (["a b"], "BAD_IDENTIFIER")],
)
async def test_bad_symbols_are_refused(gateway: Gateway, symbols: list[str], code: str) -> None:
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUOTES, {"symbols": symbols})
        assert await stream.code() == code


POSITIONS = """subscription($id: String!) { positionUpdates(portfolioId: $id, maxRateHz: 20) {
    kind closedSymbols positions { asset { symbol sector } quantity price marketValue quality } } }"""


async def positions_of(stream: Stream) -> tuple[str, dict[str, tuple[str, str | None]], list[str]]:
    update = await stream.next()
    rows = {row["asset"]["symbol"]: (row["quantity"], row["price"]) for row in update["positions"]}
    return update["kind"], rows, update["closedSymbols"]


async def test_position_updates_are_those_that_changed(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    now_ns = time.time_ns()
    one, two, new = f"A{shard}", f"B{shard}", f"C{shard}"
    row = await begin(gateway, shard, portfolio_id)
    await gateway.redis.positions(shard, portfolio_id, {one: held("1", 10), two: held("2", 20)})
    await gateway.redis.quotes([Quote(one, "10", now_ns, "SIM", 1)])
    async with gateway.socket() as socket:
        stream = await socket.subscribe(POSITIONS, {"id": portfolio_id})
        assert await positions_of(stream) == ("SNAPSHOT", {one: ("1", "10"), two: ("2", None)}, [])
        await gateway.redis.quote("feed", 1, [Quote(two, "11", now_ns + 1, "SIM", 2)])
        assert await positions_of(stream) == ("UPDATE", {two: ("2", "11")}, [])
        # A fill: one closes, another opens, and its quotes are followed from then on.
        await gateway.redis.positions(shard, portfolio_id, {two: held("2", 20), new: held("-3", -30)})
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, ledger_sequence=2)})
        assert await positions_of(stream) == ("UPDATE", {new: ("-3", None)}, [one])
        await gateway.redis.quote("feed", 2, [Quote(new, "12", now_ns + 2, "SIM", 3)])
        assert await positions_of(stream) == ("UPDATE", {new: ("-3", "12")}, [])
        # A mark alone changes no position.
        await gateway.redis.flush(shard, 1, 3, {portfolio_id: row.at(3, ledger_sequence=2)})
        assert (await positions_of(stream))[0] == "HEARTBEAT"
        await gateway.redis.marks(shard, 2, {portfolio_id: row})
        await gateway.redis.point(shard, 2)
        await gateway.redis.publish(shard, frame(shard, 2, 1, {portfolio_id: row}))
        kind, rows, closed = await positions_of(stream)
        assert (kind, set(rows), closed) == ("RESET", {two, new}, [])
    await gateway.watches(0)


async def test_positions_take_quotes_in_their_order_of_publication(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    now_ns, symbol = time.time_ns(), f"D{shard}"
    row = await begin(gateway, shard, portfolio_id)
    await gateway.redis.positions(shard, portfolio_id, {symbol: held("1", 10)})
    await gateway.redis.quotes([Quote(symbol, "10", now_ns, "FAST", 1)])
    async with gateway.socket() as socket:
        stream = await socket.subscribe(POSITIONS, {"id": portfolio_id})
        assert (await positions_of(stream))[1] == {symbol: ("1", "10")}
        await asyncio.sleep(SETTLE_INTERVAL_S + 0.3)  # from here on nothing is read until the next fill
        # Another source's clock is behind.
        await gateway.redis.quote("feed", 1, [Quote(symbol, "11", now_ns - 10**9, "SLOW", 1)])
        assert (await positions_of(stream))[1] == {symbol: ("1", "11")}
        # A quote that waits while a fill is read is older than what the read finds.
        await gateway.redis.positions(shard, portfolio_id, {symbol: held("2", 20)})
        await gateway.redis.quote("feed", 2, [Quote(symbol, "12", now_ns + 1, "FAST", 2)])
        await gateway.redis.quotes([Quote(symbol, "13", now_ns - 10**9, "SLOW", 2)])
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, ledger_sequence=2)})
        rows: dict[str, tuple[str, str | None]] = {}
        while rows.get(symbol) != ("2", "13"):
            rows = (await positions_of(stream))[1]


async def test_positions_written_a_moment_after_their_mark_are_shown(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    row = await begin(gateway, shard, portfolio_id)
    await gateway.redis.positions(shard, portfolio_id, {"AAPL": held("1", 10)})
    async with gateway.socket() as socket:
        stream = await socket.subscribe(POSITIONS, {"id": portfolio_id})
        await stream.next()
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, ledger_sequence=2)})
        await asyncio.sleep(0.1)
        await gateway.redis.positions(shard, portfolio_id, {"AAPL": held("7", 70)})
        kind, rows, _ = await positions_of(stream)
        assert (kind, rows["AAPL"][0]) == ("UPDATE", "7")


@pytest.mark.parametrize("rate", [0, -1, 20.5, 1e300])
async def test_bad_rates_are_refused(gateway: Gateway, portfolio_id: str, rate: float) -> None:
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query(), {"id": portfolio_id, "rate": rate})
        assert await stream.code() == "BAD_RATE"


RARE = """subscription($id: String!, $rate: Float) {
    positionUpdates(portfolioId: $id, maxRateHz: $rate) { kind } }"""


@pytest.mark.parametrize("rate", [5e-324, 1e-307, 1e-9])
async def test_a_rate_without_a_finite_interval_disturbs_nobody(
    gateway: Gateway, shard: int, portfolio_id: str, rate: float
) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(nav_query(), {"id": portfolio_id, "rate": FAST_HZ})
        rare = [await socket.subscribe(query, {"id": portfolio_id, "rate": rate}) for query in (nav_query(), RARE)]
        for one in (stream, *rare):
            assert (await one.next())["kind"] == "SNAPSHOT"
        for sequence in range(2, 5):
            await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row.at(sequence, nav=sequence * MICRO)})
            assert (await stream.next(wait_s=1))["nav"] == str(sequence)
        # What changed is theirs when their interval is over, and no heartbeat says meanwhile that nothing has.
        assert await rare[0].silent(1.3)
