"""What an operation selects of the object that one of its fields returns, as graphql-core itself collects it.

Fragments are spread, equal response names merged, and what @skip and @include leave out is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphql import FieldNode, GraphQLObjectType, GraphQLResolveInfo, get_named_type
from graphql.execution.collect_fields import FieldDetails, FragmentDetails, collect_subfields
from graphql.execution.values import VariableValues
from strawberry.types.nodes import get_variable_values

# Response name → the nodes that are merged under it, in the order of the answer.
Selection = Mapping[str, Sequence[FieldNode]]


def selection_of(info: GraphQLResolveInfo[Any]) -> tuple[GraphQLObjectType, Selection]:
    """Of the field that is being resolved: its object type, and what is selected of it."""
    object_type = get_named_type(info.return_type)
    assert isinstance(object_type, GraphQLObjectType)
    return object_type, subselection(info, object_type, info.field_nodes)


def subselection(
    info: GraphQLResolveInfo[Any], object_type: GraphQLObjectType, nodes: Sequence[FieldNode]
) -> Selection:
    """What these nodes, merged under one response name, select of their object."""
    collected = collect_subfields(
        info.schema,
        {name: FragmentDetails(fragment) for name, fragment in info.fragments.items()},
        VariableValues({}, get_variable_values(info)),
        info.operation,
        object_type,
        [FieldDetails(node, None) for node in nodes],
    )
    return {name: [field.node for field in details] for name, details in collected.grouped_field_set.items()}


def python_name(object_type: GraphQLObjectType, name: str) -> str | None:
    """What the field is called in Python; None for __typename."""
    field = object_type.fields.get(name)
    return None if field is None else str(field.extensions["strawberry-definition"].python_name)
