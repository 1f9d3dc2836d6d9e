"""Queries against real servers: figures, pages, cursors, and who may see what."""

from __future__ import annotations

import base64
import gc
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import FunctionType
from typing import Any

import pytest
from msgspec.structs import replace as replace_struct

from engine.assets import Asset, AssetClass
from engine.instants import to_ns
from engine.marks import MarkQuality
from engine.messages import Quote
from engine.runtime.clock import WallClock
from engine.sectors import SectorValue
from engine.stores.hot_state_reads import HotState, HotStateReads
from resolvers.loaders import HotLoader
from tests.builders import MICRO, MarkRow, held
from tests.gateway import Gateway

VALUATION = """query($id: String!) { portfolio(portfolioId: $id) { valuation {
    nav cash receivables positionsValue unrealizedPnl realizedPnl realizedPnlNet fees income flows
    dayPnl dayPnlRatio dayCutAt quality asOf
    epoch sequence ledgerSequence } } }"""


async def mark(gateway: Gateway, shard: int, portfolio_id: str, row: MarkRow | None = None, epoch: int = 3) -> None:
    await gateway.redis.point(shard, epoch)
    await gateway.redis.marks(shard, epoch, {portfolio_id: row or MarkRow()})


async def test_valuation_shows_the_mark_exactly(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = MarkRow(
        nav=10_297_000_001,
        cash=-5,
        receivables=2,
        income=-3,
        flows=10_000 * MICRO,
        sequence=7,
        ledger_sequence=4,
        quality=MarkQuality.STALE,
    )
    await mark(gateway, shard, portfolio_id, row)
    data = await gateway.ask(VALUATION, {"id": portfolio_id})
    assert data["portfolio"]["valuation"] == {
        "nav": "10297.000001",
        "cash": "-0.000005",
        "receivables": "0.000002",
        "positionsValue": "10297.000004",
        "unrealizedPnl": "250",
        "realizedPnl": "75",
        "realizedPnlNet": "72",
        "fees": "3",
        "income": "-0.000003",
        "flows": "10000",
        "dayPnl": "120",
        "dayPnlRatio": "0.012",
        "dayCutAt": "2026-11-22T00:00:00Z",
        "quality": "STALE",
        "asOf": "2026-11-22T10:20:00.123456Z",
        "epoch": 3,
        "sequence": 7,
        "ledgerSequence": 4,
    }


async def test_unknown_ratio_is_null(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id, MarkRow(day_pnl_ratio_e12=None))
    data = await gateway.ask(VALUATION, {"id": portfolio_id})
    assert data["portfolio"]["valuation"]["dayPnlRatio"] is None


async def test_valuation_before_the_first_mark_says_so(gateway: Gateway, portfolio_id: str) -> None:
    assert await gateway.codes(VALUATION, {"id": portfolio_id}) == ["NOT_READY"]


async def test_valuation_follows_the_pointer(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id, MarkRow(nav=1 * MICRO), epoch=3)
    await gateway.ask(VALUATION, {"id": portfolio_id})
    await mark(gateway, shard, portfolio_id, MarkRow(nav=2 * MICRO), epoch=4)
    valuation = (await gateway.ask(VALUATION, {"id": portfolio_id}))["portfolio"]["valuation"]
    assert (valuation["nav"], valuation["epoch"]) == ("2", 4)


@pytest.mark.parametrize("subject", ["bob", "ANN", "ann "])
async def test_somebody_elses_portfolio_is_like_none(gateway: Gateway, portfolio_id: str, subject: str) -> None:
    query = "query($id: String!) { portfolio(portfolioId: $id) { name } }"
    theirs = (await gateway.post(query, {"id": portfolio_id}, gateway.token(subject))).json()
    nobodys = (await gateway.post(query, {"id": "p-none"}, gateway.token(subject))).json()
    assert theirs == nobodys
    assert theirs["data"] == {"portfolio": None}
    assert theirs["errors"][0]["extensions"] == {"code": "NOT_FOUND"}


async def test_admin_sees_all(gateway: Gateway, portfolio_id: str) -> None:
    query = "query($id: String!) { portfolio(portfolioId: $id) { name } }"
    data = await gateway.ask(query, {"id": portfolio_id}, gateway.token("root", "admin"))
    assert data["portfolio"]["name"] == f"ann's {portfolio_id}"


@pytest.mark.parametrize("portfolio_id", ["", "a\0b", "x" * 5_000, "Ω", "' OR 1=1 --"])
async def test_odd_ids_are_not_found(gateway: Gateway, portfolio_id: str) -> None:
    assert await gateway.codes(VALUATION, {"id": portfolio_id}) == ["NOT_FOUND"]


async def test_positions_are_valued_at_the_latest_quotes(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id, MarkRow(nav=2_000 * MICRO))
    positions = {"AAPL": held("10", 1_000, 75, 1_100), "BTC-USD": held("-0.5", -300), "NEVER1": held("2", 40)}
    await gateway.redis.positions(shard, portfolio_id, positions)
    now_ns = time.time_ns()
    quotes = [Quote("AAPL", "120.5", now_ns, "SIM", 1), Quote("BTC-USD", "500", now_ns - 10**13, "SIM", 1)]
    await gateway.redis.quotes(quotes)
    query = """query($id: String!) { portfolio(portfolioId: $id) { positions(first: 10) { edges { node {
        asset { symbol sector assetClass } side quantity averageCost price quality costBasis marketValue
        unrealizedPnl unrealizedPnlRatio realizedPnl dayPnl weight } } } } }"""
    data = await gateway.ask(query, {"id": portfolio_id})
    apple, bitcoin, never = [edge["node"] for edge in data["portfolio"]["positions"]["edges"]]
    assert apple == {
        "asset": {"symbol": "AAPL", "sector": "Information Technology", "assetClass": "EQUITY"},
        "side": "LONG",
        "quantity": "10",
        "averageCost": "100",
        "price": "120.5",
        "quality": "LIVE",
        "costBasis": "1000",
        "marketValue": "1205",
        "unrealizedPnl": "205",
        "unrealizedPnlRatio": "0.205",
        "realizedPnl": "75",
        "dayPnl": "105",
        "weight": "0.6025",
    }
    assert (bitcoin["side"], bitcoin["quality"], bitcoin["marketValue"]) == ("SHORT", "STALE", "-250")
    assert (bitcoin["averageCost"], bitcoin["unrealizedPnl"], bitcoin["weight"]) == ("600", "50", "-0.125")
    assert (never["price"], never["quality"], never["marketValue"]) == (None, "MISSING", "40")
    assert never["asset"] == {"symbol": "NEVER1", "sector": "UNCLASSIFIED", "assetClass": "UNCLASSIFIED"}


SHARES = """query($id: String!) { portfolio(portfolioId: $id) { valuation {
    nav qualityShares { quality value share } } } }"""


async def test_quality_shares_say_how_much_of_the_value_stands_on_which_prices(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    await mark(gateway, shard, portfolio_id)
    bought = {"AAPL": held("1", 10), "BTC-USD": held("-2", -10), "ETH-USD": held("3", 10), "NEVER3": held("1", 100)}
    await gateway.redis.positions(shard, portfolio_id, bought)
    now_ns = time.time_ns()
    quotes = [
        Quote("AAPL", "200", now_ns, "SIM", 1, "HALTED"),
        Quote("BTC-USD", "100", now_ns, "SIM", 1),
        Quote("ETH-USD", "100", now_ns - 10**13, "SIM", 1),
    ]
    await gateway.redis.quotes(quotes)
    shares = (await gateway.ask(SHARES, {"id": portfolio_id}))["portfolio"]["valuation"]["qualityShares"]
    assert shares == [
        {"quality": "LIVE", "value": "200", "share": "0.25"},
        {"quality": "STALE", "value": "300", "share": "0.375"},
        {"quality": "HALTED", "value": "200", "share": "0.25"},
        {"quality": "MISSING", "value": "100", "share": "0.125"},
    ]


async def test_shares_that_do_not_come_out_even_sum_to_one(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id)
    held_at = {"BTC-USD": held("1", 1), "NEVER4": held("1", 1), "ETH-USD": held("1", 1)}
    await gateway.redis.positions(shard, portfolio_id, held_at)
    now_ns = time.time_ns()
    quotes = [Quote("BTC-USD", "1", now_ns, "SIM", 2), Quote("ETH-USD", "1", now_ns, "SIM", 2, "HALTED")]
    await gateway.redis.quotes(quotes)
    shares = (await gateway.ask(SHARES, {"id": portfolio_id}))["portfolio"]["valuation"]["qualityShares"]
    assert [share["share"] for share in shares] == ["0.3333333333"] * 3
    assert abs(sum(Decimal(share["share"]) for share in shares) - 1) <= Decimal("1e-9")


async def test_without_positions_there_are_no_shares(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id)
    assert (await gateway.ask(SHARES, {"id": portfolio_id}))["portfolio"]["valuation"]["qualityShares"] == []


async def test_positions_are_read_for_shares_only(
    gateway: Gateway, shard: int, portfolio_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mark(gateway, shard, portfolio_id)
    asked: list[object] = []

    async def valued_positions(self: HotLoader, place: object) -> None:
        asked.append(place)

    monkeypatch.setattr(HotLoader, "valued_positions", valued_positions)
    await gateway.ask(VALUATION, {"id": portfolio_id})
    assert asked == []
    await gateway.ask(SHARES, {"id": portfolio_id})
    assert asked == [(shard, portfolio_id)]


async def test_a_position_s_price_is_in_the_shares_of_today(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id)
    now_ns = time.time_ns()
    position = replace_struct(held("40", 1_000), splits=((now_ns, "4"),))
    await gateway.redis.positions(shard, portfolio_id, {"AAPL": position})
    await gateway.redis.quotes([Quote("AAPL", "500", now_ns - 10**9, "SIM", 1, "DELAYED")])
    query = """query($id: String!) { portfolio(portfolioId: $id) { positions(first: 1) { edges { node {
        price quality marketValue averageCost } } } } }"""
    (edge,) = (await gateway.ask(query, {"id": portfolio_id}))["portfolio"]["positions"]["edges"]
    assert edge["node"] == {"price": "125", "quality": "DELAYED", "marketValue": "5000", "averageCost": "25"}


async def test_a_closed_market_s_last_price_is_closed_and_not_stale(
    gateway: Gateway, shard: int, portfolio_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quoted in Friday's session and seen on Sunday: the equity's market is closed, crypto's never is."""
    friday_ns, sunday_ns = (to_ns(datetime(2026, 11, day, 17, 30, tzinfo=UTC)) for day in (27, 29))
    monkeypatch.setattr(WallClock, "now_ns", lambda self: sunday_ns)
    await mark(gateway, shard, portfolio_id)
    symbols = ["AAPL", "BTC-USD", "NEVER5"]
    await gateway.redis.positions(shard, portfolio_id, {symbol: held("1", 10) for symbol in symbols})
    await gateway.redis.quotes([Quote(symbol, "5", friday_ns, "SIM", 1) for symbol in symbols])
    query = (
        """query($id: String!) { portfolio(portfolioId: $id) { positions(first: 3) { edges { node { quality } } } } }"""
    )
    edges = (await gateway.ask(query, {"id": portfolio_id}))["portfolio"]["positions"]["edges"]
    assert [edge["node"]["quality"] for edge in edges] == ["CLOSED", "STALE", "STALE"]


async def test_weight_is_null_at_zero_nav(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id, MarkRow(nav=0))
    await gateway.redis.positions(shard, portfolio_id, {"AAPL": held("1", 10)})
    query = "query($id: String!) { portfolio(portfolioId: $id) { positions(first: 1) { edges { node { weight } } } } }"
    data = await gateway.ask(query, {"id": portfolio_id})
    assert data["portfolio"]["positions"]["edges"] == [{"node": {"weight": None}}]


async def test_position_pages_meet_without_overlap(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id)
    symbols = [f"S{number:03}" for number in range(23)]
    await gateway.redis.positions(shard, portfolio_id, {symbol: held("1", 10) for symbol in symbols})
    query = """query($id: String!, $after: String) { portfolio(portfolioId: $id) { positions(first: 10, after: $after) {
        edges { cursor node { asset { symbol } } } pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
    } } }"""
    seen: list[str] = []
    after = None
    for expected in (10, 10, 3):
        page = (await gateway.ask(query, {"id": portfolio_id, "after": after}))["portfolio"]["positions"]
        seen += [edge["node"]["asset"]["symbol"] for edge in page["edges"]]
        assert len(page["edges"]) == expected
        assert page["pageInfo"]["hasPreviousPage"] is (after is not None)
        assert page["pageInfo"]["startCursor"] == page["edges"][0]["cursor"]
        after = page["pageInfo"]["endCursor"]
    assert seen == symbols
    assert page["pageInfo"]["hasNextPage"] is False


@pytest.mark.parametrize("first", [0, -1, 201, 10_000, 2**31 - 1])
@pytest.mark.parametrize("field", ["positions", "ledger"])
async def test_page_size_is_refused(gateway: Gateway, portfolio_id: str, field: str, first: int) -> None:
    query = (
        f"query($id: String!, $n: Int!) {{ portfolio(portfolioId: $id) {{ {field}(first: $n) "
        "{ pageInfo { endCursor } } } }"
    )
    codes = await gateway.codes(query, {"id": portfolio_id, "n": first})
    # So large a page is refused before anything is read, as too costly.
    assert codes == (["QUERY_TOO_COSTLY"] if first > gateway.settings.query_objects_max else ["PAGE_SIZE"])


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "%%%",
        "a" * 10_000,
        "Ω",
        *(
            base64.urlsafe_b64encode(raw).decode()
            for raw in (
                b"positions:AAPL",
                b"ledger:",
                b"ledger:-1",
                b"ledger:1e9",
                b"ledger:99999999999999999999",
                b"ledger",
                b"\xff\xfe",
            )
        ),
    ],
)
async def test_bad_cursors_are_refused(gateway: Gateway, portfolio_id: str, cursor: str) -> None:
    query = """query($id: String!, $after: String) { portfolio(portfolioId: $id) {
        ledger(first: 5, after: $after) { pageInfo { endCursor } } } }"""
    assert await gateway.codes(query, {"id": portfolio_id, "after": cursor}) == ["BAD_CURSOR"]


async def test_sector_allocation_live_and_at_last_fill(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id)
    positions = {"AAPL": held("10", 1_000), "XOM": held("-5", -500), "MSFT": held("5", 500)}
    await gateway.redis.positions(shard, portfolio_id, positions)
    quotes = [Quote(symbol, "100", time.time_ns(), "SIM", 1) for symbol in positions]
    await gateway.redis.quotes(quotes)
    values = {"Information Technology": SectorValue(9 * MICRO, 9 * MICRO), "Gone": SectorValue(MICRO, MICRO)}
    await gateway.redis.sectors(shard, portfolio_id, values)
    query = """query($id: String!) { portfolio(portfolioId: $id) {
        sectorAllocation { sector value weight weightAtLastFill } } }"""
    data = await gateway.ask(query, {"id": portfolio_id})
    assert data["portfolio"]["sectorAllocation"] == [
        {"sector": "Information Technology", "value": "1500", "weight": "0.75", "weightAtLastFill": "0.9"},
        {"sector": "Energy", "value": "-500", "weight": "0.25", "weightAtLastFill": None},
    ]


LEDGER = """query($id: String!, $first: Int!, $after: String, $filter: LedgerFilter) { portfolio(portfolioId: $id) {
    ledger(first: $first, after: $after, filter: $filter) { edges { node {
        sequence kind symbol side quantity price amount fee cashAfter effectiveAt recordedAt eventId reference } }
        pageInfo { hasNextPage endCursor } } } }"""


async def test_ledger_pages_are_newest_first(gateway: Gateway, portfolio_id: str) -> None:
    for sequence in range(1, 8):
        await gateway.ledger.deposit(portfolio_id, sequence)
    seen: list[int] = []
    after = None
    for _ in range(3):
        variables = {"id": portfolio_id, "first": 3, "after": after}
        page = (await gateway.ask(LEDGER, variables))["portfolio"]["ledger"]
        seen += [edge["node"]["sequence"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        # What is booked meanwhile moves no page.
        await gateway.ledger.deposit(portfolio_id, 100 + len(seen))
    assert seen == [7, 6, 5, 4, 3, 2, 1]
    assert page["pageInfo"]["hasNextPage"] is False


async def test_ledger_entry_fields(gateway: Gateway, portfolio_id: str) -> None:
    await gateway.ledger.fill(portfolio_id, 1, "AAPL", "BUY", "0.125")
    data = await gateway.ask(LEDGER, {"id": portfolio_id, "first": 1})
    assert data["portfolio"]["ledger"]["edges"][0]["node"] == {
        "sequence": 1,
        "kind": "FILL",
        "symbol": "AAPL",
        "side": "BUY",
        "quantity": "0.125",
        "price": "100",
        "amount": "-12.5",
        "fee": "1",
        "cashAfter": "1",
        "effectiveAt": "2026-01-05T09:31:00Z",
        "recordedAt": "2026-01-05T09:31:01Z",
        "eventId": f"{portfolio_id}-e1",
        "reference": None,
    }


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"kind": "DEPOSIT"}, [1]),
        ({"symbol": "AAPL"}, [4, 2]),
        ({"side": "SELL"}, [4]),
        ({"symbol": "AAPL", "side": "BUY"}, [2]),
        ({"from": "2026-01-05T09:33:00Z"}, [4, 3]),
        ({"to": "2026-01-05T09:33:00Z"}, [2, 1]),
        ({"from": "2026-01-05T10:32:00+01:00", "to": "2026-01-05T09:34:00Z"}, [3, 2]),
    ],
)
async def test_ledger_filter(gateway: Gateway, portfolio_id: str, chosen: dict[str, str], expected: list[int]) -> None:
    await gateway.ledger.deposit(portfolio_id, 1)
    await gateway.ledger.fill(portfolio_id, 2, "AAPL", "BUY")
    await gateway.ledger.fill(portfolio_id, 3, "MSFT", "BUY")
    await gateway.ledger.fill(portfolio_id, 4, "AAPL", "SELL")
    data = await gateway.ask(LEDGER, {"id": portfolio_id, "first": 10, "filter": chosen})
    assert [edge["node"]["sequence"] for edge in data["portfolio"]["ledger"]["edges"]] == expected


async def test_ledger_needs_its_scope(gateway: Gateway, portfolio_id: str) -> None:
    token = gateway.token("ann", "portfolio:read")
    assert await gateway.codes(LEDGER, {"id": portfolio_id, "first": 1}, token) == ["FORBIDDEN"]


async def test_equity_curve_ends_in_the_live_nav(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    await mark(gateway, shard, portfolio_id, MarkRow(nav=777 * MICRO))
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    navs = {hour - timedelta(hours=back): f"{1000 + back}.5" for back in range(24 * 9)}
    await gateway.ledger.snapshots(portfolio_id, navs)
    query = """query($id: String!, $range: EquityCurveRange!, $max: Int) { portfolio(portfolioId: $id) {
        equityCurve(range: $range, maxPoints: $max) { range resolution points { at nav quality } } } }"""
    week = (await gateway.ask(query, {"id": portfolio_id, "range": "DAYS_7"}))["portfolio"]["equityCurve"]
    assert len(week["points"]) == 24 * 7 + 1
    assert week["points"][-1]["nav"] == "777"
    assert week["points"][-2]["nav"] == "1000.5"
    assert (week["range"], week["resolution"]) == ("DAYS_7", "HOURLY")
    year = (await gateway.ask(query, {"id": portfolio_id, "range": "YEAR_1"}))["portfolio"]["equityCurve"]
    assert year["resolution"] == "DAILY"
    days = [point["at"][:10] for point in year["points"][:-1]]
    assert len(days) == len(set(days)) >= 9
    thin = (await gateway.ask(query, {"id": portfolio_id, "range": "DAYS_30", "max": 10}))["portfolio"]["equityCurve"]
    assert len(thin["points"]) <= 10
    assert thin["points"][0]["nav"] == f"{1000 + 24 * 9 - 1}.5"
    for points in (0, 3, 2_001):
        variables = {"id": portfolio_id, "range": "ALL", "max": points}
        assert await gateway.codes(query, variables) == ["BAD_POINTS"]


async def test_viewer_pages_its_own_portfolios(gateway: Gateway) -> None:
    for number in range(5):
        await gateway.ledger.portfolio(f"carol-{number}", "carol", number)
    query = """query($after: String) { viewer { subject scopes portfolios(first: 2, after: $after) {
        edges { node { portfolioId openedAt } } pageInfo { hasNextPage endCursor } } } }"""
    token = gateway.token("carol", "portfolio:read")
    seen: list[str] = []
    after = None
    for _ in range(3):
        viewer = (await gateway.ask(query, {"after": after}, token))["viewer"]
        seen += [edge["node"]["portfolioId"] for edge in viewer["portfolios"]["edges"]]
        after = viewer["portfolios"]["pageInfo"]["endCursor"]
    assert seen == [f"carol-{number}" for number in range(5)]
    assert (viewer["subject"], viewer["scopes"]) == ("carol", ["portfolio:read"])
    everybody = await gateway.ask(
        "{ viewer { portfolios(first: 200) { edges { node { portfolioId } } } } }", None, gateway.token("x", "admin")
    )
    assert len(everybody["viewer"]["portfolios"]["edges"]) > 5


async def test_many_portfolios_are_read_in_one_pipeline(gateway: Gateway) -> None:
    for number in range(20):
        await gateway.ledger.portfolio(f"dave-{number:02}", "dave", 40 + number % 2)
    for shard in (40, 41):
        await gateway.redis.point(shard, 1)
        rows = {f"dave-{number:02}": MarkRow(nav=number) for number in range(20) if 40 + number % 2 == shard}
        await gateway.redis.marks(shard, 1, rows)
    query = "{ viewer { portfolios(first: 50) { edges { node { valuation { nav } } } } } }"
    await gateway.ask(query, None, gateway.token("dave"))
    before = (await gateway.redis.redis.info("commandstats"))["cmdstat_hmget"]["calls"]
    data = await gateway.ask(query, None, gateway.token("dave"))
    after = (await gateway.redis.redis.info("commandstats"))["cmdstat_hmget"]["calls"]
    navs = [edge["node"]["valuation"]["nav"] for edge in data["viewer"]["portfolios"]["edges"]]
    assert navs[:2] == ["0", "0.000001"]
    assert len(navs) == 20
    assert after - before == 2  # one for each of the two shards


async def test_positions_of_many_portfolios_take_few_connections(gateway: Gateway) -> None:
    # As many as a page has, and more than the pool has connections.
    names = [f"eve-{number:03}" for number in range(150)]
    for name in names:
        await gateway.ledger.portfolio(name, "eve", 42)
        await gateway.redis.positions(42, name, {"AAPL": held("1", 10), name.upper(): held("2", 20)})
    await gateway.redis.point(42, 1)
    await gateway.redis.marks(42, 1, {name: MarkRow() for name in names})
    await gateway.redis.quotes([Quote("AAPL", "12", time.time_ns(), "SIM", 1)])
    query = """{ viewer { portfolios(first: 200) { edges { node {
        positions(first: 2) { edges { node { price } } } } } } } }"""
    data = await gateway.ask(query, None, gateway.token("eve"))
    shown = [edge["node"]["positions"]["edges"] for edge in data["viewer"]["portfolios"]["edges"]]
    assert shown == [[{"node": {"price": "12"}}, {"node": {"price": None}}]] * 150


async def test_assets_and_node(gateway: Gateway, portfolio_id: str) -> None:
    made = [Asset(f"ZZ{number}", f"Zed {number}", AssetClass.EQUITY, "Zeds", "") for number in range(3)]
    await gateway.ledger.assets(made)
    query = """query($after: String) { assets(first: 2, after: $after, sector: "Zeds") {
        edges { node { id symbol name assetClass } } pageInfo { hasNextPage endCursor } } }"""
    first = (await gateway.ask(query))["assets"]
    second = (await gateway.ask(query, {"after": first["pageInfo"]["endCursor"]}))["assets"]
    symbols = [edge["node"]["symbol"] for page in (first, second) for edge in page["edges"]]
    assert symbols == ["ZZ0", "ZZ1", "ZZ2"]
    assert (await gateway.ask('{ asset(symbol: "ZZ1") { name } }'))["asset"] == {"name": "Zed 1"}
    assert await gateway.codes('{ asset(symbol: "NOSUCH") { name } }') == ["NOT_FOUND"]
    node_query = "query($id: ID!) { node(id: $id) { id __typename ... on Asset { symbol } ... on Portfolio { name } } }"
    asset_id = first["edges"][0]["node"]["id"]
    assert (await gateway.ask(node_query, {"id": asset_id}))["node"]["symbol"] == "ZZ0"
    own = await gateway.ask("query($id: String!) { portfolio(portfolioId: $id) { id } }", {"id": portfolio_id})
    node = (await gateway.ask(node_query, own["portfolio"]))["node"]
    assert (node["__typename"], node["name"]) == ("Portfolio", f"ann's {portfolio_id}")
    assert await gateway.codes(node_query, own["portfolio"], gateway.token("bob")) == ["NOT_FOUND"]
    for odd in ("", "x", "UG9ydGZvbGlv", "Ω" * 9, "a" * 5_000):
        assert await gateway.codes(node_query, {"id": odd}) == ["NOT_FOUND"]


async def test_answers_are_the_same_with_and_without_the_short_way(
    gateway: Gateway, shard: int, portfolio_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mark(gateway, shard, portfolio_id, replace(MarkRow(), day_pnl_ratio_e12=None))
    await gateway.redis.positions(shard, portfolio_id, {"AAPL": held("10", 1_000), "NEVER1": held("2", 40)})
    query = """query($id: String!, $yes: Boolean!) { portfolio(portfolioId: $id) {
        a: valuation { __typename nav @include(if: $yes) cash @skip(if: $yes) ...Rest }
        valuation { ... on Valuation { dayPnlRatio n: nav nav2: nav } }
        positions(first: 9) { edges { node { asset { s: symbol } side price priceAsOf quality weight dayPnl } }
            pageInfo { endCursor } }
        equityCurve(range: DAYS_7) { points { __typename nav quality twrIndex highWaterMark drawdown } } } }
        fragment Rest on Valuation { quality asOf epoch }"""
    short = (await gateway.post(query, {"id": portfolio_id, "yes": True})).json()
    monkeypatch.setattr("resolvers.execution.RecordExecutor._plan", lambda *_: None)
    assert (await gateway.post(query, {"id": portfolio_id, "yes": True})).json() == short
    assert "errors" not in short
    assert list(short["data"]["portfolio"]["a"]) == ["__typename", "nav", "quality", "asOf", "epoch"]


async def test_a_dashboard_reads_hot_state_twice(
    gateway: Gateway, shard: int, portfolio_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First what the portfolio has, then the quotes of what it holds: no field waits for another's reading."""
    await mark(gateway, shard, portfolio_id)
    await gateway.redis.positions(shard, portfolio_id, {"AAPL": held("10", 1_000)})
    query = """query($id: String!) { portfolio(portfolioId: $id) { valuation { nav } %s
        positions(first: 5) { edges { node { marketValue } } } equityCurve(range: DAYS_7) { points { nav } } } }"""
    reading, asked = HotStateReads.read, []

    async def read(reads: HotStateReads, **wanted: Iterable[Any]) -> HotState:
        asked.append({name for name, places in wanted.items() if list(places)})
        return await reading(reads, **wanted)

    monkeypatch.setattr(HotStateReads, "read", read)
    for field in ("sectorAllocation { sector }", "allocation { grossExposure }"):
        asked.clear()
        await gateway.ask(query % field, {"id": portfolio_id})
        assert asked == [{"marks", "positions", "sectors"}, {"quotes"}]


async def test_a_query_leaves_no_cycles_to_be_collected(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    """A collection of what a hundred queries left would hold everybody up for ten milliseconds."""
    await mark(gateway, shard, portfolio_id)
    await gateway.redis.positions(shard, portfolio_id, {"AAPL": held("10", 1_000)})
    query = """query($id: String!) { portfolio(portfolioId: $id) { ...Shown } }
        fragment Shown on Portfolio { name valuation { nav } sectorAllocation { sector weight }
            positions(first: 5) { edges { node { asset { symbol } marketValue } } }
            equityCurve(range: DAYS_7) { points { at nav } } }"""
    await gateway.ask(query, {"id": portfolio_id})
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            await gateway.ask(query, {"id": portfolio_id})
        gc.collect()
        modules = [(left if type(left) is FunctionType else type(left)).__module__ for left in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    ours = {"api", "engine", "resolvers", "graphql", "strawberry"}
    assert [module for module in modules if module.partition(".")[0] in ours] == []
