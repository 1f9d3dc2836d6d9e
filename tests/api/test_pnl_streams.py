"""What rides on pnlUpdates: why NAV changed since the last message of this very subscription."""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal
from typing import Any

from tests.builders import MICRO, MarkRow
from tests.gateway import Gateway, Stream

CHANGE = "change { nav price trading fees income flows corporateActions }"
QUERY = f"""subscription($id: String!, $rate: Float) {{ pnlUpdates(portfolioId: $id, maxRateHz: $rate) {{
    kind conflated sequence {CHANGE} }} }}"""
FAST_HZ = 20
PARTS = ("price", "trading", "fees", "income", "flows", "corporateActions")


async def begin(gateway: Gateway, shard: int, portfolio_id: str, epoch: int = 1) -> MarkRow:
    row = MarkRow(nav=1_000 * MICRO, trading=-7 * MICRO, income=2 * MICRO, flows=900 * MICRO, corporate=1)
    await gateway.redis.point(shard, epoch)
    await gateway.redis.marks(shard, epoch, {portfolio_id: row})
    return row


def change(**parts: str) -> dict[str, str]:
    shown = {name: parts.get(name, "0") for name in PARTS}
    return {"nav": str(sum(Decimal(part) for part in shown.values())), **shown}


async def test_an_update_explains_what_changed(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id, "rate": FAST_HZ})
        first = await stream.next()
        assert (first["kind"], first["change"]) == ("SNAPSHOT", None)
        ticked = row.at(2, nav=row.nav + 30 * MICRO)
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: ticked})
        assert (await stream.next())["change"] == change(price="30")
        everything = ticked.at(
            3,
            nav=ticked.nav + (-5 - 2 + 10 + 100 - 3) * MICRO + 4,
            trading=row.trading - 5 * MICRO,
            fees=row.fees + 2 * MICRO,
            income=row.income + 10 * MICRO,
            flows=row.flows + 100 * MICRO,
            corporate=row.corporate + 4,
        )
        await gateway.redis.flush(shard, 1, 3, {portfolio_id: everything})
        assert (await stream.next())["change"] == change(
            price="-3", trading="-5", fees="-2", income="10", flows="100", corporateActions="0.000004"
        )


async def test_parts_sum_between_any_two_messages_however_many_marks_were_conflated(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    row, chance = await begin(gateway, shard, portfolio_id), random.Random(3)
    start, seen = row, []
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id, "rate": 10})
        assert (await stream.next())["kind"] == "SNAPSHOT"
        for sequence in range(2, 80):
            moved = {name: chance.randint(-9_999_999, 9_999_999) for name in ("nav", "trading", "income", "flows")}
            row = row.at(sequence, **{name: getattr(row, name) + by for name, by in moved.items()})
            await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row})
            await asyncio.sleep(0.005)
        while not seen or seen[-1]["sequence"] < 79:
            seen.append(await stream.next())
    assert len(seen) < 60
    assert sum(one["conflated"] for one in seen) == 78
    for one in seen:
        assert one["kind"] == "UPDATE"
        assert sum(Decimal(one["change"][name]) for name in PARTS) == Decimal(one["change"]["nav"])
    total = {name: sum(Decimal(one["change"][name]) for one in seen) for name in ("nav", *PARTS)}
    for name in ("nav", "trading", "income", "flows"):
        assert total[name] * MICRO == getattr(row, name) - getattr(start, name)


async def test_the_same_change_twice_is_two_messages_and_no_change_is_none(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    row = await begin(gateway, shard, portfolio_id)
    query = f"subscription($id: String!) {{ pnlUpdates(portfolioId: $id, maxRateHz: 20) {{ kind {CHANGE} }} }}"
    async with gateway.socket() as socket:
        stream = await socket.subscribe(query, {"id": portfolio_id})
        await stream.next()
        for sequence in (2, 3):
            row = row.at(sequence, nav=row.nav + 5 * MICRO)
            await gateway.redis.flush(shard, 1, sequence, {portfolio_id: row})
            assert (await stream.next())["change"] == change(price="5")
        await gateway.redis.flush(shard, 1, 4, {portfolio_id: row.at(4, day_pnl=row.day_pnl + 1)})
        assert await stream.silent(0.4)
        assert await next_of(stream, "HEARTBEAT") == {"kind": "HEARTBEAT", "change": None}
        await gateway.redis.flush(shard, 1, 5, {portfolio_id: row.at(5, nav=row.nav - MICRO)})
        assert (await next_of(stream, "UPDATE"))["change"] == change(price="-1")


async def test_what_was_not_worth_a_message_is_part_of_the_next(
    gateway: Gateway, shard: int, portfolio_id: str
) -> None:
    """Marks that change nothing selected are not sent: the next message's change is since the last one sent."""
    row = await begin(gateway, shard, portfolio_id)
    query = """subscription($id: String!) { pnlUpdates(portfolioId: $id, maxRateHz: 20) { kind realizedPnl } }"""
    both = f"""subscription($id: String!) {{ pnlUpdates(portfolioId: $id, maxRateHz: 20) {{ kind {CHANGE} }} }}"""
    async with gateway.socket() as socket:
        plain = await socket.subscribe(query, {"id": portfolio_id})
        stream = await socket.subscribe(both, {"id": portfolio_id})
        await plain.next(), await stream.next()
        await gateway.redis.flush(shard, 1, 2, {portfolio_id: row.at(2, nav=row.nav + MICRO)})
        assert (await stream.next())["change"] == change(price="1")
        realized = row.at(3, nav=row.nav + 3 * MICRO, realized=row.realized + MICRO)
        await gateway.redis.flush(shard, 1, 3, {portfolio_id: realized})
        assert (await plain.next())["kind"] == "UPDATE"
        assert (await stream.next())["change"] == change(price="2")


async def test_after_a_take_over_changes_count_from_the_reset(gateway: Gateway, shard: int, portfolio_id: str) -> None:
    row = await begin(gateway, shard, portfolio_id)
    async with gateway.socket() as socket:
        stream = await socket.subscribe(QUERY, {"id": portfolio_id, "rate": FAST_HZ})
        await stream.next()
        await gateway.redis.point(shard, 2)
        fresh = row.at(1, nav=row.nav + 50 * MICRO)
        await gateway.redis.flush(shard, 2, 1, {portfolio_id: fresh})
        reset = await next_of(stream, "RESET")
        assert reset["change"] is None
        await gateway.redis.flush(shard, 2, 2, {portfolio_id: fresh.at(2, nav=fresh.nav + 6 * MICRO)})
        assert (await next_of(stream, "UPDATE"))["change"] == change(price="6")


async def next_of(stream: Stream, kind: str) -> Any:
    while (message := await stream.next())["kind"] != kind:
        pass
    return message
