"""The embedded Kafka-protocol broker: librdkafka's mock cluster in a process of its own, on loopback.

Prints its bootstrap address as the one line on standard output, then serves until it is stopped. Topics are
made on first use with 4 partitions; nothing survives the process; its cluster id differs from start to
start, which is how consumers know that this is another log.
"""

from __future__ import annotations

import sys

from confluent_kafka import Producer

START_TIMEOUT_S = 20.0
POLL_INTERVAL_S = 1.0


def main() -> None:
    # The mock cluster replaces whatever servers are named; the name only has to be there.
    client = Producer({"bootstrap.servers": "embedded", "test.mock.num.brokers": 1, "log_level": 3})
    [broker] = client.list_topics(timeout=START_TIMEOUT_S).brokers.values()
    sys.stdout.write(f"{broker.host}:{broker.port}\n")
    sys.stdout.flush()
    while True:
        client.poll(POLL_INTERVAL_S)


if __name__ == "__main__":
    main()
