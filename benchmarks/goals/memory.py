"""Goal 5: memory of shapes that are extreme: one tensor of 8 GB, 100,000 small tensors, 1,024 ranks.

The source of the large tensor is a hole in a file, so that it takes no disk and no time to make.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from compare import Contender, measure

from goals.raw import Line, add, column, has, load, middle

NAME = "memory"
PYTHON = sys.executable
# What, with the shape and the number of its tensors.
SHAPES = {
    "one tensor of 8 GB": ([500_000, 4_000], 1),
    "100,000 tensors of 1 KB": ([16, 16], 100_000),
}
RANKS = "0.1 B parameters, 1,024 ranks"
COMMAND = "ckpt-tools consolidate CKPT OUT --dtype bf16 --weights-only"


def run(checkpoint: Path) -> None:
    """One round."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        for number, (name, (shape, count)) in enumerate(SHAPES.items()):
            source = Path(scratch, f"source{number}")
            source.mkdir()
            hollow(source / "model.safetensors", shape, count)
            converted(name, source, Path(scratch))
    many = checkpoint.parent / "bench-1024ranks"
    if not (many / "benchmark.json").exists():
        script = [PYTHON, str(Path(__file__).parents[1] / "make_zero.py"), str(many)]
        size = ["--no-moments", "--params", "1e8", "--ranks", "1024"]
        subprocess.run([*script, *size], check=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        converted(RANKS, many, Path(scratch))


def converted(name: str, source: Path, scratch: Path) -> None:
    """Convert a source, and take note of it."""

    def command(out: Path) -> list[str]:
        tool = [PYTHON, "-m", "ckpt_tools", "consolidate", str(source), str(out)]
        return [*tool, "--dtype", "bf16", "--weights-only", "--json"]

    measured = measure(Contender(name, name, command, ()), scratch)
    print(f"{name}: {measured.peak_rss_bytes / 1e6:.0f} MB", file=sys.stderr)
    add(NAME, [asdict(measured)])


def hollow(path: Path, shape: list[int], count: int, first: int = 0) -> None:
    """A safetensors file of fp32 tensors, numbered from ``first``, whose values are a hole."""
    nbytes = 4 * shape[0] * shape[1]
    entries = {
        f"layers.{first + i}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [i * nbytes, (i + 1) * nbytes],
        }
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + count * nbytes)


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    return [
        Line(
            5,
            f"peak resident memory, {name}",
            COMMAND,
            tuple(peak / 1e6 for peak in column(raw, name, "peak_rss_bytes")),
            "MB",
            most=360,
            limit=f"{middle(raw, name, 'wall_seconds'):.1f} s in all",
        )
        for name in (*SHAPES, RANKS)
        if has(raw, name)
    ]
