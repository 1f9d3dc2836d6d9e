"""Badges in a real PostgreSQL: proved in the transaction that books, once, and by nobody who has lost the shard."""

from __future__ import annotations

import runpy
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from engine.badge_book import BadgeBook, proofs_of
from engine.badges import (
    BadgeMessage,
    BadgeState,
    BadRuleError,
    Facts,
    Proof,
    badge_message_decoder,
    load_rules,
)
from engine.book import Account, Book, Holding
from engine.booking import Booked, DueStep, Record, StepPrices
from engine.corporate_actions import SplitAction
from engine.pnl import DayBase
from engine.stores.actions_postgres import ActionsStore
from engine.stores.badges_postgres import (
    BadgesStore,
    BatchProver,
    prove,
    read_rules,
    states_of,
    sync_rules,
)
from engine.stores.ledger_postgres import Fenced
from tests.bookkeeping import AT, fill, opening, reversal
from tests.books import Books, NoMarks, numbered, open_books

TOPIC = "badge-events"
RULES = load_rules()
SECTORS = {"AAPL": "Tech", "XOM": "Energy", "JPM": "Banks", "PFE": "Health", "BTC": "Crypto"}


@dataclass
class Proving:
    """A ledger and who books it: with a Book that has no prices, and badges in memory."""

    books: Books
    badges: BadgeBook = field(default_factory=lambda: BadgeBook(RULES))
    book: Book = field(default_factory=Book)
    topic: str = TOPIC

    async def send(self, *records: Record, shard: int = 0) -> Booked:
        turn = self.badges.turn(shard, self.book, lambda symbol: SECTORS.get(symbol, "UNCLASSIFIED"))
        prover = BatchProver(self.topic, turn)
        at = await self.books.next_offset(shard)
        booked = await self.books.writer.book(
            self.books.leases[shard], records, at, NoMarks(), AT, self.books.bury, {}, prover
        )
        for slot, name in enumerate(booked.opened):
            self.badges.open(name, shard, slot)
        self.badges.accept(turn.proofs)
        return booked

    async def outbox(self) -> list[BadgeMessage]:
        rows = await self.books.admin.fetch("SELECT * FROM outbox ORDER BY id")
        messages = [badge_message_decoder.decode(row["payload"]) for row in rows]
        assert [(row["event_id"], row["key"]) for row in rows] == [(m.event_id, m.portfolio_id) for m in messages]
        assert {row["topic"] for row in rows} <= {TOPIC}
        return messages

    async def states(self) -> dict[str, dict[str, BadgeState]]:
        return await states_of(self.books.admin, ["p-1", "p-2"], RULES)


@pytest.fixture
async def proving(fresh_database: str) -> AsyncIterator[Proving]:
    async with open_books(fresh_database) as books:
        await sync_rules(books.admin, RULES)
        yield Proving(books)


def five_sectors(name: str = "p-1") -> list[dict[str, Any]]:
    bought = [fill(name, "BUY", "1", "100", f"{name}-{symbol}", symbol) for symbol in SECTORS]
    return [opening(name), *bought]


# -- rules -------------------------------------------------------------------------------------------------


async def test_rules_are_added_once_and_a_changed_one_needs_a_new_version(proving: Proving) -> None:
    admin = proving.books.admin
    assert await sync_rules(admin, RULES) == 0
    assert sorted(await read_rules(admin), key=_name) == sorted(RULES, key=_name)
    changed = msgspec.structs.replace(RULES[0], threshold=Decimal(2))
    with pytest.raises(BadRuleError, match="first_fill:1"):
        await sync_rules(admin, [changed])
    assert await sync_rules(admin, [msgspec.structs.replace(changed, version=2)]) == 1
    assert len(await read_rules(admin)) == len(RULES) + 1


def _name(rule: Any) -> tuple[str, int]:
    return rule.badge_id, rule.version


# -- with the batch ----------------------------------------------------------------------------------------


async def test_what_a_batch_proves_is_committed_with_it(proving: Proving) -> None:
    listener = await _listen(proving.books)
    await proving.send(*numbered(*five_sectors()))
    first, diversified = await proving.outbox()
    assert (first.event_id, first.kind, first.at) == ("first_fill:1#p-1#1", "UNLOCKED", AT)
    assert (first.evidence.event_id, first.evidence.ledger_sequence) == ("p-1-AAPL", 2)
    assert (first.evidence.figure, first.evidence.threshold) == ("1", "1")
    assert (diversified.event_id, diversified.evidence.ledger_sequence) == ("diversified:1#p-1#1", 6)
    assert {one.sector: (one.value, one.weight) for one in diversified.evidence.sectors or ()} == dict.fromkeys(
        SECTORS.values(), ("100", "0.2")
    )
    assert diversified.evidence.prices == dict.fromkeys(SECTORS, None)
    unlocked = {"first_fill": BadgeState(True, 1), "diversified": BadgeState(True, 1)}
    assert await proving.states() == {"p-1": unlocked}
    assert await listener() == 1


async def test_a_batch_that_is_not_committed_proves_nothing(proving: Proving) -> None:
    proving.books.bury = _break  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        await proving.send(*numbered(*five_sectors(), fill("nobody", "BUY", "1", "1", "x")))
    assert (await proving.outbox(), await proving.states(), await proving.books.entries()) == ([], {}, [])


async def test_a_fenced_owner_proves_nothing(proving: Proving) -> None:
    await proving.send(*numbered(opening("p-1")))
    await proving.books.admin.execute("UPDATE shard SET epoch = epoch + 1")
    lease = proving.books.leases[0]
    with pytest.raises(Fenced):
        await proving.send(*numbered(*five_sectors()[1:], first=1))
    store = BadgesStore(proving.books.engine, TOPIC)
    with pytest.raises(Fenced):
        await store.prove(lease, _rich("p-1"))
    with pytest.raises(Fenced):
        await store.prove_held(lease, ["p-1"], lambda _: _rich("p-1"))
    assert (await proving.outbox(), await proving.states()) == ([], {})


async def test_a_redelivered_event_proves_nothing_twice(proving: Proving) -> None:
    events = five_sectors()
    await proving.send(*numbered(*events))
    again = Proving(proving.books)  # a new owner, who has not even loaded what is known
    await again.send(*numbered(*events, first=len(events)))
    assert len(await proving.outbox()) == 2
    # One that does not know what is unlocked, and books more, is put right by the table.
    await again.send(*numbered(fill("p-1", "BUY", "1", "100", "more"), first=2 * len(events)))
    assert len(await proving.outbox()) == 2
    assert (await proving.states())["p-1"]["first_fill"] == BadgeState(True, 1)


async def test_fills_and_streak_are_kept_with_the_portfolio(proving: Proving) -> None:
    await proving.send(
        *numbered(
            opening("p-1"),
            fill("p-1", "BUY", "1", "10", "b1"),
            fill("p-1", "SELL", "1", "11", "s1"),
            fill("p-1", "BUY", "1", "10", "b2"),
            reversal("p-1", "b2", "r"),
        )
    )
    row = await proving.books.admin.fetchrow("SELECT fills, streak FROM portfolio")
    assert tuple(row) == (2, 0), "a reversal begins the row anew"
    await proving.send(*numbered(fill("p-1", "BUY", "1", "10", "b3"), fill("p-1", "SELL", "1", "11", "s3"), first=5))
    row = await proving.books.admin.fetchrow("SELECT fills, streak FROM portfolio")
    assert tuple(row) == (4, 1)
    await proving.send(*numbered(fill("p-1", "BUY", "1", "10", "b4"), fill("p-1", "SELL", "1", "9", "s4"), first=7))
    row = await proving.books.admin.fetchrow("SELECT fills, streak FROM portfolio")
    assert tuple(row) == (6, 0)


async def test_a_split_proves_in_its_own_transaction(proving: Proving) -> None:
    """A late split makes one position worth eight times as much as the other four together: Diversified lapses."""
    await proving.send(*numbered(*five_sectors()))
    store, lease = ActionsStore(proving.books.engine), proving.books.leases[0]
    action = SplitAction(action_id="a", symbol="AAPL", ratio="80", effective_at=AT + timedelta(days=1))
    await store.record(lease, "log", {0: 1}, [action], AT)
    (known,) = await store.known(0)
    prices = StepPrices(Decimal(100), Decimal(100))
    turn = proving.badges.turn(0, _book_of_five(), SECTORS.__getitem__)
    due = DueStep(known.steps[0], prices, False, known.content_hash)
    await store.book(lease, [due], AT, {}, BatchProver(TOPIC, turn))
    lapsed = (await proving.outbox())[-1]
    assert (lapsed.event_id, lapsed.kind) == ("diversified:1#p-1#2", "LAPSED")
    assert lapsed.evidence.event_id == "a#p-1"
    assert lapsed.evidence.prices == dict.fromkeys(SECTORS, "100")
    assert (await proving.states())["p-1"]["diversified"] == BadgeState(False, 2)


# -- on its own --------------------------------------------------------------------------------------------


async def test_the_oldest_position_is_read_where_it_is_proved(proving: Proving) -> None:
    events = five_sectors()
    events[2]["executed_at"] = "2026-10-01T00:00:00Z"  # which is no reason to believe that it was
    await proving.send(*numbered(*events, opening("p-2")))
    executed_at, since = datetime(2026, 10, 1, tzinfo=UTC), AT - timedelta(days=50)
    await proving.books.admin.execute("UPDATE position SET held_since = $1 WHERE symbol = 'XOM'", since)
    store = BadgesStore(proving.books.engine, TOPIC)
    oldest, proofs = await store.prove_held(
        proving.books.leases[0], ["p-1", "p-2", "none"], lambda one: proving.badges.held_long(one, AT)
    )
    assert [(one.portfolio_id, one.symbol, one.ledger_sequence) for one in oldest] == [("p-1", "XOM", 6)]
    held = (await proving.outbox())[-1]
    assert (held.badge_id, held.evidence.symbol, held.evidence.figure) == ("diamond_hands", "XOM", "50")
    assert (held.evidence.opened_at, held.evidence.since) == (executed_at, since)
    assert len(proofs) == 1


async def test_without_a_lease_the_first_of_two_counts(proving: Proving) -> None:
    await proving.send(*numbered(opening("p-1"), opening("p-2")))
    rules = [rule for rule in RULES if rule.badge_id == "untouchable"]
    facts = Facts(sharpe=Decimal("2.5"))
    proofs = [one for name in ("p-1", "p-2") for one in proofs_of(rules, {}, name, facts, AT, since=AT, until=AT)]
    assert [one.portfolio_id for one in await prove(proving.books.admin, TOPIC, proofs)] == ["p-1", "p-2"]
    assert await prove(proving.books.admin, TOPIC, proofs) == []
    assert [message.event_id for message in await proving.outbox()] == ["untouchable:1#p-1#1", "untouchable:1#p-2#1"]
    known = (await states_of(proving.books.admin, ["p-1"], RULES))["p-1"]
    assert proofs_of(rules, known, "p-1", facts, AT) == []


async def test_states_of_an_old_version_are_not_those_of_the_new_one(proving: Proving) -> None:
    await proving.send(*numbered(*five_sectors()))
    newer = [msgspec.structs.replace(RULES[0], version=2)]
    assert await states_of(proving.books.admin, ["p-1"], newer) == {}
    assert (await states_of(proving.books.admin, ["p-1"], RULES[:1]))["p-1"].keys() == {"first_fill"}


def _rich(name: str) -> list[Proof]:
    whale = [rule for rule in RULES if rule.badge_id == "whale"]
    return proofs_of(whale, {}, name, Facts(nav=2_000_000_000_000), AT, nav="2000000")


def _book_of_five() -> Book:
    book = Book()
    for symbol in SECTORS:
        book.tick(symbol, Decimal(100), 1)
    holdings = [Holding(symbol, Decimal(1), 100_000_000, 0) for symbol in SECTORS]
    book.open("p-1", 0, Account(0, 0, 0, 0, 0, 0, 0, 0, 6, DayBase(0, 1, 0)), holdings)
    return book


async def _break(letters: object) -> None:
    raise ConnectionError("Kafka is away")


async def _listen(books: Books) -> Any:
    heard: list[object] = []
    await books.admin.add_listener("outbox", lambda *told: heard.append(told))

    async def count() -> int:
        await books.admin.execute("SELECT 1")
        return len(heard)

    return count


# -- ledgers that were there before ------------------------------------------------------------------------


async def test_the_migration_counts_what_the_ledgers_come_to(proving: Proving) -> None:
    wins = [
        event
        for n in range(3)
        for event in (fill("p-1", "BUY", "2", "10", f"b{n}"), fill("p-1", "SELL", "2", "11", f"s{n}"))
    ]
    loss = [fill("p-1", "BUY", "1", "10", "b-"), fill("p-1", "SELL", "1", "10", "s-")]  # nothing gained is no profit
    flips = [fill("p-2", "BUY", "1", "10", "f1"), fill("p-2", "SELL", "3", "12", "f2", fee="1")]
    flips += [fill("p-2", "BUY", "3", "10", "f3"), reversal("p-2", "f3", "f4")]
    after = [fill("p-3", "BUY", "1", "10", "g1"), fill("p-3", "SELL", "1", "12", "g2"), reversal("p-3", "g2", "g3")]
    after += [fill("p-3", "SELL", "1", "11", "g4"), fill("p-3", "SELL", "1", "11", "g5"), reversal("p-3", "g5", "g6")]
    for n in range(3):
        after += [fill("p-3", "BUY", "1", "10", f"h{n}"), fill("p-3", "SELL", "1", "12" if n else "9", f"i{n}")]
    sent = (opening("p-1"), *wins[:2], *loss, *wins[2:], opening("p-2"), *flips, opening("p-3"), *after)
    await proving.send(*numbered(*sent))
    kept = "SELECT id, fills, streak FROM portfolio ORDER BY id"
    booked = [tuple(row) for row in await proving.books.admin.fetch(kept)]
    assert booked == [("p-1", 8, 2), ("p-2", 2, 0), ("p-3", 8, 2)]
    await proving.books.admin.execute("UPDATE portfolio SET fills = 0, streak = 0")
    for migration, statements in (
        ("0004_badges", ("_COUNT_FILLS", "_COUNT_STREAKS")),
        ("0006_badge_truth", ("_COUNT_STREAKS",)),
    ):
        for name in statements:
            await proving.books.admin.execute(runpy.run_path(f"alembic/versions/{migration}.py")[name])
    assert [tuple(row) for row in await proving.books.admin.fetch(kept)] == booked


async def test_the_migration_says_since_when_positions_are_held(proving: Proving) -> None:
    long_ago = fill("p-1", "BUY", "1", "10", "b1") | {"executed_at": "2026-10-01T00:00:00Z"}
    soon = fill("p-1", "BUY", "1", "10", "b2", "XOM") | {"executed_at": "2026-12-31T00:00:00Z"}
    await proving.send(*numbered(opening("p-1"), long_ago, soon))
    kept = "SELECT symbol, held_since FROM position ORDER BY symbol"
    booked = [tuple(row) for row in await proving.books.admin.fetch(kept)]
    assert booked == [("AAPL", AT), ("XOM", datetime(2026, 12, 31, tzinfo=UTC))]
    await proving.books.admin.execute("UPDATE position SET held_since = 'epoch'")
    await proving.books.admin.execute(runpy.run_path("alembic/versions/0006_badge_truth.py")["_HOLD"])
    assert [tuple(row) for row in await proving.books.admin.fetch(kept)] == booked
