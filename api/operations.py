"""What happens around every operation, over HTTP and WebSocket alike.

Before: a context of its own, the limits, and deny by default: without a token nothing but introspection runs.
Parsed and validated documents are remembered by their text, because clients send the same few again and again.
After, and for every message of a subscription: errors get a code, and those that are not meant for clients are
masked and logged under the request's id, which the client is told.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog
from graphql import (
    ASTValidationRule,
    DocumentNode,
    GraphQLError,
    GraphQLSyntaxError,
    OperationDefinitionNode,
    OperationType,
    get_operation_ast,
    parse,
)
from strawberry.extensions import SchemaExtension
from strawberry.schema.schema import validate_document

from api.connection import Connection
from api.limits import check_objects, make_rules, root_fields
from api.metrics import Metrics
from engine.runtime.settings import Settings
from resolvers.errors import AWAY, ErrorCode, PublicError
from resolvers.schema import Extension

DOCUMENTS_COUNT_MAX = 500
DOCUMENT_LENGTH_MAX = 16_384  # a longer one is parsed each time: it is not one of a front end's usual few

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Documents:
    """Documents that were parsed, and whether they are valid, by their text."""

    tokens_max: int
    _known: OrderedDict[str, DocumentNode] = field(default_factory=OrderedDict)
    _valid: set[int] = field(default_factory=set)

    def parse(self, text: str) -> DocumentNode:
        """Raises GraphQLSyntaxError, RecursionError."""
        document = self._known.get(text)
        if document is None:
            return parse(text, max_tokens=self.tokens_max)
        self._known.move_to_end(text)
        return document

    def is_valid(self, document: DocumentNode) -> bool:
        return id(document) in self._valid

    def remember(self, text: str, document: DocumentNode) -> None:
        """The document was found valid."""
        if len(text) > DOCUMENT_LENGTH_MAX or text in self._known:
            return
        self._known[text] = document
        self._valid.add(id(document))
        if len(self._known) > DOCUMENTS_COUNT_MAX:
            self._valid.discard(id(self._known.popitem(last=False)[1]))


def make_extension(settings: Settings, metrics: Metrics) -> Extension:
    rules = make_rules(settings)
    documents = Documents(settings.query_tokens_max)
    return lambda: OperationExtension(settings, metrics, rules, documents)


class OperationExtension(SchemaExtension):
    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        rules: tuple[type[ASTValidationRule], ...],
        documents: Documents,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._rules = rules
        self._documents = documents
        self._streamed = False

    def on_operation(self) -> Iterator[None]:
        execution = self.execution_context
        connection: Connection = execution.context
        execution.context = connection.operation()
        execution.validation_rules = (*execution.validation_rules, *self._rules)
        begun_s = time.perf_counter()
        yield
        if not self._streamed:
            self._publish(execution.result)
        kind = _kind(execution.graphql_document, execution.operation_name)
        self._metrics.operations.labels(kind).inc()
        if kind in ("query", "mutation"):
            self._metrics.latency.labels(kind).observe(time.perf_counter() - begun_s)

    def on_parse(self) -> Iterator[None]:
        execution = self.execution_context
        if execution.query:
            # Left to Strawberry when it fails: it turns what the parser raises into the operation's error.
            execution.parse_options["max_tokens"] = self._settings.query_tokens_max
            try:
                execution.graphql_document = self._documents.parse(execution.query)
            except (GraphQLError, RecursionError):
                execution.graphql_document = None
        yield

    def on_validate(self) -> Iterator[None]:
        execution = self.execution_context
        if execution.graphql_document is not None:
            # Strawberry validates only what has no verdict yet, and looks at the verdict before this hook goes on.
            execution.pre_execution_errors = self._verdict(execution.graphql_document)
        yield

    def on_stream_result(self, result: Any) -> Iterator[None]:
        self._streamed = True
        self._publish(result)
        yield

    def _verdict(self, document: DocumentNode) -> list[GraphQLError]:
        """What is wrong with the document, or with asking it of this operation's caller."""
        execution = self.execution_context
        if not self._documents.is_valid(document):
            errors = validate_document(execution.schema._schema, document, execution.validation_rules)
            if errors:
                return errors
            self._documents.remember(execution.query or "", document)
        operation = get_operation_ast(document, execution._provided_operation_name)
        if operation is None:
            # Strawberry would run the first of several; which one is meant is for the client to say.
            return [_error("BAD_REQUEST", "operationName must say which operation is meant")]
        refused = self._refusal(document, operation)
        return [] if refused is None else [refused]

    def _refusal(self, document: DocumentNode, operation: OperationDefinitionNode) -> GraphQLError | None:
        execution = self.execution_context
        if execution.context.access is None and any(
            not name.startswith("__") for name in root_fields(document, operation)
        ):
            return _error(ErrorCode.UNAUTHENTICATED, "a token is needed")
        if operation.operation is OperationType.SUBSCRIPTION and not execution.context.streaming:
            return _error("NEEDS_WEBSOCKET", "subscriptions are served over graphql-transport-ws and graphql-sse")
        schema = execution.schema._schema
        return check_objects(schema, document, operation, execution.variables or {}, self._settings)

    def _publish(self, result: Any) -> None:
        """Make the errors of a result fit for the client, in place."""
        errors = getattr(result, "errors", None)
        if errors:
            result.errors = [self._public(error) for error in errors]

    def _public(self, error: GraphQLError) -> GraphQLError:
        public = published(error, self.execution_context.context.request_id)
        self._metrics.errors.labels(str((public.extensions or {})["code"])).inc()
        return public


def published(error: GraphQLError, request_id: str) -> GraphQLError:
    """The error as a client may see it: with a code, and masked unless it was meant for clients."""
    original = error.original_error
    if (error.extensions or {}).get("code") and (original is None or isinstance(original, PublicError)):
        return error
    if isinstance(original, RecursionError):
        return _coded(error, "QUERY_TOO_DEEP", "the document is nested too deeply")
    if isinstance(error, GraphQLSyntaxError):
        return _coded(error, _syntax_code(error.message), error.message)
    if original is None or isinstance(original, GraphQLError):
        return _coded(error, "GRAPHQL_VALIDATION_FAILED", error.message)
    if error.path is None and not isinstance(original, PublicError) and _is_request_error(original):
        return _coded(error, "BAD_REQUEST", error.message)
    where = ".".join(str(key) for key in error.path or ())
    if isinstance(original, AWAY):
        _log.warning("dependency_away", request_id=request_id, path=where, reason=repr(original)[:200])
        return _coded(error, ErrorCode.UNAVAILABLE, "a part of the service is away; try again shortly")
    _log.error("operation_failed", request_id=request_id, path=where, exc_info=original)
    masked = _coded(error, ErrorCode.INTERNAL, "an unexpected error")
    masked.extensions = {**(masked.extensions or {}), "requestId": request_id}
    return masked


def _syntax_code(message: str) -> str:
    # graphql-core tells its limits from mistakes by the message alone.
    if "Document contains more than" in message:
        return "TOO_MANY_TOKENS"
    return "QUERY_TOO_DEEP" if "Document is nested too deeply" in message else "GRAPHQL_PARSE_FAILED"


def _error(code: str, message: str) -> GraphQLError:
    return GraphQLError(message, extensions={"code": str(code)})


def _is_request_error(original: BaseException) -> bool:
    """Strawberry's own refusals: no query, no such operation, an operation type that is not allowed here."""
    return type(original).__module__.startswith("strawberry.")


def _coded(error: GraphQLError, code: str, message: str) -> GraphQLError:
    return GraphQLError(
        message,
        nodes=error.nodes,
        source=error.source,
        positions=error.positions,
        path=error.path,
        extensions={**(error.extensions or {}), "code": str(code)},
    )


def _kind(document: DocumentNode | None, operation_name: str | None) -> str:
    operation = None if document is None else get_operation_ast(document, operation_name)
    return "invalid" if operation is None else operation.operation.value
