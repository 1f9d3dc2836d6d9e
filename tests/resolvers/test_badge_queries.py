"""portfolio.badges: every badge there is, how far the portfolio is with it, and what it was awarded for."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest_asyncio

from engine.badges import load_rules
from engine.marks import MarkQuality
from engine.sectors import SectorValue
from engine.stores.badges_postgres import sync_rules
from tests.api.test_badge_streams import AT, award
from tests.builders import MICRO, MarkRow
from tests.gateway import Gateway

QUERY = """query($id: String!) { portfolio(portfolioId: $id) { badges {
    badge { badgeId name description rarity version } predicate figure threshold awardedAt active
    evidence { predicate figure threshold eventId sectors { sector } prices { symbol } nav symbol } } } }"""


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def rules(gateway: Gateway) -> None:
    async with gateway.ledger.pool.acquire() as connection:
        await sync_rules(connection, load_rules())


async def badges_of(gateway: Gateway, portfolio_id: str) -> dict[str, Any]:
    data = await gateway.ask(QUERY, {"id": portfolio_id})
    return {one["badge"]["badgeId"]: one for one in data["portfolio"]["badges"]}


async def test_every_badge_is_there_with_its_progress(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    pool = gateway.ledger.pool
    await pool.execute("UPDATE portfolio SET fills = 7, streak = 3 WHERE id = $1", portfolio_id)
    await pool.execute("INSERT INTO asset VALUES ('AAPL', 'Apple', 'EQUITY', 'Information Technology', '')")
    opened_at = await pool.fetchval("SELECT now()") - timedelta(days=12, hours=1)
    await pool.execute(
        "INSERT INTO position VALUES ($1, 'AAPL', $2, 100, 0, 0, $4, 1, $3)",
        portfolio_id,
        Decimal(1),
        opened_at,
        opened_at - timedelta(days=100),
    )
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: MarkRow(nav=123 * MICRO)})
    # Four sectors above 5 %, one at exactly 5 % and one below.
    values = {"A": 40, "B": 30, "C": 14, "D": 10, "E": 5, "F": 1}
    await gateway.redis.sectors(
        shard, portfolio_id, {name: SectorValue(value * MICRO, value * MICRO) for name, value in values.items()}
    )
    await award(gateway, portfolio_id)
    await award(gateway, portfolio_id, "diversified", active=False)
    badges = await badges_of(gateway, portfolio_id)
    assert len(badges) == len({rule.badge_id for rule in load_rules()})
    assert {name: one["figure"] for name, one in badges.items()} == {
        "first_fill": "7",
        "centurion": "7",
        "market_maker": "7",
        "diversified": "4",
        "hot_streak": "3",
        "diamond_hands": "12",
        "whale": "123",
        "all_weather": None,
        "untouchable": None,
    }
    assert badges["diversified"]["threshold"] == "5"
    first = badges["first_fill"]
    assert (first["active"], first["awardedAt"]) == (True, AT.isoformat().replace("+00:00", "Z"))
    assert first["evidence"] == {
        "predicate": "FILLS",
        "figure": "1",
        "threshold": "1",
        "eventId": "e1",
        "sectors": [],
        "prices": [],
        "nav": None,
        "symbol": None,
    }
    assert not badges["diversified"]["active"] and badges["diversified"]["awardedAt"]
    assert badges["centurion"]["awardedAt"] is None and badges["centurion"]["evidence"] is None


async def test_what_is_not_known_is_null(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: MarkRow(quality=MarkQuality.MISSING)})
    badges = await badges_of(gateway, portfolio_id)
    assert badges["whale"]["figure"] is None
    assert badges["diamond_hands"]["figure"] is None
    assert badges["centurion"]["figure"] == "0"


async def test_before_the_first_mark_and_of_others(gateway: Gateway, portfolio_id: str) -> None:
    assert await gateway.codes(QUERY, {"id": portfolio_id}) == ["NOT_READY"]
    assert await gateway.codes(QUERY, {"id": portfolio_id}, gateway.token("bob")) == ["NOT_FOUND"]
    as_of = QUERY.replace("portfolioId: $id", 'portfolioId: $id, asOf: "2026-02-01T00:00:00Z"')
    assert await gateway.codes(as_of, {"id": portfolio_id}) == ["AS_OF_UNSUPPORTED"]
