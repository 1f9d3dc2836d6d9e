"""Why a message of a state stream was sent (resolvers/streams.py)."""

from __future__ import annotations

from enum import StrEnum

import strawberry


class StreamKind(StrEnum):
    SNAPSHOT = "SNAPSHOT"
    UPDATE = "UPDATE"
    HEARTBEAT = "HEARTBEAT"
    RESET = "RESET"


strawberry.enum(
    StreamKind,
    description=(
        "Why a message was sent. SNAPSHOT: the first, complete. UPDATE: something selected changed. HEARTBEAT: "
        "nothing changed for a while, the last value again; it means that the value is current. While that is not "
        "known, because the source of the values is not heard, none is sent, and the first message afterwards is an "
        "UPDATE or a RESET. RESET: the shard has a new owner; a fresh and complete value, `sequence` begins anew "
        "under a greater `epoch`."
    ),
)
