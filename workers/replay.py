"""Replaying a recording into a running system: its splits and dividends are announced, then its quotes follow."""

from __future__ import annotations

import asyncio
from functools import partial

from engine.runtime.clock import Clock
from engine.runtime.settings import Settings
from workers.feeds.replay import bar_actions, parse_replay
from workers.feeds.select import make_feed
from workers.producing import announce_actions
from workers.quotes import run_quotes


async def run_replay(settings: Settings, recording: str, clock: Clock, stop: asyncio.Event) -> None:
    """Replay `FILE[@SPEED]` until `stop`. Raises ValueError when the clock or the file is not one for that."""
    feed = make_feed(f"replay:{recording}", clock)
    await announce_actions(settings, partial(bar_actions, parse_replay(recording)[0]), stop)
    await run_quotes(settings, feed, clock, stop)
