"""A projection writes what graphql-core and the encoder write, byte for byte, for whatever operation it compiles.

Operations are generated from the schema: fields in any order and number, aliases, fields that merge, fragments inline
and named, nested ones, @skip and @include with literals and variables. Each is executed by graphql-core on a script of
marks, as the gateway does it, and by its projection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest
from graphql import parse
from hypothesis import given, settings
from hypothesis import strategies as st

from api.projection import Projection, compile_projection
from engine.amounts import from_micro, plain, scaled_text
from engine.marks import MARK, UNKNOWN, Mark, MarkQuality, Row, mark_of, row_of
from engine.runtime.settings import Settings
from engine.stores.ledger_reads import PortfolioIdentity
from resolvers.context import Context, Info
from resolvers.mark_messages import show_ratio
from resolvers.schema import make_schema
from resolvers.stream_kind import StreamKind

SCHEMA = make_schema()
PORTFOLIO_ID = 'p-"ü"\\1'
LATENCY_MS = 12.375
RATE_HZ = 1e6
NAMES = MARK.names or ()
TYPES = {"navUpdates": "NavUpdate", "pnlUpdates": "PnlUpdate"}

int64 = st.integers(-(2**63), 2**63 - 1)
int32 = st.integers(0, 2**31 - 1)
amounts = st.one_of(int64, st.integers(-(10**13), 10**13), st.sampled_from([0, 1, -1, 10**6, -(10**6), 500_000]))


# -- the script ------------------------------------------------------------------------------------------------------


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A mark as it is packed. A NAV and its parts are sums that fit int64 with room, so that differences do as well."""
    values = {name: draw(amounts) for name in NAMES}
    values["day_pnl_ratio_e12"] = draw(st.one_of(st.just(UNKNOWN), int64))
    # A year of nanoseconds that DateTime can say, at any nanosecond.
    values["as_of_ns"] = draw(st.integers(0, 2**62))
    values["day_cut_at_ns"] = draw(st.integers(0, 2**62))
    values["sequence"], values["ledger_sequence"] = draw(int32), draw(int32)
    values["quality"] = draw(st.sampled_from([int(quality) for quality in MarkQuality]))
    return tuple(values[name] for name in NAMES)


@st.composite
def scripts(draw: st.DrawFn) -> list[tuple[Row, int, int]]:
    """Marks as a watch gives them: the row, its epoch, how many it stands for."""
    marks: list[tuple[Row, int, int]] = []
    epoch = draw(st.integers(1, 9))
    for _ in range(draw(st.integers(1, 4))):
        epoch += draw(st.sampled_from([0, 0, 0, 1]))
        row = marks[-1][0] if marks and draw(st.integers(0, 4)) == 0 else draw(rows())
        marks.append((row, epoch, draw(st.integers(1, 99))))
    return marks


class Watch:
    """Gives the script's marks, one after another."""

    current = True

    def __init__(self, script: list[tuple[Row, int, int]], signal: asyncio.Event) -> None:
        self._script = list(script)
        self._signal = signal
        signal.set()

    def take(self) -> tuple[Mark, int] | None:
        if not self._script:
            raise StopScript
        row, epoch, count = self._script.pop(0)
        self._signal.set()
        return mark_of(row, epoch), count

    def latency_ms(self, now_ns: int) -> float | None:
        return LATENCY_MS


class StopScript(Exception):
    pass


class Capture:
    """Compiles and does not deliver: graphql-core goes on."""

    def __init__(self) -> None:
        self.projection: Projection | None = None

    def compile(self, info: Info) -> object | None:
        self.projection = compile_projection(info)
        return None


async def executed(
    query: str, variables: dict[str, Any], script: list[tuple[Row, int, int]]
) -> tuple[list[bytes], Projection | None]:
    """The payloads that graphql-core makes of the script, and the operation's projection."""

    @contextmanager
    def watch_portfolio(shard: int, portfolio_id: str, signal: asyncio.Event) -> Iterator[Watch]:
        yield Watch(script, signal)

    async def find(_: str) -> PortfolioIdentity:
        return PortfolioIdentity(PORTFOLIO_ID, 0, "ann", "name", "USD", datetime(2026, 1, 1, tzinfo=UTC))

    services = SimpleNamespace(
        hub=SimpleNamespace(watch_portfolio=watch_portfolio),
        settings=Settings().model_copy(update={"rate_hz_max": RATE_HZ}),
        portfolios=SimpleNamespace(find=find),
    )
    access = SimpleNamespace(holds=lambda scope: True, may_see=lambda owner: True)
    capture = Capture()
    context = Context(
        cast(Any, services), cast(Any, None), cast(Any, None), cast(Any, access), "r", True, cast(Any, capture)
    )
    results = await SCHEMA.subscribe(query, variable_values=variables, context_value=context)
    assert isinstance(results, AsyncIterator), results
    payloads = []
    async for result in results:
        if result.errors:
            assert isinstance(result.errors[0].original_error, StopScript), result.errors
            break
        payloads.append(orjson.dumps({"data": result.data}))
    return payloads, capture.projection


def projected(projection: Projection, script: list[tuple[Row, int, int]]) -> list[bytes]:
    """The payloads that the projection makes of the script."""
    payloads: list[bytes] = []
    sent: tuple[Row, int] | None = None
    stands_for = 0
    for row, epoch, count in script:
        stands_for += count
        kind = StreamKind.SNAPSHOT if sent is None else StreamKind.UPDATE if sent[1] == epoch else StreamKind.RESET
        is_update = sent is not None and kind is StreamKind.UPDATE
        if sent is not None and is_update and projection.values(row) == projection.values(sent[0]):
            continue
        before = sent[0] if sent is not None and is_update else None
        latency_ms = None if kind is StreamKind.SNAPSHOT else LATENCY_MS
        payloads.append(projection.encode(PORTFOLIO_ID, row, epoch, kind, stands_for, latency_ms, before))
        sent, stands_for = (row, epoch), 0
    return payloads


# -- operations ------------------------------------------------------------------------------------------------------


def field_names(type_name: str) -> list[str]:
    return [*cast(Any, SCHEMA._schema.type_map[type_name]).fields, "__typename"]


conditions = st.sampled_from(
    [
        "",
        "",
        "",
        "@skip(if: false)",
        "@skip(if: $yes)",
        "@include(if: $yes)",
        "@include(if: $no) ",
        "@include(if: true)",
    ]
)


@st.composite
def selections(draw: st.DrawFn, type_name: str, fragments: dict[str, str], depth: int = 0) -> str:
    """A selection set of the type, without braces. Aliases say what they stand for, so that they never conflict."""
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        choice, condition = draw(st.integers(0, 9)), draw(conditions)
        if choice < 7 or depth > 2:
            name = draw(st.sampled_from(field_names(type_name)))
            alias = f"{draw(st.sampled_from(['a', 'b']))}_{name}: " if draw(st.booleans()) else ""
            nested = f" {{ {draw(selections('PnlChange', fragments, depth + 1))} }}" if name == "change" else ""
            parts.append(f"{alias}{name} {condition}{nested}")
        elif choice == 7:
            on = f"on {type_name} " if draw(st.booleans()) else ""
            parts.append(f"... {on}{condition} {{ {draw(selections(type_name, fragments, depth + 1))} }}")
        else:
            body = draw(selections(type_name, fragments, depth + 1))
            name = f"F{len(fragments)}"
            fragments[name] = f"fragment {name} on {type_name} {{ {body} }}"
            parts.append(f"...{name} {condition}")
    return " ".join(parts)


@st.composite
def operations(draw: st.DrawFn) -> str:
    root = draw(st.sampled_from(sorted(TYPES)))
    fragments: dict[str, str] = {}
    selected = draw(selections(TYPES[root], fragments))
    alias = draw(st.sampled_from(["", "live: "]))
    name = draw(st.sampled_from(["", "Live"]))
    variables = "$id: String!, $rate: Float, $yes: Boolean!, $no: Boolean = false"
    field = f"{alias}{root}(portfolioId: $id, maxRateHz: $rate) {{ {selected} }}"
    # The variables are used, whether the selection does or not.
    used = "... @include(if: $yes) { ... @skip(if: $no) { __typename } }"
    return f"subscription {name or 'S'}({variables}) {{ {field[:-1]} {used} }} }} {' '.join(fragments.values())}"


@settings(max_examples=300)
@given(operations(), st.booleans(), scripts())
async def test_a_projection_writes_what_graphql_core_does(
    query: str, yes: bool, script: list[tuple[Row, int, int]]
) -> None:
    payloads, projection = await executed(query, {"id": "x", "rate": RATE_HZ, "yes": yes}, script)
    assert projection is not None, query
    assert projected(projection, script) == payloads, query


async def compiled(selection: str, root: str = "navUpdates", **variables: Any) -> Projection | None:
    declared = "".join(f", ${name}: Boolean!" for name in variables)
    query = f"subscription($id: String!{declared}) {{ {root}(portfolioId: $id) {{ {selection} }} }}"
    zeros = (tuple(0 for _ in NAMES), 1, 1)
    return (await executed(query, {"id": "x", **variables}, [zeros]))[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nav cash", "nav ... { cash }"),
        ("nav cash", "nav cash nav"),
        ("nav cash", "nav cash sequence @skip(if: true)"),
        ("n: nav", "n: nav n: nav"),
        ("kind nav", "kind ... on NavUpdate { nav }"),
    ],
)
async def test_operations_that_show_the_same_share_a_key(one: str, other: str) -> None:
    first, second = await compiled(one), await compiled(other)
    assert first is not None and second is not None
    assert first.key == second.key


async def test_variables_that_change_nothing_do_not_split_keys() -> None:
    shown = "nav @include(if: $a) cash @skip(if: $b)"
    with_variables, without = await compiled(shown, a=True, b=True), await compiled("nav")
    assert with_variables is not None and without is not None
    assert with_variables.key == without.key


@pytest.mark.parametrize(
    ("one", "other"),
    [("nav cash", "cash nav"), ("nav", "cash"), ("nav", "n: nav"), ("nav", "nav: cash"), ("kind", "kind: quality")],
)
async def test_operations_that_show_something_else_have_other_keys(one: str, other: str) -> None:
    first, second = await compiled(one), await compiled(other)
    assert first is not None and second is not None
    assert first.key != second.key


async def test_a_projection_says_what_it_depends_on() -> None:
    plain_one = await compiled("dayPnl", "pnlUpdates")
    change = await compiled("change { nav }", "pnlUpdates")
    latency = await compiled("nav latencyMs")
    assert plain_one is not None and change is not None and latency is not None
    assert [one.compares_before for one in (plain_one, change, latency)] == [False, True, False]
    assert [one.shows_latency for one in (plain_one, change, latency)] == [False, False, True]


async def test_what_describes_the_message_is_no_reason_to_send_one() -> None:
    projection = await compiled("kind conflated latencyMs portfolioId epoch __typename")
    assert projection is not None
    assert projection.values(tuple(range(len(NAMES)))) == projection.values(tuple(range(1, len(NAMES) + 1)))


async def test_a_stream_of_another_type_is_left_to_graphql_core() -> None:
    info = SimpleNamespace(_raw_info=raw_info('subscription { positionUpdates(portfolioId: "x") { kind } }'))
    assert compile_projection(cast(Info, info)) is None


def raw_info(query: str) -> Any:
    """What graphql-core says of the only field of a subscription, as far as compiling looks at it."""
    schema = cast(Any, SCHEMA._schema)
    operation = cast(Any, parse(query).definitions[0])
    node = operation.selection_set.selections[0]
    return SimpleNamespace(
        schema=schema,
        fragments={},
        variable_values={},
        operation=operation,
        field_nodes=[node],
        return_type=schema.subscription_type.fields[node.name.value].type,
        path=SimpleNamespace(key=node.name.value),
    )


async def test_a_directive_of_somebodys_own_is_left_to_graphql_core() -> None:
    for query in (
        'subscription { navUpdates(portfolioId: "x") { nav @upper } }',
        'subscription { pnlUpdates(portfolioId: "x") { change { nav @upper } } }',
        'subscription { navUpdates(portfolioId: "x") { nav(places: 2) } }',
    ):
        info = SimpleNamespace(_raw_info=raw_info(query))
        assert compile_projection(cast(Info, info)) is None, query


@given(int64)
def test_amounts_and_ratios_as_text_are_those_of_decimals(number: int) -> None:
    assert scaled_text(number, 6) == plain(from_micro(number))
    ratio = show_ratio(number)
    assert ratio is not None and scaled_text(number, 12) == plain(ratio)


@given(rows())
def test_a_row_is_its_mark(row: Row) -> None:
    mark = mark_of(row, 3)
    assert row_of(mark) == row
    assert row_of(replace(mark, epoch=4)) == row
