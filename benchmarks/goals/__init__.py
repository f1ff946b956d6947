"""One module for each group of goals: it measures, and says what the measurements mean.

`run` measures one round and appends to the raw data. `lines` turns raw data into lines of the report.
"""

from pathlib import Path
from typing import Protocol

from goals import cold, limited, memory, metadata, network, peers, ranks, slow, start, whole
from goals.raw import Line
from goals.simulated import Simulated


class Group(Protocol):
    """A group of measurements."""

    def run(self, checkpoint: Path) -> None: ...

    def lines(self) -> list[Line]: ...


# Each group with the number of its rounds.
GROUPS: dict[str, tuple[Group, int]] = {
    "whole": (whole, 3),
    "cold": (cold, 3),
    "limited": (limited, 1),
    "start": (start, 5),
    "memory": (memory, 1),
    "metadata": (metadata, 1),
    "slow": (slow, 1),
    "70B": (Simulated("70B", 64), 1),
    "405B": (Simulated("405B", 1024), 1),
    "1T": (Simulated("1T", 2048), 1),
    "ranks": (ranks, 3),
    "network": (network, 1),
    "peers": (peers, 2),
}
