"""Pages: Relay connections with opaque keyset cursors.

A cursor names its field and the key of its row, so that one of another field is told apart (BAD_CURSOR). It stays
valid for ever: it says "after this row", not "the n-th page". `first` is 1 to the setting `page_size_max`,
anything else is PAGE_SIZE: a page is never cut down silently.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import strawberry

from resolvers.errors import ErrorCode, PublicError

CURSOR_LENGTH_MAX = 400

Row = TypeVar("Row")
Item = TypeVar("Item")


@strawberry.type(description="Where a page lies among all rows.")
class PageInfo:
    has_next_page: bool = strawberry.field(description="There are rows after this page.")
    has_previous_page: bool = strawberry.field(description="There may be rows before this page: it had an `after`.")
    start_cursor: str | None = strawberry.field(description="Cursor of the first row; null on an empty page.")
    end_cursor: str | None = strawberry.field(
        description="Cursor of the last row: the `after` of the next page; null on an empty page."
    )


@strawberry.type(description="A row of a page, with its cursor.")
class Edge(Generic[Item]):
    cursor: str = strawberry.field(description="Opaque; give it as `after` to go on behind this row.")
    node: Item = strawberry.field(description="The row.")


@strawberry.type(description="One page of rows.")
class Connection(Generic[Item]):
    edges: list[Edge[Item]] = strawberry.field(description="The rows in order, with cursors.")
    page_info: PageInfo = strawberry.field(description="Where this page lies.")


def check_first(first: int, page_size_max: int) -> int:
    """`first` when it is allowed. Raises PublicError PAGE_SIZE."""
    if not 1 <= first <= page_size_max:
        raise PublicError(ErrorCode.PAGE_SIZE, f"first is 1 to {page_size_max}, not {first}")
    return first


def write_cursor(field: str, key: str | int) -> str:
    return base64.urlsafe_b64encode(f"{field}:{key}".encode()).decode().rstrip("=")


def read_cursor(field: str, cursor: str) -> str:
    """The key in a cursor of `field`. Raises PublicError BAD_CURSOR."""
    try:
        if len(cursor) > CURSOR_LENGTH_MAX:
            raise ValueError
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        name, separator, key = base64.b64decode(padded, altchars=b"-_", validate=True).decode().partition(":")
        if name != field or not separator or "\0" in key:
            raise ValueError
    except (ValueError, binascii.Error):
        raise PublicError(ErrorCode.BAD_CURSOR, f"not a cursor of {field}") from None
    return key


def read_sequence_cursor(field: str, cursor: str) -> int:
    """The sequence in a cursor of `field`. Raises PublicError BAD_CURSOR."""
    key = read_cursor(field, cursor)
    if not (key.isascii() and key.isdigit() and len(key) <= 18):
        raise PublicError(ErrorCode.BAD_CURSOR, f"not a cursor of {field}")
    return int(key)


def connection(
    rows: Sequence[Row],
    first: int,
    after: str | None,
    cursor_of: Callable[[Row], str],
    show: Callable[[Row], Item],
) -> Connection[Item]:
    """A page of `rows`, which hold one more than `first` when there is a next page."""
    page = rows[:first]
    edges = [Edge(cursor=cursor_of(row), node=show(row)) for row in page]
    return Connection(
        edges=edges,
        page_info=PageInfo(
            has_next_page=len(rows) > first,
            has_previous_page=after is not None,
            start_cursor=edges[0].cursor if edges else None,
            end_cursor=edges[-1].cursor if edges else None,
        ),
    )
