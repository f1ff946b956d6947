"""Where the time of the whole command goes: the steps that it reports, and the rest around them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from goals.raw import load

# The steps of the report, and what they are. `write` has `move` and `sync` in it.
STEPS = {
    "around": "start and end of the interpreter, our modules",
    "read": "metadata; import of torch, while cold files are read ahead and transformers is asked",
    "check": "copies of a tensor are compared",
    "plan": "the output is laid out",
    "move": "moving bytes",
    "sync": "waiting for the disk",
    "publish": "checksums, other files, publishing",
}
COLUMNS = [
    (name, f"{dtype}, {kind}")
    for kind, name in (("warm", "whole"), ("cold", "cold"))
    for dtype in ("bf16", "fp32")
]


def steps(scratch: Path, wall: float) -> dict[str, Any]:
    """The steps of the run whose report is in a folder, as a part of its raw data."""
    report: dict[str, float] = json.loads((scratch / "stdout").read_text())["seconds"]
    publish = report["write"] - report["move"] - report["sync"]
    return {"steps": report | {"around": wall - report["total"], "publish": publish}}


def table() -> list[str]:
    """Medians of the rounds, as Markdown; nothing where no round was measured."""
    rows: dict[str, list[str]] = {step: [] for step in (*STEPS, "all")}
    heads = []
    for name, head in COLUMNS:
        contender = f"ckpt-tools {head.partition(',')[0]}"
        runs = [run for run in load(name) if run["contender"] == contender and "steps" in run]
        if not runs:
            continue
        heads.append(head)
        for step in STEPS:
            rows[step].append(f"{statistics.median(run['steps'][step] for run in runs):.2f}")
        rows["all"].append(f"**{statistics.median(run['wall_seconds'] for run in runs):.2f}**")
    if not heads:
        return []
    names = STEPS | {"all": "**whole command**"}
    return [
        "## Where the time goes",
        "",
        "Seconds of the whole command, 1.5 B parameters on 8 ranks, answer of transformers kept.",
        "",
        f"| step | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
        *(f"| {names[step]} | {' | '.join(cells)} |" for step, cells in rows.items()),
        "",
    ]
