"""Owns universal checkpoints, which DeepSpeed's ``ds_to_universal.py`` makes of a save.

A folder ``zero`` has a folder for each parameter, with ``fp32.pt`` in it: the whole master, with
tensor-parallel slices joined. For stages 1 and 2 it is a mapping with the tensor in its shape, for stage 3
the flat tensor; its shape is in the model files, which are copied beside ``zero``. Parameters without a
master (frozen ones, second names, buffers) may have an ``fp32.pt`` too: their 16-bit weight, widened. For
these the copied model file is read.

Source: ``deepspeed/checkpoint/ds_to_universal.py`` (``merge_tp_slices``, ``merge_zero3_slices``,
``main``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.restricted_pickle import TensorRef
from ckpt_tools.readers.containers.torch_file import TorchFile, stored
from ckpt_tools.readers.deepspeed.experts import alone, holds_experts, with_experts
from ckpt_tools.readers.deepspeed.layout import group_shapes
from ckpt_tools.readers.deepspeed.names import UNIVERSAL, names_in
from ckpt_tools.readers.deepspeed.saves import Save, joined
from ckpt_tools.readers.deepspeed.shards import ShardSet, open_shards
from ckpt_tools.readers.deepspeed.weights import Part, default_dtype, round_robin, sorted_part
from ckpt_tools.tensors.catalogue import Stored
from ckpt_tools.tensors.checkpoint import Location, Weight
from ckpt_tools.tensors.regions import Shape

MASTER = "fp32.pt"
_ROUND_ROBIN = (
    "the run had round_robin_gradients, and ds_to_universal.py then writes values of other parameters: "
    "convert the original checkpoint"
)
_CONVERT_AGAIN = "Run ds_to_universal.py again on the original checkpoint."


def read_universal(location: Location) -> tuple[Save, Part]:
    """The universal checkpoint in a folder.

    Raises:
        DamagedCheckpoint: files are missing, or do not fit each other.
    """
    directory = location.directory
    names = names_in(directory)
    if not names.models:
        raise DamagedCheckpoint(
            "a universal checkpoint without its model files, which ds_to_universal.py copies beside `zero`",
            path=directory,
            missing=["mp_rank_00_model_states.pt"],
            hint=_CONVERT_AGAIN,
        )
    shards = [open_shards(names, rank, masters_elsewhere=True) for rank in names.model_ranks]
    shared = shards[0].shared_params
    shards = [replace(one, shared=shared) for one in shards]
    folder = directory / UNIVERSAL
    # A slash in the name of a parameter makes a folder in a folder.
    files = sorted(folder.rglob(MASTER))
    named = [file.parent.relative_to(folder).as_posix() for file in files]
    with ThreadPoolExecutor(16) as pool:
        held = dict(zip(named, pool.map(_tensor, files), strict=True))
    sizes = {file: file.stat().st_size for file in files}
    save = Save(shards, "universal checkpoint", sizes)
    if shards[0].first.content["module"] is None:
        return save, _bare(shards, held)
    shapes = _recorded(shards[0])
    lacking = [name for name in shapes if name not in held]
    if lacking:
        raise DamagedCheckpoint(
            f"{len(lacking)} of {len(shapes)} parameters have no {MASTER}, such as {lacking[0]}",
            path=folder,
            missing=[f"{UNIVERSAL}/{name}/{MASTER}" for name in lacking],
            hint=_CONVERT_AGAIN,
        )
    masters = {name: _shaped(held[name], shapes[name], name) for name in shapes}
    if holds_experts(shards[0]):
        return save, with_experts(alone(shards), masters, {}, [])
    if len(shards) == 1:
        part = sorted_part(shards[0], masters, [])
        mixed = [_ROUND_ROBIN] if shards[0].stage < 3 and round_robin(shards[0]) else []
        return save, replace(part, doubts=[*mixed, *part.doubts])
    # The slices of the ranks' model copies are joined here; the masters are already whole.
    part = joined(shards, [sorted_part(one, {}, []) for one in shards], location)
    if shards[0].stage < 3:
        return save, replace(part, weights=_with_masters(part.weights, masters))
    # Stage 3 has no model copy: the joined tensors are frozen ones and buffers.
    whole = sorted_part(shards[0], masters, [])
    weights = {name: part.weights.get(name, weight) for name, weight in whole.weights.items()}
    return save, replace(whole, weights=weights, replicas=part.replicas)


def _with_masters(
    weights: Mapping[str, Weight], masters: Mapping[str, Stored]
) -> dict[str, Weight]:
    both = {}
    for name, weight in weights.items():
        master = masters.get(name)
        if master is not None and master.shape != weight.shape:
            raise DamagedCheckpoint(
                f"its master has the shape {master.shape}, its weight {weight.shape}",
                path=master.fragments[0].file,
                tensor=name,
                hint=_CONVERT_AGAIN,
            )
        both[name] = replace(weight, master=master)
    return both


def _bare(shards: list[ShardSet], held: Mapping[str, _Held]) -> Part:
    """The masters of a pipeline, whose weights in training dtype are not copied."""
    weights = {}
    for name, one in held.items():
        master = stored(one.ref)
        weights[name] = Weight(
            "parameter", master.shape, default_dtype(shards[0], master), master, None
        )
    return Part(weights, {})


def _recorded(shards: ShardSet) -> dict[str, Shape]:
    """Names and shapes of the trained parameters; shapes are those of one tensor-parallel rank."""
    groups = group_shapes(shards.param_shapes, shards.first.path)
    return {name: shape for group in groups for name, shape in group.items()}


@dataclass(frozen=True)
class _Held:
    """The tensor of a file; a bare one is flat, a recorded one has its shape."""

    ref: TensorRef
    bare: bool


def _tensor(path: Path) -> _Held:
    content = TorchFile(path).load()
    value = content.get("param") if isinstance(content, Mapping) else content
    if not isinstance(value, TensorRef):
        raise DamagedCheckpoint(
            "`param` is missing or is not a tensor", path=path, hint=_CONVERT_AGAIN
        )
    return _Held(value, not isinstance(content, Mapping))


def _shaped(held: _Held, shape: Shape, name: str) -> Stored:
    ref = held.ref
    if not held.bare:
        return stored(ref)
    if ref.numel != math.prod(shape):
        raise DamagedCheckpoint(
            f"it has {ref.numel:,} elements, but {shape} is recorded",
            path=ref.storage.path,
            tensor=name,
            hint=_CONVERT_AGAIN,
        )
    return stored(ref, shape)
