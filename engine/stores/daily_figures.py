"""The figures of engine.badges that are judged once a day, at a session close, for many portfolios at a time.

    sharpe           engine.performance's ratio, 252 days a year, over the last snapshots of the UTC days of the window
                     up to the close; the running day does not count. None under 20 days, and where it is undefined.
    sector profits   by sector, Σ over its symbols of
                         value at the close − value at the beginning of the window + Σ (amount − fee + receivable)
                     of the entries between them: explain's P&L of these symbols. The beginning is the last snapshot at
                     or before close − window, or the opening. Sectors are by the classification in force at the close.
                     UNCLASSIFIED is none, and P&L without a symbol belongs to no sector.

A portfolio without a snapshot at the close has no figures. Values are recorded prices × quantities; where these do not
add up to what the snapshots say (a position without a price, a fill in the shares of before a split), sector profits
are unknown: nothing is invented.

Reading the window of a Sharpe ratio is one look-up in an index per portfolio and day; that of sector profits reads
the window's entries.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from engine.amounts import to_micro, value_micro
from engine.assets import UNCLASSIFIED
from engine.badges import Predicate, Rule
from engine.equity_curve import EquityPoint, Flow, curve, opening, present_ratio
from engine.instants import DAY_NS, to_datetime, to_ns
from engine.ledger import EXTERNAL_FLOWS
from engine.marks import MarkQuality
from engine.performance import SESSIONS_PER_YEAR, StatisticReason, day_returns
from engine.performance import sharpe as sharpe_of
from engine.sessions import Sessions
from engine.stores.ledger_reads import PoolSource
from engine.stores.outbox import Connection

# Of one statement and one turn of the loop, which so many hold for some 20 ms.
CHUNK_COUNT = 50
REMEMBERED_COUNT_MAX = 5_000

_POINTS = """
    SELECT p.id, p.opened_at, s.at, (s.nav * 1000000)::bigint, s.ledger_sequence
    FROM portfolio AS p
    JOIN equity_snapshot AS ends ON ends.portfolio_id = p.id AND ends.at = $3
    CROSS JOIN generate_series(date_trunc('day', $2::timestamptz, 'UTC'), $3::timestamptz, interval '24 hours') AS day
    CROSS JOIN LATERAL (
        SELECT at, nav, ledger_sequence FROM equity_snapshot
        WHERE portfolio_id = p.id AND at >= greatest(day, $2) AND at < day + interval '24 hours' AND at <= $3
        ORDER BY at DESC LIMIT 1
    ) AS s WHERE p.id = ANY($1::text[]) ORDER BY p.id, s.at
"""
_FLOWS = """
    SELECT portfolio_id, recorded_at, sequence, (amount * 1000000)::bigint, (nav_before * 1000000)::bigint
    FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS span (id, after, last)
    JOIN ledger_entry AS e ON e.portfolio_id = span.id AND e.sequence > span.after AND e.sequence <= span.last
    WHERE e.kind = ANY($4::text[]) AND e.nav_before IS NOT NULL ORDER BY portfolio_id, sequence
"""
_MOVED = "CASE WHEN e.kind = 'SPLIT' OR e.side = 'BUY' THEN e.quantity ELSE -e.quantity END"
_TRADED = "e.kind IN ('FILL', 'SPLIT')"
# What was held at both ends follows from what is held now, so that no more than the window's entries are read.
_ENDS = f"""
    WITH ends AS MATERIALIZED (
        SELECT p.id, f.ledger_sequence AS last, f.positions_value AS value_to, s.at AS begins_at,
            coalesce(s.ledger_sequence, 0) AS after, coalesce(s.positions_value, 0) AS value_from
        FROM portfolio AS p
        JOIN equity_snapshot AS f ON f.portfolio_id = p.id AND f.at = $2
        LEFT JOIN LATERAL (
            SELECT at, ledger_sequence, positions_value FROM equity_snapshot
            WHERE portfolio_id = p.id AND at <= $3 ORDER BY at DESC LIMIT 1
        ) AS s ON true
        WHERE p.id = ANY($1::text[]) AND (s.at IS NOT NULL OR p.opened_at >= $3)
    ), moved AS MATERIALIZED (
        SELECT ends.id, e.symbol,
            coalesce(sum({_MOVED}) FILTER (WHERE {_TRADED} AND e.sequence > ends.last), 0) AS later,
            coalesce(sum({_MOVED}) FILTER (WHERE {_TRADED} AND e.sequence <= ends.last), 0) AS within,
            coalesce(sum(e.amount - e.fee + e.receivable) FILTER (WHERE e.sequence <= ends.last), 0) AS paid
        FROM ends JOIN ledger_entry AS e
            ON e.portfolio_id = ends.id AND e.sequence > ends.after AND e.symbol IS NOT NULL
        GROUP BY ends.id, e.symbol
    ), held AS (
        SELECT ends.id, p.symbol, p.quantity FROM ends JOIN position AS p ON p.portfolio_id = ends.id
    )
    SELECT id, symbol, coalesce(held.quantity, 0) - coalesce(moved.later, 0) AS quantity_to,
        coalesce(held.quantity, 0) - coalesce(moved.later, 0) - coalesce(moved.within, 0) AS quantity_from,
        coalesce(moved.paid, 0) AS paid, ends.begins_at, ends.value_from, ends.value_to, ends.last
    FROM held FULL JOIN moved USING (id, symbol) JOIN ends USING (id)
"""  # noqa: S608 -- constants of this module only
_PRICES = """
    SELECT asked.symbol, asked.at, known.price
    FROM unnest($1::text[], $2::timestamptz[]) AS asked (symbol, at) CROSS JOIN LATERAL (
        SELECT price FROM price_close WHERE symbol = asked.symbol AND at <= asked.at ORDER BY at DESC LIMIT 1
    ) AS known
"""
_SECTORS = """
    SELECT asked.symbol, coalesce((
        SELECT sector FROM asset_version WHERE symbol = asked.symbol AND effective_at <= $2
        ORDER BY version DESC LIMIT 1
    ), (SELECT sector FROM asset WHERE symbol = asked.symbol)) FROM unnest($1::text[]) AS asked (symbol)
"""
_HAS_SNAPSHOT = "SELECT EXISTS (SELECT FROM equity_snapshot WHERE portfolio_id = $1 AND at = $2)"
_OPENED_FLOWS = [kind.value for kind in EXTERNAL_FLOWS]


@dataclass(frozen=True, slots=True)
class SectorProfits:
    """By sector, in micro-units, over the entries up to `ledger_sequence`; UNCLASSIFIED is left out."""

    by_sector: Mapping[str, int]
    ledger_sequence: int

    @property
    def count(self) -> int:
        return sum(profit > 0 for profit in self.by_sector.values())


@dataclass(frozen=True, slots=True)
class DailyFigures:
    """A portfolio's, by the rules that are current; None is unknown."""

    sharpe: Decimal | None = None
    sector_profits: int | None = None


def last_close_ns(sessions: Sessions | None, now_ns: int) -> int:
    """The last session close, or where there is no exchange the last midnight."""
    return now_ns // DAY_NS * DAY_NS if sessions is None else sessions.last_close(now_ns)


async def read_sharpe(
    connection: Connection, ids: Sequence[str], closed_at: datetime, window_days: int, sessions: Sessions | None
) -> dict[str, Decimal]:
    """Those that have one, of portfolios that have a snapshot at `closed_at`."""
    begin = closed_at - timedelta(days=window_days)
    points: dict[str, list[EquityPoint]] = defaultdict(list)
    for name, opened_at, at, nav, seen in await connection.fetch(_POINTS, ids, begin, closed_at):
        if not points[name] and opened_at >= begin:
            points[name].append(opening(to_ns(opened_at)))
        points[name].append(EquityPoint(to_ns(at), nav, MarkQuality.LIVE, seen))
    spans = [(name, of[0].ledger_sequence, of[-1].ledger_sequence) for name, of in points.items()]
    flows: dict[str, list[Flow]] = defaultdict(list)
    if spans:
        for name, *flow in await connection.fetch(_FLOWS, *map(list, zip(*spans, strict=True)), _OPENED_FLOWS):
            flows[name].append(Flow(to_ns(flow[0]), *flow[1:]))
    found = {}
    for name, of in points.items():
        returns = day_returns(curve(of, flows[name]), SESSIONS_PER_YEAR, sessions)
        if isinstance(returns, StatisticReason):
            continue
        ratio = sharpe_of([one.value for one in returns], SESSIONS_PER_YEAR)
        shown = None if isinstance(ratio, StatisticReason) else present_ratio(ratio)
        if shown is not None:
            found[name] = shown
    return found


async def read_sector_profits(
    connection: Connection, ids: Sequence[str], closed_at: datetime, window_days: int
) -> dict[str, SectorProfits]:
    """Those that are known, of portfolios that have a snapshot at `closed_at`."""
    rows = await connection.fetch(_ENDS, ids, closed_at, closed_at - timedelta(days=window_days))
    symbols = sorted({row["symbol"] for row in rows})
    sectors = dict(map(tuple, await connection.fetch(_SECTORS, symbols, closed_at)))
    instants = sorted({closed_at, *(row["begins_at"] for row in rows if row["begins_at"] is not None)})
    asked = [(symbol, at) for at in instants for symbol in symbols]
    prices = {}
    if asked:
        priced = await connection.fetch(_PRICES, *map(list, zip(*asked, strict=True)))
        prices = {(symbol, at): price for symbol, at, price in priced}
    of_portfolio = defaultdict(list)
    for row in rows:
        of_portfolio[row["id"]].append(row)
    found = {}
    for name, own in of_portfolio.items():
        value_from = value_to = 0
        profits: dict[str, int] = defaultdict(int)
        for row in own:
            begins = _value(row["quantity_from"], prices.get((row["symbol"], row["begins_at"])))
            ends = _value(row["quantity_to"], prices.get((row["symbol"], closed_at)))
            value_from, value_to = value_from + begins, value_to + ends
            profits[sectors.get(row["symbol"]) or UNCLASSIFIED] += ends - begins + to_micro(row["paid"])
        if (value_from, value_to) == (to_micro(own[0]["value_from"]), to_micro(own[0]["value_to"])):
            profits.pop(UNCLASSIFIED, None)
            found[name] = SectorProfits(profits, own[0]["last"])
    return found


def _value(quantity: Decimal, price: Decimal | None) -> int:
    # Without a price the sums will not be the snapshots'.
    return 0 if not quantity or price is None else value_micro(quantity, price)


class DailyFigureReads:
    """What one portfolio's daily figures are, for who looks at it; remembered until the next close.

    Raises OSError, TimeoutError, asyncpg.PostgresError or asyncpg.InterfaceError when PostgreSQL is away.
    """

    def __init__(self, pool: PoolSource, sessions: Sessions | None) -> None:
        self._pool = pool
        self._sessions = sessions
        self._known: OrderedDict[str, tuple[int, DailyFigures]] = OrderedDict()

    async def of(self, portfolio_id: str, rules: Iterable[Rule], now_ns: int) -> DailyFigures:
        """As of the last close that the portfolio has a snapshot of, or of the one before."""
        close_ns = last_close_ns(self._sessions, now_ns)
        known = self._known.get(portfolio_id)
        if known is not None and known[0] == close_ns:
            return known[1]
        pool = self._pool()
        if not await pool.fetchval(_HAS_SNAPSHOT, portfolio_id, to_datetime(close_ns)):
            # It may still be under way.
            return await self._read(portfolio_id, rules, last_close_ns(self._sessions, close_ns - 1))
        figures = await self._read(portfolio_id, rules, close_ns)
        self._known[portfolio_id] = (close_ns, figures)
        if len(self._known) > REMEMBERED_COUNT_MAX:
            self._known.popitem(last=False)
        return figures

    async def _read(self, portfolio_id: str, rules: Iterable[Rule], close_ns: int) -> DailyFigures:
        windows = {rule.predicate: rule.window_days for rule in rules}
        closed_at, ids = to_datetime(close_ns), [portfolio_id]
        sharpe, profits = None, None
        async with self._pool().acquire() as connection:
            if Predicate.SHARPE in windows:
                days = windows[Predicate.SHARPE]
                sharpe = (await read_sharpe(connection, ids, closed_at, days, self._sessions)).get(portfolio_id)
            if Predicate.SECTOR_PROFITS in windows:
                days = windows[Predicate.SECTOR_PROFITS]
                profits = (await read_sector_profits(connection, ids, closed_at, days)).get(portfolio_id)
        return DailyFigures(sharpe, None if profits is None else profits.count)
