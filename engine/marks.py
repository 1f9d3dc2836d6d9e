"""A mark: what one portfolio is worth at one instant, as 144 bytes.

The evaluator writes marks as a numpy record array, Redis keeps one per portfolio, frames on `marks:{shard}` carry
the changed ones, the API reads them back. Amounts are int64 micro-units (10⁻⁶ of the base currency).

    nav = cash + receivables + positions_value   unrealized = positions_value − Σ cost
    day_pnl = nav − nav at the cut − external flows since the cut
    day_pnl_ratio_e12 = time-weighted return since the cut × 10¹², or UNKNOWN

Sums since the opening say why NAV moved between two marks (engine.explain): `realized` (gross), `fees`, `income`,
`flows`, `trading` (fills against the prices they met) and `corporate`; what they leave is the prices' own movement.

`sequence` grows with every flush of the shard within an `epoch`, which grows with every change of the shard's
owner: (epoch, sequence) orders all marks of a portfolio. `ledger_sequence` counts the ledger entries included.

Frame layout (little-endian), one per shard and flush:

    FrameHeader | for each id length: u16 id_length, u16 0, u32 count, count × id, count × MARK

A frame without rows is a heartbeat.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARK = np.dtype(
    [
        ("nav", "<i8"),
        ("cash", "<i8"),
        ("receivables", "<i8"),
        ("positions_value", "<i8"),
        ("unrealized", "<i8"),
        ("realized", "<i8"),
        ("fees", "<i8"),
        ("income", "<i8"),
        ("flows", "<i8"),
        ("trading", "<i8"),
        ("corporate", "<i8"),
        ("day_pnl", "<i8"),
        ("day_pnl_ratio_e12", "<i8"),
        ("day_cut_at_ns", "<i8"),
        ("as_of_ns", "<i8"),
        ("sequence", "<i8"),
        ("ledger_sequence", "<i8"),
        ("quality", "<i8"),
    ]
)
UNKNOWN = -(2**63)
RATIO_DIGITS = 12
RATIO_SCALE = 10**RATIO_DIGITS

MarkArray = NDArray[np.void]


class MarkQuality(IntEnum):
    """How good the prices behind a figure are; a NAV carries the worst (largest) of its positions (engine.markets)."""

    LIVE = 0
    CLOSED = 1
    DELAYED = 2
    STALE = 3
    HALTED = 4
    MISSING = 5


@dataclass(frozen=True, slots=True)
class Mark:
    """One mark, decoded: amounts in micro-units, instants in nanoseconds since 1970 (UTC)."""

    nav: int
    cash: int
    receivables: int
    positions_value: int
    unrealized: int
    realized: int
    fees: int
    income: int
    flows: int
    trading: int
    corporate: int
    day_pnl: int
    day_pnl_ratio_e12: int | None
    day_cut_at_ns: int
    as_of_ns: int
    sequence: int
    ledger_sequence: int
    quality: MarkQuality
    epoch: int


_MARK_STRUCT = struct.Struct("<18q")
assert _MARK_STRUCT.size == MARK.itemsize and MARK.names is not None
_RATIO_AT = MARK.names.index("day_pnl_ratio_e12")

_HEADER = struct.Struct("<4sIqqqqqqq")
_GROUP = struct.Struct("<HHI")
_MAGIC = b"NVM3"


# A mark's fields in MARK's order as they are packed: raw int64, UNKNOWN where there is no ratio.
Row = tuple[int, ...]
SEQUENCE_AT, QUALITY_AT = MARK.names.index("sequence"), MARK.names.index("quality")
QUALITIES_COUNT = len(MarkQuality)
# unpack_row(buffer, offset): the row packed there. Raises struct.error when there are too few bytes.
unpack_row: Callable[..., Row] = _MARK_STRUCT.unpack_from


def decode_mark(data: bytes | memoryview, epoch: int) -> Mark:
    """Read one packed mark. Raises ValueError when it does not have exactly MARK's size."""
    if len(data) != MARK.itemsize:
        raise ValueError(f"a mark has {MARK.itemsize} bytes, not {len(data)}")
    return mark_of(_MARK_STRUCT.unpack(data), epoch)


def mark_of(row: Row, epoch: int) -> Mark:
    """The mark whose fields these are."""
    fields: list[Any] = list(row)
    fields[_RATIO_AT] = None if fields[_RATIO_AT] == UNKNOWN else fields[_RATIO_AT]
    fields[QUALITY_AT] = MarkQuality(fields[QUALITY_AT])
    fields.append(epoch)
    return Mark(*fields)


def pack_mark(mark: Mark) -> bytes:
    """The inverse of `decode_mark`."""
    fields = [getattr(mark, name) for name in MARK.names or ()]
    fields[_RATIO_AT] = UNKNOWN if mark.day_pnl_ratio_e12 is None else mark.day_pnl_ratio_e12
    return _MARK_STRUCT.pack(*fields)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """`sequence` is the flush that made the frame; `previous_sequence` the one before it, so a gap shows.

    `flushed_at_ns` and `oldest_event_ns` are the program's time, which may be a recorded market's: the instant of the
    marks, and that of the oldest quote which moved them. `oldest_received_ns` and `sent_at_ns` are wall time: when the
    quotes worker took that quote in, and when the frame was handed to Redis. 0 where there is none.
    """

    shard: int
    epoch: int
    sequence: int
    previous_sequence: int
    flushed_at_ns: int
    oldest_event_ns: int
    oldest_received_ns: int = 0
    sent_at_ns: int = 0


def frame_parts(header: FrameHeader, groups: Iterable[tuple[int, bytes, bytes]]) -> list[bytes]:
    """A frame as pieces to be sent one after another; each group is (id length, the ids joined, the marks' bytes)."""
    parts = [
        _HEADER.pack(
            _MAGIC,
            header.shard,
            header.epoch,
            header.sequence,
            header.previous_sequence,
            header.flushed_at_ns,
            header.oldest_event_ns,
            header.oldest_received_ns,
            header.sent_at_ns,
        )
    ]
    for id_length, ids, marks in groups:
        parts += (_GROUP.pack(id_length, 0, len(ids) // id_length), ids, marks)
    return parts


def encode_frame(header: FrameHeader, groups: Iterable[tuple[int, bytes, bytes]]) -> bytes:
    """A frame in one piece."""
    return b"".join(frame_parts(header, groups))


def decode_frame(data: bytes) -> tuple[FrameHeader, Iterator[tuple[list[bytes], bytes]]]:
    """Read a frame: its header, and for each group the portfolio ids (bytes) and the packed marks in that order.

    Raises ValueError when the bytes are not a frame.
    """
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise ValueError("not a marks frame")
    _, shard, *rest = _HEADER.unpack_from(data)
    return FrameHeader(shard, *rest), _groups(data)


def _groups(data: bytes) -> Iterator[tuple[list[bytes], bytes]]:
    offset = _HEADER.size
    while offset < len(data):
        ids_at = offset + _GROUP.size
        if ids_at > len(data):
            raise ValueError("a marks frame is cut short")
        id_length, _, count = _GROUP.unpack_from(data, offset)
        marks_at = ids_at + id_length * count
        offset = marks_at + MARK.itemsize * count
        if offset > len(data) or not id_length:
            raise ValueError("a marks frame is cut short")
        ids = [data[at : at + id_length] for at in range(ids_at, marks_at, id_length)]
        yield ids, data[marks_at:offset]
