"""Owns the layouts of ZeRO checkpoints: the place of each parameter's elements in the flat groups.

Each layout is one function over metadata that was already read:

* stages 1 and 2, and ``BF16_Optimizer``: one flat vector for each parameter group, with the parameters one
  after the other (and recorded alignment paddings between them), cut into equal partitions. The padding at
  the end is not saved, except by ``BF16_Optimizer``, which records its length;
* stage 3: per sub-group, each rank holds its slice of ``ceil(numel / world_size)`` elements of each
  parameter; only the last slices are padded;
* stage 0: one file, without names. The fused optimizers keep one flat fp32 vector per parameter group,
  the unfused one a list of tensors per group, in the order of the optimizer's groups. This is usually,
  but not necessarily, the order of the module, so an order is proposed from the values.

Sources: ``stage_1_and_2.py`` (``_get_groups_without_padding``, ``flatten_dense_tensors_aligned``),
``bf16_optimizer.py`` (``_setup_for_real_optimizer``), ``stage3.py``, ``partition_parameters.py``
(``partition_numel``), ``utils/zero_to_fp32.py``, ``fp16/fused_optimizer.py`` and
``fp16/unfused_optimizer.py`` (``state_dict``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_tools.errors import DamagedCheckpoint
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.containers.torch_file import contiguous
from ckpt_tools.readers.deepspeed.agreement import OptimState
from ckpt_tools.readers.deepspeed.flat import FlatVector, match_by_value, named_weights
from ckpt_tools.readers.deepspeed.shards import ShardSet
from ckpt_tools.readers.deepspeed.sub_groups import sub_groups
from ckpt_tools.tensors.catalogue import FlatRange, Fragment, Shape, Stored
from ckpt_tools.tensors.fragments import EvenSlices

BY_MAPPING = "only the recorded slice mappings say which masters belong to which parameter"


def group_shapes(shapes: Any, path: Path) -> list[dict[str, Shape]]:
    """``param_shapes`` as a list of groups; DeepSpeed up to 0.5 wrote one mapping for all groups."""
    groups = [shapes] if isinstance(shapes, Mapping) else shapes
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise DamagedCheckpoint("its param_shapes are missing or malformed", path=path)
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def partitioned_masters(shards: ShardSet) -> tuple[dict[str, Stored], list[str]]:
    """Masters of stages 1 and 2 and of ``BF16_Optimizer``.

    Returns:
        The masters by name, and the doubts. A doubt is a group whose recorded slice mappings contradict the
        order of the parameters, so that all values must be compared.

    Raises:
        DamagedCheckpoint: the partitions do not hold what the parameters need.
    """
    masters: dict[str, Stored] = {}
    doubts: list[str] = []
    groups = group_shapes(shards.param_shapes, shards.first.path)
    held = len(shards.optims[0].flat_groups)
    if isinstance(shards.param_shapes, Mapping):
        return _matched_masters(shards, groups[0])
    if held != len(groups):
        raise DamagedCheckpoint(
            f"{held} flat groups for {len(groups)} groups of parameters",
            path=shards.optims[0].path,
        )
    for index, shapes in enumerate(groups):
        found, doubt = group_masters(shards, index, shapes)
        masters |= found
        doubts += doubt
    return masters, doubts


def group_masters(
    shards: ShardSet, index: int, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Stored], list[str]]:
    """Masters of one group of parameters, and the doubt about their order, if there is one.

    Args:
        shards: the optimizer files among which the group is partitioned.
        index: which flat group.
        shapes: its parameters, in order.
    """
    masters: dict[str, Stored] = {}
    parts = partitions(shards, index)
    gaps = _alignment_paddings(shards, index, len(shapes))
    end = 0
    for gap, (name, shape) in zip(gaps, shapes.items(), strict=True):
        start, end = end, end + math.prod(shape)
        masters[name] = parts.tensor(start, shape, name)
        end += gap
    parts.check_used(end, shards.world_size)
    if _mappings_agree(shards, index, shapes, gaps, parts):
        return masters, []
    return masters, [f"the recorded slice mappings of group {index} contradict its order"]


def mapped_masters(shards: ShardSet, index: int) -> dict[str, Stored]:
    """Masters of a group whose shapes are not recorded, each flat; slice mappings record its place."""
    vector = partitions(shards, index)
    places: dict[str, list[int]] = {}
    for rank, optim in enumerate(shards.optims):
        for name, (start, numel) in _slices(optim, index).items():
            low = vector.starts[rank] + start
            place = places.setdefault(name, [low, low])
            if place[1] != low:
                raise DamagedCheckpoint(
                    "its slices do not follow each other", path=optim.path, tensor=name
                )
            place[1] = low + numel
    return {name: vector.tensor(low, (high - low,), name) for name, (low, high) in places.items()}


def _slices(optim: OptimState, index: int) -> dict[str, tuple[int, int]]:
    mappings = optim.get("param_slice_mappings")
    if not isinstance(mappings, list) or index >= len(mappings):
        raise DamagedCheckpoint(
            "it records neither the shapes of its parameters nor where they lie",
            path=optim.path,
            hint="Only DeepSpeed since 0.7 writes `param_slice_mappings`. --weights model takes the 16-bit "
            "weights.",
        )
    found = {}
    for name, address in mappings[index].items():
        state = address.state if isinstance(address, Opaque) else None
        if not isinstance(state, dict):
            raise DamagedCheckpoint("a slice mapping is malformed", path=optim.path, tensor=name)
        found[name] = (int(state["start"]), int(state["numel"]))
    return found


def _matched_masters(
    shards: ShardSet, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Stored], list[str]]:
    """Masters of DeepSpeed up to 0.5, whose one mapping may have another order than the vectors."""
    vectors = [partitions(shards, index) for index in range(len(shards.optims[0].flat_groups))]
    module = named_weights(shards.first.content)
    order = {name: module[name] for name in shapes if name in module}
    masters = match_by_value(vectors, order, slack=2 * shards.world_size)
    if masters is None:
        raise DamagedCheckpoint(
            "the values of the masters match no order of the module's weights",
            path=shards.optims[0].path,
            hint="The files belong to two saves, or a file was damaged. Pass --weights model to take the "
            "16-bit weights instead.",
        )
    return masters, ["DeepSpeed up to 0.5 did not record the order of parameters faithfully"]


def partitions(shards: ShardSet, group: int) -> FlatVector:
    """The flat vector of a group, of which each rank has a part."""
    refs, lengths = [], []
    if shards.optims[0].intervals is not None:
        # In each interval the partitions of all ranks follow each other.
        columns = zip(
            *(optim.intervals[group] for optim in shards.optims if optim.intervals), strict=True
        )
        refs = [contiguous(ref, "a partition") for interval in columns for ref in interval]
        return FlatVector(refs, [ref.numel for ref in refs])
    for optim in shards.optims:
        ref = contiguous(optim.flat_groups[group], f"flat group {group}")
        padding = 0
        if shards.is_bf16_optimizer:
            paddings = optim.get("group_paddings") or []
            padding = int(paddings[group]) if group < len(paddings) else 0
        refs.append(ref)
        lengths.append(max(ref.numel - padding, 0))
    return FlatVector(refs, lengths)


def _alignment_paddings(shards: ShardSet, group: int, count: int) -> Sequence[int]:
    recorded = shards.optims[0].get("param_alignment_paddings")
    if not recorded:
        return [0] * count
    gaps = recorded[group]
    if len(gaps) != count:
        raise DamagedCheckpoint(
            f"{len(gaps)} alignment paddings for {count} parameters of group {group}",
            path=shards.optims[0].path,
            hint="The model file and the optimizer files belong to different saves.",
        )
    return [int(gap) for gap in gaps]


def _mappings_agree(
    shards: ShardSet,
    group: int,
    shapes: Mapping[str, Shape],
    gaps: Sequence[int],
    parts: FlatVector,
) -> bool:
    """Whether each rank's recorded fragments agree with the order of the parameters."""
    for rank, optim in enumerate(shards.optims):
        mappings = optim.get("param_slice_mappings")
        if not isinstance(mappings, list) or group >= len(mappings):
            continue
        low, high = parts.starts[rank], parts.starts[rank + 1]
        position = 0
        for gap, (name, shape) in zip(gaps, shapes.items(), strict=True):
            start, stop = max(position, low), min(position + math.prod(shape), high)
            address = mappings[group].get(name)
            state = address.state if isinstance(address, Opaque) else None
            expected = {"numel": stop - start, "start": start - low} if start < stop else None
            if state is not None and (expected is None or state != expected):
                return False
            if state is None and expected is not None:
                return False
            position += math.prod(shape) + gap
    return True


def sliced_masters(
    shards: ShardSet, groups: Sequence[Mapping[str, Shape]] | None = None
) -> dict[str, Stored]:
    """Masters of stage 3.

    Args:
        shards: the files.
        groups: names and shapes of the parameters; by default those that the model file records.

    Raises:
        DamagedCheckpoint: the sub-groups do not hold what the parameters need.
    """
    world_size = shards.world_size
    if groups is None:
        groups = group_shapes(shards.param_shapes, shards.first.path)
    held = sub_groups(shards, groups)
    masters: dict[str, Stored] = {}
    group, position = -1, 0
    for shapes in groups:
        for name, shape in shapes.items():
            numel = math.prod(shape)
            count = math.ceil(numel / world_size)
            while numel and (group < 0 or position == held[group].numel) and group + 1 < len(held):
                group, position = group + 1, 0
            if group < 0 or (numel and position + count > held[group].numel):
                raise DamagedCheckpoint(
                    f"sub-group {group} ends before it",
                    path=shards.optims[0].path,
                    tensor=name,
                    hint="The model files and the optimizer files belong to different saves.",
                )
            part = held[group]
            length = math.ceil(numel / len(part.files))
            start = position * part.dtype.itemsize
            slices = EvenSlices(part.files, start, length, numel, part.bases)
            masters[name] = Stored(part.dtype, shape, slices)
            position += count
    left = sum(part.numel for part in held[max(group, 0) :]) - position
    if left:
        raise DamagedCheckpoint(
            f"the sub-groups hold {left:,} elements a rank more than the parameters need",
            path=shards.optims[0].path,
            hint="The model files and the optimizer files belong to different saves.",
        )
    return masters


def sliced_frozen(shards: ShardSet) -> dict[str, Stored]:
    """Frozen parameters of stage 3, from the slices in the ranks' model files."""
    shapes = shards.first.get("frozen_param_shapes") or {}
    frozen: dict[str, Stored] = {}
    for name, recorded in shapes.items():
        shape = tuple(recorded)
        fragments: list[Fragment] = []
        start, numel, dtype = 0, math.prod(shape), None
        for model in shards.models:
            ref = (model.get("frozen_param_fragments") or {}).get(name)
            if not isinstance(ref, TensorRef):
                raise DamagedCheckpoint("its frozen slice is missing", path=model.path, tensor=name)
            dtype = dtype or ref.dtype
            stop = min(start + contiguous(ref, name).numel, numel)
            if stop > start:
                fragments.append(Fragment(model.path, ref.byte_offset, FlatRange(start, stop)))
            start = stop
        assert dtype is not None
        frozen[name] = Stored(dtype, shape, fragments)
    return frozen


_STRIDED_MASTER = (
    "a master is stored in another order than row by row (channels last), and masters of stage 0 have no "
    "names to find it by; the 16-bit weights are read"
)


def unpartitioned_masters(shards: ShardSet) -> tuple[dict[str, Stored], list[str]]:
    """Masters of a stage 0 checkpoint by name, and the reason to compare them with the module in full.

    Both are empty if the optimizer kept no masters (fp32 training). If the masters cannot be named, there is
    only the reason.
    """
    optimizer = shards.first.get("optimizer")
    if not isinstance(optimizer, dict):
        return {}, []
    refs = _masters_in_order(optimizer)
    if not all(ref.is_contiguous for ref in refs):
        return {}, [_STRIDED_MASTER]
    vectors = [FlatVector([ref], [ref.numel]) for ref in refs if ref.numel]
    if not vectors:
        return {}, []
    masters = match_by_value(vectors, named_weights(shards.first.content))
    if masters is None:
        return {}, [
            "the values of the fp32 masters match no order of the weights; the 16-bit weights are read"
        ]
    return masters, ["masters of stage 0 have no recorded names"]


def _masters_in_order(optimizer: dict[str, object]) -> list[TensorRef]:
    flat, nested = optimizer.get("fp32_groups_flat"), optimizer.get("fp32_groups")
    groups = flat if isinstance(flat, list) else nested if isinstance(nested, list) else []
    members = [m for group in groups for m in (group if isinstance(group, list) else [group])]
    return [member for member in members if isinstance(member, TensorRef)]
