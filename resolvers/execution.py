"""Execution of plain records without graphql-core's work per field.

An answer is mostly rows: positions, points of a curve, ledger entries. Their fields are attributes, or methods that
need nothing but the row, yet graphql-core builds a path, an info and an argument dictionary for each. `RecordExecutor`
writes such an object in one loop when every selected field of it is of these and its type is a leaf, or again such an
object or a list of them. Anything else, and anything that goes wrong (a null where none may be, a value that does not
serialise), takes graphql-core's own path, which reports it properly. Answers are the same either way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, cast

from graphql import (
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLOutputType,
    GraphQLResolveInfoHelpers,
    GraphQLString,
    is_leaf_type,
    is_object_type,
)
from strawberry.schema.schema import StrawberryGraphQLCoreExecutionContext
from strawberry.types.field import StrawberryField

_Reader = Callable[[Any], Any]
_Writer = Callable[[Any], Any]
# For each field: its name in the answer, what reads its value, what writes one that is there, whether one must be.
_Plan = list[tuple[str, _Reader, _Writer, bool]]


class _NotPlainError(Exception):
    """A value or a selection that only graphql-core's own path handles."""


class RecordExecutor(StrawberryGraphQLCoreExecutionContext):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # An executor that its own helpers know is a cycle, and with it all that the operation collected and read.
        me = weakref.proxy(self)
        self.async_helpers = GraphQLResolveInfoHelpers(
            gather=lambda values: me.gather_async_work(values), track=lambda values: me.track_async_work(values)
        )
        # Keyed by identity, as graphql-core memoises its sub-selections; kept beside it, so the id stays taken.
        self._plans: dict[tuple[str, int], tuple[Any, _Plan | None]] = {}

    def execute_fields(
        self, parent_type: GraphQLObjectType, source_value: Any, path: Any, grouped_field_set: Any, *rest: Any
    ) -> Any:
        plan = self._plan(parent_type, grouped_field_set)
        if plan is not None:
            try:
                return _write(plan, source_value)
            except Exception:  # noqa: S110 -- the ordinary path meets the same error and reports it
                pass
        return super().execute_fields(parent_type, source_value, path, grouped_field_set, *rest)

    def _plan(self, parent_type: GraphQLObjectType, grouped_field_set: Any) -> _Plan | None:
        key = (parent_type.name, id(grouped_field_set))
        if key not in self._plans:
            try:
                plan = self._make_plan(parent_type, grouped_field_set)
            except _NotPlainError:
                plan = None
            self._plans[key] = (grouped_field_set, plan)
        return self._plans[key][1]

    def _make_plan(self, parent_type: GraphQLObjectType, grouped_field_set: Any) -> _Plan:
        plan: _Plan = []
        for response_name, details in grouped_field_set.items():
            name = details[0].node.name.value
            field = parent_type.fields.get(name)
            if name == "__typename":
                plan.append((response_name, type, _constant(parent_type.name), True))
                continue
            if field is None or field.args:
                raise _NotPlainError
            read = _reader(field.extensions.get("strawberry-definition"))
            required = isinstance(field.type, GraphQLNonNull)
            plan.append((response_name, read, self._writer(field.type, details), required))
        return plan

    def _writer(self, field_type: GraphQLOutputType, details: Any) -> _Writer:
        """What writes a value of this type that is not None."""
        if isinstance(field_type, GraphQLNonNull):
            field_type = field_type.of_type
        if isinstance(field_type, GraphQLList):
            if any(detail.node.directives for detail in details):
                raise _NotPlainError
            required = isinstance(field_type.of_type, GraphQLNonNull)
            return _each(self._writer(field_type.of_type, details), required)
        if field_type is GraphQLString:
            return _text
        if is_leaf_type(field_type):
            return field_type.coerce_output_value
        if not is_object_type(field_type):
            raise _NotPlainError
        plan = self._plan(field_type, self.collect_subfields(field_type, details)[0])
        if plan is None:
            raise _NotPlainError
        return partial(_write, plan)


def _write(plan: _Plan, source: Any) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for response_name, read, write, required in plan:
        value = read(source)
        if value is not None:
            answer[response_name] = write(value)
        elif required:
            raise _NotPlainError
        else:
            answer[response_name] = None
    return answer


def _reader(field: StrawberryField | None) -> _Reader:
    """What reads the field's value: its attribute, or a method that needs nothing but the object."""
    if field is None:  # of introspection
        raise _NotPlainError
    resolver = field.base_resolver
    if resolver is None:
        return attrgetter(field.python_name)
    if field.is_async or field.extensions or list(resolver.signature.parameters) != ["self"]:
        raise _NotPlainError
    return cast(_Reader, resolver.wrapped_func)


def _constant(text: str) -> _Writer:
    return lambda _: text


def _text(value: Any) -> Any:
    return value if type(value) is str else GraphQLString.coerce_output_value(value)


def _each(write: _Writer, required: bool) -> _Writer:
    def written(values: Any) -> list[Any]:
        if not isinstance(values, list) or (required and any(value is None for value in values)):
            raise _NotPlainError
        return [None if value is None else write(value) for value in values]

    return written
