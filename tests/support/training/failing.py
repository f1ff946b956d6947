"""One rank of a training that saves again and again: well, with a rank that raises, with one that is killed.

    failing.py OUT KILLED FRAMEWORK:RAISING ...

Prints, as JSON, how each save ended for this rank in which another one, or this one, failed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ckpt_tools import CkptError, training
from ckpt_tools.tensors import gather

# The other ranks learn at once of a rank that raises, and after a while of one that was killed.
TIMEOUT_SECONDS = {"raise": 300.0, "kill": 5.0}
# Enough that every rank is at its share when the victim fails.
SIZE, LAYERS = 1024, 8
FAILS_AT = 2


def model(framework: str) -> Any:
    """A model in the hands of a framework."""
    torch.manual_seed(1)
    module = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(LAYERS)))
    if framework == "ddp":
        return nn.parallel.DistributedDataParallel(module)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def fail_in_the_middle(how: str) -> None:
    """Let the rank's second block fail."""
    fill, count = gather.Gatherer.fill, 0

    def failing(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == FAILS_AT:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the victim's own error")
        fill(self, *arguments)

    gather.Gatherer.fill = failing  # type: ignore[assignment, method-assign]


def saved(wrapped: Any, out: Path, how: str, victim: int) -> dict[str, Any]:
    """How a save ends for this rank in which another one, or this one, fails."""
    fill = gather.Gatherer.fill
    if dist.get_rank() == victim:
        fail_in_the_middle(how)
    told: dict[str, Any] = {"rank": dist.get_rank()}
    try:
        training.save(wrapped, out / how, weights_only=True, timeout=TIMEOUT_SECONDS[how])
    except (CkptError, ValueError) as error:
        told |= {"error": type(error).__name__, "text": str(error)}
    gather.Gatherer.fill = fill  # type: ignore[method-assign]
    return told


def main(out: Path, killed: int, *raising: str) -> None:
    dist.init_process_group("gloo")
    for each in raising:
        framework, victim = each.split(":")
        wrapped = model(framework)
        training.save(wrapped, out / f"{framework}-before", weights_only=True)
        print(json.dumps(saved(wrapped, out, "raise", int(victim))), flush=True)
        training.save(wrapped, out / f"{framework}-after", weights_only=True)
    print(json.dumps(saved(wrapped, out, "kill", killed)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
