"""A portfolio asked for a past instant over the real gateway, against what a scripted life was worth then."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from graphql import OperationDefinitionNode, parse

from api.limits import objects_of
from engine.amounts import from_micro, plain
from engine.instants import to_ns
from tests.builders import MICRO, MarkRow
from tests.gateway import Gateway
from tests.scripted_ledger import Moment, ScriptedLedger

VALUATION = """nav cash receivables positionsValue unrealizedPnl realizedPnl fees income flows dayPnl dayPnlRatio
    dayCutAt quality asOf epoch sequence ledgerSequence pricesAsOf qualityShares { quality share }"""
POSITION = """asset { symbol } side quantity averageCost price priceAsOf quality costBasis marketValue unrealizedPnl
    realizedPnl dayPnl weight"""
QUERY = f"""query($id: String!, $at: DateTime) {{ portfolio(portfolioId: $id, asOf: $at) {{ id
    valuation {{ {VALUATION} }} positions(first: 50) {{ edges {{ node {{ {POSITION} }} }} }}
    sectorAllocation {{ sector value weight weightAtLastFill }} }} }}"""
NAV = "query($id: String!, $at: DateTime) { portfolio(portfolioId: $id, asOf: $at) { valuation { nav dayPnl } } }"
HOUR = timedelta(hours=1)


class Life(ScriptedLedger):
    """A script whose symbols are its own: a module's tests share their database and its recorded prices."""

    moments: list[Moment]


def text(micro: int) -> str:
    return plain(from_micro(micro))


@pytest_asyncio.fixture(loop_scope="session")
async def life(gateway: Gateway, shard: int) -> Life:
    """Two days of hours that ended a day ago: fills, a split, a dividend; recorded hour by hour with its snapshots."""
    name = f"p-{uuid.uuid4().hex[:8]}"
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=3)
    script, one, two = Life(name, begin), f"{name}.A", f"{name}.B"
    script.moments = []
    script.cash("DEPOSIT", "10000")
    for hour in range(48):
        script.at = begin + hour * HOUR + timedelta(minutes=20)
        script.quote(one, str(100 + hour))
        if hour < 30:
            script.quote(two, str(200 - hour))
        if hour == 3:
            script.fill(one, "BUY", "10", "102", fee="1")
        if hour == 5:
            script.fill(two, "SELL", "4", "190")
        if hour == 9:
            script.fill(two, "BUY", "10", "195")
        if hour == 12:
            script.split(one, Fraction(2))
        if hour >= 12:
            script.quote(one, str((100 + hour) / 2))
        if hour == 20:
            script.accrue(one, "0.5")
        if hour == 26:
            script.cash("DEPOSIT", "5000")
        if hour == 28:
            script.pay()
        if hour == 33:
            script.fill(one, "SELL", "8", "70", fee="2")
        script.at = begin + (hour + 1) * HOUR
        script.record()
        script.moments.append(script.moment())
    await gateway.ledger.portfolio(name, "ann", shard, opened_at=begin)
    await script.write(gateway.ledger.pool)
    for moment in script.moments:
        await gateway.ledger.snapshots(name, {moment.at: text(moment.nav)}, moment.ledger_sequence)
    return script


async def ask(gateway: Gateway, life: Life, at: datetime, query: str = QUERY) -> Any:
    return (await gateway.ask(query, {"id": life.portfolio_id, "at": at.isoformat()}))["portfolio"]


async def test_at_every_instant_of_the_grid_nav_is_the_snapshots(gateway: Gateway, life: Life) -> None:
    for moment in life.moments:
        valuation = (await ask(gateway, life, moment.at))["valuation"]
        assert valuation["nav"] == text(moment.nav)
        shown = {name: valuation[name] for name in ("cash", "receivables", "fees", "income", "flows")}
        assert shown == {name: text(moment.figures[name]) for name in shown}
        assert valuation["realizedPnl"] == text(moment.figures["realized"])
        assert valuation["ledgerSequence"] == moment.ledger_sequence
        assert (valuation["epoch"], valuation["sequence"]) == (0, 0)
        total = sum(Decimal(valuation[name]) for name in ("cash", "receivables", "positionsValue"))
        assert total == Decimal(valuation["nav"])
        assert datetime.fromisoformat(valuation["asOf"]) == moment.at


async def test_positions_are_those_of_the_time(gateway: Gateway, life: Life) -> None:
    for moment in life.moments[::3]:
        answer = await ask(gateway, life, moment.at)
        rows = [edge["node"] for edge in answer["positions"]["edges"]]
        assert [row["asset"]["symbol"] for row in rows] == sorted(moment.positions)
        for row in rows:
            held = moment.positions[row["asset"]["symbol"]]
            assert Decimal(row["quantity"]) == held.quantity
            assert Decimal(row["price"]) == moment.prices[row["asset"]["symbol"]]
            assert (row["costBasis"], row["realizedPnl"]) == (text(held.cost), text(held.realized))
            assert row["marketValue"] == text(moment.worth.values[row["asset"]["symbol"]])
        slices = answer["sectorAllocation"]
        assert all(one["weightAtLastFill"] is None for one in slices)
        assert [one["weight"] for one in slices] == (["1"] if rows else [])


async def test_the_age_and_quality_of_its_prices(gateway: Gateway, life: Life) -> None:
    """B was quoted last in the hour 29; unclassified assets trade always, so it is stale."""
    moment = life.moments[31]
    answer = await ask(gateway, life, moment.at)
    quoted = {row["node"]["asset"]["symbol"][-1]: row["node"]["priceAsOf"] for row in answer["positions"]["edges"]}
    ages = {name: moment.at - datetime.fromisoformat(at) for name, at in quoted.items()}
    assert ages == {"A": timedelta(minutes=40), "B": timedelta(minutes=160)}
    assert answer["valuation"]["quality"] == "STALE"
    assert moment.at - datetime.fromisoformat(answer["valuation"]["pricesAsOf"]) == timedelta(minutes=160)
    assert [one["quality"] for one in answer["valuation"]["qualityShares"]] == ["STALE"]


async def test_between_two_instants_of_the_grid_the_last_recorded_prices_count(gateway: Gateway, life: Life) -> None:
    """The entry of 3:20 is in, the quotes of 3:20 are not recorded before 4:00."""
    at = life.moments[2].at + timedelta(minutes=30)
    answer = await ask(gateway, life, at)
    (row,) = [edge["node"] for edge in answer["positions"]["edges"]]
    assert (row["quantity"], row["price"], row["marketValue"]) == ("10", "102", "1020")
    assert answer["valuation"]["nav"] == "9999"


async def test_what_was_never_recorded_is_missing_and_counts_at_cost(gateway: Gateway, life: Life) -> None:
    symbol = f"{life.portfolio_id}.A"
    await gateway.ledger.pool.execute("DELETE FROM price_close WHERE symbol = $1", symbol)
    answer = await ask(gateway, life, life.moments[4].at)
    (row,) = [edge["node"] for edge in answer["positions"]["edges"]]
    assert (row["price"], row["quality"], row["marketValue"]) == (None, "MISSING", "1020")
    assert answer["valuation"]["pricesAsOf"] is None


async def test_what_is_quoted_meanwhile_changes_no_answer_about_the_past(gateway: Gateway, life: Life) -> None:
    """Not even a quote that is stamped before the instant: it was not recorded by then."""
    quote, moment = life.quotes[f"{life.portfolio_id}.A"], life.moments[-1]
    before = await ask(gateway, life, moment.at)
    await gateway.redis.quotes([msgspec.structs.replace(quote, price="1", ts_event_ns=to_ns(moment.at) - 1)])
    assert await ask(gateway, life, moment.at) == before


async def test_the_day_counts_from_the_last_cut_before(gateway: Gateway, life: Life) -> None:
    """Without a stored baseline it is made of the ledger and the recorded prices; the deposit at 26:20 is no P&L."""
    first, at = life.moments[23], life.moments[40]
    valuation = (await ask(gateway, life, at.at))["valuation"]
    assert datetime.fromisoformat(valuation["dayCutAt"]) == first.at
    assert valuation["dayPnl"] == text(at.nav - first.nav - 5_000 * MICRO)
    deposit = next(entry for entry in life.entries if entry.amount == 5_000 * MICRO)
    assert deposit.nav_before is not None
    after = deposit.nav_before + 5_000 * MICRO
    ratio = Decimal(deposit.nav_before) / first.nav * (Decimal(at.nav) / after) - 1
    assert abs(Decimal(valuation["dayPnlRatio"]) - ratio) < Decimal("1e-10")
    positions = [edge["node"] for edge in (await ask(gateway, life, at.at))["positions"]["edges"]]
    before, span = first.worth.values, life.entries[first.ledger_sequence : at.ledger_sequence]
    for row in positions:
        symbol = row["asset"]["symbol"]
        traded = -sum(entry.amount for entry in span if entry.symbol == symbol and entry.side)
        assert row["dayPnl"] == text(at.worth.values[symbol] - before[symbol] - traded)
    await gateway.ledger.pool.execute(
        "INSERT INTO day_baseline VALUES ($1, $2, $3, $4, '{}', '{}', false)",
        *(life.portfolio_id, first.at, from_micro(first.nav + 7 * MICRO), first.ledger_sequence),
    )
    valuation = (await ask(gateway, life, at.at))["valuation"]
    assert valuation["dayPnl"] == text(at.nav - first.nav - 5_007 * MICRO)


async def test_on_its_first_day_the_base_is_nothing(gateway: Gateway, life: Life) -> None:
    moment = life.moments[15]
    valuation = (await ask(gateway, life, moment.at))["valuation"]
    assert valuation["dayPnl"] == text(moment.nav - 10_000 * MICRO)
    assert datetime.fromisoformat(valuation["dayCutAt"]) == life.moments[0].at - HOUR


async def test_a_split_moves_nobodys_day(gateway: Gateway) -> None:
    """Golden vector 4: 10@100, price at the cut 120; split 2:1; mark 61: 20 shares, average 50, day P&L 20."""
    name = f"p-{uuid.uuid4().hex[:8]}"
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=4)
    script = Life(name, midnight + 12 * HOUR)
    script.cash("DEPOSIT", "10000")
    script.quote(f"{name}.S", "100")
    script.fill(f"{name}.S", "BUY", "10", "100")
    script.at = midnight + 23 * HOUR
    script.quote(f"{name}.S", "120")
    script.at = midnight + 24 * HOUR
    script.record()
    script.at = midnight + 30 * HOUR
    script.split(f"{name}.S", Fraction(2))
    split_at = script.at
    script.at = midnight + 31 * HOUR
    script.quote(f"{name}.S", "61")
    script.record()
    await gateway.ledger.portfolio(name, "ann", opened_at=midnight)
    await script.write(gateway.ledger.pool)
    for at, price, pnl, quantity in ((split_at - HOUR, "120", "0", "10"), (split_at, "60", "0", "20")):
        answer = await ask(gateway, script, at)
        (row,) = [edge["node"] for edge in answer["positions"]["edges"]]
        assert (row["price"], row["quantity"], row["dayPnl"]) == (price, quantity, pnl)
        assert answer["valuation"]["dayPnl"] == pnl
    answer = await ask(gateway, script, script.at)
    (row,) = [edge["node"] for edge in answer["positions"]["edges"]]
    shown = [row[field] for field in ("quantity", "averageCost", "costBasis", "price", "dayPnl", "marketValue")]
    assert shown == ["20", "50", "1000", "61", "20", "1220"]
    assert (answer["valuation"]["dayPnl"], answer["valuation"]["nav"]) == ("20", "10220")


async def test_a_dividend_owed_leaves_nav_where_it_was(gateway: Gateway) -> None:
    """Golden vector 5: 10 shares, mark 100; dividend 1, ex-date, mark 99, not paid yet."""
    name = f"p-{uuid.uuid4().hex[:8]}"
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=4)
    script = Life(name, begin + HOUR)
    script.cash("DEPOSIT", "1000")
    script.quote(f"{name}.D", "100")
    script.fill(f"{name}.D", "BUY", "10", "100")
    script.record()
    script.at = begin + 2 * HOUR
    script.accrue(f"{name}.D", "1")
    script.quote(f"{name}.D", "99")
    script.record()
    await gateway.ledger.portfolio(name, "ann", opened_at=begin)
    await script.write(gateway.ledger.pool)
    before, after = [(await ask(gateway, script, begin + hours * HOUR))["valuation"] for hours in (1, 2)]
    assert (before["nav"], before["receivables"], before["income"]) == ("1000", "0", "0")
    assert (after["nav"], after["receivables"], after["income"], after["cash"]) == ("1000", "10", "10", "0")


async def test_refused_instants(gateway: Gateway, life: Life, shard: int) -> None:
    async def codes(at: datetime, token: str = "") -> list[str]:
        return await gateway.codes(NAV, {"id": life.portfolio_id, "at": at.isoformat()}, token)

    opened_at = life.moments[0].at - HOUR
    assert await codes(opened_at - timedelta(microseconds=1)) == ["AS_OF_BEFORE_OPENING"]
    assert await codes(datetime.now(UTC) + timedelta(seconds=30)) == ["AS_OF_IN_FUTURE"]
    assert await codes(datetime(1, 1, 1, tzinfo=UTC)) == ["AS_OF_BEFORE_OPENING"]
    assert await codes(datetime(9999, 12, 31, tzinfo=UTC)) == ["AS_OF_IN_FUTURE"]
    assert await codes(datetime(9999, 12, 31, tzinfo=UTC), gateway.token("bob")) == ["NOT_FOUND"]
    assert (await ask(gateway, life, opened_at, NAV))["valuation"] == {"nav": "10000", "dayPnl": "0"}
    now = await ask(gateway, life, datetime.now(UTC) - timedelta(seconds=1), NAV)
    assert now["valuation"]["nav"] == text(life.moments[-1].nav)


@pytest.mark.parametrize(
    "field",
    [
        "equityCurve(range: ALL) { range }",
        "performance(range: ALL) { range }",
        'explain(from: "2026-01-01T00:00:00Z") { from }',
        "reconciliation { status }",
    ],
)
async def test_what_shows_the_present_alone_says_so(gateway: Gateway, life: Life, field: str) -> None:
    query = f"query($id: String!, $at: DateTime) {{ portfolio(portfolioId: $id, asOf: $at) {{ name {field} }} }}"
    variables = {"id": life.portfolio_id, "at": life.moments[9].at.isoformat()}
    assert await gateway.codes(query, variables) == ["AS_OF_UNSUPPORTED"]


async def test_the_ledger_ends_there(gateway: Gateway, life: Life) -> None:
    query = """query($id: String!, $at: DateTime, $after: String) { portfolio(portfolioId: $id, asOf: $at) {
        ledger(first: 2, after: $after) { edges { node { sequence } } pageInfo { hasNextPage endCursor } } } }"""
    moment = life.moments[9]
    seen, after = [], None
    while True:
        variables = {"id": life.portfolio_id, "at": moment.at.isoformat(), "after": after}
        page = (await gateway.ask(query, variables))["portfolio"]["ledger"]
        seen += [edge["node"]["sequence"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            break
    assert seen == list(range(moment.ledger_sequence, 0, -1))


async def test_the_past_has_an_id_of_its_own(gateway: Gateway, life: Life) -> None:
    node = "query($id: ID!) { node(id: $id) { id ... on Portfolio { portfolioId valuation { nav } } } }"
    ids = set()
    for moment in life.moments[10:12]:
        found = await ask(gateway, life, moment.at)
        again = (await gateway.ask(node, {"id": found["id"]}))["node"]
        assert again == {
            "id": found["id"], "portfolioId": life.portfolio_id, "valuation": {"nav": text(moment.nav)},
        }  # fmt: skip
        ids.add(found["id"])
    present = (await gateway.ask(
        "query($id: String!) { portfolio(portfolioId: $id) { id } }", {"id": life.portfolio_id}
    ))["portfolio"]["id"]  # fmt: skip
    assert len(ids | {present}) == 3
    assert await gateway.codes(node, {"id": "UG9ydGZvbGlvOnAjeA"}) == ["NOT_FOUND"]  # Portfolio:p#x


async def test_now_and_then_in_one_operation(gateway: Gateway, life: Life, shard: int) -> None:
    await gateway.redis.point(shard, 3)
    await gateway.redis.marks(shard, 3, {life.portfolio_id: MarkRow(nav=77 * MICRO)})
    query = """query($id: String!, $at: DateTime) { then: portfolio(portfolioId: $id, asOf: $at) { valuation { nav } }
        now: portfolio(portfolioId: $id) { valuation { nav } } }"""
    moment = life.moments[20]
    answer = await gateway.ask(query, {"id": life.portfolio_id, "at": moment.at.isoformat()})
    assert (answer["then"]["valuation"]["nav"], answer["now"]["valuation"]["nav"]) == (text(moment.nav), "77")


def test_the_past_costs_more_than_the_present() -> None:
    def cost(arguments: str, field: str = "valuation { nav }") -> int:
        document = parse(f'{{ portfolio(portfolioId: "p"{arguments}) {{ {field} }} }}')
        (operation,) = document.definitions
        assert isinstance(operation, OperationDefinitionNode)
        return objects_of(document, operation, {}, 200)

    assert cost(', asOf: "2026-01-01T00:00:00Z"') == cost("") + 150
    assert cost("", 'explain(from: "2026-01-01T00:00:00Z") { from }') == 300
