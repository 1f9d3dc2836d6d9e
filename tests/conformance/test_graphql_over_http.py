"""GraphQL over HTTP: methods, media types, statuses, and bodies that are not GraphQL."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from graphql import get_introspection_query

from tests.gateway import Gateway

GRAPHQL_JSON = "application/graphql-response+json"
VIEWER = "{ viewer { subject } }"


async def send(
    gateway: Gateway, body: Any, content_type: str = "application/json", accept: str = "*/*"
) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with gateway.client() as client:
        headers = {"content-type": content_type, "accept": accept, **gateway.bearer()}
        return await client.post("/graphql", content=content, headers=headers)


async def get(gateway: Gateway, accept: str = "*/*", **params: str) -> httpx.Response:
    async with gateway.client() as client:
        return await client.get("/graphql", params=params, headers={"accept": accept, **gateway.bearer()})


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        (GRAPHQL_JSON, GRAPHQL_JSON),
        (f"{GRAPHQL_JSON}, application/json", GRAPHQL_JSON),
        (f"{GRAPHQL_JSON};q=0.5, application/json", "application/json"),
        (f"application/json;q=0.5, {GRAPHQL_JSON};q=0.9", GRAPHQL_JSON),
        (f"{GRAPHQL_JSON};q=nonsense", "application/json"),
        ("text/event-stream, application/json", "application/json"),
    ],
)
async def test_media_type_is_negotiated(gateway: Gateway, accept: str, media: str) -> None:
    answer = await send(gateway, {"query": VIEWER}, accept=accept)
    assert answer.status_code == 200
    assert answer.headers["content-type"].partition(";")[0] == media
    assert answer.json() == {"data": {"viewer": {"subject": "ann"}}}
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("query", "variables", "code"),
    [
        ("query A { __typename } query B { __typename }", None, "BAD_REQUEST"),
        ('subscription { quotes(symbols: ["A"]) { kind } }', None, "NEEDS_WEBSOCKET"),
        ("{", None, "GRAPHQL_PARSE_FAILED"),
        ("{ nothing }", None, "GRAPHQL_VALIDATION_FAILED"),
        ("query($id: String!) { portfolio(portfolioId: $id) { name } }", {}, "GRAPHQL_VALIDATION_FAILED"),
        ("query($id: String!) { portfolio(portfolioId: $id) { name } }", {"id": 1}, "GRAPHQL_VALIDATION_FAILED"),
    ],
)
async def test_operations_that_can_not_run(gateway: Gateway, query: str, variables: Any, code: str) -> None:
    for accept, status in ((GRAPHQL_JSON, 400), ("application/json", 200)):
        answer = await send(gateway, {"query": query, "variables": variables}, accept=accept)
        assert answer.status_code == status
        assert "data" not in answer.json()
        assert answer.json()["errors"][0]["extensions"]["code"] == code


async def test_errors_of_a_field_are_200_with_data(gateway: Gateway) -> None:
    answer = await send(gateway, {"query": '{ portfolio(portfolioId: "x") { name } }'}, accept=GRAPHQL_JSON)
    assert (answer.status_code, answer.json()["data"]) == (200, {"portfolio": None})


ODD_BODIES = [
    b"",
    b"null",
    b"1",
    b'"text"',
    b"[]",
    b'[{"query":"{ __typename }"}]',
    b"{",
    b"{}",
    b'{"query":null}',
    b'{"query":1}',
    b'{"query":{}}',
    b'{"query":""}',
    b'{"query":"{ __typename }","variables":[]}',
    b'{"query":"{ __typename }","variables":"x"}',
    b'{"query":"{ __typename }","operationName":1}',
    b'{"query":"{ __typename }","extensions":7}',
    b'{"query":"{ __typename }","operationName":"Other"}',
    b'{"query":"\xff\xfe"}',
    b"\xff\xfe\x00",
    b'{"query":"{ __typename }","variables":{"a":NaN}}',
    b"[" * 20_000,
    b'{"query":"{ __typename }","variables":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    b'{"query":"{ __typename }","variables":{"a":' + b"[" * 200 + b"]" * 200 + b"}}",
]


@pytest.mark.parametrize("body", ODD_BODIES)
async def test_odd_bodies_are_400_with_a_code(gateway: Gateway, body: bytes) -> None:
    answer = await send(gateway, body)
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["extensions"]["code"] == "BAD_REQUEST"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_other_content_types_are_415(gateway: Gateway, content_type: str) -> None:
    answer = await send(gateway, {"query": VIEWER}, content_type=content_type)
    assert answer.status_code == 415
    assert answer.json()["errors"][0]["extensions"]["code"] == "UNSUPPORTED_MEDIA_TYPE"


async def test_charset_is_allowed(gateway: Gateway) -> None:
    answer = await send(gateway, {"query": VIEWER}, content_type="application/json; charset=utf-8")
    assert answer.status_code == 200


async def test_get_runs_queries_only(gateway: Gateway) -> None:
    assert (await get(gateway, query=VIEWER)).json() == {"data": {"viewer": {"subject": "ann"}}}
    variables = json.dumps({"s": "NOSUCH"})
    answer = await get(gateway, query="query($s: String!) { asset(symbol: $s) { name } }", variables=variables)
    assert answer.json()["data"] == {"asset": None}
    mutation = 'mutation { openPortfolio(input: {name: "x"}) { eventId } }'
    answer = await get(gateway, query=mutation)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
    for params in ({"query": VIEWER, "variables": "{"}, {"query": VIEWER, "variables": "[]"}, {}):
        assert (await get(gateway, **params)).status_code == 400


async def test_other_methods_are_405(gateway: Gateway) -> None:
    async with gateway.client() as client:
        for method in ("PUT", "DELETE", "PATCH"):
            assert (await client.request(method, "/graphql")).status_code == 405


async def test_body_limit_counts_what_streams_in(gateway: Gateway) -> None:
    limit = gateway.settings.body_bytes_max
    padded = {"query": VIEWER, "extensions": {"pad": "x" * limit}}
    answer = await send(gateway, padded)
    assert (answer.status_code, answer.json()["errors"][0]["extensions"]["code"]) == (413, "BODY_TOO_LARGE")

    async def chunks() -> Any:
        for _ in range(limit // 1_000 + 2):
            yield b" " * 1_000

    async with gateway.client() as client:
        headers = {"content-type": "application/json", **gateway.bearer()}
        answer = await client.post("/graphql", content=chunks(), headers=headers)
    assert answer.status_code == 413
    fits = json.dumps({"query": VIEWER}).encode().ljust(limit)
    assert (await send(gateway, fits)).status_code == 200


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("{" + " ".join(f"a{n}: viewer {{ subject }}" for n in range(1_000)) + "}", "TOO_MANY_TOKENS"),
        ("{" + " ".join(f"a{n}: viewer {{ subject }}" for n in range(31)) + "}", "TOO_MANY_ALIASES"),
        ("{ portfolio" * 50 + "}" * 50, "QUERY_TOO_DEEP"),
        ("{ a" * 450 + "}" * 450, "QUERY_TOO_DEEP"),
        (
            "{ viewer { portfolios(first: 200) { edges { node { positions(first: 200) { edges { cursor } } } } } } }",
            "QUERY_TOO_COSTLY",
        ),
    ],
)
async def test_greedy_documents_are_refused(gateway: Gateway, query: str, code: str) -> None:
    answer = await send(gateway, {"query": query})
    assert code in {error["extensions"]["code"] for error in answer.json()["errors"]}
    assert "data" not in answer.json()


async def test_fragments_that_double_are_measured_at_once(gateway: Gateway) -> None:
    fragments = [f"fragment F{n} on Viewer {{ ...F{n + 1} ...F{n + 1} }}" for n in range(60)]
    query = "{ viewer { ...F0 } } " + " ".join(fragments) + " fragment F60 on Viewer { s: subject }"
    answer = await send(gateway, {"query": query})
    assert answer.elapsed.total_seconds() < 2
    assert "TOO_MANY_ALIASES" in {error["extensions"]["code"] for error in answer.json()["errors"]}


async def test_cyclic_and_unknown_fragments_are_invalid(gateway: Gateway) -> None:
    for query in (
        "{ viewer { ...A } } fragment A on Viewer { ...B } fragment B on Viewer { ...A }",
        "{ viewer { ...Nowhere } }",
    ):
        answer = await send(gateway, {"query": query})
        assert {error["extensions"]["code"] for error in answer.json()["errors"]} == {"GRAPHQL_VALIDATION_FAILED"}


async def test_the_introspection_of_tools_passes_the_limits(gateway: Gateway) -> None:
    query = get_introspection_query(descriptions=True, input_value_deprecation=True, schema_description=True)
    answer = await send(gateway, {"query": query, "operationName": "IntrospectionQuery"})
    assert "errors" not in answer.json()
    deep = "{ __schema { types { fields { type { fields { type { fields { type { fields { name } } } } } } } } } }"
    assert "errors" in (await send(gateway, {"query": deep})).json()


async def test_origins(gateway: Gateway) -> None:
    async with gateway.client() as client:
        for origin, status in (("https://evil.example", 403), ("null", 403), (gateway.url, 200)):
            headers = {"origin": origin, **gateway.bearer()}
            answer = await client.post("/graphql", json={"query": VIEWER}, headers=headers)
            assert answer.status_code == status


async def test_a_defect_is_masked_and_named_by_its_request(
    gateway: Gateway, portfolio_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("a secret detail")

    monkeypatch.setattr(type(gateway.application.services.ledger), "portfolios", broken)
    answer = await send(gateway, {"query": "{ viewer { portfolios { edges { cursor } } } }"})
    (error,) = answer.json()["errors"]
    assert "secret" not in answer.text
    assert error["extensions"] == {"code": "INTERNAL", "requestId": answer.headers["x-request-id"]}
