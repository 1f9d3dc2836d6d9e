"""Lots: which fills an open position consists of, first in, first out. Derived from the ledger, kept nowhere.

    a fill that adds        is a lot of its own
    a fill that reduces     takes from the oldest lots; what is left when none is opens a lot of the other side
    the cycle's first fill  is a lot as far as it opened the position: one that crossed 0 closed another before
    a split                 scales every lot that was bought before its effective instant
    a reversal              takes back the lot of the fill that it reverses, or gives back what that fill took: the
                            lots are those of a ledger without both. Where the reversed fill lies before the cycle,
                            the reversal is a fill like others

All quantities are in today's shares, signed like the position, as exact fractions until they are shown; rounded to 12
decimals so that Σ remaining is the position's quantity to the last digit. `cost` is the part of the lot's notional that
remains, so Σ cost is the position's cost by FIFO, while the position's own is by average cost: they agree as long as
nothing was sold. Realised P&L is by average cost everywhere.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction

from engine.amounts import DECIMALS_MAX, EXACT, average, present, scale_number, share_micro, value_micro
from engine.ledger import LedgerEntry, LedgerKind, Side

# What was rounded to 15 digits has moved by less than this part of itself.
_DIGITS = 10**14
_ONE = Fraction(1)


class LotsMismatchError(ValueError):
    """The entries do not lead to the position's quantity."""


@dataclass(frozen=True, slots=True)
class Lot:
    """`quantity` as bought and `remaining` of it; `cost` (micro-units) of what remains, `unit_cost` per share of it."""

    opened_at: datetime
    ledger_sequence: int
    quantity: Decimal
    remaining: Decimal
    unit_cost: Decimal
    cost: int


@dataclass(slots=True)
class _Open:
    """A lot while it is worked on: quantities in units of 10⁻¹² / the common denominator, `notional` as bought."""

    entry: LedgerEntry
    quantity: int
    remaining: int
    notional: int

    @classmethod
    def made(cls, entry: LedgerEntry, quantity: int, notional: int) -> _Open:
        return cls(entry, quantity, quantity, notional)


def change_of(entry: LedgerEntry) -> Decimal:
    """What an entry did to the position's quantity, signed, in shares of its booking."""
    if entry.quantity is None or entry.kind not in (LedgerKind.FILL, LedgerKind.SPLIT):
        return Decimal(0)
    if entry.kind is LedgerKind.SPLIT:
        return entry.quantity
    shares = entry.quantity if entry.scale is None else scale_number(entry.quantity, entry.scale, "quantity")
    return shares if entry.side is Side.BUY else -shares


def entries_shown(
    entries: Sequence[LedgerEntry], quantity: Decimal, ledger_sequence: int, head: Decimal | None
) -> Sequence[LedgerEntry] | None:
    """Those of a cycle's `entries` that a position shown with `quantity` includes; None when there is no such state.

    What is shown may lag behind the ledger, whose quantity after the last entry is `head` (None: it is not of this
    cycle), or be a moment ahead of the mark at `ledger_sequence`.
    """
    if head is None:
        return [entry for entry in entries if entry.sequence <= ledger_sequence] or None
    found = None
    for count in range(len(entries), 0, -1):
        if head == quantity:
            found = count
            if entries[count - 1].sequence <= ledger_sequence:
                break
        head = EXACT.subtract(head, change_of(entries[count - 1]))
    return None if found is None else entries[:found]


def open_lots(entries: Sequence[LedgerEntry], quantity: Decimal) -> list[Lot]:
    """The lots of a position of `quantity`, oldest first.

    `entries` are those of its symbol in ledger order, from the first of its cycle to the last that `quantity` includes.
    Raises LotsMismatchError when they do not lead there.
    """
    moves = [entry for entry in entries if entry.kind in (LedgerKind.FILL, LedgerKind.SPLIT)]
    if not moves or not quantity:
        raise LotsMismatchError("a position of nothing, or without entries")
    later = _later_splits(moves)
    scales = [since * (entry.scale or 1) for entry, since in zip(moves, later, strict=True)]
    unit = math.lcm(*(scale.denominator for scale in (later[0], *scales)))
    reversals = {entry.reverses: entry for entry in moves if entry.reverses is not None}
    undone = {entry.event_id for entry in moves if entry.event_id in reversals}
    lots = deque(_opening_lot(moves, quantity, later[0] * unit, reversals.get(moves[0].event_id)))
    for entry, scale in zip(moves[1:], scales[1:], strict=True):
        if entry.kind is LedgerKind.FILL and entry.event_id not in undone and entry.reverses not in undone:
            _fill(lots, entry, _traded(entry, scale * unit))
    total, whole = sum(lot.remaining for lot in lots), _units(quantity, Fraction(unit))
    slack = _slack(moves, [since * unit for since in later], whole)
    if abs(total - whole) > slack:
        raise LotsMismatchError(f"lots of {total} in place of {whole} units")
    if not total or (total > 0) != (whole > 0):
        # Nothing is left but what rounding left.
        lots, total = deque([_Open.made(moves[-1], whole, 0)]), whole
    return _shown(lots, quantity, total)


def _slack(moves: Sequence[LedgerEntry], scales: Sequence[Fraction], whole: int) -> Fraction:
    """How far a recorded quantity may lie from the exact one: each scaling rounds to 12 decimals and 15 digits."""
    rounded = [scale for entry, scale in zip(moves, scales, strict=True) if entry.scale is not None]
    traded = (abs(_traded(entry, scale * (entry.scale or 1))) for entry, scale in zip(moves, scales, strict=True))
    return sum(rounded, Fraction(0)) + len(rounded) * Fraction(abs(whole) + sum(traded), _DIGITS)


def _later_splits(moves: Sequence[LedgerEntry]) -> list[Fraction]:
    """For each entry what turns shares of its booking into today's: the splits booked since, where they concern it.

    A late split does not concern a fill that took place after its instant: that was in new shares already.
    """
    scales, splits = [], list[LedgerEntry]()
    for entry in reversed(moves):
        scale = _ONE
        for split in splits:
            if split.effective_at > entry.effective_at or entry.reverses is not None:
                scale *= split.scale or 1
        scales.append(scale)
        if entry.kind is LedgerKind.SPLIT:
            splits.append(entry)
    return scales[::-1]


def _opening_lot(
    moves: Sequence[LedgerEntry], quantity: Decimal, scale: Fraction, reversal: LedgerEntry | None
) -> list[_Open]:
    """What the cycle's first entry opened; what it closed, where it is reversed."""
    first, opened = moves[0], quantity
    for entry in moves[1:]:
        opened = EXACT.subtract(opened, change_of(entry))
    traded = change_of(first)
    closed = EXACT.subtract(traded, opened)
    if (opened > 0) != (traded > 0) or abs(opened) > abs(traded):
        raise LotsMismatchError(f"entry {first.sequence} of {traded} shares can not have opened {opened}")
    if first.kind is LedgerKind.SPLIT or first.reverses is not None:
        return [_Open.made(first, _units(opened, scale), abs(first.cost))]
    closing = _part(first, abs(closed), abs(traded))
    if reversal is None:
        return [_Open.made(first, _units(opened, scale), abs(first.amount) - closing)]
    if not closed:
        return []
    # The lots that it closed are of a cycle before; they come back as one, at what they had cost on average.
    released = closing - first.realized if closed < 0 else closing + first.realized
    return [_Open.made(reversal, -_units(closed, scale), abs(released))]


def _traded(entry: LedgerEntry, scale: Fraction) -> int:
    if entry.kind is LedgerKind.SPLIT or entry.quantity is None:
        return 0
    return _units(entry.quantity if entry.side is Side.BUY else -entry.quantity, scale)


def _fill(lots: deque[_Open], entry: LedgerEntry, traded: int) -> None:
    left = traded
    while left and lots and (lots[0].remaining > 0) != (left > 0):
        oldest = lots[0]
        if abs(oldest.remaining) > abs(left):
            oldest.remaining += left
            return
        left += oldest.remaining
        lots.popleft()
    if left:
        lots.append(_Open.made(entry, left, share_micro(abs(entry.amount), Decimal(left), Decimal(traded))))


def _shown(lots: Sequence[_Open], quantity: Decimal, total: int) -> list[Lot]:
    """Rounded cumulatively, so that the parts sum to the whole."""
    shown, before, cumulated = [], Decimal(0), 0
    for lot in lots:
        cumulated += lot.remaining
        after = _rounded(quantity, cumulated, total)
        remaining, before = EXACT.subtract(after, before), after
        if not remaining:
            continue
        cost = share_micro(lot.notional, Decimal(lot.remaining), Decimal(lot.quantity))
        untouched = lot.remaining == lot.quantity
        bought = remaining if untouched else _rounded(quantity, lot.quantity, total)
        signed = cost if quantity > 0 else -cost
        unit_cost = average(signed, remaining)
        shown.append(Lot(lot.entry.effective_at, lot.entry.sequence, bought, remaining, unit_cost, signed))
    return shown


def _rounded(quantity: Decimal, part: int, total: int) -> Decimal:
    return present(EXACT.divide(EXACT.multiply(quantity, Decimal(part)), Decimal(total)), DECIMALS_MAX)


def _part(entry: LedgerEntry, closed: Decimal, traded: Decimal) -> int:
    """The notional of `closed` of the `traded` shares, as engine.portfolio divides a fill that crosses 0."""
    if not closed or closed == traded:
        return abs(entry.amount) if closed else 0
    assert entry.price is not None
    return value_micro(closed, entry.price) if entry.scale is None else share_micro(abs(entry.amount), closed, traded)


def _units(quantity: Decimal, scale: Fraction) -> int:
    units = int(quantity.scaleb(DECIMALS_MAX, context=EXACT)) * scale
    assert units.denominator == 1
    return units.numerator
