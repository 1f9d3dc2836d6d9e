"""A Redis Cluster as navstream uses it: commands go to the master of their key's slot, and one master's end is its own.

redis-py knows the protocol, the slots and the connections. Three things are done here, because there one node that is
away closes all connections to all nodes, and a command of a pipeline that is answered MOVED costs its neighbours:

    pipeline()   commands are grouped by node and sent to all of them at once: one round trip. What fails on one node
                 leaves the connections to the others alone.
    send()       commands already packed whose keys share a slot, on one connection of its master: a flush.
    MOVED, ASK   are followed, by a pipeline command for command, by `send` with all commands again, in their order:
                 what is sent that way must bear being done twice.

The topology is read at first use and, when a node did not answer or the cluster was down, again before the next
command, at most every REFRESH_INTERVAL_S. The command that met the failure fails: its sender decides what then.

Commands take `redis.exceptions.RedisClusterException` where slots have no master; it is none of RedisError.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from redis._parsers import AsyncCommandsParser
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode, PipelineCommand
from redis.asyncio.connection import Connection, SSLConnection, parse_url
from redis.commands import AsyncRedisClusterCommands
from redis.event import EventDispatcher
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ClusterError,
    MaxConnectionsError,
    MovedError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from engine.runtime.lanes import read_answer

# `redis+cluster://user:password@host:port,host:port,…`, and the same over TLS.
SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
# How often the topology is read again while a node is away; each time all connections are made anew.
REFRESH_INTERVAL_S = 0.25
# A slot on its way answers ASK, then MOVED; more in a row is two nodes that do not agree.
REDIRECTS_MAX = 4
_NODE_GONE = (RedisConnectionError, RedisTimeoutError, ClusterDownError, OSError)


def is_cluster(url: str) -> bool:
    return urlsplit(url).scheme in SCHEMES


class ClusterClient(RedisCluster):
    """Made by engine.runtime.connections.connect_redis. Connects on first use."""

    def __init__(self, url: str, connection_class: dict[type, type[Any]], **options: Any) -> None:
        """`connection_class` says which class to use in place of redis-py's. Raises ValueError for a bad URL."""
        nodes, credentials = _parse(url)
        is_tls = credentials.pop("connection_class", Connection) is SSLConnection
        super().__init__(startup_nodes=nodes, ssl=is_tls, reinitialize_steps=0, **credentials, **options)
        kind = connection_class[self.connection_kwargs["connection_class"]]
        self.connection_kwargs["connection_class"] = kind
        for node in self.nodes_manager.startup_nodes.values():
            node.connection_class = kind
        self.commands_parser = _Commands(self)
        self._refresh_at_s = 0.0
        self._failed_node: str | None = None
        self._is_stale = False

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> ClusterPipeline:  # type: ignore[override]
        """Commands for one round trip, each with its key as first argument (EVAL: its first key)."""
        if transaction or shard_hint:
            raise ValueError("a cluster has no transactions across slots")
        return ClusterPipeline(self)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """redis-py's, which sends a client's very first command to any node, also one that is away."""
        await self.ready()
        return await super().execute_command(*args, **options)

    async def ready(self) -> None:
        """Know the topology, as it was when a node last failed or later. Raises RedisClusterException, RedisError."""
        await self.initialize()
        if self._is_stale and time.monotonic() >= self._refresh_at_s:
            self._refresh_at_s = time.monotonic() + REFRESH_INTERVAL_S
            await self.nodes_manager.initialize(last_failed_node_name=self._failed_node)
            self._is_stale = False

    def node_name(self, key: str) -> str:
        """The node of the key's slot; empty before the topology is known."""
        nodes = self.nodes_manager.slots_cache.get(self.keyslot(key))
        return str(nodes[0].name) if nodes else ""

    def note_failure(self, node_name: str | None) -> None:
        """A node did not answer, or answered that it can not: another may have its slots by now."""
        self._is_stale, self._failed_node = True, node_name

    async def send(self, key: str, commands: Sequence[list[bytes]]) -> list[Any]:
        """Send packed commands, all of the slot of `key`, on one connection; their answers. Raises RedisError, OSError.

        An error among the answers is raised once all of them are read.
        """
        await self.ready()
        node, asking = self.get_node_from_key(key), False
        for _ in range(REDIRECTS_MAX):
            assert node is not None
            answers = await self._exchange(node, commands, asking)
            error = next((answer for answer in answers if isinstance(answer, ResponseError)), None)
            if error is None:
                return answers
            if not isinstance(error, AskError):
                raise error
            asking = not isinstance(error, MovedError)
            if not asking:
                await self.nodes_manager.move_slot(error)
            node = self.get_node(host=error.host, port=error.port)
            if node is None:
                self.note_failure(None)
                raise error
        raise ClusterError("the nodes do not agree on whose slot it is")

    async def _exchange(self, node: ClusterNode, commands: Sequence[list[bytes]], asking: bool) -> list[Any]:
        connection = node.acquire_connection()
        try:
            await node.disconnect_if_needed(connection)
            before: list[bytes] = connection.pack_command("ASKING") if asking else []
            await connection.send_packed_command([part for command in commands for part in (*before, *command)])
            answers = [await read_answer(connection) for _ in range(len(commands) * (1 + asking))]
        except BaseException as error:
            # An answer left unread would be the next command's.
            await connection.disconnect(nowait=True)
            if isinstance(error, _NODE_GONE):
                self.note_failure(node.name)
            raise
        finally:
            node.release(connection)
        if any(isinstance(answer, ClusterDownError) for answer in answers):
            self.note_failure(node.name)
        return answers[1::2] if asking else answers

    async def run(self, commands: Sequence[PipelineCommand], raise_on_error: bool) -> list[Any]:
        """Send commands to the nodes of their keys, all at once."""
        await self.ready()
        parts: dict[str, tuple[ClusterNode, list[PipelineCommand]]] = {}
        for command in commands:
            node = self.get_node_from_key(_key(command.args))
            assert node is not None
            parts.setdefault(node.name, (node, []))[1].append(command)
        await asyncio.gather(*(self._run_on(node, part) for node, part in parts.values()))
        for command in commands:
            if isinstance(command.result, AskError | TryAgainError):
                command.result = await self.execute_command(*command.args, **command.kwargs)
            elif isinstance(command.result, Exception) and (raise_on_error or isinstance(command.result, _NODE_GONE)):
                raise command.result
        return [command.result for command in commands]

    async def _run_on(self, node: ClusterNode, commands: list[PipelineCommand]) -> None:
        """Leaves each command its result or error."""
        try:
            await node.execute_pipeline(commands)
        except MaxConnectionsError as error:  # our own affair
            for command in commands:
                command.result = error
            return
        except (RedisError, OSError) as error:
            for command in commands:
                command.result = error
        if any(isinstance(command.result, _NODE_GONE) for command in commands):
            self.note_failure(node.name)


class ClusterPipeline(AsyncRedisClusterCommands):
    """What redis-py's pipeline without transaction does, of a ClusterClient."""

    # What redis-py's type annotations of commands ask for.
    _is_async_client: Literal[True] = True
    _event_dispatcher = EventDispatcher()

    def __init__(self, client: ClusterClient) -> None:
        self._client = client
        self._commands: list[PipelineCommand] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._commands = []

    def __len__(self) -> int:
        return len(self._commands)

    def __bool__(self) -> bool:
        return True

    def execute_command(self, *args: Any, **options: Any) -> Self:
        self._commands.append(PipelineCommand(len(self._commands), *args, **options))
        return self

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """The answers in the commands' order. The first error is raised; or those that a node answered are left there,
        as on a single server, and only that a node is away is raised."""
        commands, self._commands = self._commands, []
        return await self._client.run(commands, raise_on_error) if commands else []


class _Commands(AsyncCommandsParser):
    """Where commands have their keys, asked once, of any master: the first one may be away."""

    __slots__ = ("_client",)

    def __init__(self, client: ClusterClient) -> None:
        super().__init__()
        self._client = client

    async def initialize(self, node: ClusterNode | None = None) -> None:
        if self.commands:
            return
        error: Exception | None = None
        for candidate in self._client.get_primaries():
            try:
                await super().initialize(candidate)
                return
            except (RedisError, OSError) as failure:
                error = failure
        raise error or RedisConnectionError("the cluster has no masters")


def _parse(url: str) -> tuple[list[ClusterNode], dict[str, Any]]:
    """The nodes to begin with, and what a connection to any node takes. Raises ValueError."""
    parts = urlsplit(url)
    userinfo, at, hosts = parts.netloc.rpartition("@")
    if parts.path not in ("", "/", "/0"):
        raise ValueError("a cluster has no database but 0")
    nodes: list[ClusterNode] = []
    options: dict[str, Any] = {}
    for host in hosts.split(","):
        options = dict(parse_url(f"{SCHEMES[parts.scheme]}://{userinfo}{at}{host}/?{parts.query}"))
        if "host" not in options:
            raise ValueError("a cluster's URL names hosts: redis+cluster://host:port,host:port")
        nodes.append(ClusterNode(options.pop("host"), options.pop("port", 6379)))
    return nodes, options


def _key(args: Sequence[Any]) -> Any:
    return args[3] if args[0] == "EVAL" else args[1]
