"""A real Apache Kafka: one KRaft node, broker and controller, from its Maven artifacts.

`make test-kafka` fetches them and names their directory in NAVSTREAM_TEST_KAFKA_JARS; without it these tests skip.
The node keeps its log and its ports, so that it can be killed and started again in mid-flow.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from engine.runtime.embedded_start import free_port
from engine.runtime.reaper import ChildProcesses

JARS_VARIABLE = "NAVSTREAM_TEST_KAFKA_JARS"
START_TIMEOUT_S = 60
CLUSTER_ID = "bmF2c3RyZWFtLXRlc3RzIQ"  # 16 bytes in base64
HEAP = "-Xmx384m"


class ApacheKafka:
    def __init__(self, children: ChildProcesses, jars: Path, directory: Path) -> None:
        self._children = children
        self._classpath = f"{jars}/*"
        self._directory = directory
        self._properties = directory / "server.properties"
        port, controller = free_port(), free_port()
        self.bootstrap = f"127.0.0.1:{port}"
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(directory / "log"),
            "num.partitions": "4",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
        }
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self._run("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(self._properties))
        self._node: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the node, or start it again on what it kept."""
        with (self._directory / "output").open("ab") as output:
            self._node = self._children.spawn("kafka", self._java("kafka.Kafka", str(self._properties)), stdout=output)

    async def answers(self) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                assert self._node is not None and self._node.poll() is None, (self._directory / "output").read_text()
                admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
                try:
                    await admin.start()
                    await admin.list_topics()
                    return
                except (KafkaError, OSError):
                    await asyncio.sleep(0.2)
                finally:
                    await admin.close()

    async def create_topic(self, name: str, partitions: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        try:
            await admin.create_topics([NewTopic(name, partitions, 1)])
        finally:
            await admin.close()

    def kill(self) -> None:
        """As a power cut would."""
        assert self._node is not None
        self._node.kill()
        self._node.wait()
        self._children.forget(self._node)
        self._node = None

    def _run(self, *arguments: str) -> None:
        subprocess.run(self._java(*arguments), check=True, capture_output=True, timeout=START_TIMEOUT_S)

    def _java(self, *arguments: str) -> list[str]:
        return ["java", HEAP, "-cp", self._classpath, *arguments]


@pytest.fixture(scope="module")
def apache_kafka(children: ChildProcesses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    jars = os.environ.get(JARS_VARIABLE)
    if not jars:
        pytest.skip(f"{JARS_VARIABLE} names no directory with Apache Kafka's jars: `make test-kafka` fetches them")
    if shutil.which("java") is None:
        pytest.skip("Apache Kafka needs java, which is not on the path")
    kafka = ApacheKafka(children, Path(jars), tmp_path_factory.mktemp("kafka"))
    kafka.start()
    yield kafka
    kafka.kill()
