"""Which ledger entries a page or an export shows, and how PostgreSQL is asked for them.

Ranges hold their beginning and not their end; those of amounts hold both ends, and are of |amount|: a withdrawal of
500 and a deposit of 500 are the same amount. What is None does not restrict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal

from engine.ledger import LedgerKind, Side
from engine.messages import EventRejected, check_symbol

BAD_FILTER = "BAD_FILTER"
# Above what any number of the ledger has; PostgreSQL's own limit is far beyond.
DIGITS_MAX = 60


class SelectionError(ValueError):
    """A selection that contradicts itself; `code` is BAD_FILTER."""

    code = BAD_FILTER


@dataclass(frozen=True, slots=True)
class LedgerSelection:
    """`kinds` and `amount_min` … restrict; `reversals` True takes reversals alone, False leaves them out."""

    kinds: Sequence[LedgerKind] | None = None
    symbol: str | None = None
    side: Side | None = None
    effective_from: datetime | None = None
    effective_to: datetime | None = None
    recorded_from: datetime | None = None
    recorded_to: datetime | None = None
    amount_min: Decimal | None = None
    amount_max: Decimal | None = None
    reversals: bool | None = None


EVERYTHING = LedgerSelection()


def check_selection(selection: LedgerSelection) -> None:
    """Raises SelectionError for what can not have been meant: an empty range, an amount below 0, no symbol."""
    if selection.kinds is not None and not selection.kinds:
        raise SelectionError("kinds is empty: leave it out to take all")
    if selection.symbol is not None:
        try:
            check_symbol(selection.symbol)
        except EventRejected as error:
            raise SelectionError(str(error)) from None
    for name, begin, end in (
        ("effective", selection.effective_from, selection.effective_to),
        ("recorded", selection.recorded_from, selection.recorded_to),
    ):
        if begin is not None and end is not None and begin >= end:
            raise SelectionError(f"the {name} range ends before it begins, or holds nothing")
    for name, amount in (("minAmount", selection.amount_min), ("maxAmount", selection.amount_max)):
        if amount is not None and not (amount.is_finite() and amount >= 0 and abs(amount.adjusted()) <= DIGITS_MAX):
            raise SelectionError(f"{name} is not a number from 0 on of usual size: it is of |amount|")
    least, most = selection.amount_min, selection.amount_max
    if least is not None and most is not None and least > most:
        raise SelectionError("minAmount is above maxAmount")


def conditions(selection: LedgerSelection, first: int) -> tuple[str, list[object]]:
    """SQL conditions that each begin with AND, and their arguments, numbered from `first`.

    Only what restricts is named, and kinds, a closed set, stand in the text: PostgreSQL then knows what it is asked
    and takes the index that fits (engine.stores.tables.ledger_entry).
    """
    found: list[str] = []
    arguments: list[object] = []
    if selection.kinds is not None:
        texts = sorted({f"'{kind.value}'" for kind in selection.kinds})
        found.append(f"kind IN ({', '.join(texts)})")
    if selection.reversals is not None:
        found.append(f"reverses IS {'NOT NULL' if selection.reversals else 'NULL'}")
    for field in fields(selection):
        value = getattr(selection, field.name)
        if field.name in _CONDITIONS and value is not None:
            found.append(_CONDITIONS[field.name].format(f"${first + len(arguments)}"))
            # PostgreSQL takes no NUL in a text; no symbol has one either.
            arguments.append(value.replace("\0", " ") if isinstance(value, str) else value)
    return "".join(f" AND {condition}" for condition in found), arguments


_CONDITIONS = {
    "symbol": "symbol = {}",
    "side": "side = {}",
    "effective_from": "effective_at >= {}",
    "effective_to": "effective_at < {}",
    "recorded_from": "recorded_at >= {}",
    "recorded_to": "recorded_at < {}",
    "amount_min": "abs(amount) >= {}",
    "amount_max": "abs(amount) <= {}",
}
