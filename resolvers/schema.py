"""The GraphQL schema: the promise to everybody outside. `schema.graphql` is this, printed and committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import strawberry
from graphql import GraphQLError
from strawberry.extensions import SchemaExtension
from strawberry.schema.config import StrawberryConfig
from strawberry.types import ExecutionContext

from resolvers.allocation import allocation_updates
from resolvers.assets import Asset, resolve_asset, resolve_assets
from resolvers.badges import badge_events, badge_progress
from resolvers.context import Info
from resolvers.errors import not_found
from resolvers.execution import RecordExecutor
from resolvers.ledger import ledger_events
from resolvers.mutations import open_portfolio, record_cash_movement, record_fill, record_reversal
from resolvers.nav import nav_updates
from resolvers.nodes import Node, read_id
from resolvers.pages import Connection
from resolvers.pnl import pnl_updates
from resolvers.portfolio import Portfolio, Viewer, resolve_portfolio, resolve_portfolio_key, resolve_viewer
from resolvers.positions import position_updates
from resolvers.quotes import quote_updates
from resolvers.scalars import SCALARS
from resolvers.thresholds import create_threshold, delete_threshold
from resolvers.webhooks import (
    create_webhook,
    delete_webhook,
    rotate_webhook_secret,
    send_test_webhook,
    update_webhook,
)

Extension = Callable[[], SchemaExtension]


async def resolve_node(info: Info, id: strawberry.ID) -> Node | None:
    named = read_id(id)
    if named is not None and named[0] == "Portfolio":
        return await resolve_portfolio_key(info, named[1])
    if named is not None and named[0] == "Asset":
        return await resolve_asset(info, named[1])
    raise not_found("node")


@strawberry.type(description="What can be asked. Every field needs a token; introspection does not.")
class Query:
    node: Node | None = strawberry.field(
        resolver=resolve_node, description="The object with this opaque id; null and NOT_FOUND when not visible."
    )
    viewer: Viewer = strawberry.field(resolver=resolve_viewer, description="Who asks, and what they may see.")
    portfolio: Portfolio | None = strawberry.field(
        resolver=resolve_portfolio,
        description="A portfolio; null and NOT_FOUND when there is none or it is somebody else's.",
    )
    asset: Asset | None = strawberry.field(
        resolver=resolve_asset, description="An asset by its symbol; null and NOT_FOUND when it is not known."
    )
    assets: Connection[Asset] = strawberry.field(resolver=resolve_assets, description="Assets in symbol order.")


@strawberry.type(
    description=(
        "What can be changed: events into the log, with the scope ledger:write; the caller's own webhooks and "
        "thresholds, with the scope webhooks:write."
    )
)
class Mutation:
    open_portfolio = strawberry.mutation(resolver=open_portfolio, description="Open a portfolio.")
    record_fill = strawberry.mutation(resolver=record_fill, description="Record an execution.")
    record_cash_movement = strawberry.mutation(
        resolver=record_cash_movement, description="Record a movement of cash, a fee, interest or a dividend."
    )
    record_reversal = strawberry.mutation(
        resolver=record_reversal,
        description="Take back a fill or a cash movement. Refused: UNKNOWN_EVENT, ALREADY_REVERSED, NOT_REVERSIBLE.",
    )
    create_webhook = strawberry.mutation(
        resolver=create_webhook,
        description=(
            "Have an endpoint told of events from now on. Refused: BAD_URL, NO_KINDS, TOO_MANY_PORTFOLIOS, "
            "TOO_MANY_WEBHOOKS; NOT_FOUND for portfolios that are not the caller's own."
        ),
    )
    update_webhook = strawberry.mutation(
        resolver=update_webhook, description="Change a webhook of the caller's. Refused as createWebhook."
    )
    delete_webhook = strawberry.mutation(
        resolver=delete_webhook,
        description="Delete a webhook of the caller's, with its log and what waits for it; answers its id.",
    )
    rotate_webhook_secret = strawberry.mutation(
        resolver=rotate_webhook_secret,
        description=(
            "Make a new secret. The one before it signs too for overlapS seconds, a day when left out; 0 stops it at "
            "once. Refused: BAD_OVERLAP."
        ),
    )
    send_test_webhook = strawberry.mutation(
        resolver=send_test_webhook,
        description="Have a delivery of the kind TEST made, whose data is null. Refused: TOO_MANY_TESTS.",
    )
    create_threshold = strawberry.mutation(
        resolver=create_threshold,
        description=(
            "Watch a figure of a portfolio of the caller's own. Refused: TOO_PRECISE, TOO_LARGE, BAD_HYSTERESIS, "
            "TOO_MANY_THRESHOLDS."
        ),
    )
    delete_threshold = strawberry.mutation(resolver=delete_threshold, description="Watch it no more; answers its id.")


@strawberry.type(
    description=(
        "What can be followed, over graphql-transport-ws. State streams (all but ledgerEvents and badgeEvents) begin "
        "with a SNAPSHOT and then send the newest value, at most maxRateHz (default 4, at most 20) a second: a slow "
        "reader gets fewer messages, never older ones. ledgerEvents and badgeEvents send every one, in order."
    )
)
class Subscription:
    nav_updates = strawberry.subscription(resolver=nav_updates, description="A portfolio's NAV, live.")
    pnl_updates = strawberry.subscription(resolver=pnl_updates, description="A portfolio's P&L, live.")
    position_updates = strawberry.subscription(
        resolver=position_updates, description="The positions of a portfolio that were filled or quoted, live."
    )
    allocation_updates = strawberry.subscription(
        resolver=allocation_updates,
        description="A portfolio's allocation by sector, asset class and industry, live.",
    )
    ledger_events = strawberry.subscription(
        resolver=ledger_events,
        description=(
            "Every ledger entry of a portfolio booked from now on, or after the cursor `after`, in order. Needs "
            "the scope ledger:read."
        ),
    )
    badge_events = strawberry.subscription(
        resolver=badge_events,
        description="Every event of a portfolio's badges from now on, or after the cursor `after`, in order.",
    )
    badge_progress = strawberry.subscription(
        resolver=badge_progress, description="How far a portfolio is with its badges, live."
    )
    quotes = strawberry.subscription(resolver=quote_updates, description="The quotes of 1 to 200 symbols, live.")


class Schema(strawberry.Schema):
    def process_errors(self, errors: list[GraphQLError], execution_context: ExecutionContext | None = None) -> None:
        """Log nothing: the gateway logs what was not meant for the client, once and with the request's id."""


def make_schema(extensions: Iterable[Extension] = ()) -> Schema:
    """The schema with the given extensions; each is made anew for every operation."""
    return Schema(
        query=Query,
        mutation=Mutation,
        subscription=Subscription,
        types=[Portfolio, Asset],
        extensions=list(extensions),
        execution_context_class=RecordExecutor,
        config=StrawberryConfig(scalar_map=SCALARS, disable_field_suggestions=False),
    )


@cache
def print_schema() -> str:
    """The schema as SDL, as it stands in `schema.graphql`."""
    return make_schema().as_str() + "\n"
