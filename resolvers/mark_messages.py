"""What a message that shows one mark is made of: the part that navUpdates and pnlUpdates have in common.

There are two ways from a mark to a message. graphql-core executes the selection on an object (`figures` fills it); or
the selection was compiled and a mark's packed row becomes text at once (api/projection.py). Both go by the same table
of a message's type: Python name of a field → which columns of the mark it shows, and how.

The fields in MESSAGE_FIELDS are of the message, not of the mark: that they differ is no reason to send one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Any

import strawberry

from engine.amounts import EXACT, from_micro
from engine.instants import to_datetime
from engine.marks import RATIO_SCALE, Mark
from resolvers.enums import MarkQuality
from resolvers.stream_kind import StreamKind

MESSAGE_FIELDS = frozenset({"kind", "portfolio_id", "epoch", "conflated", "latency_ms"})

QUALITY = "The worst quality among the prices behind this figure."
AS_OF = "When the mark was made."
EPOCH = "Grows with every change of the shard's owner; (epoch, sequence) orders a portfolio's marks."
SEQUENCE = "Grows with every flush of the shard that changed the mark; begins anew with each epoch."
LEDGER_SEQUENCE = "How many of the portfolio's ledger entries the figures include."
CONFLATED = "How many marks this message stands for: those since the last message, itself included; 0 for HEARTBEAT."

_RATIO_UNIT = Decimal(RATIO_SCALE)


class Shown(Enum):
    """How an int64 of a mark is shown."""

    AMOUNT = "micro-units, as a Decimal"
    RATIO = "a fraction × 10¹², as a Decimal; null where it is UNKNOWN"
    INSTANT = "nanoseconds since 1970, as a DateTime"
    WHOLE = "as it is"
    QUALITY = "a MarkQuality"


@dataclass(frozen=True, slots=True)
class MarkField:
    """A field that shows one column of the mark."""

    column: str
    shown: Shown

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)


@dataclass(frozen=True, slots=True)
class ChangeField:
    """A field that says what changed since the message before: null, or an object of amounts.

    `columns` are the running sums that it compares; `parts` its own fields: Python name → attribute of
    engine.explain.Parts.
    """

    columns: tuple[str, ...]
    parts: Mapping[str, str]


Fields = Mapping[str, MarkField | ChangeField]


@dataclass(frozen=True, slots=True)
class Head:
    """What is said of a message rather than of its mark."""

    kind: StreamKind
    portfolio_id: str
    conflated: int
    latency_ms: float | None


@strawberry.type
class MarkMessage:
    kind: StreamKind = strawberry.field(description="Why this message was sent.")
    portfolio_id: str = strawberry.field(description="The portfolio.")
    quality: MarkQuality = strawberry.field(description=QUALITY)
    as_of: datetime = strawberry.field(description=AS_OF)
    epoch: int = strawberry.field(description=EPOCH)
    sequence: int = strawberry.field(description=SEQUENCE)
    ledger_sequence: int = strawberry.field(description=LEDGER_SEQUENCE)
    conflated: int = strawberry.field(description=CONFLATED)
    latency_ms: float | None = strawberry.field(
        description=(
            "Milliseconds from the instant of the oldest quote behind this news until the message was written. Null "
            "for SNAPSHOT and HEARTBEAT, where no quote moved the mark or it was read anew after a loss, and in a "
            "recorded market."
        )
    )


MARK_FIELDS: dict[str, MarkField] = {
    "quality": MarkField("quality", Shown.QUALITY),
    "as_of": MarkField("as_of_ns", Shown.INSTANT),
    "sequence": MarkField("sequence", Shown.WHOLE),
    "ledger_sequence": MarkField("ledger_sequence", Shown.WHOLE),
}


def show_ratio(ratio_e12: int | None) -> Decimal | None:
    """A return as a fraction; None where it is undefined."""
    return None if ratio_e12 is None else EXACT.divide(Decimal(ratio_e12), _RATIO_UNIT)


_SHOW: dict[Shown, Callable[[Any], object]] = {
    Shown.AMOUNT: from_micro,
    Shown.RATIO: show_ratio,
    Shown.INSTANT: to_datetime,
    Shown.WHOLE: int,
    Shown.QUALITY: MarkQuality,
}


def figures(fields: Fields, head: Head, mark: Mark) -> dict[str, Any]:
    """The arguments of a message that shows this mark, but for what it says of a change."""
    shown = {
        name: _SHOW[field.shown](getattr(mark, field.column))
        for name, field in fields.items()
        if isinstance(field, MarkField)
    }
    return {
        "kind": head.kind,
        "portfolio_id": head.portfolio_id,
        "epoch": mark.epoch,
        "conflated": head.conflated,
        "latency_ms": head.latency_ms,
        **shown,
    }
