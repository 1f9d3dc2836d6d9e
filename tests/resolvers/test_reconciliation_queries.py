"""What the reconciler found last, over the real gateway."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from tests.gateway import Gateway

QUERY = """query($id: String!) { portfolio(portfolioId: $id) {
    reconciliation { checkedAt ledgerSequence driftAbs status figures } } }"""
CHECKED_AT = datetime(2026, 11, 20, 15, 0, 0, 250_000, UTC)


async def ask(gateway: Gateway, portfolio_id: str) -> Any:
    return (await gateway.ask(QUERY, {"id": portfolio_id}))["portfolio"]["reconciliation"]


async def checked(gateway: Gateway, portfolio_id: str, status: str, drift: str, figures: list[str]) -> None:
    await gateway.ledger.pool.execute(
        "INSERT INTO reconciliation (portfolio_id, checked_at, epoch, sequence, ledger_sequence, drift_abs, status,"
        " figures) VALUES ($1, $2, 3, 7, 12, $3, $4, $5)",
        portfolio_id,
        CHECKED_AT,
        Decimal(drift),
        status,
        figures,
    )


async def test_a_portfolio_that_was_never_checked(gateway: Gateway, portfolio_id: str) -> None:
    assert await ask(gateway, portfolio_id) == {
        "checkedAt": None,
        "ledgerSequence": None,
        "driftAbs": None,
        "status": "NEVER_CHECKED",
        "figures": [],
    }


@pytest.mark.parametrize(
    ("status", "drift", "figures"),
    [
        ("AGREED", "0", []),
        ("REPAIRED", "0", []),
        ("DRIFTED", "1.000001", ["hot position AAPL", "nav"]),
        ("BROKEN_LEDGER", "0", ["ledger"]),
    ],
)
async def test_the_last_check(gateway: Gateway, portfolio_id: str, status: str, drift: str, figures: list[str]) -> None:
    await checked(gateway, portfolio_id, status, drift, figures)
    assert await ask(gateway, portfolio_id) == {
        "checkedAt": "2026-11-20T15:00:00.250000Z",
        "ledgerSequence": 12,
        "driftAbs": drift,
        "status": status,
        "figures": figures,
    }


async def test_it_is_the_owners_to_see(gateway: Gateway, portfolio_id: str) -> None:
    answer = (await gateway.post(QUERY, {"id": portfolio_id}, gateway.token("bob"))).json()
    assert answer["data"] == {"portfolio": None}
    assert answer["errors"][0]["extensions"] == {"code": "NOT_FOUND"}
