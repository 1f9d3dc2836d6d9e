"""How a state stream is paced: the latest value, at most one interval late, never a queue.

    first value                    at once                          SNAPSHOT
    change after silence           at once (leading edge)           UPDATE
    change within the interval     when the interval is over, with the newest value (trailing edge)
    the shard's owner changed      like a change, whatever the values are        RESET
    nothing to send for 15 s       the last value again             HEARTBEAT
    the live feed is lost          nothing, not even a heartbeat; then, where one was withheld, UPDATE or RESET

The interval is 1 / maxRateHz. While a slow client has not taken the last message, newer values replace each other
in the watch's one slot; `conflated` says how many marks a message stands for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum
from typing import TypeVar

import strawberry
from strawberry.types.nodes import FragmentSpread, InlineFragment, SelectedField, Selection

from engine.marks import Mark
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, Info
from resolvers.errors import ErrorCode, PublicError

# These describe the message, not the value: that they differ is no reason to send one.
MESSAGE_FIELDS = frozenset({"kind", "conflated", "__typename"})

RATE_HZ_DEFAULT = 4.0

Update = TypeVar("Update")


class StreamKind(StrEnum):
    SNAPSHOT = "SNAPSHOT"
    UPDATE = "UPDATE"
    HEARTBEAT = "HEARTBEAT"
    RESET = "RESET"


strawberry.enum(
    StreamKind,
    description=(
        "Why a message was sent. SNAPSHOT: the first, complete. UPDATE: something selected changed. HEARTBEAT: "
        "nothing changed for a while, the last value again; it means that the value is current. While that is not "
        "known, because the source of the values is not heard, none is sent, and the first message afterwards is an "
        "UPDATE or a RESET. RESET: the shard has a new owner; a fresh and complete value, `sequence` begins anew "
        "under a greater `epoch`."
    ),
)


class Pace:
    """Rations one stream's messages: `interval_s` between two, a heartbeat after `heartbeat_s` of silence."""

    def __init__(self, signal: asyncio.Event, interval_s: float, heartbeat_s: float) -> None:
        self._signal = signal
        self._interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        self._now = asyncio.get_running_loop().time
        self._sent_at = self._now() - interval_s
        self._beat_at = self._now()

    async def changed(self) -> bool:
        """Wait until there is something to take and the interval is over; False when a heartbeat is due first."""
        try:
            async with asyncio.timeout_at(self._beat_at + self._heartbeat_s):
                await self._signal.wait()
        except TimeoutError:
            self._beat_at = self._now()
            return False
        await asyncio.sleep(max(0.0, self._sent_at + self._interval_s - self._now()))
        self._signal.clear()
        return True

    def sending(self) -> None:
        """A message is about to be sent: the next interval and the next silence begin."""
        self._sent_at = self._beat_at = self._now()


def make_pace(context: Context, max_rate_hz: float | None, signal: asyncio.Event) -> Pace:
    """Raises PublicError BAD_RATE unless 0 < max_rate_hz ≤ the setting `rate_hz_max`."""
    settings = context.services.settings
    max_rate_hz = RATE_HZ_DEFAULT if max_rate_hz is None else max_rate_hz
    if not 0 < max_rate_hz <= settings.rate_hz_max:
        raise PublicError(ErrorCode.BAD_RATE, f"maxRateHz is above 0 and at most {settings.rate_hz_max}")
    return Pace(signal, 1 / max_rate_hz, settings.heartbeat_interval_s)


def selected_fields(info: Info) -> frozenset[str]:
    """The Python names of the fields that the operation selects of a stream's message, MESSAGE_FIELDS left out."""
    definition = info.schema.get_type_by_name(_type_name(info))
    names = {field.name for root in info.selected_fields for field in _flat(root.selections)} - MESSAGE_FIELDS
    fields = getattr(definition, "fields", [])
    converter = info.schema.config.name_converter
    return frozenset(field.python_name for field in fields if converter.get_graphql_name(field) in names)


async def mark_updates(
    info: Info,
    portfolio: PortfolioIdentity,
    max_rate_hz: float | None,
    show: Callable[[str, Mark, StreamKind, int], Update],
    compared: Callable[[Update, str], object] = getattr,
) -> AsyncIterator[Update]:
    """The messages of a stream that shows one portfolio's marks, each made by `show`.

    One is sent when what is `compared` of a selected field differs from the message before.
    """
    signal = asyncio.Event()
    pace = make_pace(info.context, max_rate_hz, signal)
    selected = sorted(selected_fields(info))
    last: Mark | None = None
    shown: list[object] = []
    stands_for = 0
    withheld = False
    with info.context.services.hub.watch_portfolio(portfolio.shard, portfolio.portfolio_id, signal) as watch:
        while True:
            changed = await pace.changed()
            taken = watch.take() if changed else None
            if taken is None:
                if changed or last is None:
                    continue
                if not watch.current:
                    withheld = True
                    continue
                pace.sending()
                yield show(portfolio.portfolio_id, last, StreamKind.HEARTBEAT, 0)
                continue
            kind = kind_of(last, taken[0])
            last, stands_for = taken[0], stands_for + taken[1]
            update = show(portfolio.portfolio_id, last, kind, stands_for or 1)
            resumed = withheld and watch.current
            values = [compared(update, name) for name in selected]
            if kind is StreamKind.UPDATE and values == shown and not resumed:
                continue
            withheld = withheld and not resumed
            shown, stands_for = values, 0
            pace.sending()
            yield update


def kind_of(last: Mark | None, mark: Mark) -> StreamKind:
    """The kind of the message that shows `mark` after one that showed `last`."""
    if last is None:
        return StreamKind.SNAPSHOT
    return StreamKind.UPDATE if mark.epoch == last.epoch else StreamKind.RESET


def _type_name(info: Info) -> str:
    return str(getattr(info.return_type, "__name__", ""))


def _flat(selections: Sequence[Selection]) -> list[SelectedField]:
    fields: list[SelectedField] = []
    for selection in selections:
        if isinstance(selection, FragmentSpread | InlineFragment):
            fields += _flat(selection.selections)
        else:
            fields.append(selection)
    return fields
