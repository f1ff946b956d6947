"""Owns derived tensors: casts, views and joins of tensors, without their data.

Each wraps tensors and rewrites their moves. A move is a contiguous run of a file that is scattered into a
window, and it stays one. To rewrite it is to compute the new places of the run's elements: arithmetic on
indices that are written in the digits of a shape. This module does no I/O and does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckpt_tools.tensors.catalogue import Move, Shape, Tensor, row_major_strides, window_slabs
from ckpt_tools.tensors.dtypes import DType
from ckpt_tools.tensors.regions import digits, dot
from ckpt_tools.tensors.runs import Run, cut


@dataclass(frozen=True, repr=False, slots=True)
class Cast(Tensor):
    """A tensor in another dtype, rounded to nearest even as torch rounds.

    Attributes:
        tensor: the tensor that is cast.
        dtype: element type of the result.
    """

    tensor: Tensor
    dtype: DType

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Sizes of the tensor that is cast."""
        return self.tensor.shape

    @property
    def pieces(self) -> int:
        """Number of runs of the tensor that is cast."""
        return self.tensor.pieces

    def moves(self, start: int, stop: int) -> Iterator[Move]:
        """The moves of the tensor that is cast, each with one more dtype."""
        for move in self.tensor.moves(start, stop):
            yield replace(move, dtypes=(*move.dtypes, self.dtype))


def cast(tensor: Tensor, dtype: DType) -> Tensor:
    """``tensor`` in ``dtype``; the tensor itself if it has that dtype or is not floating."""
    if tensor.dtype == dtype or not tensor.dtype.is_floating:
        return tensor
    return Cast(tensor, dtype)


@dataclass(frozen=True, repr=False, slots=True)
class View(Tensor):
    """The elements of another tensor in other places, as ``torch.as_strided`` picks them.

    Slices, chunks, transpositions, permutations and reshapes are views. If neighbours in the result are far
    apart in the source, runs of the source are scattered: a whole transposed matrix is one run.

    Attributes:
        tensor: the other tensor, seen as its row-major elements.
        offset: flat index in it of the first element.
        shape: sizes of the view.
        strides: distance in it between neighbours along each axis.

    Raises:
        ValueError: the view reaches outside the tensor.
    """

    tensor: Tensor
    offset: int
    shape: Shape
    strides: Shape

    def __post_init__(self) -> None:
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        lowest = min((self.offset, *self.shape, *self.strides))
        if lowest < 0 or (self.numel and self.offset + last >= self.tensor.numel):
            raise ValueError(f"a view {self.shape} outside its tensor {self.tensor.shape}")

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        """Element type of the tensor that is viewed."""
        return self.tensor.dtype

    @property
    def pieces(self) -> int:
        """Number of runs from which a window is read, at most about the rows of a transposed matrix."""
        axes = [axis for axis, size in enumerate(self.shape) if size > 1]
        nearest = min(axes, key=lambda axis: self.strides[axis], default=len(self.shape))
        scattered = math.prod(self.shape[nearest + 1 :])
        share = -(-self.tensor.pieces * self.numel // max(self.tensor.numel, 1))
        return share + scattered - 1

    @property
    def is_one_run(self) -> bool:
        """Whether its elements are contiguous in the tensor that is viewed, in the same order."""
        return all(
            size == 1 or stride == whole
            for size, stride, whole in zip(
                self.shape, self.strides, row_major_strides(self.shape), strict=True
            )
        )

    def moves(self, start: int, stop: int) -> Iterator[Move]:
        """The moves of those runs of the other tensor that are in the window."""
        if self.is_one_run:
            yield from self.tensor.moves(self.offset + start, self.offset + stop)
            return
        for run in self._runs(start, stop):
            for move in self.tensor.moves(run.start, run.start + math.prod(run.sizes)):
                yield from _placed(move, run)

    def _runs(self, start: int, stop: int) -> list[Run]:
        """The window as runs of the other tensor."""
        slabs = window_slabs(self.shape, start, stop)
        return cut(slabs, row_major_strides(self.shape), self.strides, start=self.offset, at=-start)


@dataclass(frozen=True, repr=False, slots=True)
class Concat(Tensor):
    """Tensors joined along an axis, as ``torch.cat`` joins them.

    Attributes:
        parts: at least one tensor; all have one dtype, and one shape except along the axis.
        axis: the axis, counted from the first.

    Raises:
        ValueError: the parts do not fit each other.
    """

    parts: tuple[Tensor, ...]
    axis: int

    def __post_init__(self) -> None:
        rests = {
            (part.dtype, part.shape[: self.axis], part.shape[self.axis + 1 :])
            for part in self.parts
            if 0 <= self.axis < len(part.shape)
        }
        if len(rests) != 1 or any(self.axis >= len(part.shape) for part in self.parts):
            shapes = ", ".join(f"{part.dtype} {part.shape}" for part in self.parts)
            raise ValueError(f"cannot join along axis {self.axis}: {shapes}")

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        """Element type of the parts."""
        return self.parts[0].dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        """Sizes of the parts, added up along the axis."""
        shape = self.parts[0].shape
        total = sum(part.shape[self.axis] for part in self.parts)
        return (*shape[: self.axis], total, *shape[self.axis + 1 :])

    @property
    def pieces(self) -> int:
        """Number of runs of all parts."""
        return sum(part.pieces for part in self.parts)

    def moves(self, start: int, stop: int) -> Iterator[Move]:
        """The moves of each part's share of the window."""
        if start >= stop:
            return
        row = math.prod(self.shape[self.axis :])
        whole_from, whole_to = -(-start // row), stop // row
        if whole_from > whole_to:
            yield from self._row_moves(start // row, start, stop, row)
            return
        if start < whole_from * row:
            yield from self._row_moves(whole_from - 1, start, whole_from * row, row)
        if whole_from < whole_to:
            at = whole_from * row - start
            for part in self.parts:
                size = math.prod(part.shape[self.axis :])
                run = Run(0, (whole_to - whole_from, size), (row, 1), at)
                for move in part.moves(whole_from * size, whole_to * size):
                    yield from _placed(move, run)
                at += size
        if whole_to * row < stop:
            yield from self._row_moves(
                whole_to, whole_to * row, stop, row, at=whole_to * row - start
            )

    def _row_moves(
        self, index: int, start: int, stop: int, row: int, at: int = 0
    ) -> Iterator[Move]:
        """The moves of a window in one row: the elements with the same indices in the axes before."""
        border = index * row
        for part in self.parts:
            size = math.prod(part.shape[self.axis :])
            low, high = max(start, border), min(stop, border + size)
            if low < high:
                first = index * size + low - border
                for move in part.moves(first, first + high - low):
                    yield replace(move, at=at + low - start + move.at)
            border += size


def view(tensor: Tensor, offset: int, shape: Shape, strides: Shape) -> Tensor:
    """A :class:`View`. A view of a view becomes one view of the inner tensor, if that is possible."""
    if isinstance(tensor, View):
        seen = strided(
            offset, tuple(zip(shape, strides, strict=True)), tensor.shape, tensor.strides
        )
        if seen is not None:
            return view(tensor.tensor, tensor.offset + seen[0], shape, seen[1])
    made = View(tensor, offset, shape, strides)
    return tensor if shape == tensor.shape and offset == 0 and made.is_one_run else made


def _placed(move: Move, run: Run) -> Iterator[Move]:
    """A move into a run, as moves into the window of the run's elements."""
    steps = move.steps or row_major_strides(move.sizes)
    axes = tuple(zip(move.sizes, move.strides, steps, strict=True))
    for part in _parts(move.at, axes, run.sizes, run.strides):
        dense = part.steps == row_major_strides(part.sizes)
        yield replace(
            move,
            offset=move.offset + part.start * move.dtype.itemsize,
            sizes=part.sizes,
            strides=part.strides,
            at=run.at + part.at,
            steps=() if dense else part.steps,
        )


# The size of each axis, its stride in the window, and its step in the source.
_Axes = tuple[tuple[int, int, int], ...]


def _parts(start: int, axes: _Axes, shape: Shape, strides: Shape) -> Iterator[Run]:
    """Cut a strided set of flat elements of ``shape`` so that each part is strided in ``strides`` too.

    Args:
        start: flat index of the first element.
        axes: the axes of the set.
        shape: the shape whose row-major elements the indices count.
        strides: distance between neighbours along each axis of ``shape`` in the window.

    Yields:
        Each part as a run, whose start is counted from the first element of the set in the source.
    """
    axes = tuple(axis for axis in axes if axis[0] > 1) or ((1, 1, 1),)
    seen = strided(start, tuple(axis[:2] for axis in axes), shape, strides)
    if seen is not None:
        at, places = seen
        yield Run(0, tuple(n for n, _, _ in axes), places, at, tuple(step for *_, step in axes))
        return
    (count, stride, step), rest = axes[0], axes[1:]
    if rest:
        for index in range(count):
            for part in _parts(start + index * stride, rest, shape, strides):
                yield replace(part, start=part.start + index * step)
        return
    position = 0
    if stride == 1:
        for slab in window_slabs(shape, start, start + count):
            kept = [(n, t) for n, t in zip(slab.sizes, strides, strict=True) if n > 1] or [(1, 1)]
            sizes, places = tuple(n for n, _ in kept), tuple(t for _, t in kept)
            steps = tuple(step * whole for whole in row_major_strides(sizes))
            yield Run(position * step, sizes, places, dot(slab.offsets, strides), steps)
            position += slab.numel
        return
    while position < count:
        first = start + position * stride
        length = min(_steps_without_carry(first, stride, shape), count - position)
        seen = strided(first, ((length, stride),), shape, strides)
        assert seen is not None
        yield Run(position * step, (length,), seen[1], seen[0], (step,))
        position += length


def strided(
    start: int, axes: tuple[tuple[int, int], ...], shape: Shape, strides: Shape
) -> tuple[int, Shape] | None:
    """The places of the elements of a strided set, if these are again a strided set.

    A step along an axis of the set adds its stride to the index. In the digits of ``shape``, this is one
    stride in the window as long as no digit carries.

    Returns:
        The place of the first element and the stride of each axis, or None if a digit carries.
    """
    first = digits(start, shape)
    tops = list(first)
    steps = []
    for size, stride in axes:
        step = digits(stride, shape) if size > 1 else (0,) * len(shape)
        for axis, digit in enumerate(step):
            tops[axis] += digit * (size - 1)
        steps.append(dot(step, strides))
    if any(top >= max(size, 1) for top, size in zip(tops, shape, strict=True)):
        return None
    return dot(first, strides), tuple(steps)


def _steps_without_carry(start: int, step: int, shape: Shape) -> int:
    return min(
        (size - 1 - digit) // by + 1
        for size, digit, by in zip(shape, digits(start, shape), digits(step, shape), strict=True)
        if by
    )
