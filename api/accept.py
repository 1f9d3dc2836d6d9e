"""What a client accepts: the Accept header of HTTP, as far as the gateway negotiates."""

from __future__ import annotations

from collections.abc import Iterator


def media_ranges(accept: str) -> Iterator[tuple[str, float]]:
    """The media ranges in lower case with their q-values, in the order of the header; 0 for a q that is no number."""
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        yield kind, _quality(parameters)


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
