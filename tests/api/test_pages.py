"""What a browser and a monitor get: GraphiQL with its files and policy, health, metrics, allowed origins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from api.graphiql import STATIC_DIRECTORY, make_page
from tests.gateway import Gateway, gateway_of, make_settings


def stock_page(tmp_path: Path) -> str:
    return make_page(tmp_path).html


def test_without_local_files_the_stock_page_loads_its_own(tmp_path: Path) -> None:
    page = make_page(tmp_path)
    assert not page.local
    origins = set(re.findall(r'(?:src|href)="https://([^/"]+)/', page.html))
    assert len(origins) == 1
    assert f"script-src 'self' https://{origins.pop()};" in page.headers["content-security-policy"]


def test_with_local_files_nothing_foreign_is_loaded_and_hashes_stay(tmp_path: Path) -> None:
    stock = stock_page(tmp_path)
    files = re.findall(r'(?:src|href)="https://[^/"]+/([^"]+)"', stock)
    assert len(files) == 7
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    page = make_page(tmp_path)
    assert page.local
    assert "https://" not in page.html and "https://" not in page.headers["content-security-policy"]
    assert page.html.count("integrity=") == stock.count("integrity=") == 7
    for name in files:
        assert f'"/static/graphiql/{name}"' in page.html
    (tmp_path / files[0]).unlink()
    assert not make_page(tmp_path).local


def test_no_script_is_inline_so_the_policy_can_forbid_it(tmp_path: Path) -> None:
    page = make_page(tmp_path)
    assert not re.search(r"<script>", page.html)
    assert "unsafe-inline" not in page.headers["content-security-policy"].split("style-src")[0]


async def test_a_browser_gets_graphiql_and_its_script(gateway: Gateway) -> None:
    async with gateway.client() as client:
        page = await client.get("/graphql", headers={"accept": "text/html,*/*"})
        assert page.status_code == 200
        assert "graphiql_page.js" in page.text
        script = await client.get("/static/graphiql_page.js")
        assert (script.status_code, "navUpdates" in script.text) == (200, True)
        if make_page().local:
            for path in re.findall(r'"(/static/graphiql/[^"]+)"', page.text):
                assert (await client.get(path)).status_code == 200
        assert (await client.get("/static/../app.py")).status_code == 404


@pytest.mark.parametrize("name", ["Dashboard", "Viewer"])
async def test_example_operations_are_valid(gateway: Gateway, name: str) -> None:
    script = (STATIC_DIRECTORY / "graphiql_page.js").read_text().replace("${id}", '"none"')
    (operation,) = [text for text in re.findall(r"`(# [^`]*)`", script) if f"query {name}" in text]
    answer = (await gateway.post(operation)).json()
    codes = {error["extensions"]["code"] for error in answer.get("errors", ())}
    assert codes <= {"NOT_FOUND"}


async def test_example_subscription_is_valid(gateway: Gateway) -> None:
    script = (STATIC_DIRECTORY / "graphiql_page.js").read_text().replace("${id}", '"none"')
    (operation,) = [text for text in re.findall(r"`(# [^`]*)`", script) if "subscription" in text]
    async with gateway.socket() as socket:
        stream = await socket.subscribe(operation)
        assert await stream.code() == "NOT_FOUND"


async def test_metrics(gateway: Gateway) -> None:
    await gateway.ask("{ viewer { subject } }")
    async with gateway.client() as client:
        text = (await client.get("/metrics")).text
    assert 'navstream_api_operations_total{type="query"}' in text
    assert "navstream_api_watches 0.0" in text


async def test_allowed_origins(valkey_url: str, database: str) -> None:
    settings = make_settings(valkey_url, database, allowed_origins=("https://app.example",))
    async with gateway_of(settings) as gateway, gateway.client() as client:
        preflight = await client.options(
            "/graphql",
            headers={
                "origin": "https://app.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type",
            },
        )
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        answer = await gateway.post("{ viewer { subject } }", origin="https://app.example")
        assert answer.status_code == 200
        assert (await gateway.post("{ viewer { subject } }", origin="https://other.example")).status_code == 403
        async with gateway.raw_socket(origin="https://app.example") as raw:
            assert raw.subprotocol == "graphql-transport-ws"
