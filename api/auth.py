"""Who asks, and what they may see: the one place that decides.

A caller is the subject of a JWT, signed with the HS256 secret of the settings (development) or with a key of the
issuer's JWKS (production), and nothing else: `alg`, `aud` and `iss` are fixed by the settings, `exp`, `iat` and `sub`
must be there. Token times are wall time, also when the market's clock is a recorded one.

    portfolio:read   portfolios, positions, marks, assets and quotes
    ledger:read      ledger entries
    ledger:write     mutations of the ledger
    webhooks:write   the subject's own webhooks and thresholds
    admin            sees all portfolios, and includes both read scopes

Everything is denied by default: a field other than introspection needs a token, and a resolver names the scope it
needs. A subject sees the portfolios that it owns. Introspection needs no token, because the schema is published
anyway and tools read it before their user has logged in.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

import jwt

from engine.runtime.settings import JWT_SECRET_BYTES_MIN, Settings
from resolvers.context import SCOPE_LEDGER_READ, SCOPE_LEDGER_WRITE, SCOPE_PORTFOLIO_READ, SCOPE_WEBHOOKS_WRITE

SCOPE_ADMIN = "admin"
SCOPES = frozenset({SCOPE_PORTFOLIO_READ, SCOPE_LEDGER_READ, SCOPE_LEDGER_WRITE, SCOPE_WEBHOOKS_WRITE, SCOPE_ADMIN})
_INCLUDED_IN_ADMIN = frozenset({SCOPE_PORTFOLIO_READ, SCOPE_LEDGER_READ})

TOKEN_LENGTH_MAX = 8_192
SUBJECT_LENGTH_MAX = 200
_JWKS_ALGORITHMS = ["RS256", "PS256", "ES256", "EdDSA"]
_JWKS_TIMEOUT_S = 5
_EXPIRY_CHECK_INTERVAL_MAX_S = 3_600  # event loops refuse timers years ahead
_JWKS_BYTES_MAX = 1024 * 1024
_JWKS_REFRESH_INTERVAL_S = 30  # an unknown `kid` makes us ask the issuer, and no oftener than this
_VERIFIED_COUNT_MAX = 10_000


class TokenRefusedError(Exception):
    """The token is not to be trusted; the message says why, without repeating the token."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A caller whose token was verified. `expires_at_s` is wall time in seconds since 1970."""

    subject: str
    scopes: frozenset[str]
    expires_at_s: float

    @property
    def sees_all(self) -> bool:
        return SCOPE_ADMIN in self.scopes

    def holds(self, scope: str) -> bool:
        return scope in self.scopes or (self.sees_all and scope in _INCLUDED_IN_ADMIN)

    def may_see(self, owner: str) -> bool:
        return self.sees_all or self.subject == owner


def may_see(subject: Subject | None, portfolio_owner: str) -> bool:
    """Whether the caller may see a portfolio of this owner; nobody in particular sees nothing."""
    return subject is not None and subject.may_see(portfolio_owner)


async def expired(subject: Subject | None) -> None:
    """Returns when the subject's token has expired; never for nobody in particular."""
    while subject is None or subject.expires_at_s > time.time():
        left_s = _EXPIRY_CHECK_INTERVAL_MAX_S if subject is None else subject.expires_at_s - time.time()
        await asyncio.sleep(min(max(left_s, 0), _EXPIRY_CHECK_INTERVAL_MAX_S))


def issue_token(settings: Settings, subject: str, scope: str, ttl_s: int, now: datetime) -> str:
    """A development token signed with the HS256 secret. Raises ValueError for an unknown scope or a weak secret."""
    unknown = set(scope.split()) - SCOPES
    if unknown:
        raise ValueError(f"unknown scope {' '.join(sorted(unknown))}; there are {' '.join(sorted(SCOPES))}")
    if not subject or len(subject) > SUBJECT_LENGTH_MAX:
        raise ValueError(f"a subject has 1 to {SUBJECT_LENGTH_MAX} characters")
    claims = {
        "sub": subject,
        "scope": scope,
        "iat": now,
        "exp": now + timedelta(seconds=ttl_s),
        "iss": settings.jwt_issuer,
        "aud": settings.jwt_audience,
    }
    return jwt.encode(claims, _secret(settings), algorithm="HS256")


class KeySource(Protocol):
    algorithms: list[str]

    async def key(self, token: str) -> Any:
        """The key that the token must be signed with. Raises TokenRefusedError, OSError."""


class SecretKey:
    def __init__(self, secret: str) -> None:
        self.algorithms = ["HS256"]
        self._secret = secret

    async def key(self, token: str) -> Any:
        return self._secret


class JwksKeys:
    """The issuer's public keys by `kid`, fetched when one is not known."""

    def __init__(self, url: str) -> None:
        self.algorithms = _JWKS_ALGORITHMS
        self._url = url
        self._keys: dict[str, Any] = {}
        self._fetched_at_s = -float(_JWKS_REFRESH_INTERVAL_S)
        self._lock = asyncio.Lock()

    async def key(self, token: str) -> Any:
        kid = jwt.get_unverified_header(token).get("kid")
        if not isinstance(kid, str):
            raise TokenRefusedError("the token names no key")
        if kid not in self._keys:
            await self._refresh()
        if kid not in self._keys:
            raise TokenRefusedError("the token's key is not known")
        return self._keys[kid]

    async def _refresh(self) -> None:
        async with self._lock:
            if time.monotonic() - self._fetched_at_s < _JWKS_REFRESH_INTERVAL_S:
                return
            self._fetched_at_s = time.monotonic()
            keys = jwt.PyJWKSet.from_dict(json.loads(await asyncio.to_thread(_download, self._url)))
            self._keys = {key.key_id: key for key in keys.keys if key.key_id is not None}


def make_key_source(settings: Settings) -> KeySource:
    """Raises ValueError when the settings name neither a JWKS nor a secret of at least 32 bytes."""
    if settings.jwt_jwks_url:
        if not settings.jwt_jwks_url.startswith(("https://", "http://")):
            raise ValueError("NAVSTREAM_JWT_JWKS_URL is not an http(s) URL")
        return JwksKeys(settings.jwt_jwks_url)
    return SecretKey(_secret(settings))


class Authenticator:
    def __init__(self, settings: Settings) -> None:
        self._keys = make_key_source(settings)
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer
        # By token and verifying key: when the issuer's keys are fetched anew, its tokens are verified anew.
        self._verified: OrderedDict[tuple[str, Any], Subject] = OrderedDict()

    async def authenticate(self, authorization: str | None) -> Subject | None:
        """The caller of an `Authorization` value, None when there is none. Raises TokenRefusedError."""
        if authorization is None:
            return None
        scheme, _, token = authorization.strip().partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise TokenRefusedError("authorization is not a bearer token")
        if len(token) > TOKEN_LENGTH_MAX:
            raise TokenRefusedError("the token is too long")
        token = token.strip()
        try:
            key = await self._keys.key(token)
            known = self._verified.get((token, key))
            if known is not None and known.expires_at_s > time.time():
                return known
            claims = jwt.decode(
                token,
                key,
                algorithms=self._keys.algorithms,
                audience=self._audience,
                issuer=self._issuer,
                options={"require": ["exp", "iat", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise TokenRefusedError("the token has expired") from None
        except (jwt.PyJWTError, ValueError, OSError) as error:
            raise TokenRefusedError("the token is not valid") from error
        subject = _subject(claims)
        self._verified[token, key] = subject
        if len(self._verified) > _VERIFIED_COUNT_MAX:
            self._verified.popitem(last=False)
        return subject


def _subject(claims: dict[str, Any]) -> Subject:
    subject, scope, expires_at_s = claims["sub"], claims.get("scope", ""), claims["exp"]
    if not isinstance(subject, str) or not subject or len(subject) > SUBJECT_LENGTH_MAX:
        raise TokenRefusedError("the token's subject is not a text")
    if not isinstance(scope, str):
        raise TokenRefusedError("the token's scope is not a text")
    return Subject(subject, frozenset(scope.split()) & SCOPES, float(expires_at_s))


def _secret(settings: Settings) -> str:
    secret = settings.jwt_secret.get_secret_value()
    if len(secret.encode()) < JWT_SECRET_BYTES_MIN:
        raise ValueError(f"NAVSTREAM_JWT_SECRET has fewer than {JWT_SECRET_BYTES_MIN} bytes")
    return secret


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_JWKS_TIMEOUT_S) as answer:  # noqa: S310 -- http(s) was checked
        body: bytes = answer.read(_JWKS_BYTES_MAX)
        return body
