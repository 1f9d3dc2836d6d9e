"""A ledger entry: one event, booked. The ledger is the truth; every other state is derived from it.

    cash_after = cash before + amount − fee

`amount` is the cash effect without the fee: −quantity × price for a BUY, +quantity × price for a SELL, signed by
kind for cash movements (WITHDRAWAL and FEE are negative), 0 for OPEN. `realized` is the gross P&L that a fill
realised. `sequence` counts a portfolio's entries from 1 without gaps. `nav_before` stands on external flows: the
NAV that the time-weighted return is cut at. Amounts are micro-units (10⁻⁶ of the base currency).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum


class LedgerKind(StrEnum):
    OPEN = "OPEN"
    FILL = "FILL"
    DEPOSIT = "DEPOSIT"
    WITHDRAWAL = "WITHDRAWAL"
    REWARD = "REWARD"
    FEE = "FEE"
    INTEREST = "INTEREST"
    DIVIDEND = "DIVIDEND"


# They move NAV, never P&L or returns.
EXTERNAL_FLOWS = frozenset({LedgerKind.DEPOSIT, LedgerKind.WITHDRAWAL, LedgerKind.REWARD})
INCOME = frozenset({LedgerKind.INTEREST, LedgerKind.DIVIDEND})
OUTGOING = frozenset({LedgerKind.WITHDRAWAL, LedgerKind.FEE})


class Side(StrEnum):
    BUY = "BUY"
    SELL = "SELL"


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    portfolio_id: str
    sequence: int
    event_id: str
    kind: LedgerKind
    symbol: str | None
    side: Side | None
    quantity: Decimal | None
    price: Decimal | None
    amount: int
    fee: int
    realized: int
    cash_after: int
    nav_before: int | None
    effective_at: datetime
    recorded_at: datetime
    reference: str | None
    content_hash: bytes
