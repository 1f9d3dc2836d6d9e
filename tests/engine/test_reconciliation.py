"""What a check compares: silent when all agrees, naming each figure that does not, at the right point of the ledger."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from msgspec import structs

from engine.book import NAV_MAX_MICRO
from engine.instants import to_ns
from engine.ledger import LedgerEntry
from engine.marks import Mark, MarkQuality
from engine.portfolio import LedgerMismatch, Portfolio, value_portfolio
from engine.positions import HotPosition
from engine.posting import hot_position
from engine.reconciliation import SUMS, Finding, HotPortfolio, Price, Record, compare, nearest_value
from tests.scripted_ledger import ScriptedLedger

MICRO = 1_000_000


@dataclass
class Quotes:
    """A history of prices: those at the beginning, and what was quoted since."""

    first: dict[str, Price] = field(default_factory=dict)
    changes: list[tuple[str, Price]] = field(default_factory=list)

    def last(self, symbol: str) -> Price | None:
        return self._before(symbol, len(self.changes))

    def backwards(self, symbols: Iterable[str]) -> Iterator[tuple[str, Price | None]]:
        wanted = set(symbols)
        for at in range(len(self.changes) - 1, -1, -1):
            symbol = self.changes[at][0]
            if symbol in wanted:
                yield symbol, self._before(symbol, at)

    def _before(self, symbol: str, at: int) -> Price | None:
        found = [price for name, price in self.changes[:at] if name == symbol]
        return found[-1] if found else self.first.get(symbol)


def price(text: str, ts_event_ns: int = 0) -> Price:
    return Price(Decimal(text), ts_event_ns)


def mark_of(portfolio: Portfolio, prices: dict[str, Decimal], **changes: int) -> Mark:
    """The mark that an evaluator would write."""
    valued = value_portfolio(portfolio, prices)
    sums = {name: getattr(portfolio, name) for name in SUMS}
    figures = {
        **sums,
        "nav": valued.nav,
        "positions_value": valued.positions_value,
        "unrealized": valued.unrealized,
        "ledger_sequence": portfolio.ledger_sequence,
        "day_pnl": 5,
        "day_cut_at_ns": 1,
        "as_of_ns": 2,
        "sequence": 7,
        "epoch": 3,
        **changes,
    }
    return Mark(day_pnl_ratio_e12=None, quality=MarkQuality.STALE, **figures)


def hot_of(life: ScriptedLedger, portfolio: Portfolio) -> dict[str, HotPosition | None]:
    return {
        symbol: hot_position(held, 77 * MICRO, life.splits.get(symbol, []))
        for symbol, held in portfolio.positions.items()
    }


@dataclass
class Side:
    """Both sides of a comparison, in agreement until a test changes one."""

    life: ScriptedLedger
    entries: list[LedgerEntry]
    fold: Portfolio
    record: Record
    hot: HotPortfolio
    quotes: Quotes

    def compare(self) -> Finding:
        fold = copy.deepcopy(self.fold)
        return compare(fold, self.entries, self.record, self.hot, self.life.splits, self.quotes)

    def figures(self) -> list[str]:
        return self.compare().figures

    def with_mark(self, **changes: int) -> Finding:
        assert self.hot.mark is not None
        self.hot = replace(self.hot, mark=replace(self.hot.mark, **changes))
        return self.compare()


def both_sides(life: ScriptedLedger, unfolded: int = 0) -> Side:
    """Everything at the life's present; the fold lacks the last `unfolded` entries."""
    now = copy.deepcopy(life.portfolio)
    fold = Portfolio(life.portfolio_id, "USD")
    for entry in life.entries[: len(life.entries) - unfolded]:
        fold.replay(entry)
    hot = HotPortfolio(3, mark_of(now, life.prices()), "", hot_of(life, now))
    quotes = Quotes({symbol: price(quote.price, quote.ts_event_ns) for symbol, quote in life.quotes.items()})
    return Side(life, life.entries[len(life.entries) - unfolded :], fold, Record(now, now.receivables), hot, quotes)


@pytest.fixture
def life() -> ScriptedLedger:
    """Two holdings, one of them short, a dividend that is owed, fees, interest, a cycle that ended."""
    life = ScriptedLedger()
    life.cash("DEPOSIT", "10000")
    life.quote("AAPL", "100")
    life.quote("MSFT", "50")
    life.fill("AAPL", "BUY", "10", "99.5", fee="1")
    life.fill("MSFT", "SELL", "4", "51.25")
    life.fill("TSLA", "BUY", "3", "20")
    life.fill("TSLA", "SELL", "3", "21")
    life.wait()
    life.accrue("AAPL", "0.82")
    life.cash("INTEREST", "1.5")
    life.quote("AAPL", "101")
    return life


@pytest.mark.parametrize("unfolded", [0, 1, 5, 9])
def test_agreement_wherever_the_fold_begins(life: ScriptedLedger, unfolded: int) -> None:
    finding = both_sides(life, unfolded).compare()
    assert (finding.differences, finding.drift, finding.is_broken) == ([], 0, False)
    assert (finding.epoch, finding.sequence, finding.ledger_sequence) == (3, 7, len(life.entries))


@pytest.mark.parametrize("name", [*SUMS, "unrealized"])
def test_each_sum_of_the_mark_is_compared(life: ScriptedLedger, name: str) -> None:
    side = both_sides(life)
    assert side.hot.mark is not None
    finding = side.with_mark(**{name: getattr(side.hot.mark, name) - 1})
    assert (finding.figures, finding.drift, finding.is_broken) == ([name], 0, False)


def test_nav_drifts_by_what_is_shown_too_much(life: ScriptedLedger) -> None:
    side = both_sides(life)
    assert side.hot.mark is not None
    finding = side.with_mark(nav=side.hot.mark.nav + 250)
    assert (finding.figures, finding.drift) == (["nav"], 250)
    assert finding.differences[0].expected == str(side.hot.mark.nav - 250)


def test_a_value_at_prices_that_never_were(life: ScriptedLedger) -> None:
    """The nearest that was is what is expected; unrealized and NAV agree with the value that is shown."""
    side = both_sides(life)
    assert side.hot.mark is not None
    shown = side.hot.mark
    found = side.with_mark(
        nav=shown.nav + 3, positions_value=shown.positions_value + 3, unrealized=shown.unrealized + 3
    )
    assert (found.figures, found.drift) == (["positions value"], 3)


def test_a_value_at_any_point_of_the_stream_agrees(life: ScriptedLedger) -> None:
    side = both_sides(life)
    side.quotes.changes = [("AAPL", price("102")), ("MSFT", price("49")), ("NVDA", price("9")), ("AAPL", price("103"))]
    after = [("101", "50"), ("102", "50"), ("102", "49"), ("103", "49")]
    for aapl, msft in after:
        side.hot = replace(side.hot, mark=mark_of(life.portfolio, {"AAPL": Decimal(aapl), "MSFT": Decimal(msft)}))
        assert side.figures() == []
    side.hot = replace(side.hot, mark=mark_of(life.portfolio, {"AAPL": Decimal(103), "MSFT": Decimal(50)}))
    assert side.figures() == ["positions value"]


def test_the_nearest_value_is_found_on_the_way_back(life: ScriptedLedger) -> None:
    side = both_sides(life)
    side.quotes.changes = [("AAPL", price("110")), ("AAPL", price("90"))]
    values = [1_010 - 200, 1_100 - 200, 900 - 200]
    for wanted, nearest in [(805, values[0]), (2_000, values[1]), (-1, values[2]), (760, values[0])]:
        assert nearest_value(side.fold, wanted * MICRO, side.quotes, {}) == nearest * MICRO
    assert nearest_value(side.fold, 900 * MICRO, side.quotes, {}, at_last=True) == values[2] * MICRO


def test_a_position_without_a_price_counts_at_cost(life: ScriptedLedger) -> None:
    life.fill("GONE", "BUY", "2", "7")
    assert both_sides(life).figures() == []


@pytest.mark.parametrize(
    "change",
    [
        {"quantity": "10.0"},
        {"cost": 1},
        {"realized": 1},
        {"fees": 0},
        {"opened_sequence": 1},
        {"opened_at_ns": 1},
        {"splits": ((1, "2:1"),)},
    ],
)
def test_each_figure_of_a_hot_position_is_compared(life: ScriptedLedger, change: dict[str, object]) -> None:
    side = both_sides(life)
    held = side.hot.positions["AAPL"]
    assert held is not None
    changed = HotPosition(**{name: getattr(held, name) for name in held.__struct_fields__} | change)
    side.hot = replace(side.hot, positions={**side.hot.positions, "AAPL": changed})
    assert side.figures() == ["hot position AAPL"]


def test_a_hot_position_too_many_one_missing_and_one_that_can_not_be_read(life: ScriptedLedger) -> None:
    side = both_sides(life)
    aapl, msft = side.hot.positions["AAPL"], side.hot.positions["MSFT"]
    side.hot = replace(side.hot, positions={"AAPL": aapl, "MSFT": msft, "TSLA": aapl})
    assert side.figures() == ["hot position TSLA"]
    side.hot = replace(side.hot, positions={"AAPL": aapl})
    assert side.figures() == ["hot position MSFT"]
    side.hot = replace(side.hot, positions={"AAPL": aapl, "MSFT": None})
    assert [(one.figure, one.found) for one in side.compare().differences] == [("hot position MSFT", "unreadable")]


def test_the_day_base_is_not_the_ledgers_to_say(life: ScriptedLedger) -> None:
    side = both_sides(life)
    held = side.hot.positions["AAPL"]
    assert held is not None and held.day_base == 77 * MICRO
    assert side.figures() == []


@pytest.mark.parametrize("name", SUMS)
def test_an_account_that_is_not_the_fold_is_a_broken_record(life: ScriptedLedger, name: str) -> None:
    side = both_sides(life)
    kept = replace(side.record.portfolio, **{name: getattr(side.record.portfolio, name) + 1})
    side.record = Record(kept, side.record.receivables)
    finding = side.compare()
    assert (finding.figures, finding.is_broken) == ([f"account {name}"], True)


def test_other_rows_of_the_record(life: ScriptedLedger) -> None:
    side = both_sides(life)
    side.record = replace(side.record, receivables=side.record.receivables + 1)
    assert side.figures() == ["receivable rows"]
    held = dict(life.portfolio.positions)
    held["AAPL"] = structs.replace(held["AAPL"], fees=0)
    kept = replace(life.portfolio, positions=held, ledger_hash=b"other")
    side.record = Record(kept, life.portfolio.receivables)
    finding = side.compare()
    assert (finding.figures, finding.is_broken) == (["account ledger_hash", "position row AAPL"], True)


def test_an_account_ahead_of_its_ledger_is_broken(life: ScriptedLedger) -> None:
    side = both_sides(life)
    kept = replace(life.portfolio, ledger_sequence=life.portfolio.ledger_sequence + 1)
    side.record = Record(kept, life.portfolio.receivables)
    finding = side.compare()
    assert (finding.figures, finding.is_broken) == (["account ledger_sequence"], True)


# -- states on their way ------------------------------------------------------------------------------------------


def past(life: ScriptedLedger, sequence: int) -> Portfolio:
    fold = Portfolio(life.portfolio_id, "USD")
    for entry in life.entries[:sequence]:
        fold.replay(entry)
    return fold


def test_account_mark_and_positions_may_each_be_of_their_own_sequence(life: ScriptedLedger) -> None:
    """The account was read first, then a mark two entries further, then positions one further still."""
    end = len(life.entries)
    life.fill("AAPL", "SELL", "1", "101")
    life.fill("AAPL", "SELL", "2", "101")
    life.fill("AAPL", "SELL", "3", "101")
    side = both_sides(life, unfolded=5)
    side.record = Record(past(life, end), life.portfolio.receivables)
    side.hot = replace(side.hot, mark=mark_of(past(life, end + 2), life.prices()))
    assert side.figures() == []
    side.hot = replace(side.hot, positions=hot_of(life, past(life, end + 1)))
    assert side.figures() == ["hot position AAPL"], "positions are never behind the mark"


def test_the_fold_goes_no_further_than_it_must(life: ScriptedLedger) -> None:
    """So that the next look at a busy portfolio finds a mark that is not behind it."""
    end = len(life.entries)
    for _ in range(4):
        life.fill("AAPL", "SELL", "1", "101")
    side = both_sides(life, unfolded=6)
    side.record = Record(past(life, end), life.portfolio.receivables)
    side.hot = HotPortfolio(3, mark_of(past(life, end - 1), life.prices()), "", hot_of(life, past(life, end + 1)))
    finding = side.compare()
    assert (finding.figures, finding.ledger_sequence) == ([], end + 1)


def test_a_mark_behind_the_fold_is_a_matter_of_waiting(life: ScriptedLedger) -> None:
    """It is a difference, and no comparison of figures: there is nothing to compare them with."""
    side = both_sides(life)
    behind = past(life, len(life.entries) - 1)
    side.hot = replace(side.hot, mark=mark_of(behind, life.prices()))
    finding = side.compare()
    assert (finding.figures, finding.is_broken) == (["ledger_sequence"], False)
    assert finding.drift == 1_500_000, "the interest is not shown yet"


def test_a_mark_ahead_of_the_ledger(life: ScriptedLedger) -> None:
    side = both_sides(life)
    assert side.with_mark(ledger_sequence=len(life.entries) + 1).figures == ["ledger_sequence"]


def test_without_a_mark_all_of_the_nav_is_adrift(life: ScriptedLedger) -> None:
    side = both_sides(life)
    side.hot = replace(side.hot, mark=None, missing="none")
    finding = side.compare()
    assert (finding.figures, finding.drift, finding.sequence) == (["mark"], life.nav(), 0)


def test_entries_that_do_not_fold(life: ScriptedLedger) -> None:
    side = both_sides(life, unfolded=2)
    side.entries = [structs.replace(side.entries[0], cost=1), side.entries[1]]
    with pytest.raises(LedgerMismatch):
        side.compare()
    side.entries = [structs.replace(life.entries[-2], amount=2**62)]
    with pytest.raises(LedgerMismatch, match="cash"):
        side.compare()


def test_a_mark_out_of_the_range_is_withheld_and_not_missed(life: ScriptedLedger) -> None:
    """Each position's value is in the range, their sum is not: the Book shows no NAV of 2^62 micro-units."""
    for number in range(9):
        life.fill(f"BIG{number}", "BUY", "1", "1")
        life.quote(f"BIG{number}", "570000000000")
    side = both_sides(life)
    assert life.nav() >= NAV_MAX_MICRO
    side.hot = replace(side.hot, mark=None, missing="none")
    finding = side.compare()
    assert (finding.figures, finding.drift) == ([], 0)


# -- splits -------------------------------------------------------------------------------------------------------


def test_prices_of_before_a_split_are_divided(life: ScriptedLedger) -> None:
    life.wait()
    life.split("AAPL", Fraction(4))
    side = both_sides(life)
    assert side.figures() == []
    side.life.splits.clear()
    assert set(side.figures()) == {"positions value", "hot position AAPL"}


def test_prices_of_both_sides_of_a_split(life: ScriptedLedger) -> None:
    life.wait()
    life.split("AAPL", Fraction(3, 2))
    side = both_sides(life)
    instant = to_ns(life.at)
    side.quotes.changes = [("AAPL", price("102", instant - 1)), ("AAPL", price("69", instant))]
    for shown in ("101", "102"):
        scaled = (Decimal(shown) * 2 / 3).quantize(Decimal("1e-12"))
        side.hot = replace(side.hot, mark=mark_of(life.portfolio, {"AAPL": scaled, "MSFT": Decimal(50)}))
        assert side.figures() == []
    side.hot = replace(side.hot, mark=mark_of(life.portfolio, {"AAPL": Decimal(69), "MSFT": Decimal(50)}))
    assert side.figures() == []


def test_a_late_split(life: ScriptedLedger) -> None:
    """The price since its instant is one of new shares, and stays what it is."""
    life.wait()
    life.quote("AAPL", "25.5")
    life.wait()
    life.split("AAPL", Fraction(4), late_by=timedelta(minutes=90))
    assert both_sides(life).figures() == []
