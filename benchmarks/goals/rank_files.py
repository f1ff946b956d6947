"""Files of the ranks of an FSDP run, each with its part of every tensor.

They are DTensors of FSDP2 or ShardedTensors of FSDP1. torch makes the objects and saves them, with a process
group that sends nothing. The values are holes.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

WIDTH = 8


def write(folder: Path, kind: str, ranks: int, tensors: int) -> None:
    """Write the file of each rank, in a process for each core."""
    make = partial(_save, folder, kind, ranks, tensors)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        list(processes.map(make, range(ranks), chunksize=8))


def _save(folder: Path, kind: str, ranks: int, tensors: int, rank: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    state = {"DTensor": _dtensors, "ShardedTensor": _sharded}[kind](rank, ranks, tensors)
    with torch.serialization.skip_data():
        torch.save(state, folder / f"model_rank{rank}.pt")
    dist.destroy_process_group()


def _names(tensors: int) -> list[str]:
    return [f"model.layers.{number}.weight" for number in range(tensors)]


def _dtensors(rank: int, ranks: int, tensors: int) -> dict[str, Any]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (ranks,))
    shape = torch.Size([ranks, WIDTH])
    return {
        name: DTensor.from_local(
            torch.empty(1, WIDTH), mesh, [Shard(0)], shape=shape, stride=(WIDTH, 1)
        )
        for name in _names(tensors)
    }


def _sharded(rank: int, ranks: int, tensors: int) -> dict[str, Any]:
    import torch
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
    from torch.distributed._shard.sharded_tensor.metadata import (
        ShardedTensorMetadata,
        TensorProperties,
    )

    def one() -> ShardedTensor:
        shards = [
            ShardMetadata([each, 0], [1, WIDTH], placement=f"rank:{each}/cpu")
            for each in range(ranks)
        ]
        whole = ShardedTensorMetadata(shards, torch.Size([ranks, WIDTH]), TensorProperties())
        local = Shard(torch.empty(1, WIDTH), shards[rank])
        return ShardedTensor._init_from_local_shards_and_global_metadata([local], whole)

    return {name: one() for name in _names(tensors)}
