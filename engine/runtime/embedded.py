"""The embedded default: real Valkey, PostgreSQL and a Kafka-protocol broker as children, on loopback ports.

    with ChildProcesses() as children:
        servers = start_embedded(children)  # all three, temporary
        servers = start_embedded(children, data_dir, redis=False)  # what settings do not name, in data_dir

They stop when `children` stop, after all workers, and die with this process in any case
(engine.runtime.reaper). The broker keeps nothing across starts, whatever the directory.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.runtime import embedded_broker
from engine.runtime.embedded_directory import ServerDirectory, open_directory
from engine.runtime.embedded_postgresql import start_postgres
from engine.runtime.embedded_start import EmbeddedError
from engine.runtime.embedded_valkey import start_valkey
from engine.runtime.reaper import ChildProcesses, Tier

__all__ = [
    "EmbeddedError",
    "EmbeddedServers",
    "ServerDirectory",
    "open_directory",
    "start_broker",
    "start_embedded",
    "start_postgres",
    "start_valkey",
]

BROKER_ROLE = "broker"
BROKER_START_TIMEOUT_S = 30.0
_ADDRESS_BYTES_MAX = 256


@dataclass(frozen=True, slots=True)
class EmbeddedServers:
    """Addresses of what was started; empty for what was not. `pids` by role: valkey, postgres, broker."""

    redis_url: str
    postgres_url: str
    kafka_bootstrap: str
    pids: dict[str, int]


def start_embedded(
    children: ChildProcesses,
    data_dir: Path | None = None,
    *,
    redis: bool = True,
    postgres: bool = True,
    kafka: bool = True,
) -> EmbeddedServers:
    """Start the chosen servers side by side and return when all answer. Raises EmbeddedError.

    After an error the servers that did start are still the caller's to stop, through `children`.
    """
    directory = open_directory(children, data_dir) if redis or postgres else None
    with ThreadPoolExecutor(max_workers=3) as threads:
        valkey = threads.submit(start_valkey, children, directory) if directory and redis else None
        database = threads.submit(start_postgres, children, directory) if directory and postgres else None
        broker = threads.submit(start_broker, children) if kafka else None
    started = {"valkey": valkey, "postgres": database, "broker": broker}
    results = {role: future.result() for role, future in started.items() if future is not None}
    addresses = {role: address for role, (address, _) in results.items()}
    return EmbeddedServers(
        redis_url=addresses.get("valkey", ""),
        postgres_url=addresses.get("postgres", ""),
        kafka_bootstrap=addresses.get("broker", ""),
        pids={role: pid for role, (_, pid) in results.items()},
    )


def start_broker(children: ChildProcesses) -> tuple[str, int]:
    """Start a broker and return its (bootstrap address, pid). Raises EmbeddedError."""
    # By path, so that whatever the working directory holds cannot take this package's place.
    process = children.spawn(
        BROKER_ROLE,
        [sys.executable, "-P", str(Path(embedded_broker.__file__))],
        stdout=subprocess.PIPE,
        tier=Tier.SERVER,
    )
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], BROKER_START_TIMEOUT_S)
    address = os.read(process.stdout.fileno(), _ADDRESS_BYTES_MAX).decode().strip() if readable else ""
    if not address:
        process.kill()
        children.forget(process)
        raise EmbeddedError("the embedded Kafka broker did not start: set NAVSTREAM_KAFKA_BOOTSTRAP to a Kafka cluster")
    return address, process.pid
