"""Signatures against independent vectors, delays within their bounds, and which addresses are public."""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.webhooks import (
    LIFETIME,
    RETRY_FIRST_S,
    RETRY_LONGEST_S,
    Body,
    UrlRefused,
    check_url,
    encode_body,
    is_public,
    retry_at,
    signature,
)

CREATED = datetime(2026, 11, 20, 15, tzinfo=UTC)
BODY = b'{"v":1,"kind":"TEST"}'


def v1(secret: str, signed: bytes) -> str:
    return hmac.new(secret.encode("utf-8"), signed, hashlib.sha256).hexdigest()


def test_a_known_vector() -> None:
    """Made with: printf '1700000000.{"v":1,"kind":"TEST"}' | openssl dgst -sha256 -hmac whsec_test"""
    digest = "bf8c4544a4a38fc8a39bd938518f5c6fa0469757fbe5337c4e8624e4bd5f7381"
    assert signature(["whsec_test"], 1_700_000_000, BODY) == f"t=1700000000,v1={digest}"
    assert v1("whsec_test", b"1700000000." + BODY) == digest


def test_every_valid_secret_signs_while_one_is_rotated() -> None:
    header = signature(["new", "old"], 5, BODY)
    stamp, *digests = header.split(",")
    assert stamp == "t=5"
    assert digests == [f"v1={v1('new', b'5.' + BODY)}", f"v1={v1('old', b'5.' + BODY)}"]


@pytest.mark.parametrize(("sent_at_s", "body"), [(6, BODY), (5, BODY + b" ")])
def test_the_instant_and_the_body_are_signed(sent_at_s: int, body: bytes) -> None:
    assert signature(["s"], sent_at_s, body).split(",")[1] != signature(["s"], 5, BODY).split(",")[1]


def test_the_body_carries_the_event_as_it_was_written() -> None:
    data = b'{"event_id":"e","figure":"1.50"}'
    body = encode_body(Body(delivery_id="d", kind="TEST", event_id="e", portfolio_id="p", data=msgspec.Raw(data)))
    assert data in body
    assert json.loads(body) == {
        "v": 1,
        "delivery_id": "d",
        "kind": "TEST",
        "event_id": "e",
        "portfolio_id": "p",
        "data": {"event_id": "e", "figure": "1.50"},
    }


# -- when to try again ---------------------------------------------------------------------------------------------


@given(attempts=st.integers(1, 10_000), random=st.floats(0, 1, exclude_max=True), age_s=st.integers(0, 86_399))
def test_delays_lie_between_nothing_and_the_ceiling(attempts: int, random: float, age_s: int) -> None:
    failed_at = CREATED + timedelta(seconds=age_s)
    again_at = retry_at(CREATED, failed_at, attempts, random)
    assert again_at is not None
    ceiling_s = min(RETRY_LONGEST_S, RETRY_FIRST_S * 2 ** (attempts - 1))
    assert failed_at <= again_at <= min(failed_at + timedelta(seconds=ceiling_s), CREATED + LIFETIME)


def test_the_ceiling_doubles_and_the_jitter_is_full() -> None:
    def delay_s(attempts: int, random: float) -> float:
        again_at = retry_at(CREATED, CREATED, attempts, random)
        assert again_at is not None
        return (again_at - CREATED).total_seconds()

    assert [delay_s(n, 0.5) for n in (1, 2, 3, 4, 9, 10, 50)] == [5, 10, 20, 40, 1280, 1800, 1800]
    assert (delay_s(3, 0), delay_s(3, 0.25)) == (0, 10)


def test_a_delivery_is_dead_after_a_day_and_not_before() -> None:
    """The last attempt is made at the end of the day; only when it fails there is none."""
    nearly = CREATED + LIFETIME - timedelta(seconds=1)
    assert retry_at(CREATED, nearly, 40, 0.9) == CREATED + LIFETIME
    assert retry_at(CREATED, CREATED + LIFETIME, 41, 0) is None
    assert retry_at(CREATED, CREATED + 9 * LIFETIME, 41, 0) is None


# -- where it may go -----------------------------------------------------------------------------------------------

PRIVATE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a00:1",
    "2002:7f00:1::",
    "2002:c0a8:101::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "::8.8.8.8",
    "::ffff:0:8.8.8.8",
    "64:ff9b:1::808:808",
    "64:ff9b:1:ffff:ffff:ffff:ffff:ffff",
    "100::1",
    "fec0::1",
    "feff::1",
    "192.0.0.9",
    "192.0.0.255",
    "192.88.99.1",
    "192.88.99.255",
    "198.51.100.1",
    "203.0.113.1",
    "239.1.2.3",
    "2001:2::1",
    "2001:20::1",
    "2001:1ff:ffff::1",
    "3fff::1",
    "3fff:fff:ffff::1",
    "4000::1",
    "5f00::1",
    "5f00:ffff::1",
    "2002:c058:6301::1",
    "::ffff:192.88.99.1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "93.184.216.34",
        "192.0.1.1",
        "192.88.98.255",
        "192.88.100.1",
        "223.255.255.254",
        "2606:4700::1111",
        "2001:200::1",
        "2a00:1450::1",
        "3ffe:ffff::1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ],
)
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com/x",
        "http://hooks.example.com/x",
        "ftp://hooks.example.com/x",
        "https://",
        "https:///x",
        "https://user:secret@hooks.example.com/",
        "https://user@hooks.example.com/",
        "https://hooks.example.com/#part",
        "https://hooks.example.com:99999/",
        "https://hooks.example.com:0/",
        "https://[::1/",
        "https://hooks.example.com\\@127.0.0.1/",
        "https://hooks.example.com/a b",
        "https://hooks.example.com/\n",
        "https://höoks.example.com/",
        "https://127.0.0.1/",
        "https://[::ffff:127.0.0.1]:8443/x",
        "https://169.254.169.254/latest/meta-data",
        "https://hooks.example.com/" + "x" * 2_000,
    ],
)
def test_urls_that_no_webhook_may_have(url: str) -> None:
    with pytest.raises(UrlRefused):
        check_url(url, private_allowed=False)


@pytest.mark.parametrize(
    "url", ["https://hooks.example.com", "https://hooks.example.com:8443/x?y=1", "https://8.8.8.8/"]
)
def test_urls_that_a_webhook_may_have(url: str) -> None:
    assert check_url(url, private_allowed=False).scheme == "https"


def test_where_private_addresses_are_allowed_so_is_http() -> None:
    assert check_url("http://127.0.0.1:9000/hook", private_allowed=True).port == 9000
    with pytest.raises(UrlRefused):
        check_url("file:///etc/passwd", private_allowed=True)
