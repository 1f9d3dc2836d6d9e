"""Every Redis key and channel, in one place. `{n}` is a hash tag: one shard lives in one Cluster slot.

Channels are sharded ones (SPUBLISH, engine.runtime.subscriber): a channel lies in the slot of its name, so that one
script can write a key and tell the channel of it.
"""

from __future__ import annotations

PRICES = "prices"
QUOTES_CHANNEL = "quotes:{prices}"
# Hash: symbol → packed classification (engine.assets.Classification), the one in force. PostgreSQL has them all.
ASSETS = "assets"
# The ids of the portfolios that have new badge events; a hint, which may be lost.
BADGES_CHANNEL = "badges"


def quotes_sequence(publisher: str) -> str:
    """Text: the sequence of the last frame of quotes that a publisher sent; goes with it."""
    return f"quotes_sequence:{{{PRICES}}}:{publisher}"


def shard(n: int) -> str:
    """Hash: epoch, sequence, owner, updated_at_ns: the pointer that readers follow; its epoch only grows.

    `positions_epoch` is the newest epoch that claimed the positions, which a new owner does before it moves the
    pointer; `positions_basis` is what all of them were written with but the ledger: cuts, splits, classifications.
    """
    return f"shard:{{{n}}}"


def marks(n: int, epoch: int) -> str:
    """Hash: portfolio id → packed mark (engine.marks), written under the epoch of the shard's owner."""
    return f"marks:{{{n}}}:{epoch}"


def marks_channel(n: int) -> str:
    """Channel: one frame (engine.marks) per flush, with the watched ones of the marks that it wrote."""
    return f"marks:{{{n}}}"


def interest_channel(n: int) -> str:
    """Channel: which of the shard's portfolios somebody watches (engine.messages.InterestFrame); a hint, which may be
    lost."""
    return f"interest:{{{n}}}"


def snapshots(n: int) -> str:
    """List: one frame (engine.marks) with all of the shard's marks per boundary, stamped with it, oldest first.

    The owner appends at the tail, the snapshots worker drains the head; beyond
    `hot_state_redis.SNAPSHOT_FRAMES_MAX` the oldest are dropped.
    """
    return f"snapshots:{{{n}}}"


def positions(n: int, portfolio_id: str) -> str:
    """Hash: symbol → packed position (engine.positions.HotPosition)."""
    return f"positions:{{{n}}}:{portfolio_id}"


def sectors(n: int, portfolio_id: str) -> str:
    """Sorted set: sector → weight at the last fill (a double, good for ranking)."""
    return f"sectors:{{{n}}}:{portfolio_id}"


def sector_values(n: int, portfolio_id: str) -> str:
    """Hash: sector → exact value in micro-units at the last fill."""
    return f"sector_values:{{{n}}}:{portfolio_id}"
