"""Goal 4: seconds until bytes move, and the commands that need no torch, on a small checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from goals.raw import Line, add, column, has, load

NAME = "start"
CASE = Path("fixtures/zero/zero3-bf16-olmo2-chat-2ranks")
PYTHON = sys.executable
CONSOLIDATE = "ckpt-tools consolidate SMALL OUT --config SMALL/hf --dtype bf16"


def run(checkpoint: Path) -> None:
    """One round; the big checkpoint is not needed."""
    with tempfile.TemporaryDirectory() as scratch:
        out, kept = Path(scratch, "out"), Path(scratch, "kept")
        tool = [PYTHON, "-m", "ckpt_tools"]
        config = ["--config", str(CASE / "hf"), "--dtype", "bf16", "--json"]
        convert = [*tool, "consolidate", str(CASE / "checkpoint"), str(out), *config]
        entries = [
            timed("torch", [PYTHON, "-c", "import torch"], kept),
            timed("first", convert, kept),
            timed("second", [*convert, "--overwrite"], kept),
            timed("inspect", [*tool, "inspect", str(CASE / "checkpoint")], kept),
            timed("verify", [*tool, "verify", str(out)], kept),
            timed("diff", [*tool, "diff", str(out), str(out)], kept),
            timed("help", [*tool, "--help"], kept),
        ]
    add(NAME, entries)


def timed(name: str, command: list[str], kept: Path) -> dict[str, object]:
    """Seconds of a command, and of it those before it writes, where it says so."""
    begin = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | {"CKPT_TOOLS_CACHE": str(kept)}, capture_output=True, check=True
    )
    wall = time.perf_counter() - begin
    entry: dict[str, object] = {"contender": name, "wall_seconds": wall}
    if name in ("first", "second"):
        entry["start_seconds"] = wall - json.loads(done.stdout)["seconds"]["write"]
    return entry


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    if not has(raw, "torch", "first", "second"):
        return []

    def line(what: str, command: str, name: str, key: str, most: float | None, limit: str) -> Line:
        return Line(4, what, command, column(raw, name, key), most=most, limit=limit)

    start, wall = "start_seconds", "wall_seconds"
    return [
        line(
            "before bytes move, answer of transformers kept",
            CONSOLIDATE,
            "second",
            start,
            1.7,
            "import of torch 0.65 s, of our modules 0.2 s",
        ),
        line(
            "before bytes move, first checkpoint",
            f"{CONSOLIDATE}, empty cache",
            "first",
            start,
            3.5,
            "transformers describes the model: 2 s in a process of its own",
        ),
        line("import of torch alone", "python -c 'import torch'", "torch", wall, None, ""),
        line("inspect", "ckpt-tools inspect SMALL", "inspect", wall, None, "no torch, no numpy"),
        line(
            "verify, structure",
            "ckpt-tools verify OUT",
            "verify",
            wall,
            None,
            "no torch; a process of its own loads the tokenizer",
        ),
        line("diff, every value", "ckpt-tools diff OUT OUT", "diff", wall, None, "import of torch"),
        line("help", "ckpt-tools --help", "help", wall, None, ""),
    ]
