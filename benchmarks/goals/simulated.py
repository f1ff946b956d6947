"""Goal 8: checkpoints of huge runs, by metadata that is real and values that are holes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goals.raw import Line, add, column, has, load, middle

NAME = "simulated"
# 400 Gb/s into and out of each of 8 machines, with 8 ranks each.
LINK_BYTES, MACHINES, RANKS = 50e9, 8, 64


@dataclass(frozen=True)
class Simulated:
    """A group of one model."""

    model: str
    ranks: int

    def run(self, checkpoint: Path) -> None:
        """One round; makes the checkpoint beside the given one where it is not there."""
        here = Path(__file__).parent
        tool = [sys.executable, "-m", "ckpt_tools"]
        made = checkpoint.parent / f"sim-{self.model}"
        if not (made / "benchmark.json").exists():
            shutil.rmtree(made, ignore_errors=True)
            script = [sys.executable, str(here.parent / "make_sparse.py"), str(made)]
            script += ["--model", self.model, "--ranks", str(self.ranks)]
            subprocess.run(script, check=True)
        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
            out = Path(scratch, "out")
            config = ["--config", str(made / "hf"), "--dtype", "bf16", "--dry-run"]
            entry: dict[str, Any] = {"contender": self.model}
            entry |= json.loads((made / "benchmark.json").read_text())
            entry |= timed("inspect", [*tool, "inspect", str(made)])
            entry |= timed("dry_run", [*tool, "consolidate", str(made), str(out), *config])
            facts = [sys.executable, str(here / "plan_facts.py"), str(made), str(out)]
            done = subprocess.run(facts, check=True, capture_output=True, text=True)
            entry |= json.loads(done.stdout)
            entry |= timed("verify", [*tool, "verify", str(out)], check=False)
        print(f"{self.model}: {entry}", file=sys.stderr)
        add(NAME, [entry])

    def lines(self) -> list[Line]:
        """What the rounds say."""
        raw = load(NAME)
        return lines(self.model, self.ranks, raw) if has(raw, self.model) else []


def timed(name: str, command: list[str], *, check: bool = True) -> dict[str, Any]:
    """Seconds and peak memory of a command."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    said = child.stdout.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    if check and child.returncode:
        raise SystemExit(f"{name} failed ({child.returncode}):\n{said[-2000:]}")
    return {
        f"{name}_seconds": wall,
        f"{name}_peak_bytes": usage.ru_maxrss * 1024,
        f"{name}_cpu_seconds": usage.ru_utime + usage.ru_stime,
        f"{name}_status": child.returncode,
    }


def lines(model: str, ranks: int, raw: list[dict[str, Any]]) -> list[Line]:
    """The lines of one model."""
    fact = [entry for entry in raw if entry["contender"] == model][-1]
    what = f"{model} x {ranks:,} ranks"
    sizes = f"{fact['tensors']:,} tensors, {2 * ranks:,} files"
    found = []
    for key, command in (("inspect", "inspect SIM"), ("dry_run", "consolidate SIM OUT --dry-run")):
        peak = middle(raw, model, f"{key}_peak_bytes") / 1e6
        cpu = middle(raw, model, f"{key}_cpu_seconds")
        found.append(
            Line(
                8,
                f"{what}: {command.split()[0]}",
                f"ckpt-tools {command}",
                column(raw, model, f"{key}_seconds"),
                limit=f"CPU {cpu:.1f} s; peak {peak:,.0f} MB; {sizes}",
            )
        )
    found.append(
        Line(
            8,
            f"{what}: verify, structure",
            "ckpt-tools verify OUT",
            column(raw, model, "verify_seconds"),
            limit=f"{fact['files']:,} files of {fact['output_bytes'] / 1e12:.2f} TB",
        )
    )
    found.append(
        Line(
            8,
            f"{what}: largest share of {RANKS} ranks",
            "plan_facts.py SIM OUT",
            (fact["largest_share"],),
            "of an even share",
            most=1.02,
            limit=requests(fact),
        )
    )
    return [*found, extrapolated(what, fact)]


def requests(fact: dict[str, Any]) -> str:
    """The requests of the sample."""
    each = fact["sample_requests"] / fact["sample_blocks"]
    whole = fact["sample_requests"] * fact["output_bytes"] / fact["sample_written"]
    return (
        f"{fact['sample_blocks']} blocks read: {each:.0f} requests a block, median "
        f"{fact['median_request'] / 1024:,.0f} KiB, so {whole:,.0f} in all"
    )


def extrapolated(what: str, fact: dict[str, Any]) -> Line:
    """Seconds on 64 ranks of 8 machines with 400 Gb/s each: links or CPU, whichever is slower."""
    moved = (fact["source_bytes"] + fact["output_bytes"]) / MACHINES / LINK_BYTES
    cpu = fact["sample_cpu_seconds"] * fact["output_bytes"] / fact["sample_written"] / RANKS
    start = fact["dry_run_seconds"]
    arithmetic = (
        f"start {start:.0f} + the larger of link "
        f"({fact['source_bytes']:.3g} + {fact['output_bytes']:.3g} B) / "
        f"{MACHINES} / 50 GB/s = {moved:.1f} and CPU {fact['sample_cpu_seconds']:.2f} s x "
        f"{fact['output_bytes']:.3g} / {fact['sample_written']:.3g} B / {RANKS} = {cpu:.1f}"
    )
    seconds = start + max(moved, cpu)
    return Line(
        8,
        f"{what}: extrapolated, 64 ranks, 8 x 400 Gb/s",
        "arithmetic",
        (seconds,),
        limit=arithmetic,
    )
