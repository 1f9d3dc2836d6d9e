"""Allocation: exact values, weights of the gross that sum to 1 with shorts too; exposure and concentration."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.assets import Asset, AssetClass, unclassified
from engine.sectors import (
    Exposure,
    SectorValue,
    allocate,
    allocation_of,
    concentration_of,
    exposure_of,
    ranks_of,
    sector_value_decoder,
    sector_value_encoder,
    slices_of,
    sum_up,
)

values = st.lists(st.tuples(st.sampled_from("ABCDE"), st.integers(-(2**59), 2**59)), max_size=12)


def test_weights_are_the_share_of_the_value_when_nothing_is_short() -> None:
    slices = allocate([("Tech", 60), ("Energy", 30), ("Tech", 10)])
    assert [(at.name, at.value, at.weight) for at in slices] == [
        ("Tech", 70, Decimal("0.7")),
        ("Energy", 30, Decimal("0.3")),
    ]


def test_a_short_counts_against_the_value_and_towards_the_weight() -> None:
    slices = allocate([("Tech", 50), ("Tech", -50), ("Energy", -100)])
    assert [(at.name, at.value, at.gross, at.weight) for at in slices] == [
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
        own = [value for name, value in positions if name == at.name]
        assert (at.value, at.gross) == (sum(own), sum(map(abs, own)))
        assert abs(Fraction(at.weight) - Fraction(at.gross, gross)) < Fraction(1, 10**60)
    assert abs(sum(Fraction(at.weight) for at in slices) - 1) < Fraction(1, 10**60)
    assert [at.gross for at in slices] == sorted((at.gross for at in slices), reverse=True)


@given(values)
def test_the_weights_that_redis_keeps_as_doubles_sum_to_one_or_there_are_none(positions: list[tuple[str, int]]) -> None:
    ranks = ranks_of(sum_up(positions))
    assert ranks == {at.name: float(at.weight) for at in allocate(positions)}
    assert not ranks or abs(sum(map(Fraction, ranks.values())) - 1) <= Fraction(1, 10**12)


@given(values)
def test_slices_from_hot_state_are_those_that_were_written(positions: list[tuple[str, int]]) -> None:
    slices = allocate(positions)
    written = {at.name: sector_value_encoder.encode(SectorValue(at.value, at.gross)) for at in slices}
    assert slices_of({sector: sector_value_decoder.decode(value) for sector, value in written.items()}) == slices


def test_positions_are_grouped_by_sector_class_and_industry() -> None:
    held = [
        (Asset("A", "A", AssetClass.EQUITY, "Tech", "Chips"), 30),
        (Asset("B", "B", AssetClass.EQUITY, "Tech", ""), -50),
        (unclassified("C"), 20),
    ]
    found = allocation_of(held)
    assert [(at.name, at.value, at.gross) for at in found.by_sector] == [("Tech", -20, 80), ("UNCLASSIFIED", 20, 20)]
    assert [(at.name, at.weight) for at in found.by_asset_class] == [
        ("EQUITY", Decimal("0.8")),
        ("UNCLASSIFIED", Decimal("0.2")),
    ]
    assert [(at.name, at.value, at.gross) for at in found.by_industry] == [("UNCLASSIFIED", -30, 70), ("Chips", 30, 30)]
    assert (found.exposure, found.concentration) == (Exposure(50, -50), Decimal("0.38"))


@given(st.lists(st.integers(-(2**59), 2**59), max_size=12))
def test_exposure_is_made_of_longs_and_shorts(values: list[int]) -> None:
    found = exposure_of(values)
    assert (found.gross, found.net) == (sum(map(abs, values)), sum(values))
    assert found.long >= 0 >= found.short


@pytest.mark.parametrize(
    ("values", "concentration"),
    [([], None), ([0], None), ([7], "1"), ([-7], "1"), ([5, 5, -5, 5], "0.25"), ([3, -1], "0.625"), ([4, 0], "1")],
)
def test_concentration_is_one_over_the_number_of_equal_positions(values: list[int], concentration: str | None) -> None:
    assert concentration_of(values) == (None if concentration is None else Decimal(concentration))
