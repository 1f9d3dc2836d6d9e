"""The ledger as a file over HTTP: who gets it, what a bad request is told, and what a client leaves behind."""

from __future__ import annotations

import asyncio
import csv
import io
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pyarrow.parquet
import pytest
import pytest_asyncio

from api import exports
from tests.gateway import WAIT_S, Gateway, gateway_of, make_settings
from tests.proxy import Proxy
from tests.scripted_ledger import BEGIN, HOUR, ScriptedLedger

LONG_COUNT = 60_000


@pytest_asyncio.fixture(loop_scope="session")
async def script(gateway: Gateway) -> ScriptedLedger:
    script = ScriptedLedger(f"p/{uuid.uuid4().hex[:8]}")
    for amount in ("10", "20", "30"):
        script.at += HOUR
        script.cash("DEPOSIT", amount)
    script.reverse(script.entries[1])
    await gateway.ledger.portfolio(script.portfolio_id, "ann", opened_at=BEGIN)
    await script.write(gateway.ledger.pool)
    return script


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def long(gateway: Gateway) -> str:
    """A portfolio whose file is more than sockets hold by themselves."""
    await gateway.ledger.portfolio("long", "ann")
    await gateway.ledger.pool.execute(
        """
        INSERT INTO ledger_entry SELECT 'long', n, 'long-' || n, 'DEPOSIT', NULL, NULL, NULL, NULL, NULL, n, 0, 0, 0, 0,
            0, n, NULL, now(), now(), false, repeat('x', 150), NULL, sha256('x'), sha256('y')
        FROM generate_series(1, $1::int) AS n
        """,
        LONG_COUNT,
    )
    return "long"


async def get(gateway: Gateway, path: str, token: str | None = "", method: str = "GET", **query: Any) -> httpx.Response:
    async with gateway.client() as client:
        return await client.request(method, path, params=query, headers=gateway.bearer(token))


def path_of(portfolio_id: str, suffix: str = "csv") -> str:
    return f"/portfolios/{portfolio_id}/ledger.{suffix}"


def code(answer: httpx.Response) -> str:
    (error,) = answer.json()["errors"]
    assert answer.headers["content-type"] == "application/json"
    assert error["message"]
    return str(error["extensions"]["code"])


async def test_csv(gateway: Gateway, script: ScriptedLedger) -> None:
    answer = await get(gateway, path_of(script.portfolio_id))
    assert answer.status_code == 200
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(int(row["sequence"]), row["hash"]) for row in rows] == [
        (entry.sequence, entry.hash.hex()) for entry in script.entries
    ]
    name = script.portfolio_id.replace("/", "_")
    assert answer.headers["content-disposition"] == f'attachment; filename="ledger-{name}.csv"'
    assert answer.headers["content-type"].startswith("text/csv; charset=utf-8")
    assert answer.headers["x-request-id"]
    assert "content-length" not in answer.headers


async def test_parquet(gateway: Gateway, script: ScriptedLedger) -> None:
    answer = await get(gateway, path_of(script.portfolio_id, "parquet"))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/vnd.apache.parquet")
    table = pyarrow.parquet.read_table(io.BytesIO(answer.content))
    assert table.column("sequence").to_pylist() == [1, 2, 3, 4, 5]


async def test_an_id_may_be_written_with_escapes(gateway: Gateway, script: ScriptedLedger) -> None:
    escaped = script.portfolio_id.replace("/", "%2F")
    assert (await get(gateway, path_of(escaped))).status_code == 200


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"kind": "OPEN"}, [1]),
        ({"kind": ["OPEN", "DEPOSIT"], "reversals": "false"}, [1, 2, 3, 4]),
        ({"reversals": "true"}, [5]),
        ({"minAmount": "20", "maxAmount": "30"}, [3, 4]),
        ({"from": "2026-03-02T11:30:00Z", "to": "2026-03-02T12:30:00Z"}, [3]),
        ({"recordedFrom": "2026-03-02T12:30:00+01:00", "recordedTo": "2026-03-02T12:00:00Z"}, [3]),
        ({"symbol": "A"}, []),
        ({"side": "BUY"}, []),
    ],
)
async def test_filters(gateway: Gateway, script: ScriptedLedger, query: dict[str, Any], expected: list[int]) -> None:
    answer = await get(gateway, path_of(script.portfolio_id), **query)
    assert [int(row["sequence"]) for row in csv.DictReader(io.StringIO(answer.text))] == expected


@pytest.mark.parametrize(
    "query",
    [
        {"kind": "GIFT"},
        {"kind": ["FILL"] * 33},
        {"side": "buy"},
        {"from": "yesterday"},
        {"from": "2026-03-02T11:30:00"},
        {"from": "2026-03-02T11:30:00Z", "to": "2026-03-02T11:30:00Z"},
        {"minAmount": "NaN"},
        {"minAmount": "1e999999999"},
        {"minAmount": "-1"},
        {"minAmount": "2", "maxAmount": "1"},
        {"reversals": "yes"},
        {"symbol": ["A", "B"]},
        {"kinds": "FILL"},
        {"sybmol": "A"},
    ],
)
async def test_a_bad_filter_is_refused(gateway: Gateway, script: ScriptedLedger, query: dict[str, Any]) -> None:
    answer = await get(gateway, path_of(script.portfolio_id), **query)
    assert (answer.status_code, code(answer)) == (400, "BAD_FILTER")


async def test_who_may_have_it(gateway: Gateway, script: ScriptedLedger) -> None:
    path = path_of(script.portfolio_id)
    for token, status, expected in (
        (None, 401, "UNAUTHENTICATED"),
        ("nonsense", 401, "UNAUTHENTICATED"),
        (gateway.token("ann", "portfolio:read ledger:write"), 403, "FORBIDDEN"),
        (gateway.token("bob"), 404, "NOT_FOUND"),
    ):
        answer = await get(gateway, path, token)
        assert (answer.status_code, code(answer)) == (status, expected)
    refused = await get(gateway, path, None)
    assert refused.headers["www-authenticate"] == "Bearer"
    for token in (gateway.token("ann", "ledger:read"), gateway.token("root", "admin")):
        assert (await get(gateway, path, token)).status_code == 200


async def test_somebody_elses_is_like_none(gateway: Gateway, script: ScriptedLedger) -> None:
    theirs = await get(gateway, path_of(script.portfolio_id), gateway.token("bob"))
    nobodys = await get(gateway, path_of("none"), gateway.token("bob"))
    assert (theirs.status_code, theirs.json()) == (nobodys.status_code, nobodys.json())
    for odd in ("%00", "a" * 3_000, "..", "' OR 1=1 --"):
        assert (await get(gateway, path_of(odd), gateway.token("bob"))).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_only_get(gateway: Gateway, script: ScriptedLedger, method: str) -> None:
    answer = await get(gateway, path_of(script.portfolio_id), method=method)
    assert (answer.status_code, answer.headers["allow"], code(answer)) == (405, "GET", "METHOD_NOT_ALLOWED")


# -- while it runs --------------------------------------------------------------------------------------------


@asynccontextmanager
async def taking(gateway: Gateway, portfolio_id: str, suffix: str = "csv") -> AsyncIterator[httpx.Response]:
    """An answer whose body is not read any further than its beginning."""
    async with (
        gateway.client() as client,
        client.stream("GET", path_of(portfolio_id, suffix), headers=gateway.bearer()) as answer,
    ):
        yield answer


async def copies(gateway: Gateway, count: int) -> None:
    """Wait until so many exports run in PostgreSQL."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
        " AND query LIKE 'COPY%'"
    )
    async with asyncio.timeout(WAIT_S):
        while await gateway.ledger.pool.fetchval(query) != count:
            await asyncio.sleep(0.02)


def outcomes(gateway: Gateway, outcome: str) -> float:
    return float(gateway.application.metrics.exports.labels("csv", outcome)._value.get())


async def test_a_long_file_is_whole(gateway: Gateway, long: str) -> None:
    done = outcomes(gateway, "done")
    answer = await get(gateway, path_of(long))
    assert answer.text.count("\n") == LONG_COUNT + 1
    assert outcomes(gateway, "done") == done + 1


async def test_a_client_that_goes_away_frees_its_connection(gateway: Gateway, long: str) -> None:
    left = outcomes(gateway, "abandoned")
    async with taking(gateway, long):
        await copies(gateway, 1)
    await copies(gateway, 0)
    assert outcomes(gateway, "abandoned") == left + 1
    assert (await get(gateway, path_of(long))).status_code == 200


async def test_a_client_that_takes_nothing_is_cut_off(
    gateway: Gateway, long: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "STALL_TIMEOUT_S", 0.3)
    stalled = outcomes(gateway, "stalled")
    async with taking(gateway, long) as answer:
        await copies(gateway, 1)
        await copies(gateway, 0)
        with pytest.raises(httpx.RemoteProtocolError):
            await answer.aread()
    assert outcomes(gateway, "stalled") == stalled + 1


async def test_so_many_at_a_time_and_no_more(gateway: Gateway, long: str) -> None:
    async with taking(gateway, long), taking(gateway, long):
        await copies(gateway, 2)
        refused = await get(gateway, path_of(long))
        assert (refused.status_code, code(refused)) == (503, "TOO_MANY_EXPORTS")
        assert int(refused.headers["retry-after"]) > 0
        # Everybody else is still served.
        await gateway.ask("{ viewer { portfolios(first: 1) { edges { cursor } } } }")
    await copies(gateway, 0)
    assert (await get(gateway, path_of(long))).status_code == 200


async def test_postgres_away(valkey_url: str, database: str, gateway: Gateway, long: str) -> None:
    """Before the first byte it is an error with a code, behind it a cut: never a part that looks like the whole."""
    async with Proxy(database) as postgres:
        settings = make_settings(valkey_url, postgres.url, postgres_timeout_s=2)
        async with gateway_of(settings) as behind:
            async with taking(behind, long) as answer:
                await copies(gateway, 1)
                await postgres.go_away()
                with pytest.raises(httpx.RemoteProtocolError):
                    await answer.aread()
            answer = await get(behind, path_of(long))
            assert (answer.status_code, code(answer)) == (503, "UNAVAILABLE")
            assert outcomes(behind, "unavailable") == 2
            await postgres.come_back()
            async with asyncio.timeout(WAIT_S):
                while (await get(behind, path_of(long))).status_code != 200:
                    await asyncio.sleep(0.1)
    await copies(gateway, 0)
