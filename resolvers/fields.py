"""A described field made of a method. Strawberry's own decorator is untyped, and would make the method so too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import strawberry

Method = TypeVar("Method", bound=Callable[..., Any])


def resolved(description: str) -> Callable[[Method], Method]:
    return cast(Callable[[Method], Method], strawberry.field(description=description))
