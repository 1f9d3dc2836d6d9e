"""Who has how many connections open: WebSockets and streams of events alike, counted by subject."""

from __future__ import annotations

from collections import Counter

from api.metrics import Metrics


class SocketRegistry:
    """How many sockets and event streams each subject has open."""

    def __init__(self, per_subject_max: int, metrics: Metrics) -> None:
        self._per_subject_max = per_subject_max
        self._metrics = metrics
        self._counts: Counter[str] = Counter()

    def enter(self, subject: str) -> bool:
        """Count a socket; False, and not counted, when the subject has too many."""
        if self._counts[subject] >= self._per_subject_max:
            return False
        self._counts[subject] += 1
        self._metrics.sockets.inc()
        return True

    def leave(self, subject: str) -> None:
        self._counts[subject] -= 1
        self._metrics.sockets.dec()
        if not self._counts[subject]:
            del self._counts[subject]

    @property
    def count(self) -> int:
        return self._counts.total()
