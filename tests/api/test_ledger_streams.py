"""ledgerEvents: every entry once, in order, from where the client left off, also when Redis says nothing."""

from __future__ import annotations

from typing import Any

from tests.builders import MarkRow
from tests.gateway import Gateway, Stream

QUERY = """subscription($id: String!, $after: String) { ledgerEvents(portfolioId: $id, after: $after) {
    cursor entry { sequence kind amount eventId } } }"""


async def sequences(stream: Stream, count: int) -> list[int]:
    return [(await stream.next())["entry"]["sequence"] for _ in range(count)]


async def test_begins_with_what_is_booked_from_now_on(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await gateway.ledger.deposit(portfolio_id, 1)
    await gateway.redis.point(shard, 1)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id})
        await gateway.watches(1)
        await gateway.listening(shard)
        await gateway.ledger.deposit(portfolio_id, 2, "7.000001")
        await gateway.redis.flush(shard, 1, 1, {portfolio_id: MarkRow(ledger_sequence=2)})
        event = await stream.next(wait_s=1)  # well before the poll
        assert event["entry"] == {
            "sequence": 2,
            "kind": "DEPOSIT",
            "amount": "7.000001",
            "eventId": f"{portfolio_id}-e2",
        }
    await gateway.watches(0)


async def test_poll_finds_what_redis_did_not_tell(gateway: Gateway, portfolio_id: str) -> None:
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id})
        await gateway.watches(1)
        await gateway.ledger.deposit(portfolio_id, 1)
        assert await sequences(stream, 1) == [1]


async def test_resuming_loses_and_doubles_nothing(gateway: Gateway, portfolio_id: str) -> None:
    total = 450  # more than two batches
    for sequence in range(1, total + 1):
        await gateway.ledger.deposit(portfolio_id, sequence)
    seen: list[int] = []
    cursor = None
    first_page: dict[str, Any] = await gateway.ask(
        """query($id: String!) { portfolio(portfolioId: $id) {
            ledger(first: 200) { edges { cursor node { sequence } } } } }""",
        {"id": portfolio_id},
    )
    oldest_shown = first_page["portfolio"]["ledger"]["edges"][-1]
    for take in (1, 7, 150, 41):
        async with gateway.socket() as socket:
            after = oldest_shown["cursor"] if cursor is None else cursor
            stream = await socket.subscribe(QUERY, {"id": portfolio_id, "after": after})
            for _ in range(take):
                event = await stream.next()
                seen.append(event["entry"]["sequence"])
                cursor = event["cursor"]
    begin = oldest_shown["node"]["sequence"] + 1
    assert seen == list(range(begin, total + 1))


async def test_bad_cursor_and_missing_scope(gateway: Gateway, portfolio_id: str) -> None:
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id, "after": "nonsense"})
        assert await stream.code() == "BAD_CURSOR"
    async with gateway.socket(gateway.token("ann", "portfolio:read")) as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id})
        assert await stream.code() == "FORBIDDEN"
