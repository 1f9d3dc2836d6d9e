"""Tokens: what is believed, what is refused, and that nothing runs without one."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from graphql import GraphQLObjectType, get_named_type, is_leaf_type
from pydantic import SecretStr

from api.auth import Authenticator, Subject, TokenRefusedError, issue_token, make_key_source, may_see
from engine.runtime.settings import Settings
from resolvers.schema import make_schema
from tests.gateway import SECRET, Gateway

NOW = datetime.now(UTC)


def settings(**changes: Any) -> Settings:
    return Settings(**{"jwt_secret": SecretStr(SECRET), **changes})


def claims(**changes: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    whole: dict[str, Any] = {
        "sub": "ann",
        "scope": "portfolio:read",
        "iat": now,
        "exp": now + timedelta(minutes=5),
        "iss": "navstream",
        "aud": "navstream",
    }
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


def signed(key: Any = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm=algorithm)


def unsigned() -> str:
    body = {**claims(), "iat": int(NOW.timestamp()), "exp": int(NOW.timestamp()) + 600}
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({"alg": "none"}, body)
    ]
    return ".".join([*parts, ""])


async def test_an_issued_token_is_believed() -> None:
    token = issue_token(settings(), "ann", "portfolio:read ledger:read", 60, datetime.now(UTC))
    subject = await Authenticator(settings()).authenticate(f"Bearer {token}")
    assert subject is not None
    assert (subject.subject, subject.scopes) == ("ann", {"portfolio:read", "ledger:read"})


async def test_no_token_is_nobody() -> None:
    assert await Authenticator(settings()).authenticate(None) is None


REFUSED = {
    "expired": lambda: signed(exp=datetime.now(UTC) - timedelta(seconds=1)),
    "issued in the future": lambda: signed(iat=datetime.now(UTC) + timedelta(hours=1)),
    "no expiry": lambda: signed(exp=None),
    "no issue time": lambda: signed(iat=None),
    "no subject": lambda: signed(sub=None),
    "empty subject": lambda: signed(sub=""),
    "number as subject": lambda: signed(sub=17),
    "long subject": lambda: signed(sub="x" * 201),
    "scope as list": lambda: signed(scope=["admin"]),
    "other audience": lambda: signed(aud="other"),
    "no audience": lambda: signed(aud=None),
    "other issuer": lambda: signed(iss="other"),
    "other key": lambda: signed(key="another secret that is long enough, too"),
    "other algorithm": lambda: signed(key=SECRET * 2, algorithm="HS512"),
    "not signed": unsigned,
    "garbage": lambda: "garbage",
    "garbage in three parts": lambda: "a.b.c",
    "too long": lambda: "a" * 9_000,
    "empty": lambda: "",
    "not ASCII": lambda: "Ω.Ω.Ω",
}


@pytest.mark.parametrize("case", REFUSED)
async def test_refused(case: str) -> None:
    with pytest.raises(TokenRefusedError):
        await Authenticator(settings()).authenticate(f"Bearer {REFUSED[case]()}")


@pytest.mark.parametrize("authorization", ["", "Basic abc", "Bearer", "bearer ", signed()])
async def test_other_schemes_are_refused(authorization: str) -> None:
    with pytest.raises(TokenRefusedError):
        await Authenticator(settings()).authenticate(authorization)


@pytest.mark.parametrize("secret", ["", "short", "x" * 31])
def test_a_weak_secret_is_not_served(secret: str) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        make_key_source(settings(jwt_secret=SecretStr(secret)))


def test_issue_refuses_unknown_scopes() -> None:
    with pytest.raises(ValueError, match="unknown scope"):
        issue_token(settings(), "ann", "portfolio:read root", 60, NOW)


@asynccontextmanager
async def jwks_server(keys: dict[str, Any]) -> AsyncIterator[tuple[str, list[int]]]:
    """An issuer that publishes these keys, and counts how often it was asked."""
    asked = [0]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked[0] += 1
        published = [
            {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())), "kid": kid}
            for kid, key in keys.items()
        ]
        body = json.dumps({"keys": published}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks", asked
    finally:
        server.close()


async def test_jwks_keys_are_fetched_once_and_by_kid() -> None:
    key, other = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    async with jwks_server({"k1": key}) as (url, asked):
        authenticator = Authenticator(settings(jwt_jwks_url=url, jwt_secret=SecretStr("")))
        good = jwt.encode(claims(), key, algorithm="RS256", headers={"kid": "k1"})
        for _ in range(3):
            subject = await authenticator.authenticate(f"Bearer {good}")
            assert subject is not None and subject.subject == "ann"
        assert asked[0] == 1
        wrong = [
            jwt.encode(claims(), other, algorithm="RS256", headers={"kid": "k1"}),
            jwt.encode(claims(), other, algorithm="RS256", headers={"kid": "k2"}),
            jwt.encode(claims(), key, algorithm="RS256"),
            signed(),  # HS256 with some secret must not pass where keys are public
        ]
        for token in wrong:
            with pytest.raises(TokenRefusedError):
                await authenticator.authenticate(f"Bearer {token}")
        # An unknown kid does not let a stranger make us ask at will.
        assert asked[0] == 1


async def test_a_token_that_was_believed_expires() -> None:
    authenticator = Authenticator(settings())
    token = signed(exp=datetime.now(UTC) + timedelta(seconds=2))
    assert await authenticator.authenticate(f"Bearer {token}") is not None
    await asyncio.sleep(2.1)
    with pytest.raises(TokenRefusedError, match="expired"):
        await authenticator.authenticate(f"Bearer {token}")


async def test_a_token_that_was_believed_goes_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.auth._JWKS_REFRESH_INTERVAL_S", 0)
    old, new = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    keys = {"k1": old}
    async with jwks_server(keys) as (url, _):
        authenticator = Authenticator(settings(jwt_jwks_url=url, jwt_secret=SecretStr("")))
        token = jwt.encode(claims(), old, algorithm="RS256", headers={"kid": "k1"})
        assert await authenticator.authenticate(f"Bearer {token}") is not None
        keys |= {"k1": new, "k2": new}
        # A kid that is not known has all keys fetched.
        newer = jwt.encode(claims(), new, algorithm="RS256", headers={"kid": "k2"})
        assert await authenticator.authenticate(f"Bearer {newer}") is not None
        with pytest.raises(TokenRefusedError):
            await authenticator.authenticate(f"Bearer {token}")


async def test_an_issuer_that_is_away_refuses_instead_of_believing() -> None:
    authenticator = Authenticator(settings(jwt_jwks_url="http://127.0.0.1:1/jwks"))
    token = jwt.encode(claims(), SECRET, algorithm="HS256", headers={"kid": "k1"})
    with pytest.raises(TokenRefusedError):
        await authenticator.authenticate(f"Bearer {token}")


def test_who_may_see() -> None:
    ann = Subject("ann", frozenset({"portfolio:read"}), 0)
    admin = Subject("root", frozenset({"admin"}), 0)
    assert may_see(ann, "ann") and not may_see(ann, "bob") and not may_see(None, "ann")
    assert may_see(admin, "bob")
    assert admin.holds("portfolio:read") and admin.holds("ledger:read") and not admin.holds("ledger:write")
    assert not ann.holds("ledger:read")


def root_operations() -> list[str]:
    """One operation for each root field of the schema, so that a new field is covered the day it is added."""
    schema = make_schema()._schema
    arguments = {
        "node": '(id: "x")',
        "portfolio": '(portfolioId: "p")',
        "asset": '(symbol: "A")',
        "assets": "(first: 1)",
        "openPortfolio": '(input: {name: "n"})',
        "recordFill": '(input: {portfolioId: "p", symbol: "A", side: BUY, quantity: "1", price: "1"})',
        "recordCashMovement": '(input: {portfolioId: "p", kind: DEPOSIT, amount: "1"})',
        "recordReversal": '(input: {portfolioId: "p", reverses: "e"})',
        "quotes": '(symbols: ["A"])',
        "createWebhook": '(input: {url: "https://8.8.8.8/", kinds: [BADGE_UNLOCKED]})',
        "updateWebhook": '(input: {webhookId: "w"})',
        "deleteWebhook": '(webhookId: "w")',
        "rotateWebhookSecret": '(webhookId: "w")',
        "sendTestWebhook": '(webhookId: "w")',
        "createThreshold": '(input: {portfolioId: "p", figure: NAV, side: ABOVE, bound: "1"})',
        "deleteThreshold": '(thresholdId: "t")',
    }
    operations = []
    for kind, root in (
        ("query", schema.query_type),
        ("mutation", schema.mutation_type),
        ("subscription", schema.subscription_type),
    ):
        assert isinstance(root, GraphQLObjectType)
        for name, field in root.fields.items():
            given = arguments.get(name, '(portfolioId: "p")' if kind == "subscription" else "")
            selection = "" if is_leaf_type(get_named_type(field.type)) else " { __typename }"
            operations.append(f"{kind} {{ {name}{given}{selection} }}")
    return operations


@pytest.mark.parametrize("operation", [one for one in root_operations() if not one.startswith("subscription")])
async def test_every_field_is_denied_without_a_token(gateway: Gateway, operation: str) -> None:
    answer = await gateway.post(operation, token=None)
    assert answer.status_code == 401
    assert [error["extensions"]["code"] for error in answer.json()["errors"]] == ["UNAUTHENTICATED"]
    assert not answer.json().get("data")


@pytest.mark.parametrize("operation", root_operations())
async def test_every_field_is_denied_without_a_scope(gateway: Gateway, operation: str) -> None:
    token = gateway.token("ann", "")
    if operation.startswith("subscription"):
        async with gateway.socket(token) as socket:
            assert await (await socket.subscribe(operation)).code() == "FORBIDDEN"
    else:
        codes = await gateway.codes(operation, token=token)
        assert codes == (["NOT_FOUND"] if " node(" in operation else ["FORBIDDEN"])


async def test_introspection_needs_no_token_but_hides_nothing_else_behind_it(gateway: Gateway) -> None:
    answer = await gateway.post("{ __schema { queryType { name } } __typename }", token=None)
    assert answer.json()["data"] == {"__schema": {"queryType": {"name": "Query"}}, "__typename": "Query"}
    mixed = "query { __typename ...F } fragment F on Query { ... on Query { v: viewer { subject } } }"
    assert await gateway.codes(mixed, token=None) == ["UNAUTHENTICATED"]


@pytest.mark.parametrize("case", ["expired", "other key", "not signed", "garbage"])
async def test_a_refused_token_is_401(gateway: Gateway, case: str) -> None:
    answer = await gateway.post("{ viewer { subject } }", token=REFUSED[case]())
    assert answer.status_code == 401
    assert answer.json()["errors"][0]["extensions"] == {"code": "UNAUTHENTICATED"}


@pytest.mark.parametrize("kind", ["navUpdates", "pnlUpdates", "positionUpdates", "ledgerEvents"])
async def test_streams_of_others_are_not_found(gateway: Gateway, portfolio_id: str, kind: str) -> None:
    query = f"subscription($id: String!) {{ {kind}(portfolioId: $id) {{ __typename }} }}"
    async with gateway.socket(gateway.token("bob")) as socket:
        for name in (portfolio_id, "p-none", "a\0b"):
            assert await (await socket.subscribe(query, {"id": name})).code() == "NOT_FOUND"
    assert gateway.application.hub.watches_count == 0
