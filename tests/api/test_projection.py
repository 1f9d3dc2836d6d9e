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
from engine.marks import MARK, UNKNOWN, Mark, MarkQuality, Row, mark_of, pack_mark, unpack_row
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
KINDS = ("SNAPSHOT", "UPDATE", "RESET", "HEARTBEAT")

# Marks as a watch gives them: the row, its epoch, how many it stands for.
Script = list[tuple[Row, int, int]]

int64 = st.integers(-(2**63), 2**63 - 1)
int32 = st.integers(0, 2**31 - 1)
latencies = st.one_of(st.none(), st.floats(0, 1e9).map(lambda ms: round(ms, 3)))
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
def scripts(draw: st.DrawFn) -> Script:
    marks: Script = []
    epoch = draw(st.integers(1, 9))
    for _ in range(draw(st.integers(1, 4))):
        epoch += draw(st.sampled_from([0, 0, 0, 1]))
        row = marks[-1][0] if marks and draw(st.integers(0, 4)) == 0 else draw(rows())
        marks.append((row, epoch, draw(st.integers(1, 99))))
    return marks


class Watch:
    """Gives the script's marks, one after another; then nothing where the script `ends_in_silence`."""

    current = True

    def __init__(self, script: Script, signal: asyncio.Event, moved_ms: float | None, ends_in_silence: bool) -> None:
        self._script = list(script)
        self._signal = signal
        self._latency_ms = moved_ms
        self._ends_in_silence = ends_in_silence
        signal.set()

    def take(self) -> tuple[Mark, int] | None:
        if not self._script:
            raise StopScript
        row, epoch, count = self._script.pop(0)
        if self._script or not self._ends_in_silence:
            self._signal.set()
        return mark_of(row, epoch), count

    def latency_ms(self, now_ns: int) -> float | None:
        return self._latency_ms


class StopScript(Exception):
    pass


class Capture:
    """Compiles and does not deliver: graphql-core goes on."""

    def __init__(self) -> None:
        self.projection: Projection | None = None
        self.was_asked = False

    def compile(self, info: Info) -> object | None:
        self.projection = compile_projection(info)
        self.was_asked = True
        return None


async def executed(
    query: str,
    variables: dict[str, Any],
    script: Script,
    latency_ms: float | None = LATENCY_MS,
    capture: Capture | None = None,
    ends_in_silence: bool = False,
) -> tuple[list[bytes], Projection | None]:
    """The payloads that graphql-core makes of the script, and the operation's projection. The last one is a HEARTBEAT
    where the script `ends_in_silence`."""

    @contextmanager
    def watch_portfolio(shard: int, portfolio_id: str, signal: asyncio.Event) -> Iterator[Watch]:
        yield Watch(script, signal, latency_ms, ends_in_silence)

    async def find(_: str) -> PortfolioIdentity:
        return PortfolioIdentity(PORTFOLIO_ID, 0, "ann", "name", "USD", datetime(2026, 1, 1, tzinfo=UTC))

    services = SimpleNamespace(
        hub=SimpleNamespace(watch_portfolio=watch_portfolio),
        settings=Settings().model_copy(
            update={"rate_hz_max": RATE_HZ, "heartbeat_interval_s": 0.005 if ends_in_silence else 15}
        ),
        portfolios=SimpleNamespace(find=find),
    )
    access = SimpleNamespace(holds=lambda scope: True, may_see=lambda owner: True)
    capture = capture or Capture()
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
        if ends_in_silence and b'"HEARTBEAT"' in payloads[-1]:
            await cast(Any, results).aclose()
            break
    return payloads, capture.projection


def projected(projection: Projection, script: Script, moved_ms: float | None) -> list[bytes]:
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
        latency_ms = None if kind is StreamKind.SNAPSHOT else moved_ms
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
    variables, portfolio = draw(st.sampled_from([("$id: String!, ", "$id"), ("", '"x"')]))
    variables += "$rate: Float = 4, $yes: Boolean!, $no: Boolean = false"
    field = f"{alias}{root}(portfolioId: {portfolio}, maxRateHz: $rate)"
    # The variables are used, whether the selection does or not.
    used = "... @include(if: $yes) { ... @skip(if: $no) { __typename } }"
    whole = f"{field} {{ {selected} {used} }}"
    form = draw(st.sampled_from(["{whole}", "{whole} {more}", "... {{ {whole} }} ... on Subscription {{ {more} }}"]))
    more = f"{field} {{ {draw(selections(TYPES[root], fragments))} }}" if "{more}" in form else ""
    asked = form.format(whole=whole, more=more)
    return f"subscription {name or 'S'}({variables}) {{ {asked} }} {' '.join(fragments.values())}"


@settings(max_examples=300)
@given(operations(), st.booleans(), scripts(), latencies)
async def test_a_projection_writes_what_graphql_core_does(
    query: str, yes: bool, script: Script, latency_ms: float | None
) -> None:
    variables = {"rate": RATE_HZ, "yes": yes} | ({"id": "x"} if "$id" in query else {})
    payloads, projection = await executed(query, variables, script, latency_ms)
    assert projection is not None, query
    assert projected(projection, script, latency_ms) == payloads, query


@pytest.mark.parametrize("root", sorted(TYPES))
async def test_every_field_of_every_kind_of_message(root: str) -> None:
    fields = " ".join(name for name in field_names(TYPES[root]) if name != "change")
    fields += (
        " change { nav price trading fees income flows corporateActions __typename }" if root == "pnlUpdates" else ""
    )
    query = f'subscription {{ {root}(portfolioId: "x", maxRateHz: {RATE_HZ}) {{ {fields} }} }}'
    script = [(whole_row(1), 1, 1), (whole_row(2), 1, 7), (whole_row(3), 2, 1)]
    payloads, projection = await executed(query, {}, script, ends_in_silence=True)
    assert projection is not None
    beat = projection.encode(PORTFOLIO_ID, script[-1][0], 2, StreamKind.HEARTBEAT, 0, None, None)
    assert payloads == [*projected(projection, script, LATENCY_MS), beat]
    assert [next(iter(orjson.loads(one)["data"].values()))["kind"] for one in payloads] == list(KINDS)


def whole_row(factor: int) -> Row:
    """Every column with another value, all of which every type can say."""
    return (*(factor * 1_001 * (at + 1) for at in range(len(NAMES) - 1)), factor)


async def compiled(selection: str, root: str = "navUpdates", alias: str = "", **variables: Any) -> Projection | None:
    declared = "".join(f", ${name}: Boolean!" for name in variables)
    field = f"{alias}{root}(portfolioId: $id, maxRateHz: {RATE_HZ}) {{ {selection} }}"
    query = f"subscription($id: String!{declared}) {{ {field} }}"
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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("change { nav }", "change { fees }"),
        ("change { nav }", "change { nav: fees }"),
        ("change { nav fees }", "change { fees nav }"),
        ("change { nav }", "change { nav __typename }"),
        ("fees", "change { fees }"),
    ],
)
async def test_what_is_selected_of_a_change_is_part_of_the_key(one: str, other: str) -> None:
    first, second = await compiled(one, "pnlUpdates"), await compiled(other, "pnlUpdates")
    assert first is not None and second is not None
    assert first.key != second.key


# Marks of which no two columns, differences or parts have an equal text.
DISTINCT = (*(7 ** (at + 2) for at in range(len(NAMES) - 1)), 0)
DISTINCT_BEFORE = (*(5 ** (at + 2) for at in range(len(NAMES) - 1)), 0)


@st.composite
def few_fields(draw: st.DrawFn, type_name: str) -> str:
    """A selection of one or two fields, any of them under the same names."""
    fields = []
    for response_name in ("x", "y")[: draw(st.integers(1, 2))]:
        name = draw(st.sampled_from(field_names(type_name)))
        nested = f" {{ {draw(few_fields('PnlChange'))} }}" if name == "change" else ""
        fields.append(f"{response_name}: {name}{nested}")
    return " ".join(fields)


@settings(max_examples=400)
@given(st.sampled_from(sorted(TYPES)), st.sampled_from(sorted(TYPES)), st.data())
async def test_keys_are_equal_exactly_where_messages_are(one: str, other: str, data: st.DataObject) -> None:
    payloads, keys = [], []
    for root in (one, other):
        projection = await compiled(data.draw(few_fields(TYPES[root])), root, alias="live: ")
        assert projection is not None
        encoded = [
            projection.encode(PORTFOLIO_ID, DISTINCT, 3, kind, 8, latency_ms, before)
            for kind, latency_ms, before in (
                (StreamKind.SNAPSHOT, None, None),
                (StreamKind.UPDATE, LATENCY_MS, DISTINCT_BEFORE),
            )
        ]
        payloads.append(encoded)
        keys.append(projection.key)
    assert (keys[0] == keys[1]) == (payloads[0] == payloads[1])


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


async def test_a_condition_that_is_null_is_left_to_graphql_core_to_refuse() -> None:
    query = """subscription($id: String!, $shown: Boolean = true) { navUpdates(portfolioId: $id) {
        nav @include(if: $shown) } }"""
    capture = Capture()
    with pytest.raises(AssertionError, match="to be None"):
        await executed(query, {"id": "x", "shown": None}, [(DISTINCT, 1, 1)], capture=capture)
    assert capture.was_asked and capture.projection is None


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
        'subscription { navUpdates(portfolioId: "x") @upper { nav } }',
        'subscription { pnlUpdates(portfolioId: "x") { change @upper { nav } } }',
        'subscription { navUpdates(portfolioId: "x") { nav @upper } }',
        'subscription { pnlUpdates(portfolioId: "x") { change { nav @upper } } }',
        'subscription { navUpdates(portfolioId: "x") { nav(places: 2) } }',
    ):
        info = SimpleNamespace(_raw_info=raw_info(query))
        assert compile_projection(cast(Info, info)) is None, query


async def test_no_code_is_made_of_a_name_that_graphql_does_not_have() -> None:
    raw = raw_info('subscription { navUpdates(portfolioId: "x") { nav } }')
    assert compile_projection(cast(Info, SimpleNamespace(_raw_info=raw))) is not None
    for name in ("{row}", "'", "a b", "ü", "\\"):
        raw.path = SimpleNamespace(key=name)
        assert compile_projection(cast(Info, SimpleNamespace(_raw_info=raw))) is None


@given(int64)
def test_amounts_and_ratios_as_text_are_those_of_decimals(number: int) -> None:
    assert scaled_text(number, 6) == plain(from_micro(number))
    ratio = show_ratio(number)
    assert ratio is not None and scaled_text(number, 12) == plain(ratio)


@given(rows())
def test_a_row_is_its_mark(row: Row) -> None:
    mark = mark_of(row, 3)
    assert unpack_row(pack_mark(mark)) == row
    assert unpack_row(pack_mark(replace(mark, epoch=4))) == row
