"""A ledger entry: one event, booked. The ledger is the truth; every other state is derived from it.

    cash_after   = cash before + amount − fee
    hash         = SHA-256(hash of the portfolio's entry before || this entry's content)        (`chain_hash`)

`amount` is the cash effect without the fee: −quantity × price for a BUY, +quantity × price for a SELL, signed by
kind for cash movements (WITHDRAWAL and FEE are negative), 0 for OPEN, SPLIT and DIVIDEND_ACCRUED. `receivable` is
the effect on what is owed to the portfolio: a dividend is accrued on its ex-date and moves to cash when it is paid.
`realized` is the gross P&L that the entry realised, `cost` what it did to the position's cost. `sequence` counts a
portfolio's entries from 1 without gaps. Amounts are micro-units (10⁻⁶ of the base currency).

Two figures depend on prices and are kept because nothing else could tell them later:

    nav_before   on external flows: the NAV that the time-weighted return is cut at
    nav_effect   what the entry itself did to NAV at the prices of its booking:
                 amount − fee + receivable + change of the position's value
                 FILL: trading effect − fee       SPLIT: 0 but for rounding, or when it came late

A reversal (`reverses` names the event) is an entry of the same kind with every effect negated; the ledger keeps both.
`scale` is a ratio new:old of shares: that of a SPLIT, whose `quantity` is the signed change of the position; or, on
a fill executed before a split that was booked first, what turns its `quantity` into today's shares. `late` marks a
corporate action that arrived after its effective instant and counts from its arrival.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from operator import attrgetter
from typing import Any

import msgspec

from engine.amounts import plain
from engine.instants import to_ns

CHAIN_START = bytes(32)


class LedgerKind(StrEnum):
    OPEN = "OPEN"
    FILL = "FILL"
    DEPOSIT = "DEPOSIT"
    WITHDRAWAL = "WITHDRAWAL"
    REWARD = "REWARD"
    FEE = "FEE"
    INTEREST = "INTEREST"
    DIVIDEND = "DIVIDEND"
    SPLIT = "SPLIT"
    DIVIDEND_ACCRUED = "DIVIDEND_ACCRUED"
    DIVIDEND_PAID = "DIVIDEND_PAID"


# They move NAV, never P&L or returns.
EXTERNAL_FLOWS = frozenset({LedgerKind.DEPOSIT, LedgerKind.WITHDRAWAL, LedgerKind.REWARD})
INCOME = frozenset({LedgerKind.INTEREST, LedgerKind.DIVIDEND, LedgerKind.DIVIDEND_ACCRUED})
OUTGOING = frozenset({LedgerKind.WITHDRAWAL, LedgerKind.FEE})
# What `corporate-actions` brings; a reversal is for what `portfolio-events` brought.
CORPORATE = frozenset({LedgerKind.SPLIT, LedgerKind.DIVIDEND_ACCRUED, LedgerKind.DIVIDEND_PAID})


class Side(StrEnum):
    BUY = "BUY"
    SELL = "SELL"


class LedgerEntry(msgspec.Struct, frozen=True, gc=False):
    portfolio_id: str
    sequence: int
    event_id: str
    kind: LedgerKind
    symbol: str | None
    side: Side | None
    quantity: Decimal | None
    price: Decimal | None
    scale: Fraction | None
    amount: int
    fee: int
    receivable: int
    realized: int
    cost: int
    nav_effect: int
    cash_after: int
    nav_before: int | None
    effective_at: datetime
    recorded_at: datetime
    late: bool
    reference: str | None
    reverses: str | None
    content_hash: bytes
    hash: bytes


def chain_hash(previous: bytes, entry: LedgerEntry) -> bytes:
    """32 bytes over the hash before and all of the entry's content but its own hash.

    Fields are joined in the order of LedgerEntry by the byte 0x1F, which no text of ours contains; amounts in
    micro-units, instants in microseconds since 1970, absent ones empty.
    """
    fields = [_CANONICAL[type(value)](value) for value in _hashed(entry)]
    return hashlib.sha256(previous + b"\x1f".join(fields)).digest()


def write_scale(scale: Fraction) -> str:
    """A ratio as `new:old`."""
    return f"{scale.numerator}:{scale.denominator}"


_hashed = attrgetter(*(name for name in LedgerEntry.__struct_fields__ if name != "hash"))


def _instant(value: datetime) -> bytes:
    return b"%d" % (to_ns(value) // 1_000)


def _whole(value: int) -> bytes:
    return b"%d" % value


_CANONICAL: Mapping[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"",
    bool: _whole,
    int: _whole,
    str: str.encode,
    LedgerKind: str.encode,
    Side: str.encode,
    bytes: lambda value: value.hex().encode(),
    Decimal: lambda value: plain(value).encode(),
    Fraction: lambda value: write_scale(value).encode(),
    datetime: _instant,
}
