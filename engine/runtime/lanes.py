"""A connection to Redis that is kept for one thing, and on which commands leave the moment they are made.

A pool's connection is taken, looked at and written to by a task of its own before the first byte leaves. By then who
makes several large commands in a row has made them all, and the server has waited. On a lane the server reads one while
the next is made.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError


class Lane:
    """One exchange at a time. Its connection is the pool's, which closes it with all others.

    One that broke, or on which answers are still to come, because nobody waited for them, is given up: the next
    exchange has another.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._connection: AbstractConnection | None = None
        self._is_clear = True

    def send(self, commands: Sequence[Sequence[bytes]]) -> Coroutine[Any, Any, list[Any]]:
        """Send packed commands, at once where there is a connection. What is returned is to be awaited: it brings their
        answers, and raises RedisError, OSError. An error among the answers is raised once all of them are read."""
        connection = self._connection
        if connection is None or not self._is_clear or not _is_open(connection):
            return self._reopen_and_exchange(commands)
        self._write(connection, commands)
        return self._answers(connection, len(commands))

    async def release(self) -> None:
        """Give the connection back to the pool."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if not self._is_clear:
                await connection.disconnect(nowait=True)
            await self._pool.release(connection)

    async def _reopen_and_exchange(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        await self.release()
        connection = self._connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        self._write(connection, commands)
        return await self._answers(connection, len(commands))

    def _write(self, connection: AbstractConnection, commands: Sequence[Sequence[bytes]]) -> None:
        self._is_clear = False
        assert connection._writer is not None
        # What the socket does not take at once leaves with the loop's next turns; waiting for the answers is enough.
        connection._writer.writelines([part for command in commands for part in command])

    async def _answers(self, connection: AbstractConnection, count: int) -> list[Any]:
        answers = [await read_answer(connection) for _ in range(count)]
        self._is_clear = True
        error = next((answer for answer in answers if isinstance(answer, ResponseError)), None)
        if error is not None:
            raise error
        return answers


def _is_open(connection: AbstractConnection) -> bool:
    """Connected, and not closed by the server as far as was heard."""
    reader, writer = connection._reader, connection._writer
    return reader is not None and writer is not None and not reader.at_eof() and not writer.is_closing()


async def read_answer(connection: AbstractConnection) -> Any:
    """The next answer, an error included; raises when there is none."""
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error
