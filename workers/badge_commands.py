"""What `navstream badges verify` does: derive every award again, and name what does not come out."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from engine.assets import AssetClass
from engine.badge_proofs import LAG_MAX, ONE_WAY, RECORDED_LAG_MAX, BadgeFault
from engine.instants import to_datetime
from engine.markets import Markets
from engine.runtime.clock import make_clock
from engine.runtime.command_line import console
from engine.runtime.connections import connect_postgres
from engine.runtime.settings import Settings
from engine.stores.badge_verification import BadgeVerification, VerifiedBadges

# How much is done, and of how much.
Progress = Callable[[int, int], None]


def print_verified(verified: VerifiedBadges, elapsed_s: float) -> None:
    rate = verified.awards_count / max(elapsed_s, 1e-3)
    unrecorded = f", {verified.unrecorded_count} of snapshots no longer kept" if verified.unrecorded_count else ""
    console.print(
        f"{verified.portfolios_count} portfolios, {verified.awards_count} awards, {verified.events_count} events "
        f"({rate:,.0f} awards a second){unrecorded}, {verified.faults_count} faults",
        highlight=False,
    )
    for predicate, said in ONE_WAY.items():
        console.print(f"of {predicate} an award that left no trace may go unseen: {said}", highlight=False)


def print_fault(fault: BadgeFault) -> None:
    text = f"{fault.portfolio_id} {fault.badge_id}:{fault.version}: {fault.kind}: {fault.detail}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


async def verify_badges(
    settings: Settings, portfolio_id: str | None, report: Callable[[BadgeFault], None], progress: Progress
) -> VerifiedBadges:
    """Raises KeyError for a portfolio that does not exist, and what asyncpg raises when PostgreSQL is away."""
    pool = await connect_postgres(settings.model_copy(update={"postgres_pool_size": 1}), "badges-verify")
    try:
        async with pool.acquire() as connection:
            total = await connection.fetchval("SELECT count(*) FROM portfolio") if portfolio_id is None else 1
            sessions = Markets(settings.calendars).sessions(AssetClass.EQUITY)
            kept = timedelta(days=min(settings.snapshot_retention_days, settings.price_close_retention_days))
            lag_max = RECORDED_LAG_MAX if settings.market_clock else LAG_MAX
            verification = BadgeVerification(connection, sessions, report, kept, lag_max)
            now = to_datetime(make_clock(settings.market_clock).now_ns())
            return await verification.verify(
                portfolio_id, now, lambda verified: progress(verified.portfolios_count, total)
            )
    finally:
        pool.terminate()
