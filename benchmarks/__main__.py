"""`python -m benchmarks [NAME …]`: run benchmarks, all by default."""

from __future__ import annotations

import sys

from benchmarks import (
    badge_stream,
    badges,
    book,
    booking,
    curves,
    daily_badges,
    delivery,
    history,
    hot_write,
    ledger,
    million,
    pipeline,
    projection,
    recovery,
    seed_system,
)

BENCHMARKS = {
    "badge_stream": badge_stream.run,
    "badges": badges.run,
    "book": book.run,
    "booking": booking.run,
    "curves": curves.run,
    "daily_badges": daily_badges.run,
    "delivery": delivery.run,
    "history": history.run,
    "hot_write": hot_write.run,
    "ledger": ledger.run,
    "million": million.run,
    "recovery": recovery.run,
    "pipeline": pipeline.run,
    "projection": projection.run,
    "seed_system": seed_system.run,
}


def main() -> None:
    chosen = sys.argv[1:] or list(BENCHMARKS)
    unknown = set(chosen) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    for name in chosen:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
