"""Count the DeepSpeed fixtures that each converter turns into the masters of the live engine, bit for bit.

    python benchmarks/converters.py

The converters are ckpt-tools, and DeepSpeed's own `zero_to_fp32.py` and `ds_to_universal.py` of the installed
release. A fixture counts if every tensor of its `truth/masters.safetensors` is found under its name with its
values, in fp32; its shape counts too where the converter states one.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from ckpt_tools import readers

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
SECONDS = 120
Tensors = Mapping[str, torch.Tensor]


def ours(checkpoint: Path) -> Tensors:
    """ckpt-tools; the shapes of the model stand for `--config` where slices have no record."""
    truth = load_file(checkpoint.parent / "truth" / "model.safetensors")
    location = readers.locate(checkpoint)
    shapes = {name: tuple(tensor.shape) for name, tensor in truth.items()}
    found = readers.read(replace(location, model_shapes=lambda: shapes))
    return {name: tensor.load() for name, tensor in found.catalogue().items()}


def zero_to_fp32(checkpoint: Path) -> Tensors:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint)))


def ds_to_universal(checkpoint: Path) -> Tensors:
    from deepspeed.checkpoint import ds_to_universal as converter

    with tempfile.TemporaryDirectory() as output:
        converter.main(
            Namespace(
                input_folder=str(checkpoint / (checkpoint / "latest").read_text()),
                output_folder=output,
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
        found = {}
        for file in Path(output).glob("zero/*/fp32.pt"):
            content = torch.load(file, weights_only=False)
            found[file.parent.name] = content["param"] if isinstance(content, dict) else content
        return found


def agrees(found: Tensors, truth: Tensors) -> bool:
    """Whether every true tensor was found, with its values and, unless flat, its shape."""
    for name, tensor in truth.items():
        value = found.get(name)
        if value is None or value.numel() != tensor.numel():
            return False
        if value.dim() != 1 and value.shape != tensor.shape:
            return False
        if not torch.equal(value.float().reshape(-1), tensor.float().reshape(-1)):
            return False
    return True


def attempt(convert: Callable[[Path], Tensors], checkpoint: Path, answer: Path) -> None:
    """One converter on one fixture, in a process of its own."""
    with answer.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with contextlib.suppress(Exception, SystemExit):
        truth = load_file(checkpoint.parent / "truth" / "masters.safetensors")
        answer.write_text(str(agrees(convert(checkpoint), truth)))


def main() -> None:
    import deepspeed

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    counts: Counter[tuple[str, str]] = Counter()
    fork = multiprocessing.get_context("fork")
    for facts in sorted(FIXTURES.glob("*/*/facts.json")):
        case, checkpoint = facts.parent, facts.parent / "checkpoint"
        truth = case / "truth" / "masters.safetensors"
        if "deepspeed_version" not in json.loads(facts.read_text()) or not truth.is_file():
            continue
        if not (checkpoint / "latest").is_file():  # its source is not shipped, so they cannot run
            continue
        group = case.parent.name
        counts[group, "fixtures"] += 1
        for convert in (ours, zero_to_fp32, ds_to_universal):
            with tempfile.TemporaryDirectory() as scratch:
                answer = Path(scratch) / "answer"
                process = fork.Process(target=attempt, args=(convert, checkpoint, answer))
                process.start()
                process.join(SECONDS)
                process.kill()
                process.join()
                right = answer.is_file() and answer.read_text() == "True"
            counts[group, convert.__name__] += right
            print(f"{case.name}: {convert.__name__} {right}", file=sys.stderr, flush=True)
    print(f"deepspeed {deepspeed.__version__}")
    for (group, what), count in sorted(counts.items()):
        print(f"{group:10} {what:16} {count}")


if __name__ == "__main__":
    main()
