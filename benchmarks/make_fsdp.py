"""Writes the sharded state dict of an FSDP2 run of any size, without training.

Owns nothing of the layout: real processes make real DTensors, and `torch.distributed.checkpoint` saves
them as `Accelerator.save_state` has it do. What is in the tensors is the matter of `models.py`.

Strategy: each rank fills its own rows, so that all ranks together hold the model once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from models import ARCHITECTURES, Parameter, Values, choose_config, lay_out
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn

MANIFEST = "benchmark.json"
FOLDER = "pytorch_model_fsdp_0"


def shard(parameter: Parameter, values: Values, mesh: DeviceMesh) -> DTensor:
    """This rank's rows, which FSDP cuts as `torch.chunk` does."""
    rows, *rest = parameter.shape
    step = -(-rows // mesh.size())
    first = min(mesh.get_rank() * step, rows)
    last = min(first + step, rows)
    local = torch.empty(last - first, *rest)
    width = torch.Size(rest).numel()
    values.fill(parameter.name, first * width, local.view(-1).numpy())
    stride = torch.empty(parameter.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], shape=parameter.shape, stride=stride)


def save(
    rank: int, ranks: int, store: str, out: str, seed: int, architecture: str, wanted: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    parameters, _ = lay_out(choose_config(architecture, wanted))
    values = Values(seed)
    state = {parameter.name: shard(parameter, values, mesh) for parameter in parameters}
    checkpoint.save({"model": state}, storage_writer=checkpoint.FileSystemWriter(out))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--params", type=float, default=1e9, metavar="N", help="(1e9)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="(4)")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="olmo2")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    config = choose_config(options.architecture, int(options.params))
    parameters, _ = lay_out(config)
    folder = options.out / FOLDER
    try:
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as scratch:
            arguments = (
                options.ranks,
                str(Path(scratch) / "store"),
                str(folder),
                options.seed,
                options.architecture,
                int(options.params),
            )
            spawn(save, arguments, nprocs=options.ranks)
        config.save_pretrained(options.out / "hf")
        manifest = {
            "ranks": options.ranks,
            "seed": options.seed,
            "architecture": options.architecture,
            "parameters": sum(parameter.numel for parameter in parameters),
            "tensors": len(parameters),
            "torch": torch.__version__,
        }
        # Last, so that what holds it is complete.
        (options.out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(options.out, ignore_errors=True)
        raise


if __name__ == "__main__":
    main()
