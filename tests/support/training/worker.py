"""One rank of a training that saves itself twice at the same step: as its framework does, and cleanly.

    worker.py OUT FRAMEWORK:MODEL[:DTYPE] ...

Each case goes to ``OUT/CASE``: ``checkpoint``, ``live``, ``hf`` with config and tokenizer, ``options.json``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckpt_tools import training
from ckpt_tools.cli.signals import leave_at_once
from tests.support.training.frameworks import FRAMEWORKS, subject
from tests.support.warm import warm_children


def run(case: str, out: Path) -> None:
    """Train and save one case."""
    framework, name, *dtype = case.split(":")
    torch.manual_seed(1234)
    what = subject(name)
    trained = FRAMEWORKS[framework](what.recipe)
    trained.checkpoint(out / "checkpoint")
    options: dict[str, Any] = {**what.options, "dtype": dtype[0] if dtype else "auto"}
    if leads():
        (out / "hf").mkdir(parents=True)
        (out / "options.json").write_text(json.dumps(options))
        if what.model is not None:
            what.model.config.save_pretrained(out / "hf")
        if "adapter" in options:
            what.recipe.module.peft_config["default"].save_pretrained(str(out / "hf"))
        if what.recipe.tokenizer is not None:
            what.recipe.tokenizer.save_pretrained(out / "hf")
    report = training.save(
        trained.model,
        out / "live",
        accelerator=trained.accelerator,
        tokenizer=what.recipe.tokenizer,
        **options,
    )
    assert report.output == out / "live"


def leads() -> bool:
    """Whether this is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def main(out: Path, cases: list[str]) -> None:
    """Every case; one that fails does not keep the others from running."""
    failed = []
    for case in cases:
        try:
            run(case, out / case.replace(":", "-"))
        except Exception:
            failed.append(f"{case}\n{traceback.format_exc()}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    with warm_children():
        main(Path(sys.argv[1]), sys.argv[2:])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # A thread of gloo may abort an interpreter that shuts down.
        leave_at_once(0)
