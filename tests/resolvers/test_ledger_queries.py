"""The ledger as clients ask for it, and what is derived from it: lots, closed positions, what was realised."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import pytest_asyncio

from engine.amounts import from_micro, plain
from engine.instants import to_ns
from engine.ledger import write_scale
from engine.positions import HotPosition
from engine.stores.ledger_rows import write_entries, write_positions
from resolvers import lots
from tests.builders import MarkRow
from tests.gateway import Gateway
from tests.scripted_ledger import BEGIN, HOUR, Moment, ScriptedLedger

ENTRIES = """query($id: String!, $first: Int!, $after: String, $filter: LedgerFilter) { portfolio(portfolioId: $id) {
    ledger(first: $first, after: $after, filter: $filter) { pageInfo { hasNextPage endCursor } edges { node {
        sequence kind symbol side quantity price scale amount fee receivable realizedPnl navEffect cashAfter effectiveAt
        recordedAt late eventId reference reverses reversedBy hash } } } } }"""
LOTS = """query($id: String!) { portfolio(portfolioId: $id) { positions(first: 9) { edges { node {
    asset { symbol } quantity lots { openedAt ledgerSequence quantity remaining unitCost cost } } } } } }"""
REALIZED = """query($id: String!, $from: DateTime, $to: DateTime) { portfolio(portfolioId: $id) {
    realizedPnl(from: $from, to: $to) { from to gross fees net income } } }"""
TODAY = "query($id: String!) { portfolio(portfolioId: $id) { realizedToday { from to gross fees net income } } }"
CLOSED = """query($id: String!, $first: Int!, $after: String, $at: DateTime) {
    portfolio(portfolioId: $id, asOf: $at) { closedPositions(first: $first, after: $after) {
        pageInfo { hasNextPage endCursor } edges { node { asset { symbol } side realizedPnl fees realizedPnlNet openedAt
            closedAt holdingSeconds openedSequence closedSequence } } } } }"""


MOMENT = timedelta(minutes=20)  # the hour's steps are taken so long after the moment before


@dataclass
class Life:
    """A portfolio of ann's with a past, and the moments after each hour of it."""

    script: ScriptedLedger
    moments: list[Moment]
    shard: int

    @property
    def id(self) -> str:
        return self.script.portfolio_id


@pytest_asyncio.fixture(loop_scope="session")
async def life(gateway: Gateway, shard: int) -> Life:
    """X is bought, split, sold in part and reversed; Y sold short, closed and crossed; with cash of all kinds."""
    script = ScriptedLedger(f"p-{uuid.uuid4().hex[:8]}")
    moments = [script.moment()]
    script.at += MOMENT
    script.quote("X", "100")
    script.cash("DEPOSIT", "10000")
    script.fill("X", "BUY", "10", "100", "1")
    moments.append(script.wait())
    script.at += MOMENT
    mistake = script.fill("X", "BUY", "10", "110", "1")
    script.fill("Y", "SELL", "4", "50", "0.5")
    moments.append(script.wait())
    script.at += MOMENT
    script.split("X", Fraction(2))
    script.fill("X", "SELL", "5", "60", "1")
    script.accrue("X", "0.25")
    moments.append(script.wait())
    script.at += MOMENT
    script.reverse(mistake)
    script.fill("Y", "BUY", "4", "45", "0.5")
    script.cash("FEE", "3")
    moments.append(script.wait())
    script.at += MOMENT
    script.fill("Y", "BUY", "2", "40")
    script.fill("Y", "SELL", "3", "42", "0.25")
    script.cash("INTEREST", "0.000001")
    moments.append(script.wait())
    script.at += MOMENT
    await gateway.ledger.portfolio(script.portfolio_id, "ann", shard, opened_at=BEGIN)
    await script.write(gateway.ledger.pool)
    return Life(script, moments, shard)


async def mark(gateway: Gateway, life: Life, lag: int = 0, **changes: Any) -> None:
    """Hot state after the portfolio's newest entry, or one `lag` entries before."""
    held = life.script.portfolio.positions
    positions = {
        symbol: HotPosition(
            plain(one.quantity), one.cost, one.realized, 0, 0, one.fees, opened_sequence=one.opened_sequence
        )
        for symbol, one in held.items()
    }
    row = MarkRow(ledger_sequence=life.script.portfolio.ledger_sequence - lag, **changes)
    await gateway.redis.point(life.shard, 1)
    await gateway.redis.marks(life.shard, 1, {life.id: row})
    await gateway.redis.positions(life.shard, life.id, positions)


def text(micro: int) -> str:
    return plain(from_micro(micro))


def instant(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


# -- entries --------------------------------------------------------------------------------------------------


async def test_every_field_of_every_entry(gateway: Gateway, life: Life) -> None:
    edges = (await gateway.ask(ENTRIES, {"id": life.id, "first": 50}))["portfolio"]["ledger"]["edges"]
    reversed_by = {entry.reverses: entry.event_id for entry in life.script.entries if entry.reverses}
    assert len(reversed_by) == 1
    assert [edge["node"] for edge in edges] == [
        {
            "sequence": entry.sequence,
            "kind": entry.kind.value,
            "symbol": entry.symbol,
            "side": entry.side and entry.side.value,
            "quantity": None if entry.quantity is None else plain(entry.quantity),
            "price": None if entry.price is None else plain(entry.price),
            "scale": None if entry.scale is None else write_scale(entry.scale),
            "amount": text(entry.amount),
            "fee": text(entry.fee),
            "receivable": text(entry.receivable),
            "realizedPnl": text(entry.realized),
            "navEffect": text(entry.nav_effect),
            "cashAfter": text(entry.cash_after),
            "effectiveAt": instant(entry.effective_at),
            "recordedAt": instant(entry.recorded_at),
            "late": entry.late,
            "eventId": entry.event_id,
            "reference": entry.reference,
            "reverses": entry.reverses,
            "reversedBy": reversed_by.get(entry.event_id),
            "hash": entry.hash.hex(),
        }
        for entry in life.script.entries[::-1]
    ]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"kinds": ["DEPOSIT", "INTEREST"]}, [14, 2]),
        ({"kind": "SPLIT"}, [6]),
        ({"symbol": "X"}, [9, 8, 7, 6, 4, 3]),
        ({"side": "SELL", "reversals": False}, [13, 7, 5]),
        ({"reversals": True}, [9]),
        ({"minAmount": "1000", "maxAmount": "1100"}, [9, 4, 3]),
        ({"recordedFrom": instant(BEGIN + 5 * HOUR)}, [14, 13, 12]),
        ({"recordedTo": instant(BEGIN + HOUR), "from": instant(BEGIN), "kinds": ["FILL", "OPEN"]}, [3, 1]),
        ({"minAmount": "0.000001", "maxAmount": "0.000001"}, [14]),
    ],
)
async def test_filters(gateway: Gateway, life: Life, chosen: dict[str, Any], expected: list[int]) -> None:
    found: list[int] = []
    after = None
    while True:
        variables = {"id": life.id, "first": 2, "after": after, "filter": chosen}
        page = (await gateway.ask(ENTRIES, variables))["portfolio"]["ledger"]
        found += [edge["node"]["sequence"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            break
    assert found == expected


@pytest.mark.parametrize(
    ("chosen", "code"),
    [
        ({"kind": "FILL", "kinds": ["FEE"]}, "BAD_FILTER"),
        ({"kinds": []}, "BAD_FILTER"),
        ({"symbol": "A" * 2_000}, "BAD_FILTER"),
        ({"symbol": "A\u0000B"}, "BAD_FILTER"),
        ({"minAmount": "2", "maxAmount": "1.999999"}, "BAD_FILTER"),
        ({"minAmount": "-1"}, "BAD_FILTER"),
        ({"maxAmount": "-0.000001"}, "BAD_FILTER"),
        ({"from": "2026-01-02T00:00:00Z", "to": "2026-01-02T00:00:00Z"}, "BAD_FILTER"),
        ({"recordedFrom": "2026-01-03T00:00:00Z", "recordedTo": "2026-01-02T00:00:00Z"}, "BAD_FILTER"),
        ({"minAmount": "NaN"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"minAmount": 1}, "GRAPHQL_VALIDATION_FAILED"),
        ({"kinds": ["GIFT"]}, "GRAPHQL_VALIDATION_FAILED"),
    ],
)
async def test_a_bad_filter_is_refused(gateway: Gateway, portfolio_id: str, chosen: dict[str, Any], code: str) -> None:
    assert await gateway.codes(ENTRIES, {"id": portfolio_id, "first": 1, "filter": chosen}) == [code]


# -- lots -----------------------------------------------------------------------------------------------------


async def positions(gateway: Gateway, life: Life) -> dict[str, Any]:
    edges = (await gateway.ask(LOTS, {"id": life.id}))["portfolio"]["positions"]["edges"]
    return {edge["node"]["asset"]["symbol"]: edge["node"] for edge in edges}


async def test_lots(gateway: Gateway, life: Life) -> None:
    await mark(gateway, life)
    shown = await positions(gateway, life)
    assert shown["X"] == {
        "asset": {"symbol": "X"},
        "quantity": "15",
        "lots": [
            {
                "openedAt": instant(BEGIN + MOMENT),
                "ledgerSequence": 3,
                "quantity": "20",
                "remaining": "15",
                "unitCost": "50",
                "cost": "750",
            }
        ],
    }
    (short,) = shown["Y"]["lots"]
    assert (short["ledgerSequence"], short["quantity"], short["remaining"], short["cost"]) == (13, "-1", "-1", "-42")


async def test_lots_are_of_the_quantity_beside_them(gateway: Gateway, life: Life) -> None:
    """The ledger may be ahead of hot state for a moment."""
    await mark(gateway, life)
    script = life.script
    ahead = [script.fill("X", "SELL", "6", "70"), script.fill("X", "BUY", "1", "70")]
    async with gateway.ledger.pool.acquire() as connection, connection.transaction():
        await write_entries(connection, ahead)
        await write_positions(connection, {life.id: script.portfolio}, {life.id: {"X"}})
    shown = await positions(gateway, life)
    assert shown["X"]["quantity"] == "15" == shown["X"]["lots"][0]["remaining"]
    await mark(gateway, life)
    shown = await positions(gateway, life)
    assert [lot["remaining"] for lot in shown["X"]["lots"]] == ["9", "1"]


async def test_lots_of_a_state_that_never_was_are_not_ready(gateway: Gateway, life: Life) -> None:
    await mark(gateway, life)
    held = HotPosition("14", 1, 0, 0, 0, opened_sequence=3)
    await gateway.redis.positions(life.shard, life.id, {"X": held})
    assert await gateway.codes(LOTS, {"id": life.id}) == ["NOT_READY"]


async def test_lots_need_their_scope_and_have_a_limit(
    gateway: Gateway, life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mark(gateway, life)
    token = gateway.token("ann", "portfolio:read")
    assert set(await gateway.codes(LOTS, {"id": life.id}, token)) == {"FORBIDDEN"}
    monkeypatch.setattr(lots, "LOTS_ENTRIES_MAX", 4)
    assert await gateway.codes(LOTS, {"id": life.id}) == ["LOTS_TOO_LONG"]


async def test_lots_of_many_positions_take_few_queries(
    gateway: Gateway, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ScriptedLedger(f"p-{uuid.uuid4().hex[:8]}")
    for number in range(12):
        script.fill(f"M{number:02}", "BUY", str(number + 1), "10")
    await gateway.ledger.portfolio(script.portfolio_id, "ann", shard, opened_at=BEGIN)
    await script.write(gateway.ledger.pool)
    await mark(gateway, Life(script, [], shard))
    asked: list[int] = []
    reads = gateway.application.services.ledger
    cycles = reads.cycles

    async def counted(wanted: Any, count_max: int) -> Any:
        asked.append(len(wanted))
        return await cycles(wanted, count_max)

    monkeypatch.setattr(reads, "cycles", counted)
    query = LOTS.replace("first: 9", "first: 50")
    edges = (await gateway.ask(query, {"id": script.portfolio_id}))["portfolio"]["positions"]["edges"]
    assert [edge["node"]["lots"][0]["remaining"] for edge in edges] == [str(number + 1) for number in range(12)]
    assert sorted(asked) == [2, 5, 5]


async def test_lots_as_of_the_past(gateway: Gateway, life: Life) -> None:
    query = LOTS.replace("$id: String!", "$id: String!, $at: DateTime!").replace("$id)", "$id, asOf: $at)")
    for moment in life.moments[1:]:
        edges = (await gateway.ask(query, {"id": life.id, "at": instant(moment.at)}))["portfolio"]["positions"]["edges"]
        found = {
            edge["node"]["asset"]["symbol"]: sum(Decimal(lot["remaining"]) for lot in edge["node"]["lots"])
            for edge in edges
        }
        assert found == {symbol: held.quantity for symbol, held in moment.positions.items()}


# -- closed positions -----------------------------------------------------------------------------------------


async def test_closed_positions(gateway: Gateway, life: Life) -> None:
    page = (await gateway.ask(CLOSED, {"id": life.id, "first": 9}))["portfolio"]["closedPositions"]
    crossed, covered = [edge["node"] for edge in page["edges"]]
    assert covered == {
        "asset": {"symbol": "Y"},
        "side": "SHORT",
        "realizedPnl": "20",
        "fees": "1",
        "realizedPnlNet": "19",
        "openedAt": instant(life.moments[1].at + MOMENT),
        "closedAt": instant(life.moments[3].at + MOMENT),
        "holdingSeconds": 9600.0,
        "openedSequence": 5,
        "closedSequence": 10,
    }
    assert (crossed["side"], crossed["realizedPnl"], crossed["fees"]) == ("LONG", "4", "0.25")
    assert page["pageInfo"]["hasNextPage"] is False


async def test_closed_positions_are_pages(gateway: Gateway, life: Life) -> None:
    seen, after = [], None
    for more in (True, False):
        page = (await gateway.ask(CLOSED, {"id": life.id, "first": 1, "after": after}))["portfolio"]["closedPositions"]
        seen += [edge["node"]["closedSequence"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        assert page["pageInfo"]["hasNextPage"] is more
    assert seen == [13, 10]
    for first, cursor, code in ((0, None, "PAGE_SIZE"), (201, None, "PAGE_SIZE"), (1, "x", "BAD_CURSOR")):
        assert await gateway.codes(CLOSED, {"id": life.id, "first": first, "after": cursor}) == [code]
    ledger = "query($id: String!) { portfolio(portfolioId: $id) { ledger(first: 1) { pageInfo { endCursor } } } }"
    other = (await gateway.ask(ledger, {"id": life.id}))["portfolio"]["ledger"]["pageInfo"]["endCursor"]
    assert await gateway.codes(CLOSED, {"id": life.id, "first": 1, "after": other}) == ["BAD_CURSOR"]
    past = {"id": life.id, "first": 9, "at": instant(life.moments[-2].at)}
    edges = (await gateway.ask(CLOSED, past))["portfolio"]["closedPositions"]["edges"]
    assert [edge["node"]["closedSequence"] for edge in edges] == [10]


# -- what was realised ----------------------------------------------------------------------------------------


async def realized(gateway: Gateway, life: Life, begin: datetime | None, end: datetime | None) -> dict[str, str]:
    variables = {"id": life.id, "from": begin and instant(begin), "to": end and instant(end)}
    found: dict[str, str] = (await gateway.ask(REALIZED, variables))["portfolio"]["realizedPnl"]
    return found


async def test_realized_is_the_difference_of_two_moments(gateway: Gateway, life: Life) -> None:
    for number, before in enumerate(life.moments):
        for after in life.moments[number + 1 :]:
            figures = {name: after.figures[name] - before.figures[name] for name in ("realized", "fees", "income")}
            assert await realized(gateway, life, before.at, after.at) == {
                "from": instant(before.at),
                "to": instant(after.at),
                "gross": text(figures["realized"]),
                "fees": text(figures["fees"]),
                "net": text(figures["realized"] - figures["fees"]),
                "income": text(figures["income"]),
            }


async def test_realized_since_the_opening_and_until_now(gateway: Gateway, life: Life) -> None:
    held = life.script.portfolio
    whole = await realized(gateway, life, None, None)
    assert (whole["gross"], whole["fees"], whole["income"]) == (
        text(held.realized), text(held.fees), text(held.income),
    )  # fmt: skip
    assert whole["from"] == instant(BEGIN)
    first, second = life.moments[2].figures, life.moments[2].at
    until = await realized(gateway, life, None, second)
    since = await realized(gateway, life, second, None)
    assert until["gross"] == text(first["realized"])
    assert Decimal(until["gross"]) + Decimal(since["gross"]) == Decimal(whole["gross"])
    assert Decimal(until["net"]) + Decimal(since["net"]) == Decimal(whole["net"])


async def test_a_span_has_its_end_and_not_its_beginning(gateway: Gateway, life: Life) -> None:
    """Like valuations asOf: what was booked at an instant is in it."""
    booked = next(entry for entry in life.script.entries if entry.kind == "INTEREST").recorded_at
    micro = timedelta(microseconds=1)
    assert (await realized(gateway, life, booked - micro, booked))["income"] == "0.000001"
    assert (await realized(gateway, life, booked, booked + micro))["income"] == "0"


async def test_a_bad_span_is_refused(gateway: Gateway, life: Life) -> None:
    future, early = "2199-01-01T00:00:00Z", instant(BEGIN - timedelta(seconds=1))
    at = instant(life.moments[1].at)
    for begin, end, code in (
        (at, at, "BAD_SPAN"),
        (instant(life.moments[2].at), at, "BAD_SPAN"),
        (early, None, "AS_OF_BEFORE_OPENING"),
        (None, early, "AS_OF_BEFORE_OPENING"),
        (future, None, "AS_OF_IN_FUTURE"),
        (None, future, "AS_OF_IN_FUTURE"),
    ):
        assert await gateway.codes(REALIZED, {"id": life.id, "from": begin, "to": end}) == [code]


async def test_today_is_what_the_mark_includes_since_its_cut(gateway: Gateway, life: Life) -> None:
    cut, last = life.moments[1], life.moments[-1]
    await mark(gateway, life, day_cut_at_ns=to_ns(cut.at), as_of_ns=to_ns(last.at))
    today = (await gateway.ask(TODAY, {"id": life.id}))["portfolio"]["realizedToday"]
    assert today["gross"] == text(last.figures["realized"] - cut.figures["realized"])
    assert today["net"] == text(last.figures["realized"] - cut.figures["realized"] - last.figures["fees"] + 1_000_000)
    assert (today["from"], today["to"]) == (instant(cut.at), instant(last.at))
    # What the mark does not include yet is not in it: the last entry is the interest.
    await mark(gateway, life, lag=1, day_cut_at_ns=to_ns(cut.at))
    before = (await gateway.ask(TODAY, {"id": life.id}))["portfolio"]["realizedToday"]
    assert (today["income"], before["income"]) == ("8.750001", "8.75")


async def test_today_begins_where_the_baseline_was_taken(gateway: Gateway, life: Life) -> None:
    """An entry booked just before the cut may not have been in it."""
    cut = life.moments[1]
    await gateway.ledger.pool.execute(
        "INSERT INTO day_baseline VALUES ($1, $2, 0, 2, '{}', '{}', false)", life.id, cut.at
    )
    await mark(gateway, life, day_cut_at_ns=to_ns(cut.at))
    today = (await gateway.ask(TODAY, {"id": life.id}))["portfolio"]["realizedToday"]
    assert today["fees"] == text(life.moments[-1].figures["fees"])


async def test_today_waits_for_a_mark(gateway: Gateway, portfolio_id: str) -> None:
    assert await gateway.codes(TODAY, {"id": portfolio_id}) == ["NOT_READY"]
