"""Webhooks and thresholds over the real gateway: scopes, owners, what is shown once, and what is refused."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from engine.stores.webhook_deliveries import AttemptOutcome, WebhookDeliveries
from engine.stores.webhooks_postgres import enqueue
from engine.webhooks import AttemptError
from tests.gateway import Gateway

SCOPES = "portfolio:read webhooks:write"
URL = "https://8.8.8.8/hook"
FIELDS = "webhookId url kinds portfolioIds active createdAt"
CREATE = f"mutation($in: CreateWebhookInput!) {{ createWebhook(input: $in) {{ webhook {{ {FIELDS} }} secret }} }}"
UPDATE = f"mutation($in: UpdateWebhookInput!) {{ updateWebhook(input: $in) {{ {FIELDS} }} }}"
DELETE = "mutation($id: String!) { deleteWebhook(webhookId: $id) }"
ROTATE = """mutation($id: String!, $s: Int) { rotateWebhookSecret(webhookId: $id, overlapS: $s) {
    secret formerExpiresAt } }"""
TEST = "mutation($id: String!) { sendTestWebhook(webhookId: $id) { deliveryId kind status portfolioId attemptsCount } }"
LIST = f"""query($first: Int!, $after: String) {{ viewer {{ webhooks(first: $first, after: $after) {{
    edges {{ cursor node {{ {FIELDS} }} }} pageInfo {{ hasNextPage }} }} }} }}"""
LOG = """query($after: String) { viewer { webhooks { edges { node { webhookId deliveries(first: 2, after: $after) {
    edges { cursor node { deliveryId kind eventId portfolioId status attemptsCount dueAt finishedAt
        attempts { number statusCode error durationMs } } } pageInfo { hasNextPage } } } } } } }"""
THRESHOLD = "thresholdId portfolioId figure side bound hysteresis armed crossingsCount crossedAt createdAt"
CREATE_THRESHOLD = f"mutation($in: CreateThresholdInput!) {{ createThreshold(input: $in) {{ {THRESHOLD} }} }}"
DELETE_THRESHOLD = "mutation($id: String!) { deleteThreshold(thresholdId: $id) }"
THRESHOLDS = f"query($id: String!) {{ portfolio(portfolioId: $id) {{ thresholds {{ {THRESHOLD} }} }} }}"


@pytest.fixture
def subject() -> str:
    """Somebody whom no other test knows."""
    return f"s-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def token(gateway: Gateway, subject: str) -> str:
    return gateway.token(subject, SCOPES)


@pytest.fixture
async def own(gateway: Gateway, subject: str, shard: int) -> str:
    """A portfolio of the subject's."""
    name = f"p-{uuid.uuid4().hex[:8]}"
    await gateway.ledger.portfolio(name, subject, shard)
    return name


async def create(gateway: Gateway, token: str, **changes: Any) -> dict[str, Any]:
    given = {"url": URL, "kinds": ["BADGE_UNLOCKED"]} | changes
    return (await gateway.ask(CREATE, {"in": given}, token))["createWebhook"]  # type: ignore[no-any-return]


async def listed(gateway: Gateway, token: str) -> list[dict[str, Any]]:
    return [edge["node"] for edge in (await gateway.ask(LIST, {"first": 50}, token))["viewer"]["webhooks"]["edges"]]


# -- webhooks ----------------------------------------------------------------------------------------------------


async def test_a_secret_is_shown_once(gateway: Gateway, token: str, own: str) -> None:
    created = await create(gateway, token, portfolioIds=[own], kinds=["THRESHOLD_CROSSED", "BADGE_LAPSED"])
    webhook, secret = created["webhook"], created["secret"]
    assert secret.startswith("whsec_")
    assert (webhook["url"], webhook["active"], webhook["portfolioIds"]) == (URL, True, [own])
    assert webhook["kinds"] == ["BADGE_LAPSED", "THRESHOLD_CROSSED"]
    assert await listed(gateway, token) == [webhook]
    answer = await gateway.post(LIST, {"first": 50}, token)
    assert secret not in answer.text
    fields = await gateway.ask('{ __type(name: "Webhook") { fields { name } } }')
    assert "secret" not in {field["name"] for field in fields["__type"]["fields"]}


@pytest.mark.parametrize("scope", ["portfolio:read ledger:read ledger:write", "admin"])
async def test_everything_needs_the_scope(gateway: Gateway, subject: str, token: str, own: str, scope: str) -> None:
    webhook = (await create(gateway, token))["webhook"]["webhookId"]
    other = gateway.token(subject, scope)
    threshold = {"portfolioId": own, "figure": "NAV", "side": "ABOVE", "bound": "1"}
    for operation, variables in (
        (CREATE, {"in": {"url": URL, "kinds": ["BADGE_UNLOCKED"]}}),
        (UPDATE, {"in": {"webhookId": webhook}}),
        (DELETE, {"id": webhook}),
        (ROTATE, {"id": webhook}),
        (TEST, {"id": webhook}),
        (LIST, {"first": 1}),
        (CREATE_THRESHOLD, {"in": threshold}),
        (DELETE_THRESHOLD, {"id": "t"}),
    ):
        assert await gateway.codes(operation, variables, other) == ["FORBIDDEN"], operation
        assert await gateway.codes(operation, variables, None) == ["UNAUTHENTICATED"], operation


async def test_what_is_somebody_elses_is_not_there(gateway: Gateway, subject: str, token: str, own: str) -> None:
    """For administrators too: whoever may see everything is still told only of what is theirs."""
    webhook = (await create(gateway, token))["webhook"]["webhookId"]
    given = {"portfolioId": own, "figure": "NAV", "side": "ABOVE", "bound": "1"}
    threshold = (await gateway.ask(CREATE_THRESHOLD, {"in": given}, token))["createThreshold"]["thresholdId"]
    for other in (gateway.token("bob", SCOPES), gateway.token("root", f"{SCOPES} admin")):
        for operation, variables in (
            (UPDATE, {"in": {"webhookId": webhook, "active": False}}),
            (DELETE, {"id": webhook}),
            (ROTATE, {"id": webhook}),
            (TEST, {"id": webhook}),
            (CREATE, {"in": {"url": URL, "kinds": ["BADGE_UNLOCKED"], "portfolioIds": [own]}}),
            (CREATE_THRESHOLD, {"in": given}),
            (DELETE_THRESHOLD, {"id": threshold}),
        ):
            assert await gateway.codes(operation, variables, other) == ["NOT_FOUND"], operation
        assert webhook not in {one["webhookId"] for one in await listed(gateway, other)}
    assert len(await listed(gateway, token)) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://8.8.8.8/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://169.254.169.254/latest",
        "https://localhost/",
        "https://2130706433/",
        "https://no-such-host.invalid/",
        "https://user:pw@8.8.8.8/",
        "javascript:alert(1)",
        "",
    ],
)
async def test_urls_that_are_refused(gateway: Gateway, token: str, url: str) -> None:
    given = {"url": url, "kinds": ["BADGE_UNLOCKED"]}
    assert await gateway.codes(CREATE, {"in": given}, token) == ["BAD_URL"]
    webhook = (await create(gateway, token))["webhook"]["webhookId"]
    assert await gateway.codes(UPDATE, {"in": {"webhookId": webhook, "url": url}}, token) == ["BAD_URL"]
    assert (await listed(gateway, token))[0]["url"] == URL


async def test_other_refusals(gateway: Gateway, token: str) -> None:
    async def codes(**changes: Any) -> list[str]:
        return await gateway.codes(CREATE, {"in": {"url": URL, "kinds": ["BADGE_UNLOCKED"]} | changes}, token)

    assert await codes(kinds=[]) == ["NO_KINDS"]
    assert await codes(portfolioIds=[]) == ["TOO_MANY_PORTFOLIOS"]
    assert await codes(portfolioIds=["p"] * 201) == ["TOO_MANY_PORTFOLIOS"]
    for _ in range(gateway.settings.webhooks_per_subject_max):
        await create(gateway, token)
    assert await codes() == ["TOO_MANY_WEBHOOKS"]


async def test_an_update_changes_what_it_names_and_nothing_else(gateway: Gateway, token: str, own: str) -> None:
    webhook = (await create(gateway, token, portfolioIds=[own]))["webhook"]

    async def update(**changes: Any) -> dict[str, Any]:
        given = {"webhookId": webhook["webhookId"]} | changes
        return (await gateway.ask(UPDATE, {"in": given}, token))["updateWebhook"]  # type: ignore[no-any-return]

    assert await update() == webhook
    assert await update(active=False) == webhook | {"active": False}
    assert await update(active=True, url="https://8.8.4.4/") == webhook | {"url": "https://8.8.4.4/"}
    assert await update(portfolioIds=None, url=URL) == webhook | {"portfolioIds": None}
    assert await update(kinds=["BADGE_LAPSED"]) == webhook | {"portfolioIds": None, "kinds": ["BADGE_LAPSED"]}
    assert (await gateway.ask(DELETE, {"id": webhook["webhookId"]}, token))["deleteWebhook"] == webhook["webhookId"]
    assert await listed(gateway, token) == []
    assert await gateway.codes(DELETE, {"id": webhook["webhookId"]}, token) == ["NOT_FOUND"]


async def test_a_rotation(gateway: Gateway, token: str) -> None:
    created = await create(gateway, token)
    webhook = created["webhook"]["webhookId"]
    rotated = (await gateway.ask(ROTATE, {"id": webhook}, token))["rotateWebhookSecret"]
    assert rotated["secret"] != created["secret"]
    statement = "SELECT secret, expires_at > now() FROM webhook_secret WHERE webhook_id = $1 ORDER BY id"
    kept = [tuple(row) for row in await gateway.ledger.pool.fetch(statement, webhook)]
    assert kept == [(created["secret"], True), (rotated["secret"], None)]
    for overlap_s in (-1, 7 * 86_400 + 1):
        assert await gateway.codes(ROTATE, {"id": webhook, "s": overlap_s}, token) == ["BAD_OVERLAP"]


async def test_webhooks_come_in_pages(gateway: Gateway, token: str) -> None:
    made = [(await create(gateway, token))["webhook"]["webhookId"] for _ in range(3)]
    first = (await gateway.ask(LIST, {"first": 2}, token))["viewer"]["webhooks"]
    rest = (await gateway.ask(LIST, {"first": 2, "after": first["edges"][-1]["cursor"]}, token))["viewer"]["webhooks"]
    assert [edge["node"]["webhookId"] for edge in (*first["edges"], *rest["edges"])] == made
    assert (first["pageInfo"]["hasNextPage"], rest["pageInfo"]["hasNextPage"]) == (True, False)
    assert await gateway.codes(LIST, {"first": 201}, token) == ["PAGE_SIZE"]
    assert await gateway.codes(LIST, {"first": 2, "after": "nonsense"}, token) == ["BAD_CURSOR"]


# -- the log -------------------------------------------------------------------------------------------------------


async def test_the_delivery_log(gateway: Gateway, token: str, own: str) -> None:
    webhook = (await create(gateway, token))["webhook"]["webhookId"]
    sent = (await gateway.ask(TEST, {"id": webhook}, token))["sendTestWebhook"]
    assert (sent["kind"], sent["status"], sent["portfolioId"], sent["attemptsCount"]) == ("TEST", "PENDING", None, 0)
    assert await gateway.codes(TEST, {"id": webhook}, token) == ["TOO_MANY_TESTS"]
    pool = gateway.ledger.pool
    async with pool.acquire() as connection, connection.transaction():
        await enqueue(connection, [("e1", own, "UNLOCKED", b"{}"), ("e2", own, "UNLOCKED", b"{}")])
    deliveries = WebhookDeliveries(pool)
    busy = [row[0] for row in await pool.fetch("SELECT id FROM webhook WHERE id <> $1", webhook)]
    for taken in await deliveries.take(10, 10, 10, busy, 30):
        failed = AttemptOutcome(5, 503, AttemptError.STATUS)
        await deliveries.settle(taken, AttemptOutcome(3, 200, None) if b'"e1"' in taken.body else failed, None)
    (edge,) = (await gateway.ask(LOG, {}, token))["viewer"]["webhooks"]["edges"]
    page = edge["node"]["deliveries"]
    assert [one["node"]["eventId"] for one in page["edges"]] == ["e2", "e1"] and page["pageInfo"]["hasNextPage"]
    dead, delivered = (one["node"] for one in page["edges"])
    assert (dead["status"], dead["portfolioId"], dead["dueAt"]) == ("DEAD", own, None)
    assert dead["attempts"] == [{"number": 1, "statusCode": 503, "error": "STATUS", "durationMs": 5}]
    assert (delivered["status"], delivered["attempts"][0]["error"]) == ("DELIVERED", None)
    (edge,) = (await gateway.ask(LOG, {"after": page["edges"][-1]["cursor"]}, token))["viewer"]["webhooks"]["edges"]
    assert [one["node"]["deliveryId"] for one in edge["node"]["deliveries"]["edges"]] == [sent["deliveryId"]]


# -- thresholds ----------------------------------------------------------------------------------------------------


async def test_a_threshold_is_created_shown_and_deleted(gateway: Gateway, token: str, own: str) -> None:
    given = {"portfolioId": own, "figure": "DAY_PNL_RATIO", "side": "BELOW", "bound": "-0.025", "hysteresis": "0.005"}
    created = (await gateway.ask(CREATE_THRESHOLD, {"in": given}, token))["createThreshold"]
    assert {name: created[name] for name in given} == given
    assert (created["armed"], created["crossingsCount"], created["crossedAt"]) == (True, 0, None)
    assert (await gateway.ask(THRESHOLDS, {"id": own}, token))["portfolio"]["thresholds"] == [created]
    name = created["thresholdId"]
    assert (await gateway.ask(DELETE_THRESHOLD, {"id": name}, token))["deleteThreshold"] == name
    assert (await gateway.ask(THRESHOLDS, {"id": own}, token))["portfolio"]["thresholds"] == []
    assert await gateway.codes(DELETE_THRESHOLD, {"id": name}, token) == ["NOT_FOUND"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"bound": "1.0000001"}, "TOO_PRECISE"),
        ({"bound": "1000000000000"}, "TOO_LARGE"),
        ({"hysteresis": "-1"}, "BAD_HYSTERESIS"),
        ({"portfolioId": "nobody's"}, "NOT_FOUND"),
    ],
)
async def test_thresholds_that_are_refused(
    gateway: Gateway, token: str, own: str, changes: dict[str, str], code: str
) -> None:
    given = {"portfolioId": own, "figure": "NAV", "side": "ABOVE", "bound": "1"} | changes
    assert await gateway.codes(CREATE_THRESHOLD, {"in": given}, token) == [code]


async def test_a_portfolio_has_so_many(gateway: Gateway, token: str, own: str) -> None:
    given = {"portfolioId": own, "figure": "NAV", "side": "ABOVE", "bound": "1"}
    for _ in range(gateway.settings.thresholds_per_portfolio_max):
        await gateway.ask(CREATE_THRESHOLD, {"in": given}, token)
    assert await gateway.codes(CREATE_THRESHOLD, {"in": given}, token) == ["TOO_MANY_THRESHOLDS"]
