"""What the figures of a session close prove of SHARPE and SECTOR_PROFITS (engine.stores.daily_figures).

The daily job writes these proofs, and whoever verifies an award makes the same ones again: both are about the close,
`at` and `until`, and the window of the rule that ends with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from engine.amounts import from_micro, plain
from engine.badges import BadgeState, Evidence, Facts, Predicate, Proof, Rule, SectorEvidence, transitions
from engine.sessions import Sessions
from engine.stores.daily_figures import SectorProfits, read_sector_profits, read_sharpe
from engine.stores.outbox import Connection

_NO_STATES: Mapping[str, BadgeState] = {}


async def daily_proofs(
    connection: Connection, rule: Rule, ids: Sequence[str], closed_at: datetime, sessions: Sessions | None
) -> list[Proof]:
    """Of those portfolios that meet the rule at a close, as if nobody had the badge yet."""
    if rule.predicate is Predicate.SHARPE:
        ratios = await read_sharpe(connection, ids, closed_at, rule.window_days, sessions)
        judged = [_proof(rule, name, Facts(sharpe=ratio), closed_at, None) for name, ratio in ratios.items()]
    else:
        profits = await read_sector_profits(connection, ids, closed_at, rule.window_days)
        judged = [
            _proof(rule, name, Facts(sector_profits=found.count), closed_at, found) for name, found in profits.items()
        ]
    return [proof for proof in judged if proof is not None]


def _proof(
    rule: Rule, portfolio_id: str, facts: Facts, closed_at: datetime, profits: SectorProfits | None
) -> Proof | None:
    sectors = None
    if profits is not None:
        ordered = sorted(profits.by_sector.items())
        sectors = [SectorEvidence(sector=sector, value=plain(from_micro(profit))) for sector, profit in ordered]
    for transition in transitions([rule], _NO_STATES, facts, closed_at):
        evidence = Evidence(
            figure=plain(transition.figure),
            threshold=plain(rule.threshold),
            predicate=rule.predicate,
            ledger_sequence=None if profits is None else profits.ledger_sequence,
            sectors=sectors,
            since=closed_at - timedelta(days=rule.window_days),
            until=closed_at,
        )
        return Proof(portfolio_id, transition, evidence)
    return None
