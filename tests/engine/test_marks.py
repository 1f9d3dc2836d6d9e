"""Marks and frames come back as they were packed, and a frame that is cut short or not one is a ValueError."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.marks import (
    MARK,
    UNKNOWN,
    FrameHeader,
    Mark,
    MarkQuality,
    decode_frame,
    decode_mark,
    encode_frame,
)

RATIO_AT = MARK.names.index("day_pnl_ratio_e12")
int64s = st.integers(-(2**63) + 1, 2**63 - 1)
headers = st.builds(FrameHeader, st.integers(0, 2**32 - 1), *[st.integers(0, 2**63 - 1)] * 5)
groups = st.dictionaries(st.integers(1, 64), st.integers(1, 5), max_size=4)


@given(st.lists(int64s, min_size=17, max_size=17), st.sampled_from(MarkQuality), st.booleans())
def test_a_mark_comes_back_as_it_was_packed(figures: list[int], quality: MarkQuality, unknown: bool) -> None:
    if unknown:
        figures[RATIO_AT] = UNKNOWN
    row = np.zeros(1, MARK)
    for name, value in zip(MARK.names, [*figures, quality], strict=True):
        row[name] = value
    shown = [*figures, quality, 5]
    shown[RATIO_AT] = None if unknown else figures[RATIO_AT]
    assert decode_mark(row.tobytes(), 5) == Mark(*shown)


def test_the_fields_of_a_mark_are_in_the_order_of_its_bytes() -> None:
    assert tuple(Mark.__slots__) == (*MARK.names, "epoch")


@pytest.mark.parametrize("size", [0, 143, 145, 288])
def test_a_mark_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="144 bytes"):
        decode_mark(bytes(size), 1)


def packed(sizes: dict[int, int]) -> list[tuple[int, list[bytes], bytes]]:
    return [
        (length, [b"%d" % (n % 10) * length for n in range(count)], bytes(range(144)) * count)
        for length, count in sizes.items()
    ]


@given(headers, groups)
def test_a_frame_comes_back_as_it_was_made(header: FrameHeader, sizes: dict[int, int]) -> None:
    made = packed(sizes)
    frame = encode_frame(header, ((length, b"".join(ids), marks) for length, ids, marks in made))
    found, rows = decode_frame(frame)
    assert found == header
    assert [(ids, bytes(marks)) for ids, marks in rows] == [(ids, marks) for _, ids, marks in made]


@given(headers, groups)
@settings(max_examples=20)
def test_a_frame_cut_short_is_refused_or_ends_between_groups(header: FrameHeader, sizes: dict[int, int]) -> None:
    made = packed(sizes)
    frame = encode_frame(header, ((length, b"".join(ids), marks) for length, ids, marks in made))
    ends = [len(encode_frame(header, ((n, b"".join(i), m) for n, i, m in made[:k]))) for k in range(len(made))]
    for size in range(len(frame)):
        try:
            rows = list(decode_frame(frame[:size])[1])
        except ValueError:
            assert size not in ends
        else:
            assert size in ends
            assert len(rows) == ends.index(size)


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_a_frame_or_a_value_error(data: bytes, magic: bool) -> None:
    try:
        list(decode_frame((b"NVM3" + data) if magic else data)[1])
    except ValueError:
        return
    assert magic
