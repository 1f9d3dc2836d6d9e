"""Settings as the environment gives them."""

from __future__ import annotations

import pytest

from engine.assets import AssetClass
from engine.runtime.settings import Settings


def test_lists_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAVSTREAM_DELAYED_SOURCES", " late , later,, ")
    monkeypatch.setenv("NAVSTREAM_ALLOWED_ORIGINS", "https://a.example")
    settings = Settings()
    assert settings.delayed_sources == ("late", "later")
    assert settings.allowed_origins == ("https://a.example",)
    assert Settings(delayed_sources=("late",)).delayed_sources == ("late",)


def test_by_default_equities_and_commodities_have_sessions_and_extended_hours() -> None:
    settings = Settings()
    assert settings.calendars == {AssetClass.EQUITY: "XNYS", AssetClass.COMMODITY: "CMES"}
    assert settings.extended_hours and settings.delayed_sources == ()


def test_a_calendar_is_named_or_left_out_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAVSTREAM_CALENDAR_EQUITY", "XLON")
    monkeypatch.setenv("NAVSTREAM_CALENDAR_COMMODITY", "")
    monkeypatch.setenv("NAVSTREAM_EXTENDED_HOURS", "false")
    settings = Settings()
    assert settings.calendars == {AssetClass.EQUITY: "XLON", AssetClass.COMMODITY: ""}
    assert not settings.extended_hours
