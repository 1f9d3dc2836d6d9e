"""Why the gateway closes a WebSocket: one table of codes, each with its meaning and whether to come back.

4400 to 4499 are those of the graphql-transport-ws protocol; 1012 and 1013 are registered with IANA. The `graphql-ws`
client for JavaScript reconnects on its own after those marked so, and gives up after the others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CloseCode:
    code: int
    name: str
    meaning: str
    worth_reconnect: bool


RESTART = CloseCode(1012, "RESTART", "the server restarts; reconnect with jitter", True)
TRY_LATER = CloseCode(1013, "TRY_LATER", "the client read too slowly, or the server is overloaded", True)
BAD_MESSAGE = CloseCode(4400, "BAD_MESSAGE", "a message is not one of the protocol's", False)
NOT_ACKNOWLEDGED = CloseCode(4401, "NOT_ACKNOWLEDGED", "an operation before connection_ack", False)
FORBIDDEN = CloseCode(4403, "FORBIDDEN", "no token, a wrong one, or it has expired; come back with a new one", True)
BAD_PROTOCOL = CloseCode(4406, "BAD_PROTOCOL", "only graphql-transport-ws is spoken", False)
INIT_TIMEOUT = CloseCode(4408, "INIT_TIMEOUT", "connection_init did not come in time", True)
DUPLICATE_OPERATION = CloseCode(4409, "DUPLICATE_OPERATION", "an operation with this id is running", False)
TOO_MANY = CloseCode(4429, "TOO_MANY", "connection_init twice, or too many sockets of one subject", False)

CLOSE_CODES = (
    RESTART,
    TRY_LATER,
    BAD_MESSAGE,
    NOT_ACKNOWLEDGED,
    FORBIDDEN,
    BAD_PROTOCOL,
    INIT_TIMEOUT,
    DUPLICATE_OPERATION,
    TOO_MANY,
)
