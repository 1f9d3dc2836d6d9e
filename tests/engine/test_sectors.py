"""Sector allocation: exact values, weights of the gross that sum to 1 with shorts too."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sectors import SectorValue, allocate, sector_value_decoder, sector_value_encoder, slices_of

values = st.lists(st.tuples(st.sampled_from("ABCDE"), st.integers(-(2**59), 2**59)), max_size=12)


def test_weights_are_the_share_of_the_value_when_nothing_is_short() -> None:
    slices = allocate([("Tech", 60), ("Energy", 30), ("Tech", 10)])
    assert [(at.sector, at.value, at.weight) for at in slices] == [
        ("Tech", 70, Decimal("0.7")),
        ("Energy", 30, Decimal("0.3")),
    ]


def test_a_short_counts_against_the_value_and_towards_the_weight() -> None:
    slices = allocate([("Tech", 50), ("Tech", -50), ("Energy", -100)])
    assert [(at.sector, at.value, at.gross, at.weight) for at in slices] == [
        ("Energy", -100, 100, Decimal("0.5")),
        ("Tech", 0, 100, Decimal("0.5")),
    ]


@pytest.mark.parametrize("positions", [[], [("Tech", 0)]])
def test_where_nothing_is_worth_anything_there_are_no_slices(positions: list[tuple[str, int]]) -> None:
    assert allocate(positions) == []


@given(values)
def test_values_sum_to_the_positions_and_weights_to_one(positions: list[tuple[str, int]]) -> None:
    slices = allocate(positions)
    gross = sum(abs(value) for _, value in positions)
    if not gross:
        assert slices == []
        return
    assert sum(at.value for at in slices) == sum(value for _, value in positions)
    assert sum(at.gross for at in slices) == gross
    for at in slices:
        own = [value for sector, value in positions if sector == at.sector]
        assert (at.value, at.gross) == (sum(own), sum(map(abs, own)))
        assert abs(Fraction(at.weight) - Fraction(at.gross, gross)) < Fraction(1, 10**60)
    assert abs(sum(Fraction(at.weight) for at in slices) - 1) < Fraction(1, 10**60)
    assert [at.gross for at in slices] == sorted((at.gross for at in slices), reverse=True)


@given(values)
def test_slices_from_hot_state_are_those_that_were_written(positions: list[tuple[str, int]]) -> None:
    slices = allocate(positions)
    written = {at.sector: sector_value_encoder.encode(SectorValue(at.value, at.gross)) for at in slices}
    assert slices_of({sector: sector_value_decoder.decode(value) for sector, value in written.items()}) == slices
