"""What belongs to one HTTP request or one WebSocket, from which each of its operations gets a context."""

from __future__ import annotations

import uuid_utils
from starlette.websockets import WebSocket
from strawberry.fastapi import BaseContext

from api.auth import Subject
from resolvers.context import Context, Services
from resolvers.loaders import HotLoader
from resolvers.lots import LotsLoader


class Connection(BaseContext):
    """`subject` is None until a token was verified. Strawberry fills in the inherited fields."""

    def __init__(self, services: Services, request_id: str) -> None:
        super().__init__()
        self.services = services
        self.request_id = request_id
        self.subject: Subject | None = None

    def operation(self) -> Context:
        services = self.services
        settings = services.settings
        return Context(
            services=services,
            hot=HotLoader(services.hot_state, services.clock, settings.stale_after_s, services.assets),
            lots=LotsLoader(services.ledger),
            access=self.subject,
            request_id=self.request_id,
            streaming=isinstance(self.request, WebSocket),
        )


def new_request_id() -> str:
    return str(uuid_utils.uuid7())
