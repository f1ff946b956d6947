"""Owns the fragments that formats have in common: boxes of a tensor, and slices of equal length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

from ckpt_tools.errors import DamagedCheckpoint, UnsupportedLayout
from ckpt_tools.tensors.catalogue import Box, FlatRange, Fragment, Shape, Stored
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.tiling import Consecutive

Region = FlatRange | Box
Piece = tuple[Box, Callable[[Region], Fragment]]


class EvenSlices(Consecutive):
    """The slices of a flattened tensor, one in each rank's file, made on demand.

    All slices have one length but the last, which may be shorter. A model of a thousand parameters on a
    thousand ranks has a million slices; what the parameters share (``files`` and ``bases``) is kept once.

    Args:
        files: each rank's file.
        offset: byte at which the slice begins, in every file, counted from its base.
        length: elements of a slice.
        numel: elements of the whole tensor.
        bases: byte in each file that ``offset`` is counted from; the first byte by default.
    """

    __slots__ = ("_bases", "_count", "_files", "_length", "_offset", "numel")

    def __init__(
        self,
        files: Sequence[Path],
        offset: int,
        length: int,
        numel: int,
        bases: Sequence[int] | None = None,
    ) -> None:
        self._files, self._bases = files, bases
        self._offset, self._length, self.numel = offset, length, numel
        self._count = -(-numel // length) if numel else 0
        if self._count > len(files):
            raise ValueError(f"{self._count} slices in {len(files)} files")

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Fragment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Fragment]: ...
    def __getitem__(self, index: int | slice) -> Fragment | Sequence[Fragment]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rank = range(len(self))[index]
        base = 0 if self._bases is None else self._bases[rank]
        start = rank * self._length
        region = FlatRange(start, min(start + self._length, self.numel))
        return Fragment(self._files[rank], base + self._offset, region)


def assembled(
    name: str, dtype: DType, shape: Shape, pieces: Sequence[Piece], source: Path, hint: str
) -> Stored:
    """A tensor of boxes.

    Boxes of whole rows, as FSDP writes them, become ranges of the flattened tensor. A window then finds its
    own ranges without a search of all boxes.

    Args:
        name: the tensor's name, for errors.
        dtype: element type.
        shape: sizes of the whole.
        pieces: each box, with a function that makes the fragment of a region.
        source: the file that describes the pieces, for errors.
        hint: the next step where the pieces do not tile the tensor.

    Raises:
        DamagedCheckpoint: the pieces overlap, leave a hole or reach outside the tensor.
        UnsupportedLayout: the tensor is cut along too many axes.
    """
    if len(pieces) == 1 and (whole := pieces[0][0]).sizes == shape and not any(whole.offsets):
        numel = whole.numel
        fragments = [pieces[0][1](FlatRange(0, numel))] if numel else []
    else:
        fragments = _fragments(shape, [(box, make) for box, make in pieces if box.numel])
    try:
        return Stored(dtype, shape, fragments)
    except UnsupportedLayout as error:
        raise UnsupportedLayout(error.fact, path=source, tensor=name, hint=error.hint) from error
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(
            error.fact, path=source, tensor=name, missing=error.missing, hint=hint
        ) from error


def _fragments(shape: Shape, held: list[Piece]) -> list[Fragment]:
    """The fragments of pieces that have elements; flat ranges in rising order if all are whole rows."""
    rest, inner = shape[1:], math.prod(shape[1:])
    ranges = [_rows(shape, rest, inner, box) for box, _ in held]
    regions: list[Region] = [box for box, _ in held]
    if all(flat is not None for flat in ranges):
        order = sorted(range(len(held)), key=lambda i: held[i][0].offsets)
        held = [held[i] for i in order]
        regions = [flat for i in order if (flat := ranges[i]) is not None]
    return [make(region) for (_, make), region in zip(held, regions, strict=True)]


def _rows(shape: Shape, rest: Shape, inner: int, box: Box) -> FlatRange | None:
    """The box as a range of the flattened tensor, where it is whole in all axes but the first.

    Args:
        shape: sizes of the whole.
        rest: its sizes without the first.
        inner: their product.
        box: the box.
    """
    if box.sizes[1:] != rest or any(box.offsets[1:]):
        return None
    if not shape:
        return FlatRange(0, 1)
    start = box.offsets[0] * inner
    return FlatRange(start, start + box.sizes[0] * inner)
