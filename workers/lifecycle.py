"""The life of a worker process: run its loops until SIGINT or SIGTERM, end when any of them fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


def stop_on_signal() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set. Needs a running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


async def run_together(*loops: Coroutine[Any, Any, None]) -> None:
    """Run loops that each end when their process is asked to stop; the first that fails ends the others."""
    async with asyncio.TaskGroup() as group:
        for loop in loops:
            group.create_task(loop)
