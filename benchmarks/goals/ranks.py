"""Goal 9: one and two ranks of torchrun against threads: time, and the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from goals.raw import Line, add, column, has, load, middle

NAME = "ranks"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
WAYS = {
    "2 threads": ([], 2),
    "1 rank, 2 threads": ([*TORCHRUN, "1"], 2),
    "2 ranks, 1 thread each": ([*TORCHRUN, "2"], 1),
}


def run(checkpoint: Path) -> None:
    """One round."""
    digests = set()
    for name, (launcher, workers) in WAYS.items():
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
            out = Path(scratch, "out")
            command = [sys.executable, *launcher, "-m", "ckpt_tools", "consolidate"]
            options = ["--config", str(checkpoint / "hf"), "--dtype", "bf16", "--json"]
            command += [str(checkpoint), str(out), *options, "--workers", str(workers)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            report: dict[str, Any] = json.loads(done.stdout)
            manifest = json.loads((out / "ckpt_tools_manifest.json").read_text())
            digests.add(json.dumps(manifest["tensors"]))
        seconds = report["seconds"]["move"]
        print(f"{name}: {seconds:.2f} s", file=sys.stderr)
        add(NAME, [{"contender": name, "move_seconds": seconds}])
    if len(digests) != 1:
        raise SystemExit("the ways did not write the same bytes")


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    if not has(raw, *WAYS):
        return []
    first, *others = WAYS
    against = middle(raw, first, "move_seconds")
    return [
        Line(
            9,
            f"moving bytes, {name}",
            "torchrun -m ckpt_tools consolidate, bf16",
            column(raw, name, "move_seconds"),
            "s",
            middle(raw, name, "move_seconds") / against,
            f"{first}: {against:.2f} s",
            most=1.1,
            limit="digests of all tensors are equal",
        )
        for name in others
    ]
