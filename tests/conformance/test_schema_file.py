"""The committed schema is what the code says, and every type and field in it is described."""

from __future__ import annotations

from pathlib import Path

from graphql import GraphQLInputObjectType, GraphQLInterfaceType, GraphQLObjectType, build_schema

from resolvers.schema import print_schema

SCHEMA_FILE = Path(__file__).parents[2] / "schema.graphql"


def test_schema_file_is_not_stale() -> None:
    assert SCHEMA_FILE.read_text() == print_schema(), "run `navstream schema --write` and look at the difference"


def test_everything_is_described() -> None:
    schema = build_schema(print_schema())
    for name, kind in schema.type_map.items():
        if name.startswith("__") or name in {"Boolean", "String", "Int", "Float", "ID"}:
            continue
        assert kind.description, name
        if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType | GraphQLInputObjectType):
            for field_name, field in kind.fields.items():
                assert field.description, f"{name}.{field_name}"
