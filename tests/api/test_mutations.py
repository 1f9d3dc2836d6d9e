"""Mutations against a real broker: what is produced, what is refused before, and by whom it may be asked."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition

from engine.messages import CashEvent, FillEvent, OpenEvent, PortfolioEvent, ReversalEvent, decode_event
from resolvers import mutations
from tests.gateway import WAIT_S, Gateway, gateway_of, make_settings
from tests.scripted_ledger import ScriptedLedger

OPEN = """mutation($in: OpenPortfolioInput!) { openPortfolio(input: $in) {
    eventId portfolioId acceptedAt partition offset } }"""
FILL = "mutation($in: RecordFillInput!) { recordFill(input: $in) { eventId portfolioId partition offset } }"
CASH = "mutation($in: RecordCashMovementInput!) { recordCashMovement(input: $in) { eventId partition offset } }"

REVERSE = "mutation($in: RecordReversalInput!) { recordReversal(input: $in) { eventId portfolioId partition offset } }"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def writing(valkey_url: str, database: str, kafka_bootstrap: str) -> AsyncIterator[Gateway]:
    topic = f"test-{uuid.uuid4().hex}"
    settings = make_settings(
        valkey_url, database, kafka_bootstrap=kafka_bootstrap, topic=topic, acknowledge_timeout_s=5
    )
    async with gateway_of(settings) as gateway:
        async with asyncio.timeout(WAIT_S * 2):
            while not gateway.application.services.events.started:
                await asyncio.sleep(0.02)
        yield gateway


async def produced(gateway: Gateway, receipt: dict[str, Any]) -> tuple[bytes, PortfolioEvent]:
    """The key and the event that stand where the receipt says."""
    settings = gateway.settings
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka_bootstrap, enable_auto_commit=False)
    await consumer.start()
    try:
        place = TopicPartition(settings.topic, receipt["partition"])
        consumer.assign([place])
        consumer.seek(place, int(receipt["offset"]))
        record = await asyncio.wait_for(consumer.getone(), WAIT_S)
        return record.key, decode_event(record.value)
    finally:
        await consumer.stop()


async def booked(gateway: Gateway, owner: str = "ann") -> str:
    name = f"p-{uuid.uuid4().hex[:8]}"
    await gateway.ledger.portfolio(name, owner, 1)
    return name


async def test_open_portfolio(writing: Gateway) -> None:
    receipt = (await writing.ask(OPEN, {"in": {"name": "Growth", "baseCurrency": "EUR"}}))["openPortfolio"]
    key, event = await produced(writing, receipt)
    assert isinstance(event, OpenEvent)
    assert key == event.portfolio_id.encode() == receipt["portfolioId"].encode()
    assert (event.owner, event.name, event.base_currency) == ("ann", "Growth", "EUR")
    assert event.event_id == receipt["eventId"]
    assert abs((datetime.now(UTC) - event.opened_at).total_seconds()) < 60


async def test_record_fill_keeps_every_digit(writing: Gateway) -> None:
    name = await booked(writing)
    given = {
        "portfolioId": name,
        "symbol": "BTC-USD",
        "side": "SELL",
        "quantity": "0.123456789012",
        "price": "98765.4321",
        "fee": "1.000001",
        "executedAt": "2026-11-22T11:15:30.123456+01:00",
        "orderId": "o-9",
        "venue": "SIM",
        "eventId": "my-own-key",
    }
    for _ in range(2):  # a retry is produced again: the ledger tells the copies apart
        receipt = (await writing.ask(FILL, {"in": given}))["recordFill"]
        key, event = await produced(writing, receipt)
    assert isinstance(event, FillEvent)
    assert (key, event.event_id, event.side) == (name.encode(), f"{name}/my-own-key", "SELL")
    assert receipt["eventId"] == f"{name}/my-own-key"
    assert (event.quantity, event.price, event.fee) == ("0.123456789012", "98765.4321", "1.000001")
    assert (event.currency, event.order_id, event.venue) == ("USD", "o-9", "SIM")
    assert event.executed_at == datetime(2026, 11, 22, 10, 15, 30, 123456, tzinfo=UTC)


async def test_record_cash_movement(writing: Gateway) -> None:
    name = await booked(writing)
    given = {"portfolioId": name, "kind": "WITHDRAWAL", "amount": "10.50", "reference": "rent"}
    receipt = (await writing.ask(CASH, {"in": given}))["recordCashMovement"]
    _, event = await produced(writing, receipt)
    assert isinstance(event, CashEvent)
    assert (event.kind, event.amount, event.currency, event.reference) == ("WITHDRAWAL", "10.5", "USD", "rent")


async def test_events_of_a_portfolio_share_a_partition(writing: Gateway) -> None:
    name = await booked(writing)
    given = {"portfolioId": name, "kind": "DEPOSIT", "amount": "1"}
    receipts = [(await writing.ask(CASH, {"in": given}))["recordCashMovement"] for _ in range(5)]
    assert len({receipt["partition"] for receipt in receipts}) == 1
    assert len({receipt["eventId"] for receipt in receipts}) == 5


FILL_INPUT = {"symbol": "AAPL", "side": "BUY", "quantity": "1", "price": "1"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"quantity": "0"}, "NOT_POSITIVE"),
        ({"quantity": "-1"}, "NOT_POSITIVE"),
        ({"price": "0.0000000000001"}, "TOO_PRECISE"),
        ({"price": "1e15"}, "TOO_LARGE"),
        ({"fee": "-1"}, "NEGATIVE_FEE"),
        ({"fee": "0.0000001"}, "TOO_PRECISE"),
        ({"symbol": "A B"}, "BAD_IDENTIFIER"),
        ({"symbol": ""}, "BAD_IDENTIFIER"),
        ({"currency": "EUR"}, "BAD_CURRENCY"),
        ({"currency": "XXX"}, "BAD_CURRENCY"),
        ({"eventId": "a b"}, "BAD_IDENTIFIER"),
        ({"eventId": ""}, "BAD_IDENTIFIER"),
        ({"eventId": "a/b"}, "BAD_IDENTIFIER"),
        ({"eventId": "x" * 64}, "BAD_IDENTIFIER"),
        ({"venue": "x" * 201}, "BAD_TEXT"),
        ({"executedAt": "1969-12-31T00:00:00Z"}, "BAD_INSTANT"),
        ({"quantity": 1}, "GRAPHQL_VALIDATION_FAILED"),
        ({"quantity": "NaN"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"quantity": "1e999999999"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"quantity": "1_000"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"executedAt": "2026-01-01T00:00:00"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"executedAt": "yesterday"}, "GRAPHQL_VALIDATION_FAILED"),
    ],
)
async def test_bad_fills_are_refused_before_they_are_sent(writing: Gateway, changes: dict[str, Any], code: str) -> None:
    name = await booked(writing)
    assert await writing.codes(FILL, {"in": {"portfolioId": name, **FILL_INPUT, **changes}}) == [code]


async def test_who_may_write(writing: Gateway) -> None:
    name = await booked(writing, "ann")
    variables = {"in": {"portfolioId": name, **FILL_INPUT}}
    for token, codes in (
        (writing.token("ann", "portfolio:read ledger:read"), ["FORBIDDEN"]),
        (writing.token("root", "admin"), ["FORBIDDEN"]),
        (writing.token("bob", "ledger:write"), ["NOT_FOUND"]),
    ):
        assert await writing.codes(FILL, variables, token) == codes
    await writing.ask(FILL, variables, writing.token("root", "admin ledger:write"))
    await writing.ask(FILL, variables, writing.token("ann", "ledger:write"))


async def test_opening_for_others_and_taken_ids(writing: Gateway) -> None:
    name = await booked(writing, "ann")
    assert await writing.codes(OPEN, {"in": {"name": "x", "portfolioId": name}}) == ["ALREADY_EXISTS"]
    assert await writing.codes(OPEN, {"in": {"name": "x", "owner": "bob"}}) == ["FORBIDDEN"]
    assert await writing.codes(OPEN, {"in": {"name": " "}}) == ["BAD_TEXT"]
    assert await writing.codes(OPEN, {"in": {"name": "x", "portfolioId": "a b"}}) == ["BAD_IDENTIFIER"]
    admin = writing.token("root", "admin ledger:write")
    receipt = (await writing.ask(OPEN, {"in": {"name": "x", "owner": "bob"}}, admin))["openPortfolio"]
    _, event = await produced(writing, receipt)
    assert isinstance(event, OpenEvent) and event.owner == "bob"


async def test_a_portfolio_opened_a_moment_ago_is_waited_for(writing: Gateway) -> None:
    opened = (await writing.ask(OPEN, {"in": {"name": "New"}}))["openPortfolio"]["portfolioId"]
    asking = asyncio.create_task(writing.ask(FILL, {"in": {"portfolioId": opened, **FILL_INPUT}}))
    await asyncio.sleep(0.3)
    assert not asking.done()
    await writing.ledger.portfolio(opened, "ann", 1)
    receipt = (await asking)["recordFill"]
    assert receipt["portfolioId"] == opened


async def test_a_taken_id_does_not_become_ones_own_by_opening_it(writing: Gateway) -> None:
    name = await booked(writing, "bob")
    # With an event id of one's own the opening is let through, and the evaluator refuses it; nothing is gained.
    await writing.ask(OPEN, {"in": {"name": "x", "portfolioId": name, "eventId": f"e-{name}"}})
    assert await writing.codes(FILL, {"in": {"portfolioId": name, **FILL_INPUT}}) == ["NOT_FOUND"]


# -- day cuts and reversals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("day_cut", [None, "16:30 Europe/London", "close:XNYS"])
async def test_a_portfolio_is_opened_with_its_day_cut(writing: Gateway, day_cut: str | None) -> None:
    given = {"name": "x"} if day_cut is None else {"name": "x", "dayCut": day_cut}
    receipt = (await writing.ask(OPEN, {"in": given}))["openPortfolio"]
    _, event = await produced(writing, receipt)
    assert isinstance(event, OpenEvent)
    assert event.day_cut == (day_cut or "00:00 UTC")


@pytest.mark.parametrize(
    "day_cut", ["", "24:00 UTC", "9:30 UTC", "00:00 Mars/Olympus", "close:NOPE", "close:", "0" * 99]
)
async def test_a_day_cut_that_there_is_not_is_refused(writing: Gateway, day_cut: str) -> None:
    assert await writing.codes(OPEN, {"in": {"name": "x", "dayCut": day_cut}}) == ["BAD_DAY_CUT"]


async def scripted(gateway: Gateway, owner: str = "ann") -> ScriptedLedger:
    """A portfolio with a deposit (entry 2), a fill (3) that is reversed (4), and a split (5)."""
    script = ScriptedLedger(await booked(gateway, owner))
    script.cash("DEPOSIT", "10")
    script.fill("R", "BUY", "1", "2")
    script.reverse(script.fill("R", "BUY", "1", "2"))
    script.wait()
    script.split("R", Fraction(2))
    await script.write(gateway.ledger.pool)
    return script


async def test_record_reversal(writing: Gateway) -> None:
    script = await scripted(writing)
    for entry in script.entries[1:3]:
        given = {"portfolioId": script.portfolio_id, "reverses": entry.event_id, "reference": "typo", "eventId": "r"}
        receipt = (await writing.ask(REVERSE, {"in": given}))["recordReversal"]
        key, event = await produced(writing, receipt)
        assert isinstance(event, ReversalEvent)
        assert (event.reverses, event.reference, key) == (entry.event_id, "typo", script.portfolio_id.encode())
        assert event.event_id == receipt["eventId"] == f"{script.portfolio_id}/r"
        assert abs((datetime.now(UTC) - event.effective_at).total_seconds()) < 60


async def test_what_can_not_be_reversed_is_refused(writing: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutations, "BOOKING_WAIT_S", 0.2)
    script, bobs = await scripted(writing), await scripted(writing, "bob")
    opened, deposit, _, wrong, reversal, split = script.entries
    for reverses, code in (
        (opened.event_id, "NOT_REVERSIBLE"),
        (wrong.event_id, "ALREADY_REVERSED"),
        (reversal.event_id, "NOT_REVERSIBLE"),
        (split.event_id, "BAD_IDENTIFIER"),  # no client's event has such an id
        ("never-booked", "UNKNOWN_EVENT"),
        (bobs.entries[1].event_id, "UNKNOWN_EVENT"),
        ("a b", "BAD_IDENTIFIER"),
        ("a\0", "BAD_IDENTIFIER"),
        ("", "BAD_IDENTIFIER"),
    ):
        assert await writing.codes(REVERSE, {"in": {"portfolioId": script.portfolio_id, "reverses": reverses}}) == [
            code
        ]
    given = {"portfolioId": script.portfolio_id, "reverses": deposit.event_id}
    assert await writing.codes(REVERSE, {"in": {**given, "reference": "x" * 201}}) == ["BAD_TEXT"]
    assert await writing.codes(REVERSE, {"in": given}, writing.token("bob")) == ["NOT_FOUND"]
    assert await writing.codes(REVERSE, {"in": given}, writing.token("ann", "ledger:read")) == ["FORBIDDEN"]


async def test_a_reversal_is_retried_under_its_id(writing: Gateway) -> None:
    script = ScriptedLedger(await booked(writing))
    deposit = script.cash("DEPOSIT", "10")
    reversal = script.reverse(deposit)
    assert reversal is not None
    script.entries[-1] = msgspec.structs.replace(reversal, event_id=f"{script.portfolio_id}/again")
    await script.write(writing.ledger.pool)
    given = {"portfolioId": script.portfolio_id, "reverses": deposit.event_id}
    receipt = (await writing.ask(REVERSE, {"in": {**given, "eventId": "again"}}))["recordReversal"]
    assert receipt["eventId"] == f"{script.portfolio_id}/again"
    assert await writing.codes(REVERSE, {"in": {**given, "eventId": "other"}}) == ["ALREADY_REVERSED"]


async def test_an_event_that_is_about_to_be_booked_is_waited_for(writing: Gateway) -> None:
    script = ScriptedLedger(await booked(writing))
    deposit = script.cash("DEPOSIT", "10")
    given = {"portfolioId": script.portfolio_id, "reverses": deposit.event_id}
    asking = asyncio.create_task(writing.ask(REVERSE, {"in": given}))
    await asyncio.sleep(0.3)
    assert not asking.done()
    await script.write(writing.ledger.pool)
    assert (await asking)["recordReversal"]["portfolioId"] == script.portfolio_id


async def test_ready_when_all_answer(writing: Gateway) -> None:
    await booked(writing)
    await writing.ledger.leases(60)
    async with writing.client() as client:
        ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


async def test_the_same_event_id_in_two_portfolios_is_two_events(writing: Gateway) -> None:
    anns, bobs = await booked(writing, "ann"), await booked(writing, "bob")
    ids = []
    for name, token in ((anns, writing.token("ann")), (bobs, writing.token("bob"))):
        given = {"portfolioId": name, "kind": "DEPOSIT", "amount": "1", "eventId": "order-1"}
        receipt = (await writing.ask(CASH, {"in": given}, token))["recordCashMovement"]
        _, event = await produced(writing, receipt)
        assert event.event_id == receipt["eventId"]
        ids.append(event.event_id)
    assert ids == [f"{anns}/order-1", f"{bobs}/order-1"]


async def test_no_portfolio_reaches_into_the_event_ids_of_another(writing: Gateway) -> None:
    # "a/b" + "c" and "a" + "b/c" would be one id.
    await writing.ledger.portfolio("a", "ann", 1)
    await writing.ledger.portfolio("a/b", "bob", 1)
    given = {"kind": "DEPOSIT", "amount": "1"}
    bobs = {"in": {**given, "portfolioId": "a/b", "eventId": "c"}}
    assert (await writing.ask(CASH, bobs, writing.token("bob")))["recordCashMovement"]["eventId"] == "a/b/c"
    anns = {"in": {**given, "portfolioId": "a", "eventId": "b/c"}}
    assert await writing.codes(CASH, anns) == ["BAD_IDENTIFIER"]


async def test_an_event_id_that_does_not_fit_says_how_long_it_is(writing: Gateway) -> None:
    name = await booked(writing)
    given = {"portfolioId": name, **FILL_INPUT, "eventId": "x" * (63 - len(name))}
    await writing.ask(FILL, {"in": given})
    answer = (await writing.post(FILL, {"in": {**given, "eventId": given["eventId"] + "x"}})).json()
    assert answer["errors"][0]["extensions"]["code"] == "BAD_IDENTIFIER"
    assert "has 65 characters, 64 are allowed" in answer["errors"][0]["message"]


async def test_an_opening_is_retried_under_the_id_of_its_portfolio(writing: Gateway) -> None:
    name = f"p-{uuid.uuid4().hex[:8]}"
    given = {"name": "x", "portfolioId": name, "eventId": "open"}
    for _ in range(2):
        receipt = (await writing.ask(OPEN, {"in": given}))["openPortfolio"]
        assert (receipt["portfolioId"], receipt["eventId"]) == (name, f"{name}/open")
    assert await writing.codes(OPEN, {"in": {"name": "x", "eventId": "open"}}) == ["BAD_IDENTIFIER"]


async def test_unavailable_without_a_broker(gateway: Gateway) -> None:
    assert await gateway.codes(OPEN, {"in": {"name": "x"}}) == ["UNAVAILABLE"]
