"""What the gateway counts. Labels come from fixed sets; nothing that a client sends becomes a label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


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
        self.sockets = Gauge("navstream_api_sockets", "Open WebSockets", registry=registry)
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
