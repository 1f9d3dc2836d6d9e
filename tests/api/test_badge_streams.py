"""badgeEvents: every event once, in order, on any node, also when Redis says nothing. badgeProgress: how far it is."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from engine.badges import Evidence, Predicate, badge_message_encoder, load_rules
from engine.sectors import SectorValue
from engine.stores import redis_keys
from engine.stores.badges_postgres import sync_rules
from resolvers import badges
from tests.builders import MICRO, MarkRow
from tests.gateway import Gateway, Stream, gateway_of

AT = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
EVENTS = """subscription($id: String!, $after: String) { badgeEvents(portfolioId: $id, after: $after) {
    kind cursor eventId at portfolioId badge { badgeId name rarity version }
    evidence { predicate figure threshold eventId ledgerSequence sectors { sector value weight }
        prices { symbol price } } } }"""
PROGRESS = """subscription($id: String!) { badgeProgress(portfolioId: $id, maxRateHz: 20) {
    kind portfolioId conflated badges { badge { badgeId } figure threshold awardedAt active } } }"""


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def rules(gateway: Gateway) -> None:
    async with gateway.ledger.pool.acquire() as connection:
        await sync_rules(connection, load_rules())


def evidence(**changes: Any) -> Evidence:
    known: dict[str, Any] = {"figure": "1", "threshold": "1", "predicate": Predicate.FILLS, "event_id": "e1"}
    return Evidence(**{**known, **changes})


async def write_event(
    gateway: Gateway, portfolio_id: str, sequence: int, kind: str = "UNLOCKED", badge: str = "first_fill", **of: Any
) -> None:
    proof = badge_message_encoder.encode(evidence(**of)).decode()
    await gateway.ledger.pool.execute(
        "INSERT INTO badge_event VALUES ($1, $2, $3, $4, $5, 1, $6, $7)",
        portfolio_id,
        sequence,
        f"{badge}:1#{portfolio_id}#{sequence}",
        kind,
        badge,
        AT,
        proof,
    )


async def award(gateway: Gateway, portfolio_id: str, badge: str = "first_fill", active: bool = True) -> None:
    proof = badge_message_encoder.encode(evidence()).decode()
    await gateway.ledger.pool.execute(
        "INSERT INTO badge_award VALUES ($1, $2, 1, $3, $4, $5)", portfolio_id, badge, AT, active, proof
    )


async def tell(gateway: Gateway, *portfolio_ids: str) -> None:
    await gateway.redis.redis.spublish(redis_keys.BADGES_CHANNEL, msgspec.msgpack.encode(list(portfolio_ids)))


async def sequences(stream: Stream, count: int) -> list[int]:
    return [int((await stream.next())["eventId"].rpartition("#")[2]) for _ in range(count)]


async def test_an_event_comes_at_once_with_its_evidence(gateway: Gateway, portfolio_id: str) -> None:
    await write_event(gateway, portfolio_id, 1)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(EVENTS, {"id": portfolio_id})
        await gateway.watches(1)
        await asyncio.sleep(0.2)  # the channel is subscribed to
        await write_event(
            gateway,
            portfolio_id,
            2,
            badge="diversified",
            figure="5",
            threshold="5",
            predicate=Predicate.SECTORS,
            ledger_sequence=17,
            prices={"AAPL": "120.5", "XYZ": None},
        )
        await tell(gateway, "somebody-else", portfolio_id)
        event = await stream.next(wait_s=1)  # well before the poll
        assert event["kind"] == "UNLOCKED"
        assert event["badge"] == {
            "badgeId": "diversified",
            "name": "Diversified",
            "rarity": "UNCOMMON",
            "version": 1,
        }
        assert event["evidence"]["ledgerSequence"] == 17
        assert event["evidence"]["prices"] == [
            {"symbol": "AAPL", "price": "120.5"},
            {"symbol": "XYZ", "price": None},
        ]
    await gateway.watches(0)
    async with asyncio.timeout(5):
        while redis_keys.BADGES_CHANNEL in gateway.application.feed._subscribed:
            await asyncio.sleep(0.01)


async def test_poll_finds_what_redis_did_not_tell(
    gateway: Gateway, portfolio_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(badges, "BADGE_POLL_INTERVAL_S", 1)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(EVENTS, {"id": portfolio_id})
        await gateway.watches(1)
        await asyncio.sleep(0.2)
        await write_event(gateway, portfolio_id, 1)
        assert await sequences(stream, 1) == [1]


async def test_resuming_on_another_node_loses_and_doubles_nothing(gateway: Gateway, portfolio_id: str) -> None:
    total = 230  # more than a batch
    for sequence in range(1, total + 1):
        await write_event(gateway, portfolio_id, sequence)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(EVENTS, {"id": portfolio_id})
        await gateway.watches(1)
        await asyncio.sleep(0.2)
        await write_event(gateway, portfolio_id, total + 1)
        await tell(gateway, portfolio_id)
        assert await sequences(stream, 1) == [total + 1]
    seen: list[int] = []
    cursor = None
    async with gateway_of(gateway.settings) as other:
        for node, take in ((gateway, 1), (other, 7), (gateway, 205), (other, 17)):
            async with node.socket() as socket:
                # A cursor of 0 is before the first; clients get it from the first event of another portfolio alone.
                after = "YmFkZ2VzOjA" if cursor is None else cursor
                stream = await socket.subscribe(EVENTS, {"id": portfolio_id, "after": after})
                for _ in range(take):
                    event = await stream.next()
                    seen.append(int(event["eventId"].rpartition("#")[2]))
                    cursor = event["cursor"]
    assert seen == list(range(1, 231))


async def test_whose_badges_and_which_cursor(gateway: Gateway, portfolio_id: str) -> None:
    async with gateway.socket() as socket:
        stream = await socket.subscribe(EVENTS, {"id": portfolio_id, "after": "bGVkZ2VyOjE"})
        assert await stream.code() == "BAD_CURSOR"
    async with gateway.socket(gateway.token("bob")) as socket:
        assert await (await socket.subscribe(EVENTS, {"id": portfolio_id})).code() == "NOT_FOUND"
        assert await (await socket.subscribe(PROGRESS, {"id": portfolio_id})).code() == "NOT_FOUND"


async def test_progress_follows_the_ledger_prices_and_awards(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    pool = gateway.ledger.pool
    await pool.execute("UPDATE portfolio SET fills = 41, ledger_sequence = 2 WHERE id = $1", portfolio_id)
    await gateway.redis.point(shard, 1)
    await gateway.redis.sectors(
        shard, portfolio_id, {name: SectorValue(MICRO, MICRO) for name in ("Energy", "Materials", "UNCLASSIFIED")}
    )
    first = MarkRow(ledger_sequence=2, nav=900_000 * MICRO)
    await gateway.redis.marks(shard, 1, {portfolio_id: first})
    async with gateway.socket() as socket:
        stream = await socket.subscribe(PROGRESS, {"id": portfolio_id})
        update = await stream.next()
        assert update["kind"] == "SNAPSHOT"
        figures = {one["badge"]["badgeId"]: one["figure"] for one in update["badges"]}
        assert figures["centurion"] == "41"
        assert figures["diversified"] == "2"
        assert figures["whale"] == "900000"
        assert not any(one["active"] for one in update["badges"])
        await gateway.listening(shard)
        # A fill: what is counted is read again.
        await pool.execute("UPDATE portfolio SET fills = 42, ledger_sequence = 3 WHERE id = $1", portfolio_id)
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: first.at(2, ledger_sequence=3)})
        update = await stream.next()
        assert {one["badge"]["badgeId"]: one["figure"] for one in update["badges"]}["centurion"] == "42"
        # An award, without any mark.
        await award(gateway, portfolio_id)
        await tell(gateway, portfolio_id)
        update = await stream.next(wait_s=1)
        assert {one["badge"]["badgeId"] for one in update["badges"] if one["active"]} == {"first_fill"}
    await gateway.watches(0)
