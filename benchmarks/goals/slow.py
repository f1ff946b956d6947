"""Goal 7: a source whose every request takes 10 ms, read with 1 to 64 requests at a time.

The delay is injected where a file is read. A request waits and holds no core, as one to a far machine does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from goals.raw import Line, column, load, middle

NAME = "slow"
DELAY_SECONDS = 0.01
REQUEST_BYTES = 1 << 20
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
WORKERS = 2


def run(checkpoint: Path) -> None:
    """One round, in a process of its own: a child of a process that imported torch seems large."""
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("slow_place.py")), str(checkpoint.parent)],
        check=True,
    )


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    found = []
    for depth in DEPTHS:
        rates = column(raw, f"{depth}", "rate")
        if not rates:
            continue
        bound = WORKERS * depth * REQUEST_BYTES / DELAY_SECONDS
        found.append(
            Line(
                7,
                f"10 ms a request, {depth} at a time in each of {WORKERS} threads",
                "goals/slow_place.py",
                tuple(rate / 1e6 for rate in rates),
                "MB/s",
                middle(raw, f"{depth}", "rate") / bound,
                f"requests in flight x 1 MiB / 10 ms: {bound / 1e6:,.0f} MB/s",
            )
        )
    return found
