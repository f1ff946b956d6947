"""Owns what all goals share: raw data on disk, and the lines that the report is made of."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RAW = Path("build/bench")


@dataclass(frozen=True)
class Line:
    """A line of the report.

    Attributes:
        goal: number of the goal.
        what: what was measured.
        command: how.
        values: the measurements.
        unit: theirs.
        ratio: the median divided by what it is compared with.
        versus: what that is.
        most: the goal: the largest ratio.
        least: or the smallest.
        limit: what limits it, or why the goal was missed.
    """

    goal: int
    what: str
    command: str
    values: tuple[float, ...]
    unit: str = "s"
    ratio: float | None = None
    versus: str = ""
    most: float | None = None
    least: float | None = None
    limit: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None where there is none."""
        if self.most is None and self.least is None:
            return None
        measured = self.median if self.ratio is None else self.ratio
        return (self.most is None or measured <= self.most) and (
            self.least is None or measured >= self.least
        )


def add(name: str, entries: Iterable[dict[str, Any]]) -> None:
    """Append measurements of one round."""
    RAW.mkdir(parents=True, exist_ok=True)
    with (RAW / f"{name}.jsonl").open("a") as file:
        for entry in entries:
            file.write(json.dumps(entry) + "\n")


def load(name: str) -> list[dict[str, Any]]:
    """All measurements of a group; none if it was not measured."""
    path = RAW / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(entries: list[dict[str, Any]], contender: str, key: str) -> tuple[float, ...]:
    """One figure of one contender in each round."""
    found = [entry for entry in entries if entry["contender"] == contender]
    return tuple(entry[key] for entry in found if entry.get(key) is not None)


def middle(entries: list[dict[str, Any]], contender: str, key: str) -> float:
    """The median of :func:`column`."""
    return statistics.median(column(entries, contender, key))


def has(entries: list[dict[str, Any]], *contenders: str) -> bool:
    """Whether all of these were measured."""
    return {*contenders} <= {entry["contender"] for entry in entries}
