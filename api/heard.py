"""When a frame was heard, and how old what it says is."""

from __future__ import annotations

_MS_NS = 1_000_000


class Heard:
    """A frame that was heard: when, and how old what it says is. Nanoseconds of wall time; 0 where there is none.

    `event_ns` is the instant of the oldest quote behind the frame's marks, where that is wall time: a recorded market's
    is not. `written_count` is for who counts what of the frame was written since it last looked.
    """

    __slots__ = ("event_ns", "heard_ns", "written_count")

    def __init__(self, heard_ns: int, event_ns: int) -> None:
        self.heard_ns = heard_ns
        self.event_ns = event_ns
        self.written_count = 0

    def latency_ms(self, now_ns: int) -> float | None:
        """How long ago its oldest quote was; None when no quote moved its marks."""
        return round((now_ns - self.event_ns) / _MS_NS, 3) if self.event_ns else None
