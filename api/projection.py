"""Projections: what a subscription shows of a mark, compiled once, so that a message is text and not an execution.

A projection is made of the selection that graphql-core collects (resolvers/selection.py) and of the tables that say
how a field comes from a mark (resolvers/nav.py, resolvers/pnl.py). It is a template with all that is the same in every
message, and for each hole where its value is found and how it is written:

    {"data":{"navUpdates":{"nav":%s,"at":%s}}}        nav, an amount; as_of_ns, an instant

What it writes is byte for byte what executing the operation and encoding the result gives. A selection that holds
anything else than fields of those tables (an argument, a directive of somebody's own, a field that is computed) has no
projection, and graphql-core makes its messages.

Equal keys mean equal messages of equal marks, whatever the operations were called or which variables they had.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any

import orjson
from graphql import FieldNode, GraphQLObjectType, GraphQLResolveInfo, get_named_type

from engine.amounts import MICRO_DIGITS, scaled_text
from engine.explain import between
from engine.marks import MARK, RATIO_DIGITS, UNKNOWN, MarkQuality, Row, mark_of
from engine.runtime.clock import to_datetime
from resolvers.context import Info
from resolvers.mark_messages import ChangeField, Fields, MarkField, Shown
from resolvers.nav import NAV_FIELDS, NavUpdate
from resolvers.pnl import PNL_FIELDS, PnlUpdate
from resolvers.scalars import write_instant
from resolvers.selection import Selection, python_name, selection_of, subselection
from resolvers.stream_kind import StreamKind

INSTANTS_COUNT_MAX = 4_096  # all marks of a frame have the same instant

_FIELDS: dict[str, Fields] = {NavUpdate.__name__: NAV_FIELDS, PnlUpdate.__name__: PNL_FIELDS}
_NAMES = MARK.names or ()
_COLUMN_AT = {name: at for at, name in enumerate(_NAMES)}
# What a message says beside its mark stands behind the mark's columns.
_MESSAGE_AT = {name: len(_NAMES) + at for at, name in enumerate(("epoch", "kind", "conflated", "latency_ms"))}
_PORTFOLIO_AT = len(_NAMES) + len(_MESSAGE_AT)
_CHANGE_AT = _PORTFOLIO_AT + 1
_SKIP_OR_INCLUDE = frozenset({"skip", "include"})

_Writer = Callable[[Any], str]
# Where a hole's value is found, and what writes it.
_Hole = tuple[int, _Writer]


class _NotCompilableError(Exception):
    """The selection holds something that only graphql-core can answer."""


class Projection:
    """A compiled selection. `compares_before`: whether messages say what changed since the one before;
    `shows_latency`: whether they differ from moment to moment."""

    __slots__ = ("_holes", "_template", "compares_before", "key", "shows_latency", "values")

    def __init__(self, template: str, holes: Sequence[_Hole], columns: Sequence[int]) -> None:
        self._template = template
        self._holes = list(holes)
        self.key: Hashable = (template, *(at for at, _ in holes), *columns)
        self.compares_before = any(at == _CHANGE_AT for at, _ in holes)
        self.shows_latency = any(at == _MESSAGE_AT["latency_ms"] for at, _ in holes)
        # What has to differ from the message before for another to be worth it.
        self.values: Callable[[Row], Hashable] = itemgetter(*columns) if columns else _nothing

    def encode(
        self,
        portfolio_id: str,
        row: Row,
        epoch: int,
        kind: StreamKind,
        conflated: int,
        latency_ms: float | None,
        before: Row | None,
    ) -> bytes:
        """The payload of a message that shows the mark `row`, as JSON; `before` is the mark of the message before, for
        an UPDATE alone."""
        change = None
        if before is not None and self.compares_before:
            change = between(mark_of(before, epoch), mark_of(row, epoch))
        source = (*row, epoch, kind, conflated, latency_ms, portfolio_id, change)
        return (self._template % tuple([write(source[at]) for at, write in self._holes])).encode()


def compile_projection(info: Info) -> Projection | None:
    """What the operation shows of a mark; None when graphql-core has to make its messages."""
    raw = info._raw_info
    object_type, selection = selection_of(raw)
    fields = _FIELDS.get(object_type.name)
    if fields is None:
        return None
    try:
        template, holes, columns = _compile(raw, object_type, selection, fields)
    except _NotCompilableError:
        return None
    return Projection(f'{{"data":{{"{raw.path.key}":{template}}}}}', holes, sorted(set(columns)))


def _compile(
    info: GraphQLResolveInfo[Any], object_type: GraphQLObjectType, selection: Selection, fields: Fields
) -> tuple[str, list[_Hole], list[int]]:
    """The template of a message's object, its holes in order, and the mark's columns that they show."""
    parts: list[str] = []
    holes: list[_Hole] = []
    columns: list[int] = []
    for response_name, nodes in selection.items():
        name = _field_name(object_type, nodes)
        if name is None:
            parts.append(f'"{response_name}":"{object_type.name}"')
            continue
        field = fields.get(name)
        if field is not None:
            columns += [_COLUMN_AT[column] for column in field.columns]
        holes.append(_hole(info, object_type, nodes, name, field))
        parts.append(f'"{response_name}":%s')
    return f"{{{','.join(parts)}}}", holes, columns


def _field_name(object_type: GraphQLObjectType, nodes: Sequence[FieldNode]) -> str | None:
    """The Python name of the selected field; None for __typename."""
    for node in nodes:
        if node.arguments or any(directive.name.value not in _SKIP_OR_INCLUDE for directive in node.directives or ()):
            raise _NotCompilableError
    return python_name(object_type, nodes[0].name.value)


def _hole(
    info: GraphQLResolveInfo[Any],
    object_type: GraphQLObjectType,
    nodes: Sequence[FieldNode],
    name: str,
    field: MarkField | ChangeField | None,
) -> _Hole:
    if isinstance(field, MarkField):
        return _COLUMN_AT[field.column], _WRITERS[field.shown]
    if isinstance(field, ChangeField):
        change_type = get_named_type(object_type.fields[nodes[0].name.value].type)
        assert isinstance(change_type, GraphQLObjectType)
        return _CHANGE_AT, _change_writer(info, change_type, nodes, field)
    if name == "portfolio_id":
        return _PORTFOLIO_AT, _write_text
    if name in _MESSAGE_AT:
        return _MESSAGE_AT[name], _MESSAGE_WRITERS[name]
    raise _NotCompilableError


def _change_writer(
    info: GraphQLResolveInfo[Any], change_type: GraphQLObjectType, nodes: Sequence[FieldNode], field: ChangeField
) -> _Writer:
    """Writes engine.explain.Parts, or null."""
    parts: list[str] = []
    attributes: list[Callable[[Any], int]] = []
    for response_name, selected in subselection(info, change_type, nodes).items():
        name = _field_name(change_type, selected)
        if name is None:
            parts.append(f'"{response_name}":"{change_type.name}"')
        elif name in field.parts:
            parts.append(f'"{response_name}":%s')
            attributes.append(attrgetter(field.parts[name]))
        else:
            raise _NotCompilableError
    template = f"{{{','.join(parts)}}}"

    def write(change: object) -> str:
        if change is None:
            return "null"
        return template % tuple([_write_amount(get(change)) for get in attributes])

    return write


def _nothing(_: Row) -> Hashable:
    return None


def _write_amount(micro: int) -> str:
    return f'"{scaled_text(micro, MICRO_DIGITS)}"'


def _write_ratio(ratio_e12: int) -> str:
    return "null" if ratio_e12 == UNKNOWN else f'"{scaled_text(ratio_e12, RATIO_DIGITS)}"'


@lru_cache(maxsize=INSTANTS_COUNT_MAX)
def _write_at(ns: int) -> str:
    return f'"{write_instant(to_datetime(ns))}"'


def _write_latency(latency_ms: float | None) -> str:
    return "null" if latency_ms is None else repr(latency_ms)


def _write_text(text: str) -> str:
    return orjson.dumps(text).decode()


_WRITERS: dict[Shown, _Writer] = {
    Shown.AMOUNT: _write_amount,
    Shown.RATIO: _write_ratio,
    Shown.INSTANT: _write_at,
    Shown.WHOLE: str,
    Shown.QUALITY: {int(quality): f'"{quality.name}"' for quality in MarkQuality}.__getitem__,
}
_MESSAGE_WRITERS: dict[str, _Writer] = {
    "epoch": str,
    "kind": {kind: f'"{kind.name}"' for kind in StreamKind}.__getitem__,
    "conflated": str,
    "latency_ms": _write_latency,
}
