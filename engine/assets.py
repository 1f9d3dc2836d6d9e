"""Assets: what a symbol stands for, and the catalogue of them.

An asset is named by its symbol (engine.messages.check_symbol) and belongs to one class, one sector and one
industry. Sectors come from one documented taxonomy per class:

    EQUITY        the 11 GICS sectors; industry is the GICS sub-industry
    CRYPTO        Layer 1 Crypto (a chain of its own), Layer 2 Crypto (scales another chain), DeFi Crypto (a
                  protocol's token), Oracle Crypto (brings outside data on chain), Payment Crypto (made to pay
                  with), Meme Crypto (a joke with a market)
    COMMODITY     Precious Metals, Industrial Metals, Energy Commodities, Agricultural Commodities
    UNCLASSIFIED  UNCLASSIFIED: nobody has said; the asset is held and valued like any other

A class of files loaded by users is open: any non-empty sector is taken, because a user's taxonomy is the
user's.

File format (CSV, UTF-8, first line is the header): `symbol,name,asset_class,sector,industry`. `industry` may
be empty; an empty sector means UNCLASSIFIED; an unknown class, a bad or repeated symbol, an overlong text or
a wrong number of fields is an `AssetFileError` that names the line. A file is taken whole or not at all.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from importlib.resources import files

import msgspec

from engine.instants import to_datetime
from engine.messages import EventRejected, check_symbol

HEADER = ("symbol", "name", "asset_class", "sector", "industry")
TEXT_LENGTH_MAX = 200
UNCLASSIFIED = "UNCLASSIFIED"


class AssetClass(StrEnum):
    EQUITY = "EQUITY"
    CRYPTO = "CRYPTO"
    COMMODITY = "COMMODITY"
    UNCLASSIFIED = "UNCLASSIFIED"


@dataclass(frozen=True, slots=True)
class Asset:
    """`version` counts a symbol's classifications from 1, `classified_at` is since when this one is in force (None:
    always); what an asset is they do not change."""

    symbol: str
    name: str
    asset_class: AssetClass
    sector: str
    industry: str
    version: int = field(default=1, compare=False)
    classified_at: datetime | None = field(default=None, compare=False)


class Classification(msgspec.Struct, frozen=True, array_like=True):
    """What a symbol is classified as, and since when, as Redis keeps it. `version` counts a symbol's from 1."""

    name: str
    asset_class: AssetClass
    sector: str
    industry: str
    version: int
    effective_at_ns: int

    def asset(self, symbol: str) -> Asset:
        since = to_datetime(self.effective_at_ns) if self.effective_at_ns else None
        return Asset(symbol, self.name, self.asset_class, self.sector, self.industry, self.version, since)


classification_encoder = msgspec.msgpack.Encoder()
classification_decoder: msgspec.msgpack.Decoder[Classification] = msgspec.msgpack.Decoder(Classification)


class AssetFileError(ValueError):
    """A line of an asset file that can not be taken; `line_number` counts from 1, the header included."""

    def __init__(self, line_number: int, message: str) -> None:
        super().__init__(f"line {line_number}: {message}")
        self.line_number = line_number


def unclassified(symbol: str) -> Asset:
    """The asset that a fill in an unheard-of symbol brings into being."""
    return Asset(symbol, symbol, AssetClass.UNCLASSIFIED, UNCLASSIFIED, "")


def parse_assets(lines: Iterable[str]) -> list[Asset]:
    """Read an asset file's lines, in their order. Raises AssetFileError."""
    reader = csv.reader(lines, strict=True)
    assets: dict[str, Asset] = {}
    for line_number, row in _rows(reader):
        asset = _parse_row(row, line_number)
        if asset.symbol in assets:
            raise AssetFileError(line_number, f"symbol {asset.symbol} is repeated")
        assets[asset.symbol] = asset
    return list(assets.values())


def load_catalogue() -> dict[str, Asset]:
    """The catalogue that ships with the program, by symbol."""
    text = files("engine").joinpath("catalogue.csv").read_text(encoding="utf-8")
    return {asset.symbol: asset for asset in parse_assets(text.splitlines())}


def _rows(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    line_number = 1
    try:
        header = next(reader, [])
        # Spreadsheets put a byte order mark before the first field.
        if tuple(field.lstrip("\ufeff").strip() for field in header) != HEADER:
            raise AssetFileError(1, f"the header is not {','.join(HEADER)}")
        for line_number, row in enumerate(reader, start=2):
            if row:
                yield line_number, row
    except csv.Error as error:
        raise AssetFileError(line_number + 1, str(error)) from None


def _parse_row(row: list[str], line_number: int) -> Asset:
    if len(row) != len(HEADER):
        raise AssetFileError(line_number, f"has {len(row)} fields, not {len(HEADER)}")
    symbol, name, asset_class, sector, industry = (field.strip() for field in row)
    try:
        check_symbol(symbol)
        known_class = AssetClass(asset_class or UNCLASSIFIED)
    except EventRejected as error:
        raise AssetFileError(line_number, str(error)) from None
    except ValueError:
        known = ", ".join(AssetClass)
        raise AssetFileError(line_number, f"asset_class {asset_class[:40]!r} is not one of {known}") from None
    for column, text in (("name", name), ("sector", sector), ("industry", industry)):
        if len(text) > TEXT_LENGTH_MAX or not text.isprintable():
            raise AssetFileError(line_number, f"{column} is longer than {TEXT_LENGTH_MAX} or not printable")
    return Asset(symbol, name or symbol, known_class, sector or UNCLASSIFIED, industry)
