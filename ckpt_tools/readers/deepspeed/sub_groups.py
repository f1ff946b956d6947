"""Owns where the sub-groups of ZeRO-3 lie: in the optimizer files, or in swap files of an NVMe offload.

With ``offload_optimizer`` on NVMe (ZeRO-Infinity) a swapped sub-group is empty in the optimizer file. Its
masters are in ``offloaded_tensors/rankNN/FIRST_LAST.tensor.swp``: the flat partition of the rank, padded
to whole blocks of 1 KiB for each I/O thread. ``FIRST`` and ``LAST`` are the numbers of the first and the last
parameter of the sub-group. DeepSpeed numbers all parameters in the order of the module, from an unknown
start. Small sub-groups stay in the optimizer file.

Sources: ``runtime/zero/stage3.py`` (``_create_fp32_partitions``), ``runtime/swap_tensor/optimizer_utils.py``
(``SwapTensorContext``, ``_io_aligned_numel``), ``runtime/engine.py`` (``save_checkpoint``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.torch_file import contiguous
from ckpt_tools.readers.deepspeed.agreement import NODE_LOCAL, OptimState
from ckpt_tools.readers.deepspeed.shards import ShardSet
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.regions import Shape

OFFLOADED = "offloaded_tensors"
_SWAP_FILE = re.compile(r"(\d+)_(\d+)\.tensor\.swp")
_BLOCK = 1024
_OTHER_SAVE = "The file belongs to another save or run. Keep the files of one save apart."
_ON_NVME = "ZeRO-3 with the optimizer on NVMe"

Numbers = tuple[int, int]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class SubGroup:
    """One flat sub-group, of which each rank has a partition of the same length.

    Attributes:
        dtype: of its elements.
        numel: length of a rank's partition.
        files: the file of each rank.
        bases: the byte of each file at which the partition starts.
    """

    dtype: DType
    numel: int
    files: Sequence[Path]
    bases: Sequence[int]


def sub_groups(shards: ShardSet, groups: Sequence[Shapes]) -> list[SubGroup]:
    """The sub-groups of a save.

    Args:
        shards: the files.
        groups: names and shapes of the parameters.

    Raises:
        DamagedCheckpoint: the ranks differ, or a swap file is missing or truncated.
        UnsupportedLayout: masters are on NVMe and not in the checkpoint, or the numbers of the swap files do
            not determine their sub-groups.
    """
    held = _in_optimizer_files(shards.optims)
    if not _offloads(shards) or all(group.numel for group in held):
        return held
    if len(held) != len(groups):
        raise _undetermined(
            shards, f"{len(held)} sub-groups for {len(groups)} groups of parameters"
        )
    lengths = [_length(shapes, shards.world_size) for shapes in groups]
    swapped = [index for index, group in enumerate(held) if lengths[index] and not group.numel]
    if not swapped:
        return held
    folders = [_swap_files(shards, optim, len(swapped)) for optim in shards.optims]
    sizes = {index: lengths[index] * held[index].dtype.itemsize for index in swapped}
    numbers = _numbers(shards, {index: groups[index] for index in swapped}, sizes, folders[0])
    for index in swapped:
        files = [_swap_file(f, numbers[index], sizes[index], shards) for f in folders]
        held[index] = SubGroup(held[index].dtype, lengths[index], files, [0] * len(files))
    return held


def swap_files(shards: ShardSet) -> dict[Path, int]:
    """Path to size in bytes of the files of an NVMe offload that hold masters."""
    if not _offloads(shards):
        return {}
    found = {}
    for optim in shards.optims:
        for path in _listed(_folder(shards, optim)):
            if _SWAP_FILE.fullmatch(path.name):
                found[path] = path.stat().st_size
    return found


def _in_optimizer_files(optims: Sequence[OptimState]) -> list[SubGroup]:
    first = optims[0].flat_groups
    for optim in optims:
        groups = optim.flat_groups
        if len(groups) == len(first) and [g.dtype for g in groups] != [g.dtype for g in first]:
            raise DamagedCheckpoint(
                "the dtypes of its sub-groups differ from those of rank 0",
                path=optim.path,
                hint=_OTHER_SAVE,
            )
        found = [contiguous(group, "a flat group").numel for group in groups]
        if found != [group.numel for group in first]:
            raise DamagedCheckpoint(
                f"its sub-groups have {found} elements, those of rank 0 {[g.numel for g in first]}",
                path=optim.path,
                hint=_OTHER_SAVE,
            )
    files = [optim.path for optim in optims]
    return [
        SubGroup(
            group.dtype, group.numel, files, [o.flat_groups[index].byte_offset for o in optims]
        )
        for index, group in enumerate(first)
    ]


def _length(shapes: Shapes, world_size: int) -> int:
    return sum(math.ceil(math.prod(shape) / world_size) for shape in shapes.values())


# NVMe.


def _section(config: Any, *path: str) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _offloads(shards: ShardSet) -> bool:
    config = shards.first.get("ds_config")
    device = _section(config, "zero_optimization", "offload_optimizer", "device")
    return isinstance(device, str) and device == "nvme"


def _folder(shards: ShardSet, optim: OptimState) -> Path:
    """The folder of a rank's swap files; up to DeepSpeed 0.16 one rank's lay in the upper folder."""
    upper = shards.directory / OFFLOADED
    alone = shards.world_size == 1 and any(_SWAP_FILE.fullmatch(p.name) for p in _listed(upper))
    return upper if alone else upper / f"rank{optim.rank:02d}"


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _swap_files(shards: ShardSet, optim: OptimState, swapped: int) -> dict[Numbers, Path]:
    """The swap files of one rank's masters by the numbers in their names."""
    folder = _folder(shards, optim)
    found = {
        (int(match[1]), int(match[2])): path
        for path in _listed(folder)
        if (match := _SWAP_FILE.fullmatch(path.name))
    }
    if found:
        return found
    upper = _listed(shards.directory / OFFLOADED)
    if any(_SWAP_FILE.fullmatch(path.name) for path in upper):
        raise _undetermined(
            shards,
            f"the swap files of {shards.world_size} ranks have the same names and lie in one folder",
        )
    if upper:
        raise DamagedCheckpoint(
            f"{_ON_NVME}: the swap files of rank {optim.rank} are missing",
            path=folder,
            missing=[str(folder.relative_to(shards.directory))],
            hint=NODE_LOCAL,
        )
    config = shards.first.get("ds_config")
    place = _section(config, "zero_optimization", "offload_optimizer", "nvme_path")
    raise UnsupportedLayout(
        f"{_ON_NVME}: the masters of {swapped} of {len(optim.flat_groups)} sub-groups were in swap files "
        f"below {place}, and the save did not copy them",
        path=optim.path,
        hint="DeepSpeed 0.12 and older copy none. If the run ended with this save, copy "
        f"{place}/zero_stage_3/optimizer/rankN of each rank to {OFFLOADED}/rankNN (two digits) beside this "
        "file. In a live run, engine.save_16bit_model writes the weights.",
    )


def _numbers(
    shards: ShardSet,
    swapped: Mapping[int, Shapes],
    sizes: Mapping[int, int],
    files: Mapping[Numbers, Path],
) -> dict[int, Numbers]:
    """The numbers in the name of each swapped sub-group's file.

    Raises:
        UnsupportedLayout: the numbers fit no order of the parameters, or several, and sizes do not decide.
    """
    place = {name: index for index, name in enumerate(_numbered(shards))}
    ends = {index: (next(iter(s)), next(reversed(list(s)))) for index, s in swapped.items()}
    if all(name in place for pair in ends.values() for name in pair):
        places = {index: (place[a], place[b]) for index, (a, b) in ends.items()}
        low = next(iter(places.values()))
        starts = [
            start
            for start in (first - low[0] for first, _ in files)
            if all((a + start, b + start) in files for a, b in places.values())
        ]
        if len(set(starts)) == 1:
            return {index: (a + starts[0], b + starts[0]) for index, (a, b) in places.items()}
    by_size: dict[int, list[Numbers]] = {}
    for numbers, path in files.items():
        by_size.setdefault(path.stat().st_size, []).append(numbers)
    padded = {index: _padded(shards, size) for index, size in sizes.items()}
    alone = len(set(padded.values())) == len(padded) == len(files)
    if not alone or any(len(by_size.get(size, ())) != 1 for size in padded.values()):
        raise _undetermined(
            shards, "the numbers of its swap files do not determine which sub-groups they hold"
        )
    return {index: by_size[size][0] for index, size in padded.items()}


def _numbered(shards: ShardSet) -> list[str]:
    """The parameters in the order in which DeepSpeed numbers them."""
    buffers, second = set(shards.first.get("buffer_names") or ()), shards.shared_params
    module = shards.first.content["module"]
    return [name for name in module if name not in buffers and name not in second]


def _padded(shards: ShardSet, size: int) -> int:
    """The size of a swap file: DeepSpeed pads it to a block for each I/O thread."""
    aio = _section(shards.first.get("ds_config"), "aio")
    threads = _section(aio, "intra_op_parallelism") or _section(aio, "thread_count") or 1
    block = _BLOCK * int(threads)
    return math.ceil(size / block) * block


def _swap_file(
    files: Mapping[Numbers, Path], numbers: Numbers, size: int, shards: ShardSet
) -> Path:
    path = files.get(numbers)
    if path is None:
        folder = next(iter(files.values())).parent
        name = f"{numbers[0]}_{numbers[1]}.tensor.swp"
        raise DamagedCheckpoint(
            f"{_ON_NVME}: {name} is missing, which other ranks have",
            path=folder,
            missing=[str((folder / name).relative_to(shards.directory))],
            hint="Copy the folder anew from where it was written.",
        )
    held = path.stat().st_size
    if held != _padded(shards, size):
        raise DamagedCheckpoint(
            f"it has {held:,} bytes, and its sub-group takes {_padded(shards, size):,}",
            path=path,
            hint="The file is truncated, or belongs to another save.",
        )
    return path


def _undetermined(shards: ShardSet, why: str) -> UnsupportedLayout:
    return UnsupportedLayout(
        f"{_ON_NVME}: {why}",
        path=shards.directory,
        hint="Load it in the training script, and save the weights with engine.save_16bit_model and "
        "stage3_gather_16bit_weights_on_model_save.",
    )
