"""Goal 7: a source whose every request takes 10 ms, read at fixed depths, and at the one that is found.

The delay is injected where a file is read. A request waits and holds no core, as one to a far machine does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from goals.raw import Line, column, has, load, middle

NAME = "slow"
DELAY_SECONDS = 0.01
REQUEST_BYTES = 1 << 20
WORKERS = 2
# Threads, and the requests of each at a time.
DEPTHS = {
    "1": (1, 1),
    "2": (2, 1),
    "4": (2, 2),
    "10": (2, 5),
    "20": (4, 5),
    "40": (8, 5),
    "65": (13, 5),
}
FOUND = "found by measuring"


def run(checkpoint: Path) -> None:
    """One round, in a process of its own: a child of a process that imported torch seems large."""
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("slow_place.py")), str(checkpoint.parent)],
        check=True,
    )


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    if not has(raw, *DEPTHS, FOUND):
        return []
    found = []
    for name, (threads, at_once) in DEPTHS.items():
        bound = threads * at_once * REQUEST_BYTES / DELAY_SECONDS
        found.append(
            Line(
                7,
                f"10 ms a request, {threads} threads with {at_once} requests each",
                "goals/slow_place.py",
                tuple(rate / 1e6 for rate in column(raw, name, "rate")),
                "MB/s",
                middle(raw, name, "rate") / bound,
                f"{name} requests of 1 MiB each 10 ms: {bound / 1e6:,.0f} MB/s",
                limit=f"{middle(raw, name, 'most'):.0f} requests at a time counted",
            )
        )
    best = max(DEPTHS, key=lambda name: middle(raw, name, "rate"))
    rate = middle(raw, best, "rate")
    return [
        *found,
        Line(
            7,
            f"10 ms a request, depth {FOUND}",
            "goals/slow_place.py",
            tuple(rate / 1e6 for rate in column(raw, FOUND, "rate")),
            "MB/s",
            middle(raw, FOUND, "rate") / rate,
            f"the best fixed depth, {best}: {rate / 1e6:,.0f} MB/s",
            least=0.8,
            limit=f"{middle(raw, FOUND, 'most'):.0f} requests at a time counted; begins with {WORKERS}",
        ),
    ]
