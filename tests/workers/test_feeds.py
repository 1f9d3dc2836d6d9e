from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from websockets.asyncio.server import ServerConnection, serve

from engine.instants import to_ns
from engine.quotes import QuoteFilter, RawQuote, Verdict
from engine.runtime.clock import MarketClock, MarketClockPlan, WallClock
from workers.feeds import Feed
from workers.feeds.coinbase import CoinbaseFeed, parse_frame
from workers.feeds.select import make_feed
from workers.feeds.websocket import MESSAGE_BYTES_MAX, NotAQuote, WebSocketFeed, parse_instant, parse_message

MARKET = Path(__file__).parents[3] / "shared" / "market"
COINBASE_LOG = MARKET / "coinbase_ws_2021-04-17.log.gz"

Handler = Callable[[ServerConnection], Awaitable[None]]


def recorded(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"no recorded market data at {path}")
    return path


def problems(feed: str, problem: str) -> float:
    return REGISTRY.get_sample_value("navstream_feed_problems_total", {"feed": feed, "problem": problem}) or 0.0


async def take(feed: Feed, count: int) -> list[RawQuote]:
    """The first `count` quotes of the feed."""
    taken: list[RawQuote] = []
    async with asyncio.timeout(20), aclosing(feed.batches()) as batches:
        async for batch in batches:
            taken += batch
            if len(taken) >= count:
                break
    return taken


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    async with serve(handler, "127.0.0.1", 0, max_size=None) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


# --- the WebSocket feed


def message(**fields: object) -> str:
    return json.dumps({"symbol": "AAPL", "price": "189.23", "ts_event": "2026-11-22T10:15:30Z", "sequence": 1} | fields)


def test_a_message_holds_one_quote_or_an_array() -> None:
    expected = RawQuote("AAPL", "189.23", to_ns(datetime(2026, 11, 22, 10, 15, 30, tzinfo=UTC)), "ws", 1)
    assert parse_message(message()) == [expected]
    assert parse_message(f"[{message()}, {message()}]") == [expected, expected]
    assert parse_message("[]") == []


def test_a_message_may_say_a_condition() -> None:
    said = [parse_message(message(condition=condition))[0].condition for condition in (None, "", "DELAYED", "HALTED")]
    assert said == ["", "", "DELAYED", "HALTED"]


def test_a_halted_message_needs_no_price() -> None:
    (quote,) = parse_message(message(condition="HALTED", price=None))
    assert (quote.price, quote.condition) == ("", "HALTED")
    assert parse_message(message(condition="HALTED", price="5"))[0].price == "5"


def test_a_number_s_digits_stay_exact_and_a_float_s_noise_is_trimmed() -> None:
    before = problems("ws", "price_trimmed")
    prices = ["0.1", "189.23000000000002", "123456789012345", "1e2", "7"]
    texts = [message().replace('"189.23"', price) for price in prices]
    assert [parse_message(text)[0].price for text in texts] == [
        "0.1",
        "189.230000000000",
        "123456789012345",
        "1E+2",
        "7",
    ]
    assert problems("ws", "price_trimmed") == before + 1


@pytest.mark.parametrize(
    "price", ["NaN", "Infinity", "-Infinity", "-5", "0", "1e400", "1e-400", '"NaN"', '"1,5"', '""']
)
def test_a_price_that_is_none_reaches_the_filter_as_malformed(price: str) -> None:
    (quote,) = parse_message(message().replace('"189.23"', price))
    assert QuoteFilter({}, 10, 0).judge(quote, time.time_ns())[0] is Verdict.MALFORMED


def test_instants_in_every_unit_are_understood() -> None:
    expected = 1_795_342_530_000_000_000
    for value in (expected, expected // 10**3, expected // 10**6, expected // 10**9, "2026-11-22T11:15:30+01:00"):
        assert parse_instant(value) == expected
    assert parse_instant(Decimal("1795342530.25")) == expected + 250_000_000


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not_json"),
        ("{", "not_json"),
        ("[" * 100_000, "not_json"),
        ("1" * 5_000, "not_json"),
        ('{"price":1e99999999999999999999}', "not_json"),
        ("5", "not_an_object"),
        ("null", "not_an_object"),
        ("{}", "bad_field"),
        (message(symbol=5), "bad_field"),
        (message(source=[]), "bad_field"),
        (message(price=None), "bad_price"),
        (message(price=True), "bad_price"),
        (message(price={"a": 1}), "bad_price"),
        (message(sequence="7"), "bad_sequence"),
        (message(sequence=1.5), "bad_sequence"),
        (message(sequence=True), "bad_sequence"),
        (message(ts_event=None), "bad_instant"),
        (message(condition="halted"), "bad_condition"),
        (message(condition="LIVE"), "bad_condition"),
        (message(condition=True), "bad_condition"),
        (message(condition=["HALTED"]), "bad_condition"),
        (message(condition=0), "bad_condition"),
        (message(condition="DELAYED", price=None), "bad_price"),
        (message(ts_event="yesterday"), "bad_instant"),
        (message(ts_event="2026-11-22T10:15:30"), "bad_instant"),
    ],
)
def test_what_is_no_quote_has_a_named_problem(text: str, problem: str) -> None:
    with pytest.raises(NotAQuote, match=problem):
        parse_message(text)


def test_an_array_keeps_its_readable_quotes() -> None:
    before = problems("ws", "bad_price")
    text = f"[{message(sequence=1)}, {message(price=None)}, {message(price=float('nan'))}, {message(sequence=2)}]"
    assert [quote.price for quote in parse_message(text)] == ["189.23", "NaN", "189.23"]
    assert problems("ws", "bad_price") == before + 1


async def test_a_server_that_hangs_up_and_talks_nonsense_does_not_stop_the_feed() -> None:
    sessions = 0

    async def handler(connection: ServerConnection) -> None:
        nonlocal sessions
        sessions += 1
        first = sessions * 10
        if sessions == 1:
            await connection.send(message(sequence=first))
            connection.transport.abort()
        elif sessions == 2:
            await connection.send(b"\x00\x01")
            await connection.send("nonsense")
            await connection.send(message(sequence=first, price="1" + "0" * 11))
            await connection.send(" " * (MESSAGE_BYTES_MAX + 1))
            await connection.wait_closed()
        elif sessions == 3:
            await connection.close(1011)
        else:
            await connection.send(message(sequence=first))
            await connection.wait_closed()

    counted = {problem: problems("ws", problem) for problem in ("binary", "not_json", "disconnected")}
    async with serving(handler) as url:
        quotes = await take(make_feed(f"ws:{url}", WallClock()), 3)
    assert [quote.sequence for quote in quotes] == [10, 20, 40]
    assert sessions == 4
    assert {p: problems("ws", p) - was for p, was in counted.items()} == {
        "binary": 1,
        "not_json": 1,
        "disconnected": 3,
    }


async def test_a_feed_waits_for_a_server_that_is_not_there_yet() -> None:
    async def handler(connection: ServerConnection) -> None:
        await connection.send(message())
        await connection.wait_closed()

    async with serving(handler) as url:
        port = int(url.rpartition(":")[2])
    waiting = asyncio.create_task(take(WebSocketFeed(url), 1))
    await asyncio.sleep(0.3)
    async with serve(handler, "127.0.0.1", port):
        assert len(await waiting) == 1


async def test_a_server_that_always_hangs_up_is_not_hammered() -> None:
    sessions = 0

    async def handler(connection: ServerConnection) -> None:
        nonlocal sessions
        sessions += 1

    async with serving(handler) as url:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await take(WebSocketFeed(url), 1)
    assert 2 <= sessions <= 6


# --- Coinbase


def recorded_frames() -> list[str]:
    with gzip.open(recorded(COINBASE_LOG), "rt") as file:
        return [line.split(": ", 1)[1].strip() for line in file if line[0].isdigit()]


async def test_the_recorded_tickers_arrive_through_a_server_as_quotes() -> None:
    frames = recorded_frames()
    tickers = [json.loads(frame) for frame in frames if '"type":"ticker"' in frame]
    subscribed: list[str] = []

    async def handler(connection: ServerConnection) -> None:
        for _ in range(2):
            request = json.loads(await connection.recv())
            assert (request["type"], request["channels"]) == ("subscribe", ["ticker"])
            subscribed.extend(request["product_ids"])
        for frame in frames:
            if '"type":"snapshot"' not in frame:
                await connection.send(frame)
        await connection.wait_closed()

    async with serving(handler) as url:
        quotes = await take(CoinbaseFeed(url, ["BAND-GBP", "SKL-GBP"]), len(tickers))
    assert subscribed == ["BAND-GBP", "SKL-GBP"]
    assert len(quotes) == 107
    assert [(q.symbol, q.price, q.sequence) for q in quotes] == [
        (t["product_id"], t["price"], t["sequence"]) for t in tickers
    ]
    at = datetime(2021, 4, 17, 16, 43, 30, 244_075, tzinfo=UTC)
    assert quotes[0] == RawQuote("BAND-GBP", "14.7775", to_ns(at), "coinbase", 333_938_798)


def test_the_recorded_tickers_pass_the_filter_once() -> None:
    quotes = [quote for frame in recorded_frames() for quote in parse_frame(frame)]
    quote_filter, now_ns = QuoteFilter({}, 100, 0), to_ns(datetime(2021, 4, 18, tzinfo=UTC))
    first = Counter(quote_filter.judge(quote, now_ns)[0] for quote in quotes)
    again = Counter(quote_filter.judge(quote, now_ns)[0] for quote in quotes)
    assert first[Verdict.ACCEPTED] > 100 and set(first) <= {
        Verdict.ACCEPTED,
        Verdict.OUT_OF_ORDER,
        Verdict.DUPLICATE,
    }
    assert Verdict.ACCEPTED not in again


@pytest.mark.parametrize("frame", ["[]", '{"type":"error","message":"no"}', '{"type":"ticker"}', "{"])
def test_a_bad_coinbase_frame_is_a_problem(frame: str) -> None:
    with pytest.raises(NotAQuote):
        parse_frame(frame)


# --- choosing

A_MARKET_CLOCK = MarketClock(MarketClockPlan(0, 1_000, [18_565]))


def write_bars(directory: Path) -> Path:
    path = directory / "bars.csv"
    path.write_text("date,symbol,open,high,low,close\n2020-10-30,A,10,12,9,11\n")
    return path


def test_each_specification_makes_its_feed(tmp_path: Path) -> None:
    path = write_bars(tmp_path)
    specs = {
        "simulated": "simulated",
        "simulated:50": "simulated",
        f"replay:{path}@3": "replay",
        "ws:wss://host/path": "ws",
        "ws://host:1/path": "ws",
        "coinbase": "coinbase",
        "coinbase:ws://127.0.0.1:1": "coinbase",
    }
    assert {spec: make_feed(spec, A_MARKET_CLOCK).name for spec in specs} == specs


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "nonsense",
        "simulated:fast",
        "simulated:0",
        "simulated:99999",
        "simulated:-1",
        "replay:",
        "replay:absent.csv",
        "ws:",
        "ws:http://host",
        "coinbase:host",
        "wss://",
    ],
)
def test_a_bad_specification_is_a_clear_error(spec: str) -> None:
    with pytest.raises(ValueError, match=r".{20}"):
        make_feed(spec, A_MARKET_CLOCK)


def test_a_replay_without_a_market_clock_is_refused(tmp_path: Path) -> None:
    path = write_bars(tmp_path)
    with pytest.raises(ValueError, match="wall time"):
        make_feed(f"replay:{path}", WallClock())
