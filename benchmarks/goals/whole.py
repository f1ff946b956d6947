"""Goals 1, 2 and 5: whole commands on warm files, taken in turn with the usual tools and `cp`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare import Contender, Range, measure

from goals.raw import Line, add, column, has, load, middle
from goals.times import steps

NAME = "whole"
DOES = {
    "ckpt-tools bf16": "ckpt-tools consolidate CKPT OUT --config CKPT/hf --dtype bf16",
    "ckpt-tools fp32": "ckpt-tools consolidate CKPT OUT --config CKPT/hf --dtype fp32",
    "zero_to_fp32": "zero_to_fp32.py CKPT OUT --safe_serialization",
    "usual way": "zero_to_fp32.py, from_pretrained(dtype=bfloat16), save_pretrained",
    "cp": "cp -r --reflink=never CKPT/global_step100 OUT",
}


def contenders(checkpoint: Path) -> dict[str, Contender]:
    """The commands, on a checkpoint without moments: what `cp` copies is the masters."""
    folder = checkpoint / "global_step100"
    inputs = tuple(Range(path, 0, path.stat().st_size) for path in sorted(folder.iterdir()))
    python = sys.executable

    def ours(dtype: str) -> Callable[[Path], list[str]]:
        command = [python, "-m", "ckpt_tools", "consolidate", str(checkpoint)]
        options = ["--config", str(checkpoint / "hf"), "--dtype", dtype, "--json"]
        return lambda out: [*command, str(out), *options]

    script = str(Path(__file__).with_name("usual.py"))
    zero = [python, str(checkpoint / "zero_to_fp32.py"), str(checkpoint)]
    commands: dict[str, Callable[[Path], list[str]]] = {
        "ckpt-tools bf16": ours("bf16"),
        "ckpt-tools fp32": ours("fp32"),
        "zero_to_fp32": lambda out: [*zero, str(out), "--safe_serialization"],
        "usual way": lambda out: [python, script, str(checkpoint), str(out)],
        "cp": lambda out: ["cp", "-r", "--reflink=never", str(folder), str(out)],
    }
    return {n: Contender(n, DOES[n], command, inputs) for n, command in commands.items()}


def run(checkpoint: Path) -> None:
    """One round."""
    known = contenders(checkpoint)
    parameters = json.loads((checkpoint / "benchmark.json").read_text())["parameters"]
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        for contender in known.values():
            measured = measure(contender, Path(scratch))
            print(f"{contender.name}: {measured.wall_seconds:.2f} s", file=sys.stderr)
            facts: dict[str, Any] = asdict(measured) | {"parameters": parameters}
            facts["durable_seconds"] = measured.durable_seconds
            if measured.move_seconds is not None:
                facts |= steps(Path(scratch), measured.wall_seconds)
            add(NAME, [facts])


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    if not has(raw, *DOES):
        return []

    def line(
        goal: int, what: str, name: str, key: str, other: str, versus: str, **limits: Any
    ) -> Line:
        against = middle(raw, versus, other)
        values = column(raw, name, key)
        ratio = middle(raw, name, key) / against
        if limits.pop("faster", False):
            ratio = 1 / ratio
        return Line(
            goal, what, DOES[name], values, "s", ratio, f"{versus}: {against:.2f} s", **limits
        )

    wall, durable, move, system = (
        "wall_seconds",
        "durable_seconds",
        "move_seconds",
        "system_seconds",
    )
    ours, fp32, zero, usual = "ckpt-tools bf16", "ckpt-tools fp32", "zero_to_fp32", "usual way"
    start = "start: 1 s, of it 0.65 s import of torch; then casts and checksums on all cores"
    synced = f"{start}. The other is followed by a sync, as ours is"
    times = "times as fast"
    memory = [
        Line(
            5,
            f"peak resident memory, {name}",
            DOES[name],
            tuple(v / 1e6 for v in peak),
            "MB",
            most=360,
        )
        for name in (ours, fp32)
        if (peak := column(raw, name, "peak_rss_bytes"))
    ]
    return [
        line(
            1, f"whole command, {times}", ours, wall, wall, usual, least=5, faster=True, limit=start
        ),
        line(
            1,
            f"the same, both synced, {times}",
            ours,
            wall,
            durable,
            usual,
            faster=True,
            limit=synced,
        ),
        line(
            1, f"whole command, {times}", ours, wall, wall, zero, least=3, faster=True, limit=start
        ),
        line(
            1,
            f"the same, both synced, {times}",
            ours,
            wall,
            durable,
            zero,
            faster=True,
            limit=synced,
        ),
        line(
            1,
            "moving bytes",
            ours,
            move,
            wall,
            "cp",
            most=0.6,
            limit="CPU: checksums, casts, copies",
        ),
        line(
            1,
            "the same; cp is followed by a sync, as ours is",
            ours,
            move,
            durable,
            "cp",
        ),
        line(
            2,
            "moving bytes, fp32",
            fp32,
            move,
            wall,
            "cp",
            most=1.1,
            limit="CPU: checksums, copies",
        ),
        line(
            2,
            "the same; cp is followed by a sync, as ours is",
            fp32,
            move,
            durable,
            "cp",
        ),
        line(
            2,
            "system CPU, fp32",
            fp32,
            system,
            system,
            "cp",
            most=1.5,
            limit="copies in the kernel",
        ),
        *memory,
    ]
