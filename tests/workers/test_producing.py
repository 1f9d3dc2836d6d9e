from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest

from engine.corporate_actions import CorporateAction, DividendAction, SplitAction, decode_action, encode_action
from engine.messages import PortfolioEvent, decode_event, encode_event
from engine.runtime.settings import Settings
from tests.topics import read_topic
from workers.feeds.simulated import START_PRICES
from workers.producing import action_key, announce_actions, event_key, produce_actions, produce_events
from workers.traders import demo_portfolio_id, portfolio_events_for_demo

AT = datetime(2026, 11, 22, 10, tzinfo=UTC)
PRICES_AT_START = {symbol: Decimal(text) for symbol, text in START_PRICES.items()}
SPLIT = SplitAction(action_id="split:AAPL:2020-08-31", symbol="AAPL", ratio="4", effective_at=AT)
DIVIDENDS = [
    DividendAction(
        action_id=f"dividend:S{number}:2020-08-31",
        symbol=f"S{number}",
        amount="0.82",
        ex_date=date(2020, 8, 31),
        pay_date=date(2020, 9, 14),
    )
    for number in range(40)
]


def demo(count: int = 20) -> list[PortfolioEvent]:
    return list(portfolio_events_for_demo(PRICES_AT_START, count, 7, AT))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b'{"portfolio_id":"p-1","type":"fill","x":[1]}', b"p-1"),
        ('{"portfolio_id":"é"}'.encode(), "é".encode()),
        (b'{"portfolio_id":5}', None),
        (b'{"portfolio_id":""}', None),
        (b"{}", None),
        (b"[]", None),
        (b"nonsense", None),
        (b"", None),
        (b'{"portfolio_id":"\xff"}', None),
        (b'{"portfolio_id":"\\ud800"}', None),
        (b'{"a":' * 5_000, None),
    ],
)
def test_the_key_is_the_portfolio_id_where_one_can_be_read(value: bytes, key: bytes | None) -> None:
    assert event_key(value) == key


async def test_events_are_acknowledged_in_order_with_their_keys(kafka_bootstrap: str, topic: str) -> None:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic=topic)
    events, told = demo(count=30), []
    assert await produce_events(settings, events, told.append) == len(events)
    assert told == list(range(1, len(events) + 1))
    records = await read_topic(kafka_bootstrap, topic, len(events))
    read = defaultdict(list)
    partitions = defaultdict(set)
    for record in records:
        event = decode_event(record.value)
        assert record.key == event.portfolio_id.encode()
        read[event.portfolio_id].append(event)
        partitions[event.portfolio_id].add(record.partition)
    assert all(len(where) == 1 for where in partitions.values())
    assert [event for index in range(30) for event in read[demo_portfolio_id(index)]] == events


async def test_lines_that_are_no_events_are_sent_as_they_are(kafka_bootstrap: str, topic: str) -> None:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic=topic)
    line = encode_event(demo(count=1)[0])
    lines = [line + b"\n", b"\n", b"nonsense\r\n", b'{"type":"fill"}', b"", b"   "]
    assert await produce_events(settings, lines) == 3
    records = await read_topic(kafka_bootstrap, topic, 3)
    assert {(record.key, record.value) for record in records} == {
        (b"demo-0001", line),
        (None, b"nonsense"),
        (None, b'{"type":"fill"}'),
    }


async def test_a_line_too_long_for_kafka_is_not_acknowledged_and_stops_nothing(
    kafka_bootstrap: str, topic: str
) -> None:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic=topic)
    assert await produce_events(settings, [b"a", b"b" * 2_000_000, b"c"]) == 2


async def test_producing_more_than_fits_in_flight_is_quick(kafka_bootstrap: str, topic: str) -> None:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic=topic)
    started_s = time.monotonic()
    assert await produce_events(settings, (b'{"portfolio_id":"p-%d"}' % n for n in range(10_000))) == 10_000
    assert time.monotonic() - started_s < 15


# --- corporate actions


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (encode_action(SPLIT), b"AAPL"),
        (encode_action(DIVIDENDS[3]), b"S3"),
        (b'{"symbol":7}', None),
        (b'{"symbol":""}', None),
        (b"nonsense", None),
        (b'{"symbol":"\\ud800"}', None),
    ],
)
def test_a_corporate_action_s_key_is_its_symbol(value: bytes, key: bytes | None) -> None:
    assert action_key(value) == key


async def test_actions_are_acknowledged_under_their_symbols_on_a_topic_of_their_own(
    kafka_bootstrap: str, topic: str
) -> None:
    settings = Settings(kafka_bootstrap=kafka_bootstrap, topic="not-this-one", actions_topic=topic)
    sent: list[CorporateAction] = [SPLIT, *DIVIDENDS]
    lines = [encode_action(SPLIT) + b"\n", b"  ", b"nonsense"]
    assert await produce_actions(settings, sent) == 41
    assert await produce_actions(settings, lines) == 2
    records = await read_topic(kafka_bootstrap, topic, 43)
    found = [(record.key, record.value) for record in records]
    assert found.count((b"AAPL", encode_action(SPLIT))) == 2, "the same again, for the evaluators to tell"
    assert (None, b"nonsense") in found
    assert sorted(decode_action(value).action_id for key, value in found if key) == sorted(
        [action.action_id for action in sent] + [SPLIT.action_id]
    )


async def test_an_announcement_outlives_an_absent_kafka_and_ends_with_the_program(
    kafka_bootstrap: str, topic: str
) -> None:
    stop, asked = asyncio.Event(), 0
    away = Settings(kafka_bootstrap="127.0.0.1:1", actions_topic=topic)

    def actions() -> Iterable[CorporateAction]:
        nonlocal asked
        asked += 1
        return DIVIDENDS

    announcing = asyncio.create_task(announce_actions(away, actions, stop))
    async with asyncio.timeout(20):
        while asked < 2:
            await asyncio.sleep(0.05)
        stop.set()
        assert await announcing == 0
    here = Settings(kafka_bootstrap=kafka_bootstrap, actions_topic=topic)
    assert await announce_actions(here, actions, asyncio.Event()) == len(DIVIDENDS)
    values = {record.value for record in await read_topic(kafka_bootstrap, topic, len(DIVIDENDS))}
    assert {json.loads(value)["action_id"] for value in values} == {action.action_id for action in DIVIDENDS}
