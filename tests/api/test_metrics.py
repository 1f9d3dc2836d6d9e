"""Stage times read like prometheus_client's own histograms."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.metrics import Metrics, StageTimes

BUCKETS_S = (0.001, 0.01, 1)


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, str(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_reads_like_a_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    stages = StageTimes("age_seconds", "Age", ("one", "two"), BUCKETS_S)
    ours.register(stages)
    histogram = Histogram("age_seconds", "Age", ["stage"], buckets=BUCKETS_S, registry=theirs)
    histogram.labels("two")
    for duration_s, count in ((0.0005, 1), (0.001, 3), (0.0011, 2), (0.5, 1), (7.0, 2)):
        stages.observe("one", duration_s, count)
        for _ in range(count):
            histogram.labels("one").observe(duration_s)
    assert samples(ours) == samples(theirs)


def test_what_is_not_known_is_not_counted() -> None:
    metrics = Metrics()
    metrics.observe_heard(5 * 10**9, 0)
    metrics.observe_written(6 * 10**9, 5 * 10**9, 0, 3)
    counts = {key[1]: value for key, value in samples(metrics.registry).items() if "delivery_seconds_count" in key[0]}
    assert list(counts.values()) == [0, 3, 0]
    # Another machine's clock may be ahead.
    metrics.observe_heard(5 * 10**9, 6 * 10**9)
    assert metrics.delivery._sums_s["sent_heard"] == 0
