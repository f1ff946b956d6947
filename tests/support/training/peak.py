"""One rank that saves a model of any size and says how much memory that took.

    peak.py OUT FRAMEWORK WIDTH

Prints, as JSON, by how many bytes the resident memory of this rank grew at most while it saved.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ckpt_tools import training
from ckpt_tools.cli.signals import leave_at_once
from tests.support.training.frameworks import quiet_deepspeed

LAYERS = 12


def wrapped(framework: str, width: int) -> Any:
    """A model in the hands of a framework."""
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    if framework == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in module:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    module.to_empty(device="cpu")
    for number, parameter in enumerate(module.parameters()):
        nn.init.constant_(parameter, number + 0.5)
    if framework == "zero3":
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": True},
        }
        engine, *_ = quiet_deepspeed().initialize(model=module, config=config)
        return engine
    return module


def resident(what: str) -> int:
    """Bytes: ``VmRSS`` is what is resident, ``VmHWM`` the most there was."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{what}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main(out: Path, framework: str, width: int) -> None:
    dist.init_process_group("gloo")
    # What is imported, and threads that are made, at the first save.
    training.save(wrapped(framework, 8), out / "small", weights_only=True)
    model = wrapped(framework, width)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most starts anew
    training.save(model, out / "large", weights_only=True)
    grown = resident("VmHWM") - before
    told = {"rank": dist.get_rank(), "grown": grown, "resident": before}
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo may abort an interpreter that shuts down.
    leave_at_once(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
