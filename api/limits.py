"""What one document may ask for: depth, aliases, and the number of objects of its answer.

    depth      fields nested in each other, fragments included; introspection is bounded by a rule of graphql-core
    aliases    aliased fields over all operations, each fragment counted as often as it is spread
    objects    Σ over lists of the product of their `first` with those of the lists around them; a curve counts a
               tenth of its `maxPoints`, because a point has a tenth of an object's fields. An object under an alias
               counts as one more, because it is shown once more. What a field reads besides, however little of it
               is shown, counts too (_READS)

Strawberry's own limiters walk every fragment again at each of its spreads, which a document of 1,000 tokens turns
into 2^90 steps, and their errors carry no code. Here each fragment is measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphql import (
    ASTValidationRule,
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    GraphQLSchema,
    IntValueNode,
    MaxIntrospectionDepthRule,
    NullValueNode,
    OperationDefinitionNode,
    SelectionNode,
    SelectionSetNode,
    ValidationContext,
    ValidationRule,
    ValueNode,
    VariableNode,
)
from graphql.execution.values import VariableValues, get_variable_values

from engine.equity_curve import POINTS_MAX
from engine.runtime.settings import Settings
from resolvers.equity_curve import POINTS_DEFAULT
from resolvers.portfolio import PORTFOLIOS_DEFAULT
from resolvers.webhooks import DELIVERIES_DEFAULT, WEBHOOKS_DEFAULT

Inside = Callable[[SelectionSetNode | None], int]
# The size of a selection that is no spread, by those of the selections inside it.
Measure = Callable[[SelectionNode, Inside], int]
_Measured = tuple[OperationDefinitionNode, int]

POINTS_PER_OBJECT = 10
# List fields whose length is not said by the client are short, or said by a default.
_DEFAULT_LENGTHS = {"portfolios": PORTFOLIOS_DEFAULT, "webhooks": WEBHOOKS_DEFAULT, "deliveries": DELIVERIES_DEFAULT}
# A position shown with all its fields takes about 30 µs of the loop; these are what 200 positions and a month of
# hourly snapshots take to read, in such objects.
_READS = {
    "positions": 10,
    "sectorAllocation": 75,
    "allocation": 75,
    "qualityShares": 75,
    "pricesAsOf": 75,
    "equityCurve": 150,
    "performance": 150,
    "explain": 300,
    "contribution": 300,
    "realizedPnl": 75,
    "realizedToday": 75,
    "closedPositions": 10,
    "lots": 10,
    "badges": 20,
    "thresholds": 10,
    "deliveries": 10,
}
# Of a portfolio it is read; a position or a valuation only shows a figure by this name.
_READ_AS_OBJECT = frozenset({"realizedPnl"})
# A past state is summed from the ledger, and valued whole.
_AS_OF_READS = 150


def make_rules(settings: Settings) -> tuple[type[ASTValidationRule], ...]:
    """Validation rules that refuse a document that is too deep or has too many aliases."""

    class DocumentLimits(ValidationRule):
        def __init__(self, context: ValidationContext) -> None:
            super().__init__(context)
            depth, aliases = depth_of(context.document), aliases_of(context.document)
            if depth > settings.query_depth_max:
                self.report_error(_refusal("QUERY_TOO_DEEP", "depth", depth, settings.query_depth_max))
            if aliases > settings.query_aliases_max:
                self.report_error(_refusal("TOO_MANY_ALIASES", "aliases", aliases, settings.query_aliases_max))

    return (DocumentLimits, MaxIntrospectionDepthRule)


def check_objects(
    schema: GraphQLSchema,
    document: DocumentNode,
    operation: OperationDefinitionNode,
    variables: Mapping[str, Any],
    settings: Settings,
) -> GraphQLError | None:
    """The error of an operation that asks for too many objects.

    Variables count as they will be executed: coerced, with the defaults of their definitions. Those that can not be
    coerced end the operation before it is run, so there is nothing to count.
    """
    values = get_variable_values(schema, operation.variable_definitions or (), dict(variables))
    if not isinstance(values, VariableValues):
        return None
    asked = objects_of(document, operation, values.coerced, settings.page_size_max)
    allowed = settings.query_objects_max
    return _refusal("QUERY_TOO_COSTLY", "objects", asked, allowed) if asked > allowed else None


def depth_of(document: DocumentNode) -> int:
    """How many fields lie in each other at the deepest place of any operation."""

    def measure(selection: SelectionNode, inside: Inside) -> int:
        if not isinstance(selection, FieldNode):
            return inside(getattr(selection, "selection_set", None))
        return 0 if selection.name.value.startswith("__") else 1 + inside(selection.selection_set)

    return max((size for _, size in _measure(document, measure, max)), default=0)


def aliases_of(document: DocumentNode) -> int:
    def measure(selection: SelectionNode, inside: Inside) -> int:
        aliased = isinstance(selection, FieldNode) and selection.alias is not None
        return int(aliased) + inside(getattr(selection, "selection_set", None))

    return sum(size for _, size in _measure(document, measure, _add))


def objects_of(
    document: DocumentNode, operation: OperationDefinitionNode, coerced: Mapping[str, Any], page_size_max: int
) -> int:
    """What the operation costs, in objects; a length that can not be read counts as `page_size_max`."""

    def measure(selection: SelectionNode, inside: Inside) -> int:
        if not isinstance(selection, FieldNode):
            return inside(getattr(selection, "selection_set", None))
        length = _length(selection, coerced, page_size_max)
        contents = inside(selection.selection_set)
        if length or (selection.alias is not None and selection.selection_set is not None):
            contents = max(1, length) * max(1, contents)
        if any(argument.name.value == "asOf" for argument in selection.arguments or ()):
            contents += _AS_OF_READS
        name = selection.name.value
        shown_only = name in _READ_AS_OBJECT and selection.selection_set is None
        return contents if shown_only else contents + _READS.get(name, 0)

    return sum(size for measured, size in _measure(document, measure, _add) if measured is operation)


def root_fields(document: DocumentNode, operation: OperationDefinitionNode) -> set[str]:
    """The names of the operation's outermost fields, through fragments."""
    fragments = _fragments(document)
    names: set[str] = set()
    pending, seen = [operation.selection_set], set[str]()
    while pending:
        for selection in pending.pop().selections:
            if isinstance(selection, FieldNode):
                names.add(selection.name.value)
            elif not isinstance(selection, FragmentSpreadNode):
                pending.append(selection.selection_set)  # type: ignore[attr-defined]
            elif (name := selection.name.value) not in seen and name in fragments:
                seen.add(name)
                pending.append(fragments[name].selection_set)
    return names


def _measure(document: DocumentNode, measure: Measure, join: Callable[[int, int], int]) -> list[_Measured]:
    """The size of each operation, with every fragment measured once; one that spreads itself counts nothing."""
    sizes = _Sizes(_fragments(document), measure, join)
    operations = [node for node in document.definitions if isinstance(node, OperationDefinitionNode)]
    return [(operation, sizes.inside(operation.selection_set)) for operation in operations]


class _Sizes:
    def __init__(
        self, fragments: dict[str, FragmentDefinitionNode], measure: Measure, join: Callable[[int, int], int]
    ) -> None:
        self._fragments = fragments
        self._measure = measure
        self._join = join
        self._known: dict[str, int] = {}

    def inside(self, selection_set: SelectionSetNode | None) -> int:
        total = 0
        for selection in selection_set.selections if selection_set is not None else ():
            if isinstance(selection, FragmentSpreadNode):
                total = self._join(total, self._of_fragment(selection.name.value))
            else:
                total = self._join(total, self._measure(selection, self.inside))
        return total

    def _of_fragment(self, name: str) -> int:
        if name not in self._known:
            self._known[name] = 0
            fragment = self._fragments.get(name)
            self._known[name] = 0 if fragment is None else self.inside(fragment.selection_set)
        return self._known[name]


def _length(field: FieldNode, coerced: Mapping[str, Any], unreadable: int) -> int:
    """How many rows a field asks for; 0 when it is not a list of the client's length."""
    asked = {argument.name.value: argument.value for argument in field.arguments or ()}
    name = field.name.value
    if name == "equityCurve":
        return _number(asked.get("maxPoints"), coerced, POINTS_DEFAULT, POINTS_MAX) // POINTS_PER_OBJECT
    if "first" in asked or name in _DEFAULT_LENGTHS:
        return _number(asked.get("first"), coerced, _DEFAULT_LENGTHS.get(name, unreadable), unreadable)
    return 0


def _number(node: ValueNode | None, coerced: Mapping[str, Any], default: int, unreadable: int) -> int:
    """An argument's value; `default` where the client leaves it out or says null."""
    value: Any = node
    if isinstance(node, IntValueNode):
        # Longer ones are no Int, and Python refuses to read a text of thousands of digits.
        value = int(node.value) if len(node.value) < 12 else node
    elif isinstance(node, VariableNode):
        value = coerced.get(node.name.value)
    if value is None or isinstance(value, NullValueNode):
        return default
    return max(0, value) if isinstance(value, int) else unreadable


def _fragments(document: DocumentNode) -> dict[str, FragmentDefinitionNode]:
    return {node.name.value: node for node in document.definitions if isinstance(node, FragmentDefinitionNode)}


def _add(left: int, right: int) -> int:
    return left + right


def _refusal(code: str, what: str, asked: int, allowed: int) -> GraphQLError:
    # Nested fragments multiply to numbers that nobody wants to read.
    shown = asked if asked < 10**6 else "over a million"
    return GraphQLError(f"{shown} {what} asked for, {allowed} allowed", extensions={"code": code})
