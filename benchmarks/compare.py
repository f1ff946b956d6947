"""Times ckpt-tools, DeepSpeed's own converter and `cp` on one checkpoint from `make_zero.py`.

Owns the measuring: taking turns (A B C A B C ...), a warm page cache, and one child process for
each run with nothing between it and us. It imports neither torch nor ckpt-tools, and that matters:
Linux starts a child's peak memory at the size of the process that spawned it, so a large harness
would be read as a large child.

Strategy: before each run the previous output is removed, the disk is left to settle and the inputs
are read once. What a child leaves in the page cache is flushed afterwards on a clock of its own,
since ckpt-tools waits for the disk before it publishes and the others do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MANIFEST = "benchmark.json"
SAMPLE_SECONDS = 0.02
BLOCK = 8 << 20
PACKAGES = ("ckpt-tools", "torch", "deepspeed", "safetensors", "transformers")
DEFAULT = "ckpt-tools,zero_to_fp32,cp"

# Where the JSON object that `ckpt-tools consolidate --json` prints keeps the seconds spent moving
# bytes; the first path that is there counts. This is the only place that knows its keys.
MOVE_SECONDS = (("seconds", "move"),)


@dataclass(frozen=True)
class Range:
    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Contender:
    name: str
    does: str
    command: Callable[[Path], list[str]]
    inputs: tuple[Range, ...]


@dataclass(frozen=True)
class Run:
    contender: str
    wall_seconds: float
    cpu_seconds: float
    system_seconds: float  # of the CPU seconds, those in the kernel
    move_seconds: float | None  # as the tool itself reports it
    flush_seconds: float  # after the end: what the child left for the kernel to write
    peak_rss_bytes: int  # counts pages of mapped files too
    peak_anonymous_bytes: int  # what no other process could share or take back
    written_bytes: int

    @property
    def durable_seconds(self) -> float:
        return self.wall_seconds + self.flush_seconds


class MemorySampler(threading.Thread):
    """Watches a process and its descendants. Short peaks between two samples are missed."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._done = threading.Event()
        self.anonymous = 0  # of all processes together, at one time
        self.high_water = 0  # of the largest one: the kernel keeps it, so only its end is missed

    def run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            tree = [memory(pid) for pid in (self._pid, *descendants(self._pid))]
            self.anonymous = max(self.anonymous, sum(one["RssAnon"] for one in tree))
            self.high_water = max(self.high_water, *(one["VmHWM"] for one in tree))

    def stop(self) -> None:
        self._done.set()
        self.join()


def memory(pid: int) -> dict[str, int]:
    """Bytes; zeros for a process that has ended."""
    found = {"RssAnon": 0, "VmHWM": 0}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            key, _, value = line.partition(":")
            if key in found:
                found[key] = int(value.split()[0]) * 1024
    return found


def descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text()
            for child in map(int, children.split()):
                yield child
                yield from descendants(child)


def contenders(checkpoint: Path, copies: Path) -> list[Contender]:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    masters = [
        Range(checkpoint / entry["file"], entry["offset"], entry["bytes"])
        for entry in manifest["masters"]
    ]
    models = [
        Range(path, 0, path.stat().st_size)
        for path in sorted(checkpoint.glob("*/*_model_states.pt"))
    ]
    whole = (*masters, *models)

    def ours(out: Path) -> list[str]:
        config = str(checkpoint / "hf")
        options = ["--config", config, "--dtype", "bf16", "--json"]
        return [sys.executable, "-m", "ckpt_tools", "consolidate", *paths(out), *options]

    def theirs(script: str, *options: str) -> Callable[[Path], list[str]]:
        command = [sys.executable, str(checkpoint / script)]
        return lambda out: [*command, *paths(out), "--safe_serialization", *options]

    def paths(out: Path) -> list[str]:
        return [str(checkpoint), str(out)]

    return [
        Contender("ckpt-tools", "ckpt-tools consolidate --dtype bf16", ours, whole),
        Contender(
            "zero_to_fp32",
            "zero_to_fp32.py --safe_serialization (which writes fp32)",
            theirs("zero_to_fp32.py"),
            whole,
        ),
        Contender(
            "zero_to_torch",
            "zero_to_torch.py --safe_serialization --dtype bf16",
            theirs("zero_to_torch.py", "--dtype", "bf16"),
            whole,
        ),
        Contender(
            "cp",
            "cp of files that hold the fp32 masters and nothing else",
            lambda out: ["cp", "-r", "--reflink=never", str(copies), str(out)],
            tuple(
                Range(copies / str(number), 0, part.length) for number, part in enumerate(masters)
            ),
        ),
    ]


def read(part: Range) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(BLOCK))
    with open(part.path, "rb", buffering=0) as file:
        file.seek(part.offset)
        left = part.length
        while left:
            count = file.readinto(buffer[: min(left, BLOCK)])
            if not count:
                raise SystemExit(f"{part.path} ends {left} bytes early")
            yield buffer[:count]
            left -= count


def copy_masters(checkpoint: Path, copies: Path) -> None:
    copies.mkdir()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for number, entry in enumerate(manifest["masters"]):
        part = Range(checkpoint / entry["file"], entry["offset"], entry["bytes"])
        with open(copies / str(number), "wb") as file:
            for block in read(part):
                file.write(block)


def warm(contender: Contender) -> None:
    """Read what the contender needs, so that it is in the page cache."""
    for part in contender.inputs:
        for _ in read(part):
            pass


def cold(contender: Contender) -> None:
    """Let what the contender needs leave the page cache."""
    for part in contender.inputs:
        with open(part.path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(contender: Contender, work: Path, prepare: Callable[[Contender], None] = warm) -> Run:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    prepare(contender)
    with open(work / "stdout", "wb") as stdout, open(work / "stderr", "wb") as stderr:
        begin = time.perf_counter()
        child = subprocess.Popen(
            contender.command(out),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
        )
        sampler = MemorySampler(child.pid)
        sampler.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    sampler.stop()
    if child.returncode:
        tail = (work / "stderr").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{contender.name} failed ({child.returncode}):\n{tail}")
    files = [path for path in out.rglob("*") if path.is_file()]
    begin = time.perf_counter()
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    flush = time.perf_counter() - begin
    written = sum(path.stat().st_size for path in files)
    shutil.rmtree(out)
    # A child smaller than this process at its spawning inherits our peak; then take the sample.
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = usage.ru_maxrss * 1024 if usage.ru_maxrss > floor else sampler.high_water
    return Run(
        contender=contender.name,
        wall_seconds=wall,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        system_seconds=usage.ru_stime,
        move_seconds=moving(work / "stdout"),
        flush_seconds=flush,
        peak_rss_bytes=peak,
        peak_anonymous_bytes=sampler.anonymous,
        written_bytes=written,
    )


def moving(stdout: Path) -> float | None:
    try:
        report = json.loads(stdout.read_text())
    except ValueError:
        return None
    for path in MOVE_SECONDS:
        value: Any = report
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, (int, float)):
            return float(value)
    return None


def machine() -> dict[str, Any]:
    packages = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": packages,
        "load_average": os.getloadavg()[0],
    }


def medians(runs: list[Run]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.contender for run in runs):
        own = [asdict(run) | {"durable_seconds": run.durable_seconds} for run in runs]
        own = [run for run in own if run["contender"] == name]
        table[name] = {
            key: statistics.median(run[key] for run in own)
            for key in own[0]
            if key != "contender" and all(run[key] is not None for run in own)
        }
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    ratios = [name for name in ("cp", "ckpt-tools") if name in table]
    head = ["wall s", "move s", "cpu s", "flush s", "RSS MB", "anon MB", "written GB"]
    head += [f"wall/{name}" for name in ratios]
    widths = [17 if "/" in title else 11 for title in head]
    print(
        " " * 14 + "".join(f"{title:>{width}}" for title, width in zip(head, widths, strict=True))
    )
    for name, row in table.items():
        move = f"{row['move_seconds']:.2f}" if "move_seconds" in row else "-"
        line = f"{name:14}{row['wall_seconds']:11.2f}{move:>11}{row['cpu_seconds']:11.2f}"
        line += f"{row['flush_seconds']:11.2f}{row['peak_rss_bytes'] / 1e6:11.0f}"
        line += f"{row['peak_anonymous_bytes'] / 1e6:11.0f}{row['written_bytes'] / 1e9:11.2f}"
        for other in ratios:
            line += f"{row['wall_seconds'] / table[other]['wall_seconds']:17.2f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="from make_zero.py")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed rounds (3)")
    parser.add_argument("--only", default=DEFAULT, metavar="NAMES", help=f"({DEFAULT})")
    parser.add_argument("--no-warm-up", action="store_true", help="no untimed first round")
    parser.add_argument("--work", type=Path, help="a directory on the disk to write to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run here")
    options = parser.parse_args()
    checkpoint = options.checkpoint.resolve()
    if not (checkpoint / MANIFEST).exists():
        parser.error(f"{checkpoint} has no {MANIFEST}: make_zero.py writes it")
    with tempfile.TemporaryDirectory(dir=options.work or checkpoint.parent) as scratch:
        work = Path(scratch)
        known = {one.name: one for one in contenders(checkpoint, work / "masters")}
        names = options.only.split(",")
        if unknown := set(names) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        if "cp" in names:
            copy_masters(checkpoint, work / "masters")
        before = machine()
        runs: list[Run] = []
        for turn in range(-1 if not options.no_warm_up else 0, options.repeat):
            for name in names:
                run = measure(known[name], work)
                kind = f"{turn + 1}/{options.repeat}" if turn >= 0 else "warm-up"
                print(f"{kind} {name}: {run.wall_seconds:.2f} s", file=sys.stderr)
                if turn >= 0:
                    runs.append(run)
    table = medians(runs)
    for name in names:
        print(f"{name}: {known[name].does}")
    print()
    print_table(table)
    packages = ", ".join(f"{name} {number}" for name, number in before["packages"].items())
    print(
        f"\nMedians of {options.repeat}. {before['cores']} cores, {before['ram_gib']} GiB, "
        f"Linux {before['kernel']}, load {before['load_average']:.1f} at the start; "
        f"Python {before['python']}, {packages}"
    )
    if options.json:
        content = {
            "machine": before,
            "checkpoint": json.loads((checkpoint / MANIFEST).read_text()),
            "runs": [asdict(run) for run in runs],
            "medians": table,
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
