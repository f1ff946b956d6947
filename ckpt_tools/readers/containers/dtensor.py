"""Owns the pickled forms of DTensor and ShardedTensor: which elements of the whole a rank's file holds.

The pickled spec has the mesh sizes, the rank's coordinates and the placements ``Shard``, ``_StridedShard``
and ``Replicate``; :mod:`ckpt_tools.tensors.placements` has their arithmetic. No process group is needed,
because each file states the boxes that it holds.

Source: ``torch/distributed/tensor/_utils.py`` (``_compute_local_shape_and_global_offset``),
``placement_types.py``, ``_shard/sharded_tensor/api.py`` (``__getstate__``), ``device_mesh.py``, read at torch
2.13. Older releases pickle the sizes of a mesh as ``_layout.shape`` or as a tensor ``mesh``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.readers.containers.quantised_classes import dequantised
from ckpt_tools.readers.containers.restricted_pickle import Opaque, TensorRef
from ckpt_tools.readers.containers.subclasses import class_of, plain
from ckpt_tools.readers.containers.torch_file import layout_of, stored
from ckpt_tools.tensors.catalogue import Box, Fragment, Shape, Stored, Strided
from ckpt_tools.tensors.deferred import Place
from ckpt_tools.tensors.dequantise import Dequantised
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.placements import (
    Sharding,
    Spans,
    count_of_boxes,
    local_boxes,
    readings,
)
from ckpt_tools.tensors.regions import digits, dot

# A strided placement makes a span of each chunk; there are as many as ranks of a tensor-parallel group.
_MOST_CHUNKS = 1 << 16
# torch allows no more dimensions. A mesh has a few, each the product of a few sizes.
_MOST_SIZES = 64
_MAX_SIZE = (1 << 63) - 1


# A thousand ranks have a million of both.
class Run(NamedTuple):
    """One box of the whole, and its place in a tensor of a file.

    Attributes:
        box: the elements.
        ref: the tensor in the file.
        start: flat element of ``ref`` at which the box starts; its elements follow each other from there.
    """

    box: Box
    ref: TensorRef
    start: int = 0

    @property
    def place(self) -> Place:
        """The bytes of the box."""
        ref = self.ref
        first = dot(digits(self.start, ref.shape), ref.stride)
        layout = None if layout_of(ref) is None else Strided(self.box.sizes, ref.stride)
        return Place(ref.storage.path, ref.byte_offset + first * ref.dtype.itemsize, layout)


class Part(NamedTuple):
    """The part of a tensor that one rank holds.

    Attributes:
        dtype: element type.
        shape: sizes of the whole.
        runs: the boxes of the part; empty if the part is empty.
        kind: ``DTensor``, ``ShardedTensor``, or ``plain`` for a tensor that each rank holds whole.
        rank: the rank that wrote it, if recorded.
        world_size: the number of ranks, if recorded.
    """

    dtype: DType
    shape: Shape
    runs: tuple[Run, ...]
    kind: str
    rank: int | None = None
    world_size: int | None = None


def whole(ref: TensorRef) -> Part:
    """A tensor that is not sharded."""
    runs = (Run(Box((0,) * len(ref.shape), ref.shape), ref),) if ref.numel else ()
    return Part(ref.dtype, ref.shape, runs, "plain")


def whole_of(value: object, path: Path, name: str) -> Stored | Dequantised | None:
    """The tensor that one file holds whole: a plain tensor, or the part of the only rank that has any.

    A quantised tensor of a class that is known is given as the weight that it stands for.

    Raises:
        UnsupportedLayout: the file holds the part of one rank of several, or the tensor is not plain.
        UnsafePickle: it is an object that only code from the file can build.
    """
    if not _is_sharded(value):
        if (weight := dequantised(value)) is not None:
            return weight
        ref = plain(value, path, name)
        return None if ref is None else stored(ref)
    part = part_of(value, path, name)
    assert part is not None
    held = sum(run.box.numel for run in part.runs)
    if held != math.prod(part.shape):
        raise UnsupportedLayout(
            f"a {part.kind} of which this file holds the part of one rank: {held:,} of "
            f"{math.prod(part.shape):,} elements",
            path=path,
            tensor=name,
            hint="Save full_tensor() of each DTensor, or save a file of each rank as model_rank0.pt, "
            "model_rank1.pt and so on.",
        )
    fragments = []
    for run in part.runs:
        file, offset, layout = run.place
        fragments.append(Fragment(file, offset, run.box, layout))
    return Stored(part.dtype, part.shape, fragments)


def _is_sharded(value: object) -> bool:
    return (class_of(value) or "").rpartition(".")[2] in _SHARDED


def part_of(value: object, path: Path, name: str) -> Part | None:
    """The part of a tensor that a rank holds.

    Args:
        value: an entry of the rank's state dict.
        path: the rank's file, for errors.
        name: the name of the tensor, for errors.

    Returns:
        The part, or None if the value has nothing of a tensor.

    Raises:
        UnsupportedLayout: the tensor is partial (a sum that was not reduced), or not plain.
        UnsafePickle: it is an object that only code from the file can build.
        DamagedCheckpoint: the local tensor does not have the size in the spec.
    """
    if not isinstance(value, Opaque) or not _is_sharded(value):
        ref = plain(value, path, name)
        return None if ref is None else whole(ref)
    kind = value.args[0].global_name.rpartition(".")[2]
    try:
        return _SHARDED[kind](value, path, name)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(
            f"its {kind} does not have the form that torch writes ({type(error).__name__}: {error})",
            path=path,
            tensor=name,
        ) from error


def _of_dtensor(value: Opaque, path: Path, name: str) -> Part:
    dtype, shape = value.args[1], _shape(value.args[2])
    slots = value.state[1]
    local, spec = plain(slots["_local_tensor"], path, name), slots["_spec"].state
    mesh = spec["mesh"].state
    if local is None:
        raise ValueError("its local part is not a tensor")
    world_size = _world_size(mesh)
    rank = mesh.get("_rank")
    coordinate = mesh["_coordinate_on_dim"]
    if coordinate is None:  # this rank is not in the mesh
        return Part(dtype, shape, (), "DTensor", rank, world_size)
    placements = tuple([_placement(each, len(shape), path, name) for each in spec["placements"]])
    chunks = math.prod([1 if each is None else each.split_factor for each in placements])
    local.storage.spend(chunks - 1)
    held = _held(shape, _mesh_shape(mesh), _shape(coordinate), placements)
    spans, sizes = next((one for one in held if one[1] == local.shape), held[-1])
    # FSDP2 keeps a part with other sizes if the tensor has no elements.
    if local.dtype != dtype or (local.shape != sizes and math.prod(shape)):
        raise DamagedCheckpoint(
            f"it holds {local.dtype} {local.shape}, but its placements give {dtype} {sizes}",
            path=path,
            tensor=name,
            hint="The file was changed after it was saved, or torch shards it in an unknown way.",
        )
    local.storage.spend(max(count_of_boxes(spans) - 1, 0))
    runs = tuple([Run(box, local, start) for box, start in _boxes(spans)])
    return Part(dtype, shape, runs, "DTensor", rank, world_size)


# Most tensors of a model have one of a few shapes, and a rank one place in the mesh.
@lru_cache(maxsize=64)
def _held(
    shape: Shape, mesh: Shape, coordinate: Shape, placements: tuple[Sharding | None, ...]
) -> list[tuple[tuple[Spans, ...], Shape]]:
    """The spans that a rank may hold, and the sizes of its part with each."""
    return [
        (spans, tuple(sum(high - low for low, high in held) for held in spans))
        for spans in readings(shape, mesh, coordinate, placements)
    ]


@lru_cache(maxsize=64)
def _boxes(spans: tuple[Spans, ...]) -> tuple[tuple[Box, int], ...]:
    """The boxes of a part, each with the element of the part at which it begins."""
    return tuple(local_boxes(spans))


def _placement(value: Opaque, ndim: int, path: Path, name: str) -> Sharding | None:
    kind = value.global_name.rpartition(".")[2]
    if kind == "Replicate":
        return None
    if kind not in {"Shard", "_StridedShard"}:
        raise UnsupportedLayout(
            f"its placement {kind} is not supported",
            path=path,
            tensor=name,
            hint="A partial tensor is a sum that was not reduced. Redistribute it before saving.",
        )
    axis = value.state["dim"]
    factor = value.state["split_factor"] if kind == "_StridedShard" else 1
    if not 0 <= axis < ndim or not 0 < factor <= _MOST_CHUNKS:
        raise ValueError(f"a placement on axis {axis} of {ndim}, split by {factor}")
    return Sharding(axis, factor)


def _mesh_shape(mesh: Mapping[str, Any]) -> Shape:
    if "_layout" not in mesh:
        return _shape(mesh["mesh"].shape)
    layout = mesh["_layout"].state
    if "axes" in layout:
        return _shape([_product(axis.state["shape"]) for axis in layout["axes"][:_MOST_SIZES]])
    shape = layout["shape"]
    sizes = shape[:_MOST_SIZES] if isinstance(shape, tuple) else (shape,)
    return tuple([_product(size) for size in sizes])


def _product(sizes: Any) -> int:
    """The product of nested tuples, which layouts of flattened axes have."""
    if type(sizes) is int and 0 <= sizes <= _MAX_SIZE:
        return sizes
    product, pending = 1, [sizes]
    for _ in range(_MOST_SIZES):
        if not pending:
            return product
        one = pending.pop()
        if isinstance(one, tuple | list):
            pending += one[:_MOST_SIZES]
        else:
            product *= _shape((one,))[0]
    raise ValueError("an axis of more sizes than a mesh has")


def _world_size(mesh: Mapping[str, Any]) -> int:
    """Number of ranks in the mesh, or in its root mesh if that is recorded."""
    root = mesh.get("_root_mesh")
    return math.prod(_mesh_shape(mesh if root is None else root.state))


def _of_sharded_tensor(value: Opaque, path: Path, name: str) -> Part:
    dtype, shape = value.args[1], _shape(value.args[2])
    shards, _, group = value.state[:3]
    runs: list[Run] = []
    for shard in shards:
        local = plain(shard.state[1]["tensor"], path, name)
        metadata = shard.state[1]["metadata"]
        if local is None:
            raise ValueError("a shard is not a tensor")
        local.storage.spend(bool(runs))
        placed = metadata.state[1]
        box = Box(_shape(placed["shard_offsets"]), _shape(placed["shard_sizes"]))
        if (local.dtype, local.shape) != (dtype, box.sizes):
            raise DamagedCheckpoint(
                f"a shard of it is {local.dtype} {local.shape}, but {dtype} {box.sizes} was recorded",
                path=path,
                tensor=name,
            )
        if box.numel:
            runs.append(Run(box, local))
    ranks = group.state
    rank, world_size = ranks["global_rank"], ranks["global_world_size"]
    return Part(dtype, shape, tuple(runs), "ShardedTensor", rank, world_size)


_SHARDED = {"DTensor": _of_dtensor, "ShardedTensor": _of_sharded_tensor}


def _shape(sizes: Any) -> Shape:
    shape = tuple(sizes)
    if len(shape) > _MOST_SIZES:
        raise ValueError(f"{len(shape)} sizes")
    for size in shape:
        if not isinstance(size, int) or not 0 <= size <= _MAX_SIZE:
            raise ValueError("malformed sizes")
    return shape
