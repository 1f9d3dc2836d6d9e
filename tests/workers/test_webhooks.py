"""The webhooks worker against real endpoints: well-behaved ones, broken ones, hostile ones; and its own death."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from engine.runtime import addresses
from engine.runtime.clock import WallClock
from engine.runtime.settings import Settings
from engine.stores.webhook_deliveries import TakenDelivery, WebhookDeliveries
from engine.stores.webhooks_postgres import Webhooks, enqueue
from engine.webhooks import AttemptError, WebhookKind
from tests import webhook_receiver as manners
from tests.builders import LedgerBuilder
from tests.webhook_receiver import Request, receiving, status
from workers import webhooks as worker
from workers.webhooks import Courier, Sender, run_webhooks

UNLOCKED = WebhookKind.BADGE_UNLOCKED
NOW = datetime(2026, 11, 20, tzinfo=UTC)


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {"webhook_private_addresses": True, "webhook_timeout_s": 1}
    return Settings(**(values | changes))


def taken(url: str, secrets: list[str] | None = None) -> TakenDelivery:
    return TakenDelivery("d-1", "w-1", url, secrets or ["s"], b'{"v":1}', NOW, 1, NOW)


@asynccontextmanager
async def sending(**changes: Any) -> AsyncIterator[Sender]:
    sender = Sender(settings(**changes))
    try:
        yield sender
    finally:
        await sender.close()


def check_signature(request: Request, *secrets: str) -> None:
    """As a third party does it, from the documentation alone."""
    stamp, *given = request.headers["navstream-signature"].split(",")
    assert abs(int(stamp.removeprefix("t=")) - time.time()) < 60
    signed = stamp.removeprefix("t=").encode() + b"." + request.body
    expected = [f"v1={hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()}" for secret in secrets]
    assert given == expected


# -- one attempt -------------------------------------------------------------------------------------------------


async def test_a_delivery_is_a_signed_post() -> None:
    async with receiving() as receiver, sending() as sender:
        outcome = await sender.attempt(taken(receiver.url, ["new", "old"]))
        (request,) = receiver.requests
        host = f"127.0.0.1:{receiver.port}"
    assert (outcome.status_code, outcome.error) == (200, None)
    assert (request.line, request.body) == ("POST /hook?a=b HTTP/1.1", b'{"v":1}')
    assert (request.headers["host"], request.headers["navstream-delivery"]) == (host, "d-1")
    assert request.headers["content-type"] == "application/json"
    check_signature(request, "new", "old")


@pytest.mark.parametrize(
    ("manner", "error", "code"),
    [
        (status(204), None, 204),
        (status(400), AttemptError.STATUS, 400),
        (status(500), AttemptError.STATUS, 500),
        (status(301, "location: http://127.0.0.1:1/"), AttemptError.STATUS, 301),
        (manners.hanging, AttemptError.TIMEOUT, None),
        (manners.dripping_headers, AttemptError.TIMEOUT, None),
        (manners.garbage, AttemptError.PROTOCOL, None),
        (manners.endless_headers, AttemptError.PROTOCOL, None),
        (manners.endless_body, None, 200),
    ],
)
async def test_the_manners_of_endpoints(manner: manners.Answer, error: AttemptError | None, code: int | None) -> None:
    async with receiving(manner) as receiver, sending() as sender:
        begun_s = time.monotonic()
        outcome = await sender.attempt(taken(receiver.url))
        assert time.monotonic() - begun_s < 3
        assert len(receiver.requests) == 1  # a redirection, least of all, makes another
    assert (outcome.error, outcome.status_code) == (error, code)


async def test_an_endpoint_that_is_not_there() -> None:
    async with sending() as sender:
        assert (await sender.attempt(taken("http://127.0.0.1:1/"))).error is AttemptError.UNREACHABLE


async def test_no_connection_is_used_twice() -> None:
    async with receiving() as receiver, sending() as sender:
        for _ in range(3):
            await sender.attempt(taken(receiver.url))
        assert receiver.connections_count == 3


async def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would look the name up itself, and connect to whatever it says then."""
    async with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        async with sending() as sender:
            assert (await sender.attempt(taken(receiver.url))).error is None
        assert (proxy.connections_count, len(receiver.requests)) == (0, 1)


# -- where it may go ---------------------------------------------------------------------------------------------


def names(monkeypatch: pytest.MonkeyPatch, look_up: Callable[[str], list[str]]) -> list[str]:
    """Let names resolve to what the test says; returns what was looked up."""
    asked: list[str] = []

    def fake(host: str) -> list[str]:
        asked.append(host)
        return look_up(host)

    monkeypatch.setattr(addresses, "look_up", fake)
    return asked


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "127.1"])
async def test_a_name_that_resolves_to_loopback_is_refused(host: str) -> None:
    """By the system's own resolver, which takes more spellings than anybody would think of."""
    async with receiving() as receiver, sending(webhook_private_addresses=False) as sender:
        outcome = await sender.attempt(taken(f"https://{host}:{receiver.port}/"))
        assert receiver.connections_count == 0
    assert (outcome.error, outcome.duration_ms) == (AttemptError.UNRESOLVED, 0)


@pytest.mark.parametrize(
    "found", [["127.0.0.1"], ["::1"], ["::ffff:10.0.0.1"], ["169.254.169.254"], ["8.8.8.8", "192.168.0.1"]]
)
async def test_one_private_address_is_enough_to_refuse_a_name(
    monkeypatch: pytest.MonkeyPatch, found: list[str]
) -> None:
    names(monkeypatch, lambda _: found)
    async with sending(webhook_private_addresses=False) as sender:
        assert (await sender.attempt(taken("https://hooks.example.com/"))).error is AttemptError.UNRESOLVED


async def test_nobody_learns_from_the_log_which_names_an_inner_network_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str) -> list[str]:
        if host == "there.internal":
            time.sleep(0.05)
            return ["10.0.0.1"]
        raise addresses.UnresolvedHost(host)

    names(monkeypatch, look_up)
    async with sending(webhook_private_addresses=False) as sender:
        there = await sender.attempt(taken("https://there.internal/"))
        assert there == await sender.attempt(taken("https://not-there.internal/"))


async def test_names_that_hang_hold_up_no_other_thread_and_one_name_holds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, asked = threading.Event(), []

    def look_up(host: str) -> list[str]:
        asked.append(host)
        if host.startswith("slow"):
            hanging.wait(20)
        return ["8.8.8.8"]

    monkeypatch.setattr(addresses, "look_up", look_up)
    host_names = addresses.HostNames(private_allowed=False, lookups_count_max=40)
    try:
        slow = [asyncio.create_task(host_names.resolve(f"slow-{number % 39}")) for number in range(120)]
        # More than asyncio's own threads, which files, TLS and whoever else wait for.
        async with asyncio.timeout(10):
            assert await host_names.resolve("quick") == ["8.8.8.8"]
            await asyncio.to_thread(list)
        for task in slow[39:]:
            task.cancel()
        assert sorted(asked) == sorted({"quick", *(f"slow-{number}" for number in range(39))})
        hanging.set()
        assert await asyncio.gather(*slow[:39]) == [["8.8.8.8"]] * 39, "others gave up waiting for the same names"
        await host_names.resolve("slow-1")
        assert asked.count("slow-1") == 2, "nothing is remembered"
    finally:
        hanging.set()
        host_names.close()


async def test_more_names_than_threads_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(addresses, "look_up", lambda _: hanging.wait(20) and ["8.8.8.8"])
    host_names = addresses.HostNames(private_allowed=False, lookups_count_max=2)
    try:
        tasks = [asyncio.create_task(host_names.resolve(f"name-{number}")) for number in range(5)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await host_names.resolve("late")
        hanging.set()
        assert await asyncio.gather(*tasks) == [["8.8.8.8"]] * 5
    finally:
        hanging.set()
        host_names.close()


async def test_a_private_address_in_the_url_is_refused_also_when_it_was_allowed_once() -> None:
    async with receiving() as receiver, sending(webhook_private_addresses=False) as sender:
        assert (await sender.attempt(taken(receiver.url))).error is AttemptError.PROTOCOL
        assert receiver.connections_count == 0


async def test_the_address_that_was_judged_is_the_one_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebinding: a name that is public when it is judged and private when it is looked up again. It is not."""
    async with receiving() as receiver, sending() as sender:
        answers = [["127.0.0.1"], ["127.0.0.2"]]
        asked = names(monkeypatch, lambda _: answers.pop(0))
        url = f"http://rebinding.example.com:{receiver.port}/x"
        assert (await sender.attempt(taken(url))).error is None
        assert (asked, len(receiver.requests)) == (["rebinding.example.com"], 1)
        assert receiver.requests[0].headers["host"] == f"rebinding.example.com:{receiver.port}"


async def test_the_next_address_is_tried_when_one_takes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver, sending() as sender:
        names(monkeypatch, lambda _: ["127.0.0.9", "127.0.0.1"])
        assert (await sender.attempt(taken(f"http://two.example.com:{receiver.port}/"))).error is None


@pytest.mark.parametrize("raised", [addresses.UnresolvedHost("no"), TimeoutError()])
async def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    def fail(_: str) -> list[str]:
        raise raised

    names(monkeypatch, fail)
    expected = AttemptError.TIMEOUT if isinstance(raised, TimeoutError) else AttemptError.UNRESOLVED
    async with sending() as sender:
        assert (await sender.attempt(taken("https://hooks.example.com/"))).error is expected


async def test_over_tls_the_certificate_must_be_the_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The connection goes to an address, the certificate is still the name's."""
    ours, theirs = tls_pair(tmp_path, "hooks.example.com")
    names(monkeypatch, lambda _: ["127.0.0.1"])
    async with receiving(tls=theirs) as receiver:
        sender = Sender(settings(), ours)
        good = await sender.attempt(taken(f"https://hooks.example.com:{receiver.port}/"))
        bad = await sender.attempt(taken(f"https://other.example.com:{receiver.port}/"))
        await sender.close()
        async with sending() as strict:
            unknown = await strict.attempt(taken(f"https://hooks.example.com:{receiver.port}/"))
        assert len(receiver.requests) == 1
    assert (good.error, bad.error, unknown.error) == (None, AttemptError.UNREACHABLE, AttemptError.UNREACHABLE)


def tls_pair(directory: Any, name: str) -> tuple[Any, Any]:
    """A client's context that trusts a new certificate of `name`, and the server's that has it."""
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    file, key_file = directory / "certificate.pem", directory / "key.pem"
    file.write_bytes(certificate.public_bytes(pem))
    plain = serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(file, key_file)
    return ssl.create_default_context(cafile=str(file)), theirs


# -- from the table to the endpoint --------------------------------------------------------------------------------


@pytest.fixture
async def pool(fresh_database: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(fresh_database, min_size=1, max_size=4) as one:
        await LedgerBuilder(one).portfolio("a-1")
        yield one


async def create(pool: asyncpg.Pool, url: str) -> str:
    """A webhook of ann's; returns its secret."""
    _, secret = await Webhooks(lambda: pool).create("ann", url, [UNLOCKED], None, 20)
    return secret


async def tell(pool: asyncpg.Pool, *event_ids: str) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await enqueue(connection, [(event_id, "a-1", "UNLOCKED", b"{}") for event_id in event_ids])


async def statuses(pool: asyncpg.Pool) -> dict[str, str]:
    return {row[0]: row[1] for row in await pool.fetch("SELECT event_id, status FROM webhook_delivery")}


async def settled(pool: asyncpg.Pool, count: int, wanted: str, timeout_s: float = 15) -> None:
    async with asyncio.timeout(timeout_s):
        while list((await statuses(pool)).values()).count(wanted) < count:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(chosen: Settings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(run_webhooks(chosen, WallClock(), stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def test_two_failures_and_a_success(
    pool: asyncpg.Pool, fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.random, "random", lambda: 0.01)  # a tenth of a second, then a fifth
    async with receiving(status(500), status(500)) as receiver:
        secret = await create(pool, receiver.url)
        async with running(settings(postgres_url=fresh_database)):
            await tell(pool, "e1")
            requests = await receiver.received(3)
            await settled(pool, 1, "DELIVERED")
    assert len({request.body for request in requests}) == 1
    assert json.loads(requests[0].body)["delivery_id"] == requests[0].headers["navstream-delivery"]
    for request in requests:
        check_signature(request, secret)
    rows = await pool.fetch("SELECT number, status_code, error FROM webhook_attempt ORDER BY number")
    assert [tuple(row) for row in rows] == [(1, 500, "STATUS"), (2, 500, "STATUS"), (3, 200, None)]


async def test_a_delivery_of_yesterday_is_tried_once_more_and_then_dead(
    pool: asyncpg.Pool, fresh_database: str
) -> None:
    async with receiving(status(503), status(503)) as receiver:
        await create(pool, receiver.url)
        await tell(pool, "old", "new")
        await pool.execute("UPDATE webhook_delivery SET created_at = now() - interval '1 day' WHERE event_id = 'old'")
        async with running(settings(postgres_url=fresh_database)):
            await settled(pool, 1, "DEAD")
            await receiver.received(2)
    assert await statuses(pool) == {"old": "DEAD", "new": "PENDING"}


async def test_a_commit_is_delivered_at_once(pool: asyncpg.Pool, fresh_database: str) -> None:
    async with receiving() as receiver:
        await create(pool, receiver.url)
        async with running(settings(postgres_url=fresh_database)):
            await tell(pool, "first")
            await receiver.received(1)
            begun_s = time.monotonic()
            await tell(pool, *(f"e{n}" for n in range(50)))
            await receiver.received(51)
            assert time.monotonic() - begun_s < 5
            await settled(pool, 51, "DELIVERED")
    assert len({request.headers["navstream-delivery"] for request in receiver.requests}) == 51


async def test_an_endpoint_that_hangs_holds_up_nobody_else(pool: asyncpg.Pool, fresh_database: str) -> None:
    async with receiving(*[manners.hanging] * 20) as slow, receiving() as quick:
        await create(pool, slow.url)
        chosen = settings(postgres_url=fresh_database, webhook_timeout_s=5, webhook_deliveries_count_max=6)
        async with running(chosen):
            await tell(pool, *(f"e{n}" for n in range(20)))
            await slow.received(4)
            await create(pool, quick.url)
            await tell(pool, "e99")
            await quick.received(1, 3)
            assert len(slow.requests) == 4


async def test_a_courier_at_its_limit_takes_nothing(pool: asyncpg.Pool) -> None:
    async with receiving(*[manners.hanging] * 3) as receiver:
        await create(pool, receiver.url)
        await tell(pool, "e1", "e2", "e3")
        chosen = settings(webhook_deliveries_count_max=2)
        sender = Sender(chosen)
        courier = Courier(chosen, WebhookDeliveries(pool), sender)
        assert [await courier.poll() for _ in range(2)] == [2, 0]
        await courier.finish()
        await sender.close()


_WORKER = """
import asyncio
from engine.runtime.clock import WallClock
from engine.runtime.settings import Settings
from workers.webhooks import run_webhooks
asyncio.run(run_webhooks(Settings(), WallClock(), asyncio.Event()))
"""


async def test_a_worker_killed_between_sending_and_marking_sends_again_under_the_same_id(
    pool: asyncpg.Pool, fresh_database: str
) -> None:
    """The endpoint has the request and has not answered when the worker is killed: at least once, one id."""
    async with receiving(manners.hanging) as receiver:
        secret = await create(pool, receiver.url)
        await tell(pool, "e1")
        environment = os.environ | {
            "NAVSTREAM_POSTGRES_URL": fresh_database,
            "NAVSTREAM_WEBHOOK_PRIVATE_ADDRESSES": "true",
            "NAVSTREAM_WEBHOOK_TIMEOUT_S": "2",
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", _WORKER, env=environment)
        try:
            await receiver.received(1, 20)
        finally:
            process.send_signal(signal.SIGKILL)
            await process.wait()
        assert await statuses(pool) == {"e1": "PENDING"}
        assert await pool.fetchval("SELECT count(*) FROM webhook_attempt") == 0
        async with running(settings(postgres_url=fresh_database)):
            first, second = await receiver.received(2, 20)
            await settled(pool, 1, "DELIVERED")
    assert first.body == second.body
    assert first.headers["navstream-delivery"] == second.headers["navstream-delivery"]
    check_signature(second, secret)
    assert [row[0] for row in await pool.fetch("SELECT number FROM webhook_attempt")] == [2]


async def test_two_workers_share_the_work(pool: asyncpg.Pool, fresh_database: str) -> None:
    async with receiving() as receiver:
        await create(pool, receiver.url)
        chosen = settings(postgres_url=fresh_database)
        async with running(chosen), running(chosen):
            await tell(pool, *(f"e{n}" for n in range(100)))
            await settled(pool, 100, "DELIVERED")
    assert len(receiver.requests) == 100
