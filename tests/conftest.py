"""Real servers for the tests: started when a test first asks, on free ports, gone at the end of the session.

Each session has servers of its own, so runs side by side never meet; and a session that is killed leaves
nothing behind (engine.runtime.reaper). Within a session a test is isolated by `redis_db` (emptied),
`database` (one per module, migrated), `empty_database` (one per module, without tables) and `topic` (a name
of its own).
"""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import redis
from hypothesis import settings

from engine.runtime.embedded import (
    ServerDirectory,
    open_directory,
    start_broker,
    start_postgres,
    start_valkey,
)
from engine.runtime.reaper import ChildProcesses
from engine.stores.migrate import upgrade
from tests.redis_cluster import RedisClusterServers

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("navstream", deadline=None)
settings.load_profile("navstream")


def run_apart(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end in a thread of its own, away from the tests' event loop."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(asyncio.run, work).result()


def migrate(url: str) -> None:
    """Bring the database at `url` to the newest schema, as production does."""
    run_apart(upgrade(url))


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def create_database(server_url: str, template: str = "template0") -> str:
    """A new database on the server; returns its URL."""
    name = f"test_{uuid.uuid4().hex}"
    run_apart(_execute(server_url, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY WAL_LOG"))
    return urlsplit(server_url)._replace(path=f"/{name}").geturl()


def drop_database(server_url: str, url: str) -> None:
    run_apart(_execute(server_url, f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)"))


@pytest.fixture(scope="session")
def children() -> Iterator[ChildProcesses]:
    with ChildProcesses() as started:
        yield started


@pytest.fixture(scope="session")
def server_directory(children: ChildProcesses) -> ServerDirectory:
    return open_directory(children, None)


@pytest.fixture(scope="session")
def valkey_url(children: ChildProcesses, server_directory: ServerDirectory) -> str:
    return start_valkey(children, server_directory)[0]


@pytest.fixture(scope="session")
def postgres_url(children: ChildProcesses, server_directory: ServerDirectory) -> str:
    """The server, by its maintenance database; tests write into `database` or `empty_database`."""
    return start_postgres(children, server_directory)[0]


@pytest.fixture(scope="session")
def kafka_bootstrap(children: ChildProcesses) -> str:
    return start_broker(children)[0]


@pytest.fixture(scope="session")
def migrated_template(postgres_url: str) -> str:
    """The name of a database that Alembic built from zero, once; copies of it are quick."""
    url = create_database(postgres_url)
    migrate(url)
    return urlsplit(url).path[1:]


@pytest.fixture(scope="module")
def database(postgres_url: str, migrated_template: str) -> Iterator[str]:
    """The URL of a migrated database that this module has to itself."""
    url = create_database(postgres_url, migrated_template)
    yield url
    drop_database(postgres_url, url)


@pytest.fixture
def fresh_database(postgres_url: str, migrated_template: str) -> Iterator[str]:
    """The URL of a migrated database that this test has to itself."""
    url = create_database(postgres_url, migrated_template)
    yield url
    drop_database(postgres_url, url)


@pytest.fixture(scope="module")
def empty_database(postgres_url: str) -> Iterator[str]:
    """The URL of a database without tables that this module has to itself."""
    url = create_database(postgres_url)
    yield url
    drop_database(postgres_url, url)


@pytest.fixture
def redis_db(valkey_url: str) -> str:
    """The URL of an empty Redis; no other session has this server, and tests run one after another."""
    with redis.Redis.from_url(valkey_url, socket_timeout=5) as client:
        client.flushall()
    return valkey_url


@pytest.fixture(scope="session")
def cluster_servers(children: ChildProcesses, server_directory: ServerDirectory) -> RedisClusterServers:
    return RedisClusterServers(children, server_directory.path / "cluster")


@pytest.fixture
def cluster_db(cluster_servers: RedisClusterServers) -> RedisClusterServers:
    """An empty cluster of three masters, all of them there, with the slots where they were in the beginning or not."""
    cluster_servers.wait_until_whole()
    cluster_servers.flush()
    return cluster_servers


@pytest.fixture(params=["server", "cluster"])
def either_redis(request: pytest.FixtureRequest) -> str:
    """The URL of an empty Redis: a server's, then a cluster's."""
    if request.param == "server":
        return str(request.getfixturevalue("redis_db"))
    cluster: RedisClusterServers = request.getfixturevalue("cluster_db")
    return cluster.url


@pytest.fixture
def topic(kafka_bootstrap: str) -> str:
    """A topic name that nothing has used; the broker makes the topic on first use, with 4 partitions."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def seed() -> int:
    """What random input is made from; printed, so that a run can be repeated."""
    seed = int(os.environ.get("NAVSTREAM_SIMULATION_SEED", random.SystemRandom().randrange(2**32)))
    print(f"NAVSTREAM_SIMULATION_SEED={seed}")
    return seed
