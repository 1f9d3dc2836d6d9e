from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.assets import (
    HEADER,
    UNCLASSIFIED,
    AssetClass,
    AssetFileError,
    load_catalogue,
    parse_assets,
    unclassified,
)
from engine.messages import check_symbol

MARKET = Path(__file__).parents[3] / "shared" / "market"
FIRST_LINE = ",".join(HEADER)

GICS_SECTORS = {
    "Communication Services",
    "Consumer Discretionary",
    "Consumer Staples",
    "Energy",
    "Financials",
    "Health Care",
    "Industrials",
    "Information Technology",
    "Materials",
    "Real Estate",
    "Utilities",
}


def test_the_catalogue_covers_every_gics_sector_crypto_and_commodities() -> None:
    assets = load_catalogue().values()
    assert len(assets) == 60
    assert {asset.sector for asset in assets if asset.asset_class is AssetClass.EQUITY} == GICS_SECTORS
    sectors = {asset.sector for asset in assets}
    assert {"Layer 1 Crypto", "Precious Metals", "Energy Commodities"} <= sectors
    assert UNCLASSIFIED not in sectors
    assert all(asset.name and asset.industry for asset in assets)


def test_the_catalogue_is_keyed_by_well_formed_symbols() -> None:
    for symbol, asset in load_catalogue().items():
        check_symbol(symbol)
        assert asset.symbol == symbol


def test_a_quoted_field_may_hold_a_comma() -> None:
    lines = [FIRST_LINE, 'AAPL,Apple Inc.,EQUITY,Information Technology,"Hardware, Storage"']
    (asset,) = parse_assets(lines)
    assert asset.industry == "Hardware, Storage"
    assert asset.asset_class is AssetClass.EQUITY


def test_empty_fields_mean_unknown_not_nothing() -> None:
    (asset,) = parse_assets([FIRST_LINE, "XYZ,,,,"])
    assert asset == unclassified("XYZ")
    assert (asset.name, asset.sector, asset.asset_class) == ("XYZ", UNCLASSIFIED, AssetClass.UNCLASSIFIED)


def test_a_byte_order_mark_and_blank_lines_are_passed_over() -> None:
    assert [a.symbol for a in parse_assets(["\ufeff" + FIRST_LINE, "", "A,A,EQUITY,Energy,", ""])] == ["A"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("AAPL,Apple", "line 3: has 2 fields, not 5"),
        ("AAPL,Apple,BOND,Energy,", "line 3: asset_class 'BOND' is not one of"),
        ("bad symbol,Apple,EQUITY,Energy,", "line 3: symbol is not an identifier"),
        (",Apple,EQUITY,Energy,", "line 3: symbol is not an identifier"),
        ("OK,again,EQUITY,Energy,", "line 3: symbol OK is repeated"),
        (f"AAPL,{'x' * 201},EQUITY,Energy,", "line 3: name is longer than 200"),
        ("AAPL,Apple,EQUITY,En\x00ergy,", "line 3: "),
        ('AAPL,"Apple" Inc,EQUITY,Energy,', "line 3: "),
    ],
)
def test_a_bad_row_is_named_by_its_line(row: str, expected: str) -> None:
    with pytest.raises(AssetFileError) as caught:
        parse_assets([FIRST_LINE, "OK,Okay,EQUITY,Energy,", row])
    assert str(caught.value).startswith(expected)
    assert caught.value.line_number == 3


@pytest.mark.parametrize("lines", [[], ["symbol,name"], ["A,A,EQUITY,Energy,"]])
def test_a_file_without_the_header_is_refused(lines: list[str]) -> None:
    with pytest.raises(AssetFileError, match="line 1: the header is not symbol,name,asset_class,sector,industry"):
        parse_assets(lines)


@given(st.lists(st.text(), max_size=5))
def test_any_text_is_read_or_refused_with_a_line(lines: list[str]) -> None:
    try:
        parse_assets([FIRST_LINE, *lines])
    except AssetFileError as error:
        assert 1 <= error.line_number <= len(lines) + 1


def test_the_recorded_market_s_assets_are_read() -> None:
    path = MARKET / "assets.csv"
    if not path.exists():
        pytest.skip(f"no recorded market data at {path}")
    assets = parse_assets(path.read_text(encoding="utf-8").splitlines())
    assert len(assets) == 598
    assert {asset.sector for asset in assets} == GICS_SECTORS
