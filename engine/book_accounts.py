"""What enters the Book: a portfolio's own figures, and its open positions. Amounts in micro-units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.pnl import DayBase

# The Account's fields by name, and its day's as "day_base", "day_factor" (NaN when unknown) and "segment_base".
AccountArrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Holding:
    """One open position as it enters the Book."""

    symbol: str
    quantity: Decimal
    cost: int
    day_base: int


@dataclass(frozen=True, slots=True)
class Account:
    """A portfolio's own figures as they enter the Book."""

    cash: int
    receivables: int
    realized: int
    fees: int
    income: int
    flows: int
    trading: int
    corporate: int
    ledger_sequence: int
    day: DayBase


def account_at(accounts: AccountArrays, place: int) -> Account:
    """One of many accounts."""
    of = {name: array[place].item() for name, array in accounts.items()}
    factor = of.pop("day_factor")
    day = DayBase(of.pop("day_base"), None if np.isnan(factor) else factor, of.pop("segment_base"))
    return Account(day=day, **of)
