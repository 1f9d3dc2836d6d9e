"""What belongs to one HTTP request or one WebSocket, from which each of its operations gets a context."""

from __future__ import annotations

from contextvars import ContextVar

import uuid_utils
from starlette.websockets import WebSocket
from strawberry.fastapi import BaseContext

from api.auth import Subject
from resolvers.context import Context, LiveDelivery, Services
from resolvers.loaders import HotLoader
from resolvers.lots import LotsLoader

# The way from marks to the operation that the current task runs; None where its answers only go through ASGI.
live_delivery: ContextVar[LiveDelivery | None] = ContextVar("live_delivery", default=None)


class Connection(BaseContext):
    """`subject` is None until a token was verified. `in_events`: an HTTP request is answered in events (api/sse.py).

    Strawberry fills in the inherited fields.
    """

    def __init__(self, services: Services, request_id: str) -> None:
        super().__init__()
        self.services = services
        self.request_id = request_id
        self.subject: Subject | None = None
        self.in_events = False

    def operation(self) -> Context:
        services = self.services
        settings = services.settings
        return Context(
            services=services,
            hot=HotLoader(services.hot_state, services.clock, settings.stale_after_s, services.assets),
            lots=LotsLoader(services.ledger),
            access=self.subject,
            request_id=self.request_id,
            streaming=self.in_events or isinstance(self.request, WebSocket),
            live=live_delivery.get(),
        )


def new_request_id() -> str:
    return str(uuid_utils.uuid7())
