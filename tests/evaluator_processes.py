"""Evaluators as processes that a test starts, kills and stops; all are gone when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from engine.runtime.reaper import ChildProcesses
from engine.runtime.settings import Settings


class Evaluators:
    """Evaluator processes by name; all are gone when this ends."""

    def __init__(self, children: ChildProcesses, settings: Settings) -> None:
        self._children = children
        self._environment = dict(os.environ) | settings.environment()
        self._environment["NAVSTREAM_LEASE_DURATION_MS"] = str(settings.lease_duration_ms)
        self._environment["NAVSTREAM_LEASE_RENEWAL_INTERVAL_MS"] = str(settings.lease_renewal_interval_ms)
        self._environment["NAVSTREAM_FLUSH_INTERVAL_MS"] = str(settings.flush_interval_ms)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        program = str(Path(__file__).with_name("run_evaluator.py"))
        self.running[name] = self._children.spawn(name, [sys.executable, program], env=self._environment)

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        self._children.forget(process)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.running[name].send_signal(number)

    async def stop(self) -> dict[str, int]:
        """Exit statuses after SIGTERM."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        statuses = {}
        for name, process in self.running.items():
            statuses[name] = await asyncio.to_thread(process.wait, 15)
            self._children.forget(process)
        self.running.clear()
        return statuses

    def destroy(self) -> None:
        for name in list(self.running):
            self.signal(name, signal.SIGCONT)
            self.kill(name)


@asynccontextmanager
async def evaluators(children: ChildProcesses, settings: Settings) -> AsyncIterator[Evaluators]:
    started = Evaluators(children, settings)
    try:
        yield started
    finally:
        started.destroy()
