"""One evaluator as a process of its own, its settings from the environment: the simulation's victim."""

from __future__ import annotations

import asyncio

from engine.runtime.clock import WallClock
from engine.runtime.settings import Settings
from workers.evaluator import run_evaluator
from workers.lifecycle import stop_on_signal


async def main() -> None:
    await run_evaluator(Settings(), WallClock(), stop_on_signal())


if __name__ == "__main__":
    asyncio.run(main())
