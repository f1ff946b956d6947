"""Goal 10: the tools that do one thing each, on the same files, taken in turn."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from compare import Contender, Range, measure

from goals.raw import Line, add, column, has, load, middle

NAME = "peers"
PYTHON = sys.executable
# Tools that are no dependency, without what they depend on: the rest is there, or is not needed.
OTHERS = ("immutables==0.21", "mergekit==0.1.5", "verl==0.9.1")
INSTALLED = Path("build/peers").absolute()
PARAMETERS = "3e8"


@dataclass(frozen=True)
class Pair:
    """A command of ours and one of another tool that makes the same of the same files.

    Attributes:
        what: what both do.
        peer: the other tool.
        ours: our arguments before the output.
        options: and after it.
        theirs: the other command, for an output.
        inputs: what both read.
    """

    what: str
    peer: str
    ours: tuple[str, ...]
    options: tuple[str, ...]
    theirs: Callable[[Path], list[str]]
    inputs: tuple[Path, ...]


def pairs(fsdp: Path, made: Path) -> list[Pair]:
    """The comparisons."""
    state, adapter, base = fsdp / "pytorch_model_fsdp_0", made / "adapter", made / "base"
    tuned = (made / "tuned-a", made / "tuned-b")
    script = str(Path(__file__).with_name("peer_calls.py"))

    def call(name: str, *arguments: Path) -> Callable[[Path], list[str]]:
        start = ["env", f"PYTHONPATH={INSTALLED}", PYTHON, script, name]
        return lambda out: [*start, *map(str, arguments), str(out)]

    merge = [PYTHON, "-m", "accelerate.commands.accelerate_cli", "merge-weights", str(state)]
    one_file = ("--weights-only", "--max-shard-size", "1TB")
    return [
        Pair(
            "FSDP state",
            "accelerate merge-weights",
            ("consolidate", str(state)),
            one_file,
            lambda out: [*merge, str(out)],
            (state,),
        ),
        Pair(
            "DCP to one file",
            "dcp_to_torch_save",
            ("consolidate", str(state)),
            one_file,
            call("dcp_to_torch_save", state),
            (state,),
        ),
        Pair(
            "shards of HuggingFaceStorageWriter",
            "consolidate_safetensors_files_on_every_rank",
            ("consolidate", str(made / "shards")),
            ("--weights-only",),
            call("consolidate_safetensors", made / "shards"),
            (made / "shards",),
        ),
        Pair(
            "LoRA into its base",
            "PEFT merge_and_unload",
            ("merge-lora", str(base)),
            ("--adapter-dir", str(adapter), "--config", str(base), "--dtype", "bf16"),
            call("merge_and_unload", base, adapter),
            (base, adapter),
        ),
        Pair(
            "mean of two models",
            "mergekit linear",
            ("average", *map(str, tuned)),
            ("--config", str(base), "--dtype", "bf16"),
            call("mergekit", *tuned),
            tuned,
        ),
        Pair(
            "state of verl",
            "the arithmetic of verl's merger",
            ("consolidate", str(made / "verl")),
            ("--weights-only", "--dtype", "bf16"),
            call("verl", made / "verl"),
            (made / "verl",),
        ),
    ]


def run(checkpoint: Path) -> None:
    """One round; makes what is read beside the given checkpoint where it is not there."""
    scripts = Path(__file__).parents[1]
    fsdp, made = (checkpoint.parent / f"{kind}-{PARAMETERS}" for kind in ("fsdp", "peers"))
    if not (fsdp / "benchmark.json").exists():
        command = [PYTHON, str(scripts / "make_fsdp.py"), str(fsdp), "--params", PARAMETERS]
        subprocess.run(command, check=True)
    if not (made / "verl").exists():
        shutil.rmtree(made, ignore_errors=True)
        subprocess.run(
            [PYTHON, str(scripts / "make_peers.py"), str(made), "--params", PARAMETERS], check=True
        )
    if not INSTALLED.exists():
        command = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--target", INSTALLED]
        subprocess.run([*command, *OTHERS], check=False)
    for pair in pairs(fsdp, made):
        inputs = tuple(
            Range(file, 0, file.stat().st_size)
            for path in pair.inputs
            for file in path.iterdir()
            if file.is_file()
        )

        def ours(out: Path, pair: Pair = pair) -> list[str]:
            return [PYTHON, "-m", "ckpt_tools", *pair.ours, str(out), *pair.options, "--json"]

        with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
            for name, command in (("ours", ours), ("peer", pair.theirs)):
                contender = Contender(f"{pair.peer}: {name}", pair.what, command, inputs)
                try:
                    measured = measure(contender, Path(scratch))
                except SystemExit as error:
                    print(error, file=sys.stderr)  # a tool that cannot be installed here
                    break
                print(f"{contender.name}: {measured.wall_seconds:.2f} s", file=sys.stderr)
                add(NAME, [asdict(measured) | {"durable_seconds": measured.durable_seconds}])


def lines() -> list[Line]:
    """What the rounds say."""
    raw = load(NAME)
    found = []
    for pair in pairs(Path("FSDP"), Path("PEERS")):
        ours, theirs = f"{pair.peer}: ours", f"{pair.peer}: peer"
        if not has(raw, ours, theirs):
            continue
        against = middle(raw, theirs, "wall_seconds")
        peak = (
            middle(raw, ours, "peak_rss_bytes") / 1e6,
            middle(raw, theirs, "peak_rss_bytes") / 1e6,
        )
        found.append(
            Line(
                10,
                f"{pair.what}, times as fast",
                f"ckpt-tools {' '.join(pair.ours)} OUT",
                column(raw, ours, "wall_seconds"),
                "s",
                against / middle(raw, ours, "wall_seconds"),
                f"{pair.peer}: {against:.2f} s, synced {middle(raw, theirs, 'durable_seconds'):.2f} s",
                limit=f"peak {peak[0]:,.0f} MB; the other {peak[1]:,.0f} MB",
            )
        )
    return found
