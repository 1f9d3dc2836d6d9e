"""The GraphQL schema: the promise to everybody outside. `schema.graphql` is this, printed and committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import strawberry
from graphql import GraphQLError
from strawberry.extensions import SchemaExtension
from strawberry.schema.config import StrawberryConfig
from strawberry.types import ExecutionContext

from resolvers.assets import Asset, resolve_asset, resolve_assets
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


@strawberry.type(description="What can be changed: events into the log. Needs the scope ledger:write.")
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


@strawberry.type(
    description=(
        "What can be followed, over graphql-transport-ws. State streams (all but ledgerEvents) begin with a "
        "SNAPSHOT and then send the newest value, at most maxRateHz (default 4, at most 20) a second: a slow "
        "reader gets fewer messages, never older ones. ledgerEvents sends every entry, in order."
    )
)
class Subscription:
    nav_updates = strawberry.subscription(resolver=nav_updates, description="A portfolio's NAV, live.")
    pnl_updates = strawberry.subscription(resolver=pnl_updates, description="A portfolio's P&L, live.")
    position_updates = strawberry.subscription(
        resolver=position_updates, description="The positions of a portfolio that were filled or quoted, live."
    )
    ledger_events = strawberry.subscription(
        resolver=ledger_events,
        description=(
            "Every ledger entry of a portfolio booked from now on, or after the cursor `after`, in order. Needs "
            "the scope ledger:read."
        ),
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
