"""A dashboard's client: one query after another to random portfolios; prints the seconds each took, as JSON.

python -m benchmarks.dashboard PORT SECONDS  < token
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

import orjson
import uvloop

from benchmarks.seed_load import PORTFOLIOS_COUNT, POSITIONS_COUNT, portfolio_id

INTERVAL_S = 0.02
DASHBOARD = """query Dashboard($id: String!) {
  portfolio(portfolioId: $id) {
    name
    valuation { nav cash positionsValue unrealizedPnl realizedPnl dayPnl quality asOf }
    positions(first: 50) { edges { node { asset { symbol name sector } quantity averageCost price marketValue
      unrealizedPnl dayPnl weight } } }
    sectorAllocation { sector value weight weightAtLastFill }
    equityCurve(range: DAYS_7) { points { at nav } }
  }
}"""


async def measure(port: int, seconds: float, token: str) -> list[float]:
    choices = random.Random(2)
    latencies, end_s = [], time.monotonic() + seconds
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.monotonic() < end_s:
        name = portfolio_id(choices.randrange(PORTFOLIOS_COUNT))
        start_s = time.perf_counter()
        answer = orjson.loads(await post(reader, writer, token, {"query": DASHBOARD, "variables": {"id": name}}))
        latencies.append(time.perf_counter() - start_s)
        assert "errors" not in answer, answer
        assert len(answer["data"]["portfolio"]["positions"]["edges"]) == POSITIONS_COUNT
        await asyncio.sleep(INTERVAL_S)
    writer.close()
    return latencies


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, body: object) -> bytes:
    """One request on a kept connection, with as little work of the client's own as can be."""
    payload = orjson.dumps(body)
    head = (
        f"POST /graphql HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    answer_head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(answer_head.partition(b"content-length:")[2].partition(b"\r\n")[0])
    return await reader.readexactly(length)


def main() -> None:
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    latencies = uvloop.run(measure(port, seconds, sys.stdin.read().strip()))
    sys.stdout.buffer.write(orjson.dumps(latencies))


if __name__ == "__main__":
    main()
