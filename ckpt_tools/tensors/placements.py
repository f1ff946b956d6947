"""Owns the arithmetic of DTensor placements: which elements of the whole a rank of a mesh holds.

A placement cuts what the placements before it left of one axis. A strided placement takes a part of each of
several chunks, so a rank may hold more than one span of an axis. FSDP2 notes by a strided placement that it
cut what tensor parallelism had left of an axis. Where the axis does not divide evenly, these are other parts
than torch's own arithmetic gives for the placement.

Source: ``torch/distributed/tensor/_utils.py`` (``_compute_local_shape_and_global_offset``) and
``placement_types.py``, ``fsdp/_fully_shard/_fsdp_param.py`` (``_init_sharded_param``), read at torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ckpt_tools.tensors.regions import Box, Shape

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sharding:
    """A placement that cuts an axis; ``split_factor`` is 1 for ``Shard``."""

    axis: int
    split_factor: int = 1


def local_spans(
    shape: Shape, mesh: Shape, coordinate: Shape, placements: Sequence[Sharding | None]
) -> tuple[Spans, ...]:
    """The spans of each axis that the rank at ``coordinate`` holds, in the order in which they are stored.

    Args:
        shape: sizes of the whole.
        mesh: sizes of the mesh.
        coordinate: of the rank in the mesh.
        placements: for each axis of the mesh, what it does to the tensor; None where it replicates.
    """
    spans: list[Spans] = [((0, size),) if size else () for size in shape]
    for parts, index, placement in zip(mesh, coordinate, placements, strict=True):
        if placement is not None:
            held = spans[placement.axis]
            factor = placement.split_factor
            chunks = _chunks(held, factor) if factor > 1 else (held,)
            taken = [_chunk(chunk, parts, index) for chunk in chunks]
            spans[placement.axis] = _joined(span for part in taken for span in part)
    return tuple(spans)


def readings(
    shape: Shape, mesh: Shape, coordinate: Shape, placements: Sequence[Sharding | None]
) -> Iterator[tuple[Spans, ...]]:
    """The spans that the placements may mean; the sizes of the rank's part decide.

    The arguments are those of :func:`local_spans`. All readings are equal where the axes divide evenly. The
    parts of all ranks tile the tensor in each reading, and a mixture of readings leaves a hole.

    Yields:
        The part that FSDP2 makes after tensor parallelism, if the placements can be its; the part that the
        placements give in their order.
    """
    order = _order_of_cuts(mesh, placements)
    if order is not None:
        plain = [None if each is None else Sharding(each.axis) for each in placements]
        yield local_spans(
            shape,
            tuple(mesh[i] for i in order),
            tuple(coordinate[i] for i in order),
            [plain[i] for i in order],
        )
    yield local_spans(shape, mesh, coordinate, placements)


def _order_of_cuts(mesh: Shape, placements: Sequence[Sharding | None]) -> list[int] | None:
    """The order in which FSDP2 and tensor parallelism cut; None if a strided placement has another meaning.

    Its factor is then the number of parts that the later axes of the mesh had made of the same axis before.
    """
    strided = []
    for i, each in enumerate(placements):
        if each is not None and each.split_factor > 1:
            later = zip(mesh[i + 1 :], placements[i + 1 :], strict=True)
            parts = [size for size, other in later if other and other.axis == each.axis]
            if math.prod(parts) != each.split_factor:
                return None
            strided.append(i)
    if not strided:
        return None
    return [i for i in range(len(mesh)) if i not in strided] + strided[::-1]


def _chunk(spans: Spans, parts: int, index: int) -> Spans:
    """The part at ``index`` of ``parts`` that ``torch.chunk`` makes of the spans laid end to end."""
    length = sum(high - low for low, high in spans)
    step = -(-length // parts)
    start, stop = min(step * index, length), min(step * (index + 1), length)
    taken = []
    for low, high in spans:
        first, last = max(start, 0), min(stop, high - low)
        if first < last:
            taken.append((low + first, low + last))
        start, stop = start - (high - low), stop - (high - low)
    return tuple(taken)


def _chunks(spans: Spans, parts: int) -> Iterator[Spans]:
    length = sum(high - low for low, high in spans)
    step = -(-length // parts)
    # A factor larger than the axis leaves empty chunks at the end.
    for index in range(-(-length // step) if step else 0):
        yield _chunk(spans, parts, index)


def _joined(spans: Iterator[tuple[int, int]]) -> Spans:
    joined: list[tuple[int, int]] = []
    for low, high in spans:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def local_boxes(spans: Sequence[Spans]) -> Iterator[tuple[Box, int]]:
    """Cut a rank's tensor into boxes of the whole that are each one run of it.

    Yields:
        A box, and the element of the rank's tensor at which it begins.
    """
    broken = [axis for axis, held in enumerate(spans) if len(held) != 1]
    if any(not held for held in spans):
        return
    last = broken[-1] if broken else 0
    # Before the last axis that is held in several spans, a run is one index of each axis.
    indices = [[(i, 1) for low, high in held for i in range(low, high)] for held in spans[:last]]
    rest = [[(low, high - low) for low, high in held] for held in spans[last:]]
    start = 0
    for cell in product(*indices, *rest):
        box = Box(tuple(low for low, _ in cell), tuple(size for _, size in cell))
        yield box, start
        start += box.numel


def count_of_boxes(spans: Sequence[Spans]) -> int:
    """The number of boxes that :func:`local_boxes` gives."""
    broken = [axis for axis, held in enumerate(spans) if len(held) != 1]
    if not broken:
        return 1
    rows = [sum(high - low for low, high in held) for held in spans[: broken[-1]]]
    return math.prod(rows) * len(spans[broken[-1]])
