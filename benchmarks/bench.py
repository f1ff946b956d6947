"""Measures the goals of speed and size, and writes RESULTS.md and results.svg from the raw data.

    python benchmarks/bench.py CHECKPOINT                  # everything, with new raw data
    python benchmarks/bench.py CHECKPOINT --only whole     # one more round of one group
    python benchmarks/bench.py CHECKPOINT --only none      # the report alone

Owns the order of the groups. Raw data stays in build/bench, one line of JSON a run, so that groups can be
measured at different times. A group that fails is reported in RESULTS.md, and the others go on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from goals import GROUPS, report
from goals.raw import RAW, Line


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
    failures: dict[str, str] = {}
    for name in names:
        if name == "none":
            continue
        group, usual = GROUPS[name]
        for _ in range(options.rounds or (usual if options.only is None else 1)):
            print(f"-- {name}", file=sys.stderr, flush=True)
            begin = time.monotonic()
            try:
                group.run(options.checkpoint.resolve())
            except (Exception, SystemExit) as error:
                failures[name] = _last_line(error)
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                break
            print(f"-- {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    lines: list[Line] = []
    for name, (group, _) in GROUPS.items():
        try:
            lines += group.lines()
        except (Exception, SystemExit) as error:
            failures.setdefault(name, _last_line(error))
    report.write(Path(__file__).parent, lines, failures)
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


def _last_line(error: BaseException) -> str:
    """What a person reads first of an error, and of the output of a command that failed."""
    said = getattr(error, "stderr", None) or str(error) or type(error).__name__
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return text.strip().splitlines()[-1][:300]


if __name__ == "__main__":
    main()
