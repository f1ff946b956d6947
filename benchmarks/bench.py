"""Measures the goals of speed and size, and writes RESULTS.md and results.svg from the raw data.

    python benchmarks/bench.py CHECKPOINT                  # everything, with new raw data
    python benchmarks/bench.py CHECKPOINT --only whole     # one more round of one group
    python benchmarks/bench.py CHECKPOINT --only none      # the report alone

Owns the order of the groups. Raw data stays in build/bench, one line of JSON a run, so that groups can be
measured at different times.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from goals import GROUPS, report
from goals.raw import RAW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="from make_zero.py --no-moments")
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(GROUPS)}, or none")
    parser.add_argument(
        "--rounds", type=int, help="rounds of each group (its own number, or 1 with --only)"
    )
    options = parser.parse_args()
    if options.only is None:
        shutil.rmtree(RAW, ignore_errors=True)
    names = list(GROUPS) if options.only is None else options.only.split(",")
    for name in names:
        if name == "none":
            continue
        group, usual = GROUPS[name]
        for _ in range(options.rounds or (usual if options.only is None else 1)):
            print(f"-- {name}", file=sys.stderr, flush=True)
            group.run(options.checkpoint.resolve())
    lines = [line for group, _ in GROUPS.values() for line in group.lines()]
    report.write(Path(__file__).parent, lines)


if __name__ == "__main__":
    main()
