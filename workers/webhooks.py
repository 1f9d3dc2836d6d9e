"""The webhooks worker: posts what waits in `webhook_delivery` to its endpoints (engine.webhooks says how).

    take     due deliveries, several at once, a few of each endpoint (engine.stores.webhook_deliveries)
    send     one POST over a connection of its own, to an address that was looked up and judged for this attempt
    settle   into the delivery log: delivered, to be tried again, or dead

It wakes when a transaction that enqueued something commits (NOTIFY), when an attempt has come to an end, and every
POLL_INTERVAL_S. Several workers share the work. One that dies between sending and settling leaves its deliveries to be
sent again, with the same ids.

What an endpoint can do to it: be refused when it is private; take `webhook_timeout_s` in all, from the look-up to the
headers of the answer; answer headers of the HTTP library's limit (100 kB). The answer's body is never read, a
redirection never followed, no proxy asked and no connection used twice, so that neither a second look-up nor another
endpoint's TLS name comes into it. Time is wall time here: receivers compare it with their clocks.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Mapping
from datetime import timedelta

import asyncpg
import httpx
import structlog
from asyncpg.pool import PoolConnectionProxy

from engine.runtime import telemetry
from engine.runtime.addresses import HostNames, PrivateAddress, UnresolvedHost
from engine.runtime.clock import Clock
from engine.runtime.connections import AWAY, Backoff, Outage, connect_postgres, stopped_within, wait_until
from engine.runtime.settings import Settings
from engine.stores.webhook_deliveries import AttemptOutcome, TakenDelivery, WebhookDeliveries
from engine.stores.webhooks_postgres import CHANNEL
from engine.webhooks import (
    DELIVERY_HEADER,
    SIGNATURE_HEADER,
    AttemptError,
    DeliveryStatus,
    UrlRefused,
    check_url,
    retry_at,
    signature,
)
from workers.lifecycle import run_together

POLL_INTERVAL_S = 1
PRUNE_INTERVAL_S = 3_600
# Beyond the attempt itself: what settling it may take before somebody else takes the delivery for abandoned.
SETTLE_TIMEOUT_S = 5
# What is under way at the end may come to one; what does not is sent again by somebody else.
FINISH_TIMEOUT_S = 3
ADDRESSES_TRIED_MAX = 3

_log = structlog.get_logger(__name__)


class Sender:
    """Posts to endpoints that may be hostile."""

    def __init__(self, settings: Settings, tls: ssl.SSLContext | None = None) -> None:
        self._timeout_s = settings.webhook_timeout_s
        self._private_allowed = settings.webhook_private_addresses
        self._names = HostNames(settings.webhook_private_addresses, settings.webhook_lookups_count_max)
        self._client = httpx.AsyncClient(
            verify=tls or httpx.create_ssl_context(trust_env=False),
            trust_env=False,
            follow_redirects=False,
            timeout=settings.webhook_timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        self._names.close()
        await self._client.aclose()

    async def attempt(self, taken: TakenDelivery) -> AttemptOutcome:
        """Post a delivery once, signed as of now."""
        begun_s = time.monotonic()
        status_code, error = None, None
        try:
            async with asyncio.timeout(self._timeout_s):
                status_code = await self._post(taken)
            if not 200 <= status_code < 300:
                error = AttemptError.STATUS
        except (PrivateAddress, UnresolvedHost) as refused:
            # The operator may know which of the two it was; its owner learns neither that nor how long it took.
            _log.info("webhook_host_refused", webhook=taken.webhook_id, reason=str(refused))
            error, begun_s = AttemptError.UNRESOLVED, time.monotonic()
        except (TimeoutError, httpx.TimeoutException):
            error = AttemptError.TIMEOUT
        except httpx.ConnectError:
            error = AttemptError.UNREACHABLE
        except (httpx.HTTPError, httpx.InvalidURL, UrlRefused):
            error = AttemptError.PROTOCOL
        duration_s = time.monotonic() - begun_s
        telemetry.WEBHOOK_ATTEMPTS.labels("ok" if error is None else error.value.lower()).inc()
        telemetry.WEBHOOK_TIME.observe(duration_s)
        return AttemptOutcome(int(duration_s * 1_000), status_code, error)

    async def _post(self, taken: TakenDelivery) -> int:
        """The status of the endpoint's answer. Tries its addresses in turn until one takes a connection."""
        parts = check_url(taken.url, self._private_allowed)
        host = parts.hostname
        assert host is not None, "a URL that was checked has a host"
        headers = {
            "Host": parts.netloc,
            "User-Agent": "navstream-webhooks",
            "Content-Type": "application/json",
            DELIVERY_HEADER: taken.delivery_id,
            SIGNATURE_HEADER: signature(taken.secrets, int(time.time()), taken.body),
        }
        addresses = await self._names.resolve(host)
        tried = addresses[:ADDRESSES_TRIED_MAX]
        for address in tried[:-1]:
            try:
                return await self._post_to(address, host, headers, taken)
            except httpx.ConnectError as error:
                _log.debug("webhook_address_unreachable", webhook=taken.webhook_id, reason=str(error))
        return await self._post_to(tried[-1], host, headers, taken)

    async def _post_to(self, address: str, host: str, headers: Mapping[str, str], taken: TakenDelivery) -> int:
        # The connection goes to the address, the certificate must still be the name's.
        url = httpx.URL(taken.url).copy_with(host=address)
        extensions = {"sni_hostname": host}
        async with self._client.stream(
            "POST", url, headers=headers, content=taken.body, extensions=extensions
        ) as answer:
            return answer.status_code


class Courier:
    """Takes what is due and brings it to its endpoints, several at once."""

    def __init__(self, settings: Settings, deliveries: WebhookDeliveries, sender: Sender) -> None:
        self._settings = settings
        self._deliveries = deliveries
        self._sender = sender
        self._lease_s = settings.webhook_timeout_s + SETTLE_TIMEOUT_S
        self._under_way: dict[asyncio.Task[None], str] = {}
        self.wake = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        outage = Outage("postgresql")
        stopping = asyncio.create_task(self._wake_at(stop))
        try:
            while not stop.is_set():
                self.wake.clear()
                delay_s: float = POLL_INTERVAL_S
                try:
                    if await self.poll():
                        continue  # There may be more.
                    outage.end()
                except AWAY as error:
                    delay_s = outage.begin_or_continue(error)
                    await stopped_within(stop, delay_s)
                    continue
                try:
                    async with asyncio.timeout(delay_s):
                        await self.wake.wait()
                except TimeoutError:
                    pass
        finally:
            stopping.cancel()
            await self.finish()

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.wake.set()

    async def poll(self) -> int:
        """Take what is due and there is room for, and begin to deliver it; returns how many. Raises AWAY errors."""
        room = self._settings.webhook_deliveries_count_max - len(self._under_way)
        if room <= 0:
            return 0
        settings, busy = self._settings, self._under_way.values()
        endpoint_max = settings.webhook_endpoint_deliveries_count_max
        owner_max = settings.webhook_owner_deliveries_count_max
        taken = await self._deliveries.take(room, endpoint_max, owner_max, busy, self._lease_s)
        for one in taken:
            task = asyncio.create_task(self._deliver(one))
            self._under_way[task] = one.webhook_id
            task.add_done_callback(self._done)
        return len(taken)

    async def finish(self) -> None:
        """Wait for what is under way, for a while."""
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=FINISH_TIMEOUT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._under_way[task]
        self.wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect: the delivery is due again when its time is over.
            _log.error("webhook_delivery_failed", exc_info=error)

    async def _deliver(self, taken: TakenDelivery) -> None:
        outcome = await self._sender.attempt(taken)
        failed_at = taken.taken_at + timedelta(milliseconds=outcome.duration_ms)
        again_at = retry_at(taken.created_at, failed_at, taken.number, random.random())
        backoff, ends_s = Backoff(), time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            try:
                status = await self._deliveries.settle(taken, outcome, again_at)
                break
            except AWAY as error:
                if time.monotonic() > ends_s:
                    _log.warning("webhook_unsettled", delivery=taken.delivery_id, reason=type(error).__name__)
                    return
                await asyncio.sleep(backoff.next_s())
        telemetry.WEBHOOK_DELIVERIES.labels("retried" if status is DeliveryStatus.PENDING else status.lower()).inc()
        if status is DeliveryStatus.DEAD:
            reason = outcome.error.value if outcome.error else ""
            _log.warning("webhook_delivery_dead", webhook=taken.webhook_id, delivery=taken.delivery_id, reason=reason)


async def run_webhooks(settings: Settings, clock: Clock, stop: asyncio.Event) -> None:
    """Deliver until `stop` is set. Time is wall time, whatever `clock` says."""
    pool, sender = None, Sender(settings)
    try:

        async def connect() -> None:
            nonlocal pool
            pool = pool or await connect_postgres(settings, "webhooks")

        if not await wait_until("postgresql", connect, stop):
            return
        assert pool is not None
        deliveries = WebhookDeliveries(pool)
        courier = Courier(settings, deliveries, sender)
        await run_together(
            courier.run(stop),
            _listen(pool, courier.wake, stop),
            _prune(deliveries, settings.webhook_log_retention_days, stop),
        )
    finally:
        await sender.close()
        if pool is not None:
            await pool.close()


async def _listen(pool: asyncpg.Pool, wake: asyncio.Event, stop: asyncio.Event) -> None:
    """Wake at every NOTIFY, on a connection that is made anew when it is lost."""
    outage = Outage("postgresql notifications")

    def notified(*_: object) -> None:
        wake.set()

    while not stop.is_set():
        try:
            async with pool.acquire() as connection:
                await connection.add_listener(CHANNEL, notified)
                outage.end()
                wake.set()
                while not connection.is_closed() and not await stopped_within(stop, POLL_INTERVAL_S):
                    pass
                await _forget(connection, notified)
        except AWAY as error:
            await stopped_within(stop, outage.begin_or_continue(error))


async def _forget(connection: PoolConnectionProxy, listener: object) -> None:
    if not connection.is_closed():
        await connection.remove_listener(CHANNEL, listener)  # type: ignore[arg-type] # its stub wants a protocol


async def _prune(deliveries: WebhookDeliveries, retention_days: int, stop: asyncio.Event) -> None:
    outage = Outage("postgresql")
    while not stop.is_set():
        delay_s: float = PRUNE_INTERVAL_S
        try:
            telemetry.WEBHOOK_DELIVERIES.labels("dead").inc(await deliveries.expire())
            await deliveries.prune(retention_days)
            outage.end()
        except AWAY as error:
            delay_s = outage.begin_or_continue(error)
        await stopped_within(stop, delay_s)
