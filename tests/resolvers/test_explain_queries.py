"""Why NAV changed, over the real gateway: explain of a scripted life, and contribution beside performance."""

from __future__ import annotations

import random
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import pytest_asyncio

from engine.amounts import from_micro, plain
from engine.assets import Asset, AssetClass
from engine.stores import redis_keys
from engine.stores.assets_postgres import upsert_assets
from tests.builders import MICRO, MarkRow
from tests.gateway import Gateway
from tests.scripted_ledger import Moment, ScriptedLedger

PARTS = "parts { price trading fees income flows corporateActions }"
EXPLAIN = f"""query($id: String!, $a: DateTime!, $b: DateTime) {{ portfolio(portfolioId: $id) {{
    valuation {{ nav quality }} explain(from: $a, to: $b) {{
    from to ledgerSequenceFrom ledgerSequenceTo qualityFrom qualityTo total {{ navFrom navTo navChange pnl {PARTS} }}
    rows {{ asset {{ symbol }} assetsCount valueFrom valueTo pnl {PARTS} }} }} }} }}"""
SHARE = "{ key asset { symbol } pnl share }"
CONTRIBUTION = f"""query($id: String!, $range: EquityCurveRange!) {{ portfolio(portfolioId: $id) {{ valuation {{ nav }}
    equityCurve(range: $range) {{ points {{ nav }} }}
    performance(range: $range) {{ contribution {{ total reason byAsset {SHARE} bySector {SHARE}
    byAssetClass {SHARE} }} }} }} }}"""
HOUR = timedelta(hours=1)
NAMES = ("price", "trading", "fees", "income", "flows", "corporateActions")


class Life(ScriptedLedger):
    moments: list[Moment]


def text(micro: int) -> str:
    return plain(from_micro(micro))


def numbers(parts: dict[str, str]) -> dict[str, Decimal]:
    return {name: Decimal(parts[name]) for name in NAMES}


@pytest_asyncio.fixture(loop_scope="session")
async def life(gateway: Gateway, shard: int) -> Life:
    """Five days of hours up to the last full one, of everything that can be booked, each hour recorded with its
    snapshot; live at the last quotes."""
    name = f"p-{uuid.uuid4().hex[:8]}"
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    begin, chance = now - timedelta(days=5), random.Random(11)
    script, symbols = Life(name, begin), [f"{name}.{letter}" for letter in "ABC"]
    script.moments = []
    script.cash("DEPOSIT", "50000")
    for hour in range(1, 121):
        script.at = begin + hour * HOUR - timedelta(minutes=20)
        for symbol in symbols:
            if hour == 1 or chance.random() < 0.7:
                script.quote(symbol, str(chance.randint(80, 120)))
        if hour == 1:
            script.fill(symbols[0], "BUY", "7", "99.5")
        symbol = chance.choice(symbols)
        match chance.randrange(8):
            case 0:
                script.cash(chance.choice(["DEPOSIT", "WITHDRAWAL", "REWARD", "FEE", "INTEREST"]), "31.5")
            case 1 if hour > 20:
                script.split(symbol, chance.choice([Fraction(2), Fraction(1, 2)]))
            case 2:
                script.accrue(symbol, "0.37")
            case 3:
                script.reverse(chance.choice(script.entries))
            case _:
                script.fill(symbol, chance.choice(["BUY", "SELL"]), str(chance.randint(1, 9)), "99.5", fee="1.25")
        script.pay() if hour % 9 == 0 else None
        script.at = begin + hour * HOUR
        script.record()
        script.moments.append(script.moment())
    await gateway.ledger.portfolio(name, "ann", shard, opened_at=begin)
    await script.write(gateway.ledger.pool)
    for moment in script.moments:
        await gateway.ledger.snapshots(name, {moment.at: text(moment.nav)}, moment.ledger_sequence)
    await gateway.redis.quotes(list(script.quotes.values()))
    await live(gateway, shard, script)
    return script


async def live(gateway: Gateway, shard: int, script: ScriptedLedger, more: int = 0) -> None:
    """The portfolio's mark: its NAV, and `more`."""
    await gateway.redis.point(shard, 1)
    row = MarkRow(nav=script.nav() + more, ledger_sequence=script.portfolio.ledger_sequence)
    await gateway.redis.marks(shard, 1, {script.portfolio_id: row})


async def ask(gateway: Gateway, life: Life, begin: datetime, end: datetime | None = None) -> Any:
    variables = {"id": life.portfolio_id, "a": begin.isoformat(), "b": end.isoformat() if end else None}
    return (await gateway.ask(EXPLAIN, variables))["portfolio"]["explain"]


def check_sums(explained: Any) -> None:
    total, rows = explained["total"], explained["rows"]
    parts = numbers(total["parts"])
    assert sum(parts.values()) == Decimal(total["navChange"]) == Decimal(total["navTo"]) - Decimal(total["navFrom"])
    assert Decimal(total["pnl"]) == Decimal(total["navChange"]) - parts["flows"]
    for name in NAMES:
        assert sum(Decimal(row["parts"][name]) for row in rows) == parts[name]
    for name, whole in (("valueFrom", "navFrom"), ("valueTo", "navTo"), ("pnl", "pnl")):
        assert sum(Decimal(row[name]) for row in rows) == Decimal(total[whole])


async def test_the_parts_sum_and_the_halves_add_up(gateway: Gateway, life: Life) -> None:
    for first, middle, last in ((0, 50, 119), (10, 11, 12), (30, 90, 110), (3, 100, 101)):
        a, b, c = (life.moments[at] for at in (first, middle, last))
        whole, one, other = [await ask(gateway, life, *span) for span in ((a.at, c.at), (a.at, b.at), (b.at, c.at))]
        for explained, begin, end in ((whole, a, c), (one, a, b), (other, b, c)):
            check_sums(explained)
            assert (explained["total"]["navFrom"], explained["total"]["navTo"]) == (text(begin.nav), text(end.nav))
            assert (explained["ledgerSequenceFrom"], explained["ledgerSequenceTo"]) == (
                begin.ledger_sequence, end.ledger_sequence,
            )  # fmt: skip
        halves = numbers(one["total"]["parts"]), numbers(other["total"]["parts"])
        assert numbers(whole["total"]["parts"]) == {name: halves[0][name] + halves[1][name] for name in NAMES}


async def test_the_parts_are_the_running_sums_of_the_portfolio(gateway: Gateway, life: Life) -> None:
    begin, end = life.moments[4], life.moments[117]
    parts = numbers((await ask(gateway, life, begin.at, end.at))["total"]["parts"])
    grown = {name: from_micro(end.figures[name] - begin.figures[name]) for name in end.figures}
    assert parts["trading"] == grown["trading"] != 0
    assert parts["fees"] == -grown["fees"] != 0
    assert parts["income"] == grown["income"] != 0
    assert parts["flows"] == grown["flows"] != 0
    assert parts["corporateActions"] == grown["corporate"]


async def test_from_the_opening_until_now(gateway: Gateway, life: Life) -> None:
    opened_at = life.moments[0].at - HOUR
    explained = await ask(gateway, life, opened_at)
    check_sums(explained)
    # Both were booked at the opening's own instant.
    assert (explained["ledgerSequenceFrom"], explained["total"]["navFrom"]) == (2, "50000")
    assert explained["total"]["navTo"] == text(life.moments[-1].nav)
    assert explained["rows"][-1]["asset"] is None
    ranked = [abs(Decimal(row["pnl"])) for row in explained["rows"][:-1]]
    assert ranked == sorted(ranked, reverse=True)
    held = [row["asset"]["symbol"] for row in explained["rows"][:-1]]
    assert sorted(held) == [f"{life.portfolio_id}.{letter}" for letter in "ABC"]
    assert [row["assetsCount"] for row in explained["rows"]] == [1, 1, 1, 0]


async def test_now_is_the_mark_even_when_a_quote_is_newer(gateway: Gateway, life: Life, shard: int) -> None:
    """The mark's NAV is what the valuation beside it shows; what it differs by is that quote's doing."""
    symbol = f"{life.portfolio_id}.A"
    held = life.portfolio.positions[symbol].quantity
    nav = life.nav()
    before = await ask(gateway, life, life.moments[50].at)
    life.at = datetime.now(UTC)
    life.quote(symbol, "777")
    await gateway.redis.quotes([life.quotes[symbol]])
    assert life.nav() != nav
    after = await ask(gateway, life, life.moments[50].at)
    assert held
    assert after["total"] == before["total"]
    assert sorted(after["rows"], key=str) == sorted(before["rows"], key=str)
    check_sums(after)


async def test_the_quality_of_the_prices_at_both_ends(gateway: Gateway, life: Life) -> None:
    begin, end = life.moments[40], life.moments[60]
    symbols = [f"{life.portfolio_id}.{letter}" for letter in "ABC"]
    await gateway.ledger.pool.execute(
        "UPDATE price_close SET condition = 'HALTED' WHERE at = $1 AND symbol = $2",
        *(end.at, next(symbol for symbol in symbols if symbol in end.positions)),
    )
    explained = await ask(gateway, life, begin.at, end.at)
    assert (explained["qualityFrom"], explained["qualityTo"]) == ("STALE", "HALTED")


async def test_spans_that_are_refused(gateway: Gateway, life: Life) -> None:
    opened_at, now = life.moments[0].at - HOUR, datetime.now(UTC)

    async def codes(begin: datetime, end: datetime | None) -> list[str]:
        variables = {"id": life.portfolio_id, "a": begin.isoformat(), "b": end.isoformat() if end else None}
        return await gateway.codes(EXPLAIN, variables)

    later = life.moments[5].at
    assert await codes(later, later) == ["BAD_SPAN"]
    assert await codes(later, later - HOUR) == ["BAD_SPAN"]
    assert await codes(opened_at - HOUR, later) == ["AS_OF_BEFORE_OPENING"]
    assert await codes(opened_at, opened_at - HOUR) == ["AS_OF_BEFORE_OPENING"]
    assert await codes(later, now + HOUR) == ["AS_OF_IN_FUTURE"]
    assert await codes(now + HOUR, None) == ["AS_OF_IN_FUTURE"]


async def test_until_now_needs_a_mark(gateway: Gateway, portfolio_id: str) -> None:
    variables = {"id": portfolio_id, "a": (datetime.now(UTC) - HOUR).isoformat()}
    query = EXPLAIN.replace("valuation { nav quality }", "")
    assert await gateway.codes(query, variables) == ["NOT_READY"]


# -- contribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["DAYS_7", "YEAR_1", "ALL"])
async def test_contribution_sums_to_the_ranges_profit(gateway: Gateway, life: Life, asked: str) -> None:
    letters = {"A": AssetClass.EQUITY, "B": AssetClass.EQUITY, "C": AssetClass.CRYPTO}
    await gateway.ledger.assets(
        [Asset(f"{life.portfolio_id}.{n}", n, kind, f"Sector {n}", "") for n, kind in letters.items()]
    )
    data = (await gateway.ask(CONTRIBUTION, {"id": life.portfolio_id, "range": asked}))["portfolio"]
    contribution = data["performance"]["contribution"]
    flows = Decimal(text(life.portfolio.flows))
    assert contribution["reason"] is None
    assert Decimal(contribution["total"]) == Decimal(data["valuation"]["nav"]) - flows
    for name in ("byAsset", "bySector", "byAssetClass"):
        rows = contribution[name]
        assert sum(Decimal(row["pnl"]) for row in rows) == Decimal(contribution["total"])
        assert abs(sum(Decimal(row["share"]) for row in rows) - 1) < Decimal("1e-8")
        assert rows[-1]["key"] is None
    by_asset = {row["key"]: Decimal(row["pnl"]) for row in contribution["byAsset"]}
    assert all(row["asset"]["symbol"] == row["key"] for row in contribution["byAsset"][:-1])
    explained = await ask(gateway, life, life.moments[0].at - HOUR)
    assert by_asset == {row["asset"] and row["asset"]["symbol"]: Decimal(row["pnl"]) for row in explained["rows"]}


async def test_contribution_is_by_the_classification_in_force_at_its_end(
    gateway: Gateway, life: Life, shard: int
) -> None:
    """Without a mark that is the last snapshot, with one it is now."""
    query = """query($id: String!) { portfolio(portfolioId: $id) { performance(range: ALL) { contribution {
        reason bySector { key } byAssetClass { key } } } } }"""
    then = Asset(f"{life.portfolio_id}.A", "A", AssetClass.EQUITY, "Then", "")
    await gateway.ledger.assets([then])
    now = replace(then, asset_class=AssetClass.CRYPTO, sector="Now")
    await upsert_assets(gateway.ledger.pool, [now], datetime.now(UTC))
    await gateway.application.services.assets.refresh()
    for marked, asset in ((False, then), (True, now)):
        if marked:
            await live(gateway, shard, life)
        else:
            await gateway.redis.redis.delete(redis_keys.marks(shard, 1))
        answer = await gateway.ask(query, {"id": life.portfolio_id})
        contribution = answer["portfolio"]["performance"]["contribution"]
        assert contribution["reason"] is None
        assert {row["key"] for row in contribution["bySector"]} == {asset.sector, "UNCLASSIFIED", None}
        assert {row["key"] for row in contribution["byAssetClass"]} == {asset.asset_class.value, "UNCLASSIFIED", None}


async def test_contribution_of_a_range_within_its_life(gateway: Gateway, life: Life, shard: int) -> None:
    """It begins at the range's first snapshot, at the prices recorded then."""
    week_ago = datetime.now(UTC) - timedelta(days=7)
    await gateway.ledger.pool.execute(
        "UPDATE portfolio SET opened_at = opened_at - interval '30 days' WHERE id = $1", life.portfolio_id
    )
    gateway.application.services.portfolios._known.pop(life.portfolio_id, None)
    first = life.moments[0]
    assert first.at > week_ago
    data = (await gateway.ask(CONTRIBUTION, {"id": life.portfolio_id, "range": "DAYS_7"}))["portfolio"]
    contribution = data["performance"]["contribution"]
    assert data["equityCurve"]["points"][0]["nav"] == text(first.nav)
    flows = life.portfolio.flows - first.figures["flows"]
    assert Decimal(contribution["total"]) == Decimal(text(life.nav() - first.nav - flows))
    assert sum(Decimal(row["pnl"]) for row in contribution["byAsset"]) == Decimal(contribution["total"])
    await live(gateway, shard, life, more=5 * MICRO)
    data = (await gateway.ask(CONTRIBUTION, {"id": life.portfolio_id, "range": "DAYS_7"}))["portfolio"]
    assert Decimal(data["performance"]["contribution"]["total"]) == Decimal(contribution["total"]) + 5


async def test_without_the_prices_of_its_beginning_it_says_so(gateway: Gateway, life: Life) -> None:
    await gateway.ledger.pool.execute(
        "UPDATE portfolio SET opened_at = opened_at - interval '30 days' WHERE id = $1", life.portfolio_id
    )
    gateway.application.services.portfolios._known.pop(life.portfolio_id, None)
    first = life.moments[0]
    assert first.positions
    await gateway.ledger.pool.execute(
        "DELETE FROM price_close WHERE at <= $1 AND symbol LIKE $2", first.at, f"{life.portfolio_id}.%"
    )
    data = (await gateway.ask(CONTRIBUTION, {"id": life.portfolio_id, "range": "DAYS_7"}))["portfolio"]
    assert data["performance"]["contribution"] == {
        "total": None, "reason": "PRICES_NOT_RECORDED", "byAsset": [], "bySector": [], "byAssetClass": [],
    }  # fmt: skip


async def test_a_range_without_points_has_no_contribution(gateway: Gateway, portfolio_id: str) -> None:
    query = CONTRIBUTION.replace("valuation { nav }", "")
    data = (await gateway.ask(query, {"id": portfolio_id, "range": "ALL"}))["portfolio"]
    contribution = data["performance"]["contribution"]
    assert (contribution["total"], contribution["reason"]) == (None, "NO_HISTORY")
