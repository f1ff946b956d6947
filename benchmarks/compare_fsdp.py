"""Times ckpt-tools and `accelerate merge-weights` on one sharded FSDP state, made where there is none.

Owns the two commands. The measuring is that of `compare.py`: taking turns, a warm page cache, one child
process for each run. This module imports no torch either, so the state is made in a process of its own.

Strategy: before anything is timed, each tool runs once and their files are compared byte for byte, since
times of tools that do different work say nothing.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from compare import MANIFEST, Contender, Range, machine, measure, medians, print_table

FOLDER = "pytorch_model_fsdp_0"
RESULT = "model.safetensors"


def contenders(folder: Path) -> list[Contender]:
    inputs = tuple(Range(path, 0, path.stat().st_size) for path in sorted(folder.iterdir()))

    def command(*words: str) -> Callable[[Path], list[str]]:
        return lambda out: [sys.executable, "-m", *words[:2], str(folder), str(out), *words[2:]]

    # One file, as accelerate writes it however large it is.
    ours = command(
        "ckpt_tools", "consolidate", "--weights-only", "--max-shard-size", "1TB", "--json"
    )
    theirs = command("accelerate.commands.accelerate_cli", "merge-weights")
    return [
        Contender("ckpt-tools", "ckpt-tools consolidate --weights-only", ours, inputs),
        Contender("accelerate", "accelerate merge-weights", theirs, inputs),
    ]


def make(checkpoint: Path, params: float, ranks: int) -> None:
    script = str(Path(__file__).with_name("make_fsdp.py"))
    numbers = ["--params", str(params), "--ranks", str(ranks)]
    subprocess.run([sys.executable, script, str(checkpoint), *numbers], check=True)


def check(known: list[Contender], work: Path) -> None:
    results = []
    for contender in known:
        out = work / contender.name
        subprocess.run(contender.command(out), check=True, capture_output=True)
        results.append(out / RESULT)
    if not filecmp.cmp(*results, shallow=False):
        raise SystemExit("the two did not write the same bytes")
    for path in results:
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="made where it is not")
    parser.add_argument("--params", type=float, default=1e9, metavar="N", help="to make (1e9)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="to make (4)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed rounds (3)")
    parser.add_argument("--work", type=Path, help="a directory on the disk to write to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run here")
    options = parser.parse_args()
    checkpoint = options.checkpoint.resolve()
    if not (checkpoint / MANIFEST).exists():
        make(checkpoint, options.params, options.ranks)
    made = json.loads((checkpoint / MANIFEST).read_text())
    known = contenders(checkpoint / FOLDER)
    disk = options.work or checkpoint.parent
    disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=disk) as scratch:
        work = Path(scratch)
        before = machine()
        check(known, work)
        runs = []
        for turn in range(options.repeat):
            for contender in known:
                run = measure(contender, work)
                print(
                    f"{turn + 1}/{options.repeat} {contender.name}: {run.wall_seconds:.2f} s",
                    file=sys.stderr,
                )
                runs.append(run)
    table = medians(runs)
    print(
        f"{made['parameters']:,} parameters in fp32, {made['ranks']} ranks; the same bytes from both\n"
    )
    print_table(table)
    packages = {**before["packages"], "accelerate": version("accelerate")}
    named = ", ".join(f"{name} {packages[name]}" for name in ("ckpt-tools", "accelerate", "torch"))
    print(
        f"\nMedians of {options.repeat}. {before['cores']} cores, {before['ram_gib']} GiB, "
        f"Linux {before['kernel']}, load {before['load_average']:.1f} at the start; "
        f"Python {before['python']}, {named}"
    )
    if options.json:
        content = {
            "machine": {**before, "packages": packages},
            "checkpoint": made,
            "runs": [asdict(run) for run in runs],
            "medians": table,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
