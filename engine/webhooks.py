"""Webhooks: what third parties are told, how it is signed, when it is tried again, and where it may go.

A delivery is one POST of a JSON body to an endpoint (`Body`). It is delivered once the endpoint has answered 2xx,
at least once and in no particular order; every attempt has the same body and the same `delivery_id`, by which a
receiver tells a repetition.

Signature. Of each attempt at wall time `t` (whole seconds since 1970), one `v1` for every valid secret:

    Navstream-Signature: t=<t>,v1=<hex>[,v1=<hex>]         v1 = HMAC-SHA256(key = the secret's text, t + "." + body)

A receiver recomputes v1 with the secret it has, compares in constant time, and refuses a `t` that is minutes away from
its own clock: a recorded request can not be replayed to it later. While a secret is being rotated the old and the
new one both sign, so that the receiver may change over whenever it likes.

Retries. The delay before attempt n + 1 is drawn anew each time from all of [0, ceiling), which spreads the
deliveries of an endpoint that comes back (full jitter):

    ceiling = min(RETRY_LONGEST_S, RETRY_FIRST_S × 2ⁿ⁻¹)

The last attempt is made LIFETIME after the delivery was made, or as soon as possible after that; when it fails too,
the delivery is DEAD. Every failure is retried, a 4xx too: who has deployed a mistake has a day to mend it. What waits
for a webhook that is not active is held; it is due when that is active again, and DEAD after LIFETIME without an
attempt.

Addresses. A URL is `https`, without user and password. Of what its host resolves to every address must be public
(`is_public`): globally reachable unicast, where what is embedded in an IPv6 address counts as if it stood alone. Where
the operator allows private addresses, all of them and `http` are allowed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

import msgspec

SIGNATURE_HEADER = "Navstream-Signature"
DELIVERY_HEADER = "Navstream-Delivery"
SECRET_PREFIX = "whsec_"  # noqa: S105 -- tells a secret from other tokens where it is found
SECRET_BYTES = 32
URL_LENGTH_MAX = 2_000

LIFETIME = timedelta(days=1)
RETRY_FIRST_S = 10
RETRY_LONGEST_S = 3_600

# What IANA's special-purpose registries (RFC 6890 and later) do not call globally reachable, or reserve for a protocol
# of its own. Python's tables know less, and other things in each version.
_SPECIAL_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# All that is global unicast at all lies in here; of it the protocol assignments (Teredo, ORCHID, benchmarks and more),
# the two ranges for documentation, and those of AS112 do not count.
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_SPECIAL_IPV6 = tuple(
    IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20")
)
# IPv6 ranges whose addresses have an IPv4 address inside, and how far it is shifted: mapped, NAT64, 6to4.
_EMBEDDING = (
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("2002::/16"), 80),
)


class WebhookKind(StrEnum):
    """What a webhook can be told of."""

    BADGE_UNLOCKED = "BADGE_UNLOCKED"
    BADGE_ACTIVATED = "BADGE_ACTIVATED"
    BADGE_LAPSED = "BADGE_LAPSED"
    THRESHOLD_CROSSED = "THRESHOLD_CROSSED"


TEST_KIND = "TEST"  # sent on request, whatever a webhook is told of


class DeliveryStatus(StrEnum):
    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    DEAD = "DEAD"


class AttemptError(StrEnum):
    """Why an attempt failed."""

    STATUS = "STATUS"  # an answer other than 2xx, redirections among them
    TIMEOUT = "TIMEOUT"
    UNRESOLVED = "UNRESOLVED"  # no address, or one that is not public: nobody is told which names an inner network has
    UNREACHABLE = "UNREACHABLE"  # no connection, or no TLS
    PROTOCOL = "PROTOCOL"  # connected, and then no HTTP answer


class UrlRefused(ValueError):
    """The URL is none that a webhook can have; the message says why."""


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """What is posted. `data` is the event as its topic carries it; null in a test, which has no portfolio either."""

    v: int = 1
    delivery_id: str
    kind: str
    event_id: str
    portfolio_id: str | None
    data: msgspec.Raw


encode_body = msgspec.json.Encoder().encode


def signature(secrets: Iterable[str], sent_at_s: int, body: bytes) -> str:
    """The header's value of an attempt at `sent_at_s`, signed with each of `secrets`."""
    signed = b"%d." % sent_at_s + body
    digests = (hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest() for secret in secrets)
    return ",".join([f"t={sent_at_s}", *(f"v1={digest}" for digest in digests)])


def retry_at(created_at: datetime, failed_at: datetime, attempts_count: int, random: float) -> datetime | None:
    """When to try again after `attempts_count` ≥ 1 failures, with `random` from [0, 1); None when it is dead."""
    ends_at = created_at + LIFETIME
    if failed_at >= ends_at:
        return None
    # Beyond 2²⁰ the ceiling has long been reached, and a timedelta would overflow.
    ceiling_s = min(RETRY_LONGEST_S, RETRY_FIRST_S * 2 ** min(attempts_count - 1, 20))
    return min(ends_at, failed_at + timedelta(seconds=ceiling_s) * random)


def check_url(url: str, private_allowed: bool) -> SplitResult:
    """The parts of a URL that a webhook may have, as far as can be told without a look-up. Raises UrlRefused."""
    if len(url) > URL_LENGTH_MAX:
        raise UrlRefused(f"the URL has more than {URL_LENGTH_MAX} characters")
    # urlsplit drops tabs and line breaks without a word, and what it is given is not what it reads.
    if not url.isascii() or not url.isprintable() or any(mark in url for mark in ' \\"<>'):
        raise UrlRefused("the URL has characters that a URL has not")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UrlRefused("not a URL") from None
    if parts.scheme not in (("https", "http") if private_allowed else ("https",)):
        raise UrlRefused("the URL begins with https://")
    if not host or port == 0:
        raise UrlRefused("the URL names no host")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise UrlRefused("the URL has a user, a password or a fragment")
    try:
        address = ip_address(host)
    except ValueError:
        return parts
    if not private_allowed and not is_public(address):
        raise UrlRefused("the address is not public")
    return parts


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether anybody on the internet reaches the address, and nothing else by it."""
    if isinstance(address, IPv6Address):
        for network, shift in _EMBEDDING:
            if address in network:
                return is_public(IPv4Address((int(address) >> shift) & 0xFFFF_FFFF))
        known = address in _GLOBAL_IPV6 and not any(address in network for network in _SPECIAL_IPV6)
    else:
        known = not any(address in network for network in _SPECIAL_IPV4)
    return known and address.is_global and not address.is_multicast
