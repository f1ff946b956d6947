"""A program for torchrun: merge a sharded state of FSDP on all ranks at once, as callers of accelerate do.

It does what accelerate's own script ``test_merge_weights.py`` checks, on CPU: both formats, by the function
and by accelerate's command, each over what the one before left. It takes one argument: where to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.commands import merge as command
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

import ckpt_tools

FUNCTIONS: dict[str, Any] = {
    "theirs": command.merge_fsdp_weights,
    "ours": ckpt_tools.merge_fsdp_weights,
}


def main() -> None:
    """Train, save, merge four times with each function."""
    out = Path(sys.argv[1])
    state = PartialState(cpu=True)  # makes the process group, and is what accelerate waits with
    assert state.num_processes == 2
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sharded: Any = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    sharded(torch.ones(2, 16)).sum().backward()
    torch.optim.SGD(sharded.parameters(), lr=0.1).step()
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.SHARDED_STATE_DICT):
        save({"model": sharded.state_dict()}, checkpoint_id=out / "pytorch_model_fsdp_0")
    with FullyShardedDataParallel.summon_full_params(sharded):
        truth = {name: value.clone() for name, value in model.state_dict().items()}

    for name, merge in FUNCTIONS.items():
        _merge(merge, out / "pytorch_model_fsdp_0", out / name, truth)
    dist.barrier()
    dist.destroy_process_group()


def _merge(merge: Any, source: Path, home: Path, truth: dict[str, torch.Tensor]) -> None:
    command.merge_fsdp_weights = merge
    parser = command.merge_command_parser()
    merge(source, home, safe_serialization=True)
    _check(load_file(home / "model.safetensors"), truth)
    command.merge_command(parser.parse_args([str(source), str(home)]))
    _check(load_file(home / "model.safetensors"), truth)
    merge(source, home, safe_serialization=False)
    _check(torch.load(home / "pytorch_model.bin"), truth)
    unsafe = [str(source), str(home), "--unsafe_serialization"]
    command.merge_command(parser.parse_args(unsafe))
    _check(torch.load(home / "pytorch_model.bin"), truth)


def _check(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    """Every rank reads the file as soon as its own call returns."""
    plain = {name.removeprefix("_fsdp_wrapped_module."): value for name, value in found.items()}
    assert plain.keys() == truth.keys(), (plain.keys(), truth.keys())
    assert all(torch.equal(plain[name], value) for name, value in truth.items())
    dist.barrier()


if __name__ == "__main__":
    main()
