"""Latency as the product measures it: `latencyMs` of a message, and the stages in /metrics."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.heard import Heard
from engine.marks import FrameHeader, encode_frame
from tests.builders import MICRO, MarkRow
from tests.gateway import Gateway, Stream

NAV = "subscription($id: String!) { navUpdates(portfolioId: $id, maxRateHz: 20) { kind nav latencyMs } }"


def aged_frame(shard: int, sequence: int, portfolio_id: str, row: MarkRow, age_s: float | None) -> bytes:
    """A frame whose oldest quote is so old, sent 20 ms ago; without a quote when the age is None."""
    now_ns = time.time_ns()
    event_ns = 0 if age_s is None else now_ns - int(age_s * 10**9)
    header = FrameHeader(shard, 1, sequence, sequence - 1, now_ns, event_ns, event_ns, now_ns - 20_000_000)
    return encode_frame(header, [(len(portfolio_id), portfolio_id.encode(), row.pack())])


async def stages(gateway: Gateway) -> dict[str, tuple[float, float]]:
    """By stage: how many were counted, and their sum in seconds."""
    async with gateway.client() as client:
        text = (await client.get("/metrics")).text
    (family,) = [one for one in text_string_to_metric_families(text) if one.name == "navstream_api_delivery_seconds"]
    values = {(sample.name.rpartition("_")[2], sample.labels["stage"]): sample.value for sample in family.samples}
    return {stage: (values["count", stage], values["sum", stage]) for kind, stage in values if kind == "count"}


async def latency_of(stream: Stream) -> tuple[str, float | None]:
    update = await stream.next()
    return update["kind"], update["latencyMs"]


@pytest.mark.parametrize("compiled", [True, False])
async def test_messages_say_how_old_their_oldest_quote_is(
    gateway: Gateway, shard: int, portfolio_id: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(gateway.application.gateway.deliveries, "compile_projection", lambda info: None)
    row = MarkRow()
    await gateway.redis.point(shard, 1)
    await gateway.redis.marks(shard, 1, {portfolio_id: row})
    before = await stages(gateway)
    async with gateway.socket() as client:
        stream = await client.subscribe(NAV, {"id": portfolio_id})
        assert await latency_of(stream) == ("SNAPSHOT", None)
        await gateway.listening(shard)
        assert bool(gateway.application.gateway.deliveries._groups) is compiled
        await gateway.redis.publish(shard, aged_frame(shard, 2, portfolio_id, row.at(2, nav=1 * MICRO), 0.25))
        kind, latency_ms = await latency_of(stream)
        assert kind == "UPDATE" and latency_ms is not None and 250 <= latency_ms < 2_000
        assert latency_ms == round(latency_ms, 3)
        # No quote moved it: a fill did.
        await gateway.redis.publish(shard, aged_frame(shard, 3, portfolio_id, row.at(3, nav=2 * MICRO), None))
        assert await latency_of(stream) == ("UPDATE", None)
        # A recorded market's instants are compared with no wall clock.
        with monkeypatch.context() as recorded:
            recorded.setattr(gateway.application.feed, "_in_wall_time", False)
            await gateway.redis.publish(shard, aged_frame(shard, 4, portfolio_id, row.at(4, nav=9 * MICRO), 0.25))
            assert await latency_of(stream) == ("UPDATE", None)
        # Read after a loss, not heard.
        await gateway.redis.marks(shard, 1, {portfolio_id: row.at(6, nav=3 * MICRO)})
        await gateway.redis.publish(shard, encode_frame(FrameHeader(shard, 1, 7, 6, 1, 1), []))
        assert await latency_of(stream) == ("UPDATE", None)
        assert await latency_of(stream) == ("HEARTBEAT", None)
    after = await stages(gateway)
    counts = {stage: after[stage][0] - before[stage][0] for stage in after}
    sums_s = {stage: after[stage][1] - before[stage][1] for stage in after}
    assert counts["sent_heard"] == 3 and 0.04 <= sums_s["sent_heard"] < 2
    if compiled:
        assert counts["heard_written"] == 3 and sums_s["heard_written"] < 2
        assert counts["event_written"] == 1 and 0.25 <= sums_s["event_written"] < 2


def test_a_frame_without_a_quote_has_no_latency() -> None:
    assert Heard(5, 0).latency_ms(10**9) is None
    assert Heard(5, 1_000_000).latency_ms(3_234_567) == 2.235
