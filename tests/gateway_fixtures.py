"""Fixtures of a running gateway; a conftest that wants them imports them."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.gateway import Gateway, gateway_of, make_settings

_shards = itertools.count(100)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(valkey_url: str, database: str) -> AsyncIterator[Gateway]:
    """A gateway that a module's tests share; each test has its own portfolio on its own shard."""
    async with gateway_of(make_settings(valkey_url, database, heartbeat_interval_s=1, send_timeout_s=2)) as running:
        yield running


@pytest.fixture
def shard() -> int:
    """A shard that no other test uses."""
    return next(_shards)


@pytest_asyncio.fixture(loop_scope="session")
async def portfolio_id(gateway: Gateway, shard: int) -> str:
    """A portfolio of ann's on that shard, booked but without a mark."""
    name = f"p-{uuid.uuid4().hex[:8]}"
    await gateway.ledger.portfolio(name, "ann", shard)
    return name
