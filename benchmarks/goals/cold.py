"""Goal 3: files that are not in memory, against `dd` reading and writing the same bytes side by side."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from compare import Contender, cold, measure

from goals import whole
from goals.raw import Line, add, column, has, load, middle
from goals.times import steps

NAME = "cold"
OURS = {"ckpt-tools bf16": 2, "ckpt-tools fp32": 4}
LIMITS = {
    "move_seconds": "the disk",
    "wall_seconds": "the disk; before the catalogue is known nothing is read ahead",
}


def run(checkpoint: Path) -> None:
    """One round."""
    known = whole.contenders(checkpoint)
    inputs = known["cp"].inputs
    files = " ".join(f"'{part.path}'" for part in inputs)
    parameters = sum(part.length for part in inputs) // 4
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        for name, itemsize in OURS.items():
            count = parameters * itemsize >> 22
            # Direct requests: through the page cache the pair is slower.
            script = (
                f'mkdir "$0" && (for f in {files}; do dd if=$f of=/dev/null bs=4M iflag=direct; done & '
                f'dd if=/dev/zero of="$0/x" bs=4M count={count} oflag=direct conv=fsync; wait)'
            )
            pair = Contender(
                f"dd {name}",
                "dd of the masters to /dev/null, and dd of an output of the same size",
                lambda out, script=script: ["sh", "-c", script, str(out)],  # type: ignore[misc]
                inputs,
            )
            for contender in (known[name], pair):
                before = page_cache()
                measured = measure(contender, Path(scratch), cold)
                print(f"{contender.name}: {measured.wall_seconds:.2f} s", file=sys.stderr)
                facts = asdict(measured) | {"page_cache_growth": page_cache() - before}
                if measured.move_seconds is not None:
                    facts |= steps(Path(scratch), measured.wall_seconds)
                add(NAME, [facts])


def page_cache() -> int:
    """Bytes of files in memory."""
    with open("/proc/meminfo") as file:
        found = dict(line.split(":") for line in file)
    return int(found["Cached"].split()[0]) * 1024


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    found = []
    for name in OURS:
        pair = f"dd {name}"
        if not has(raw, name, pair):
            continue
        against = middle(raw, pair, "wall_seconds")
        versus = f"dd side by side: {against:.2f} s"
        for what, key in (
            ("moving bytes, cold files", "move_seconds"),
            ("whole command, cold files", "wall_seconds"),
        ):
            values = column(raw, name, key)
            found.append(
                Line(
                    3,
                    f"{what}, {name.split()[1]}",
                    whole.DOES[name],
                    values,
                    "s",
                    middle(raw, name, key) / against,
                    versus,
                    most=1.15,
                    limit=LIMITS[key],
                )
            )
    return found
