"""Awards and badge events: what the consumer of `badge-events` makes of its messages, in one transaction per batch.

    UNLOCKED             a row of badge_award, once per (portfolio, badge, version), for good
    LAPSED, ACTIVATED    badge_award.active
    each                 a row of badge_event, whose `sequence` counts the portfolio's events without gaps

A message is judged before it is booked:

    booked      it is new
    duplicate   its event id is booked already, or comes twice in the batch: nothing changes
    early       an event of the same badge that was proved before it is still in the outbox. It is not booked and stays
                in the outbox, which brings it again behind the other.
    refused     nobody has proved it: the prover's row of badge_state does not know its event, or its bytes are not
                those that the prover left in the outbox. A dead letter.

The events of a badge are numbered in their ids, `<badge>:<version>#<portfolio>#<n>`, so `active` is what the event
with the largest n says, in whatever order they arrive. Booked and duplicate messages leave the outbox, and refused
ones if they are what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.badges import BadgeEventKind, BadgeMessage, badge_message_decoder, badge_message_encoder
from engine.stores import outbox
from engine.stores.outbox import Connection

VERSION_MAX = 2**31 - 1

_STATES = """
    SELECT s.portfolio_id, s.badge_id, s.version, s.events_count
    FROM badge_state AS s JOIN unnest($1::text[], $2::text[], $3::integer[]) AS asked (portfolio_id, badge_id, version)
        USING (portfolio_id, badge_id, version)
"""
_BOOKED = "SELECT event_id FROM badge_event WHERE event_id = ANY($1::text[])"
_SEQUENCES = """
    SELECT asked.id, coalesce((
        SELECT sequence FROM badge_event WHERE portfolio_id = asked.id ORDER BY sequence DESC LIMIT 1
    ), 0) FROM unnest($1::text[]) AS asked (id)
"""
_AWARD = """
    INSERT INTO badge_award (portfolio_id, badge_id, version, awarded_at, active, evidence)
    VALUES ($1, $2, $3, $4, true, $5) ON CONFLICT DO NOTHING
"""
_ACTIVE = "UPDATE badge_award SET active = $4 WHERE portfolio_id = $1 AND badge_id = $2 AND version = $3"
_EVENT = """
    INSERT INTO badge_event (portfolio_id, sequence, event_id, kind, badge_id, version, at, evidence)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
"""


class BadMessageError(ValueError):
    """What the topic brought is no message of ours."""


def read_message(value: bytes | None) -> BadgeMessage:
    """Decode what the topic brought. Raises BadMessageError, also for what PostgreSQL could not take."""
    try:
        message = badge_message_decoder.decode(value or b"")
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadMessageError(str(error)) from None
    if any("\0" in name for name in (message.event_id, message.portfolio_id, message.badge_id)):
        raise BadMessageError("a name contains NUL")
    if message.v != 1 or not 1 <= message.version <= VERSION_MAX or message.at.tzinfo is None:
        raise BadMessageError("v is not 1, version is out of range, or at has no time zone")
    return message


@dataclass(frozen=True, slots=True)
class Judged:
    """What becomes of a batch's messages."""

    booked: list[BadgeMessage] = field(default_factory=list)
    duplicates: list[BadgeMessage] = field(default_factory=list)
    early: list[BadgeMessage] = field(default_factory=list)
    refused: list[BadgeMessage] = field(default_factory=list)


async def judge(connection: Connection, told: Sequence[tuple[BadgeMessage, bytes]]) -> Judged:
    """Sort a batch, in the order of arrival: messages, with the bytes that they were read from."""
    messages = [message for message, _ in told]
    asked = {_key(message) for message in messages}
    states = await connection.fetch(_STATES, *map(list, zip(*asked, strict=True))) if asked else []
    proved = {(row[0], row[1], row[2]): row[3] for row in states}
    known = {row[0] for row in await connection.fetch(_BOOKED, [message.event_id for message in messages])}
    before = {message.event_id: _before(message) for message in messages}
    waiting = await outbox.still_waiting(connection, [one for one in before.values() if one is not None])
    genuine = await outbox.genuine(connection, [(message.event_id, payload) for message, payload in told])
    judged = Judged()
    for message, payload in told:
        number = number_of(message)
        chosen: list[BadgeMessage]
        if number is None or number > proved.get(_key(message), 0):
            chosen = judged.refused
        elif message.event_id in known:
            chosen = judged.duplicates
        elif (message.event_id, payload) not in genuine:
            chosen = judged.refused
        elif before[message.event_id] in waiting - known:
            chosen = judged.early
        else:
            chosen = judged.booked
            known.add(message.event_id)
        chosen.append(message)
    return judged


async def book(connection: Connection, messages: Sequence[BadgeMessage]) -> None:
    """Write what `judge` found to be new; in the same transaction."""
    if not messages:
        return
    ids = sorted({message.portfolio_id for message in messages})
    sequences: dict[str, int] = dict(list(row) for row in await connection.fetch(_SEQUENCES, ids))
    awards, events, active = [], [], {}
    for message in messages:
        sequences[message.portfolio_id] += 1
        evidence = badge_message_encoder.encode(message.evidence).decode()
        place = (message.portfolio_id, message.badge_id, message.version)
        if message.kind is BadgeEventKind.UNLOCKED:
            awards.append((*place, message.at, evidence))
        else:
            active[place] = message.kind is BadgeEventKind.ACTIVATED
        sequence = sequences[message.portfolio_id]
        events.append((place[0], sequence, message.event_id, message.kind.value, *place[1:], message.at, evidence))
    await connection.executemany(_AWARD, awards)
    await connection.executemany(_ACTIVE, [(*place, is_active) for place, is_active in active.items()])
    await connection.executemany(_EVENT, events)


def number_of(message: BadgeMessage) -> int | None:
    """Which event of its badge a message is, from 1; None when the id is not that of its content."""
    name, _, number = message.event_id.rpartition("#")
    if name != f"{message.badge_id}:{message.version}#{message.portfolio_id}":
        return None
    # Ids are written in one way only, so that two of them never name the same event.
    ours = number.isascii() and number.isdigit() and not number.startswith("0") and len(number) <= 18
    if not ours or (int(number) == 1) is not (message.kind is BadgeEventKind.UNLOCKED):
        return None
    return int(number)


def count_outcomes(judged: Judged) -> Mapping[str, int]:
    return {
        "booked": len(judged.booked),
        "duplicate": len(judged.duplicates),
        "early": len(judged.early),
        "refused": len(judged.refused),
    }


def _key(message: BadgeMessage) -> tuple[str, str, int]:
    return (message.portfolio_id, message.badge_id, message.version)


def _before(message: BadgeMessage) -> str | None:
    """The id of the event of the same badge before this one."""
    number = number_of(message)
    if number is None or number == 1:
        return None
    return f"{message.event_id.rpartition('#')[0]}#{number - 1}"
