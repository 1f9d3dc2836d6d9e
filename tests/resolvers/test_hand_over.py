"""Who sends a stream's messages: the operation's own delivery where there is one that can, else graphql-core."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.marks import Mark, decode_mark
from engine.runtime.settings import Settings
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, Info, LiveDelivery
from resolvers.schema import make_schema
from resolvers.streams import INTERVAL_MAX_S
from tests.builders import MICRO, MarkRow

SCHEMA = make_schema()
PORTFOLIO = PortfolioIdentity("p-1", 7, "ann", "name", "USD", datetime(2026, 1, 1, tzinfo=UTC))
QUERIES = [
    'subscription($rate: Float) { navUpdates(portfolioId: "p-1", maxRateHz: $rate) { nav } }',
    'subscription($rate: Float) { pnlUpdates(portfolioId: "p-1", maxRateHz: $rate) { fees } }',
]


@dataclass
class RecordedDelivery:
    """Takes over what it has a projection for, and ends at once."""

    projection: object | None
    compiled: list[str] = field(default_factory=list)
    delivered: list[tuple[PortfolioIdentity, object, float]] = field(default_factory=list)
    waits: bool = False
    cancelled: bool = False

    def compile(self, info: Info) -> object | None:
        self.compiled.append(info.field_name)
        return self.projection

    async def deliver(self, portfolio: PortfolioIdentity, projection: object, interval_s: float) -> None:
        self.delivered.append((portfolio, projection, interval_s))
        try:
            await asyncio.sleep(60 if self.waits else 0)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


class OneMark:
    """A hub on which every portfolio has one mark."""

    current = True

    def watch_portfolio(self, _: int, __: str, signal: asyncio.Event) -> AbstractContextManager[OneMark]:
        signal.set()
        return nullcontext(self)

    def take(self) -> tuple[Mark, int]:
        return decode_mark(MarkRow(nav=5 * MICRO, fees=3 * MICRO).pack(), 1), 1


def context_of(live: LiveDelivery | None) -> Context:
    async def find(_: str) -> PortfolioIdentity:
        return PORTFOLIO

    services = SimpleNamespace(hub=OneMark(), settings=Settings(), portfolios=SimpleNamespace(find=find))
    access = SimpleNamespace(holds=lambda scope: True, may_see=lambda owner: owner == "ann")
    return Context(cast(Any, services), cast(Any, None), cast(Any, None), cast(Any, access), "r", True, live)


async def first(query: str, live: LiveDelivery | None, **variables: object) -> Any:
    """The first result of the operation; None when it ended without one."""
    results = cast(Any, await SCHEMA.stream(query, variable_values=variables, context_value=context_of(live)))
    async for result in results:
        await results.aclose()
        return result
    return None


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(
    ("variables", "interval_s"),
    [({}, 0.25), ({"rate": None}, 0.25), ({"rate": 8.0}, 0.125), ({"rate": 1e-310}, INTERVAL_MAX_S)],
)
async def test_a_delivery_that_compiles_the_selection_takes_over(
    query: str, variables: dict[str, object], interval_s: float
) -> None:
    projection = object()
    live = RecordedDelivery(projection)
    assert await first(query, live, **variables) is None
    assert live.delivered == [(PORTFOLIO, projection, interval_s)]


@pytest.mark.parametrize("query", QUERIES)
async def test_what_it_can_not_compile_is_sent_by_graphql_core(query: str) -> None:
    live = RecordedDelivery(None)
    result = await first(query, live)
    assert result.errors is None
    assert next(iter(result.data.values())) in ({"nav": "5"}, {"fees": "3"})
    assert len(live.compiled) == 1
    assert live.delivered == []


@pytest.mark.parametrize("query", QUERIES)
async def test_without_a_delivery_graphql_core_sends(query: str) -> None:
    assert (await first(query, None)).errors is None


@pytest.mark.parametrize("query", QUERIES)
async def test_nothing_is_handed_over_before_the_arguments_are_checked(query: str) -> None:
    live = RecordedDelivery(object())
    result = await first(query, live, rate=1e9)
    assert [error.extensions["code"] for error in result.errors] == ["BAD_RATE"]
    assert live.compiled == live.delivered == []


@pytest.mark.parametrize("query", QUERIES)
async def test_cancelling_the_operation_ends_the_delivery(query: str) -> None:
    live = RecordedDelivery(object(), waits=True)
    running = asyncio.create_task(first(query, live))
    while not live.delivered:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert live.cancelled
