"""The part of a DTensor that this process holds: FSDP2, tensor parallelism, both.

Owns the step from a live DTensor to the arithmetic of placements, which files use too
(:mod:`ckpt_tools.tensors.placements`). Nothing is gathered, and no other process is asked.
"""

from __future__ import annotations

from typing import Any

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.checkpoint import Kind
from ckpt_tools.tensors.placements import Sharding, Spans, local_boxes, readings
from ckpt_tools.training.holding import Held, Piece, dtype_of


def is_dtensor(value: object) -> bool:
    """Whether it is one."""
    return type(value).__name__ == "DTensor" or (
        hasattr(value, "device_mesh") and hasattr(value, "placements")
    )


def held_of(name: str, kind: Kind, value: Any) -> Held:
    """The part of a DTensor in this process.

    Raises:
        UnsupportedLayout: a partial sum, or a local part that is not a plain tensor.
    """
    local, shape = value._local_tensor.detach(), tuple(value.shape)
    if hasattr(local, "__tensor_flatten__"):
        raise UnsupportedLayout(
            f"its local part is not a plain tensor but a {type(local).__name__}",
            tensor=name,
            hint="Save a model whose weights are plain tensors in memory.",
        )
    mesh, coordinate = tuple(value.device_mesh.shape), value.device_mesh.get_coordinate()
    placements = [_placement(each, name) for each in value.placements]
    # The part at the first coordinate is the largest.
    room = max(map(_numel, readings(shape, mesh, (0,) * len(mesh), placements)))
    pieces: tuple[Piece, ...] = ()
    if coordinate is not None and local.numel():
        held = list(readings(shape, mesh, tuple(coordinate), placements))
        spans = next((one for one in held if _numel(one) == local.numel()), None)
        if spans is None:
            raise UnsupportedLayout(
                f"its local part has {local.numel():,} elements where its placements give "
                f"{_numel(held[-1]):,}",
                tensor=name,
                hint="It is padded, or torch shards it in an unknown way.",
            )
        boxes = list(local_boxes(spans))
        if len(boxes) == 1:
            pieces = (Piece(boxes[0][0], local),)
        else:
            flat = local.reshape(-1)
            pieces = tuple(Piece(box, flat[start : start + box.numel]) for box, start in boxes)
    return Held(name, "model", kind, dtype_of(local, name), shape, pieces, room=room)


def _placement(placement: Any, name: str) -> Sharding | None:
    kind = type(placement).__name__
    if kind == "Replicate":
        return None
    if kind not in {"Shard", "_StridedShard"}:
        raise UnsupportedLayout(
            f"its placement {kind} is not written",
            tensor=name,
            hint="A partial tensor is a sum that was not carried out. Redistribute it first.",
        )
    return Sharding(placement.dim, getattr(placement, "split_factor", 1))


def _numel(spans: tuple[Spans, ...]) -> int:
    count = 1
    for held in spans:
        count *= sum(high - low for low, high in held)
    return count
