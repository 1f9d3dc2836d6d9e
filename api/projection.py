"""Projections: what a subscription shows of a mark, compiled once, so that a message is text and not an execution.

A projection is made of the selection that graphql-core collects (resolvers/selection.py) and of the tables that say
how a field comes from a mark (resolvers/nav.py, resolvers/pnl.py). It is an f-string: what is the same in every message
as it is sent, and what writes a value where messages differ. { nav at: asOf } becomes

    {{"data":{{"navUpdates":{{"nav":"{scaled_text(row[0], 6)}","at":"{instant(row[14])}"}}}}}}

What it writes is byte for byte what executing the operation and encoding the result gives, except that a whole number
is written also where it exceeds GraphQL's Int, which execution refuses. A selection that holds anything else than
fields of those tables (an argument, a directive of somebody's own, a field that is computed) has no projection, and
graphql-core makes its messages.

The f-string is the projection's key: equal keys mean equal messages of equal marks, whatever the operations were called
or which variables they had, and what is not in it can not make messages differ.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import orjson
from graphql import FieldNode, GraphQLError, GraphQLObjectType, GraphQLResolveInfo, get_named_type

from engine.amounts import MICRO_DIGITS, scaled_text
from engine.explain import PARTS, SUMS, differences
from engine.instants import to_datetime
from engine.marks import MARK, RATIO_DIGITS, UNKNOWN, MarkQuality, Row
from resolvers.context import Info
from resolvers.mark_messages import ChangeField, Fields, MarkField, Shown
from resolvers.nav import NAV_FIELDS, NavUpdate
from resolvers.pnl import PNL_FIELDS, PnlUpdate
from resolvers.scalars import write_instant
from resolvers.selection import python_name, selection_of, subselection
from resolvers.stream_kind import StreamKind

INSTANTS_COUNT_MAX = 4_096  # all marks of a frame have the same instant
# Front ends have a few dozen selections; what is compiled again and again takes a fraction of what validating it does.
SELECTIONS_COUNT_MAX = 500

_FIELDS: dict[str, Fields] = {NavUpdate.__name__: NAV_FIELDS, PnlUpdate.__name__: PNL_FIELDS}
_COLUMN_AT = {name: at for at, name in enumerate(MARK.names or ())}
# Where a change has its parts, and behind them their sum.
_PART_AT = {name: at for at, name in enumerate((*PARTS, "nav_change"))}
_SKIP_OR_INCLUDE = frozenset({"skip", "include"})

# What writes a value, as a part of the f-string; {} is the value's own place.
_WRITTEN: dict[Shown, str] = {
    Shown.AMOUNT: f'"{{{{scaled_text({{}}, {MICRO_DIGITS})}}}}"',
    Shown.RATIO: "{{ratio({})}}",
    Shown.INSTANT: '"{{instant({})}}"',
    Shown.WHOLE: "{{{}}}",
    Shown.QUALITY: '"{{QUALITIES[{}]}}"',
}
_MESSAGE_WRITTEN: dict[str, str] = {
    "kind": '"{kind}"',
    "portfolio_id": "{json(portfolio_id)}",
    "epoch": "{epoch}",
    "conflated": "{conflated}",
    "latency_ms": "{json(latency_ms)}",
}

# (portfolio_id, row, epoch, kind, conflated, latency_ms, before): the payload of a message that shows the mark `row`,
# as JSON; `before` is the mark of the message before, for an UPDATE alone.
Encode = Callable[[str, Row, int, StreamKind, int, float | None, Row | None], bytes]
_sums: Callable[[Row], tuple[int, ...]] = itemgetter(*(_COLUMN_AT[name] for name in SUMS))


class _NotCompilableError(Exception):
    """The selection holds something that only graphql-core can answer."""


class Projection:
    """A compiled selection.

    key               equal for equal messages of equal marks
    compares_before   whether messages say what changed since the one before
    shows_latency     whether they differ from moment to moment
    values            of a mark, what has to differ from the message before for another to be worth it
    """

    __slots__ = ("compares_before", "encode", "key", "shows_latency", "values")

    def __init__(self, alone: str, compared: str, shows_latency: bool, columns: Sequence[int]) -> None:
        """The f-strings without a message before and with one, and where the columns are that they show."""
        self.key: Hashable = compared
        self.compares_before = alone != compared
        self.shows_latency = shows_latency
        self.values: Callable[[Row], Hashable] = itemgetter(*columns) if columns else _nothing
        self.encode: Encode = _either(_made(alone), _made(compared)) if self.compares_before else _made(alone)


def compile_projection(info: Info) -> Projection | None:
    """What the operation shows of a mark; None when graphql-core has to make its messages."""
    raw = info._raw_info
    fields = _FIELDS.get(get_named_type(raw.return_type).name)
    if fields is None:
        return None
    try:
        _check_directives(raw.field_nodes)
        return _compile(raw, fields)
    except (_NotCompilableError, GraphQLError):  # GraphQLError: the condition of an @include or @skip is null
        return None


def _compile(info: GraphQLResolveInfo[Any], fields: Fields) -> Projection:
    object_type, selection = selection_of(info)
    alone: list[str] = []
    compared: list[str] = []
    shows_latency = False
    columns: set[int] = set()
    for response_name, nodes in selection.items():
        name = _field_name(object_type, nodes)
        field = None if name is None else fields.get(name)
        if isinstance(field, ChangeField):
            alone.append(_member(response_name, "null"))
            compared.append(_member(response_name, _change(info, object_type, nodes, field)))
        else:
            member = _member(response_name, _value(object_type, name, field))
            alone.append(member)
            compared.append(member)
        shows_latency = shows_latency or name == "latency_ms"
        columns |= set() if field is None else {_COLUMN_AT[column] for column in field.columns}
    root = str(info.path.key)
    return Projection(_payload(root, alone), _payload(root, compared), shows_latency, sorted(columns))


def _value(object_type: GraphQLObjectType, name: str | None, field: MarkField | None) -> str:
    if name is None:
        return f'"{object_type.name}"'
    if field is not None:
        return _WRITTEN[field.shown].format(f"row[{_COLUMN_AT[field.column]}]")
    if name in _MESSAGE_WRITTEN:
        return _MESSAGE_WRITTEN[name]
    raise _NotCompilableError


def _change(
    info: GraphQLResolveInfo[Any], object_type: GraphQLObjectType, nodes: Sequence[FieldNode], field: ChangeField
) -> str:
    change_type = get_named_type(object_type.fields[nodes[0].name.value].type)
    assert isinstance(change_type, GraphQLObjectType)
    members: list[str] = []
    for response_name, selected in subselection(info, change_type, nodes).items():
        name = _field_name(change_type, selected)
        if name is None:
            members.append(_member(response_name, f'"{change_type.name}"'))
        elif name in field.parts:
            place = f"change[{_PART_AT[field.parts[name]]}]"
            members.append(_member(response_name, _WRITTEN[Shown.AMOUNT].format(place)))
        else:
            raise _NotCompilableError
    return _object(members)


def _field_name(object_type: GraphQLObjectType, nodes: Sequence[FieldNode]) -> str | None:
    """The Python name of the selected field; None for __typename."""
    _check_directives(nodes)
    if any(node.arguments for node in nodes):
        raise _NotCompilableError
    return python_name(object_type, nodes[0].name.value)


def _check_directives(nodes: Iterable[FieldNode]) -> None:
    """Raises _NotCompilableError for any but those that graphql-core has followed in collecting the selection."""
    if any(directive.name.value not in _SKIP_OR_INCLUDE for node in nodes for directive in node.directives or ()):
        raise _NotCompilableError


def _payload(root: str, members: Iterable[str]) -> str:
    return _object([_member("data", _object([_member(root, _object(members))]))])


def _object(members: Iterable[str]) -> str:
    return f"{{{{{','.join(members)}}}}}"


def _member(name: str, value: str) -> str:
    # GraphQL's grammar has no other names. What follows is made code of, so it does not rest on the parser alone.
    if not (name.isascii() and name.isidentifier()):
        raise _NotCompilableError
    return f'"{name}":{value}'


@lru_cache(maxsize=SELECTIONS_COUNT_MAX)
def _made(text: str) -> Encode:
    """What writes the f-string, whose names are the arguments and _NAMES. In place of `before` it takes the change."""
    arguments = "portfolio_id, row, epoch, kind, conflated, latency_ms, change"
    # Of the client's nothing is in it but the names in the answer, which `_member` has checked.
    encode: Encode = eval(f"lambda {arguments}: f'{text}'.encode()", _NAMES.copy())  # noqa: S307
    return encode


def _either(alone: Encode, compared: Encode) -> Encode:
    """The one without a message before, the other with one."""

    def encode(
        portfolio_id: str,
        row: Row,
        epoch: int,
        kind: StreamKind,
        conflated: int,
        latency_ms: float | None,
        before: Row | None,
    ) -> bytes:
        if before is None:
            return alone(portfolio_id, row, epoch, kind, conflated, latency_ms, None)
        parts = differences(_sums(before), _sums(row))
        return compared(portfolio_id, row, epoch, kind, conflated, latency_ms, (*parts, sum(parts)))

    return encode


def _nothing(_: Row) -> Hashable:
    return None


def _ratio(ratio_e12: int) -> str:
    return "null" if ratio_e12 == UNKNOWN else f'"{scaled_text(ratio_e12, RATIO_DIGITS)}"'


@lru_cache(maxsize=INSTANTS_COUNT_MAX)
def _instant(ns: int) -> str:
    return write_instant(to_datetime(ns))


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


# What the f-strings name beside their arguments.
_NAMES: dict[str, object] = {
    "scaled_text": scaled_text,
    "ratio": _ratio,
    "instant": _instant,
    "json": _json,
    "QUALITIES": tuple(quality.name for quality in MarkQuality),
}
