"""Thresholds: an owner is told when a portfolio's figure reaches a bound, once for each time it does.

    figure   NAV, DAY_PNL (micro-units of the base currency), DAY_PNL_RATIO (× 10¹²): as the mark says it, int64
    ABOVE    fires when figure ≥ bound while armed; is armed again once figure < bound − hysteresis
    BELOW    fires when figure ≤ bound while armed; is armed again once figure > bound + hysteresis

So a figure that moves around its bound fires once, and again only after it has left the band. A new threshold is
armed: when the figure is beyond its bound already it fires at once. A figure that is not known (a ratio without
definition, a mark of quality MISSING) neither fires nor arms. What happens between two flushes is not seen.

`Thresholds` holds those of one shard in columns, sorted by the Book's slot, so that the rows of the changed slots are
found by two binary searches for all slots together and compared at once: the cost depends on what changed, not on
how many thresholds there are. It is told apart from PostgreSQL's state by nothing but what `cross` has answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.amounts import AMOUNT_MAX_MICRO, EXACT, MICRO_DIGITS, plain
from engine.marks import RATIO_SCALE, UNKNOWN, MarkArray, MarkQuality
from engine.pnl import RATIO_MAX

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

RATIO_DIGITS = 12
assert RATIO_SCALE == 10**RATIO_DIGITS


class ThresholdFigure(StrEnum):
    NAV = "NAV"
    DAY_PNL = "DAY_PNL"
    DAY_PNL_RATIO = "DAY_PNL_RATIO"


class ThresholdSide(StrEnum):
    ABOVE = "ABOVE"
    BELOW = "BELOW"


class ThresholdRefused(ValueError):
    """The bound or the hysteresis is none that can be compared exactly. `code` is stable and machine-readable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Threshold:
    threshold_id: str
    portfolio_id: str
    figure: ThresholdFigure
    side: ThresholdSide
    bound: Decimal
    hysteresis: Decimal
    armed: bool


class Crossing(NamedTuple):
    """What a threshold did at one mark: fired, or was armed again (`fired` false). `value` is in the figure's unit."""

    threshold: Threshold
    fired: bool
    value: int
    as_of_ns: int
    ledger_sequence: int


class ThresholdMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A crossing on its way to third parties. `event_id` counts the crossings of its threshold: `<id>#<n>`."""

    v: int = 1
    event_id: str
    threshold_id: str
    portfolio_id: str
    figure: str
    side: str
    bound: str
    hysteresis: str
    value: str
    at: datetime
    ledger_sequence: int


encode_threshold_message = msgspec.json.Encoder().encode
threshold_message_decoder = msgspec.json.Decoder(ThresholdMessage)

_DIGITS = {
    ThresholdFigure.NAV: MICRO_DIGITS,
    ThresholdFigure.DAY_PNL: MICRO_DIGITS,
    ThresholdFigure.DAY_PNL_RATIO: RATIO_DIGITS,
}
_LIMIT = {
    ThresholdFigure.NAV: AMOUNT_MAX_MICRO,
    ThresholdFigure.DAY_PNL: AMOUNT_MAX_MICRO,
    ThresholdFigure.DAY_PNL_RATIO: RATIO_MAX,
}
_FIELDS = {
    ThresholdFigure.NAV: "nav",
    ThresholdFigure.DAY_PNL: "day_pnl",
    ThresholdFigure.DAY_PNL_RATIO: "day_pnl_ratio_e12",
}
_FIGURES = list(ThresholdFigure)


def to_unit(figure: ThresholdFigure, value: Decimal, name: str) -> int:
    """A bound or hysteresis in the figure's unit. Raises ThresholdRefused TOO_PRECISE, TOO_LARGE, NOT_FINITE."""
    digits, limit = _DIGITS[figure], _LIMIT[figure]
    if not value.is_finite():
        raise ThresholdRefused("NOT_FINITE", f"{name} is not finite")
    scaled = EXACT.multiply(value, Decimal(10**digits))
    if scaled != scaled.to_integral_value():
        raise ThresholdRefused("TOO_PRECISE", f"{name} has more than {digits} decimals")
    if abs(scaled) >= limit:
        raise ThresholdRefused("TOO_LARGE", f"{name} is beyond what {figure.value} can be")
    return int(scaled)


def from_unit(figure: ThresholdFigure, value: int) -> Decimal:
    return Decimal(value).scaleb(-_DIGITS[figure])


def check_threshold(figure: ThresholdFigure, bound: Decimal, hysteresis: Decimal) -> None:
    """Raises ThresholdRefused: also BAD_HYSTERESIS for one below 0."""
    to_unit(figure, bound, "bound")
    if to_unit(figure, hysteresis, "hysteresis") < 0:
        raise ThresholdRefused("BAD_HYSTERESIS", "hysteresis is not below 0")


def message_of(crossing: Crossing, count: int, at: datetime) -> ThresholdMessage:
    """The message of a threshold's `count`-th crossing, whose mark was taken `at`."""
    threshold = crossing.threshold
    return ThresholdMessage(
        event_id=f"{threshold.threshold_id}#{count}",
        threshold_id=threshold.threshold_id,
        portfolio_id=threshold.portfolio_id,
        figure=threshold.figure.value,
        side=threshold.side.value,
        bound=plain(threshold.bound),
        hysteresis=plain(threshold.hysteresis),
        value=plain(from_unit(threshold.figure, crossing.value)),
        at=at,
        ledger_sequence=crossing.ledger_sequence,
    )


class Thresholds:
    """The thresholds of one shard, by slot. Not thread-safe."""

    def __init__(self, thresholds: Iterable[Threshold], slot_of: Mapping[str, int]) -> None:
        """`slot_of` has the slot of every portfolio that a threshold is of."""
        rows = sorted(thresholds, key=lambda one: slot_of[one.portfolio_id])
        self._rows: Sequence[Threshold] = rows
        self._row_of = {one.threshold_id: row for row, one in enumerate(rows)}
        self._slot: Int64s = np.array([slot_of[one.portfolio_id] for one in rows], np.int64)
        self._figure = np.array([_FIGURES.index(one.figure) for one in rows], np.int8)
        # What lies ABOVE is compared as it is, what lies BELOW negated: both then fire at ≥ and are armed again at <.
        self._sign: Int64s = np.array([1 if one.side is ThresholdSide.ABOVE else -1 for one in rows], np.int64)
        self._bound: Int64s = self._sign * np.array([to_unit(one.figure, one.bound, "bound") for one in rows], np.int64)
        band = np.array([to_unit(one.figure, one.hysteresis, "hysteresis") for one in rows], np.int64)
        self._rearm: Int64s = self._bound - band
        self._armed: Bools = np.array([one.armed for one in rows], np.bool_)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def slots(self) -> Int64s:
        """The slots that have thresholds, ascending."""
        return np.unique(self._slot)

    def set_armed(self, threshold_id: str, armed: bool) -> None:
        """Overrule what a threshold was loaded with; without effect when it is not here."""
        row = self._row_of.get(threshold_id)
        if row is not None:
            self._armed[row] = armed

    def cross(self, slots: Int64s, marks: MarkArray) -> list[Crossing]:
        """What the marks of these slots do, and remember it; `marks[i]` is of `slots[i]`, in any order."""
        if not len(self._slot):
            return []
        begins = np.searchsorted(self._slot, slots, "left")
        counts = np.searchsorted(self._slot, slots, "right") - begins
        total = int(counts.sum())
        if not total:
            return []
        at = np.repeat(np.arange(len(slots)), counts)
        # begins[i], begins[i] + 1, … for each slot: a run over all, each slot's brought back to where it begins.
        rows = np.arange(total) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
        value = np.select(
            [self._figure[rows] == number for number in range(len(_FIGURES))],
            [marks[_FIELDS[figure]][at] for figure in _FIGURES],
        )
        known = (value != UNKNOWN) & (marks["quality"][at] != MarkQuality.MISSING)
        armed, signed = self._armed[rows], self._sign[rows] * np.where(known, value, 0)
        fired = known & armed & (signed >= self._bound[rows])
        rearmed = known & ~armed & (signed < self._rearm[rows])
        self._armed[rows[fired]], self._armed[rows[rearmed]] = False, True
        return [
            Crossing(
                self._rows[rows[one]],
                bool(fired[one]),
                int(value[one]),
                int(marks["as_of_ns"][at[one]]),
                int(marks["ledger_sequence"][at[one]]),
            )
            for one in np.flatnonzero(fired | rearmed).tolist()
        ]
