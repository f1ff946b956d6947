"""Measures the cost of comparing the source with its checksums: with and without `--no-check-source`.

Owns the two commands and the two ratios. The measuring is that of `compare.py`: taking turns, a warm page
cache, one child process for each run. CPU seconds are user and system time of that process.

Only the weights are written, because the child process that asks transformers for the model's layout takes
seconds of its own, and they would hide the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from compare import MANIFEST, Contender, Run, contenders, machine, measure

CHECKED, UNCHECKED = "checked", "--no-check-source"


def commands(checkpoint: Path, dtype: str) -> list[Contender]:
    inputs = next(iter(contenders(checkpoint, checkpoint))).inputs

    def command(*options: str) -> Callable[[Path], list[str]]:
        start = [sys.executable, "-m", "ckpt_tools", "consolidate", str(checkpoint)]
        end = ["--weights-only", "--dtype", dtype, "--json", *options]
        return lambda out: [*start, str(out), *end]

    return [
        Contender(CHECKED, "the default", command(), inputs),
        Contender(UNCHECKED, "without checksums", command(UNCHECKED), inputs),
    ]


def ratios(runs: list[Run]) -> dict[str, float]:
    """Medians of what checking adds, as a share of the time without it; each turn is one pair."""
    found = {}
    for name in ("cpu_seconds", "wall_seconds", "move_seconds"):
        values = {
            kind: [getattr(run, name) for run in runs if run.contender == kind]
            for kind in (CHECKED, UNCHECKED)
        }
        pairs = zip(values[CHECKED], values[UNCHECKED], strict=True)
        found[name] = statistics.median(checked / unchecked - 1 for checked, unchecked in pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="from make_zero.py")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="timed turns (7)")
    parser.add_argument("--dtype", default="bf16", help="of the output (bf16)")
    parser.add_argument("--work", type=Path, help="a directory on the disk to write to")
    options = parser.parse_args()
    checkpoint = options.checkpoint.resolve()
    if not (checkpoint / MANIFEST).exists():
        parser.error(f"{checkpoint} has no {MANIFEST}: make_zero.py writes it")
    made = json.loads((checkpoint / MANIFEST).read_text())
    runs = []
    before = machine()
    with tempfile.TemporaryDirectory(dir=options.work or checkpoint.parent) as scratch:
        for turn in range(-1, options.repeat):
            for one in commands(checkpoint, options.dtype):
                run = measure(one, Path(scratch))
                if turn >= 0:
                    runs.append(run)
    print(f"{made['parameters']:,} parameters, {made['ranks']} ranks, written as {options.dtype}\n")
    print(f"{'':20}{'cpu s':>8}{'wall s':>8}{'move s':>8}")
    names = ("cpu_seconds", "wall_seconds", "move_seconds")
    for kind in (CHECKED, UNCHECKED):
        own = [[getattr(run, name) for run in runs if run.contender == kind] for name in names]
        print(f"{kind:20}" + "".join(f"{statistics.median(values):8.2f}" for values in own))
    added = ratios(runs)
    print(f"{'added':20}" + "".join(f"{100 * added[name]:7.0f}%" for name in names))
    print(
        f"\nMedians of {options.repeat} turns. {before['cores']} cores, load "
        f"{before['load_average']:.1f} at the start; Python {before['python']}"
    )


if __name__ == "__main__":
    main()
