"""The hub's slots: newest value, count of what it stands for, order, and nothing left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from api.hub import Hub
from engine.marks import decode_mark
from engine.messages import Quote
from tests.builders import MarkRow

MARK = decode_mark(MarkRow(nav=1, cash=1).pack(), epoch=1)


def quote(symbol: str, price: str = "1", ts_event_ns: int = 1) -> Quote:
    return Quote(symbol, price, ts_event_ns, "SIM", None)


async def test_marks_conflate_and_never_go_back() -> None:
    hub, signal = Hub(), asyncio.Event()
    with hub.watch_portfolio(0, "p", signal) as slot:
        assert slot.take() is None
        for epoch, sequence in ((1, 5), (1, 4), (1, 6), (1, 6), (2, 1), (1, 99)):
            hub.deliver_marks([((0, "p"), replace(MARK, epoch=epoch, sequence=sequence))])
        assert signal.is_set()
        taken = slot.take()
        assert taken == (replace(MARK, epoch=2, sequence=1), 3)
        assert slot.take() is None


async def test_a_watch_is_read_once_its_channel_is_live() -> None:
    hub, signal = Hub(), asyncio.Event()
    with hub.watch_portfolio(0, "p", signal):
        assert not hub.unread_signal.is_set()
        hub.shard_live(0, True)
        assert hub.take_unread() == ({(0, "p")}, set())
        with hub.watch_portfolio(0, "q", signal), hub.watch_quotes(["A"], signal):
            assert hub.take_unread() == ({(0, "q")}, set())
            hub.quotes_live(True)
            assert hub.take_unread() == (set(), {"A"})
        hub.put_back({(0, "p"), (0, "q")}, {"A"})
        assert hub.take_unread() == ({(0, "p")}, set())


async def test_quotes_wait_for_the_first_fill_and_keep_what_overtook_it() -> None:
    hub, signal = Hub(), asyncio.Event()
    with hub.watch_quotes(["A", "B"], signal) as slot:
        hub.deliver_quotes([quote("A", "2", 2), quote("C")])
        assert slot.take() is None and not signal.is_set()
        hub.fill_quotes(["A", "B"], {"A": quote("A", "1", 1), "B": quote("B")})
        assert slot.take() == ({"A": quote("A", "2", 2), "B": quote("B")}, 2)
        signal.clear()
        # Read again after a gap: what was shown already, or is older, is not shown again.
        hub.fill_quotes(["A", "B"], {"A": quote("A", "1", 1), "B": quote("B")})
        assert slot.take() is None and not signal.is_set()
        slot.change(["B"])
        hub.deliver_quotes([quote("A", "3", 3), quote("B", "4", 4)])
        assert slot.take() == ({"B": quote("B", "4", 4)}, 1)


async def test_quotes_follow_each_other_whatever_their_sources_stamped() -> None:
    hub, signal = Hub(), asyncio.Event()
    hub.quotes_live(True)
    with hub.watch_quotes(["A"], signal) as slot:
        hub.take_unread()
        hub.fill_quotes(["A"], {"A": quote("A", "1", ts_event_ns=50)})
        assert slot.take() == ({"A": quote("A", "1", 50)}, 1)
        hub.deliver_quotes([quote("A", "2", ts_event_ns=40)])
        assert slot.take() == ({"A": quote("A", "2", 40)}, 1)
        # After a gap `prices` counts, also when it is stamped earlier than what a frame said before.
        hub.reread_quotes()
        hub.take_unread()
        hub.fill_quotes(["A"], {"A": quote("A", "3", ts_event_ns=30)})
        assert slot.take() == ({"A": quote("A", "3", 30)}, 1)


async def test_a_frame_beats_the_read_that_it_overtook_and_no_later_one() -> None:
    hub, signal = Hub(), asyncio.Event()
    hub.quotes_live(True)
    with hub.watch_quotes(["A"], signal) as slot:
        hub.take_unread()
        hub.deliver_quotes([quote("A", "2")])
        hub.fill_quotes(["A"], {"A": quote("A", "1")})
        assert slot.take() == ({"A": quote("A", "2")}, 1)
        # A reading that fails is none: the frame came before the one that succeeds.
        hub.reread_quotes()
        places, symbols = hub.take_unread()
        hub.deliver_quotes([quote("A", "3")])
        hub.put_back(places, symbols)
        hub.take_unread()
        hub.fill_quotes(["A"], {"A": quote("A", "4")})
        assert slot.take() == ({"A": quote("A", "4")}, 2)


async def test_a_slot_is_current_while_its_channel_is_live_and_heard() -> None:
    hub, signal = Hub(), asyncio.Event()
    with hub.watch_portfolio(0, "p", signal) as slot:
        hub.deliver_marks([((0, "p"), MARK)])
        assert slot.take() == (MARK, 1) and not slot.current
        hub.shard_live(0, True)
        hub.deliver_marks([((0, "p"), MARK)])
        assert slot.take() == (MARK, 0) and slot.current
        hub.deliver_marks([((0, "p"), MARK)])
        assert slot.take() is None
        hub.shard_live(0, False)
        assert not slot.current
        hub.shard_live(0, True)
        hub.shard_heard(0, False)
        hub.deliver_marks([((0, "p"), MARK)])
        assert slot.take() is None and not slot.current
        hub.take_unread()
        hub.shard_heard(0, True)
        assert hub.take_unread() == ({(0, "p")}, set())
        # What a Redis restored from an old copy says is not what was shown.
        hub.deliver_marks([((0, "p"), replace(MARK, sequence=0))])
        assert slot.take() is None and not slot.current
        hub.deliver_marks([((0, "p"), MARK)])
        assert slot.take() == (MARK, 0) and slot.current


async def test_nothing_is_left_behind() -> None:
    hub, signal = Hub(), asyncio.Event()
    with hub.watch_portfolio(0, "p", signal), hub.watch_portfolio(0, "p", signal), hub.watch_quotes(["A"], signal):
        assert (hub.shards(), hub.watches_quotes(), hub.watches_count) == ({0}, True, 3)
    assert (hub.shards(), hub.watches_quotes(), hub.watches_count) == (set(), False, 0)
    hub.deliver_marks([((0, "p"), MARK)])
    hub.deliver_quotes([quote("A")])
