"""Webhooks (engine.webhooks): a subject's endpoints, and the log of what was delivered to them.

Each subject manages its own, and only for its own portfolios; what is somebody else's is NOT_FOUND, for
administrators too. All of it needs the scope webhooks:write. A secret is in the answer of the mutation that made it,
and nowhere else afterwards.

A URL is looked up when it is given, so that a mistake shows at once; what decides is the look-up before each
delivery. A name that does not resolve and one that is private are refused alike, so that nobody learns which names
an inner network has.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime

import strawberry

from engine.runtime.addresses import PrivateAddress, UnresolvedHost
from engine.stores.webhooks_postgres import (
    ATTEMPTS_SHOWN_MAX,
    Attempt,
    Delivery,
    TooManyTests,
    TooManyWebhooks,
    UnknownPortfolio,
)
from engine.stores.webhooks_postgres import Webhook as StoredWebhook
from engine.webhooks import UrlRefused, check_url
from resolvers.context import SCOPE_WEBHOOKS_WRITE, Context, Info
from resolvers.enums import AttemptError, DeliveryStatus, WebhookKind
from resolvers.errors import ErrorCode, PublicError, not_found
from resolvers.fields import resolved
from resolvers.pages import Connection, check_first, connection, read_cursor, write_cursor

LOOK_UP_TIMEOUT_S = 5
ROTATION_OVERLAP_MAX_S = 7 * 86_400
WEBHOOKS_DEFAULT = 20
DELIVERIES_DEFAULT = 50
PORTFOLIOS_COUNT_MAX = 200  # that one webhook names; more of them is what null is for


@strawberry.type(description="One attempt to deliver.")
class WebhookAttempt:
    number: int = strawberry.field(
        description="Counts from 1. One that is missing was begun by a process that died: it may have arrived."
    )
    at: datetime = strawberry.field(description="When it was begun.")
    duration_ms: int = strawberry.field(
        description="From the look-up of the host to the answer, or until it was given up; 0 when it is UNRESOLVED."
    )
    status_code: int | None = strawberry.field(description="The HTTP status of the answer; null when there was none.")
    error: AttemptError | None = strawberry.field(description="Why it failed; null when it was delivered.")


@strawberry.type(description="An event on its way to an endpoint, or delivered, or given up.")
class WebhookDelivery:
    delivery_id: str = strawberry.field(
        description="The same for every attempt, in the body and in the header Navstream-Delivery."
    )
    kind: str = strawberry.field(description="A WebhookKind, or TEST.")
    event_id: str = strawberry.field(description="The event; a webhook is told of each once.")
    portfolio_id: str | None = strawberry.field(description="The portfolio of the event; null for a test.")
    status: DeliveryStatus = strawberry.field(description="What became of it.")
    attempts_count: int = strawberry.field(description="How many attempts were begun.")
    created_at: datetime = strawberry.field(description="When the event was recorded; a day later it is given up.")
    due_at: datetime | None = strawberry.field(description="When it is attempted next; null when it is finished.")
    finished_at: datetime | None = strawberry.field(description="When it was delivered or given up.")
    attempts: list[WebhookAttempt] = strawberry.field(
        description=f"The newest {ATTEMPTS_SHOWN_MAX} attempts, newest first."
    )


@strawberry.type(description="An endpoint that is told of events, by signed POSTs.")
class Webhook:
    webhook_id: str = strawberry.field(description="Its id.")
    url: str = strawberry.field(description="Where to.")
    kinds: list[WebhookKind] = strawberry.field(description="What it is told of.")
    portfolio_ids: list[str] | None = strawberry.field(
        description="Of which portfolios; null is all of the owner's, later ones too."
    )
    active: bool = strawberry.field(
        description="Whether it is told; what waits while it is not is held for a day, then DEAD."
    )
    created_at: datetime = strawberry.field(description="When it was created.")

    @resolved("Its deliveries of the last 30 days (by default), newest first.")
    async def deliveries(
        self, info: Info, first: int = DELIVERIES_DEFAULT, after: str | None = None
    ) -> Connection[WebhookDelivery]:
        services = info.context.services
        first = check_first(first, services.settings.page_size_max)
        before = None if after is None else read_cursor("deliveries", after)
        rows = await services.webhooks.deliveries(self.webhook_id, first + 1, before)
        return connection(rows, first, after, _delivery_cursor, _show_delivery)


@strawberry.type(description="A new webhook, and the secret that verifies its signatures. It is shown this once.")
class CreatedWebhook:
    webhook: Webhook = strawberry.field(description="The webhook.")
    secret: str = strawberry.field(description="The key of HMAC-SHA256, as text.")


@strawberry.type(description="A webhook's new secret. It is shown this once.")
class RotatedSecret:
    secret: str = strawberry.field(description="The key of HMAC-SHA256, as text; it signs from now on.")
    former_expires_at: datetime = strawberry.field(
        description="Until when the secret before it signs as well. Still older ones have stopped."
    )


@strawberry.input(description="A new webhook.")
class CreateWebhookInput:
    url: str = strawberry.field(description="https, without user and password, on a public address; else BAD_URL.")
    kinds: list[WebhookKind] = strawberry.field(description="What it is to be told of; at least one.")
    portfolio_ids: list[str] | None = strawberry.field(
        default=None, description="Of which portfolios of the caller's; all, later ones too, when null."
    )


@strawberry.input(description="Changes to a webhook; what is left out stays as it is.")
class UpdateWebhookInput:
    webhook_id: str = strawberry.field(description="Which one.")
    url: str | None = strawberry.field(default=None, description="Where to; also for what waits already.")
    kinds: list[WebhookKind] | None = strawberry.field(default=None, description="What it is told of from now on.")
    portfolio_ids: list[str] | None = strawberry.field(
        default=strawberry.UNSET, description="Of which portfolios from now on; null is all."
    )
    active: bool | None = strawberry.field(default=None, description="Whether it is told.")


async def create_webhook(info: Info, input: CreateWebhookInput) -> CreatedWebhook:
    context = info.context
    access = context.require(SCOPE_WEBHOOKS_WRITE)
    _check_told(input.kinds, input.portfolio_ids)
    await _check_url(context, input.url)
    count_max = context.services.settings.webhooks_per_subject_max
    try:
        webhook, secret = await context.services.webhooks.create(
            access.subject, input.url, input.kinds, input.portfolio_ids, count_max
        )
    except UnknownPortfolio:
        raise not_found("portfolio") from None
    except TooManyWebhooks:
        raise PublicError(ErrorCode.TOO_MANY_WEBHOOKS, f"a subject has at most {count_max} webhooks") from None
    return CreatedWebhook(webhook=_show(webhook), secret=secret)


async def update_webhook(info: Info, input: UpdateWebhookInput) -> Webhook:
    context = info.context
    access = context.require(SCOPE_WEBHOOKS_WRITE)
    _check_id(input.webhook_id)
    webhooks = context.services.webhooks
    changed = await webhooks.find(access.subject, input.webhook_id)
    if changed is None:
        raise not_found("webhook")
    if input.url is not None:
        await _check_url(context, input.url)
        changed = replace(changed, url=input.url)
    if input.kinds is not None:
        changed = replace(changed, kinds=input.kinds)
    if input.portfolio_ids is not strawberry.UNSET:
        changed = replace(changed, portfolio_ids=input.portfolio_ids)
    if input.active is not None:
        changed = replace(changed, active=input.active)
    _check_told(changed.kinds, changed.portfolio_ids)
    try:
        written = await webhooks.update(changed)
    except UnknownPortfolio:
        raise not_found("portfolio") from None
    if written is None:
        raise not_found("webhook")
    return _show(written)


async def delete_webhook(info: Info, webhook_id: str) -> str:
    access = info.context.require(SCOPE_WEBHOOKS_WRITE)
    _check_id(webhook_id)
    if not await info.context.services.webhooks.delete(access.subject, webhook_id):
        raise not_found("webhook")
    return webhook_id


async def rotate_webhook_secret(info: Info, webhook_id: str, overlap_s: int | None = None) -> RotatedSecret:
    access = info.context.require(SCOPE_WEBHOOKS_WRITE)
    _check_id(webhook_id)
    services = info.context.services
    overlap_s = services.settings.webhook_rotation_overlap_s if overlap_s is None else overlap_s
    if not 0 <= overlap_s <= ROTATION_OVERLAP_MAX_S:
        raise PublicError(ErrorCode.BAD_OVERLAP, f"overlapS is 0 to {ROTATION_OVERLAP_MAX_S}")
    rotated = await services.webhooks.rotate(access.subject, webhook_id, overlap_s)
    if rotated is None:
        raise not_found("webhook")
    return RotatedSecret(secret=rotated[0], former_expires_at=rotated[1])


async def send_test_webhook(info: Info, webhook_id: str) -> WebhookDelivery:
    access = info.context.require(SCOPE_WEBHOOKS_WRITE)
    _check_id(webhook_id)
    services = info.context.services
    settings = services.settings
    try:
        sent = await services.webhooks.test(
            access.subject, webhook_id, settings.webhook_test_interval_s, settings.webhook_waiting_count_max
        )
    except TooManyTests:
        text = f"one test every {settings.webhook_test_interval_s} s over all webhooks, and none while too much waits"
        raise PublicError(ErrorCode.TOO_MANY_TESTS, text) from None
    if sent is None:
        raise not_found("webhook")
    return _show_delivery(sent)


async def load_webhooks(context: Context, first: int, after: str | None) -> Connection[Webhook]:
    access = context.require(SCOPE_WEBHOOKS_WRITE)
    first = check_first(first, context.services.settings.page_size_max)
    begin = "" if after is None else read_cursor("webhooks", after)
    rows = await context.services.webhooks.list(access.subject, first + 1, begin)
    return connection(rows, first, after, lambda row: write_cursor("webhooks", row.webhook_id), _show)


def _check_id(webhook_id: str) -> None:
    """PostgreSQL refuses to even compare a text with NUL. Raises PublicError NOT_FOUND."""
    if "\0" in webhook_id:
        raise not_found("webhook")


def _check_told(kinds: list[WebhookKind] | object, portfolio_ids: object) -> None:
    if not kinds:
        raise PublicError(ErrorCode.NO_KINDS, "a webhook is told of at least one kind")
    if isinstance(portfolio_ids, list) and any("\0" in name for name in portfolio_ids):
        raise not_found("portfolio")
    if isinstance(portfolio_ids, list) and not 1 <= len(portfolio_ids) <= PORTFOLIOS_COUNT_MAX:
        raise PublicError(ErrorCode.TOO_MANY_PORTFOLIOS, f"portfolioIds names 1 to {PORTFOLIOS_COUNT_MAX}, or is null")


async def _check_url(context: Context, url: str) -> None:
    """Raises PublicError BAD_URL."""
    private_allowed = context.services.settings.webhook_private_addresses
    try:
        parts = check_url(url, private_allowed)
        async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
            await context.services.host_names.resolve(parts.hostname or "")
    except UrlRefused as error:
        raise PublicError(ErrorCode.BAD_URL, str(error)) from None
    except (UnresolvedHost, PrivateAddress, TimeoutError):
        raise PublicError(ErrorCode.BAD_URL, "the host does not resolve to public addresses alone") from None


def _show(webhook: StoredWebhook) -> Webhook:
    return Webhook(
        webhook_id=webhook.webhook_id,
        url=webhook.url,
        kinds=list(webhook.kinds),
        portfolio_ids=None if webhook.portfolio_ids is None else list(webhook.portfolio_ids),
        active=webhook.active,
        created_at=webhook.created_at,
    )


def _show_delivery(delivery: Delivery) -> WebhookDelivery:
    return WebhookDelivery(
        delivery_id=delivery.delivery_id,
        kind=delivery.kind,
        event_id=delivery.event_id,
        portfolio_id=delivery.portfolio_id,
        status=delivery.status,
        attempts_count=delivery.attempts_count,
        created_at=delivery.created_at,
        due_at=delivery.due_at,
        finished_at=delivery.finished_at,
        attempts=[_show_attempt(attempt) for attempt in delivery.attempts],
    )


def _show_attempt(attempt: Attempt) -> WebhookAttempt:
    return WebhookAttempt(
        number=attempt.number,
        at=attempt.at,
        duration_ms=attempt.duration_ms,
        status_code=attempt.status_code,
        error=attempt.error,
    )


def _delivery_cursor(delivery: Delivery) -> str:
    return write_cursor("deliveries", delivery.delivery_id)
