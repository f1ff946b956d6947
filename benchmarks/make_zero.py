"""Writes a ZeRO-2 or ZeRO-3 checkpoint of any size as DeepSpeed 0.19 would, without training.

Owns the on-disk layout: file names, key order, pickled classes, paddings, storage sharing. What is
in the tensors is the matter of `models.py`.

Strategy: one rank is built, saved and dropped at a time, so memory is one rank's tensors; for stage
2 it is also, at the end, the whole 16-bit module, which DeepSpeed too keeps in one file.
`check_make_zero.py` holds all this to the files of a real run.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import os
import shutil
import stat
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read when deepspeed is imported: its probing of other accelerators is slow and may fail.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import zero_to_fp32, zero_to_torch
from deepspeed.utils.tensor_fragment import fragment_address
from models import ARCHITECTURES, Parameter, Values, choose_config, lay_out
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    import transformers

MANIFEST = "benchmark.json"
DEFAULT_SUB_GROUP = 1_000_000_000  # elements of one rank; DeepSpeed's own default
STEP = 100
TAG = f"global_step{STEP}"


@dataclass(frozen=True)
class Job:
    out: Path
    stage: int
    ranks: int
    seed: int
    moments: bool
    sub_group_size: int
    parameters: tuple[Parameter, ...]
    state_dict: OrderedDict[str, torch.Tensor]  # on meta: order and `_metadata` as the engine saves
    values: Values

    @property
    def folder(self) -> Path:
        return self.out / TAG

    @property
    def config(self) -> dict[str, Any]:
        zero: dict[str, int] = {"stage": self.stage}
        if self.sub_group_size != DEFAULT_SUB_GROUP:
            zero["sub_group_size"] = self.sub_group_size
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
        }


def plan(
    config: transformers.PretrainedConfig,
    out: Path,
    *,
    stage: int,
    ranks: int,
    seed: int,
    moments: bool,
    sub_group_size: int,
) -> Job:
    parameters, state = lay_out(config)
    return Job(out, stage, ranks, seed, moments, sub_group_size, parameters, state, Values(seed))


def write(job: Job) -> dict[str, Any]:
    """Writes the whole checkpoint; returns the manifest, which says where the masters lie."""
    job.folder.mkdir(parents=True)
    masters = []
    for rank in range(job.ranks):
        path = job.folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        state = stage3_optimizer(job, rank) if job.stage == 3 else stage2_optimizer(job, rank)
        content = {
            "optimizer_state_dict": state,
            "ds_config": job.config,
            "ds_version": deepspeed.__version__,
        }
        torch.save(content, path)
        del state, content
        masters += master_ranges(job, path)
        if job.stage == 3:
            path = job.folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            torch.save(model_state(job), path)
    if job.stage == 2:
        torch.save(model_state(job), job.folder / "mp_rank_00_model_states.pt")
    for module in (zero_to_fp32, zero_to_torch):
        script = job.out / f"{module.__name__.rpartition('.')[2]}.py"
        shutil.copyfile(inspect.getfile(module), script)
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
    (job.out / "latest").write_text(TAG)
    return {
        "stage": job.stage,
        "ranks": job.ranks,
        "seed": job.seed,
        "moments": job.moments,
        "parameters": sum(p.numel for p in job.parameters),
        "masters": masters,
    }


def stage3_optimizer(job: Job, rank: int) -> dict[str, Any]:
    masters, moments = [], []
    for number, group in enumerate(sub_groups(job)):
        parts = [math.ceil(p.numel / job.ranks) for p in group]
        flat = np.zeros(sum(parts), dtype=np.float32)
        at = 0
        for parameter, part in zip(group, parts, strict=True):
            # The last ranks hold padding: less than a part of the parameter, or none of it.
            start = min(rank * part, parameter.numel)
            stop = min(start + part, parameter.numel)
            job.values.fill(parameter.name, start, flat[at : at + stop - start])
            at += part
        tensor = torch.from_numpy(flat).requires_grad_()
        # An attribute on the tensor changes how it is pickled (`_rebuild_from_type_v2`).
        tensor.ds_id = f"{group[0].index}_{group[-1].index}"  # type: ignore[attr-defined]
        masters.append(tensor)
        moments.append(adam_state(job, f"rank {rank} group {number}", flat.size))
    return {
        "zero_stage": ZeroStageEnum.weights,
        "loss_scaler": LossScaler(1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": job.ranks,
        "optimizer_state_dict": optimizer_state(moments),
        "fp32_flat_groups": masters,
    }


def stage2_optimizer(job: Job, rank: int) -> dict[str, Any]:
    total, size = group_numel(job), aligned_numel(job) // job.ranks
    begin, end = rank * size, (rank + 1) * size
    padding = min(size, max(0, end - total))
    flat = np.zeros(size, dtype=np.float32)
    mapping: OrderedDict[str, fragment_address] = OrderedDict()
    for parameter in job.parameters:
        start = max(parameter.start, begin)
        stop = min(parameter.start + parameter.numel, end)
        if start < stop:
            job.values.fill(
                parameter.name, start - parameter.start, flat[start - begin : stop - begin]
            )
            mapping[parameter.name] = fragment_address(numel=stop - start, start=start - begin)
    # A view: the padding is cut from the tensor but is still in the storage torch.save writes.
    master = torch.from_numpy(flat).requires_grad_()[: size - padding]
    return {
        "loss_scaler": LossScaler(1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": job.config["gradient_clipping"],
        "base_optimizer_state": optimizer_state([adam_state(job, f"rank {rank}", size)]),
        "single_partition_of_fp32_groups": [master],
        "zero_stage": ZeroStageEnum.gradients,
        "group_paddings": [padding],
        "param_alignment_paddings": [[0] * len(job.parameters)],
        "partition_count": [job.ranks],
        "ds_version": deepspeed.__version__,
        "param_slice_mappings": [mapping],
    }


def model_state(job: Job) -> dict[str, Any]:
    module = copy.copy(job.state_dict)  # with `_metadata`, which its own `.copy()` would drop
    if job.stage == 3:
        module.update((name, torch.empty(0, dtype=torch.bfloat16)) for name in module)
        groups = list(sub_groups(job))
    else:
        # The live weights are views of one flat buffer, and so share one storage in the file.
        flat = torch.zeros(aligned_numel(job), dtype=torch.bfloat16)
        for parameter in job.parameters:
            view = flat[parameter.start : parameter.start + parameter.numel]
            for start in range(0, parameter.numel, Values.BLOCK):
                stop = min(start + Values.BLOCK, parameter.numel)
                piece = job.values.take(parameter.name, start, stop)
                view[start:stop] = torch.from_numpy(piece).to(torch.bfloat16)
            module[parameter.name] = view.view(parameter.shape)
        groups = [list(job.parameters)]
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((p.name, p.shape) for p in group) for group in groups],
        "frozen_param_shapes": OrderedDict(),
        "shared_params": {},
        "frozen_param_fragments": OrderedDict(),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": STEP,
        "global_samples": STEP * job.ranks,
        "dp_world_size": job.ranks,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": job.config,
        "ds_version": deepspeed.__version__,
    }


def sub_groups(job: Job) -> Iterator[list[Parameter]]:
    """Stage 3 closes a sub-group once the local parts in it reach `sub_group_size` elements."""
    group: list[Parameter] = []
    size = 0
    for parameter in job.parameters:
        group.append(parameter)
        size += math.ceil(parameter.numel / job.ranks)
        if size >= job.sub_group_size:
            yield group
            group, size = [], 0
    if group:
        yield group


def group_numel(job: Job) -> int:
    return job.parameters[-1].start + job.parameters[-1].numel


def aligned_numel(job: Job) -> int:
    """Stage 2 aligns the flat group so that each rank's part starts on four bytes of 16-bit."""
    alignment = 2 * job.ranks
    return math.ceil(group_numel(job) / alignment) * alignment


def adam_state(job: Job, name: str, numel: int) -> dict[str, torch.Tensor]:
    state = {"step": torch.tensor(float(STEP))}
    if job.moments:
        state["exp_avg"] = torch.from_numpy(job.values.take(f"exp_avg {name}", 0, numel))
        square = job.values.take(f"exp_avg_sq {name}", 0, numel)
        state["exp_avg_sq"] = torch.from_numpy(np.square(square, out=square))
    return state


def optimizer_state(states: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """What `torch.optim.AdamW.state_dict()` gives for one group of these tensors."""
    group = {
        "lr": 0.001,
        "betas": (0.9, 0.999),
        "eps": 1e-08,
        "weight_decay": 0.01,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
        "params": list(range(len(states))),
    }
    return {"state": dict(enumerate(states)), "param_groups": [group]}


def master_ranges(job: Job, path: Path) -> list[dict[str, Any]]:
    """Where the masters lie in a file, for `compare.py`, which must not import torch."""
    key = "fp32_flat_groups" if job.stage == 3 else "single_partition_of_fp32_groups"
    with FakeTensorMode():
        tensors = torch.load(path, weights_only=False)["optimizer_state_dict"][key]
    return [
        {
            "file": str(path.relative_to(job.out)),
            "offset": tensor.untyped_storage()._checkpoint_offset,
            "bytes": tensor.numel() * tensor.element_size(),
        }
        for tensor in tensors
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a directory that does not exist yet")
    parser.add_argument("--stage", type=int, choices=(2, 3), default=3)
    parser.add_argument("--params", type=float, default=1.5e9, help="about how many (1.5e9)")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="olmo2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-moments", action="store_true", help="a third of the disk")
    parser.add_argument("--sub-group-size", type=int, default=DEFAULT_SUB_GROUP)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    config = choose_config(options.architecture, int(options.params))
    job = plan(
        config,
        options.out,
        stage=options.stage,
        ranks=options.ranks,
        seed=options.seed,
        moments=not options.no_moments,
        sub_group_size=options.sub_group_size,
    )
    manifest = write(job)
    config.save_pretrained(options.out / "hf")
    (options.out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    size = sum(file.stat().st_size for file in job.folder.iterdir())
    print(f"{manifest['parameters']:,} parameters, {size / 1e9:.2f} GB in {options.out}")


if __name__ == "__main__":
    main()
