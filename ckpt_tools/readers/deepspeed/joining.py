"""Owns the arithmetic of joining the slices of tensor-parallel ranks, fragment by fragment.

A piece is a box of a rank's slice and its place in the whole;
:mod:`~ckpt_tools.readers.deepspeed.tensor_parallel` decides how a parameter is cut. Nothing is read.
Building the tensor proves that the boxes tile the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ckpt_tools.errors import UnsupportedLayout
from ckpt_tools.tensors.catalogue import Box, Fragment, Shape, Stored, Strided
from ckpt_tools.tensors.regions import dot, intersection, row_major_strides, window_slabs


@dataclass(frozen=True)
class Piece:
    """A box of one rank's slice, and its place in the whole.

    Attributes:
        rank: the rank of the slice.
        box: the elements in the slice.
        offsets: first index in the whole, in each dimension.
    """

    rank: int
    box: Box
    offsets: Shape


def whole(slice_shape: Shape) -> Box:
    """The box of a whole slice."""
    return Box((0,) * len(slice_shape), slice_shape)


def along(shape: Shape, axis: int, start: int, size: int) -> Box:
    """The box of a slice of this shape with ``size`` indices from ``start`` along an axis."""
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[axis], sizes[axis] = start, size
    return Box(tuple(offsets), tuple(sizes))


def shifted(shape: Shape, axis: int, start: int) -> Shape:
    """The first index of a box that starts at ``start`` along an axis."""
    return tuple(start if index == axis else 0 for index in range(len(shape)))


def copies(shapes: Sequence[Shape]) -> list[Piece]:
    """The pieces of a tensor of which every rank has all."""
    return [Piece(rank, whole(shape), (0,) * len(shape)) for rank, shape in enumerate(shapes)]


def taken(slices: Sequence[Stored], piece: Piece) -> Stored:
    """A piece of a slice as a tensor of its own."""
    origin = (0,) * len(piece.offsets)
    return joined(slices, [Piece(piece.rank, piece.box, origin)], piece.box.sizes)


def joined(slices: Sequence[Stored], pieces: Sequence[Piece], shape: Shape) -> Stored:
    """The tensor of this shape that the pieces make up.

    Raises:
        DamagedCheckpoint: an element is in no piece, or in two.
    """
    fragments = [
        fragment for piece in pieces for fragment in _placed(slices[piece.rank], piece, shape)
    ]
    return Stored(slices[0].dtype, shape, fragments)


def _placed(stored: Stored, piece: Piece, shape: Shape) -> Iterator[Fragment]:
    """The fragments of a slice that hold a piece of it, at their places in the whole."""
    itemsize = stored.dtype.itemsize
    for fragment in stored.fragments:
        layout, position = fragment.layout, fragment.offset
        for region in _boxes(fragment, stored.shape):
            part = intersection(region, piece.box)
            if part is None:
                boxes: Iterable[Box] = ()
            elif layout is None:
                boxes = _runs(part, region)
            else:
                boxes = (part,)
            strides = row_major_strides(region.sizes) if layout is None else layout.strides
            for box in boxes:
                first = dot(_minus(box.offsets, region.offsets), strides)
                inside = _minus(box.offsets, piece.box.offsets)
                offsets = tuple(low + to for low, to in zip(inside, piece.offsets, strict=True))
                yield Fragment(
                    fragment.file,
                    position + first * itemsize,
                    Box(offsets, box.sizes),
                    None if layout is None else Strided(box.sizes, strides),
                )
            position += region.numel * itemsize


def _minus(indices: Shape, origin: Shape) -> Shape:
    return tuple(index - low for index, low in zip(indices, origin, strict=True))


def _boxes(fragment: Fragment, shape: Shape) -> Iterator[Box]:
    """The region of a fragment as boxes that follow each other in its bytes.

    Raises:
        UnsupportedLayout: it is read by strides of another shape.
    """
    region = fragment.region
    if isinstance(region, Box):
        yield region
    elif fragment.layout is None:
        yield from window_slabs(shape, region.start, region.stop)
    elif fragment.layout.sizes == shape:
        yield whole(shape)
    else:
        raise UnsupportedLayout(
            f"a slice of it is a strided tensor of another shape than {shape}",
            path=fragment.file,
            hint="Load the checkpoint in the training script, call contiguous() on its tensors, and save it.",
        )


def _runs(part: Box, region: Box) -> Iterator[Box]:
    """A part of a region as boxes that are each one run of the region's bytes."""
    narrow = [
        axis for axis, (n, m) in enumerate(zip(part.sizes, region.sizes, strict=True)) if n != m
    ]
    outer = narrow[-1] if narrow else 0
    for index in product(*(range(size) for size in part.sizes[:outer])):
        offsets = (
            *(low + i for low, i in zip(part.offsets[:outer], index, strict=True)),
            *part.offsets[outer:],
        )
        yield Box(offsets, ((1,) * outer + part.sizes[outer:]))
