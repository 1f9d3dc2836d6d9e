"""What the API remembers of portfolios."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import cast

import pytest

from engine.stores.ledger_reads import LedgerReads, PortfolioIdentity
from resolvers import loaders
from resolvers.loaders import PortfolioDirectory

OPENED_AT = datetime(2026, 11, 1, tzinfo=UTC)


class Ledger:
    """So many portfolios, and which of them were asked for one by one."""

    def __init__(self, count: int) -> None:
        self.identities = [PortfolioIdentity(f"p-{n:03d}", 0, "ann", "", "USD", OPENED_AT) for n in range(count)]
        self.asked: list[str] = []

    async def portfolio(self, portfolio_id: str) -> PortfolioIdentity | None:
        self.asked.append(portfolio_id)
        return next((one for one in self.identities if one.portfolio_id == portfolio_id), None)

    async def portfolios(self, _: str | None, count_max: int, after: str = "") -> list[PortfolioIdentity]:
        return [one for one in self.identities if one.portfolio_id > after][:count_max]


def directory(ledger: Ledger) -> PortfolioDirectory:
    return PortfolioDirectory(cast(LedgerReads, ledger))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "DIRECTORY_PAGE_COUNT", 10)
    monkeypatch.setattr(loaders, "DIRECTORY_COUNT_MAX", 40)


@pytest.mark.parametrize("count", [0, 9, 10, 25, 40])
async def test_a_filled_directory_asks_for_what_is_not_there_alone(count: int) -> None:
    ledger = Ledger(count)
    portfolios = directory(ledger)
    await portfolios.fill()
    found = [await portfolios.find(one.portfolio_id) for one in ledger.identities]
    assert found == ledger.identities and not ledger.asked
    assert await portfolios.find("p-999") is None
    assert ledger.asked == ["p-999"]


async def test_what_there_is_no_room_for_is_asked_for_and_remembered() -> None:
    ledger = Ledger(60)
    portfolios = directory(ledger)
    await portfolios.fill()
    for _ in range(2):
        assert await portfolios.find("p-059") == ledger.identities[59]
    assert ledger.asked == ["p-059"]
    # The one that was not asked for the longest time made room.
    assert await portfolios.find("p-000") == ledger.identities[0]
    assert ledger.asked == ["p-059", "p-000"]
