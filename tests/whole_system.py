"""What the whole system shows at the end, compared with the oracle's fold of the events sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import pytest

from engine.marks import Mark, MarkQuality
from engine.positions import hot_position_decoder
from engine.sectors import sector_value_decoder
from engine.stores import redis_keys
from tests.bookkeeping import MARK_FIELDS, fill
from tests.oracle import Oracle
from tests.oracle import Portfolio as OraclePortfolio
from tests.random_events import SECTORS, Stream
from tests.running_system import System, eventually

SETTLE_TIMEOUT_S = 30


async def produce(system: System, records: list[tuple[str, bytes]]) -> None:
    topic = system.settings.topic
    waiting = [await system.producer.send(topic, value, key=key.encode()) for key, value in records]
    await asyncio.gather(*waiting)


async def finish(system: System, stream: Stream) -> None:
    """Last quotes for every symbol, then a last fill for everyone, so that sectors stand at the last prices."""
    for symbol in SECTORS:
        await system.quote(symbol, f"{stream.prices[symbol] / 100:.2f}")
        stream.oracle.tick(symbol, f"{stream.prices[symbol] / 100:.2f}")
    await all_settled(system, stream.oracle)
    for name in stream.names:
        event = fill(name, "BUY", "1", "10", stream.fresh_id() + name, "SIM1")
        await produce(system, [stream.good_or_refused(event)])
    await all_settled(system, stream.oracle)
    stream.oracle.check()


async def all_settled(system: System, oracle: Oracle) -> None:
    """Every portfolio's mark includes all its entries and the last prices; fails with what is left to wait for."""

    async def ready() -> bool | None:
        return not await unsettled(system, oracle) or None

    await eventually(ready, SETTLE_TIMEOUT_S, lambda: unsettled(system, oracle))


async def unsettled(system: System, oracle: Oracle) -> list[tuple[str, Any, Any]]:
    left = []
    for name, portfolio in oracle.portfolios.items():
        mark, figures = await system.mark(name), portfolio.figures(oracle.prices)
        if mark is None or (mark.ledger_sequence, mark.nav) != (figures.ledger_sequence, figures.nav):
            left.append((name, mark and (mark.ledger_sequence, mark.nav), (figures.ledger_sequence, figures.nav)))
    return left


async def assert_hot_state(system: System, oracle: Oracle) -> None:
    """Positions and sectors are written after the marks that have them: they are given the time."""
    last_s = time.monotonic() + SETTLE_TIMEOUT_S
    for name, portfolio in oracle.portfolios.items():
        while True:
            try:
                await assert_portfolio(system, oracle, name, portfolio)
                break
            except AssertionError:
                if time.monotonic() >= last_s:
                    raise
            await asyncio.sleep(0.1)


async def assert_portfolio(system: System, oracle: Oracle, name: str, portfolio: OraclePortfolio) -> None:
    mark = await system.mark(name)
    assert mark is not None
    assert_mark(mark, portfolio.figures(oracle.prices))
    # What fills did depends on the prices that each of them met, which the ledger alone knows.
    traded = await system.pool.fetchval(
        "SELECT sum(nav_effect + fee) FROM ledger_entry WHERE portfolio_id = $1 AND kind = 'FILL'", name
    )
    assert mark.trading == (traded or 0) * 10**6
    shard = await system.shard_of(name)
    packed = await system.redis.hgetall(redis_keys.positions(shard, name))
    positions = {symbol.decode(): hot_position_decoder.decode(value) for symbol, value in packed.items()}
    found = {s: (p.quantity, p.cost, p.realized, p.day_base, p.fees, p.opened_sequence) for s, p in positions.items()}
    assert found == {
        s: (plain_text(p.quantity), p.cost, p.realized, portfolio.day.traded[s], p.fees, p.opened_sequence)
        for s, p in portfolio.positions.items()
    }
    await assert_sectors(system, shard, name, portfolio.sectors(oracle.prices, SECTORS))


def assert_mark(mark: Mark, figures: Any) -> None:
    for name in {*MARK_FIELDS, "ledger_sequence"} - {"trading"}:
        assert getattr(mark, name) == getattr(figures, name), name
    assert mark.quality is MarkQuality.LIVE


async def assert_sectors(system: System, shard: int, name: str, expected: dict[str, tuple[int, int]]) -> None:
    packed = await system.redis.hgetall(redis_keys.sector_values(shard, name))
    values = {sector.decode(): sector_value_decoder.decode(value) for sector, value in packed.items()}
    assert {sector: (value.value, value.gross) for sector, value in values.items()} == expected
    weights = dict(await system.redis.zrange(redis_keys.sectors(shard, name), 0, -1, withscores=True))
    whole = sum(gross for _, gross in expected.values())
    assert {sector.decode(): weight for sector, weight in weights.items()} == {
        sector: pytest.approx(gross / whole) for sector, (_, gross) in expected.items()
    }


async def assert_ledger(system: System, oracle: Oracle, actions: Mapping[str, bool]) -> None:
    """Each booked event once, sequences without a gap, and these actions, each with whether it was late."""
    rows = await system.pool.fetch("SELECT portfolio_id, sequence, event_id, late FROM ledger_entry ORDER BY 1, 2")
    assert sorted(row["event_id"] for row in rows if "#" not in row["event_id"]) == sorted(oracle.recorded)
    of_actions = {row["event_id"].partition("#")[0]: row["late"] for row in rows if "#" in row["event_id"]}
    assert of_actions == actions
    sequences: dict[str, list[int]] = {}
    for row in rows:
        sequences.setdefault(row["portfolio_id"], []).append(row["sequence"])
    assert sequences == {name: list(range(1, p.entries + 1)) for name, p in oracle.portfolios.items()}


def plain_text(exact: Any) -> str:
    """The shortest plain decimal of an exact number with at most 12 decimals."""
    sign, scaled = ("-" if exact < 0 else ""), abs(int(exact * 10**12))
    whole, rest = divmod(scaled, 10**12)
    return f"{sign}{whole}.{rest:012}".rstrip("0").rstrip(".")
