"""Relay's Node: an object that a cache can name and fetch again by an opaque id.

The id is the type's name and the object's key in base64; nobody is meant to read or build one. What a person types
is the plain `portfolioId` or `symbol`.
"""

from __future__ import annotations

import base64
import binascii

import strawberry

ID_LENGTH_MAX = 400


@strawberry.interface(description="An object with an id under which `node` answers it again.")
class Node:
    id: strawberry.ID = strawberry.field(description="Opaque and stable; unique over all types. For caches.")


def write_id(type_name: str, key: str) -> strawberry.ID:
    return strawberry.ID(base64.urlsafe_b64encode(f"{type_name}:{key}".encode()).decode().rstrip("="))


def read_id(node_id: str) -> tuple[str, str] | None:
    """The type's name and the key; None when the id is not one of ours."""
    if len(node_id) > ID_LENGTH_MAX:
        return None
    try:
        padded = node_id.encode("ascii") + b"=" * (-len(node_id) % 4)
        type_name, separator, key = base64.b64decode(padded, altchars=b"-_", validate=True).decode().partition(":")
    except (ValueError, binascii.Error):
        return None
    return (type_name, key) if separator and key else None
