"""The newest mark of each watched portfolio of a shard, in columns.

Flushes are far more frequent than messages: of the marks that frames bring, most are replaced before anybody looks at
them. So a frame is taken with a few operations on arrays, whatever it holds, and only those are told who asked to be
told of the next mark: `MarkCell.tell`. Everybody else finds the newest one in the cell when their interval is over.

Marks are taken in the order of (epoch, sequence) and never backwards. A cell is `current` from the first of its marks
that came while its shard's channel was live and heard, until that channel is lost or silent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from api.heard import Heard
from engine.marks import MARK, QUALITIES_COUNT, QUALITY_AT, SEQUENCE_AT, Row, unpack_row

CAPACITY_MIN = 64
_BYTES, _FIELDS_COUNT = MARK.itemsize, len(MARK.names or ())
_NOBODYS = -1


class MarkReceiver(Protocol):
    """Who watches a portfolio's marks: looks into its cell when it likes, and may ask to be told."""

    def news(self, resumed: bool) -> None:
        """There is a newer mark, or the same again; `resumed`: the cell is current, and was not before. Who wants to
        be told of the next one asks again; those are told, too, who did not ask and share a cell with one who did."""


class ShardMarks:
    def __init__(self) -> None:
        self.receivers: list[list[MarkReceiver]] = []
        self._cell_of = _Cells()
        self._free: list[int] = []
        self._allocate(CAPACITY_MIN)

    packed: bytearray
    epoch: NDArray[np.int64]
    count: NDArray[np.int64]
    current: NDArray[np.bool_]
    eager: NDArray[np.bool_]
    heard: NDArray[np.object_]
    _rows: NDArray[np.int64]

    def _allocate(self, capacity: int) -> None:
        used = len(self.receivers)
        packed = bytearray(capacity * _BYTES)
        rows = np.frombuffer(packed, "<i8").reshape(capacity, _FIELDS_COUNT)
        if used:
            rows[:used] = self._rows[:used]
        self.packed, self._rows = packed, rows
        for name, dtype in (("epoch", "<i8"), ("count", "<i8"), ("current", "?"), ("eager", "?"), ("heard", "O")):
            column = np.zeros(capacity, dtype)
            if used:
                column[:used] = getattr(self, name)[:used]
            setattr(self, name, column)

    def __len__(self) -> int:
        return len(self._cell_of)

    def portfolio_ids(self) -> Collection[bytes]:
        """Those that somebody watches; a view."""
        return self._cell_of.keys()

    def add(self, portfolio_id: bytes, receiver: MarkReceiver) -> MarkCell:
        cell = self._cell_of[portfolio_id]
        if cell == _NOBODYS:
            cell = self._cell_of[portfolio_id] = self._new_cell()
        self.receivers[cell].append(receiver)
        self.eager[cell] = True
        return MarkCell(self, cell)

    def _new_cell(self) -> int:
        if self._free:
            cell = self._free.pop()
        else:
            cell = len(self.receivers)
            if cell == len(self.epoch):
                self._allocate(2 * cell)
            self.receivers.append([])
        self.epoch[cell], self.count[cell], self.current[cell], self.heard[cell] = -1, 0, False, None
        return cell

    def drop(self, portfolio_id: bytes, receiver: MarkReceiver) -> None:
        cell = self._cell_of[portfolio_id]
        self.receivers[cell].remove(receiver)
        if not self.receivers[cell]:
            del self._cell_of[portfolio_id]
            self._free.append(cell)
            self.heard[cell] = None

    def lose(self) -> None:
        """What the cells hold may not hold any more."""
        self.current[:] = False

    def take(
        self, epoch: int, portfolio_ids: Sequence[bytes], packed: bytes, heard: Heard | None, current: bool
    ) -> Iterable[tuple[int, bool]]:
        """Take marks of an owner, as they are packed; `heard` is None for what was read. Returns the cells whose
        receivers are to be told, and which of them were resumed. Raises ValueError for what is no mark."""
        rows = np.frombuffer(packed, "<i8").reshape(len(portfolio_ids), _FIELDS_COUNT)
        # As unsigned ones, negative numbers are large.
        if rows[:, QUALITY_AT].view("<u8").max(initial=0) >= QUALITIES_COUNT:
            raise ValueError("a mark's quality is none")
        cells = np.fromiter(map(self._cell_of.__getitem__, portfolio_ids), np.intp, len(portfolio_ids))
        if cells.min(initial=0) == _NOBODYS:
            watched = cells != _NOBODYS
            cells, rows = cells[watched], rows[watched]
        eager = self.eager[cells]
        told, was_current = cells[eager], self.current[cells[eager]]
        self.eager[told] = False
        taken, before, sequence = cells, self.epoch[cells], rows[:, SEQUENCE_AT]
        known = np.where(before == epoch, self._rows[cells, SEQUENCE_AT], -1)
        newer = (before <= epoch) & (known < sequence)
        if not newer.all():
            taken, rows = cells[newer], rows[newer]
            if current:
                self.current[cells[(before == epoch) & (known == sequence)]] = True
        self._rows[taken], self.epoch[taken], self.heard[taken] = rows, epoch, heard
        self.count[taken] += 1
        if current:
            self.current[taken] = True
        return zip(told.tolist(), (self.current[told] & ~was_current).tolist(), strict=True)


class MarkCell:
    """One portfolio's place in its shard's columns. `count`: how many marks it took."""

    __slots__ = ("_at", "_marks")

    def __init__(self, marks: ShardMarks, at: int) -> None:
        self._marks = marks
        self._at = at

    @property
    def count(self) -> int:
        return self._marks.count.item(self._at)

    @property
    def epoch(self) -> int:
        return self._marks.epoch.item(self._at)

    @property
    def current(self) -> bool:
        return self._marks.current.item(self._at)

    @property
    def heard(self) -> Heard | None:
        """The frame that brought the mark; None for one that was read."""
        heard: Heard | None = self._marks.heard[self._at]
        return heard

    @property
    def row(self) -> Row:
        return unpack_row(self._marks.packed, self._at * _BYTES)

    def tell(self) -> None:
        """A receiver wants to be told of the next mark."""
        self._marks.eager[self._at] = True


class _Cells(dict[bytes, int]):
    def __missing__(self, _: bytes) -> int:
        return _NOBODYS
