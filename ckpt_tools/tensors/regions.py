"""Owns regions of a tensor, and the arithmetic of windows: integers in, integers out.

Training frameworks cut tensors in two ways: into ranges of the flattened tensor (ZeRO, FSDP1) or into
boxes (DTensor, tensor parallel). A window of flat elements is cut into at most ``2 * ndim - 1`` slabs. Each
slab is a single range in one axis and whole in the axes after it. So a slab's part of a box is one contiguous
run of the box.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
_MAX_SIZE = (1 << 63) - 1
_MAX_NUMEL = (1 << 64) - 1
# What torch's operations take.
_MOST_DIMENSIONS = 64


def is_possible(shape: Shape) -> bool:
    """Whether torch and safetensors can hold a shape.

    torch keeps a size in 63 bits. safetensors multiplies sizes in 64 bits, from the left. So (2^40, 2^40, 0)
    is no shape of a tensor, although it has no elements.
    """
    if len(shape) > _MOST_DIMENSIONS:
        return False
    numel = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            return False
        numel *= size
        if numel > _MAX_NUMEL:
            return False
    return True


@dataclass(frozen=True, slots=True)
class FlatRange:
    """Elements ``[start, stop)`` of the row-major flattened tensor."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned part of a tensor, stored row-major: first index and size in each dimension."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def row_major_strides(shape: Shape) -> Shape:
    """Strides in elements of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def window_slabs(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Cut the window of flat elements ``[start, stop)`` into boxes that are whole after one axis.

    Yields at most ``2 * len(shape) - 1`` boxes, in row-major order: the rest of the first row (cut in the
    same way), the whole rows, and the beginning of the last row.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if len(shape) > 1 and first == last and (stop - start) < inner:
        for slab in window_slabs(shape[1:], start - first * inner, stop - first * inner):
            yield Box((first, *slab.offsets), (1, *slab.sizes))
        return
    whole_from, whole_to = -(-start // inner), stop // inner
    if start < whole_from * inner:
        yield from window_slabs_of_row(shape, first, start - first * inner, inner)
    if whole_from < whole_to:
        yield Box((whole_from, *(0,) * (len(shape) - 1)), (whole_to - whole_from, *shape[1:]))
    if whole_to * inner < stop:
        yield from window_slabs_of_row(shape, whole_to, 0, stop - whole_to * inner)


def window_slabs_of_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[Box]:
    """The slabs of a window that lies within one index of the first axis."""
    for slab in window_slabs(shape[1:], start, stop):
        yield Box((row, *slab.offsets), (1, *slab.sizes))


def intersection(a: Box, b: Box) -> Box | None:
    """The part that two boxes have in common, or None."""
    lows = [max(x, y) for x, y in zip(a.offsets, b.offsets, strict=True)]
    highs = [
        min(x + n, y + m) for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    ]
    sizes = tuple(high - low for low, high in zip(lows, highs, strict=True))
    return Box(tuple(lows), sizes) if min(sizes, default=1) > 0 else None


def collapsed(sizes: Shape, strides: Shape) -> tuple[Shape, Shape]:
    """The same elements without axes of size 1, and with contiguous neighbouring axes joined."""
    joined: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1] == stride * size:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    joined = joined or [(1, 1)]
    return tuple(size for size, _ in joined), tuple(stride for _, stride in joined)


def dot(indices: Shape, strides: Shape) -> int:
    """The flat index of an element, from its index along each axis."""
    return sum(index * stride for index, stride in zip(indices, strides, strict=True))


def digits(index: int, shape: Shape) -> Shape:
    """The index along each axis; the first axis takes what is too large for the shape."""
    found = []
    for size in reversed(shape[1:]):
        index, digit = divmod(index, max(size, 1))
        found.append(digit)
    if shape:
        found.append(index)
    return tuple(reversed(found))
