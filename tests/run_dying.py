"""navstream's command line in a process that kills itself at a step:

    python -m tests.run_dying PLACE WHEN COUNT [PLACE WHEN COUNT …] -- COMMAND…

PLACE is `module:name` or `module:Class.name`, where the function is looked up when it is called. WHEN is

    before, after    SIGKILL, just before or after the call that is the COUNT-th with something to do: whose second
                     argument (before) or result (after) is not empty
    never            each call waits for ever

The program itself knows nothing of this.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, when: str, count: int) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, dying(getattr(owner, name), when, count))


def dying(original: Callable[..., Any], when: str, count: int) -> Callable[..., Any]:
    left = count

    def meets(what: object) -> None:
        nonlocal left
        left -= what is None or bool(what)
        if not left:
            die()

    @functools.wraps(original)
    async def later(*arguments: Any, **named: Any) -> Any:
        if when == "never":
            await asyncio.Event().wait()
        if when == "before":
            meets(arguments[1])
        result = await original(*arguments, **named)
        if when == "after":
            meets(result)
        return result

    @functools.wraps(original)
    def at_once(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        meets(result)
        return result

    return later if inspect.iscoroutinefunction(original) else at_once


def main() -> None:
    steps, command = sys.argv[1:], []
    if "--" in steps:
        at = steps.index("--")
        steps, command = steps[:at], steps[at + 1 :]
    navstream = importlib.import_module("navstream")
    for at in range(0, len(steps), 3):
        arm(steps[at], steps[at + 1], int(steps[at + 2]))
    sys.argv = ["navstream", *command]
    navstream.main()


if __name__ == "__main__":
    main()
