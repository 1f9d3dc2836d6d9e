"""Checks of portfolios: both sides are read, compared (engine.reconciliation), and read again where they differ.

    1. fold the ledgers up to their accounts                 slow where ledgers are long; nothing waits for it
    2. read records (one instant), hot state, new entries    quick, so that all are of nearly the same time
    3. compare; what differs is read again                   up to ATTEMPTS_MAX times

A system at work is always on its way from one state to the next: a mark follows the ledger within a flush, hot
positions a little earlier, a portfolio just opened has no mark yet, a shard taken over is behind for a moment. What was
in the ledger at the first attempt must be in hot state at the last one, and what still differs then is a difference.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from redis.exceptions import ResponseError
from sqlalchemy.ext.asyncio import AsyncEngine

from engine.ledger import LedgerEntry
from engine.marks import Mark, decode_mark
from engine.portfolio import LedgerMismatch
from engine.positions import HotPosition, hot_position_decoder
from engine.reconciliation import Difference, Finding, HotPortfolio, compare
from engine.runtime.connections import RedisClient
from engine.stores import redis_keys
from engine.stores.reconciliations import Reconciliations, Records
from workers.ledger_folds import Fold, LedgerFolds
from workers.quote_history import QuoteHistory

ATTEMPTS_MAX = 10
ATTEMPT_INTERVAL_S = 0.3


@dataclass(frozen=True, slots=True)
class Check:
    """A finding and its shard.

    `is_kept`: the shard's owner has a lease, readers are pointed at its epoch, and it is not further behind the quotes
    than their history reaches. `is_behind`: it has a lease and is.
    """

    finding: Finding
    shard: int
    shard_epoch: int
    is_kept: bool
    is_behind: bool


class PortfolioChecks:
    """`pause` is awaited between reads of the ledger."""

    def __init__(
        self, engine: AsyncEngine, redis: RedisClient, history: QuoteHistory, pause: Callable[[], Awaitable[None]]
    ) -> None:
        self._store = Reconciliations(engine)
        self._folds = LedgerFolds(engine, pause)
        self._redis = redis
        self._history = history

    async def check(self, names: Sequence[str]) -> list[Check]:
        """Check portfolios, in no particular order. Raises DBAPIError, RedisError, OSError when a server is away."""
        began_at_s = time.monotonic()
        folds, checks = await self._settle(names)
        # Where a kept fold does not fit, the ledger may have been set back behind it: it is read from its first entry.
        doubtful = [
            name for name, check in checks.items() if check.finding.is_broken and folds[name].begun_at_s < began_at_s
        ]
        if doubtful:
            anew = await self._settle(doubtful)
            folds, checks = folds | anew[0], checks | anew[1]
        for name, check in checks.items():
            if not check.finding.is_broken:
                self._folds.keep(folds[name])
        return list(checks.values())

    async def _settle(self, names: Sequence[str]) -> tuple[dict[str, Fold], dict[str, Check]]:
        """Check until nothing differs or all attempts are made."""
        folds = await self._folds.fold(names)
        checks: dict[str, Check] = {}
        pending = list(folds)
        for attempt in range(ATTEMPTS_MAX):
            if attempt:
                await asyncio.sleep(ATTEMPT_INTERVAL_S)
            found = await self._attempt(pending, folds)
            checks |= found
            pending = [name for name, check in found.items() if check.finding.differences and not folds[name].mismatch]
            if not pending:
                break
        return folds, checks

    async def _attempt(self, names: list[str], folds: dict[str, Fold]) -> dict[str, Check]:
        records = await self._store.records(names)
        hot, flushed_at_ns = await self._hot(records.shard_of)
        # Read after hot state, so that what it is of is in them.
        entries = await self._folds.entries(
            {name: folds[name].portfolio.ledger_sequence for name in records.portfolios if not folds[name].mismatch}
        )
        found = {}
        for name, shard in records.shard_of.items():
            finding = self._compare(folds[name], records, hot[name], entries.get(name, []))
            tenure = records.tenures[shard]
            is_current = flushed_at_ns[shard] >= self._history.begins_at_ns
            is_kept = tenure.is_owned and hot[name].epoch == tenure.epoch and is_current
            is_behind = tenure.is_owned and not is_current
            found[name] = Check(finding, shard, tenure.epoch, is_kept, is_behind)
        return found

    def _compare(self, fold: Fold, records: Records, hot: HotPortfolio, entries: list[LedgerEntry]) -> Finding:
        name = fold.portfolio.portfolio_id
        if not fold.mismatch:
            splits = records.splits[records.shard_of[name]]
            try:
                return compare(fold.portfolio, entries, records.portfolios[name], hot, splits, self._history)
            except LedgerMismatch as mismatch:
                fold.mismatch = str(mismatch)
        return _broken(fold, hot)

    async def _hot(self, shard_of: Mapping[str, int]) -> tuple[dict[str, HotPortfolio], dict[int, int]]:
        """Marks and hot positions, and when each shard was flushed last, read in two round trips.

        What can not be read is as good as missing.
        """
        shards = sorted(set(shard_of.values()))
        async with self._redis.pipeline(transaction=False) as pipe:
            for shard in shards:
                pipe.hmget(redis_keys.shard(shard), ["epoch", "updated_at_ns"])
            pointers = [_answered(answer) or (None, None) for answer in await pipe.execute(raise_on_error=False)]
            epochs = {shard: _count(epoch) for shard, (epoch, _) in zip(shards, pointers, strict=True)}
            flushed_at_ns = {shard: _count(at) for shard, (_, at) in zip(shards, pointers, strict=True)}
            for name, shard in shard_of.items():
                # In this order: hot positions are never behind a mark that was read before them.
                pipe.hget(redis_keys.marks(shard, epochs[shard]), name)
                pipe.hgetall(redis_keys.positions(shard, name))
            answers = await pipe.execute(raise_on_error=False)
        found = {}
        for at, (name, shard) in enumerate(shard_of.items()):
            mark, missing = _mark(answers[2 * at], epochs[shard])
            found[name] = HotPortfolio(epochs[shard], mark, missing, _positions(answers[2 * at + 1]))
        return found, flushed_at_ns


def _broken(fold: Fold, hot: HotPortfolio) -> Finding:
    name = fold.portfolio.portfolio_id
    difference = Difference(name, "ledger", "a ledger that folds", fold.mismatch)
    sequence = hot.mark.sequence if hot.mark else 0
    return Finding(name, hot.epoch, sequence, fold.portfolio.ledger_sequence, 0, [difference], is_broken=True)


def _answered(answer: Any) -> Any:
    """An answer of Redis; None for a key of the wrong type. Raises what else went wrong."""
    if isinstance(answer, ResponseError):
        return None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _count(text: bytes | None) -> int:
    """A number of the pointer; 0 when it is none."""
    return int(text) if text is not None and text.isdigit() else 0


def _mark(answer: Any, epoch: int) -> tuple[Mark | None, str]:
    """The mark, or why there is none."""
    packed = _answered(answer)
    if packed is None:
        return None, "none"
    try:
        return decode_mark(packed, epoch), ""
    except ValueError as error:
        return None, str(error)


def _positions(answer: Any) -> dict[str, HotPosition | None]:
    found: dict[str, HotPosition | None] = {}
    for symbol, packed in (_answered(answer) or {}).items():
        try:
            position = hot_position_decoder.decode(packed)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            position = None
        found[symbol.decode(errors="replace")] = position
    return found
