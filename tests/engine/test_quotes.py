from __future__ import annotations

from datetime import datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.amounts import parse_number
from engine.assets import AssetClass
from engine.instants import to_ns
from engine.markets import Markets
from engine.messages import Condition, Quote
from engine.quotes import (
    BANDS,
    RESTART_QUOTES_COUNT,
    SEQUENCE_MAX,
    SOURCES_COUNT_MAX,
    QuoteFilter,
    RawQuote,
    Verdict,
    trim_number,
)

NOW_NS = 1_795_000_000_000_000_000
TOLERANCE_NS = 5_000_000_000
CLASSES = {"AAPL": AssetClass.EQUITY, "BTC-USD": AssetClass.CRYPTO, "XAU-USD": AssetClass.COMMODITY}


def make_filter(symbols_count_max: int = 100) -> QuoteFilter:
    return QuoteFilter(CLASSES, symbols_count_max, TOLERANCE_NS)


def raw(
    price: str, sequence: int | None = None, *, at: int = 0, symbol: str = "AAPL", source: str = "feed"
) -> RawQuote:
    return RawQuote(symbol, price, NOW_NS + at, source, sequence)


def verdicts(quote_filter: QuoteFilter, *quotes: RawQuote) -> list[str]:
    return [quote_filter.judge(quote, NOW_NS)[0].value for quote in quotes]


def test_golden_vector_7_the_same_quote_twice_and_sequence_6_then_5() -> None:
    quote_filter = make_filter()
    assert verdicts(quote_filter, raw("100", 6), raw("100", 6), raw("101", 5)) == [
        "ACCEPTED",
        "DUPLICATE",
        "OUT_OF_ORDER",
    ]
    assert quote_filter.latest()["AAPL"].price == "100"


def test_an_accepted_quote_carries_a_plain_price() -> None:
    verdict, quote = make_filter().judge(raw("1.8923E+2", 1), NOW_NS)
    assert verdict is Verdict.ACCEPTED
    assert quote == Quote("AAPL", "189.23", NOW_NS, "feed", 1)


def test_trailing_zeros_do_not_make_another_quote() -> None:
    assert verdicts(make_filter(), raw("100.5", 1), raw("100.50", 1)) == ["ACCEPTED", "DUPLICATE"]


def test_without_sequences_ts_event_orders() -> None:
    assert verdicts(make_filter(), raw("100", at=-9), raw("101", at=-8), raw("99", at=-8), raw("99", at=-9)) == [
        "ACCEPTED",
        "ACCEPTED",
        "OUT_OF_ORDER",
        "OUT_OF_ORDER",
    ]


def test_sequence_wins_over_ts_event_and_ts_event_decides_where_one_has_none() -> None:
    quotes = raw("100", 1, at=-5), raw("101", 2, at=-6), raw("102", None, at=-6), raw("103", None, at=-5)
    assert verdicts(make_filter(), *quotes) == ["ACCEPTED", "ACCEPTED", "OUT_OF_ORDER", "ACCEPTED"]


def test_sources_are_ordered_apart() -> None:
    quote_filter = make_filter()
    assert verdicts(quote_filter, raw("100", 9, source="a"), raw("101", 1, source="b")) == ["ACCEPTED", "ACCEPTED"]
    assert quote_filter.latest()["AAPL"].source == "b"


@pytest.mark.parametrize(
    "price",
    [
        "NaN",
        "-NaN",
        "sNaN",
        "Infinity",
        "-Infinity",
        "0",
        "-0",
        "0.00",
        "-1",
        "",
        " 1",
        "1_000",
        "0x10",
        "abc",
        "１",
        "1234567890.1234567",
        "0.0000000000001",
        "1e15",
        "1e999999",
        "9" * 65,
    ],
)
def test_a_price_that_is_none_is_malformed_and_leaves_no_trace(price: str) -> None:
    quote_filter = make_filter()
    assert verdicts(quote_filter, raw(price, 1)) == ["MALFORMED"]
    assert quote_filter.symbols_count == 0
    assert verdicts(quote_filter, raw("100", 1), raw(price, 2), raw("101", 2)) == [
        "ACCEPTED",
        "MALFORMED",
        "ACCEPTED",
    ]


@pytest.mark.parametrize("symbol", ["", " AAPL", "AA PL", "-A", "é", "A" * 65, "A\n", "\ud800"])
def test_a_bad_symbol_or_source_is_malformed(symbol: str) -> None:
    assert verdicts(make_filter(), raw("1", symbol=symbol), raw("1", source=symbol)) == ["MALFORMED", "MALFORMED"]


@pytest.mark.parametrize("sequence", [-1, 2**63])
def test_a_sequence_outside_64_bits_is_malformed(sequence: int) -> None:
    assert verdicts(make_filter(), raw("1", sequence)) == ["MALFORMED"]


def test_an_instant_before_1970_is_malformed() -> None:
    assert verdicts(make_filter(), RawQuote("AAPL", "1", 0, "feed"), RawQuote("AAPL", "1", -5, "feed")) == [
        "MALFORMED",
        "MALFORMED",
    ]


def test_time_travel_is_dropped_beyond_the_tolerance_only() -> None:
    assert verdicts(make_filter(), raw("1", at=TOLERANCE_NS + 1), raw("1", at=TOLERANCE_NS)) == [
        "FUTURE",
        "ACCEPTED",
    ]


def test_new_symbols_beyond_the_limit_are_refused_and_known_ones_go_on() -> None:
    quote_filter = make_filter(symbols_count_max=2)
    quotes = raw("1", 1, symbol="A"), raw("1", 1, symbol="B"), raw("1", 1, symbol="C"), raw("1.1", 2, symbol="A")
    assert verdicts(quote_filter, *quotes) == ["ACCEPTED", "ACCEPTED", "TOO_MANY_SYMBOLS", "ACCEPTED"]
    assert quote_filter.symbols_count == 2


def test_a_flood_of_unheard_of_symbols_leaves_room_for_every_listed_one() -> None:
    quote_filter = make_filter(symbols_count_max=2)
    flood = verdicts(quote_filter, *(raw("1", 1, symbol=f"JUNK{n}") for n in range(50)))
    assert flood == ["ACCEPTED"] * 2 + ["TOO_MANY_SYMBOLS"] * 48
    assert set(verdicts(quote_filter, *(raw("100", 1, symbol=symbol) for symbol in CLASSES))) == {"ACCEPTED"}
    assert quote_filter.symbols_count == 2 + len(CLASSES)


def test_listed_symbols_take_no_room_from_others() -> None:
    quote_filter = make_filter(symbols_count_max=1)
    verdicts(quote_filter, *(raw("100", 1, symbol=symbol) for symbol in CLASSES))
    assert verdicts(quote_filter, raw("1", symbol="A"), raw("1", symbol="B")) == ["ACCEPTED", "TOO_MANY_SYMBOLS"]


def test_restored_junk_leaves_room_for_every_listed_symbol() -> None:
    quote_filter = make_filter(symbols_count_max=2)
    assert quote_filter.restore([Quote(f"JUNK{n}", "1", NOW_NS, "feed", 1) for n in range(9)], NOW_NS) == 2
    assert verdicts(quote_filter, raw("100", 1)) == ["ACCEPTED"]


def test_new_sources_beyond_the_limit_are_refused() -> None:
    quote_filter = make_filter()
    several = [raw("1", source=f"s{n}") for n in range(SOURCES_COUNT_MAX)]
    assert set(verdicts(quote_filter, *several)) == {"ACCEPTED"}
    assert verdicts(quote_filter, raw("1", at=1, source="one-more"), raw("1", at=1, source="s0")) == [
        "TOO_MANY_SOURCES",
        "ACCEPTED",
    ]


def test_a_jump_is_quarantined_until_a_second_quote_confirms_it() -> None:
    quote_filter = make_filter()
    assert verdicts(quote_filter, raw("100", 1), raw("200", 2)) == ["ACCEPTED", "QUARANTINED"]
    assert quote_filter.latest()["AAPL"].price == "100"
    assert verdicts(quote_filter, raw("201", 3), raw("202", 4)) == ["ACCEPTED", "ACCEPTED"]
    assert quote_filter.latest()["AAPL"].price == "202"


def test_another_source_s_quote_older_than_the_last_accepted_one_is_out_of_order() -> None:
    quote_filter = make_filter()
    ancient = RawQuote("AAPL", "100", 31_536_000_000_000_000, "b", 7)
    assert verdicts(quote_filter, raw("101", 1, source="a"), ancient) == ["ACCEPTED", "OUT_OF_ORDER"]
    assert quote_filter.latest()["AAPL"].price == "101"


def test_between_sources_an_equal_instant_is_not_older_and_a_sequence_says_nothing() -> None:
    quotes = (
        raw("100", 5, at=-5, source="a"),
        raw("101", 1, at=-5, source="b"),
        raw("102", 6, at=-6, source="a"),
        raw("102", 2, at=-6, source="b"),
        raw("103", 7, at=-6, source="a"),
    )
    assert verdicts(make_filter(), *quotes) == ["ACCEPTED", "ACCEPTED", "OUT_OF_ORDER", "ACCEPTED", "ACCEPTED"]


@pytest.mark.parametrize("last", [SEQUENCE_MAX, 1_000])
def test_a_source_that_numbers_anew_is_heard_again(last: int) -> None:
    quote_filter = make_filter()
    quotes = raw("100", last, at=-9), *(raw(f"10{n}", n, at=n - 9) for n in range(1, 6))
    assert RESTART_QUOTES_COUNT == 3
    assert verdicts(quote_filter, *quotes) == [
        "ACCEPTED",
        "OUT_OF_ORDER",
        "OUT_OF_ORDER",
        "RENUMBERED",
        "ACCEPTED",
        "ACCEPTED",
    ]
    assert quote_filter.latest()["AAPL"] == Quote("AAPL", "105", NOW_NS - 4, "feed", 5)


def test_a_renumbered_quote_is_handed_on() -> None:
    quote_filter = make_filter()
    verdicts(quote_filter, raw("100", 9, at=-9), raw("101", 1, at=-8), raw("102", 2, at=-7))
    verdict, quote = quote_filter.judge(raw("103", 3, at=-6), NOW_NS)
    assert (verdict, quote) == (Verdict.RENUMBERED, Quote("AAPL", "103", NOW_NS - 6, "feed", 3))


def test_late_old_quotes_are_no_new_numbering() -> None:
    late = (raw("101", n, at=n - 20) for n in range(1, 9))
    quotes = verdicts(make_filter(), raw("100", 9, at=-9), *late, raw("101", 10, at=-8))
    assert quotes == ["ACCEPTED", *["OUT_OF_ORDER"] * 8, "ACCEPTED"]


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(raw("100", 8, at=-10), id="a late old quote"),
        pytest.param(raw("100", 10, at=-8), id="one of the old numbering"),
        pytest.param(raw("300", 10, at=-8), id="one of the old numbering beyond the band"),
        pytest.param(raw("100", 1, at=-5), id="one that does not ascend"),
    ],
)
def test_only_quotes_in_a_row_make_a_new_numbering(between: RawQuote) -> None:
    quote_filter = make_filter()
    verdicts(quote_filter, raw("100", 9, at=-9), raw("101", 1, at=-7), raw("101", 2, at=-6), between)
    assert verdicts(quote_filter, raw("101", 3, at=-4)) == ["OUT_OF_ORDER"]


def test_a_repeated_quote_counts_once_towards_a_new_numbering() -> None:
    quotes = (
        raw("100", 9, at=-9),
        raw("101", 1, at=-8),
        raw("101", 1, at=-8),
        raw("101", 2, at=-7),
        raw("101", 2, at=-7),
    )
    expected = ["ACCEPTED", "OUT_OF_ORDER", "DUPLICATE", "OUT_OF_ORDER", "DUPLICATE", "RENUMBERED"]
    assert verdicts(make_filter(), *quotes, raw("101", 3, at=-6)) == expected


def test_a_new_numbering_at_another_price_level_is_confirmed_first() -> None:
    quotes = raw("100", SEQUENCE_MAX, at=-9), *(raw(f"20{n}", n, at=n - 9) for n in range(1, 6))
    expected = ["ACCEPTED", "OUT_OF_ORDER", "OUT_OF_ORDER", "QUARANTINED", "RENUMBERED", "ACCEPTED"]
    assert verdicts(make_filter(), *quotes) == expected


def test_each_source_and_symbol_has_a_numbering_of_its_own() -> None:
    quote_filter = make_filter()
    verdicts(quote_filter, *(raw("100", 9, at=-9, source=source) for source in "ab"), raw("100", 9, symbol="BTC-USD"))
    begun = [raw("100", n, at=n - 9, source=source) for n in (1, 2) for source in "ab"]
    assert set(verdicts(quote_filter, *begun)) == {"OUT_OF_ORDER"}
    assert verdicts(quote_filter, raw("100", 3, at=-5, source="a"), raw("100", 3, symbol="BTC-USD")) == [
        "RENUMBERED",
        "OUT_OF_ORDER",
    ]


def test_a_quarantined_quote_does_not_confirm_itself() -> None:
    quotes = raw("100", 1), raw("200", 2), raw("200", 2), raw("200", 2)
    assert verdicts(make_filter(), *quotes) == ["ACCEPTED", "QUARANTINED", "DUPLICATE", "DUPLICATE"]


def test_an_older_quote_does_not_confirm_but_takes_the_place() -> None:
    quotes = raw("100", 1), raw("200", 5), raw("201", 4), raw("202", 6)
    assert verdicts(make_filter(), *quotes) == ["ACCEPTED", "QUARANTINED", "QUARANTINED", "ACCEPTED"]


def test_a_quote_back_at_the_old_level_clears_the_quarantine() -> None:
    quotes = raw("100", 1), raw("200", 2), raw("101", 3), raw("200", 4), raw("100", 5)
    assert verdicts(make_filter(), *quotes) == ["ACCEPTED", "QUARANTINED", "ACCEPTED", "QUARANTINED", "ACCEPTED"]


def test_a_third_level_takes_the_place_of_the_second() -> None:
    quotes = raw("100", 1), raw("200", 2), raw("400", 3), raw("200", 4), raw("201", 5)
    expected = ["ACCEPTED", "QUARANTINED", "QUARANTINED", "QUARANTINED", "ACCEPTED"]
    assert verdicts(make_filter(), *quotes) == expected


def test_another_source_may_confirm_with_a_newer_instant() -> None:
    quotes = (
        raw("100", 1, at=-9),
        raw("200", 2, at=-8),
        raw("199", at=-8, source="b"),
        raw("199", at=-7, source="c"),
    )
    assert verdicts(make_filter(), *quotes) == ["ACCEPTED", "QUARANTINED", "QUARANTINED", "ACCEPTED"]


def test_another_source_s_sequences_say_nothing_about_this_one_s() -> None:
    older, newer = raw("199", 9, at=-8, source="b"), raw("199", 1, at=-7, source="c")
    assert verdicts(make_filter(), raw("100", 1, at=-9), raw("200", 2, at=-8), older) == [
        "ACCEPTED",
        "QUARANTINED",
        "QUARANTINED",
    ]
    assert verdicts(make_filter(), raw("100", 1, at=-9), raw("200", 2, at=-8), newer) == [
        "ACCEPTED",
        "QUARANTINED",
        "ACCEPTED",
    ]


def test_a_corrupt_sequence_beyond_the_band_does_not_lock_the_symbol() -> None:
    quotes = raw("100", 1), raw("1e9", 2**62), raw("101", 2), raw("102", 3)
    assert verdicts(make_filter(), *quotes) == ["ACCEPTED", "QUARANTINED", "ACCEPTED", "ACCEPTED"]


@pytest.mark.parametrize(("symbol", "asset_class"), [*CLASSES.items(), ("NEW", AssetClass.UNCLASSIFIED)])
def test_the_band_s_edges_are_inside_upwards_and_downwards(symbol: str, asset_class: AssetClass) -> None:
    up = 100 * (1 + BANDS[asset_class])
    for last, inside, outside in [
        (Decimal(100), up, up + Decimal("0.01")),
        (up, Decimal(100), Decimal("99.99")),
    ]:
        start = raw(str(last), 1, symbol=symbol)
        assert verdicts(make_filter(), start, raw(str(inside), 2, symbol=symbol)) == ["ACCEPTED", "ACCEPTED"]
        assert verdicts(make_filter(), start, raw(str(outside), 2, symbol=symbol)) == ["ACCEPTED", "QUARANTINED"]


def test_every_asset_class_has_a_band() -> None:
    assert set(BANDS) == set(AssetClass)
    assert all(0 < band < 1 for band in BANDS.values())


def test_restored_quotes_give_order_and_band() -> None:
    quote_filter = make_filter()
    stored = [Quote("AAPL", "100", NOW_NS, "feed", 7), Quote("X", "nonsense", NOW_NS, "feed", 1)]
    assert quote_filter.restore(stored, NOW_NS) == 1
    assert verdicts(quote_filter, raw("101", 6), raw("100", 7), raw("300", 8), raw("101", 8)) == [
        "OUT_OF_ORDER",
        "DUPLICATE",
        "QUARANTINED",
        "ACCEPTED",
    ]


def test_a_stored_quote_from_another_run_s_future_is_left_out() -> None:
    quote_filter = make_filter()
    assert quote_filter.restore([Quote("AAPL", "100", NOW_NS + 10 * TOLERANCE_NS, "replay")], NOW_NS) == 0
    assert verdicts(quote_filter, raw("20", source="replay")) == ["ACCEPTED"]


# -- conditions and sessions --------------------------------------------------------------------------------------


def said(
    condition: Condition, price: str, sequence: int | None = None, *, at: int = 0, source: str = "feed"
) -> RawQuote:
    return RawQuote("AAPL", price, NOW_NS + at, source, sequence, condition)


def test_a_halted_quote_keeps_the_last_good_price_whatever_its_own_is() -> None:
    for price in ("0.01", "9999", "101", "", "nonsense", "-5", "0"):
        quote_filter = make_filter()
        verdicts(quote_filter, raw("100", 1, at=-9))
        halted = Quote("AAPL", "100", NOW_NS - 9, "feed", 1, "HALTED")
        assert quote_filter.judge(said("HALTED", price, 2, at=-5), NOW_NS) == (Verdict.ACCEPTED, halted)
        assert quote_filter.latest() == {"AAPL": halted}


def test_the_next_quote_ends_the_halt_and_one_beyond_the_band_when_it_is_confirmed() -> None:
    quote_filter = make_filter()
    quotes = raw("100", 1), said("HALTED", "1", 2), said("HALTED", "2", 3), raw("200", 4)
    assert verdicts(quote_filter, *quotes) == ["ACCEPTED", "ACCEPTED", "ACCEPTED", "QUARANTINED"]
    assert (quote_filter.latest()["AAPL"].price, quote_filter.latest()["AAPL"].condition) == ("100", "HALTED")
    assert verdicts(quote_filter, raw("201", 5)) == ["ACCEPTED"]
    assert quote_filter.latest()["AAPL"] == Quote("AAPL", "201", NOW_NS, "feed", 5)


def test_a_halt_is_ordered_like_any_quote() -> None:
    quote_filter = make_filter()
    quotes = raw("100", 5, at=-5), said("HALTED", "", 4), said("HALTED", "", 6), said("HALTED", "7", 6), raw("99", 5)
    assert verdicts(quote_filter, *quotes) == ["ACCEPTED", "OUT_OF_ORDER", "ACCEPTED", "DUPLICATE", "OUT_OF_ORDER"]
    # Another source's quote of before the halt does not end it, one of after it does.
    assert verdicts(quote_filter, raw("99", at=-4, source="other")) == ["OUT_OF_ORDER"]
    assert verdicts(quote_filter, raw("99", at=1, source="other")) == ["ACCEPTED"]
    assert quote_filter.latest()["AAPL"].condition == ""


def test_a_symbol_that_begins_halted_shows_the_price_it_came_with_but_is_not_held_to_it() -> None:
    quote_filter = make_filter()
    assert verdicts(quote_filter, said("HALTED", "", 1), said("HALTED", "0", 1)) == ["MALFORMED", "MALFORMED"]
    assert quote_filter.symbols_count == 0
    assert verdicts(quote_filter, said("HALTED", "3", 1)) == ["ACCEPTED"]
    assert quote_filter.latest()["AAPL"] == Quote("AAPL", "3", NOW_NS, "feed", 1, "HALTED")
    assert verdicts(quote_filter, said("HALTED", "4", 2), raw("100", 3), raw("300", 4)) == [
        "ACCEPTED",
        "ACCEPTED",
        "QUARANTINED",
    ]
    assert quote_filter.latest()["AAPL"].price == "100"


def test_a_halted_quote_must_be_well_formed_but_for_its_price() -> None:
    quote_filter = make_filter()
    verdicts(quote_filter, raw("100", 1))
    assert verdicts(quote_filter, said("HALTED", "", -1), said("HALTED", "", 2, source="a b")) == ["MALFORMED"] * 2
    assert verdicts(quote_filter, said("HALTED", "", 2, at=TOLERANCE_NS + 1)) == ["FUTURE"]


@pytest.mark.parametrize("sequence", [7, None])
def test_another_condition_of_the_same_quote_is_news(sequence: int | None) -> None:
    quote_filter = make_filter()
    steps: list[tuple[Condition, str]] = [
        ("", "ACCEPTED"),
        ("", "DUPLICATE"),
        ("HALTED", "ACCEPTED"),
        ("HALTED", "DUPLICATE"),
        ("", "ACCEPTED"),
        ("DELAYED", "ACCEPTED"),
        ("DELAYED", "DUPLICATE"),
    ]
    for condition, expected in steps:
        assert verdicts(quote_filter, said(condition, "100", sequence)) == [expected]
        assert quote_filter.latest()["AAPL"] == Quote("AAPL", "100", NOW_NS, "feed", sequence, condition)


def test_another_condition_does_not_excuse_an_older_quote() -> None:
    quote_filter = make_filter()
    quotes = raw("100", 7), said("DELAYED", "100", 6), said("DELAYED", "100", 7, at=-1)
    assert verdicts(quote_filter, *quotes) == ["ACCEPTED", "OUT_OF_ORDER", "OUT_OF_ORDER"]


def test_quotes_of_a_delayed_source_are_delayed_unless_they_are_halted() -> None:
    quote_filter = QuoteFilter(CLASSES, 100, TOLERANCE_NS, ("late",))
    found = []
    for quote in (raw("100", 1), raw("101", 1, source="late"), said("HALTED", "", 2, source="late"), raw("102", 2)):
        found.append(quote_filter.judge(quote, NOW_NS)[1])
    assert [(quote.price, quote.condition) for quote in found if quote] == [
        ("100", ""),
        ("101", "DELAYED"),
        ("101", "HALTED"),
        ("102", ""),
    ]


def test_a_restored_halt_goes_on_and_its_price_is_the_band_s_reference() -> None:
    quote_filter = make_filter()
    stored = [Quote("AAPL", "100", NOW_NS - 9, "feed", 7, "HALTED")]
    assert quote_filter.restore(stored, NOW_NS) == 1
    assert quote_filter.latest() == {"AAPL": stored[0]}
    assert verdicts(quote_filter, raw("300", 8), raw("101", 9)) == ["QUARANTINED", "ACCEPTED"]


def test_a_new_class_brings_its_band_and_takes_no_room() -> None:
    quote_filter = make_filter(symbols_count_max=1)
    assert verdicts(quote_filter, raw("100", 1, symbol="MINE"), raw("140", 2, symbol="MINE")) == ["ACCEPTED"] * 2
    quote_filter.classify(CLASSES | {"MINE": AssetClass.COMMODITY, "OTHER": AssetClass.EQUITY})
    assert verdicts(quote_filter, raw("190", 3, symbol="MINE"), raw("1", symbol="OTHER")) == [
        "QUARANTINED",
        "TOO_MANY_SYMBOLS",
    ]


MARKETS = Markets({AssetClass.EQUITY: "XNYS", AssetClass.COMMODITY: "CMES"})


@pytest.mark.parametrize(
    ("symbol", "at", "expected"),
    [
        ("AAPL", "2026-11-25T14:29:59Z", "OUT_OF_SESSION"),
        ("AAPL", "2026-11-25T14:30:00Z", "ACCEPTED"),
        ("AAPL", "2026-11-25T21:00:00Z", "ACCEPTED"),
        ("AAPL", "2026-11-25T21:15:00Z", "ACCEPTED"),  # the official close
        ("AAPL", "2026-11-25T21:15:01Z", "OUT_OF_SESSION"),
        ("AAPL", "2026-11-26T17:00:00Z", "OUT_OF_SESSION"),
        ("AAPL", "2026-11-27T18:30:00Z", "OUT_OF_SESSION"),  # after an early close
        ("XAU-USD", "2026-11-26T03:00:00Z", "ACCEPTED"),
        ("XAU-USD", "2026-11-28T17:00:00Z", "OUT_OF_SESSION"),
        ("BTC-USD", "2026-11-28T17:00:00Z", "ACCEPTED"),
        ("NEVER", "2026-11-28T17:00:00Z", "ACCEPTED"),
    ],
)
def test_with_markets_a_quote_must_be_of_a_session(symbol: str, at: str, expected: str) -> None:
    at_ns = to_ns(datetime.fromisoformat(at))
    strict = QuoteFilter(CLASSES, 100, TOLERANCE_NS, markets=MARKETS)
    quote = RawQuote(symbol, "100", at_ns, "feed", 1)
    assert strict.judge(quote, at_ns)[0] == expected
    assert strict.symbols_count == (expected == "ACCEPTED")
    assert make_filter().judge(quote, at_ns)[0] == "ACCEPTED"


def test_out_of_session_a_halt_is_heard_and_what_was_accepted_once_is_restored() -> None:
    at_ns = to_ns(datetime.fromisoformat("2026-11-28T17:00Z"))
    strict = QuoteFilter(CLASSES, 100, TOLERANCE_NS, markets=MARKETS)
    assert strict.restore([Quote("AAPL", "100", at_ns, "feed", 1)], at_ns) == 1
    assert strict.judge(RawQuote("AAPL", "101", at_ns, "feed", 2), at_ns)[0] == "OUT_OF_SESSION"
    assert strict.judge(RawQuote("AAPL", "101", at_ns, "feed", 3, "HALTED"), at_ns)[0] == "ACCEPTED"


RAW_QUOTES = st.builds(
    RawQuote,
    symbol=st.sampled_from(["A", "B", "C", "bad symbol"]),
    price=st.one_of(st.sampled_from(["100", "101", "99", "250", "251", "NaN", "-5", "0", "1e9"]), st.text(max_size=5)),
    ts_event_ns=st.integers(NOW_NS - 5, NOW_NS + 5) | st.just(NOW_NS * 2),
    source=st.sampled_from(["one", "two"]),
    sequence=st.none() | st.integers(-1, 20),
)


@given(st.lists(RAW_QUOTES, max_size=60))
def test_whatever_comes_only_usable_prices_in_order_get_through(quotes: list[RawQuote]) -> None:
    quote_filter = make_filter(symbols_count_max=2)
    seen: dict[tuple[str, str], Quote] = {}
    for item in quotes:
        before = quote_filter.latest()
        verdict, quote = quote_filter.judge(item, NOW_NS)
        assert (quote is not None) == (verdict in (Verdict.ACCEPTED, Verdict.RENUMBERED))
        if quote is None:
            assert quote_filter.latest() == before
            continue
        assert parse_number(quote.price, "price") > 0
        last = seen.get((quote.source, quote.symbol))
        latest = before.get(quote.symbol)
        assert latest is None or latest.source == quote.source or quote.ts_event_ns >= latest.ts_event_ns
        if last is not None and last.sequence is not None and quote.sequence is not None:
            assert (quote.sequence < last.sequence) == (verdict is Verdict.RENUMBERED)
            assert quote.sequence > last.sequence or quote.ts_event_ns > last.ts_event_ns
        elif last is not None:
            assert quote.ts_event_ns > last.ts_event_ns
        seen[quote.source, quote.symbol] = quote
        assert quote_filter.latest()[quote.symbol] == quote
    assert quote_filter.symbols_count <= 2


@given(st.lists(st.tuples(st.sampled_from([100, 104, 150, 155, 300]), st.integers(1, 30)), max_size=40))
def test_no_price_beyond_the_band_gets_through_alone(steps: list[tuple[int, int]]) -> None:
    """A jump is accepted only right after a refused one that it agrees with."""
    quote_filter, last, refused = make_filter(), None, None
    for price, sequence in steps:
        verdict, quote = quote_filter.judge(raw(str(price), sequence), NOW_NS)
        if quote is not None:
            if last is not None and not Decimal("0.8") <= Decimal(price) / last <= Decimal("1.25"):
                assert refused is not None
                assert Decimal("0.8") <= Decimal(price) / refused <= Decimal("1.25")
            last, refused = Decimal(price), None
        elif verdict is Verdict.QUARANTINED:
            refused = Decimal(price)


@given(
    st.lists(
        st.tuples(st.sampled_from([100, 104, 300]), st.integers(1, 30), st.sampled_from(["", "DELAYED", "HALTED"])),
        max_size=40,
    )
)
def test_no_halt_moves_a_price(steps: list[tuple[int, int, Condition]]) -> None:
    quote_filter, good = make_filter(), None
    for price, sequence, condition in steps:
        _, quote = quote_filter.judge(said(condition, str(price), sequence), NOW_NS)
        if quote is None:
            continue
        if condition == "HALTED" and good is not None:
            assert quote == replace(good, condition="HALTED")
        assert quote.condition == condition
        good = quote


@given(st.floats(min_value=1e-6, max_value=1e14))
def test_a_float_s_digits_are_trimmed_into_the_exact_range(number: float) -> None:
    trimmed = trim_number(Decimal(repr(number)))
    parse_number(str(trimmed), "price")
    assert abs(trimmed - Decimal(repr(number))) <= max(Decimal(repr(number)).scaleb(-14), Decimal("5e-13"))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("189.23", "189.23"),
        ("189.23000000000002", "189.230000000000"),
        ("0.1234567890125", "0.123456789012"),
        ("1e-400", "0E-12"),
        ("NaN", "NaN"),
        ("1E+999999", "1E+999999"),
    ],
)
def test_trimming_is_half_even_and_leaves_the_rest_alone(number: str, expected: str) -> None:
    assert str(trim_number(Decimal(number))) == expected
