"""What the gateway counts. Labels come from fixed sets; nothing that a client sends becomes a label."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from engine.instants import SECOND_NS

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_DELIVERY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class StageTimes(Collector):
    """A histogram by stage that takes many equal observations at once: prometheus_client's takes 2 µs for each."""

    def __init__(self, name: str, documentation: str, stages: Sequence[str], buckets_s: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._buckets_s = buckets_s
        self._counts = {stage: [0] * (len(buckets_s) + 1) for stage in stages}
        self._sums_s = dict.fromkeys(stages, 0.0)

    def observe(self, stage: str, duration_s: float, count: int = 1) -> None:
        self._counts[stage][bisect_left(self._buckets_s, duration_s)] += count
        self._sums_s[stage] += duration_s * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=["stage"])
        for stage, counts in self._counts.items():
            total, buckets = 0, []
            for bound_s, count in zip((*self._buckets_s, float("inf")), counts, strict=True):
                total += count
                buckets.append((_shown(bound_s), total))
            family.add_metric([stage], buckets, self._sums_s[stage])
        yield family


def _shown(bound_s: float) -> str:
    return "+Inf" if bound_s == float("inf") else str(float(bound_s))


class Metrics:
    """One registry per application, so that several in one process do not share counters."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.operations = Counter(
            "navstream_api_operations_total", "GraphQL operations begun", ["type"], registry=registry
        )
        self.errors = Counter("navstream_api_errors_total", "Errors sent to clients", ["code"], registry=registry)
        self.latency = Histogram(
            "navstream_api_operation_seconds",
            "Duration of queries and mutations",
            ["type"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.sockets = Gauge("navstream_api_sockets", "Open WebSockets and event streams", registry=registry)
        self.closes = Counter("navstream_api_closes_total", "WebSockets closed by us", ["name"], registry=registry)
        self.exports = Counter(
            "navstream_api_exports_total", "Exports of ledgers that ended", ["format", "outcome"], registry=registry
        )
        self.watches = Gauge("navstream_api_watches", "Listeners of streams", registry=registry)
        self.frames = Counter("navstream_api_frames_total", "Frames received", ["channel"], registry=registry)
        self.frames_dropped = Counter(
            "navstream_api_frames_dropped_total",
            "Frames of an older epoch, or not frames",
            ["channel"],
            registry=registry,
        )
        self.gaps = Counter(
            "navstream_api_gaps_total", "Losses noticed, each followed by a read", ["cause"], registry=registry
        )
        self.rereads = Counter("navstream_api_rereads_total", "Marks and quotes read to heal a gap", registry=registry)
        # sent → heard is counted by frame, the others by message. Until the message was handed to the kernel.
        self.delivery = StageTimes(
            "navstream_api_delivery_seconds",
            "Age of what is delivered: sent_heard from an evaluator's frame being sent until it was heard, "
            "heard_written from there until a message of it was written, event_written from the oldest quote behind it",
            ("sent_heard", "heard_written", "event_written"),
            _DELIVERY_BUCKETS_S,
        )
        registry.register(self.delivery)
        self.deliveries = Counter(
            "navstream_api_deliveries_total", "Messages of compiled streams that were written", registry=registry
        )

    def observe_heard(self, heard_ns: int, sent_ns: int) -> None:
        """A frame with marks was heard. Nothing is known of one that does not say when it was sent."""
        if sent_ns:
            self.delivery.observe("sent_heard", max(0, heard_ns - sent_ns) / SECOND_NS)

    def observe_written(self, written_ns: int, heard_ns: int, event_ns: int, count: int) -> None:
        """So many messages of one frame were written; `event_ns` is 0 where it is no instant of wall time."""
        self.delivery.observe("heard_written", max(0, written_ns - heard_ns) / SECOND_NS, count)
        if event_ns:
            self.delivery.observe("event_written", max(0, written_ns - event_ns) / SECOND_NS, count)
