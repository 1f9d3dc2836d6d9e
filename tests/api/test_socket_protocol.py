"""Frames written by hand are those of the WebSocket library; and the ordinary way where nothing can be written."""

from __future__ import annotations

import json

import pytest
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode

from api import app
from api.outlets import next_prefix
from api.socket_protocol import text_frame_head
from tests.builders import MICRO, MarkRow
from tests.gateway import gateway_of, make_settings

NAV = "subscription($id: String!) { navUpdates(portfolioId: $id, maxRateHz: 20) { kind nav } }"


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 4_095, 4_096, 65_535, 65_536, 70_000])
def test_a_frame_is_the_library_s(length: int) -> None:
    payload = b"x" * length
    assert text_frame_head(length) + payload == Frame(Opcode.TEXT, payload).serialize(mask=False)


@pytest.mark.parametrize("operation_id", ["1", 'a"b', "é\n", "0c6d1e2f-5b3c"])
def test_a_message_is_the_protocol_s(operation_id: str) -> None:
    message = json.loads(next_prefix(operation_id) + b'{"data":{}}' + b"}")
    assert list(message.items()) == [("id", operation_id), ("type", "next"), ("payload", {"data": {}})]


async def test_a_server_without_direct_writes_sends_the_ordinary_way(
    valkey_url: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "SocketProtocol", WebSocketsSansIOProtocol)
    async with gateway_of(make_settings(valkey_url, database)) as gateway:
        await gateway.ledger.portfolio("p-plain", "ann", 93)
        await gateway.redis.point(93, 1)
        await gateway.redis.marks(93, 1, {"p-plain": MarkRow(nav=5 * MICRO)})
        async with gateway.socket() as client:
            stream = await client.subscribe(NAV, {"id": "p-plain"})
            assert await stream.next() == {"kind": "SNAPSHOT", "nav": "5"}
            assert not gateway.application.gateway.deliveries._groups
