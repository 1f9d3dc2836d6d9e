"""What a query costs before it is run, however its lengths are said."""

from __future__ import annotations

from typing import Any

import pytest
from graphql import GraphQLError, OperationDefinitionNode, parse

from api.limits import check_objects
from engine.runtime.settings import Settings
from resolvers.schema import make_schema
from tests.gateway import Gateway

NESTED = """{ viewer { portfolios(first: $n) { edges { node {
    positions(first: $n) { edges { node { quantity } } } } } } } }"""
SCHEMA = make_schema()._schema


def refusal(text: str, variables: dict[str, Any] | None = None) -> GraphQLError | None:
    document = parse(text)
    operation = document.definitions[0]
    assert isinstance(operation, OperationDefinitionNode)
    return check_objects(SCHEMA, document, operation, variables or {}, Settings(query_objects_max=5_000))


@pytest.mark.parametrize(
    ("definition", "variables"),
    [
        ("($n: Int!)", {"n": 200}),
        ("($n: Int!)", {"n": 200.0}),
        ("($n: Int! = 200)", None),
        ("($n: Int! = 200)", {}),
        ("($n: Int! = 1)", {"n": 200.0}),
    ],
)
async def test_lengths_count_as_they_are_executed(
    gateway: Gateway, definition: str, variables: dict[str, Any] | None
) -> None:
    assert await gateway.codes(f"query{definition} {NESTED}", variables) == ["QUERY_TOO_COSTLY"]


async def test_a_default_that_is_not_used_counts_nothing(gateway: Gateway) -> None:
    await gateway.ask(f"query($n: Int! = 200) {NESTED}", {"n": 1}, gateway.token("nobody"))


async def test_variables_that_can_not_be_coerced_are_named_as_such(gateway: Gateway) -> None:
    for variables in ({}, {"n": "200"}, {"n": None}, {"n": 1.5}):
        assert await gateway.codes(f"query($n: Int!) {NESTED}", variables) == ["GRAPHQL_VALIDATION_FAILED"]


@pytest.mark.parametrize(
    "argument",
    [
        'asOf: "2026-02-30T00:00:00Z"',
        'asOf: "2026-11-22T00:00:00"',
        'asOf: "NaN"',
        'asOf: "0000-00-00"',
        'asOf: "9999-12-31T23:59:59-14:00"',
        "asOf: 7",
    ],
)
async def test_a_literal_that_is_no_instant_is_named_as_such(gateway: Gateway, argument: str) -> None:
    query = f'{{ portfolio(portfolioId: "p-1", {argument}) {{ name }} }}'
    assert await gateway.codes(query) == ["GRAPHQL_VALIDATION_FAILED"]


@pytest.mark.parametrize("amount", ["NaN", "Infinity", "1e999999", "x"])
async def test_a_literal_that_is_no_decimal_is_named_as_such(gateway: Gateway, amount: str) -> None:
    query = """{ portfolio(portfolioId: "p-1") { ledger(first: 1, filter: {minAmount: "%s"}) { edges { cursor } } } }"""
    assert await gateway.codes(query % amount) == ["GRAPHQL_VALIDATION_FAILED"]


@pytest.mark.parametrize("literal", ["9" * 13, "-" + "9" * 5_000, '"200"', "{n: 1}"])
def test_a_length_that_can_not_be_read_is_the_largest_page(literal: str) -> None:
    text = NESTED.replace("$n", literal)
    error = refusal(f"query {text}")
    assert error is not None
    assert error.message.startswith(f"{200 * (200 + 10)} objects")


@pytest.mark.parametrize(
    ("around", "repeated"),
    [
        ("{ viewer { portfolios(first: 200) { edges { node { ... } } } } }", "valuation { nav }"),
        (
            "{ viewer { portfolios(first: 1) { edges { node { positions(first: 200) { ... } } } } } }",
            "edges { node { price } }",
        ),
    ],
)
def test_what_is_shown_again_under_an_alias_counts_again(around: str, repeated: str) -> None:
    def asked(count: int) -> GraphQLError | None:
        return refusal(around.replace("...", " ".join(f"a{number}: {repeated}" for number in range(count))))

    assert asked(20) is None
    assert asked(30) is not None


@pytest.mark.parametrize(
    ("field", "portfolios_max"),
    [
        ("positions(first: 1) { edges { cursor } }", 454),
        ("sectorAllocation { sector }", 66),
        ("valuation { qualityShares { share } }", 66),
        ("equityCurve(range: ALL) { range }", 25),
        ("equityCurve(range: ALL, maxPoints: null) { range }", 25),
        ("equityCurve(range: ALL, maxPoints: 10) { range }", 33),
        ("performance(range: ALL) { range }", 33),
        ("realizedPnl { net }", 66),
        ("realizedToday { net }", 66),
        ("closedPositions(first: 1) { edges { cursor } }", 454),
        ("positions(first: 10) { edges { node { lots { cost } } } }", 45),
        ("valuation { realizedPnl }", 5_000),
        ("positions(first: 1) { edges { node { realizedPnl } } }", 454),
    ],
)
def test_what_is_read_counts_and_not_only_what_is_shown(field: str, portfolios_max: int) -> None:
    def asked(count: int) -> GraphQLError | None:
        return refusal(f"{{ viewer {{ portfolios(first: {count}) {{ edges {{ node {{ {field} }} }} }} }} }}")

    assert asked(portfolios_max) is None
    assert asked(portfolios_max + 1) is not None
