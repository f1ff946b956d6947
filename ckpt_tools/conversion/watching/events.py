"""Owns what a watch tells while it works: one value for each thing that happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ckpt_tools.conversion.report import Report

Happening = Literal[
    "converted", "waiting", "passed over", "failed", "command failed", "removed", "pruned", "kept"
]


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        happening: what kind of thing.
        name: the save, by name; empty for the run itself.
        fact: one sentence without a full stop.
        hint: the next step, in whole sentences; None where there is none.
        report: of a conversion.
    """

    happening: Happening
    name: str
    fact: str
    hint: str | None = None
    report: Report | None = None

    def to_json(self) -> dict[str, Any]:
        """The event as plain JSON values."""
        return {
            "event": self.happening,
            "checkpoint": self.name,
            "fact": self.fact,
            "hint": self.hint,
            "report": None if self.report is None else self.report.to_json(),
        }


Tell = Callable[[Event], None]
