"""Goal 3: a checkpoint larger than the memory, in a control group whose memory and page cache are limited.

The kernel counts the pages of files that a process brings into memory as the process's own. So a group of
processes with 1 GiB sees a machine with 1 GiB.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from compare import cold, measure

from goals import whole
from goals.cold import NAME as COLD
from goals.cold import OURS
from goals.raw import Line, add, column, has, load, middle

NAME = "limited"
LIMIT_BYTES = 1 << 30
ROOTS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
FILES = ("memory.limit_in_bytes", "memory.max")


@contextmanager
def group() -> Iterator[Path]:
    """A control group with limited memory, of this process alone.

    Raises:
        SystemExit: the kernel refuses one.
    """
    root = next((root for root in ROOTS if (root / "cgroup.procs").exists()), None)
    if root is None:
        raise SystemExit("no control groups are mounted below /sys/fs/cgroup")
    made = root / f"ckpt-tools-bench-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        raise SystemExit(f"the kernel refuses a control group: {error}") from error
    try:
        limit = next((made / name for name in FILES if (made / name).exists()), None)
        if limit is None:
            raise SystemExit(f"{made} has no limit of memory")
        limit.write_text(f"{LIMIT_BYTES}\n")
        yield made
    finally:
        with contextlib.suppress(OSError):
            made.rmdir()


def run(checkpoint: Path) -> None:
    """One round."""
    known = whole.contenders(checkpoint)
    with group() as limited, tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        enter = f'echo $$ > {limited}/cgroup.procs && exec "$0" "$@"'
        for name in OURS:
            plain = known[name]
            contender = replace(
                plain,
                command=lambda out, plain=plain: ["sh", "-c", enter, *plain.command(out)],  # type: ignore[misc]
            )
            measured = measure(contender, Path(scratch), cold)
            print(f"{name} in 1 GiB: {measured.wall_seconds:.2f} s", file=sys.stderr)
            read = sum(part.length for part in plain.inputs)
            add(NAME, [asdict(measured) | {"read_bytes": read}])


def lines() -> list[Line]:
    """What the rounds say; compared with the pair of `dd` of the cold files."""
    raw, others = load(NAME), load(COLD)
    found = []
    for name in OURS:
        pair = f"dd {name}"
        if not has(raw, name) or not has(others, pair):
            continue
        against = middle(others, pair, "wall_seconds")
        moved = middle(raw, name, "read_bytes"), middle(raw, name, "written_bytes")
        times = sum(moved) / LIMIT_BYTES
        for what, key in (("moving bytes", "move_seconds"), ("whole command", "wall_seconds")):
            found.append(
                Line(
                    3,
                    f"{what}, {times:.0f} times the memory, {name.split()[1]}",
                    f"{whole.DOES[name]}, in a control group of 1 GiB",
                    column(raw, name, key),
                    "s",
                    middle(raw, name, key) / against,
                    f"dd side by side: {against:.2f} s",
                    most=1.15,
                    limit=f"{moved[0] / 1e9:.1f} GB read, {moved[1] / 1e9:.1f} GB written; peak "
                    f"{middle(raw, name, 'peak_rss_bytes') / 1e6:.0f} MB",
                )
            )
    return found
